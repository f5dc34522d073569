"""GPU kernels in Triton, for NVIDIA and AMD; on CPU tensors they run in Triton's interpreter (TRITON_INTERPRET=1).

Importing this package imports no Triton: `import reval_kernels` must work, and be quick, on machines that lack it. Each
function of a backend is loaded from its file when it is first asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

DEVICES = ("cuda",)  # torch calls AMD GPUs by the same name
# Logits of one chunk, in entries: 1 GiB in fp32, 1766 tokens of Qwen's vocabulary. docs/kernels.md says why.
LINEAR_CHUNK = 1 << 28

_HOMES = {
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


def missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
