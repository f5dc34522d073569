"""linear_token_values against its definition.

Vocabularies are those of test_values.py. Widths: 1, 31 and 123 end in the middle of every block of a matmul, 576 is
that of a small model. N, V and D are combined so that each of them is odd in some case, and the truth is not too slow.
"""

import math

import pytest
import torch
from cases import (
    BACKENDS,
    DTYPES,
    assert_no_worse_than_torch,
    assert_same_bits,
    compare,
    device_error,
    evaluate,
    float64_truth,
    head,
    logit_error,
    natural_scales,
    on_backends,
    torch_error,
    upstream,
)
from torch.utils._python_dispatch import TorchDispatchMode

from reval_kernels import linear_reval_loss, linear_token_values, reference
from reval_kernels.backends import BACKENDS as BACKENDS_BY_NAME
from reval_kernels.backends import chunks, gpu
from reval_kernels.backends.frozen_head import gradient_of_hidden
from reval_kernels.contract import HeadInputs, Tokens, Transform, UnitGradients

SHAPES = [
    (0, 7, 31),
    (1, 7, 1),
    (5, 1, 31),
    (2, 3, 7, 123),
    (5, 129, 576),
    (3, 7, 129, 1),
    (4, 1000, 123),
    (2, 32001, 31),
    (1, 151936, 3),
]


def inputs_of(*shape, dtype=torch.float32, bias=False):
    hidden, weight, actions = head(*shape, dtype=dtype)
    out = {"hidden": hidden, "weight": weight, "actions": actions}
    return out | {"bias": torch.randn(shape[-2]).to(dtype)} if bias else out


@pytest.mark.parametrize("dtype", DTYPES)
@on_backends(SHAPES, entries=lambda shape: math.prod(shape[:-1]))
def test_values_and_gradients(backend, shape, dtype):
    inputs = inputs_of(*shape, dtype=dtype, bias=len(shape) == 4)
    ours = compare(backend, "linear_token_values", inputs, upstream(shape[:-2]), with_entropy=True)
    assert ours["q"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [0.7, "per token"])
@pytest.mark.parametrize("bias", [False, True])
def test_softcap_temperature_and_bias(backend, bias, temperature, softcap, dtype):
    inputs = inputs_of(2, 4, 129, 31, dtype=dtype, bias=bias)
    temperature = 0.5 + torch.rand(2, 4) if temperature == "per token" else temperature
    options = {"softcap": softcap, "temperature": temperature, "with_entropy": True}
    compare(backend, "linear_token_values", inputs, upstream((2, 4)), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0.6, 0.0])
def test_masked_tokens_are_never_read(backend, kept, dtype):
    """NaN hidden states of masked tokens do not reach the weight's gradient."""
    inputs = inputs_of(3, 6, 129, 31, dtype=dtype, bias=True)
    mask = torch.rand(3, 6) < kept
    inputs["hidden"][~mask], inputs["actions"][~mask] = torch.nan, -100
    by = upstream((3, 6))
    ours = compare(backend, "linear_token_values", inputs, by, mask=mask, with_entropy=True)
    assert all((ours[k][~mask] == 0).all() for k in ("q", "v", "log_prob", "entropy", "d hidden"))
    if not mask.any():
        assert all((ours[k] == 0).all() for k in ("d weight", "d bias"))


@pytest.mark.parametrize(
    "wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("hidden", "bias"), ("weight", "bias")]
)
def test_only_the_gradients_asked_for(backend, wanted):
    """Every single input and every pair: the gradients have the same bits as when all inputs need one."""
    inputs, by = inputs_of(4, 129, 31, bias=True), upstream((4,), "q", "v", "log_prob")
    expected = evaluate(linear_token_values, inputs, by, backend=backend)
    leaves = {k: x.detach().requires_grad_(k in wanted) for k, x in inputs.items()}
    out = linear_token_values(**leaves, backend=backend)
    torch.autograd.backward(out[:3], list(by.values()))
    for name in ("hidden", "weight", "bias"):
        if wanted == ("hidden",) == (name,):  # a frozen head sums in another order; the frozen_head tests check it
            torch.testing.assert_close(leaves[name].grad, expected[f"d {name}"], rtol=1e-4, atol=1e-5)
        else:
            assert_same_bits(leaves[name].grad, expected[f"d {name}"] if name in wanted else None)


@pytest.mark.parametrize(
    ("hidden", "weight", "bias"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16, torch.float64),
        (torch.float64, torch.float32, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes(backend, hidden, weight, bias):
    """Each gradient has the dtype of its input. The dtype of the outputs depends on the hidden states."""
    inputs = inputs_of(5, 129, 31, bias=True)
    for name, dtype in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        inputs[name] = inputs[name].to(dtype)
    ours = compare(backend, "linear_token_values", inputs, upstream((5,)), with_entropy=True)
    assert ours["v"].dtype == (torch.float64 if hidden == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "view",
    [
        lambda h, w: (h[:, ::2, 1::2], w[::2, :24]),
        lambda h, w: (h.transpose(0, 1)[..., :47], w[:, 1:]),
        lambda h, w: (h[:1].expand(4, -1, -1), w),
        lambda h, w: (h[..., :31], torch.randn(31, 129).to(w.dtype).T),
        lambda h, w: (h.flatten()[1 : 1 + 6 * 31].view(6, 31), w.flatten()[3 : 3 + 100 * 31].view(100, 31)),
    ],
    ids=["stepped", "sliced", "expanded", "transposed weight", "unaligned"],
)
def test_any_strides(backend, view, dtype):
    hidden, weight = view(torch.randn(3, 6, 48).to(dtype), (torch.randn(129, 48) / 3).to(dtype))
    before = hidden.clone(), weight.clone()
    actions = torch.randint(len(weight), hidden.shape[:-1])
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    compare(backend, "linear_token_values", inputs, upstream(actions.shape), with_entropy=True)
    assert_same_bits((hidden, weight), before)
    assert hidden._version == weight._version == 0


def test_upstream_gradient_of_any_strides(backend):
    by = {"q": torch.full((1,), 0.5).expand(3, 4), "v": torch.randn(3, 4, 2)[..., 1], "log_prob": torch.randn(4, 3).T}
    compare(backend, "linear_token_values", inputs_of(3, 4, 129, 31), by)


def test_actions_of_either_width(backend):
    inputs = inputs_of(3, 4, 129, 31)
    expected = linear_token_values(**inputs, backend=backend)
    inputs["actions"] = inputs["actions"].int()
    assert_same_bits(expected, linear_token_values(**inputs, backend=backend))


def test_common_offset_costs_no_precision(backend):
    """Hidden states, weights and bias are multiples of 1/8: float32 holds every logit exactly, also near 1e4."""
    inputs = inputs_of(6, 1000, 31, bias=True)
    inputs |= {name: (inputs[name] * 8).round() / 8 for name in ("hidden", "weight", "bias")}
    by = upstream((6,), "v", "log_prob", "entropy")
    truth = float64_truth("linear_token_values", inputs, by, with_entropy=True)
    plain = evaluate(reference.linear_token_values, inputs, by, with_entropy=True)
    moved = inputs | {"bias": inputs["bias"] + 1e4}
    ours = evaluate(linear_token_values, moved, by, with_entropy=True, backend=backend)
    for name in ("log_prob", "entropy", "d hidden", "d weight", "d bias"):
        assert_no_worse_than_torch(ours[name], plain[name], truth[name], what=name)


def test_words_at_minus_infinity(backend):
    """A bias of -inf, as for a padded vocabulary: in the first blocks, in the last blocks, for all words but one."""
    for finite in (slice(600, None), slice(0, 300), slice(700, 701)):
        inputs = inputs_of(4, 1000, 31, bias=True)
        inputs["bias"] = torch.full((1000,), -torch.inf)
        inputs["bias"][finite] = torch.randn(1000)[finite]
        inputs["actions"][:] = torch.arange(1000)[finite][-1]
        ours = compare(backend, "linear_token_values", inputs, upstream((4,)), with_entropy=True)
        excluded = inputs["bias"] == -torch.inf
        assert (ours["d weight"][excluded] == 0).all() and (ours["d bias"][excluded] == 0).all()


def test_words_at_the_lowest_number(backend):
    """Masks often use the lowest float32. If all logits of a state are this number, all words are equally likely."""
    inputs = inputs_of(4, 400, 31, bias=True)
    inputs["bias"] = torch.full((400,), torch.finfo(torch.float32).min)
    by = upstream((4,), "log_prob")
    for ours in (compare(backend, "linear_token_values", inputs, by), check_frozen(backend, inputs, by)):
        assert (ours["log_prob"] + math.log(400)).abs().max() < 1e-6


def test_bias_gradient_of_many_tokens(backend):
    inputs = inputs_of(20_000 if backend != "triton" else 500, 17, 4, bias=True)
    inputs["hidden"] = inputs["hidden"].abs()  # all positive, so that the sum does not cancel
    compare(backend, "linear_token_values", inputs, {"v": torch.ones(inputs["actions"].shape)})


def test_logits_are_never_rounded_to_the_dtype_of_the_hidden_states(backend):
    """Logits near 20 rounded to bf16 would be off by up to 0.06. The outputs are as precise as for float32 inputs."""
    inputs = inputs_of(8, 129, 123, dtype=torch.bfloat16)
    inputs["hidden"] = inputs["hidden"] * 16
    truth = float64_truth("linear_token_values", inputs, upstream((8,)), with_entropy=True)
    ours = linear_token_values(**inputs, with_entropy=True, backend=backend)
    assert truth["q"].abs().max() > 20
    for name in ("q", "v", "log_prob", "entropy"):
        assert torch_error(getattr(ours, name), truth[name]) < 1e-5


def test_weight_gradient_accumulates_in_float32(backend):
    """2,000 tokens whose gradients have the same sign. A bf16 sum of them stops growing at 256 tokens."""
    inputs = inputs_of(2000, 7, 3, dtype=torch.bfloat16, bias=True)
    inputs["hidden"] = inputs["hidden"].abs() * 0.1
    inputs["actions"][:] = 3
    compare(backend, "linear_token_values", inputs, {"log_prob": torch.ones(2000)})


def test_two_backwards_with_different_gradients(backend):
    inputs = inputs_of(4, 129, 31)
    leaves = [inputs[k].requires_grad_() for k in ("hidden", "weight")]
    out = linear_token_values(*leaves, inputs["actions"], backend=backend)
    first, second = torch.randn(4), torch.randn(4)
    one = torch.autograd.grad(out.log_prob, leaves, first, retain_graph=True)
    two = torch.autograd.grad(out.v, leaves, second, retain_graph=True)
    assert_same_bits(one, torch.autograd.grad(out.log_prob, leaves, first))
    for ours, by in ((one, {"log_prob": first}), (two, {"v": second})):
        truth = float64_truth("linear_token_values", inputs, by)
        plain = evaluate(reference.linear_token_values, inputs, by)
        for x, name in zip(ours, ("d hidden", "d weight"), strict=True):
            assert_no_worse_than_torch(x, plain[name], truth[name], what=name)


def test_same_bits_every_time(backend):
    inputs, by = inputs_of(40, 129, 31, bias=True), upstream((40,))
    runs = [evaluate(linear_token_values, inputs, by, with_entropy=True, backend=backend) for _ in range(3)]
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_no_bit(backend, dtype):
    """Autocast would run the inner matmuls in bf16."""
    inputs, by = inputs_of(4, 129, 31, dtype=dtype, bias=True), upstream((4,), "q", "v", "log_prob")
    expected = evaluate(linear_token_values, inputs, by, backend=backend)
    with torch.autocast(inputs["hidden"].device.type, dtype=torch.bfloat16):
        assert_same_bits(expected, evaluate(linear_token_values, inputs, by, backend=backend))


@pytest.mark.parametrize("kind", ["number", torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_infinite_temperature_is_the_uniform_limit(backend, frozen, dtype, kind):
    """All words above -inf are equally likely, and no gradient is NaN. With D = 64 the cpu backend keeps logits."""
    hidden, weight, actions = head(2, 3, 129, 64, dtype=dtype)
    bias = torch.randn(129).to(dtype)
    bias[:3], actions = -torch.inf, actions.clamp(min=3)
    temperature = torch.inf if kind == "number" else torch.full((2, 3), torch.inf, dtype=kind)
    leaves = [x.requires_grad_() for x in ((hidden,) if frozen else (hidden, weight, bias))]
    options = {"bias": bias, "temperature": temperature, "backend": backend}
    out = linear_token_values(hidden, weight, actions, **options)
    uniform = math.log(126)
    for x, expected in zip(out[:3], (0.0, uniform, -uniform), strict=True):
        torch.testing.assert_close(x, torch.full((2, 3), expected), rtol=1e-6, atol=1e-6)
    loss = linear_reval_loss(hidden, weight, actions, torch.zeros(2), torch.ones(2), beta=0.5, **options)
    torch.testing.assert_close(loss.residual, torch.full((2,), -2 * uniform - 2), rtol=1e-6, atol=0)
    for result in (out.q.sum() + out.log_prob.sum(), out.v.sum(), loss.loss):
        gradients = torch.autograd.grad(result, leaves, retain_graph=True)
        assert all(g.abs().max() < 1e-38 for g in gradients)


# --- frozen head ----------------------------------------------------------------------------------------------------


def frozen(backend, inputs, by, **options) -> dict[str, torch.Tensor]:
    """The outputs named in `by`, and "d hidden", when only the hidden states need a gradient."""
    leaves = inputs | {"hidden": inputs["hidden"].detach().requires_grad_()}
    out = linear_token_values(**leaves, backend=backend, **options)
    results = {name: getattr(out, name) for name in by}
    cotangents = [g.to(x.dtype) for g, x in zip(by.values(), results.values(), strict=True)]
    (d_hidden,) = torch.autograd.grad(list(results.values()), leaves["hidden"], cotangents)
    return {name: x.detach() for name, x in results.items()} | {"d hidden": d_hidden}


def check_frozen(backend, inputs, by, **options) -> dict[str, torch.Tensor]:
    """As `compare`, and the outputs have the same bits as without any gradient."""
    ours = frozen(backend, inputs, by, **options)
    truth = float64_truth("linear_token_values", inputs, by, **options)
    plain = evaluate(reference.linear_token_values, inputs, by, **options)
    scales = natural_scales("linear_token_values", inputs, truth, by, **options)
    for what in ours:
        device = device_error("linear_token_values", inputs, truth, by, what, **options) if backend == "triton" else 0.0
        slack = {"scale": scales.get(what), "floor": logit_error(inputs) + device, "what": what}
        assert_no_worse_than_torch(ours[what], plain[what], truth[what], **slack)
    scored = linear_token_values(**inputs, backend=backend, **options)
    assert_same_bits([ours[name] for name in by], [getattr(scored, name) for name in by])
    return ours


@pytest.fixture
def no_logits_in_backward(backend, monkeypatch):
    def refuse(*_):
        raise AssertionError("the backward computed logits")

    monkeypatch.setattr(BACKENDS_BY_NAME[backend], "linear_token_values_backward", refuse)


@pytest.mark.parametrize("dtype", DTYPES)
@on_backends(SHAPES, entries=lambda shape: math.prod(shape[:-1]))
def test_frozen_head(backend, shape, dtype):
    """All outputs together, and each output alone: their gradients use different terms of `expected`."""
    inputs = inputs_of(*shape, dtype=dtype, bias=len(shape) == 4)
    for names in (("q", "v", "log_prob"), ("q",), ("v",), ("log_prob",)):
        check_frozen(backend, inputs, upstream(shape[:-2], *names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 1.0, 5.0, 30.0])
@pytest.mark.parametrize("temperature", [0.7, "per token"])
def test_frozen_head_options(backend, no_logits_in_backward, temperature, softcap, dtype):
    """With a bias, and with a mask whose masked hidden states are NaN."""
    inputs = inputs_of(3, 6, 129, 31, dtype=dtype, bias=True)
    mask = torch.rand(3, 6) < 0.6
    inputs["hidden"][~mask], inputs["actions"][~mask] = torch.nan, -100
    temperature = (0.5 + torch.rand(3, 6)).where(mask, 0) if temperature == "per token" else temperature
    options = {"mask": mask, "softcap": softcap, "temperature": temperature}
    ours = check_frozen(backend, inputs, upstream((3, 6), "q", "v", "log_prob"), **options)
    assert (ours["d hidden"][~mask] == 0).all()


def test_frozen_head_without_any_action(backend):
    inputs, mask = inputs_of(2, 3, 7, 5), torch.zeros(2, 3, dtype=torch.bool)
    assert (frozen(backend, inputs, upstream((2, 3), "v", "log_prob"), mask=mask)["d hidden"] == 0).all()


@pytest.mark.parametrize("excluded", [-torch.inf, -2e38])
@pytest.mark.parametrize("temperature", [0.7, "per token"])
def test_frozen_head_that_begins_with_excluded_words(backend, temperature, excluded):
    """The first tile of words has only logits that are -inf, before or after the division by the temperature."""
    inputs = inputs_of(5, 400, 31, bias=True)
    inputs["bias"][:200] = excluded
    inputs["actions"].clamp_(200)
    temperature = torch.tensor([1, 1, 0.9, 1, 1]) if temperature == "per token" else temperature
    check_frozen(backend, inputs, upstream((5,), "q", "v", "log_prob"), temperature=temperature)


@pytest.mark.parametrize("p", [0.9, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_frozen_head_of_a_confident_state(backend, p, softcap):
    """Each entry of the gradient keeps its digits. The hidden states are unit vectors, so that every logit is exact."""
    inputs = inputs_of(12, 129, 31)
    inputs["hidden"], inputs["actions"] = torch.eye(12, 31), torch.arange(12) * 10
    weight, at = inputs["weight"], torch.arange(12)
    others = weight.T[:12].double()
    others[at, inputs["actions"]] = -torch.inf
    needed = others.logsumexp(1) + math.log(p / (1 - p))
    weight[inputs["actions"], at] = needed.float()
    by = {"log_prob": torch.ones(12)}
    truth = float64_truth("linear_token_values", inputs, by, softcap=softcap)
    plain = evaluate(reference.linear_token_values, inputs, by, softcap=softcap)
    ours = frozen(backend, inputs, by, softcap=softcap)
    # An entry is a sum over the words, which may cancel: an error of p counts by the size of the terms.
    scale = natural_scales("linear_token_values", inputs, truth, by, softcap=softcap)["d hidden"]
    floors = {"log_prob": 1e-5, "d hidden": 1e-5}
    if backend == "triton":
        error = device_error("linear_token_values", inputs, truth, by, "d hidden", softcap=softcap)
        floors["d hidden"] += error * float((scale / truth["d hidden"].abs()).max())
    for name, x in ours.items():
        assert_no_worse_than_torch(x, plain[name], truth[name], scale=truth[name].abs(), floor=floors[name], what=name)


def test_frozen_head_twice(backend, no_logits_in_backward):
    """Two backwards with different gradients, and the first one again: no backward changes the kept tensor."""
    inputs = inputs_of(4, 129, 31)
    hidden = inputs.pop("hidden").requires_grad_()
    out = linear_token_values(hidden, **inputs, backend=backend)
    first, second = torch.randn(4), torch.randn(4)
    one = torch.autograd.grad(out.log_prob, hidden, first, retain_graph=True)
    two = torch.autograd.grad(out.v, hidden, second, retain_graph=True)
    assert_same_bits(one, torch.autograd.grad(out.log_prob, hidden, first))
    for (ours,), by in ((one, {"log_prob": first}), (two, {"v": second})):
        assert_same_bits(ours, frozen(backend, inputs | {"hidden": hidden.detach()}, by)["d hidden"])


def test_frozen_head_with_entropy(backend):
    """With with_entropy, a gradient of the entropy is possible, and needs the logits again."""
    inputs = inputs_of(4, 129, 31, bias=True)
    for names in (("entropy",), ("log_prob",), ("q", "v", "log_prob", "entropy")):
        check_frozen(backend, inputs, upstream((4,), *names), with_entropy=True)


class Products(TorchDispatchMode):
    """Counts the operations of matrix products, also of in-place products."""

    operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "mm" in function.__name__:  # mm, addmm_, and variants that write to `out`
            a, b = args[-2:]
            self.operations += 2 * a.numel() * b.shape[1]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])  # its matmuls are not torch functions
def test_frozen_head_costs_exactly_two_products(backend, monkeypatch):
    """The forward has two products, the logits and `expected`: 4 N V D operations. The backward has no product."""
    tokens, words, width, logits = 24, 129, 16, 0
    hidden, weight, actions = head(tokens, words, width)
    module = BACKENDS_BY_NAME[backend]
    for holder in (chunks, gpu):
        monkeypatch.setattr(holder, "LINEAR_CHUNK", 10 * words)  # three chunks of 8
    if backend == "triton":  # its logits come from a kernel of its own, which is no torch function
        from reval_kernels.backends.gpu import chunked_head

        def counting(head, *rest, compute=chunked_head.compute_values):
            nonlocal logits
            logits += 2 * len(head.hidden) * head.weight.numel()
            return compute(head, *rest)

        monkeypatch.setattr(chunked_head, "compute_values", counting)
    given, product = (HeadInputs(hidden, weight, None), Tokens(actions, None), Transform()), 2 * tokens * words * width
    with Products() as counted:
        out, expected = module.linear_token_values(*given, False, True)
    assert counted.operations + logits == 2 * product
    by = UnitGradients(*torch.randn(3, tokens))
    with Products() as counted:
        gradient_of_hidden(expected, *given, out.log_prob, by)
    assert counted.operations == 0
