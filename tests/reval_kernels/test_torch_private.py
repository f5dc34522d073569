"""torch still has the private names that the library uses, and the library also works without them."""

import pytest
import torch

from reval_kernels import linear_reval_loss

NAMES = {
    "second_order_refused": (torch._C._functions, "DelayedError"),
    "is_batched": (torch._C._functorch, "is_legacy_batchedtensor"),
    "backward_keeps_graph": (torch._C._autograd, "_get_current_graph_task_keep_graph"),
}


@pytest.mark.parametrize("helper", NAMES)
def test_torch_still_has_the_name(helper):
    module, name = NAMES[helper]
    assert hasattr(module, name), (
        f"torch {torch.__version__} has no {module.__name__}.{name} any more: torch_private.{helper} now takes its "
        "fallback, which is right but may cost memory. Find the new name, or keep the fallback alone"
    )


def gradient(create_graph: bool = False, retain_graph: bool | None = None, batched: bool = False) -> torch.Tensor:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4)
    actions = torch.randint(7, (2, 3))
    loss = linear_reval_loss(hidden, weight, actions, torch.randn(2), torch.rand(2), beta=0.5).loss
    upstream = torch.tensor([2.0, 3.0]) if batched else torch.tensor(2.0)
    options = {"create_graph": create_graph, "retain_graph": retain_graph, "is_grads_batched": batched}
    return torch.autograd.grad(loss, hidden, upstream, **options)[0]


@pytest.mark.parametrize("options", [{}, {"retain_graph": True}, {"batched": True}], ids=str)
def test_gradients_without_the_names(monkeypatch, options):
    with_names = gradient(**options)
    for module, name in NAMES.values():
        monkeypatch.delattr(module, name)
    assert torch.equal(gradient(**options), with_names)


def test_a_second_order_gradient_is_refused_without_the_name(monkeypatch):
    monkeypatch.delattr(*NAMES["second_order_refused"])
    first = gradient(create_graph=True)
    with pytest.raises(RuntimeError, match="linear_reval_loss has no second-order gradient"):
        first.sum().backward()
