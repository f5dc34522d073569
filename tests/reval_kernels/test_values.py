"""token_values against its definition.

Vocabularies: 1 and 7 are smaller than every block, 129 and 1000 end in the middle of a block, 32,001 needs several
blocks and is odd, 151,936 is that of Qwen and no multiple of 256. Tokens: none, one, a few, and [B, T]. Most tests use
V = 129, where the last block holds a single word.
"""

import math

import pytest
import torch
from cases import (
    DTYPES,
    assert_no_worse_than_torch,
    assert_same_bits,
    compare,
    evaluate,
    float64_truth,
    logits_and_actions,
    on_backends,
    torch_error,
    upstream,
)

import reval_kernels
from reval_kernels import reference, token_values

SHAPES = [(5, 1), (0, 7), (1, 7), (2, 3, 7), (6, 129), (3, 5, 129), (4, 1000), (3, 32001), (1, 151936)]


def gradient(logits, actions, output="log_prob", by=None, **options):
    """The gradient of one output's sum, or of sum(output * by)."""
    leaf = logits.detach().requires_grad_()
    out = getattr(token_values(leaf, actions, **options), output)
    return torch.autograd.grad(out, leaf, torch.ones_like(out) if by is None else by)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@on_backends(SHAPES)
def test_values_and_gradients(backend, shape, dtype):
    logits, actions = logits_and_actions(*shape, dtype=dtype)
    inputs = {"logits": logits, "actions": actions}
    ours = compare(backend, "token_values", inputs, upstream(actions.shape), with_entropy=True)
    assert ours["q"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.7, torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [None, 1.0, 5.0, 30.0])
def test_softcap_and_temperature(backend, softcap, temperature):
    """The temperature is a number. Or the parameter is the dtype of a tensor with one temperature per token."""
    logits, actions = logits_and_actions(2, 4, 129, scale=6.0)
    if isinstance(temperature, torch.dtype):
        temperature = (0.5 + torch.rand(2, 4)).to(temperature)
    options = {"softcap": softcap, "temperature": temperature, "with_entropy": True}
    compare(backend, "token_values", {"logits": logits, "actions": actions}, upstream(actions.shape), **options)


@pytest.mark.parametrize("output", ["q", "v", "log_prob", "entropy"])
def test_one_output_alone(backend, output):
    """p is near 1e-3, so an error that is small relative to the upstream gradient is large relative to that of v."""
    logits, actions = logits_and_actions(6, 1000)
    compare(
        backend,
        "token_values",
        {"logits": logits, "actions": actions},
        upstream(actions.shape, output),
        with_entropy=True,
    )


@pytest.mark.parametrize("layout", ["expanded", "strided", "transposed"])
def test_upstream_gradient_of_any_strides(backend, layout):
    logits, actions = logits_and_actions(3, 4, 129)
    by = {
        "expanded": torch.full((1,), 0.5).expand(3, 4),
        "strided": torch.randn(3, 4, 2)[..., 1],
        "transposed": torch.randn(4, 3).T,
    }[layout]
    outputs = ("q", "v", "log_prob")
    compare(backend, "token_values", {"logits": logits, "actions": actions}, dict.fromkeys(outputs, by))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, 3:-3],
        lambda x: x[..., ::3],
        lambda x: x.transpose(0, 1),
        lambda x: x[..., :20].permute(1, 2, 0),
        lambda x: x[:1].expand(5, -1, -1),
        lambda x: x[:, :, :1].expand(-1, -1, 9),
        lambda x: x.reshape(-1)[1 : 1 + 4 * 129].view(4, 129),
    ],
    ids=["sliced", "stepped", "transposed", "vocabulary first", "expanded", "expanded words", "unaligned"],
)
def test_logits_of_any_strides(backend, view, dtype):
    logits = view((torch.randn(3, 6, 131) * 2).to(dtype))
    before = logits.clone()
    actions = torch.randint(logits.shape[-1], logits.shape[:-1])
    compare(backend, "token_values", {"logits": logits, "actions": actions}, upstream(actions.shape), with_entropy=True)
    assert torch.equal(logits, before) and logits._version == 0


def test_actions_of_either_width_and_any_strides(backend):
    logits, actions = logits_and_actions(3, 8, 129)
    expected = token_values(logits, actions, backend=backend)
    assert_same_bits(expected, token_values(logits, actions.int(), backend=backend))
    spread = torch.full((8, 3, 2), 999)
    spread[..., 0] = actions.T
    assert_same_bits(expected, token_values(logits, spread[..., 0].T, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0.6, 0.0])
def test_masked_tokens_are_never_read(backend, kept, dtype):
    logits, actions = logits_and_actions(3, 6, 129, dtype=dtype)
    mask = torch.rand(3, 6) < kept
    logits[~mask], actions[~mask] = torch.nan, -100
    temperature = torch.rand(3, 6).add(0.5).where(mask, torch.nan)
    inputs, by = {"logits": logits, "actions": actions}, upstream(actions.shape)
    by["v"][~mask] = torch.inf  # 0 * inf would give NaN
    ours = evaluate(token_values, inputs, by, mask=mask, with_entropy=True, temperature=temperature, backend=backend)
    assert all((x[~mask] == 0).all() for x in ours.values())
    by["v"][~mask] = 0
    clean = {"logits": logits[mask], "actions": actions[mask]}
    flat = {k: g[mask] for k, g in by.items()}
    expected = compare(backend, "token_values", clean, flat, with_entropy=True, temperature=temperature[mask])
    for name, x in expected.items():
        assert_no_worse_than_torch(ours[name][mask], ours[name][mask], x, what=name)


def test_common_offset_costs_no_precision(backend):
    """The logits are multiples of 1/256, which float32 holds exactly also near 1e4. The offset may change only q and v.
    An implementation that keeps v, and not row_max and log_sum, loses 3 digits here."""
    logits, actions = logits_and_actions(8, 1000)
    logits = (logits * 256).round() / 256
    by = upstream(actions.shape, "log_prob", "v", "entropy")
    inputs = {"logits": logits, "actions": actions}
    truth = float64_truth("token_values", inputs, by, with_entropy=True)
    plain = evaluate(reference.token_values, inputs, by, with_entropy=True)
    moved = inputs | {"logits": logits + 1e4}
    ours = evaluate(token_values, moved, by, with_entropy=True, backend=backend)
    for name in ("log_prob", "entropy", "d logits"):
        assert_no_worse_than_torch(ours[name], plain[name], truth[name], what=name)
    assert_no_worse_than_torch(ours["v"], ours["v"], truth["v"] + 1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("finite", [slice(600, None), slice(0, 300), slice(700, 701)], ids=["end", "start", "one"])
def test_words_at_minus_infinity(backend, finite, dtype):
    """Rows whose first or last block, or all words but one, are -inf. In row 0 a block in the middle is -inf."""
    logits, actions = logits_and_actions(4, 1000, dtype=dtype)
    logits[1:] = torch.full_like(logits[1:], -torch.inf).index_copy(1, torch.arange(1000)[finite], logits[1:, finite])
    logits[0, 200:800] = -torch.inf
    actions[:] = torch.arange(1000)[finite][-1]
    actions[0] = 900
    inputs = {"logits": logits, "actions": actions}
    ours = compare(backend, "token_values", inputs, upstream(actions.shape), with_entropy=True)
    assert (ours["d logits"][logits == -torch.inf] == 0).all()


def test_action_at_minus_infinity(backend):
    """The action has probability 0: log_prob is -inf, and the gradient is finite."""
    logits, actions = logits_and_actions(3, 129)
    logits[torch.arange(3), actions] = -torch.inf
    inputs = {"logits": logits, "actions": actions}
    ours = compare(backend, "token_values", inputs, upstream(actions.shape, "v", "log_prob"))
    assert (ours["log_prob"] == -torch.inf).all()


@pytest.mark.parametrize("vocabulary", [5, 1000])
def test_a_state_of_the_lowest_numbers(backend, vocabulary):
    """Masks often use the lowest float32. If all logits of a state are this number, all words are equally likely."""
    logits, actions = logits_and_actions(3, vocabulary)
    logits[1] = torch.finfo(torch.float32).min
    inputs = {"logits": logits, "actions": actions}
    ours = compare(backend, "token_values", inputs, upstream(actions.shape, "log_prob", "v"))
    assert ours["v"][1] == torch.finfo(torch.float32).min


def test_a_temperature_that_makes_all_logits_infinite(backend):
    """Every logit divided by 0.5 is -inf. The value is -inf too, not NaN."""
    logits, actions = torch.full((2, 129), -2e38), torch.tensor([3, 4])
    out = token_values(logits, actions, temperature=0.5, backend=backend)
    assert (out.v == -torch.inf).all() and (out.q == -torch.inf).all()


def test_a_state_without_any_word(backend):
    """All logits are -inf: the value is -inf, not NaN. The numbers of the other rows do not change."""
    logits, actions = logits_and_actions(3, 129)
    before = token_values(logits, actions, backend=backend)
    logits[1] = -torch.inf
    out = token_values(logits, actions, backend=backend)
    assert out.q[1] == out.v[1] == -torch.inf
    for x, y in zip(before[:3], out[:3], strict=True):
        assert_same_bits(x[[0, 2]], y[[0, 2]])


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 1 - 1e-6])
def test_confident_action_keeps_its_gradient(backend, p):
    """The gradient of log_prob at the action is 1 - p. It has 24 correct bits, even if float32 p is too close to 1 to
    give any. The same holds for log_prob. (At the last p, plain PyTorch is off by 17%.)"""
    logits, _ = logits_and_actions(8, 1000)
    actions = torch.tensor([0, 1, 127, 128, 500, 777, 998, 999])
    others = logits.double().scatter(1, actions[:, None], -torch.inf).logsumexp(1)
    logits[torch.arange(8), actions] = (others + math.log(p / (1 - p))).float()
    truth = float64_truth("token_values", {"logits": logits, "actions": actions}, {"log_prob": torch.ones(8)})
    ours = gradient(logits, actions, backend=backend)
    each = truth["d logits"].abs()
    assert torch_error(ours, truth["d logits"], each) < 1e-5
    log_prob = token_values(logits, actions, backend=backend).log_prob
    assert torch_error(log_prob, truth["log_prob"], truth["log_prob"].abs()) < 1e-5


@pytest.mark.parametrize("output", ["v", "log_prob", "entropy"])
def test_unlikely_action_keeps_its_gradient(backend, output):
    """The action has p = 1e-6 to 1e-9. Every entry is right relative to its own size, not only to the largest entry."""
    logits, actions = logits_and_actions(4, 129)
    logits[torch.arange(4), actions] = -torch.tensor([9.0, 11.0, 13.0, 15.0])
    by = upstream(actions.shape, output)
    truth = float64_truth("token_values", {"logits": logits, "actions": actions}, by, with_entropy=True)["d logits"]
    ours = gradient(logits, actions, output, by[output], with_entropy=True, backend=backend)
    assert torch_error(ours, truth, truth.abs()) < 1e-5


def test_two_backwards_with_different_gradients(backend):
    logits, actions = logits_and_actions(4, 129)
    logits.requires_grad_()
    out = token_values(logits, actions, backend=backend)
    first, second = torch.randn(4), torch.randn(4)
    (one,) = torch.autograd.grad(out.log_prob, logits, first, retain_graph=True)
    (two,) = torch.autograd.grad([out.v, out.log_prob], logits, [first, second], retain_graph=True)
    (again,) = torch.autograd.grad(out.log_prob, logits, first)
    assert_same_bits(one, again)
    assert_same_bits(one, gradient(logits, actions, by=first, backend=backend))
    both = {"v": first, "log_prob": second}
    truth = float64_truth("token_values", {"logits": logits, "actions": actions}, both)["d logits"]
    plain = evaluate(reference.token_values, {"logits": logits, "actions": actions}, both)["d logits"]
    assert_no_worse_than_torch(two, plain, truth)


@on_backends([(40, 1000), (8, 129)])
def test_same_bits_every_time(backend, shape):
    logits, actions = logits_and_actions(*shape)
    inputs, by = {"logits": logits, "actions": actions}, upstream(actions.shape)
    runs = [evaluate(token_values, inputs, by, with_entropy=True, backend=backend) for _ in range(3)]
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_dtype_costs_one_rounding(backend, dtype):
    """The computation is float32. Outputs have the bits that float32 logits give; the gradient is the same, rounded.

    Two backends sum in another order. cpu: of bfloat16 logits the even entries, then the odd entries. triton: first the
    entries that one load brings, 8 of a narrow dtype and 4 of float32.
    """
    logits, actions = logits_and_actions(6, 129, dtype=dtype)
    by = upstream(actions.shape)
    narrow, wide = (
        evaluate(token_values, {"logits": x, "actions": actions}, by, with_entropy=True, backend=backend)
        for x in (logits, logits.float())
    )
    if backend == "triton" or (backend == "cpu" and dtype == torch.bfloat16):
        ours, theirs = narrow.pop("d logits").float(), wide.pop("d logits")
        half = 1.001 * torch.finfo(dtype).eps / 2  # of a unit in the last place; subnormal numbers have the same unit
        torch.testing.assert_close(ours, theirs, rtol=half, atol=half * torch.finfo(dtype).smallest_normal)
        for name in narrow:
            torch.testing.assert_close(narrow[name], wide[name], rtol=4e-7, atol=0)
        return
    wide["d logits"] = wide["d logits"].to(dtype)
    assert_same_bits(narrow, wide)


def test_autocast_changes_no_bit(backend):
    logits, actions = logits_and_actions(4, 129)
    inputs, by = {"logits": logits, "actions": actions}, upstream(actions.shape, "q", "v", "log_prob")
    expected = evaluate(token_values, inputs, by, backend=backend)
    with torch.autocast(logits.device.type, dtype=torch.bfloat16):
        assert_same_bits(expected, evaluate(token_values, inputs, by, backend=backend))


def test_without_gradient(backend):
    """No graph is recorded if no input needs a gradient. entropy is None unless with_entropy is true."""
    logits, actions = logits_and_actions(2, 3, 7)
    expected = token_values(logits, actions, backend=backend)
    assert expected.entropy is None and not expected.v.requires_grad
    with torch.inference_mode():
        assert_same_bits(expected, token_values(logits, actions, backend=backend))
    assert (token_values(logits, actions, with_entropy=True, backend=backend).entropy > 0).all()


# --- numbers near the end of float32's range ------------------------------------------------------------------------


def masked_words(*shape):
    """Logits whose first words are -inf, and actions among the other words."""
    logits, _ = logits_and_actions(*shape)
    logits[..., :3] = -torch.inf
    return logits, torch.randint(3, shape[-1], shape[:-1])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kind", ["number", torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocabulary", [129, 1000])
def test_an_infinite_temperature_is_the_uniform_limit(backend, vocabulary, kind, softcap):
    """All words above -inf are equally likely, the lowest number among them. (A softcap makes -inf finite.)"""
    logits, actions = masked_words(2, 3, vocabulary)
    logits[..., 7] = torch.finfo(torch.float32).min
    temperature = torch.inf if kind == "number" else torch.full((2, 3), torch.inf, dtype=kind)
    inputs, options = {"logits": logits, "actions": actions}, {"temperature": temperature, "softcap": softcap}
    by = upstream(actions.shape)
    ours = evaluate(token_values, inputs, by, with_entropy=True, backend=backend, **options)
    uniform = math.log(vocabulary - (3 if softcap is None else 0))
    expected = {"q": 0.0, "v": uniform, "log_prob": -uniform, "entropy": uniform}
    truth = float64_truth("token_values", inputs, by, with_entropy=True, **options)
    for name, x in expected.items():
        torch.testing.assert_close(ours[name], torch.full((2, 3), x), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(truth[name], torch.full((2, 3), x, dtype=torch.float64))
    assert ours["d logits"].abs().max() < 1e-38 and not truth["d logits"].any()


@pytest.mark.parametrize("kind", ["number", torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e35, 1e38, 3e38])
def test_a_large_temperature(backend, temperature, kind):
    """Logits near the end of the range too, where the temperature does not make all words equally likely. (Differences
    of logits must be finite in float32, and for the entropy the sum of these differences.)"""
    for scale in (1.0, temperature):
        logits, actions = masked_words(2, 3, 129)
        logits = torch.where(logits.isinf(), logits, (logits / 8 * scale).clamp(-1.5e38, 1.5e38))
        each = temperature if kind == "number" else torch.full((2, 3), temperature, dtype=kind)
        by = upstream(actions.shape, "q", "v", "log_prob", *(["entropy"] if scale == 1 else []))
        inputs, options = {"logits": logits, "actions": actions}, {"temperature": each, "with_entropy": scale == 1}
        ours = evaluate(token_values, inputs, by, backend=backend, **options)
        truth = float64_truth("token_values", inputs, by, **options)
        for name in truth:
            unit = 1 / temperature if name == "d logits" else 1.0
            torch.testing.assert_close(ours[name].double() / unit, truth[name] / unit, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [2e-38, 1e-30])
def test_a_small_temperature(backend, temperature):
    logits, actions = logits_and_actions(2, 3, 129)
    logits = logits.clamp(-5, 5)
    by = {"log_prob": torch.full((2, 3), 0.01)}
    inputs, options = {"logits": logits, "actions": logits.argmax(-1)}, {"temperature": temperature}
    compare(backend, "token_values", inputs, by, **options)


def test_an_infinite_softcap_is_none(backend):
    logits, actions = masked_words(2, 3, 129)
    inputs, by = {"logits": logits, "actions": actions}, upstream(actions.shape)
    expected, ours = (
        evaluate(token_values, inputs, by, with_entropy=True, backend=backend, softcap=softcap)
        for softcap in (None, torch.inf)
    )
    assert_same_bits(expected, ours)
    definition = float64_truth("token_values", inputs, by, with_entropy=True, softcap=torch.inf)
    assert_same_bits(definition, float64_truth("token_values", inputs, by, with_entropy=True))


@pytest.mark.parametrize("softcap", [1.2e-38, 1e-30, 1e30, 3e38])
def test_softcaps_near_the_end_of_the_range(backend, softcap):
    logits, actions = logits_and_actions(2, 3, 129)
    inputs, by = {"logits": logits, "actions": actions}, upstream(actions.shape)
    options = {"softcap": softcap, "with_entropy": True}
    ours = evaluate(token_values, inputs, by, backend=backend, **options)
    truth = float64_truth("token_values", inputs, by, **options)
    for name in truth:
        torch.testing.assert_close(ours[name].double(), truth[name], rtol=1e-5, atol=2e-6)


# --- inplace_grad ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_inplace_gradient_overwrites_the_logits(backend, masked, dtype):
    source, actions = logits_and_actions(3, 4, 129, dtype=dtype)
    mask = torch.rand(3, 4) < 0.5 if masked else None
    expected = gradient(source, actions, mask=mask, backend=backend)

    logits = source.clone().requires_grad_() * 1  # not a leaf, like the output of a model
    logits.retain_grad()
    out = token_values(logits, actions, mask=mask, inplace_grad=True, backend=backend)
    assert torch.equal(logits, source), "the forward must not write"
    out.log_prob.sum().backward(retain_graph=True)
    assert_same_bits(logits.grad, expected)
    assert_same_bits(logits.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.log_prob.sum().backward()


def test_inplace_gradient_of_strided_logits_leaves_their_neighbours(backend):
    whole, actions = logits_and_actions(4, 3, 140)
    source = whole.clone()
    view = whole[:, 1, 5:134]
    actions = actions[:, 1] % 129
    expected = gradient(view, actions, backend=backend)
    out = token_values(view.detach().requires_grad_(), actions, inplace_grad=True, backend=backend)
    out.log_prob.sum().backward()
    assert_same_bits(view, expected)
    source[:, 1, 5:134] = expected
    assert torch.equal(whole, source)


def test_inplace_gradient_has_no_graph(backend):
    """torch.autograd.grad returns the overwritten logits without the graph that the logits have."""
    logits, actions = logits_and_actions(3, 129)
    logits = logits.requires_grad_() * 1
    out = token_values(logits, actions, inplace_grad=True, backend=backend)
    (gradient,) = torch.autograd.grad(out.v.sum(), logits)
    assert not gradient.requires_grad and gradient.data_ptr() == logits.data_ptr()


def test_inplace_gradient_has_no_second_order_gradient(backend):
    """The backward has overwritten the logits, at which a second-order gradient would be taken."""
    leaf = torch.randn(3, 129).requires_grad_()
    out = token_values(leaf * 1, torch.zeros(3, dtype=torch.long), inplace_grad=True, backend=backend)
    with pytest.raises(RuntimeError, match="inplace_grad=True has no second-order gradient"):
        torch.autograd.grad(out.v.sum(), leaf, create_graph=True)


SHARED = [
    lambda x: x[:1, 0].expand(3, 129),
    lambda x: x[0, 0, :1].expand(3, 5),
    lambda x: x.flatten().unfold(0, 16, 1),
    lambda x: x.flatten().unfold(0, 16, 15),
    lambda x: x[0].unfold(0, 3, 2).transpose(0, 1),
    lambda x: x.flatten().as_strided((3, 4, 5), (1, 2, 12)),
]
APART = [
    lambda x: x.transpose(0, 1),
    lambda x: x.permute(2, 0, 1),
    lambda x: x[::2, 1:, 3:100:7],
    lambda x: x.flatten().unfold(0, 16, 16),
    lambda x: x.flatten().unfold(0, 16, 17),
    lambda x: x.diagonal(0, 0, 1).T,
    lambda x: x.diagonal(1, 0, 2),
    lambda x: x[:1, :, None].expand(1, -1, 1, -1),
    lambda x: x[:0, 0].expand(0, 129),
]


@pytest.mark.parametrize("view", SHARED)
def test_inplace_gradient_refuses_memory_shared_between_tokens(backend, view):
    logits = view(torch.randn(5, 6, 129))
    actions = torch.zeros(logits.shape[:-1], dtype=torch.long)
    with pytest.raises(ValueError) as caught:
        token_values(logits, actions, inplace_grad=True, backend=backend)
    assert str(caught.value) == (
        "inplace_grad needs logits whose entries do not share memory (not expanded, no overlapping rows); got "
        f"shape {list(logits.shape)} with strides {list(logits.stride())}"
    )


@pytest.mark.parametrize("view", APART)
def test_inplace_gradient_of_views_without_shared_memory(backend, view):
    logits = view(torch.randn(5, 6, 129))
    actions = torch.randint(logits.shape[-1], logits.shape[:-1])
    expected = gradient(logits, actions, backend=backend)
    leaf = logits.detach().requires_grad_()
    token_values(leaf, actions, inplace_grad=True, backend=backend).log_prob.sum().backward()
    assert_same_bits(leaf.detach(), expected)


def test_the_default_backend_gives_the_same_bits_as_its_name():
    logits, actions = logits_and_actions(2, 7)
    named = next(n for n, info in reval_kernels.backends().items() if {"*", logits.device.type} & {*info.default_for})
    assert_same_bits(token_values(logits, actions), token_values(logits, actions, backend=named))
