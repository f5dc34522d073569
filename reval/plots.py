"""Draws pictures: four panels about one run, and curves of several runs in the same panels.

No screen is needed: a Figure alone writes files, and only pyplot would open a window.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from .config import ConfigError
from .curves import Curve, curves


def save_curves(path: Path, rows: list[dict[str, float]], evaluations: list[tuple[int, float]]) -> None:
    """Draw four panels against the iteration: reward and held-out accuracy, residuals, the terms of the residual, and
    the length of completions.

    Args:
        path: the PNG file to write.
        rows: the objects of metrics.jsonl.
        evaluations: pairs (iteration, held-out accuracy).
    """
    x = [row["iteration"] for row in rows]
    fresh = any("reval/v_policy" in row for row in rows)  # not with rollout.engine=none
    prefix = "reval" if fresh else "reval/replay"
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    (reward, residual), (values, length) = figure.subplots(2, 2)
    panels = (
        (reward, "Reward of the fresh rollouts", {"reward": "mean score, training problems"}),
        (
            residual,
            "Bellman residual, mean |.|",
            {"reval/residual_abs": "fresh batch", "reval/replay/residual_abs": "replayed"},
        ),
        (
            values,
            "What the residual is made of",
            {
                f"{prefix}/v_policy": "V(s_1)",
                f"{prefix}/v_reference": "V_ref(s_1)",
                f"{prefix}/log_ratio": "sum log pi / pi_ref",
            },
        ),
        (length, "Completions", {"completions/mean_length": "mean length, tokens"}),
    )
    for axes, title, lines in panels:
        for key, label in lines.items():
            points = [(i, row[key]) for i, row in zip(x, rows, strict=True) if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("iteration", fontsize=8)
        axes.grid(alpha=0.3)
    if evaluations:
        reward.plot(*zip(*evaluations, strict=True), "ks--", markersize=5, label="held-out accuracy")
        reward.set_title("Reward and held-out accuracy", fontsize=10)
    reward.set_ylim(-0.03, None)
    for axes in (reward, residual, values, length):
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def compare_runs(
    path: str | Path,
    folders: Sequence[str | Path],
    metrics: Sequence[str] = ("eval/accuracy", "reward"),
    axis: str = "rollouts",
) -> list[Curve]:
    """Draw one panel per metric. Runs that differ only in their seed share a line, their mean, and a band from their
    smallest to their largest value.

    Returns the curves that were drawn; see `reval.curves.curves` for the arguments and errors. Raises ConfigError also
    if the file cannot be written, or if its ending names no kind of picture.
    """
    found = curves(folders, metrics, axis)
    figure = Figure(figsize=(5.5 * len(metrics), 4), layout="constrained")
    panels = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for curve in (c for c in found if c.metric == metric):
            runs = f" ({curve.runs} seeds)" if curve.runs > 1 else ""
            label = curve.label.replace("$", r"\$")  # otherwise matplotlib reads the text between two $ as a formula
            text = "\n".join(
                textwrap.wrap(label + runs, 36, break_long_words=False)
            )  # a longer line leaves the picture
            [line] = axes.plot(curve.x, curve.mean, marker=".", label=text)
            axes.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set_title(metric, fontsize=10)
        axes.set_xlabel(axis, fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an unknown ending
        raise ConfigError(f"'{path}' cannot be drawn: {error}") from error
    return found
