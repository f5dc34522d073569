"""What a study found: evidence.json, a table and a picture."""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .curves import AXES, Point, area, first_at

EVIDENCE = "evidence.json"
RESULTS = Path(__file__).parents[1] / "results"
PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"


def summary(values: Sequence[float | None]) -> dict[str, Any]:
    """Median and range over the seeds. None stands for never, and is larger than every number."""
    numbers = sorted(float("inf") if value is None else value for value in values)

    def shown(value: float) -> float | None:
        return None if value == float("inf") else round(value, 4)

    return {"median": shown(median(numbers)), "low": shown(numbers[0]), "high": shown(numbers[-1])} | {
        "each": [None if value is None else round(value, 4) for value in values]
    }


def findings(runs: Sequence[list[Point]], levels: Sequence[float]) -> dict[str, Any]:
    """What one method needed to reach the levels, and where it ended.

    Args:
        runs: one per seed. A run that failed has no points: it never reached anything, and its accuracy counts as 0.
    """
    reached = {
        str(level): {
            axis: summary([None if at is None else getattr(at, axis) for at in (first_at(run, level) for run in runs)])
            for axis in AXES
        }
        for level in levels
    }
    return {
        "to reach": reached,
        "final accuracy": summary([run[-1].accuracy if run else 0.0 for run in runs]),
        "area": summary([area(run) for run in runs]),
        "seconds": summary([run[-1].seconds if run else None for run in runs]),
        "failed": sum(not run for run in runs),
    }


def merge(path: Path, name: str, found: Mapping[str, Any]) -> None:
    """Replace the entry of one study in evidence.json. The entries of the others stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another study may end at this moment
        known = json.loads(path.read_text()) if path.exists() else {}
        known[name] = found
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
        unfinished.replace(path)


def table(found: Mapping[str, Any]) -> list[str]:
    """The Markdown table of a study: a row per method, median (range) over the seeds."""
    methods = found["methods"]
    levels = [level for own in list(methods.values())[:1] for level in own["to reach"]]
    head = ["method", "settings", *(f"rollouts to {level}" for level in levels), "final accuracy", "area", "seconds"]
    rows = [head, ["---"] * len(head)]
    for name, own in methods.items():
        cells = [own["to reach"][level]["rollouts"] for level in levels]
        cells += [own["final accuracy"], own["area"], own["seconds"]]
        settings = (setting.partition(".")[2].replace("=", " ") for setting in own["settings"])
        rows.append([name, ", ".join(settings), *map(_shown, cells)])
    return [f"| {' | '.join(row)} |" for row in rows]


def fill(page: Path, evidence: Path) -> None:
    """Put the table of every study into the page, between the lines `<!-- study NAME -->` and `<!-- end -->`."""
    known = json.loads(evidence.read_text())

    def tabled(match: re.Match[str]) -> str:
        found = known.get(match["name"])
        return match[0] if found is None else "\n".join([match["first"], *table(found), "<!-- end -->"])

    old = page.read_text()
    new = re.sub(r"(?P<first><!-- study (?P<name>[\w-]+) -->)\n.*?<!-- end -->", tabled, old, flags=re.DOTALL)
    if new != old:
        page.write_text(new)


def _shown(cell: Mapping[str, Any]) -> str:
    middle, low, high = (_number(cell[key]) for key in ("median", "low", "high"))
    return middle if low == high else f"{middle} ({low} to {high})"


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f}" if abs(value) < 2 else f"{value:.0f}"


def draw(path: Path, title: str, what: str, runs: Mapping[str, Sequence[list[Point]]]) -> None:
    """One panel per axis; for each method the median, and a band from the smallest to the largest accuracy.

    Args:
        what: the metric that is the accuracy.
        runs: by method, one per seed. Runs that failed are not drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(AXES), sharey=True), AXES, strict=True):
        for name, seeds in runs.items():
            whole = [run for run in seeds if run]
            together = list(zip(*whole, strict=False))  # the k-th evaluations of all seeds
            x = [median(getattr(point, axis) for point in points) for points in together]
            y = [[point.accuracy for point in points] for points in together]
            [line] = axes.plot(x, [median(values) for values in y], marker=".", label=f"{name}, {len(whole)} seeds")
            low, high = [min(values) for values in y], [max(values) for values in y]
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_xlabel(axis, fontsize=8)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(what, fontsize=8)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
