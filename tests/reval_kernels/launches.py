"""Records the kernel launches of the tests, for tools/compile_launches.py."""

from __future__ import annotations

import atexit
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor


def record(folder: str) -> None:
    """Record the launches of our kernels in this process from here on. At its end, write them to a file in `folder`."""
    seen: set[str] = set()
    run = InterpretedFunction.run

    def recording(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        launch = {
            "module": self.fn.__module__,
            "kernel": self.fn.__name__,
            "arguments": [_class_of(x) for x in args],
            "constants": constants,
        }
        if launch["module"].startswith("reval_kernels."):  # a test may have kernels of its own
            seen.add(json.dumps(launch))
        return run(self, *args, grid=grid, warmup=warmup, **constants)

    def write() -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = "".join(f"{line}\n" for line in sorted(seen))
        Path(folder, f"{os.getpid()}.jsonl").write_text(text, encoding="utf-8")

    InterpretedFunction.run = recording
    atexit.register(write)


def _class_of(value: Any) -> Any:
    """One value for all values of an argument that Triton compiles alike."""
    if isinstance(value, TensorDescriptor):
        return {"descriptor": str(value.base.dtype).removeprefix("torch."), "block": list(value.block_shape)}
    if isinstance(value, Tensor):
        return {"pointer": str(value.dtype).removeprefix("torch."), "aligned": value.data_ptr() % 16 == 0}
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        wide = 0 if -(1 << 31) <= value < 1 << 31 else 1 << 40  # 32 or 64 bits
        return 1 if value == 1 else wide + (16 if value % 16 == 0 else 17)
    assert isinstance(value, float), value
    return 0.5
