"""Estimators from several answers to one problem: pass@k, maj@k, best@k. They work on plain lists."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import comb
from typing import Any

from ..rewards import ROUNDING


def is_right(score: float | None) -> bool:
    """True if the score means that the problem is solved: 1 or more, up to rounding (0.9999999999999999 is 1). None
    (not scored) counts as not solved."""
    return score is not None and score >= 1 - ROUNDING


def pass_at_k(scores: Sequence[float | None], k: int) -> float:
    """Probability that k of the n answers, drawn without replacement, contain a right answer.

    It is 1 - C(n - c, k) / C(n, k), where c is the number of right answers: the unbiased estimator of arXiv 2107.03374,
    section 2.1. The binomials are exact, because Python's integers do not overflow. Raises ValueError unless
    1 <= k <= n.
    """
    n, right = len(scores), sum(is_right(s) for s in scores)
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of answers ({n}), but is {k}")
    return 1.0 - comb(n - right, k) / comb(n, k)


def majority(answers: Sequence[str | None], scores: Sequence[float | None]) -> float:
    """Score of the most common answer. If several answers are equally common: the mean of their scores.

    None is an answer that could not be extracted; it has no vote. Without any vote, the result is 0. If equal answers
    have different scores, the mean of these scores is used.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            votes[answer].append(score or 0.0)
    most = max(map(len, votes.values()), default=0)
    return mean([mean(own) for own in votes.values() if len(own) == most])


def best(values: Sequence[float], scores: Sequence[float | None]) -> float:
    """Score of the answer with the largest value. If several answers have this value: the mean of their scores."""
    largest = max(values, default=0.0)
    return mean([score or 0.0 for value, score in zip(values, scores, strict=True) if value == largest])


def over_blocks(estimator: Callable[..., float], k: int, *columns: Sequence[Any]) -> float:
    """The mean of `estimator` over disjoint blocks of k consecutive answers. A rest of fewer than k is not used.

    Example: 10 answers and k = 4 give two blocks, answers 0 to 3 and 4 to 7. The answers are independent draws, so each
    block gives an unbiased estimate, and the mean over blocks is unbiased too. Raises ValueError unless k is from 1 to
    the number of answers.
    """
    n = len(columns[0])
    if not 1 <= k <= n:
        raise ValueError(f"k must be from 1 to the number of answers ({n}), but is {k}")
    starts = range(0, n - k + 1, k)
    return mean([estimator(*(column[i : i + k] for column in columns)) for i in starts])


def mean(values: Sequence[float]) -> float:
    """The mean of `values`; 0 if there are none."""
    return sum(values) / max(len(values), 1)
