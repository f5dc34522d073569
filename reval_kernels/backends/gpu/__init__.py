"""GPU kernels in Triton, for NVIDIA and AMD; on CPU tensors they run in Triton's interpreter (TRITON_INTERPRET=1).

Importing this package imports no Triton: `import reval_kernels` must work, and be quick, on machines without Triton.
The first use of a function loads the function from its file.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bellman import bellman_loss, bellman_loss_backward, td_targets, td_targets_backward
    from .linear import linear_reval_loss, linear_token_values, linear_token_values_backward
    from .rows import token_values, token_values_backward

__all__ = [
    "CHECKS_DATA",
    "DEVICES",
    "bellman_loss",
    "bellman_loss_backward",
    "linear_reval_loss",
    "linear_token_values",
    "linear_token_values_backward",
    "missing",
    "td_targets",
    "td_targets_backward",
    "token_values",
    "token_values_backward",
]

DEVICES: tuple[str, ...] | None = ("cuda",)  # torch's name for AMD GPUs too
CHECKS_DATA: frozenset[str] = frozenset({"token_values", "bellman_loss", "td_targets"})
OLDEST_TRITON = (3, 6)
LINEAR_CHUNK = 1 << 29
"""The number of logits in one chunk: 1 GiB in bf16, 3533 tokens of Qwen's vocabulary; half as many in float32. The
reason is in docs/kernels.md."""

_FILES = {
    "token_values": "rows",
    "token_values_backward": "rows",
    "linear_token_values": "linear",
    "linear_token_values_backward": "linear",
    "linear_reval_loss": "linear",
    "td_targets": "bellman",
    "td_targets_backward": "bellman",
    "bellman_loss": "bellman",
    "bellman_loss_backward": "bellman",
}


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot run: they need only Triton. `launch` checks that the tensors are on a GPU."""
    if not importlib.util.find_spec("triton"):
        return "triton is not installed (pip install triton)"
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None  # AMD's builds and nightly builds have other names
    if tuple(map(int, found.split(".")[:2])) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"triton {found} is too old: the kernels need {oldest} or newer, which torch 2.10 and newer bring"
    return None


def __getattr__(name: str) -> Any:
    if name in _FILES:
        return getattr(importlib.import_module(f".{_FILES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
