"""Arguments as users pass them, checked with messages that name the argument, what it was and what it must be.

Only what tensors say about themselves (shape, dtype, device) is looked at here, so every check also runs while
torch.compile traces. What needs the data itself (is an action inside the vocabulary?) the backends check.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .types import TokenValues

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDE = (torch.float32, torch.float64)
LEVELS = ("trajectory", "token", "subtrajectory")


def unknown(name: str, given: object, allowed: Sequence[str]) -> str:
    """The message about a name that is none of the allowed: all of these, and the one that was probably meant."""
    close = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{name} must be one of {', '.join(map(repr, allowed))}; got {given!r}{hint}"


def tensor(
    name: str, x: object, dtypes: Sequence[torch.dtype], shape: Sequence[int | str] | None, device: object
) -> None:
    """Check one tensor. A letter in `shape` stands for any size, None for any shape; `device` None for any device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(x.dtype).removeprefix('torch.')}")
    if shape is None:
        return
    if x.dim() != len(shape) or any(isinstance(n, int) and m != n for m, n in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def number(name: str, x: Any, otherwise: str = "") -> None:
    """Check a positive number; `otherwise` says what else the argument may be."""
    if not torch.compiler.is_compiling() and not hasattr(x, "__float__"):  # a symbolic number cannot be asked
        raise TypeError(f"{name} must be a number{otherwise}, got {type(x).__name__}")
    if not x > 0:
        raise ValueError(f"{name} must be positive{otherwise}, got {x}")


def token_arguments(
    actions: Tensor,
    shape: Sequence[int],
    device: object,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> None:
    """What token_values and its relatives share; `shape` is the [...] of the tokens."""
    tensor("actions", actions, (torch.int64, torch.int32), shape, device)
    if mask is not None:
        tensor("mask", mask, (torch.bool,), shape, device)
    if isinstance(temperature, Tensor):
        tensor("temperature", temperature, FLOATS, shape, device)
    else:
        number("temperature", temperature)
    if softcap is not None:
        number("softcap", softcap, " or None")
        if not softcap >= torch.finfo(torch.float32).tiny:  # which the kernels compute in, where it would be 0: no cap
            raise ValueError(f"softcap must be at least {torch.finfo(torch.float32).tiny:.2g} or None, got {softcap}")


def head_arguments(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not isinstance(hidden, Tensor) or hidden.dim() < 2:
        raise ValueError(f"hidden must be a tensor of shape [..., D], got {getattr(hidden, 'shape', type(hidden))}")
    tensor("hidden", hidden, FLOATS, hidden.shape, None)
    if hidden.shape[-1] == 0:
        raise ValueError(f"hidden must have at least one feature (D >= 1), got shape {list(hidden.shape)}")
    tensor("weight", weight, FLOATS, ["V", hidden.shape[-1]], hidden.device)
    if weight.shape[0] == 0:
        raise ValueError("weight must have at least one row (V >= 1), got shape [0, D]")
    if bias is not None:
        tensor("bias", bias, FLOATS, [weight.shape[0]], hidden.device)


def bellman_arguments(
    shape: Sequence[int],
    device: object,
    reference: TokenValues | Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta: float,
) -> None:
    """What td_targets and bellman_loss share; `shape` is that of the policy's values, [B, T] or [N]."""
    if cu_seqlens is None:
        if len(shape) != 2:
            raise ValueError(
                f"values must have shape [B, T], or [N] together with cu_seqlens [B + 1]; got {list(shape)} and no "
                "cu_seqlens"
            )
        trajectories: int | str = shape[0]
    else:
        if len(shape) != 1:
            raise ValueError(f"values must have shape [N] when cu_seqlens is given, got {list(shape)}")
        tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), ["B + 1"], device)
        if cu_seqlens.shape[0] == 0:
            raise ValueError("cu_seqlens must have B + 1 entries, the first of them 0; got none")
        trajectories = cu_seqlens.shape[0] - 1
    if mask is not None:
        tensor("mask", mask, (torch.bool,), shape, device)
    tensor("rewards", rewards, FLOATS, [trajectories], device)
    number("beta", beta)
    if isinstance(reference, TokenValues):
        for name in ("q", "v", "log_prob"):
            tensor(f"reference.{name}", getattr(reference, name), FLOATS, shape, device)
    elif isinstance(reference, Tensor):
        tensor("reference", reference, FLOATS, [trajectories], device)
    else:
        raise TypeError(f"reference must be TokenValues or a tensor of returns [B], got {type(reference).__name__}")


def level(name: str, reference: TokenValues | Tensor, semi_gradient: bool, normalizer: float | None) -> None:
    if name not in LEVELS:
        raise ValueError(unknown("level", name, LEVELS))
    if name != "trajectory" and not isinstance(reference, TokenValues):
        raise ValueError(f"level {name!r} needs the reference's TokenValues, got its returns (a tensor)")
    if semi_gradient and name != "token":
        raise ValueError(f"semi_gradient stops the gradient at the TD target of level 'token', got level {name!r}")
    if normalizer is not None:
        number("normalizer", normalizer, " or None")
