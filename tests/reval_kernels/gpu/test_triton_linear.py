"""Cases of the linear kernel that test_linear_values.py, which runs on every backend, does not have.

Widths: 1, 31 and 123 are no multiples of a tile's depth, 576 is nine times 64. Vocabularies: 1 and 7 fit into the
smallest tile, 129 and 300 end in the middle of a tile, 50,257 is that of GPT-2. 130 and 300 tokens need two and three
blocks of 128.
"""

import pytest
import torch
from cases import assert_same_bits, compare, evaluate, head, upstream, values

from reval_kernels import linear_reval_loss, linear_token_values

pytest.importorskip("triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 1, 31), (3, 7, 1), (1, 129, 123), (2, 2, 300, 576), (130, 129, 31)])
def test_shapes(shape, dtype):
    hidden, weight, actions = head(*shape, dtype=dtype)
    mask = torch.rand(actions.shape) < 0.8
    compare(
        "triton",
        "linear_token_values",
        {"hidden": hidden, "weight": weight, "actions": actions},
        upstream(actions.shape),
        mask=mask,
        with_entropy=True,
    )


@pytest.mark.slow
def test_a_large_vocabulary():
    hidden, weight, actions = head(2, 50_257, 31, dtype=torch.bfloat16)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    compare("triton", "linear_token_values", inputs, upstream(actions.shape, "v", "log_prob"), softcap=5.0)


@pytest.mark.parametrize("layout", ["transposed weight", "strided hidden", "sliced"])
def test_strides(layout):
    hidden, weight, actions = head(5, 40, 24)
    if layout == "transposed weight":
        weight = weight.T.contiguous().T
    elif layout == "strided hidden":
        hidden = torch.stack([hidden, hidden], dim=-1)[..., 0]
    else:  # the entries beside the slice are NaN: they must not be read
        for x in (hidden, weight):
            x[:, :3] = x[:, 20:] = torch.nan
        hidden, weight = hidden[::2, 3:20], weight[:, 3:20]
        actions = actions[::2]
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    compare("triton", "linear_token_values", inputs, upstream(actions.shape), with_entropy=True)


def test_a_token_s_numbers_do_not_depend_on_its_company(monkeypatch):
    """300 tokens need three blocks in two groups, token 270 alone one block. The size of the chunks has no effect."""
    from reval_kernels.backends import gpu
    from reval_kernels.backends.gpu import linear

    monkeypatch.setattr(linear, "GROUP", 2)
    hidden, weight, actions = head(300, 129, 31, dtype=torch.bfloat16)
    together = linear_token_values(hidden, weight, actions, backend="triton")
    alone = linear_token_values(hidden[270:271], weight, actions[270:271], backend="triton")
    assert_same_bits([x[270:271] for x in together[:3]], list(alone[:3]))

    by = {"log_prob": torch.randn(300)}
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    whole = evaluate(linear_token_values, inputs, by, backend="triton")
    monkeypatch.setattr(gpu, "LINEAR_CHUNK", 129 * 97)
    pieces = evaluate(linear_token_values, inputs, by, backend="triton")
    assert_same_bits(whole["d hidden"], pieces["d hidden"])


@pytest.mark.parametrize("p", [0.999, 1 - 1e-6])
def test_a_confident_state_keeps_its_gradient_through_the_head(p):
    """Another way to compute the logits near 20 would change them by 2e-6, which is more than this state's 1 - p."""
    width, words = 64, 129
    hidden, weight = torch.randn(1, width), torch.randn(words, width) / 8
    gap = torch.tensor(p / (1 - p) * (words - 1)).log()
    weight[5] = weight[6] + hidden[0] * (gap + 15 - (weight @ hidden[0]).max().clamp(min=0)) / hidden[0].square().sum()
    inputs = {"hidden": hidden, "weight": weight, "actions": torch.tensor([5])}
    compare("triton", "linear_token_values", inputs, {"log_prob": torch.ones(1)})


@pytest.mark.parametrize("chunk", [129 * 3, 129 * 7, 1 << 28])
@pytest.mark.parametrize("level", ["trajectory", "token"])
def test_trajectories_longer_than_a_chunk(monkeypatch, chunk, level):
    from reval_kernels.backends import gpu

    monkeypatch.setattr(gpu, "LINEAR_CHUNK", chunk)
    hidden, weight, actions = head(3, 5, 129, 31)
    reference, rewards = values(3, 5, dtype=torch.float32), torch.randn(3)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    options = {"reference": reference, "rewards": rewards, "beta": 0.5, "level": level}
    compare("triton", "linear_reval_loss", inputs, {"loss": torch.tensor(1.5)}, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_equal_to_its_reference_has_no_loss_with_any_chunks(monkeypatch, dtype):
    """The reference is scored in one chunk, the policy two trajectories at a time. The loss is still exactly 0."""
    from reval_kernels.backends import gpu

    hidden, weight, actions = head(4, 5, 129, 31, dtype=dtype)
    reference = linear_token_values(hidden, weight, actions, backend="triton")
    monkeypatch.setattr(gpu, "LINEAR_CHUNK", 129 * 10)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    ours = evaluate(
        linear_reval_loss,
        inputs,
        {"loss": torch.tensor(1.0)},
        reference=reference,
        rewards=torch.zeros(4),
        beta=0.1,
        backend="triton",
    )
    assert all((ours[k] == 0).all() for k in ("loss", "d hidden", "d weight"))


def test_torch_without_a_matmul_from_bf16_to_fp32(monkeypatch):
    """AMD builds of torch have no such matmul, so a few words of the head are widened at a time. The logits still come
    from the same kernel: a policy equal to its reference has loss exactly 0."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    hidden, weight, actions = head(2, 5, 129, 31, dtype=torch.bfloat16)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    compare("triton", "linear_token_values", inputs, upstream(actions.shape), with_entropy=True)
    ours = evaluate(
        linear_reval_loss,
        inputs,
        {"loss": torch.tensor(1.0)},
        beta=0.1,
        rewards=torch.zeros(2),
        reference=linear_token_values(**inputs, backend="triton"),
        backend="triton",
    )
    assert all((ours[k] == 0).all() for k in ("loss", "d hidden", "d weight"))


def test_operands_of_two_dtypes_go_to_the_portable_backend():
    hidden, weight, actions = head(3, 17, 8)
    inputs = {"hidden": hidden.bfloat16(), "weight": weight, "actions": actions}
    compare("triton", "linear_token_values", inputs, upstream(actions.shape, "q", "v"))
