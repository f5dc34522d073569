"""Checks of arguments. The messages name the argument, the given value and the allowed values.

There are two kinds of checks. The public functions check the shape, dtype and device of tensors; these checks also run
while torch.compile traces. The ops of library.py check the data before they call a backend (`check_token_data`,
`check_cu_seqlens`). Example: is every action inside the vocabulary?
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import PRECISIONS, Layout, Tokens, Transform, wide_dtype
from .types import TokenValues

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDE = (torch.float32, torch.float64)
RANGES = {dtype: (torch.finfo(dtype).tiny, torch.finfo(dtype).max) for dtype in WIDE}
"""The smallest normal and the largest number of a dtype. The inverse of every number between them is finite too."""


def unknown(name: str, given: object, allowed: Sequence[str]) -> str:
    """The message about a name that is not allowed. It lists the allowed names and suggests the nearest name."""
    close = difflib.get_close_matches(str(given), allowed, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{name} must be one of {', '.join(map(repr, allowed))}; got {given!r}{hint}"


# --- shapes, dtypes, devices, numbers -------------------------------------------------------------------------------


def tensor(
    name: str, x: object, dtypes: Sequence[torch.dtype], shape: Sequence[int | str] | None, device: object
) -> None:
    """Check one tensor. A letter in `shape` allows any size; None as `shape` or `device` allows all."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(x.dtype).removeprefix('torch.')}")
    if shape is None:
        return
    # a torch.Size has no letters, so one comparison is enough
    if not (x.shape == shape if isinstance(shape, torch.Size) else _fits(x.shape, shape)):
        raise ValueError(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")


def _fits(given: torch.Size, shape: Sequence[int | str]) -> bool:
    return len(given) == len(shape) and all(isinstance(n, str) or m == n for m, n in zip(given, shape, strict=True))


def alike(
    names: Sequence[str], xs: Sequence[object], dtypes: Sequence[torch.dtype], shape: torch.Size, device: torch.device
) -> None:
    """`tensor` for several tensors of one shape. This form costs little where all is well."""
    for name, x in zip(names, xs, strict=True):
        if not (isinstance(x, Tensor) and x.dtype in dtypes and x.shape == shape and x.device == device):
            tensor(name, x, dtypes, shape, device)


def number(name: str, x: Any, dtype: torch.dtype, otherwise: str = "") -> None:
    """Check a positive number, which may be infinite. A finite number must be in the range of `dtype`, in which the
    kernels compute. `otherwise` completes the message, for example " or None"."""
    real = _real(name, x, otherwise)
    smallest, largest = RANGES[dtype]
    if not (smallest <= real <= largest or real == math.inf):
        raise ValueError(out_of_range(name, x, dtype, otherwise))


def out_of_range(name: str, x: Any, dtype: torch.dtype, otherwise: str = "") -> str:
    """The message about a number that `number` refuses."""
    (smallest, largest), kind = RANGES[dtype], str(dtype).removeprefix("torch.")
    if not x > 0:
        return f"{name} must be positive{otherwise}, got {x}"
    if x < smallest:
        return f"{name} must be at least {smallest:.2g} (the smallest normal {kind}){otherwise}, got {x}"
    return f"{name} must be at most {largest:.2g} (the largest {kind}) or infinite{otherwise}, got {x}"


def finite(name: str, x: Any, dtype: torch.dtype) -> None:
    """Check a number of any sign that `dtype`, in which the kernels compute, can hold."""
    largest = RANGES[dtype][1]
    if not -largest <= _real(name, x) <= largest:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be finite and within {largest:.2g} (the largest {kind}), got {x}")


def _real(name: str, x: Any, otherwise: str = "") -> Any:
    """The number as a float. Numbers are int, float, NumPy's scalars and tensors with one element, but not bool."""
    if type(x) is float or torch.compiler.is_compiling():  # a symbolic number has no __float__
        return x
    if isinstance(x, bool) or not hasattr(x, "__float__"):
        raise TypeError(f"{name} must be a number{otherwise}, got {type(x).__name__}")
    try:
        return float(x)
    except OverflowError:
        raise ValueError(f"{name} must be a number{otherwise}, got an int that is too large for float64") from None
    except (TypeError, ValueError, RuntimeError):
        shape = list(getattr(x, "shape", ()))
        raise TypeError(f"{name} must be a number{otherwise}, got {type(x).__name__} of shape {shape}") from None


def token_arguments(
    actions: Tensor,
    like: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
) -> None:
    """Check the arguments that all functions of tokens share. `like` are the logits or hidden states [..., *]."""
    shape, device = like.shape[:-1], like.device
    tensor("actions", actions, (torch.int64, torch.int32), shape, device)
    if mask is not None:
        tensor("mask", mask, (torch.bool,), shape, device)
    if isinstance(temperature, Tensor):
        tensor("temperature", temperature, FLOATS, shape, device)
    else:
        number("temperature", temperature, wide_dtype(like))
    if softcap is not None:
        number("softcap", softcap, wide_dtype(like), " or None")


def overlapping(x: Tensor) -> bool:
    """Whether two entries of x may share memory. For views that slicing, transposing and diagonal make of a tensor
    without such entries, the answer is exact.

    Entries are apart if each step is longer than all shorter steps together can reach. Example: sizes [25, 16] with
    strides [1, 1], as from unfold(0, 16, 1), overlap, because a step of 1 is not longer than 15 steps of 1.
    """
    reach = 0
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and step <= reach:
            return x.numel() > 0
        reach += step * max(size - 1, 0)
    return False


def cu_seqlens_shape(cu_seqlens: Tensor, device: torch.device) -> None:
    """Check that cu_seqlens is [B + 1] integers, B >= 0."""
    tensor("cu_seqlens", cu_seqlens, (torch.int32, torch.int64), ["B + 1"], device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must have B + 1 entries, the first of them 0; got none")


def packed_tokens(cu_seqlens: Tensor, like: Tensor) -> None:
    """Check the cu_seqlens of a function without an op of library.py. `like` are the packed tokens or values [N]."""
    cu_seqlens_shape(cu_seqlens, like.device)
    if not torch.compiler.is_compiling():
        check_cu_seqlens(Layout(None, cu_seqlens), like)


def head_arguments(hidden: Tensor, weight: Tensor, bias: Tensor | None, precision: str) -> None:
    """Check hidden states [..., D], the head's weight [V, D] and bias [V], and the precision of their products."""
    if precision not in PRECISIONS:
        raise ValueError(unknown("precision", precision, PRECISIONS))
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
    shape: torch.Size,
    like: Tensor,
    reference: TokenValues | Tensor,
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta: float,
    normalizer: float | None = None,
) -> None:
    """Check the arguments that td_targets and the losses share. `shape` is the shape [B, T] or [N] of the values.

    `like` has the device of all tensors and the dtype of the computation: a tensor of the values, or hidden states.
    """
    device = like.device
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
        cu_seqlens_shape(cu_seqlens, device)
        trajectories = cu_seqlens.shape[0] - 1
    if mask is not None:
        tensor("mask", mask, (torch.bool,), shape, device)
    tensor("rewards", rewards, FLOATS, [trajectories], device)
    number("beta", beta, wide_dtype(like))
    if normalizer is not None:
        number("normalizer", normalizer, wide_dtype(like), " or None")
    if isinstance(reference, TokenValues):
        names = ("reference.q", "reference.v", "reference.log_prob")
        alike(names, (reference.q, reference.v, reference.log_prob), FLOATS, shape, device)
    elif isinstance(reference, Tensor):
        tensor("reference", reference, FLOATS, [trajectories], device)
    else:
        raise TypeError(f"reference must be TokenValues or a tensor of returns [B], got {type(reference).__name__}")


# --- data -----------------------------------------------------------------------------------------------------------
# On a GPU, reading the result of a check would make the CPU wait for the GPU. So there a check is a device-side assert,
# as in torch's own losses: a RuntimeError at some later call. Until then no kernel reads outside its tensors. The
# functions in a backend's CHECKS_DATA assert in their own kernel, which needs no launch for the check.


def check_token_data(tokens: Tokens, transform: Transform, vocabulary: int, like: Tensor) -> None:
    """Check that every unmasked action is in [0, vocabulary), and that every unmasked temperature is a `number`.

    `like` are the logits or hidden states. The kernels take temperatures in the dtype that they compute in, where 1e-60
    may be 0 and 1e60 infinite.
    """
    (actions, mask), temperatures = tokens, transform.temperatures
    if not actions.numel():
        return
    seen = actions if mask is None else actions * mask  # a masked-out action counts as 0, which is always valid
    low, high = seen.aminmax()
    refused = None if temperatures is None else _refused(temperatures, mask, wide_dtype(like))
    if actions.device.type == "cuda":
        good = (low >= 0) & (high < vocabulary)
        good = good if refused is None else good & ~refused.any()
        torch._assert_async(good, f"actions must lie in [0, {vocabulary}), temperatures be positive")
    elif not (int(low) >= 0 and int(high) < vocabulary):
        place = ((seen < 0) | (seen >= vocabulary)).nonzero()[0].tolist()
        raise ValueError(
            f"actions must lie in [0, {vocabulary}) where they are not masked out; got {int(actions[tuple(place)])} at "
            f"{place}"
        )
    elif temperatures is not None and refused is not None and refused.any():
        place = refused.nonzero()[0].tolist()
        given = float(temperatures[tuple(place)])
        text = out_of_range("temperature", given, wide_dtype(like), " at every unmasked token")
        raise ValueError(f"{text} at {place}")


def _refused(temperatures: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[...] bool, true for each unmasked temperature that `number` would refuse."""
    each = temperatures if temperatures.dtype == torch.float64 else temperatures.to(dtype)
    smallest, largest = RANGES[dtype]
    refused = ~(each >= smallest)  # NaN too
    if each.dtype != dtype:
        refused |= (each > largest) & (each < math.inf)
    return refused if mask is None else refused & mask


def check_cu_seqlens(layout: Layout, like: Tensor) -> None:
    """Check that cu_seqlens starts at 0, never falls, and ends at N, the number of tokens of `like` [N]."""
    cu_seqlens, tokens = layout.cu_seqlens, like.numel()
    if cu_seqlens is None:
        return
    never_falls = (cu_seqlens[1:] >= cu_seqlens[:-1]).all()  # a difference of int32 could overflow
    if cu_seqlens.device.type == "cuda":
        good = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens) & never_falls
        torch._assert_async(good, "cu_seqlens must be 0, ..., N and never fall")
    elif not (int(cu_seqlens[0]) == 0 and int(cu_seqlens[-1]) == tokens and never_falls):
        raise ValueError(f"cu_seqlens must start at 0, never fall and end at N = {tokens}, got {cu_seqlens.tolist()}")
