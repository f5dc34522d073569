"""The bars: speed and memory targets of the CPU kernels. Each run measures them and prints whether they are met."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from .suite import LIMIT, Row

ROWS = {"tokens": 512, "vocabulary": 151_936}
HEADS = [{"tokens": 1024, "width": 576, "vocabulary": v} for v in (49_152, 151_936)]
DTYPES = ("float32", "bfloat16")
FORWARD, BOTH = "token_values forward", "token_values forward+backward"
LOSS = "linear_reval_loss forward+backward"
OURS = "cpu"
FASTEST_OF = (
    "torch eager",
    "torch.compile",
    "F.linear_cross_entropy",
    "F.linear_cross_entropy options",
    "cut-cross-entropy torch_compile",
)


@dataclass(frozen=True)
class Bar:
    """One target: one line of the table."""

    case: str
    against: str
    bar: str
    measured: str
    met: bool | None
    """None if this run did not measure the case."""

    @property
    def verdict(self) -> str:
        return {True: "met", False: "missed", None: "not measured"}[self.met]


def bars(rows: list[Row]) -> list[Bar]:
    """Every bar, from the rows of a run."""
    out = []
    for dtype, read, traffic, eager, compiled in (("float32", 1.5, 1.5, 7, 2), ("bfloat16", 2.5, 2.5, 12, 2)):
        out.append(_slower(rows, FORWARD, dtype, ROWS, LIMIT, read))
        out.append(_faster(rows, FORWARD, dtype, ROWS, "torch eager", eager))
        out.append(_faster(rows, FORWARD, dtype, ROWS, "torch.compile", compiled))
        eager, compiled = {"float32": (6, 5), "bfloat16": (30, 6)}[dtype]
        out.append(_slower(rows, BOTH, dtype, ROWS, LIMIT, traffic))
        out.append(_faster(rows, BOTH, dtype, ROWS, "torch eager", eager))
        out.append(_faster(rows, BOTH, dtype, ROWS, "torch.compile", compiled))
    for head in HEADS:
        for dtype in DTYPES:
            out.append(_slower(rows, LOSS, dtype, head, LIMIT, 1.2))
            out.append(_no_slower_than_the_fastest(rows, dtype, head))
            out.append(_memory(rows, dtype, head))
    return out


def _row(rows: list[Row], op: str, dtype: str, sizes: dict[str, int], provider: str) -> Row | None:
    for row in rows:
        here = row.shape | {"tokens": row.shape["trajectories"] * row.shape["length"]}
        if (row.op, row.dtype, row.provider, row.curve) == (op, dtype, provider, "") and sizes.items() <= here.items():
            return row
    return None


def _time(*where) -> float | None:
    row = _row(*where)
    return median(row.seconds) if row and row.seconds else None


def _name(op: str, dtype: str, sizes: dict[str, int]) -> str:
    return f"{op}, {dtype}, V = {sizes['vocabulary']:,}"


def _slower(rows, op, dtype, sizes, other, most) -> Bar:
    mine, theirs = (_time(rows, op, dtype, sizes, who) for who in (OURS, other))
    ratio = mine / theirs if mine and theirs else None
    return Bar(
        _name(op, dtype, sizes),
        other,
        f"at most {most}x its time",
        f"{ratio:.2f}x" if ratio else "",
        ratio <= most if ratio else None,
    )


def _faster(rows, op, dtype, sizes, other, least) -> Bar:
    mine, theirs = (_time(rows, op, dtype, sizes, who) for who in (OURS, other))
    ratio = theirs / mine if mine and theirs else None
    return Bar(
        _name(op, dtype, sizes),
        other,
        f"{least}x faster",
        f"{ratio:.1f}x" if ratio else "",
        ratio >= least if ratio else None,
    )


def _no_slower_than_the_fastest(rows, dtype, sizes) -> Bar:
    mine = _time(rows, LOSS, dtype, sizes, OURS)
    others = {who: t for who in FASTEST_OF if (t := _time(rows, LOSS, dtype, sizes, who))}
    fastest = min(others, key=others.__getitem__, default=None)
    absent = [who for who in FASTEST_OF if who not in others]
    against = f"the fastest of {len(others)}: {fastest}" if fastest else "the fastest of none"
    against += f" (not timed: {', '.join(absent)})" if absent else ""
    ratio = mine / others[fastest] if mine and fastest else None
    return Bar(
        _name(LOSS, dtype, sizes),
        against,
        "at most 1.05x its time",
        f"{ratio:.2f}x" if ratio else "",
        ratio <= 1.05 if ratio else None,
    )


def _memory(rows, dtype, sizes) -> Bar:
    mine, eager = (_row(rows, LOSS, dtype, sizes, who) for who in (OURS, "torch eager"))
    measured, met = "", None
    if mine and eager and mine.memory is not None and eager.memory:
        share = max(mine.memory, 0) / eager.memory
        measured, met = f"{share:.2%} ({mine.memory / 2**20:.1f} of {eager.memory / 2**20:.0f} MiB)", share <= 0.01
    against = "torch eager, memory beyond inputs and outputs"
    return Bar(_name(LOSS, dtype, sizes), against, "at most 1%", measured, met)
