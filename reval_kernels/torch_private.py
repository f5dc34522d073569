"""Three questions that torch answers through private names alone, each with a fallback where a torch lacks the name.

tests/reval_kernels/test_torch_private.py says which name is gone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def second_order_refused(gradient: Tensor, message: str) -> Tensor:
    """The gradient as a tensor whose own backward raises RuntimeError with this message.

    Without this node autograd would take the gradient for a constant, and a second-order gradient for 0.
    """
    leaf = gradient.detach().requires_grad_()
    delayed_error = getattr(torch._C._functions, "DelayedError", None)
    return _Refusing.apply(leaf, message) if delayed_error is None else delayed_error(message, 1)(leaf)


class _Refusing(torch.autograd.Function):
    """The same node in public Python, which torch.compile's autograd cannot trace."""

    @staticmethod
    def forward(ctx, gradient: Tensor, message: str) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *upstream):
        raise RuntimeError(ctx.message)


def is_batched(x: Tensor) -> bool:
    """Whether torch.autograd.grad(..., is_grads_batched=True) made this tensor: it stands for many.

    Fallback: true, and the caller takes the way that is right for both kinds.
    """
    question = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
    return True if question is None else question(x)


def backward_keeps_graph() -> bool:
    """Whether the backward that runs now keeps its graph, so that another backward may follow.

    Fallback: true, and the caller keeps what another backward would need.
    """
    question = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if question is None else question()
