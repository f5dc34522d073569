"""Derivatives beyond one backward: each is right, or raises an error. None is 0 without a word.

A second order, forward mode, vmap, outputs that the user overwrites, and programs of torch.export.
"""

import io

import pytest
import torch
from cases import assert_same_bits
from torch import Tensor
from torch.autograd import forward_ad, functional

import reval_kernels
from reval_kernels import TokenValues, reference

B, T, V, D = 3, 5, 37, 8
OPTIONS = {"beta": 0.5}


def arguments(name: str) -> tuple:
    """The arguments of a public function. The first is the tensor that these tests differentiate."""
    torch.manual_seed(0)
    logits, hidden, weight, actions = (
        torch.randn(B, T, V),
        torch.randn(B, T, D),
        torch.randn(V, D),
        torch.randint(V, (B, T)),
    )
    anchor, rewards = TokenValues(*torch.randn(3, B, T)), torch.rand(B)
    return {
        "token_values": (logits, actions),
        "linear_token_values": (hidden, weight, actions),
        "td_targets": (torch.randn(B, T), anchor, rewards),
        "bellman_loss": (torch.randn(B, T), anchor, rewards),
        "reval_loss": (logits, actions, anchor, rewards),
        "linear_reval_loss": (hidden, weight, actions, anchor, rewards),
    }[name]


def outputs(name: str, x: Tensor, *rest, module=reval_kernels, **options) -> tuple:
    """Call a public function. The functions of values get values that depend on `x`."""
    if name in ("td_targets", "bellman_loss"):
        x = TokenValues(x.sin(), x.cos(), x * 0.5)
    if "token_values" not in name:
        options |= OPTIONS
    return getattr(module, name)(x, *rest, **options)


def scalar(name: str, x: Tensor, *rest, **options) -> Tensor:
    return sum(out.square().sum() for out in outputs(name, x, *rest, **options) if out is not None and out.dim() != 1)


FUNCTIONS = ["token_values", "linear_token_values", "td_targets", "bellman_loss", "reval_loss", "linear_reval_loss"]


def test_every_function_is_among_them():
    others = {"__version__", "actions_and_mask", "backends", "reference", "until_end"}  # compute nothing with values
    public = {name for name in reval_kernels.__all__ if name.islower()} - others
    assert public == set(FUNCTIONS)


# --- second order ---------------------------------------------------------------------------------------------------


def penalty(f, x, **options):
    """The gradient of a gradient penalty."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(f(x) + first.square().sum(), x, **options)


def through_a_step(f, x):
    """The gradient of the loss after one step, as in meta-learning."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(f(x - 0.1 * first), x)


def second_backward(f, x):
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    first.square().sum().backward()


SECOND_ORDERS = {
    "inputs": penalty,
    "allow_unused": lambda f, x: penalty(f, x, allow_unused=True),
    "step": through_a_step,
    "backward": second_backward,
    "hessian": functional.hessian,
    "hvp": lambda f, x: functional.hvp(f, x, torch.ones_like(x)),
    "vhp": lambda f, x: functional.vhp(f, x, torch.ones_like(x)),
    # other backends of torch.compile use AOTAutograd, which drops the second order of every function
    "compiled": lambda f, x: penalty(torch.compile(f, backend="eager"), x),
}


@pytest.mark.parametrize("way", SECOND_ORDERS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_second_order_gradient_is_refused(name, way):
    torch.compiler.reset()
    x, *rest = arguments(name)
    with pytest.raises(RuntimeError, match="no second-order gradient"):
        SECOND_ORDERS[way](lambda x: scalar(name, x, *rest), x)


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("hidden", "weight", "bias")])
def test_create_graph_costs_no_bit_of_the_first_order(backend, needs):
    _, weight, *rest = arguments("linear_reval_loss")
    inputs = {"hidden": torch.randn(B, T, D), "weight": weight, "bias": torch.randn(V)}
    leaves = [inputs[name].requires_grad_() for name in needs]
    hidden, weight, bias = inputs.values()
    loss = reval_kernels.linear_reval_loss(hidden, weight, *rest, bias=bias, backend=backend, **OPTIONS).loss
    with_graph = torch.autograd.grad(loss, leaves, create_graph=True)
    for gradient, leaf in zip(with_graph, leaves, strict=True):
        with pytest.raises(RuntimeError, match=r"reval_kernels\.reference\.linear_reval_loss has one"):
            torch.autograd.grad(gradient.square().sum(), leaf, retain_graph=True)
    assert_same_bits(torch.autograd.grad(loss, leaves), [x.detach() for x in with_graph])


def test_the_reference_has_the_second_order():
    """The messages send users there."""
    x, *rest = arguments("linear_reval_loss")
    f = lambda x: reference.linear_reval_loss(x, *rest, **OPTIONS).loss  # noqa: E731
    assert functional.hessian(f, x).abs().sum() > 1


def test_a_jacobian_times_a_vector_by_two_backwards():
    """torch.autograd.functional.jvp differentiates the gradient with respect to its upstream gradient alone."""
    x, *rest = arguments("linear_reval_loss")
    f = lambda x: reval_kernels.linear_reval_loss(x, *rest, **OPTIONS).loss  # noqa: E731
    by = torch.randn_like(x)
    expected = (functional.jacobian(f, x) * by).sum()
    torch.testing.assert_close(functional.jvp(f, x, by)[1], expected)


# --- forward mode ---------------------------------------------------------------------------------------------------


def dual(f, x):
    with forward_ad.dual_level():
        f(forward_ad.make_dual(x, torch.ones_like(x)))


FORWARD_MODES = {
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "forward_ad": dual,
    "jacobian": lambda f, x: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "compiled": lambda f, x: torch.compile(FORWARD_MODES["func.jvp"], backend="aot_eager")(f, x),
}


@pytest.mark.parametrize("way", FORWARD_MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_refused(name, way):
    x, *rest = arguments(name)
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        FORWARD_MODES[way](lambda x: scalar(name, x, *rest), x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_reference_has_forward_mode(name):
    x, *rest = arguments(name)
    f = lambda x: scalar(name, x, *rest, module=reference)  # noqa: E731
    _, derivative = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(derivative, functional.jacobian(f, x).sum())


# --- vmap -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_over_the_upstream_gradient(backend, name, retain):
    x, *rest = arguments(name)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(scalar(name, x, *rest, backend=backend), x)
    scales = torch.tensor([1.0, -2.0, 0.0])
    out = scalar(name, x, *rest, backend=backend)
    batch = torch.vmap(lambda by: torch.autograd.grad(out, x, by, retain_graph=retain)[0])(scales)
    expected = scales[(...,) + (None,) * x.dim()] * gradient
    assert_same_bits([batch], [expected])


# --- outputs that the user overwrites -------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_output_that_the_user_overwrites(backend, name, frozen):
    """`values.log_prob.mul_(2)` is a step of the graph. The backward must not need the number before it."""
    x, *rest = arguments(name)
    if not frozen and name.startswith("linear"):
        rest[0].requires_grad_()
    x.requires_grad_()
    for i, out in enumerate(outputs(name, x, *rest, backend=backend)):
        if out is None or not out.requires_grad:
            continue
        (expected,) = torch.autograd.grad((out * 2).sum(), x, retain_graph=True)
        changed = outputs(name, x, *rest, backend=backend)[i].mul_(2).sum()
        if name == "linear_token_values" and frozen and i == 2:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # the backward needs log_prob
                torch.autograd.grad(changed, x)
        else:
            assert_same_bits([torch.autograd.grad(changed, x)[0]], [expected])


# --- torch.export ---------------------------------------------------------------------------------------------------


class Module(torch.nn.Module):
    """A public function as a module. A second argument that is a float tensor, the head, becomes a parameter."""

    def __init__(self, name: str, *rest):
        super().__init__()
        self.name, self.rest = name, rest
        self.head = torch.nn.Parameter(rest[0].clone()) if name.startswith("linear") else None

    def forward(self, x):
        rest = self.rest if self.head is None else (self.head, *self.rest[1:])
        return outputs(self.name, x, *rest)


def exported(module: Module, x: Tensor) -> torch.nn.Module:
    """The module, exported, saved and loaded."""
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,)), file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_exported_program_is_saved_and_trained(name):
    """At the export the hidden states need no gradient. Later they do."""
    x, *rest = arguments(name)
    module = Module(name, *rest)
    program = exported(module, x)
    results = []
    for run in (module, program, torch.compile(program, backend="aot_eager")):
        own, head = x.clone().requires_grad_(), getattr(run, "head", None)
        out = run(own)
        assert type(out) is type(module(x))
        values = [y for y in out if y is not None]
        sum(y.square().sum() for y in values if y.requires_grad).backward()
        results.append([*(y.detach() for y in values), own.grad, *([] if head is None else [head.grad.clone()])])
        if head is not None:
            head.grad = None
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_values_are_an_input_of_an_exported_program():
    x, anchor, rewards = arguments("bellman_loss")

    class Loss(torch.nn.Module):
        def forward(self, values):
            return reval_kernels.bellman_loss(values, anchor, rewards, **OPTIONS)

    values = TokenValues(x, x * 2, x * 3)
    file = io.BytesIO()
    torch.export.save(torch.export.export(Loss(), (values,)), file)
    file.seek(0)
    assert_same_bits(torch.export.load(file).module()(values), Loss()(values))


def test_saved_values_load_with_weights_only():
    """Values of a reference policy are worth saving."""
    values, file = TokenValues(*torch.randn(3, B, T)), io.BytesIO()
    torch.save(values, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is TokenValues and loaded.entropy is None
    assert_same_bits(loaded[:3], values[:3])
