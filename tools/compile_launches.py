"""Compile every distinct kernel launch of the tests for real GPU types, with the specialisation that Triton chooses.

    REVAL_RECORD_LAUNCHES=build/launches python -m pytest tests/reval_kernels/gpu    # records, in Triton's interpreter
    python tools/compile_launches.py build/launches [--target sm_90 ...] [--sample N]

Triton makes another program of a kernel for an integer that is 1 (a constant then), for a multiple of 16, for an
argument that is None, and for a pointer that is not aligned. The interpreter makes no such difference, so a kernel can
pass all tests there and not compile on a GPU. Example: `rows.to(tl.int64)` fails for one row, because the constant 1
has no method `to`.

All launches are compiled for the first target (with --first N: every N-th), and every N-th (--sample) for each of the
other targets.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Pointer:
    """Stands for a tensor: Triton asks an argument for its dtype and its address, and nothing else."""

    def __init__(self, dtype: str, aligned: bool):
        import torch

        self.dtype, self._address = getattr(torch, dtype), 0 if aligned else 1

    def data_ptr(self) -> int:
        return self._address

    @staticmethod
    def ptr_range() -> int:  # AMD's compiler asks whether 32-bit offsets are enough
        return 1 << 40


class Driver:
    """Stands for a GPU's driver: it has a target, and launches nothing."""

    def __init__(self, target: Any):
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def argument(value: Any) -> Any:
    """The argument of a recorded launch: {"pointer": dtype, "aligned": bool}, {"descriptor": dtype, "block": [rows,
    columns]}, or the number, flag or None itself."""
    if not isinstance(value, dict):
        return value
    if "pointer" in value:
        return Pointer(value["pointer"], value["aligned"])
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(Pointer(value["descriptor"], True), [1024, 1024], [1024, 1], value["block"])


def has_descriptor(launch: dict[str, Any]) -> bool:
    """Whether the launch reads by TMA, which only some targets have."""
    return any(isinstance(x, dict) and "descriptor" in x for x in launch["arguments"])


def compile_launch(launch: dict[str, Any], target: str) -> str | None:
    """Compile one launch in this process. Returns the error with its causes, or None."""
    import triton
    from triton.backends.compiler import GPUTarget

    from reval_kernels.aot import TARGETS

    gpu = TARGETS[target]
    triton.runtime.driver.set_active(Driver(GPUTarget(gpu.backend, gpu.arch, gpu.warp)))
    try:
        kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
        kernel.device_caches.clear()  # the caches belong to the target of an earlier call
        kernel.run(*map(argument, launch["arguments"]), grid=(1,), warmup=True, **launch["constants"])
    except Exception as error:  # the compiler raises many types
        return "\n  caused by ".join(f"{type(e).__name__}: {e}" for e in _chain(error))
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def read(folder: Path) -> list[dict[str, Any]]:
    """The distinct launches of all files in the folder, in a fixed order."""
    lines = {line for path in folder.glob("*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()}
    return [json.loads(line) for line in sorted(lines)]


def main() -> int:
    from reval_kernels.aot import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--sample", type=int, default=10)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("TRITON_INTERPRET=1 turns compilation off: unset it")
    launches = read(options.folder)
    if not launches:
        raise SystemExit(f"{options.folder} has no recorded launches")
    first, *others = options.target
    jobs = [(launch, first) for launch in launches[:: options.first]]
    jobs += [(launch, target) for i, target in enumerate(others) for launch in launches[i :: options.sample]]
    jobs = [(launch, target) for launch, target in jobs if TARGETS[target].tma or not has_descriptor(launch)]
    print(f"{len(launches)} distinct launches, {len(jobs)} to compile", flush=True)
    failures, start = 0, time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(compile_launch, *job): job for job in jobs}
        for done, future in enumerate(concurrent.futures.as_completed(waiting), 1):
            launch, target = waiting[future]
            error = future.result()
            if error is not None:
                failures += 1
                print(f"\n{target}: {json.dumps(launch)}\n  {error}", flush=True)
            elif done % 50 == 0 or done == len(jobs):
                seconds = time.monotonic() - start
                print(f"{done} of {len(jobs)}, {seconds:.0f} s, {seconds / done * (len(jobs) - done):.0f} s left")
    print(f"{failures} of {len(jobs)} did not compile" if failures else "all compiled")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
