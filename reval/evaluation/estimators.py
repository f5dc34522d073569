"""Numbers from several answers to one problem: pass@k, maj@k, best@k. Plain arithmetic on lists."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import comb
from typing import Any


def is_right(score: float | None) -> bool:
    """Whether a score counts as a solved problem: 1 or more. None, which could not be scored, does not."""
    return score is not None and score >= 1


def pass_at_k(scores: Sequence[float | None], k: int) -> float:
    """Chance that k of these n answers, drawn without replacement, hold a right one.

    1 - C(n - c, k) / C(n, k) with c right ones: the unbiased estimator of arXiv 2107.03374, section 2.1. Exact, since
    Python's integers are.
    """
    n, right = len(scores), sum(is_right(s) for s in scores)
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of answers ({n}), but is {k}")
    return 1.0 - comb(n - right, k) / comb(n, k)


def majority(answers: Sequence[str | None], scores: Sequence[float | None]) -> float:
    """Score of the commonest answer; where several are equally common, the mean of theirs.

    An answer that could not be extracted (None) has no vote; 0 where none could be. Equal answers that nevertheless
    have different scores count with their mean.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            votes[answer].append(score or 0.0)
    most = max(map(len, votes.values()), default=0)
    return mean([mean(own) for own in votes.values() if len(own) == most])


def best(values: Sequence[float], scores: Sequence[float | None]) -> float:
    """Score of the answer with the largest value; the mean where several have it."""
    largest = max(values, default=0.0)
    return mean([score or 0.0 for value, score in zip(values, scores, strict=True) if value == largest])


def over_blocks(estimator: Callable[..., float], k: int, *columns: Sequence[Any]) -> float:
    """`estimator` of k answers, averaged over the disjoint runs of k that the columns hold (a rest is left out).

    The answers are independent draws, so each block is an unbiased estimate, and so is their mean.
    """
    n = len(columns[0])
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of answers ({n}), but is {k}")
    starts = range(0, n - k + 1, k)
    return mean([estimator(*(column[i : i + k] for column in columns)) for i in starts])


def mean(values: Sequence[float]) -> float:
    """0 for none."""
    return sum(values) / max(len(values), 1)
