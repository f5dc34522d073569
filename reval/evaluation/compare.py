"""`reval compare A B`: the difference of two evaluations of the same problems, with a paired bootstrap interval.

Works on the files that evaluations save, without the model and without torch.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RunError

Key = tuple[str, str, int]
"""Benchmark, prompt, and which of several equal prompts."""
HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean scores of A and B over the same problems, and a 95% interval of B - A."""

    name: str
    problems: int
    a: float
    b: float
    low: float
    high: float

    def __str__(self) -> str:
        interval = f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        numbers = f"{100 * self.a:6.1f} {100 * self.b:6.1f} {100 * (self.b - self.a):+6.1f}  {interval}"
        return f"{self.name:<16} {self.problems:5d} {numbers}"

    def verdict(self) -> str:
        """What the interval says, in words."""
        if self.low > 0:
            return "B is better"
        if self.high < 0:
            return "A is better"
        return "no difference shown: the interval contains 0"


def compare(a: Path, b: Path, *, resamples: int = 10_000, seed: int = 0) -> str:
    """What `reval compare` prints. Each of `a` and `b` is a run's or a checkpoint's folder, or a file of answers.

    Raises RunError when there is no such file or the two answered different problems.
    """
    files = [find(path) for path in (a, b)]
    differences = paired(*(read(file) for file in files), resamples=resamples, seed=seed)
    head = f"{'':<16} {'n':>5} {'A':>6} {'B':>6} {'B - A':>6}  95% interval"
    return "\n".join(
        [
            f"A: {files[0]}",
            f"B: {files[1]}",
            head,
            *map(str, differences),
            f"{differences[-1].name}: {differences[-1].verdict()}.",
            f"Mean scores x 100; percentile intervals of a paired bootstrap over problems ({resamples} resamples, seed "
            f"{seed}).",
        ]
    )


def find(path: Path) -> Path:
    """The file of answers that a path stands for: itself; of a folder what `reval evaluate` saved there, else the
    last evaluation of the training."""
    if path.is_file():
        return path
    saved = [p for p in (path / "evaluation.jsonl", path / "checkpoint" / "evaluation.jsonl") if p.is_file()]
    saved += sorted(path.glob("evaluations/*.jsonl"), reverse=True)
    if not saved:
        raise RunError(
            f"'{path}' holds no evaluation: give a run's folder, a checkpoint's after `reval evaluate`, or a file such "
            "as RUN/evaluations/iteration-000010.jsonl"
        )
    return saved[0]


def read(path: Path) -> dict[Key, float]:
    """Each problem's mean score, in the file's order; an answer that could not be scored counts as 0."""
    seen: Counter[tuple[str, str]] = Counter()
    out: dict[Key, float] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row: dict[str, Any] = json.loads(line)
            scores = [s or 0.0 for s in row["scores"]]
            key = (row.get("benchmark") or HELD_OUT, json.dumps(row["prompt"], sort_keys=True))
            out[(*key, seen[key])] = sum(scores) / len(scores)
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise RunError(f"{path}, line {number}: not an answered problem: {error!r}") from error
        seen[key] += 1
    if not out:
        raise RunError(f"{path} holds no answers")
    return out


def paired(a: dict[Key, float], b: dict[Key, float], *, resamples: int, seed: int) -> list[Difference]:
    """The difference for each set of problems, and last, where there are several, of the mean over the sets.

    Problems are drawn with replacement within each set, the same ones for A and B, so that what is hard for both
    cancels. The mean over sets weighs each set the same, as the paper's tables do.
    """
    if a.keys() != b.keys():
        raise RunError(
            f"A and B must have answered the same problems, but {len(a.keys() - b.keys())} are only in A, "
            f"{len(b.keys() - a.keys())} only in B and {len(a.keys() & b.keys())} in both"
        )
    rng = np.random.default_rng(seed)
    rows, drawn = [], []
    for name in dict.fromkeys(key[0] for key in a):
        keys = [key for key in a if key[0] == name]
        x, y = (np.array([scores[key] for key in keys]) for scores in (a, b))
        means = _resampled_means(y - x, resamples, rng)
        drawn.append(means)
        rows.append(_difference(name, len(keys), x.mean(), y.mean(), means))
    if len(rows) > 1:
        x, y = (np.mean([getattr(row, side) for row in rows]) for side in "ab")
        rows.append(_difference("mean", len(a), x, y, np.mean(drawn, axis=0)))
    return rows


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """[resamples]; a few at a time, since all indices at once would take 8 bytes x problems x resamples."""
    n = len(values)
    parts = [min(1000, resamples - start) for start in range(0, resamples, 1000)]
    return np.concatenate([values[rng.integers(n, size=(count, n))].mean(1) for count in parts])


def _difference(name: str, problems: int, a: Any, b: Any, drawn: np.ndarray) -> Difference:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Difference(name, problems, float(a), float(b), float(low), float(high))
