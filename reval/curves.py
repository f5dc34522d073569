"""Curves of several runs on one x axis. Runs that differ only in their seed form one curve: mean, smallest, largest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .config import Config, ConfigError, load_config
from .config_io import show

AXES = {
    "rollouts": lambda config: config.trajectories_per_iteration,
    "updates": lambda config: config.replay.updates_per_iteration,
    "iterations": lambda config: 1,
}
"""For each x axis, the amount by which one iteration advances on it."""
NOT_THE_METHOD = ("tracking", "distributed", "run")
"""Sections that say where and how a run was executed. Two runs that differ only in these settings belong to the same
curve. Exception: run.iterations separates runs."""


class Curve(NamedTuple):
    """One metric of the runs with equal settings. Lists have one entry per point of `x`."""

    label: str
    metric: str
    runs: int
    x: list[int]
    mean: list[float]
    low: list[float]
    """Smallest value over the runs."""
    high: list[float]
    """Largest value over the runs."""


def curves(folders: Sequence[str | Path], metrics: Sequence[str], axis: str = "rollouts") -> list[Curve]:
    """Curves of `metrics` (names in metrics.jsonl) for each group of runs that differ only in their seed.

    The curve of a group has only the points that all runs of the group have, so it ends where the shortest run ends.
    The evaluation before training is the point at x = 0.

    Raises ConfigError if a folder holds no run, if a run does not have a metric, if `axis` is not in AXES, or if it is
    "rollouts" and a run generated none.
    """
    if axis not in AXES:
        raise ConfigError(f"axis must be one of {', '.join(AXES)}; got {axis!r}")
    runs = [Path(folder) for folder in folders]
    configs = [_config(run) for run in runs]
    if axis == "rollouts" and (
        offline := [run for run, config in zip(runs, configs, strict=True) if not config.generates]
    ):
        raise ConfigError(f"'{offline[0]}' generated no rollouts (rollout.engine=none); --axis updates fits such runs")
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(_labels(configs)):
        groups.setdefault(label, []).append(i)
    return [
        _curve(label, metric, [_points(runs[i], metric, AXES[axis](configs[i])) for i in members])
        for metric in metrics
        for label, members in groups.items()
    ]


def table(found: Sequence[Curve]) -> str:
    """One line per curve, with its last and its best point: mean (smallest to largest)."""
    width = max(len(curve.label) for curve in found)
    lines = []
    for curve in found:
        best = max(range(len(curve.x)), key=lambda i: curve.mean[i])
        points = (("last", len(curve.x) - 1), ("best", best))
        ends = [f"{name} {_numbers(curve, i)} at {curve.x[i]}" for name, i in points]
        lines.append(f"{curve.metric}  {curve.label:<{width}}  {curve.runs} runs  {'  '.join(ends)}")
    return "\n".join(lines)


def _numbers(curve: Curve, i: int) -> str:
    spread = f" ({curve.low[i]:.3f} to {curve.high[i]:.3f})" if curve.runs > 1 else ""
    return f"{curve.mean[i]:.3f}{spread}"


def _config(run: Path) -> Config:
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"'{run}' is not a run folder: it has no config.yaml")
    return load_config([path])


def _labels(configs: list[Config]) -> list[str]:
    """For each run, the settings in which the runs differ, without the sections NOT_THE_METHOD (seed, folder, ...)."""
    flat = [
        {f"{section}.{name}": show(value) for section, own in c.to_dict().items() for name, value in own.items()}
        for c in configs
    ]
    names = [n for n in flat[0] if n.partition(".")[0] not in NOT_THE_METHOD or n == "run.iterations"]
    varying = [name for name in names if len({settings[name] for settings in flat}) > 1]
    return [", ".join(f"{name}={settings[name]}" for name in varying) or "all runs" for settings in flat]


def _points(run: Path, metric: str, per_iteration: int) -> dict[int, float]:
    """{x: value of the metric}, for the iterations in which the run has this metric, sorted by x."""
    path = run / "metrics.jsonl"
    rows = _rows(path) if path.is_file() else []
    points = {row["iteration"] * per_iteration: float(row[metric]) for row in rows if metric in row}
    before = run / "evaluations" / "iteration-000000.jsonl"
    if metric.startswith("eval/") and before.is_file():
        from .evaluation.answers import Evaluation

        first = Evaluation.load(before).metrics()
        points |= {0: first[metric]} if metric in first else {}
    if not points:
        known = ", ".join(sorted({name for row in rows for name in row})) or "no iteration"
        raise ConfigError(f"'{path}' has no metric {metric!r}; it has {known}")
    return dict(sorted(points.items()))


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. The last line may be incomplete: the run still writes it, or was killed."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _curve(label: str, metric: str, runs: list[dict[int, float]]) -> Curve:
    x = [at for at in runs[0] if all(at in run for run in runs)]
    if not x:
        raise ConfigError(f"the runs with {label} have no point of {metric!r} in common")
    values = [[run[at] for run in runs] for at in x]
    mean = [sum(v) / len(v) for v in values]
    return Curve(label, metric, len(runs), x, mean, [min(v) for v in values], [max(v) for v in values])
