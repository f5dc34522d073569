"""Two plots of a run: the times of each case over its limit; time and memory against tokens N and vocabulary V."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
from matplotlib import pyplot  # noqa: E402

from .ops import Shape  # noqa: E402
from .suite import LIMIT, Row  # noqa: E402
from .timing import summary  # noqa: E402


def save_bars(path: Path, rows: list[Row]) -> Path:
    """One panel for each case: each provider's median over the limit's, with quartiles, on a logarithmic axis."""
    panels: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if row.status == "timed" and not row.curve:
            panels[row.op, row.dtype, *row.shape.values()].append(row)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    size = (7 * columns, 3 * lines)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, members in zip(grid.flat, panels.values(), strict=False):
        limit = next((summary(r.seconds)["median"] for r in members if r.provider == LIMIT), None)
        shown = [(r, summary(r.seconds)) for r in members if r.provider != LIMIT]
        shown.sort(key=lambda pair: -pair[1]["median"])
        unit = limit or 1.0
        middle = [s["median"] / unit for _, s in shown]
        spread = [
            [m - s["q1"] / unit for m, (_, s) in zip(middle, shown, strict=True)],
            [s["q3"] / unit - m for m, (_, s) in zip(middle, shown, strict=True)],
        ]
        ours = ["tab:blue" if r.provider in ("cpu", "triton", "portable") else "tab:gray" for r, _ in shown]
        bar = axes.barh([f"{r.provider}" for r, _ in shown], middle, xerr=spread, color=ours)
        axes.bar_label(bar, [f" {s['median'] * 1e3:.3g} ms" for _, s in shown], fontsize=7)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.set_title(f"{members[0].op}, {members[0].dtype}, {Shape(**members[0].shape)}", fontsize=9)
        axes.set_xlabel("time over that of the limit" if limit else "seconds", fontsize=8)
        axes.tick_params(labelsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def save_curves(path: Path, rows: list[Row]) -> Path:
    """Time in the upper row, memory in the lower row; one column for each op, dtype and axis."""
    columns: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.status == "timed" and row.curve:
            columns[row.op, row.dtype, row.curve].append(row)
    size = (4.5 * len(columns), 7)
    figure, grid = pyplot.subplots(2, len(columns), figsize=size, squeeze=False, layout="constrained")
    for (op, dtype, axis), (above, below) in zip(columns, grid.T, strict=True):
        points: dict[str, list[tuple[int, Row]]] = defaultdict(list)
        for row in columns[op, dtype, axis]:
            x = row.shape["vocabulary"] if axis == "V" else row.shape["trajectories"] * row.shape["length"]
            points[row.provider].append((x, row))
        for provider, line in points.items():
            line.sort(key=lambda point: point[0])
            style = {"color": "black", "linestyle": "--"} if provider == LIMIT else {"marker": "o"}
            above.plot([x for x, _ in line], [summary(r.seconds)["median"] for _, r in line], label=provider, **style)
            known = [(x, r.memory / 2**20) for x, r in line if r.memory is not None and provider != LIMIT]
            if known:
                below.plot(*zip(*known, strict=True), label=provider, marker="o")
        above.set_title(f"{op}\n{dtype}", fontsize=9)
        above.set_ylabel("seconds")
        below.set_ylabel("MiB beyond inputs and outputs")
        below.set_yscale("symlog", linthresh=1)
        for axes in (above, below):
            axes.set_xscale("log", base=2)
            axes.set_xlabel({"N": "tokens N", "V": "vocabulary V"}[axis])
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize=7)
        above.set_yscale("log")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
