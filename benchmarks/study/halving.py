"""Successive halving: every trial gets one seed, the better half goes on with more of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from .studies import Trial

Run = Callable[[list[tuple[Trial, int]]], list[float]]
"""Runs pairs (trial, seed) and returns the score of each: larger is better."""


def survivors(trials: int, rungs: int) -> list[int]:
    """How many trials take part in each rung."""
    return [max(1, trials >> rung) for rung in range(rungs)]


def budget(trials: int, rungs: Sequence[int]) -> int:
    """Number of runs of one method: the same for all methods of a study."""
    new = [seeds - before for seeds, before in zip(rungs, (0, *rungs), strict=False)]
    return sum(alive * more for alive, more in zip(survivors(trials, len(rungs)), new, strict=True))


def search(
    trials: Mapping[str, Sequence[Trial]], rungs: Sequence[int], run: Run
) -> tuple[dict[str, Trial], dict[Trial, list[float]]]:
    """The best trial of each method, and the scores of every trial, by seed: 0, 1, ...

    The methods share each rung, so that all worker processes have work.

    Args:
        trials: those of each method. All methods have equally many.
        rungs: for each rung, how many seeds a trial has had after it.

    Raises ValueError if the methods have different numbers of trials.
    """
    if len({len(own) for own in trials.values()}) > 1:
        counts = ", ".join(f"{name} {len(own)}" for name, own in trials.items())
        raise ValueError(f"every method must have the same number of trials; got {counts}")
    scores: dict[Trial, list[float]] = {trial: [] for own in trials.values() for trial in own}
    alive = {name: list(own) for name, own in trials.items()}
    count = len(next(iter(trials.values())))
    for seeds, going_on in zip(rungs, [*survivors(count, len(rungs))[1:], 1], strict=False):
        wanted = [(t, s) for own in alive.values() for t in own for s in range(len(scores[t]), seeds)]
        for (trial, _), score in zip(wanted, run(wanted), strict=True):
            scores[trial].append(score)
        for name, own in alive.items():
            alive[name] = sorted(own, key=lambda trial: -mean(scores[trial]))[:going_on]  # equal scores: the earlier
    return {name: own[0] for name, own in alive.items()}, scores
