"""Times taken in turns: the calls of each provider are spread evenly over the rounds, in an order that changes, so that
all see the same machine."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")
Call = Callable[[], object]


class CpuClock:
    """Wall time of a call on the CPU. Its result is freed after the clock has stopped."""

    def seconds(self, call: Callable[[], T]) -> tuple[float, T]:
        start = time.perf_counter()
        out = call()
        return time.perf_counter() - start, out


class CudaClock:
    """Time between two events on the GPU, with an L2 cache that holds nothing of the inputs."""

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


def clock_for(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def turns(first: dict[str, float], budget: float, least: int, most: int) -> dict[str, int]:
    """How often each is timed: `budget` seconds' worth, but at least `least` and at most `most` times.

    `first` holds the seconds of a first call of each.
    """
    return {name: max(least, min(most, int(budget / max(seconds, 1e-9)))) for name, seconds in first.items()}


def interleave(
    calls: dict[str, Call],
    turns: dict[str, int],
    clock: CpuClock | CudaClock,
    samples: dict[str, list[float]],
    prepare: dict[str, Call] | None = None,
    seed: int = 0,
) -> dict[str, Exception]:
    """Call each `turns[name]` times, spread evenly over the rounds, and append its seconds to `samples[name]`.

    `prepare` runs before a call and outside its time. Returns the exceptions of those that raised one, whose turns end
    with it. What was measured before Ctrl-C stays in `samples`.
    """
    order, failures = random.Random(seed), {}
    rounds = max(turns.values(), default=0)
    for r in range(rounds):
        due = [name for name, n in turns.items() if (r + 1) * n // rounds > r * n // rounds]
        order.shuffle(due)
        for name in [name for name in due if name not in failures]:
            try:
                if prepare and name in prepare:
                    prepare[name]()
                seconds, out = clock.seconds(calls[name])
            except Exception as failure:  # a peer may fail in any way at any time, and the others go on
                failures[name] = failure
                continue
            del out  # before the next one asks for memory
            samples[name].append(seconds)
    return failures


def summary(seconds: list[float]) -> dict[str, float | int]:
    """Median, quartiles and number of samples; of a single sample, itself thrice."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": middle, "q1": low, "q3": high, "runs": len(seconds)}
