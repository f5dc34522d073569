"""Three functions that need private names of torch. Each has a fallback for a torch without the name.

tests/reval_kernels/test_torch_private.py fails when torch drops one of the names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree


def is_batched(x: Tensor) -> bool:
    """Whether torch.vmap, or torch.autograd.grad(..., is_grads_batched=True), made this tensor. It then stands for many
    tensors.

    Fallback: true. The caller then runs the code that is right for both kinds of tensor.
    """
    for name in ("is_functorch_wrapped_tensor", "is_legacy_batchedtensor"):  # torch.vmap, is_grads_batched
        question = _private("_functorch", name)
        if question is None or question(x):
            return True
    return False


def backward_keeps_graph() -> bool:
    """Whether the backward that runs now keeps its graph, so that another backward may follow.

    Fallback: true. The caller then keeps the tensors that another backward would need.
    """
    question = _private("_autograd", "_get_current_graph_task_keep_graph")
    return True if question is None else question()


def allow_export(namedtuple: type) -> None:
    """Let torch.export save a program whose inputs or results have this type.

    Fallback: nothing. torch.export.save then raises NotImplementedError for such a program.
    """
    register = getattr(_pytree, "_register_namedtuple", None)
    if register is not None:
        register(namedtuple, serialized_type_name=f"{namedtuple.__module__}.{namedtuple.__qualname__}")


def _private(module: str, name: str) -> Any:
    """torch._C.<module>.<name>, or None where torch lacks the module or the name."""
    return getattr(getattr(torch._C, module, None), name, None)
