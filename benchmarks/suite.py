"""Which cases are run, and how one is: check against float64, take times in turns, measure memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from . import memory
from .ops import OPS, Op, Shape, Tensors, error
from .providers import COMPUTES, FAMILIES, Provider, definition, providers
from .timing import clock_for, interleave, summary, turns

SLACK = 10.0
"""A provider's error may be this many times plain PyTorch's in the same dtype, plus one unit in the last place of its
coarsest output. Wide enough for another order of sums, and far below what a wrong formula does."""
LIMIT = "limit"
"""The name under which the limit of a case stands among its rows."""


@dataclass(frozen=True)
class Case:
    """An op at a shape in a dtype."""

    op: str
    shape: Shape
    dtype: torch.dtype
    curve: str = ""
    """The axis of the scaling curve that it is a point of: "N" or "V"; "" in the tables."""
    only: tuple[str, ...] = ()
    """The providers that are timed; none named: all."""
    memory: tuple[str, ...] = ()
    """The providers whose memory is measured however long it takes."""
    others: bool = True
    """Whether that of the others is measured too, of those whose calls do not try one's patience."""

    def __str__(self) -> str:
        return f"{self.op}, {str(self.dtype).removeprefix('torch.')}, {self.shape}"


@dataclass
class Row:
    """What is known about a provider in a case."""

    op: str
    dtype: str
    shape: dict[str, int]
    curve: str
    provider: str
    computes: str
    status: str = "not measured"
    """Either "timed" or why not: missing, wrong, failed, too slow, not timed, not measured (interrupted)."""
    reason: str = ""
    error: float | None = None
    """That of `ops.error`."""
    torch_error: float | None = None
    """Plain PyTorch's error at the same thing in the same dtype."""
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    """Bytes beyond inputs and outputs."""
    memory_reason: str = ""
    bytes: int = 0
    flops: int = 0

    def as_json(self) -> dict:
        return asdict(self) | (summary(self.seconds) if self.seconds else {})


@dataclass
class Settings:
    """How long things may take, in seconds."""

    device: torch.device
    budget: float = 3.0
    """For the calls of one provider in one case; a fifth of it at a point of a curve."""
    least: int = 5
    most: int = 25
    patience: float = 8.0
    """A call longer than this is timed once."""
    give_up: float = 30.0
    """A peer's call expected to be longer than this is not made."""
    memory: bool = True


@dataclass
class Runner:
    """A provider that was right, ready to be timed."""

    name: str
    call: Callable[[], object]
    first: float
    """Seconds of a call before the clock counts."""
    prepare: Callable[[], object] | None = None
    """What comes before every call, outside its time."""


class Suite:
    """Runs cases and collects their rows."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = print) -> None:
        self.settings, self.say = settings, say
        self.clock = clock_for(settings.device)
        self.rows: list[Row] = []
        self.took: dict[tuple[str, str, str], tuple[float, Case]] = {}
        """(op, dtype, provider) -> median and case, of those that were right and timed in this run."""

    def run(self, case: Case, chosen: Iterable[Provider] | None = None) -> list[Row]:
        """Time every provider of the case, or the chosen ones. Its rows are in `self.rows` even after Ctrl-C."""
        op = OPS[case.op]
        chosen = providers(op.family) if chosen is None else chosen
        chosen = [p for p in chosen if not case.curve or p.name in case.only]
        rows = {LIMIT: self._row(case, op, LIMIT, op.limit_name)}
        rows |= {p.name: self._row(case, op, p.name, COMPUTES[p.computes]) for p in chosen}
        self.rows += rows.values()

        able = [p for p in chosen if self._able(case, p, rows[p.name])]
        try:
            if able:
                self._run(case, op, able, rows)
        except Exception as failure:  # of the inputs, the truth or the limit: no memory, say. The next case may fit
            for row in rows.values():
                if row.status == "not measured":
                    row.status, row.reason = "failed", brief(failure)
            self.say(f"    failed: {brief(failure)}")
        return list(rows.values())

    def _run(self, case: Case, op: Op, able: list[Provider], rows: dict[str, Row]) -> None:
        if not case.curve:
            torch.compiler.reset()  # or earlier cases would use up what torch.compile keeps of a function
        x = op.inputs(case.shape, case.dtype, self.settings.device)
        runners = self._first_calls(case, op, able, x, rows)
        self._time([self._limit(op, x), *runners], rows, self.settings.budget / (5 if case.curve else 1))
        for row in [rows[r.name] for r in runners]:
            if row.status == "timed":
                self.took[case.op, row.dtype, row.provider] = (summary(row.seconds)["median"], case)

    def measure_memory(self, case: Case, rows: list[Row]) -> None:
        """Of every row that was timed; the limit's row gets what making the outputs alone shows, the method's error."""
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()  # the children need what this process keeps for later
        for row in [row for row in rows if row.status == "timed" and self.settings.memory]:
            name = memory.CONTROL if row.provider == LIMIT else row.provider
            try:
                if row.provider not in (*case.memory, LIMIT):
                    if not case.others:
                        raise memory.NotMeasured("left out")
                    if row.seconds[0] > self.settings.patience:
                        raise memory.NotMeasured(f"not measured: a call takes {row.seconds[0]:.0f} s")
                row.memory = memory.beyond_inputs_and_outputs(
                    case.op, name, case.shape, case.dtype, self.settings.device
                )
            except memory.NotMeasured as failure:
                row.memory_reason = str(failure)

    def _row(self, case: Case, op: Op, provider: str, computes: str) -> Row:
        return Row(
            op.name,
            str(case.dtype).removeprefix("torch."),
            case.shape._asdict(),
            case.curve,
            provider,
            computes,
            bytes=op.bytes(case.shape, case.dtype.itemsize),
            flops=op.flops(case.shape),
        )

    def _able(self, case: Case, provider: Provider, row: Row) -> bool:
        """Whether it can run here, peers in reasonable time; if not, its row says why."""
        known = self.took.get((case.op, row.dtype, provider.name))
        if reason := provider.missing(self.settings.device.type):
            row.status, row.reason = "missing", reason
        elif case.only and provider.name not in case.only:
            row.status, row.reason = "not timed", "left out of this larger case to save time"
        elif case.curve and known is None:
            row.status, row.reason = "not timed", "curves are drawn of providers that were timed in the table of the op"
        elif known and not case.curve and provider.computes != FAMILIES[provider.family]:
            seconds, before = known
            expected = seconds * row.flops / OPS[case.op].flops(before.shape)
            if expected > self.settings.give_up:
                row.status = "too slow"
                row.reason = f"{seconds:.1f} s at {before.shape}, so about {expected:.0f} s here"
        return row.status == "not measured"

    def _first_calls(self, case: Case, op: Op, able: list[Provider], x: Tensors, rows: dict[str, Row]) -> list[Runner]:
        """Call every provider once and compare with float64.

        Points of a curve were compared in their table, and peers in the table of a smaller shape: the truth takes long.
        """
        runners = []
        for computes in dict.fromkeys(p.computes for p in able):
            truth, yardstick, eager = None, 0.0, None
            peers = [p for p in able if p.computes == computes != FAMILIES[op.family]]
            known = peers and all((case.op, rows[p.name].dtype, p.name) in self.took for p in peers)
            if not case.curve and not known:
                right, plain = definition(op.family, computes)
                truth = op.truth(right, x)
                eager = self.clock.seconds(partial(op.run, plain, x))
                yardstick = error(eager[1], truth)
            for provider in [p for p in able if p.computes == computes]:
                row, made = rows[provider.name], eager if provider.name == "torch eager" else None
                try:
                    runner = self._first_call(op, provider, x, row, truth, yardstick, made)
                except Exception as failure:  # a peer may fail in any way, and the others go on
                    row.status, row.reason = "failed", brief(failure)
                else:
                    runners += [runner] if row.status != "wrong" else []
                self.say(f"    {provider.name}: {row.reason or f'{runner.first:.3g} s'}")
        return runners

    def _first_call(
        self,
        op: Op,
        provider: Provider,
        x: Tensors,
        row: Row,
        truth: Tensors | None,
        yardstick: float,
        made: tuple[float, Tensors] | None,
    ) -> Runner:
        """`made`: the seconds and the outputs of this call where the yardstick was it."""
        function, own, prepare = provider.load(), x, None
        if name := provider.overwrites:
            own = x | {name: x[name].clone()}
            prepare = partial(own[name].copy_, x[name])

        def call() -> Tensors:
            return op.run(function, own)

        seconds, out = made or self.clock.seconds(call)
        if truth is not None:
            judge(row, out, truth, yardstick)
        del out
        if row.status != "wrong" and (provider.compiled or seconds < 1):  # the first call compiled, or loaded something
            if prepare:
                prepare()
            seconds = min(seconds, self.clock.seconds(call)[0])
        return Runner(provider.name, call, seconds, prepare)

    def _limit(self, op: Op, x: Tensors) -> Runner:
        call = op.limit(x)
        seconds = self.clock.seconds(call)[0]
        if seconds < self.settings.patience:
            seconds = self.clock.seconds(call)[0]
        return Runner(LIMIT, call, seconds)

    def _time(self, runners: list[Runner], rows: dict[str, Row], budget: float) -> None:
        s = self.settings
        times = turns({r.name: r.first for r in runners}, budget, s.least, s.most)
        for r in runners:
            if r.first > s.patience:  # that call was the one
                rows[r.name].seconds.append(r.first)
                times[r.name] = 0
        try:
            failures = interleave(
                {r.name: r.call for r in runners},
                times,
                self.clock,
                {r.name: rows[r.name].seconds for r in runners},
                {r.name: r.prepare for r in runners if r.prepare},
            )
            for name, failure in failures.items():
                reason = f"after {len(rows[name].seconds)} timed calls: {brief(failure)}"
                rows[name].status, rows[name].reason = "failed", reason
                rows[name].seconds.clear()
        finally:  # after Ctrl-C too
            for row in rows.values():
                row.status = "timed" if row.seconds else row.status


def brief(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:300]


def judge(row: Row, out: Tensors, truth: Tensors, yardstick: float) -> None:
    """Mark the row as wrong if the error is more than `SLACK` allows."""
    coarsest = max(torch.finfo(t.dtype).eps for t in out.values())
    bound = SLACK * yardstick + coarsest
    row.error, row.torch_error = error(out, truth), yardstick
    if row.error > bound:
        row.status = "wrong"
        row.reason = f"off by {row.error:.2g}, allowed is {bound:.2g} (torch: {yardstick:.2g})"
