"""`reval compare A B`: the difference between two evaluations of the same problems, with a paired bootstrap interval.

It reads the files that evaluations save, and needs neither the model nor torch.
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
"""(benchmark, prompt, number among equal prompts of this benchmark: 0, 1, ...)."""
HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean scores `a` and `b` of A and B over the same problems, and a 95% interval [low, high] of B - A."""

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
        """The conclusion from the interval, in words."""
        if self.low > 0:
            return "B is better"
        if self.high < 0:
            return "A is better"
        return "no difference shown: the interval contains 0"


def compare(a: Path, b: Path, *, resamples: int = 10_000, seed: int = 0) -> str:
    """The text that `reval compare` prints.

    Args:
        a, b: each the folder of a run, the folder of a checkpoint, or a file of answers.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.

    Raises RunError if there is no file of answers, or if A and B answered different problems.
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
    """The file of answers for a path.

    If `path` is a file, it is the file of answers. If `path` is a folder, it is the file that `reval evaluate` saved in
    it, else the last evaluation during training.
    """
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
    """The mean score of each problem, in the order of the file. An answer without a score counts as 0."""
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
    """The difference for each set of problems. With several sets, a last entry is about the mean over the sets.

    Each resample draws problems with replacement within each set, and draws the same problems for A and B. So the
    difficulty of a problem, which is the same for A and B, cancels in B - A. The mean over sets gives each set the same
    weight, as the tables of the paper do.
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
    """Means of resampled `values`, [resamples]. Computed in blocks of 1000 resamples, because the indices of all
    resamples would take 8 bytes x problems x resamples."""
    n = len(values)
    parts = [min(1000, resamples - start) for start in range(0, resamples, 1000)]
    return np.concatenate([values[rng.integers(n, size=(count, n))].mean(1) for count in parts])


def _difference(name: str, problems: int, a: Any, b: Any, drawn: np.ndarray) -> Difference:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Difference(name, problems, float(a), float(b), float(low), float(high))
