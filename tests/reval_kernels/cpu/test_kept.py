"""Logits that linear_reval_loss keeps in the memory of the head's gradient between its two passes (kept.h).

Letters: M tokens, V words, D width. A strip is 64 tokens; the memory holds D / 64 strips. The shapes:
- M = 150, D = 70: the first of three strips is kept.
- M = 119, D = 200: both strips are kept; the second one is not full.
- M = 910, D = 2048: all 15 strips are kept, in four blocks. The sum over the first block is written while the logits of
  the other blocks are still needed.
- V = 517 and V = 197: the last tile is not full.
"""

import pytest
import torch
from cases import assert_same_bits, compare, evaluate, head

from reval_kernels import bellman_loss, linear_reval_loss, linear_token_values
from reval_kernels.backends import cpu

pytestmark = pytest.mark.skipif(cpu.missing() is not None, reason=f"no C++ backend: {cpu.missing()}")

SHAPES = [(3, 50, 517, 70), (7, 17, 300, 200), (7, 130, 197, 2048)]
ONE = {"loss": torch.tensor(1.0)}


def inputs_of(*shape, dtype):
    """The inputs, and the other arguments of linear_reval_loss. The returns of the reference are near those of the
    policy, so that no gradient is much larger than the others."""
    hidden, weight, actions = head(*shape, dtype=dtype)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    values = linear_token_values(**inputs, backend="portable")
    returns = values.v[:, 0] + values.log_prob.sum(1) + torch.randn(shape[0])
    return inputs, {"reference": returns, "rewards": torch.randn(shape[0]), "beta": 0.5}


def kept_strips(inputs, bias=None):
    args = (inputs["hidden"], inputs["weight"], bias, inputs["actions"], None, 1.0, None, None)
    return torch.ops.reval_kernels_cpu.linear_keeping(*args)[7].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(shape, dtype):
    inputs, options = inputs_of(*shape, dtype=dtype)
    compare("cpu", "linear_reval_loss", inputs, ONE, **options)


@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_are_kept_in_float32(hidden):
    """If the head is bf16, its gradient has room for only half as many strips in fp32."""
    inputs, options = inputs_of(3, 60, 300, 200, dtype=torch.float32)
    inputs["hidden"] = inputs["hidden"].to(hidden)
    inputs["weight"] = inputs["weight"].to(torch.bfloat16 if hidden == torch.float32 else torch.float32)
    assert kept_strips(inputs) == [True] * (1 if hidden == torch.float32 else 3)
    compare("cpu", "linear_reval_loss", inputs, ONE, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_bias_temperature_and_softcap(dtype):
    inputs, options = inputs_of(3, 90, 517, 130, dtype=dtype)
    inputs["bias"], options["mask"] = torch.randn(517).to(dtype), torch.rand(3, 90) < 0.8
    options |= {"softcap": 6.0, "temperature": 0.5 + torch.rand(3, 90)}
    inputs["hidden"][~options["mask"]] = torch.nan
    compare("cpu", "linear_reval_loss", inputs, ONE, **options)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_keeps_every_bit(shape):
    """The results are equal to those with recomputed logits; the gradient of linear_token_values recomputes them."""
    inputs, options = inputs_of(*shape, dtype=torch.float32)
    ours = evaluate(linear_reval_loss, inputs, ONE, backend="cpu", **options)

    def in_two_steps(**leaves):
        return bellman_loss(linear_token_values(**leaves, backend="cpu"), backend="cpu", **options)

    assert_same_bits(ours, evaluate(in_two_steps, inputs, ONE))
    assert kept_strips(inputs) == [True] * min(shape[-1] // 64, -(-shape[0] * shape[1] // 64))


def test_a_logit_far_above_the_action():
    """16 bits cannot hold this logit. So the second of three strips is recomputed, and the others are kept."""
    inputs, options = inputs_of(3, 60, 300, 200, dtype=torch.bfloat16)
    bias = torch.zeros(300, dtype=torch.bfloat16)
    hidden = inputs["hidden"].view(-1, 200)
    hidden[:, 0], inputs["weight"][:, 0], inputs["weight"][7, 0] = 0, 0, 8
    hidden[70, 0] = 5  # the logit of word 7 is 40 above the others
    assert kept_strips(inputs, bias) == [True, False, True]
    compare("cpu", "linear_reval_loss", inputs, ONE, **options)
    hidden[70, 0] = 2  # the logit of word 7 is 16 above the others
    assert kept_strips(inputs, bias) == [True, True, True]
    compare("cpu", "linear_reval_loss", inputs, ONE, **options)


def test_softcap_brings_words_far_below_the_action_near():
    """With a softcap, a logit 60 below the action's may be as likely as the action. Such a strip is recomputed."""
    inputs, options = inputs_of(3, 60, 300, 200, dtype=torch.bfloat16)
    inputs["hidden"][0] *= 20
    inputs["actions"] = (inputs["hidden"] @ inputs["weight"].T).argmax(-1)
    options["softcap"] = 30.0
    args = (inputs["hidden"], inputs["weight"], None, inputs["actions"], None, 1.0, None, options["softcap"])
    assert torch.ops.reval_kernels_cpu.linear_keeping(*args)[7].tolist() == [False, True, True]
    compare("cpu", "linear_reval_loss", inputs, ONE, **options)


@pytest.mark.parametrize("temperature", [torch.inf, 1e-37])
def test_temperatures_without_steps(temperature):
    """At these temperatures, the size of a 16-bit step is 0 or infinite. One such token must not make d_weight NaN."""
    inputs, options = inputs_of(3, 60, 300, 200, dtype=torch.bfloat16)
    options["temperature"] = torch.ones(3, 60)
    options["temperature"][1, 10] = temperature
    inputs["actions"] = (inputs["hidden"] @ inputs["weight"].T).argmax(-1)
    ours, theirs = (evaluate(linear_reval_loss, inputs, ONE, backend=b, **options) for b in ("cpu", "portable"))
    assert ours["d weight"].isfinite().all() == theirs["d weight"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_confident_action_keeps_its_gradient(dtype):
    """1 - p of this action is 1e-6. To compute it, the backward pass needs the exact logit of the forward pass."""
    inputs, options = inputs_of(3, 60, 300, 200, dtype=dtype)
    inputs["hidden"][..., 0], inputs["weight"][:, 0] = 0, 0
    at, word = (1, 5), 7
    inputs["hidden"][at][0], inputs["weight"][word, 0], inputs["actions"][at] = 2.5, 8, word
    compare("cpu", "linear_reval_loss", inputs, ONE, **options)


def test_words_far_below_the_action():
    """A word with a logit up to 40 below the action's keeps its gradient. A lower logit counts as -inf."""
    inputs, options = inputs_of(3, 60, 300, 200, dtype=torch.bfloat16)
    inputs["actions"].clamp_(max=199)
    ours = {}
    for below in (20, 60, torch.inf):
        inputs["bias"] = torch.zeros(300, dtype=torch.bfloat16)
        inputs["bias"][200:] = -below
        assert kept_strips(inputs, inputs["bias"]) == [True] * 3
        ours[below] = evaluate(linear_reval_loss, inputs, ONE, backend="cpu", **options)
        if below != 60:
            compare("cpu", "linear_reval_loss", inputs, ONE, **options)
    assert (ours[20]["d weight"][200:] != 0).any()
    assert_same_bits(ours[60], ours[torch.inf])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_with_its_token(dtype):
    """The gradients of the token's trajectory and of the head are NaN. Those of other trajectories do not change."""
    inputs, options = inputs_of(3, 60, 300, 200, dtype=dtype)
    before = evaluate(linear_reval_loss, inputs, ONE, backend="cpu", **options)["d hidden"]
    inputs["hidden"][1, 5, 3] = torch.nan
    after = evaluate(linear_reval_loss, inputs, ONE, backend="cpu", **options)
    assert after["d hidden"][1].isnan().all() and after["d weight"].isnan().all()
    assert_same_bits(after["d hidden"][[0, 2]], before[[0, 2]])
