"""torch still has the private names that the library uses, and the library also works without them."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils import _pytree

from reval_kernels import TokenValues, linear_reval_loss, torch_private

NAMES = [
    ("_functorch", "is_functorch_wrapped_tensor"),
    ("_functorch", "is_legacy_batchedtensor"),
    ("_autograd", "_get_current_graph_task_keep_graph"),
]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_torch_still_has_the_name(module, name):
    assert hasattr(getattr(torch._C, module, None), name), (
        f"torch {torch.__version__} has no torch._C.{module}.{name} any more: torch_private.py now takes its fallback, "
        "which is right but may cost memory. Find the new name, or keep the fallback alone"
    )


def test_torch_still_registers_named_tuples():
    assert hasattr(_pytree, "_register_namedtuple"), "torch.export.save refuses our named tuples: find the new name"


@pytest.mark.parametrize("name", torch_private.DISPATCH_KEYS)
def test_torch_still_has_the_names_of_plain_eager_code(name):
    assert hasattr(torch._C, name), (
        f"torch {torch.__version__} has no torch._C.{name} any more: every call now goes through torch's dispatcher, "
        "which is right but costs more time on the CPU. Find the new name"
    )


def test_torch_still_has_the_level_of_forward_mode():
    with forward_ad.dual_level():
        assert torch_private.forward_mode()
    assert forward_ad._current_level < 0 and not torch_private.forward_mode()


def test_forward_mode_without_the_name(monkeypatch):
    monkeypatch.delattr(forward_ad, "_current_level")
    assert torch_private.forward_mode()


def test_plain_eager_code_is_known_as_such():
    """Else every call would be right, and slow."""
    x = torch.ones(2)
    assert torch_private.plain_eager([x, torch.nn.Parameter(x), x.clone().requires_grad_()])


def test_plain_eager_code_without_the_names(monkeypatch):
    monkeypatch.setattr(torch_private, "_has_dispatch_keys", False)
    assert not torch_private.plain_eager([torch.ones(2)])


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, d):
        return 2 * d


def test_a_function_is_applied_without_the_look_for_transforms(monkeypatch):
    monkeypatch.setattr(torch.autograd.Function, "apply", None)
    out = torch_private.plain_apply(Double)(torch.ones(2, requires_grad=True))
    assert out.tolist() == [2, 2] and out.requires_grad


def loss_and_hidden() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4)
    actions = torch.randint(7, (2, 3))
    return linear_reval_loss(hidden, weight, actions, torch.randn(2), torch.rand(2), beta=0.5).loss, hidden


def gradients(case: str) -> list[torch.Tensor]:
    """Once; twice on a graph that is kept, where the first gradient must leave the second one as it is; batched in two
    ways."""
    loss, hidden = loss_and_hidden()
    if case == "batched":
        return list(torch.autograd.grad(loss, hidden, torch.tensor([2.0, 3.0]), is_grads_batched=True))
    if case == "vmap":
        by = torch.tensor([2.0, 3.0])
        return [torch.vmap(lambda d_loss: torch.autograd.grad(loss, hidden, d_loss)[0])(by)]
    if case == "twice":
        first = torch.autograd.grad(loss, hidden, torch.tensor(2.0), retain_graph=True)[0].clone()
        return [first, *torch.autograd.grad(loss, hidden, torch.tensor(2.0))]
    return list(torch.autograd.grad(loss, hidden, torch.tensor(2.0)))


@pytest.mark.parametrize("case", ["once", "twice", "batched", "vmap"])
def test_gradients_without_the_names(monkeypatch, case):
    with_names = gradients(case)
    assert case != "twice" or torch.equal(*with_names)
    for module, name in NAMES:
        monkeypatch.delattr(getattr(torch._C, module), name)
    assert all(torch.equal(a, b) for a, b in zip(gradients(case), with_names, strict=True))


def test_a_gradient_that_is_taken_twice_needs_the_answer(monkeypatch):
    """Without the question, scaling in place would double the second gradient: the test above can fail."""
    monkeypatch.setattr(torch_private, "backward_keeps_graph", lambda: False)
    first, second = gradients("twice")
    assert not torch.equal(first, second)


def test_a_missing_module_is_a_missing_name(monkeypatch):
    monkeypatch.setattr(torch_private.torch, "_C", object())
    assert torch_private.is_batched(torch.ones(())) and torch_private.backward_keeps_graph()


def test_named_tuples_without_the_name(monkeypatch):
    monkeypatch.delattr(_pytree, "_register_namedtuple")
    torch_private.allow_export(TokenValues)
