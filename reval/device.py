"""The device: the time of a call on it, what its driver says, and its rates: how fast it copies, reads and multiplies.

A rate is what torch's own copy, sum and matmul reach on large tensors. No kernel that reads, writes or multiplies the
same amount can be expected to be much faster. `reval env --rates` and the benchmarks measure rates here.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch

T = TypeVar("T")


class CpuClock:
    """Wall time of a call on the CPU. The call's result is freed after the clock has stopped."""

    def seconds(self, call: Callable[[], T]) -> tuple[float, T]:
        start = time.perf_counter()
        out = call()
        return time.perf_counter() - start, out


class CudaClock:
    """Time between two events on the GPU.

    Before the first event, a write of twice the L2 cache's size removes the inputs from the cache.
    """

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(2 * cache, dtype=torch.int8, device=device)

    def seconds(self, call: Callable[[], T]) -> tuple[float, T]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        out = call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, out


class CudaWallClock:
    """Wall time of a call on an idle GPU, until its result is there: the host's time and the GPU's."""

    def seconds(self, call: Callable[[], T]) -> tuple[float, T]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = call()
        torch.cuda.synchronize()
        return time.perf_counter() - start, out


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def wall_clock_for(device: torch.device) -> CpuClock | CudaWallClock:
    return CudaWallClock() if device.type == "cuda" else CpuClock()


class Rate(NamedTuple):
    """One rate of a device, from several timed calls."""

    name: str
    unit: str
    """GB/s or TFLOP/s: 10^9 bytes or 10^12 FLOPs per second."""
    work: float
    """GB or TFLOP of one call."""
    seconds: list[float]

    @property
    def median(self) -> float:
        return self.work / statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile of the rate."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return self.work / high, self.work / low

    def __str__(self) -> str:
        low, high = self.quartiles
        spread = f"{len(self.seconds)} runs, quartiles {_short(low)} to {_short(high)}"
        return f"{_short(self.median)} {self.unit} ({spread})"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def time_calls(name: str, unit: str, work: float, call: Callable[[], object], clock: CpuClock | CudaClock) -> Rate:
    """The rate of a call: two calls to warm up, then 11 timed calls, or 3 if one call takes more than 0.3 seconds."""
    first = min(clock.seconds(call)[0] for _ in range(2))
    return Rate(name, unit, work, [clock.seconds(call)[0] for _ in range(11 if first < 0.3 else 3)])


def rates(device: torch.device, gib: float | None = None, size: int | None = None) -> Iterator[Rate]:
    """Measure copy rate, read rate and matmul rate of a device, in a few seconds. One after another, as measured.

    Args:
        device: a CPU or a CUDA device. A GPU multiplies bf16, a CPU fp32.
        gib: memory of the copied tensor, in GiB. None: 2 on a GPU, but at most an eighth of its free memory; 0.5 on a
            CPU.
        size: number of rows and columns of the matrices. None: 8192 on a GPU, 2048 on a CPU.
    """
    gpu, clock = device.type == "cuda", clock_for(device)
    if gib is None:
        gib = min(2.0, torch.cuda.mem_get_info(device)[0] / 2**33) if gpu else 0.5
    x = torch.ones(int(gib * 2**28), device=device)
    y = torch.empty_like(x)
    yield time_calls("copy (read + write)", "GB/s", 2 * x.nbytes / 1e9, lambda: y.copy_(x), clock)
    yield time_calls("read", "GB/s", x.nbytes / 1e9, lambda: x.sum(), clock)
    size, dtype = size or (8192 if gpu else 2048), torch.bfloat16 if gpu else torch.float32
    # Random numbers: on matrices of zeros a GPU takes less power and runs at a higher clock.
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    name = f"matmul {size}^3 {'bf16' if gpu else 'fp32'}"
    yield time_calls(name, "TFLOP/s", 2 * size**3 / 1e12, lambda: torch.mm(a, b, out=out), clock)


def nvidia_smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi says of the first GPU, for example {"driver_version": "580.65.06"}. Without nvidia-smi: {}."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in done.stdout.split(",")), strict=False))
