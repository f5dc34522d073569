"""Three functions that need private names of torch. Each has a fallback for a torch without the name.

tests/reval_kernels/test_torch_private.py fails when torch drops one of the names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def second_order_refused(gradient: Tensor, message: str) -> Tensor:
    """The gradient with a graph whose backward raises RuntimeError with this message.

    Without this node, autograd would treat the gradient as a constant and return 0 as the second-order gradient.
    """
    leaf = gradient.detach().requires_grad_()
    delayed_error = _private("_functions", "DelayedError")
    return _Refusing.apply(leaf, message) if delayed_error is None else delayed_error(message, 1)(leaf)


class _Refusing(torch.autograd.Function):
    """The fallback: the same node in public Python. The autograd of torch.compile cannot trace it."""

    @staticmethod
    def forward(ctx, gradient: Tensor, message: str) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError(ctx.message)


def is_batched(x: Tensor) -> bool:
    """Whether torch.autograd.grad(..., is_grads_batched=True) made this tensor, which then stands for many tensors.

    Fallback: true. The caller then runs the code that is right for both kinds of tensor.
    """
    question = _private("_functorch", "is_legacy_batchedtensor")
    return True if question is None else question(x)


def backward_keeps_graph() -> bool:
    """Whether the backward that runs now keeps its graph, so that another backward may follow.

    Fallback: true. The caller then keeps the tensors that another backward would need.
    """
    question = _private("_autograd", "_get_current_graph_task_keep_graph")
    return True if question is None else question()


def _private(module: str, name: str) -> Any:
    """torch._C.<module>.<name>, or None where torch lacks the module or the name."""
    return getattr(getattr(torch._C, module, None), name, None)
