"""Times taken in turns: each provider's calls are spread evenly over the rounds, and the order changes every round.

So every provider meets the same state of the machine.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable

from reval.device import CpuClock, CudaClock, CudaWallClock

Call = Callable[[], object]


def turns(first: dict[str, float], budget: float, least: int, most: int) -> dict[str, int]:
    """The number of timed calls for each name: as many as fit in `budget` seconds, but from `least` to `most`.

    `first` holds the seconds of the first call for each name. Example: with budget 5, least 3 and most 25, a call of
    0.5 s gets 10 turns and a call of 9 s gets 3.
    """
    return {name: max(least, min(most, int(budget / max(seconds, 1e-9)))) for name, seconds in first.items()}


def interleave(
    calls: dict[str, Call],
    turns: dict[str, int],
    clock: CpuClock | CudaClock | CudaWallClock,
    samples: dict[str, list[float]],
    prepare: dict[str, Call] | None = None,
    seed: int = 0,
) -> dict[str, Exception]:
    """Call each function `turns[name]` times, spread evenly over the rounds; append the seconds to `samples[name]`.

    `prepare[name]` runs before each call of `name`, outside the timed part. A call that raises ends the turns of its
    name. Returns these exceptions by name. After Ctrl-C, `samples` keeps the measurements made so far.
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
            except Exception as failure:  # a peer may raise any exception; the other providers continue
                failures[name] = failure
                continue
            del out  # free the result before the next call allocates
            samples[name].append(seconds)
    return failures


def summary(seconds: list[float]) -> dict[str, float | int]:
    """Median, quartiles and number of samples. A single sample is its own median and quartiles."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": middle, "q1": low, "q3": high, "runs": len(seconds)}
