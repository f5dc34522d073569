"""Cases of the linear kernel that test_linear_values.py, which runs on every backend, does not have.

Widths: 1, 31 and 123 are no multiples of a tile's depth, 576 is nine times 64. Vocabularies: 1 and 7 fit into the
smallest tile, 129 and 300 end in the middle of a tile, 50,257 is that of GPT-2. 130 and 300 tokens need two and three
blocks of 128.
"""

import pytest
import torch
from cases import assert_same_bits, compare, evaluate, head, upstream, values

from reval_kernels import linear_reval_loss, linear_token_values
from reval_kernels import reference as definition

pytest.importorskip("triton")


@pytest.fixture(params=["descriptors", "pointers"])
def form(request, monkeypatch):
    """Both kernels. Without the fixture a bf16 or fp16 head whose rows are multiples of 16 bytes is read through
    descriptors, as on a Hopper GPU, and every other head through pointers."""
    from reval_kernels.backends.gpu import linear_launch

    if request.param == "pointers":
        monkeypatch.setattr(linear_launch, "_has_tma", lambda device: False)


@pytest.mark.parametrize("shape", [(2, 2, 300, 72), (1, 129, 64), (130, 257, 8), (3, 7, 8)])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}])
def test_both_forms(form, shape, options):
    hidden, weight, actions = head(*shape, dtype=torch.bfloat16)
    mask = torch.rand(actions.shape) < 0.8
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    by = upstream(actions.shape)
    compare("triton", "linear_token_values", inputs, by, mask=mask, with_entropy=True, **options)
    inputs["bias"] = torch.randn(len(weight))
    compare("triton", "linear_token_values", inputs, by, with_entropy=True, **options)


@pytest.mark.parametrize("needs", ["all", "hidden"])
def test_the_loss_in_both_forms(form, needs):
    """The weights that the forward keeps become the gradient. With a frozen head their sums over the head do."""
    hidden, weight, actions = head(3, 5, 257, 64, dtype=torch.bfloat16)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    reference, rewards = values(3, 5, dtype=torch.float32), torch.randn(3)
    for transform in ({}, {"softcap": 5.0, "temperature": torch.rand(3, 5) + 0.5}):
        about = {"reference": reference, "rewards": rewards, "beta": 0.5, **transform}
        if needs == "all":
            compare("triton", "linear_reval_loss", inputs, {"loss": torch.tensor(1.5)}, **about)
        else:
            leaf = hidden.clone().requires_grad_()
            wide = hidden.double().requires_grad_()
            loss = linear_reval_loss(leaf, weight, actions, **about, backend="triton").loss
            truth = definition.linear_reval_loss(wide, weight.double(), actions, **about).loss
            (mine,), (true,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(truth, wide)
            # a weight is rounded twice and the sum once, by 2^-8 each at most
            assert (mine.double() - true).abs().max() <= 3 * 2**-8 * true.abs().max()


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


def test_how_the_hidden_states_lie_in_memory_changes_no_bit(form):
    """A descriptor cannot describe hidden states at odd addresses, so they are copied. The choice of the kernel follows
    from the head alone."""
    hidden, weight, actions = head(5, 129, 64, dtype=torch.bfloat16)
    wanted = linear_token_values(hidden, weight, actions, backend="triton")
    moved = torch.nn.functional.pad(hidden, (1, 0))[:, 1:]
    apart = torch.stack([hidden, hidden], -1)[..., 0]
    for other in (moved, apart, hidden[:1].expand(5, 64)):
        ours = linear_token_values(other, weight, actions, backend="triton")
        assert_same_bits([x[:1] for x in wanted[:3]], [x[:1] for x in ours[:3]])


def test_a_token_s_numbers_do_not_depend_on_its_company(monkeypatch, form):
    """300 tokens need three blocks in two groups, token 270 alone one block. The size of the chunks has no effect."""
    from reval_kernels.backends import gpu
    from reval_kernels.backends.gpu import linear_launch

    monkeypatch.setattr(linear_launch, "GROUP", 2)
    hidden, weight, actions = head(300, 129, 32, dtype=torch.bfloat16)
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


def test_the_weight_s_gradient_over_several_chunks_is_summed_in_float32(monkeypatch):
    """96 tokens in 48 chunks. Each adds the same rank-one product: rounded to bf16 after each, the sum would stay far
    behind. In one chunk, the product itself is rounded to bf16, once."""
    from reval_kernels.backends import gpu

    hidden, weight, _ = head(1, 24, 16, dtype=torch.bfloat16)
    inputs = {"hidden": hidden.expand(96, 16).clone(), "weight": weight, "actions": torch.zeros(96, dtype=torch.long)}
    whole = evaluate(linear_token_values, inputs, {"log_prob": torch.ones(96)}, backend="triton")
    monkeypatch.setattr(gpu, "LINEAR_CHUNK", 24 * 2)
    pieces = evaluate(linear_token_values, inputs, {"log_prob": torch.ones(96)}, backend="triton")
    error = (pieces["d weight"].double() - whole["d weight"].double()).abs().max()
    assert error <= 2**-8 * whole["d weight"].double().abs().max()


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
