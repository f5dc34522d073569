"""Linear layers of a decoding step on a CPU: a large weight and few rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

ROWS = range(16, 193)
"""With fewer or more rows, F.linear is as fast or faster."""


class FewRows(TorchFunctionMode):
    """Within the block, float32 linear layers on a CPU are computed as (weight @ x.T).T.

    For x @ weight.T, MKL copies the whole weight into its own layout in every call. This takes as long as the product
    when there are few rows.
    """

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) >= 2 and not kwargs and _fits(*args[:2]):
            x, weight, *bias = args
            out = (weight @ x.reshape(-1, x.shape[-1]).T).T.contiguous().view(*x.shape[:-1], len(weight))
            return out if not bias or bias[0] is None else out.add_(bias[0])
        return func(*args, **(kwargs or {}))


def _fits(x: Tensor, weight: Tensor) -> bool:
    rows = x.numel() // x.shape[-1]
    return rows in ROWS and x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype.itemsize == 4
