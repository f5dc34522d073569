"""Functions that need private names of torch. Each has a fallback for a torch without the name.

tests/reval_kernels/test_torch_private.py fails when torch drops one of the names.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils import _pytree

DISPATCH_KEYS = (
    "_dispatch_tls_local_include_set",
    "_dispatch_keys",
    "_is_torch_function_mode_enabled",
    "DispatchKey",
    "DispatchKeySet",
)
"""The names of torch._C from which `plain_eager` learns who wants to see a call."""
_has_dispatch_keys = all(hasattr(torch._C, name) for name in DISPATCH_KEYS)
_has_dispatch_keys = _has_dispatch_keys and hasattr(torch._C.DispatchKeySet, "raw_repr")


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


def forward_mode() -> bool:
    """Whether forward-mode AD (forward_ad.dual_level, torch.func.jvp) is on, so that a tensor may have a tangent.

    Fallback: true. The caller then asks every tensor for its tangent.
    """
    level: int = getattr(forward_ad, "_current_level", 0)
    return level >= 0


def plain_eager(tensors: Iterable[Tensor]) -> bool:
    """Whether nothing but autograd needs to see a call with these tensors: no compiler or tracer, no mode, no transform
    of torch.func, no forward-mode AD, and no tensor that is more than its memory (a subclass, a fake or batched tensor,
    a lazy negation). A function may then be called without torch's dispatcher.

    Fallback: false. The caller then goes through the dispatcher, which is right in every case, and slower.
    """
    if torch.compiler.is_compiling() or forward_mode() or not _has_dispatch_keys:
        return False
    # Each mode, transform and tracer adds a dispatch key to those of this thread. Only a TorchFunctionMode adds none.
    thread = torch._C._dispatch_tls_local_include_set().raw_repr()
    if thread != _keys_of_a_plain_thread() or torch._C._is_torch_function_mode_enabled():
        return False
    plain = 0
    for x in tensors:
        keys = torch._C._dispatch_keys(x).raw_repr()
        if keys != plain:
            plain = _keys_of_a_plain_tensor(x.device)
        if keys != plain or type(x) not in (Tensor, Parameter):
            return False
    return True


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply for plain eager code (`plain_eager`): it does not look at each input for torch.func.

    Fallback: function.apply.
    """
    apply: Callable[..., Any] = getattr(super(torch.autograd.Function, function), "apply", function.apply)
    return apply


@functools.cache
def _keys_of_a_plain_thread() -> int:
    """The dispatch keys that every thread has, as a bit set."""
    key, keys = torch._C.DispatchKey, torch._C.DispatchKeySet
    return (keys(key.BackendSelect) | keys(key.ADInplaceOrView)).raw_repr()


@functools.cache
def _keys_of_a_plain_tensor(device: torch.device) -> int:
    """The dispatch keys of a tensor in a device's memory, as a bit set. No tensor of device "meta" is plain."""
    if device.type == "meta":
        return 0
    with torch.inference_mode(False):
        return torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr()


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
