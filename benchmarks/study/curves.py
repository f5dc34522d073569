"""The curve of one run: accuracy against rollouts, generated tokens and seconds."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from reval.evaluation.answers import Evaluation

AXES = ("rollouts", "tokens", "seconds")


class Point(NamedTuple):
    """One evaluation."""

    rollouts: int
    """Number of responses that training generated before it."""
    tokens: int
    """Number of tokens of these responses."""
    seconds: float
    """Seconds of training before it. They contain generation and updates, not evaluations, loading or saving."""
    accuracy: float


def read(folder: Path, metric: str, per_iteration: int) -> list[Point]:
    """The points of a run, with the one before training.

    Args:
        metric: the accuracy, by its name in metrics.jsonl. One that is not of an evaluation, such as `reward`, is of
            the fresh responses, and so of the policy before the iteration.
        per_iteration: number of rollouts of an iteration.
    """
    points, tokens, seconds = [], 0, 0.0
    before, fresh = folder / "evaluations" / "iteration-000000.jsonl", not metric.startswith("eval/")
    if not fresh and before.exists():
        points.append(Point(0, 0, 0.0, Evaluation.load(before).metrics()[metric]))
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if fresh and metric in row:
            points.append(Point((row["iteration"] - 1) * per_iteration, tokens, seconds, row[metric]))
        tokens, seconds = row.get("num_tokens", 0), seconds + row["step_time"]  # num_tokens counts from the start
        if not fresh and metric in row:
            points.append(Point(row["iteration"] * per_iteration, tokens, seconds, row[metric]))
    return points


def area(points: list[Point]) -> float:
    """The area under the curve: the mean accuracy of the evaluations, without the one before training. 0 for a run
    that failed and has no points."""
    after = [point.accuracy for point in points if point.seconds]
    return mean(after) if after else 0.0


def first_at(points: list[Point], level: float) -> Point | None:
    """The first evaluation with at least this accuracy. None if there is none."""
    return next((point for point in points if point.accuracy >= level), None)
