"""The bars of a GPU: targets of its kernels, relative to the limits and the peers that were measured in the same run.

A row of a case is found by the case's name, so a rehearsal with tiny shapes evaluates the same bars.
"""

from __future__ import annotations

from statistics import median

from ..bars import Bar
from ..cases import BELLMAN, BOTH, FROZEN, GPU_SHAPES, HEADLINE, LINEAR, LINEAR_BOTH, LOSS, ROWS
from ..ops import Shape
from ..suite import LIMIT, Row

OURS = "triton"
GIB = 2**30
ROW_CASES = [
    ("rows", "bfloat16"),
    ("rows", "float16"),
    ("rows fp32", "float32"),
    *(("rows, small vocabulary", dtype) for dtype in ("bfloat16", "float16", "float32")),
]
SLOWER_THAN_MATMULS = [  # op, case, the bar
    (LOSS, "head 2048", 1.2),
    (LOSS, HEADLINE, 1.2),
    (LOSS, "head 4096, half the tokens", 1.2),
    (LOSS, "small head", 1.6),
    (FROZEN, "head 2048", 1.2),
    (LINEAR_BOTH, "head 2048", 1.2),
]


def bars(rows: list[Row]) -> list[Bar]:
    """Every bar, from the rows of a run."""
    found = Found(rows)
    out = []
    for name, dtype in ROW_CASES:
        out += [found.share(ROWS, name, dtype, 0.9), found.share_of_backward(name, dtype, 0.9)]
        out += [found.ratio(op, name, dtype, "quack", 1.0) for op in (ROWS, BOTH)]
    out.append(found.share(LINEAR, "head 2048", "bfloat16", 0.92))
    out += [found.ratio(op, name, "bfloat16", LIMIT, most) for op, name, most in SLOWER_THAN_MATMULS]
    out += [found.memory(op, name, 1.5) for op, name, _ in SLOWER_THAN_MATMULS]
    out += [found.milliseconds(LOSS, HEADLINE, 51), found.memory(LOSS, HEADLINE, 4)]
    out += [found.wall(op, "few rows", "bfloat16") for op in (ROWS, BOTH)]
    return [*out, found.wall(BELLMAN, "trajectories", "float32")]


class Found:
    """The rows of a run by case, op, dtype and provider, and bars made of them."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = {(r.case, r.op, r.dtype, r.provider): r for r in rows if not r.curve}

    def _seconds(self, name: str, op: str, dtype: str, provider: str, wall: bool = False) -> float | None:
        row = self.rows.get((name, op, dtype, provider))
        times = (row.wall if wall else row.seconds) if row and row.status == "timed" else []
        return median(times) if times else None

    def _title(self, name: str, op: str, dtype: str) -> str:
        row = next((r for key, r in self.rows.items() if key[:3] == (name, op, dtype)), None)
        return f"{op}, {dtype}, {Shape(**row.shape) if row else GPU_SHAPES[name][0]}"

    def _limit_name(self, name: str, op: str, dtype: str) -> str:
        row = self.rows.get((name, op, dtype, LIMIT))
        return row.computes if row else LIMIT

    def share(self, op: str, name: str, dtype: str, least: float) -> Bar:
        """The limit's time over ours."""
        mine, limit = (self._seconds(name, op, dtype, who) for who in (OURS, LIMIT))
        against = self._limit_name(name, op, dtype)
        return _share(self._title(name, op, dtype), against, limit / mine if mine and limit else None, least)

    def share_of_backward(self, name: str, dtype: str, least: float) -> Bar:
        """The same for the backward of rows alone: forward and backward, minus the forward; its limit is a copy."""
        mine, limit = (
            (both - forward)
            if (both := self._seconds(name, BOTH, dtype, who)) and (forward := self._seconds(name, ROWS, dtype, who))
            else None
            for who in (OURS, LIMIT)
        )
        share = limit / mine if mine and limit and mine > 0 else None
        return _share(self._title(name, BOTH, dtype), "backward alone: a copy of the logits", share, least)

    def ratio(self, op: str, name: str, dtype: str, other: str, most: float) -> Bar:
        mine, theirs = (self._seconds(name, op, dtype, who) for who in (OURS, other))
        against = self._limit_name(name, op, dtype) if other == LIMIT else other
        return _ratio(self._title(name, op, dtype), against, mine, theirs, most)

    def wall(self, op: str, name: str, dtype: str) -> Bar:
        mine, theirs = (self._seconds(name, op, dtype, who, wall=True) for who in (OURS, "torch eager"))
        return _ratio(self._title(name, op, dtype), "torch eager, wall time", mine, theirs, 1.0)

    def milliseconds(self, op: str, name: str, most: float) -> Bar:
        mine = self._seconds(name, op, "bfloat16", OURS)
        measured = f"{mine * 1e3:.1f} ms" if mine else ""
        title = self._title(name, op, "bfloat16")
        return Bar(title, "time", f"at most {most} ms", measured, mine * 1e3 <= most if mine else None)

    def memory(self, op: str, name: str, most: float) -> Bar:
        row = self.rows.get((name, op, "bfloat16", OURS))
        used = row.memory / GIB if row and row.memory is not None else None
        measured = "" if used is None else f"{used:.2f} GiB"
        met = None if used is None else used <= most
        title = self._title(name, op, "bfloat16")
        return Bar(title, "memory beyond inputs and outputs", f"at most {most} GiB", measured, met)


def _share(title: str, against: str, share: float | None, least: float) -> Bar:
    measured, met = ("", None) if share is None else (f"{share:.1%}", share >= least)
    return Bar(title, against, f"at least {least:.0%} of its speed", measured, met)


def _ratio(title: str, against: str, mine: float | None, theirs: float | None, most: float) -> Bar:
    ratio = mine / theirs if mine and theirs else None
    measured, met = ("", None) if ratio is None else (f"{ratio:.2f}x", ratio <= most)
    return Bar(title, against, f"at most {most}x its time", measured, met)
