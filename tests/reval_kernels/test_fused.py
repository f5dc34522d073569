"""reval_loss and linear_reval_loss against their definition, and the whole path from logits to gradient.

B x T is 3 x 6 with right padding, gaps and an empty trajectory. V = 129 ends in the middle of a block; V = 1000 and
D = 123 need several blocks and end in the middle of one. test_portable.py tests chunks that are smaller than the input.
"""

import pytest
import torch
from cases import (
    DTYPES,
    assert_close,
    assert_no_worse_than_torch,
    assert_same_bits,
    compare,
    evaluate,
    float64_truth,
    head,
    logits_and_actions,
)

import reval_kernels
from reval_kernels import (
    TokenValues,
    bellman_loss,
    linear_reval_loss,
    linear_token_values,
    reference,
    reval_loss,
    token_values,
)

LEVELS = ["trajectory", "token", "subtrajectory"]
REWARDS = torch.tensor([1.0, 0.0, -1.0])
ONE = {"loss": torch.ones(())}


def lengths_mask(gaps: bool = True) -> torch.Tensor:
    """A mask [3, 6]: a row with actions at both ends, a row without actions, and a short row; with or without gaps."""
    rows = [[1, 1, 0, 0, 1, 1], [0] * 6, [1, 0, 1, 1, 0, 0]] if gaps else [[1] * 6, [0] * 6, [1] * 4 + [0] * 2]
    return torch.tensor(rows, dtype=torch.bool)


def anchor_of(actions, mask, cached: bool) -> TokenValues | torch.Tensor:
    """The token values of another model, or (`cached`) its returns."""
    v = reference.token_values(torch.randn(*actions.shape, 129), actions.clamp(0, 128), mask=mask)
    if not cached:
        return v
    zero = torch.zeros(len(actions))
    return reference.bellman_loss(v, zero, zero, mask=mask, beta=1.0).residual


def inputs_of(dtype=torch.float32, vocabulary=129, width=31, bias=False):
    hidden, weight, actions = head(3, 6, vocabulary, width, dtype=dtype)
    out = {"hidden": hidden, "weight": weight, "actions": actions}
    return out | {"bias": torch.randn(vocabulary).to(dtype)} if bias else out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("level", "cached"), [("trajectory", True), *((level, False) for level in LEVELS)])
def test_from_hidden_states(backend, level, cached, dtype):
    """Tokens that are no actions have NaN hidden states and impossible actions."""
    inputs, mask = inputs_of(dtype, vocabulary=1000, width=123, bias=level == "token"), lengths_mask()
    options = {"mask": mask, "rewards": REWARDS, "beta": 0.2, "level": level}
    options["reference"] = anchor_of(inputs["actions"], mask, cached)
    inputs["hidden"][~mask], inputs["actions"][~mask] = torch.nan, -100
    ours = compare(backend, "linear_reval_loss", inputs, {"loss": torch.tensor(1.7)}, **options)
    assert (ours["d hidden"][~mask] == 0).all()
    residual = linear_reval_loss(**inputs, **options, backend=backend).residual
    wide = {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}
    truth, plain = (reference.linear_reval_loss(**x, **options).residual for x in (wide, inputs))
    assert_no_worse_than_torch(residual, plain, truth)
    assert residual[1] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
def test_from_logits(backend, level, dtype):
    logits, actions = logits_and_actions(3, 6, 129, dtype=dtype)
    mask = lengths_mask()
    options = {"mask": mask, "rewards": REWARDS, "beta": 0.2, "level": level}
    options["reference"] = anchor_of(actions, mask, False)
    logits[~mask], actions[~mask] = torch.nan, -100
    by = {"loss": torch.tensor(1.7), "residual": torch.randn(3)}
    ours = compare(backend, "reval_loss", {"logits": logits, "actions": actions}, by, **options)
    assert (ours["d logits"][~mask] == 0).all()


@pytest.mark.parametrize("function", ["reval_loss", "linear_reval_loss"])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 5.0},
        {"temperature": 0.7},
        {"temperature": "per token", "softcap": 30.0},
        {"normalizer": 7},
        {"level": "token", "semi_gradient": True},
    ],
    ids=str,
)
def test_options(backend, function, options):
    inputs, mask = inputs_of(bias=True), lengths_mask()
    if function == "reval_loss":
        inputs = dict(zip(("logits", "actions"), logits_and_actions(3, 6, 129), strict=True))
    if options.get("temperature") == "per token":
        options = options | {"temperature": (0.5 + torch.rand(3, 6)).where(mask, 0)}
    options = {"mask": mask, "rewards": REWARDS, "beta": 0.2} | options
    options["reference"] = anchor_of(inputs["actions"], mask, False)
    compare(backend, function, inputs, ONE, **options)


@pytest.mark.parametrize("level", LEVELS)
def test_padded_equals_packed(backend, level):
    inputs, mask, inside = inputs_of(torch.float64), lengths_mask(), lengths_mask(gaps=False)
    anchor = anchor_of(inputs["actions"], mask, False)
    options = {"rewards": REWARDS, "beta": 0.2, "level": level}
    padded = evaluate(linear_reval_loss, inputs, ONE, mask=mask, reference=anchor, backend=backend, **options)
    packed_inputs = inputs | {k: inputs[k][inside] for k in ("hidden", "actions")}
    layout = {"mask": mask[inside], "reference": TokenValues(*(x[inside] for x in anchor[:3]))}
    for dtype in (torch.int32, torch.int64):
        layout["cu_seqlens"] = torch.tensor([0, 6, 6, 10], dtype=dtype)
        packed = evaluate(linear_reval_loss, packed_inputs, ONE, backend=backend, **layout, **options)
        for name in ("loss", "d weight"):
            assert_close(packed[name], padded[name])
        assert_close(packed["d hidden"], padded["d hidden"][inside])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("route", ["token_values", "reval_loss", "linear_reval_loss"])
def test_a_policy_equal_to_its_reference_has_no_loss(backend, route, level, dtype):
    """The loss, the residuals and every gradient are exactly 0."""
    inputs, mask = inputs_of(dtype, bias=True), lengths_mask()
    options = {"mask": mask, "beta": 0.002, "level": level, "backend": backend}
    if route == "linear_reval_loss":
        leaves = [inputs[k].requires_grad_() for k in ("hidden", "weight", "bias")]
        anchor = linear_token_values(**inputs, mask=mask, backend=backend)
        out = linear_reval_loss(**inputs, reference=anchor, rewards=torch.zeros(3), **options)
    else:
        logits, actions = logits_and_actions(3, 6, 129, dtype=dtype)
        leaves, anchor = [logits.requires_grad_()], token_values(logits, actions, mask=mask, backend=backend)
        if route == "reval_loss":
            out = reval_loss(logits, actions, anchor, torch.zeros(3), **options)
        else:
            values = token_values(logits, actions, mask=mask, backend=backend)
            out = bellman_loss(values, anchor, torch.zeros(3), **options)
    assert out.loss == 0 and (out.residual == 0).all()
    for g in torch.autograd.grad(out.loss, leaves):
        assert (g == 0).all()


def test_the_gradient_of_equation_2(backend):
    """docs/method.md section 3, g = 2 * residual / B. At s_1 the gradient is g onehot, because V(s_1) + log pi is Q.
    At later actions it is g (onehot - softmax), elsewhere 0."""
    logits, actions = logits_and_actions(3, 6, 7, dtype=torch.float64)
    mask = lengths_mask()
    anchor = anchor_of(actions, mask, True).double()
    inputs = {"logits": logits, "actions": actions}
    ours = evaluate(reval_loss, inputs, ONE, reference=anchor, rewards=REWARDS, mask=mask, beta=0.5, backend=backend)
    pi, onehot = logits.softmax(-1), torch.nn.functional.one_hot(actions, 7)
    expected = torch.zeros_like(logits)
    for b, row in enumerate(mask):
        steps = row.nonzero()[:, 0].tolist()
        if steps:
            log_pi = pi[b].log().gather(-1, actions[b][:, None])[:, 0]
            residual = logits[b, steps[0]].logsumexp(0) + log_pi[steps].sum() - anchor[b] - REWARDS[b] / 0.5
            expected[b, steps] = 2 * residual / 3 * (onehot - pi)[b, steps]
            expected[b, steps[0]] = 2 * residual / 3 * onehot[b, steps[0]]
    assert_close(ours["d logits"], expected)


def test_one_trajectory_does_not_affect_another(backend):
    """Other hidden states of one trajectory change its own residual and gradient, and no bit of the others."""
    inputs, mask = inputs_of(), lengths_mask(gaps=False)
    options = {"reference": anchor_of(inputs["actions"], mask, True), "rewards": REWARDS, "mask": mask, "beta": 0.5}
    changed = inputs | {"hidden": inputs["hidden"].clone()}
    changed["hidden"][2] += 1
    results = []
    for x in (inputs, changed):
        gradient = evaluate(linear_reval_loss, x, ONE, backend=backend, **options)["d hidden"]
        results.append((linear_reval_loss(**x, **options, backend=backend).residual, gradient))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a[:2], b[:2])
        assert not torch.equal(a[2], b[2])


@pytest.mark.parametrize(
    "wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("weight", "bias"), ()], ids=str
)
def test_only_the_gradients_asked_for(backend, wanted):
    inputs = inputs_of(bias=True)
    options = {"reference": anchor_of(inputs["actions"], None, True), "rewards": REWARDS, "beta": 0.5}
    options["backend"] = backend
    expected = evaluate(linear_reval_loss, inputs, ONE, **options)
    leaves = {k: x.detach().requires_grad_(k in wanted) for k, x in inputs.items()}
    loss, residual = linear_reval_loss(**leaves, **options)
    assert_same_bits(loss.detach(), expected["loss"])
    assert loss.requires_grad == bool(wanted) and not residual.requires_grad
    if wanted:
        loss.backward()
    if wanted == ("hidden",):  # frozen head: a backend may sum in another order, to save a matmul
        torch.testing.assert_close(leaves["hidden"].grad, expected["d hidden"], rtol=1e-4, atol=1e-5)
        return
    for name in ("hidden", "weight", "bias"):
        assert_same_bits(leaves[name].grad, expected[f"d {name}"] if name in wanted else None)


def test_no_gradient_is_computed_under_no_grad(backend):
    inputs = inputs_of(bias=True)
    inputs["weight"].requires_grad_()
    options = {"reference": anchor_of(inputs["actions"], None, True), "rewards": REWARDS, "beta": 0.5}
    expected = linear_reval_loss(**inputs, **options, backend=backend)
    with torch.no_grad():
        out = linear_reval_loss(**inputs, **options, backend=backend)
    assert_same_bits(tuple(out), tuple(x.detach() for x in expected))
    assert not out.loss.requires_grad


def test_two_backwards_with_different_gradients(backend):
    """The forward computes the gradient. A backward scales a copy of it, so a second backward is right too."""
    inputs = inputs_of()
    leaves = [inputs[k].requires_grad_() for k in ("hidden", "weight")]
    options = {"reference": anchor_of(inputs["actions"], None, True), "rewards": REWARDS, "beta": 0.5}
    loss = linear_reval_loss(**inputs, **options, backend=backend).loss
    once = torch.autograd.grad(loss, leaves, torch.tensor(1.0), retain_graph=True)
    twice = torch.autograd.grad(loss * 4, leaves, retain_graph=True)
    assert_same_bits(twice, tuple(4 * g for g in once))
    assert_same_bits(torch.autograd.grad(loss, leaves), once)


def test_a_loss_scale_saves_small_gradients_in_fp16(backend):
    """With normalizer 1e10 every gradient of the loss is 0 in fp16. With a loss scale of 2^33 it is not 0."""
    inputs = inputs_of(torch.float16, bias=True)
    options = {"reference": anchor_of(inputs["actions"], None, True), "rewards": REWARDS, "beta": 0.5}
    unscaled = evaluate(linear_reval_loss, inputs, ONE, normalizer=1e10, backend=backend, **options)
    assert (unscaled["d weight"] == 0).all()
    compare(backend, "linear_reval_loss", inputs, {"loss": torch.tensor(2.0**33)}, normalizer=1e10, **options)


@pytest.mark.parametrize(
    ("hidden", "weight", "bias"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float64, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_mixed_dtypes(backend, hidden, weight, bias):
    inputs = inputs_of(bias=True)
    for name, dtype in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        inputs[name] = inputs[name].to(dtype)
    options = {"reference": anchor_of(inputs["actions"], None, True), "rewards": REWARDS, "beta": 0.5}
    compare(backend, "linear_reval_loss", inputs, ONE, **options)


@pytest.mark.parametrize("function", ["reval_loss", "linear_reval_loss"])
def test_autocast_and_repetition_change_no_bit(backend, function):
    inputs = inputs_of(bias=True)
    if function == "reval_loss":
        inputs = dict(zip(("logits", "actions"), logits_and_actions(3, 6, 129), strict=True))
    options = {"reference": anchor_of(inputs["actions"], None, True), "rewards": REWARDS, "beta": 0.5}
    expected = evaluate(getattr(reval_kernels, function), inputs, ONE, backend=backend, **options)
    assert_same_bits(expected, evaluate(getattr(reval_kernels, function), inputs, ONE, backend=backend, **options))
    with torch.autocast(inputs["actions"].device.type, dtype=torch.bfloat16):
        got = evaluate(getattr(reval_kernels, function), inputs, ONE, backend=backend, **options)
    assert_same_bits(expected, got)


@pytest.mark.parametrize(
    "view",
    [
        lambda h, w: (h[:, ::2, 1::2], w[::2, :24]),
        lambda h, w: (h.transpose(0, 1)[..., :47], w[:, 1:]),
        lambda h, w: (h[:1].expand(4, -1, -1), w),
        lambda h, w: (h[..., :31], torch.randn(31, 129).T),
    ],
    ids=["stepped", "sliced", "expanded", "transposed weight"],
)
def test_any_strides(backend, view):
    hidden, weight = view(torch.randn(3, 6, 48), torch.randn(129, 48) / 3)
    before = hidden.clone(), weight.clone()
    actions = torch.randint(len(weight), hidden.shape[:-1])
    options = {"reference": torch.zeros(len(hidden)), "rewards": torch.ones(len(hidden)), "beta": 0.5}
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    compare(backend, "linear_reval_loss", inputs, ONE, **options)
    assert_same_bits((hidden, weight), before)
    assert hidden._version == weight._version == 0


@pytest.mark.parametrize(("shape", "cu_seqlens"), [((0, 5), None), ((3, 0), None), ((0,), [0]), ((0,), [0, 0])])
@pytest.mark.parametrize("function", ["reval_loss", "linear_reval_loss"])
def test_empty_batches(backend, function, shape, cu_seqlens):
    count = shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    hidden, weight, actions = head(*shape, 7, 3)
    inputs = {"hidden": hidden, "weight": weight, "actions": actions}
    if function == "reval_loss":
        inputs = {"logits": torch.randn(*shape, 7), "actions": actions}
    options = {"reference": torch.zeros(count), "rewards": torch.ones(count), "beta": 0.5}
    if cu_seqlens is not None:
        options["cu_seqlens"] = torch.tensor(cu_seqlens)
    ours = evaluate(getattr(reval_kernels, function), inputs, ONE, backend=backend, **options)
    assert all((x == 0).all() for x in ours.values())
    assert getattr(reval_kernels, function)(**inputs, **options, backend=backend).residual.tolist() == [0] * count


def test_common_offset_costs_no_precision(backend):
    """1e4 added to every logit changes the residual but not its gradient: no digit of the gradient may be lost."""
    logits, actions = logits_and_actions(3, 6, 129)
    logits = (logits * 256).round() / 256
    options = {"reference": torch.zeros(3), "rewards": REWARDS, "beta": 0.5}
    inputs, by = {"logits": logits, "actions": actions}, {"residual": torch.randn(3)}
    truth = float64_truth("reval_loss", inputs, by, **options)["d logits"]
    plain = evaluate(reference.reval_loss, inputs, by, **options)["d logits"]
    ours = evaluate(reval_loss, inputs | {"logits": logits + 1e4}, by, backend=backend, **options)["d logits"]
    assert_no_worse_than_torch(ours, plain, truth, scale=truth.abs().amax(-1, keepdim=True))


@pytest.mark.parametrize("retain", [False, True])
def test_the_gradient_of_the_head_is_in_memory_once(retain):
    """The saved tensor becomes the gradient, unless the graph is retained for another backward."""
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    saved = []

    def note(x):
        saved.append((x.shape, x.data_ptr(), x.clone()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = linear_reval_loss(
            hidden, weight, torch.randint(11, (2, 3)), torch.randn(2), torch.rand(2), beta=0.3, backend="portable"
        ).loss
    (gradient,) = torch.autograd.grad(loss, weight, torch.tensor(3.0), retain_graph=retain)
    [(_, address, before)] = [entry for entry in saved if entry[0] == weight.shape]
    assert (gradient.data_ptr() == address) == (not retain)
    torch.testing.assert_close(gradient, 3 * before)


def loss_of(backend, hidden, weight, actions):
    return linear_reval_loss(hidden, weight, actions, torch.zeros(3), REWARDS, beta=1.0, backend=backend).loss


def test_gradients_that_are_absent_or_batched(backend):
    """gradcheck passes absent upstream gradients, is_grads_batched passes batched ones."""

    class Nothing(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())
        backward = staticmethod(lambda ctx, _: None)

    inputs = inputs_of()
    hidden = inputs["hidden"].requires_grad_()
    loss = loss_of(backend, hidden, inputs["weight"], inputs["actions"])
    (gradient,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (none,) = torch.autograd.grad(Nothing.apply(loss), hidden, retain_graph=True, allow_unused=True)
    assert none is None
    scales = torch.tensor([1.0, -2.0, 0.0])
    (batch,) = torch.autograd.grad(loss, hidden, scales, is_grads_batched=True)
    assert_same_bits([batch], [scales[:, None, None, None] * gradient])
