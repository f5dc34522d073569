"""`reval compare A B`: the difference between two evaluations of the same problems, with a paired bootstrap interval.

It reads the files that evaluations save, and needs neither the model nor torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import RunError

Key = tuple[str, str, int]
"""(benchmark, prompt, number among equal prompts of this benchmark: 0, 1, ...)."""
Settings = dict[str, Any]
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


class Answers(NamedTuple):
    """What `compare` reads of a file of answers. Each dictionary is in the order of the file."""

    scores: dict[Key, float]
    """The mean score of each problem. An answer without a score counts as 0."""
    solutions: dict[Key, Any]
    """The right answer of each problem, from the data set; None if it has none."""
    settings: dict[Key, Settings]


def compare(a: Path, b: Path, *, resamples: int = 10_000, seed: int = 0, different_settings: bool = False) -> str:
    """The text that `reval compare` prints.

    Args:
        a, b: each the folder of a run, the folder of a checkpoint, or a file of answers.
        resamples: number of bootstrap resamples.
        seed: seed of the resampling.
        different_settings: also compare evaluations with different settings, for example two temperatures.

    Raises RunError if there is no file of answers, or several; or if A and B answered different problems, or answered
    them with different settings.
    """
    files = [find(path) for path in (a, b)]
    answers = [read(file) for file in files]
    if not different_settings:
        _check_settings(*answers)
    differences = paired(*(each.scores for each in answers), resamples=resamples, seed=seed)
    _check_solutions(*answers)
    head = f"{'':<16} {'n':>5} {'A':>6} {'B':>6} {'B - A':>6}  95% interval"
    return "\n".join(
        [
            *(f"{s}: {f} ({describe(r.settings.values())})" for s, f, r in zip("AB", files, answers, strict=True)),
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

    Raises RunError if there is no file, or if `reval evaluate` saved several.
    """
    if path.is_file():
        return path
    for folder in (path, path / "checkpoint"):
        saved = sorted(folder.glob("evaluation*.jsonl"))
        if len(saved) > 1:
            lines = (f"  {file} ({describe(read(file).settings.values())})" for file in saved)
            raise RunError("\n".join([f"'{path}' holds {len(saved)} evaluations; name one of the files:", *lines]))
        if saved:
            return saved[0]
    training = sorted(path.glob("evaluations/*.jsonl"))
    if not training:
        raise RunError(
            f"'{path}' holds no evaluation: give a run's folder, a checkpoint's after `reval evaluate`, or a file such "
            "as RUN/evaluations/iteration-000010.jsonl"
        )
    return training[-1]


def read(path: Path) -> Answers:
    """Read a file of answers. A file that was made by hand needs only `prompt` and `scores` for each problem."""
    seen: Counter[tuple[str, str]] = Counter()
    out = Answers({}, {}, {})
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row: dict[str, Any] = json.loads(line)
            scores = [s or 0.0 for s in row["scores"]]
            name = (row.get("benchmark") or HELD_OUT, json.dumps(row["prompt"], sort_keys=True))
            key = (*name, seen[name])
            out.scores[key] = sum(scores) / len(scores)
            out.solutions[key] = row.get("answer")
            out.settings[key] = {"samples": len(scores), **row.get("settings", {})}
        except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
            raise RunError(f"{path}, line {number}: not an answered problem: {error!r}") from error
        seen[name] += 1
    if not out.scores:
        raise RunError(f"{path} holds no answers")
    return out


def describe(settings: Iterable[Settings]) -> str:
    """The settings of several problems as text: `samples=4, temperature=1.0, max_new_tokens=14, reward=math or
    number`."""
    values: dict[str, list[str]] = {}
    for one in settings:
        for name, value in one.items():
            if str(value) not in values.setdefault(name, []):
                values[name].append(str(value))
    return ", ".join(f"{name}={' or '.join(found)}" for name, found in values.items())


def _check_settings(a: Answers, b: Answers) -> None:
    """Raise RunError if a problem was answered with different settings. A file that does not name a setting may have
    used any value of it."""
    found: dict[str, tuple[Any, Any]] = {}
    for x, y in ((x, b.settings[key]) for key, x in a.settings.items() if key in b.settings):
        found |= {n: (x.get(n, "unknown"), y.get(n, "unknown")) for n in {**x, **y} if x.get(n) != y.get(n)}
    if found:
        pairs = "; ".join(f"{name} {x} and {y}" for name, (x, y) in sorted(found.items()))
        raise RunError(
            f"A and B were evaluated with different settings: {pairs}. Evaluate both with the same settings, name "
            "other files (RUN/evaluations/iteration-000010.jsonl), or add --different-settings to compare these"
        )


def _check_solutions(a: Answers, b: Answers) -> None:
    """Raise RunError if a problem has one right answer in A and another in B: then the data was changed in between."""
    for key, x in a.solutions.items():
        y = b.solutions[key]
        if x != y and x is not None and y is not None:
            raise RunError(
                f"A and B must have the same right answers, but that of {key[1][:200]} is {x!r} in A and {y!r} in B"
            )


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
