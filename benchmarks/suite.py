"""How a case runs: check every provider against float64, take times in turns, measure memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial

import torch

from reval.device import CpuClock, CudaClock, clock_for, wall_clock_for

from . import memory
from .ops import OPS, Function, Op, Shape, Tensors, error
from .providers import COMPUTES, FAMILIES, Provider, Rounding, definition, precisions, providers
from .timing import interleave, summary, turns

SLACK = 10.0
"""Factor of the error bound: SLACK times plain PyTorch's error in the same dtype, plus one unit in the last place of
the coarsest output. Another order of summation stays within the bound; a wrong formula is far above it."""
LIMIT = "limit"
"""The provider name of a case's limit in the rows."""


@dataclass(frozen=True)
class Case:
    """An op at a shape in a dtype."""

    op: str
    shape: Shape
    dtype: torch.dtype
    curve: str = ""
    """The axis of a scaling curve if the case is a point of one: "N" (tokens) or "V" (vocabulary). "" for a table."""
    only: tuple[str, ...] = ()
    """The providers to time. Empty: all providers."""
    memory: tuple[str, ...] = ()
    """The providers whose memory is always measured."""
    others: bool = True
    """Whether to measure the memory of the other providers too, if a call takes at most `Settings.patience` seconds."""
    name: str = ""
    """The name by which the bars of a GPU find the case's rows."""
    check: int = 0
    """The number of trajectories on which outputs are compared with float64. 0: on all, which are also timed."""
    wall: bool = False
    """Whether to measure wall times too: on a GPU the time of a small case is the host's."""
    precision: bool = False
    """Whether to compare precisions of fp32 operands (`providers.precisions`) instead of libraries."""

    def __str__(self) -> str:
        return f"{self.op}, {str(self.dtype).removeprefix('torch.')}, {self.shape}"


@dataclass
class Row:
    """The results of one provider in one case."""

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
    """`ops.error` of the provider's first call."""
    torch_error: float | None = None
    """`ops.error` of plain PyTorch for the same outputs in the same dtype."""
    seconds: list[float] = field(default_factory=list)
    memory: int | None = None
    """Bytes beyond inputs and outputs."""
    memory_reason: str = ""
    bytes: int = 0
    flops: int = 0
    case: str = ""
    """`Case.name`."""
    wall: list[float] = field(default_factory=list)
    """Wall times in seconds, where the case asks for them."""

    def as_json(self) -> dict:
        return asdict(self) | (summary(self.seconds) if self.seconds else {})


@dataclass
class Settings:
    """The device and the limits on time. Times are in seconds."""

    device: torch.device
    budget: float = 3.0
    """For all calls of one provider in one case. A point of a curve gets a fifth of the budget."""
    least: int = 5
    """The smallest number of timed calls."""
    most: int = 25
    """The largest number of timed calls."""
    patience: float = 8.0
    """A call longer than this is timed once."""
    give_up: float = 30.0
    """A peer's call is not made if it is expected to take longer than this."""
    memory: bool = True
    """Whether to measure memory."""


@dataclass
class Runner:
    """A provider with correct results, ready to be timed."""

    name: str
    call: Callable[[], object]
    first: float
    """Seconds of a call made before the timed calls."""
    prepare: Callable[[], object] | None = None
    """Runs before every call, outside the timed part."""


class Suite:
    """Runs cases and collects their rows."""

    def __init__(self, settings: Settings, say: Callable[[str], None] = print) -> None:
        self.settings, self.say = settings, say
        self.clock = clock_for(settings.device)
        self.rows: list[Row] = []
        self.took: dict[tuple[str, str, str], tuple[float, Case]] = {}
        """(op, dtype, provider) -> median seconds and case, for every provider timed in this run."""

    def run(self, case: Case, chosen: Iterable[Provider] | None = None) -> list[Row]:
        """Time every provider of the case, or the chosen providers. After Ctrl-C too, the rows are in `self.rows`."""
        op = OPS[case.op]
        if chosen is None:
            chosen = precisions(op.family) if case.precision else providers(op.family)
        chosen = [p for p in chosen if not case.curve or p.name in case.only]
        rows = {LIMIT: self._row(case, op, LIMIT, op.limit_name)}
        rows |= {p.name: self._row(case, op, p.name, COMPUTES[p.computes] + p.note) for p in chosen}
        self.rows += rows.values()

        able = [p for p in chosen if self._able(case, p, rows[p.name])]
        try:
            if able:
                self._run(case, op, able, rows)
        except Exception as failure:  # inputs, truth or limit failed, for example for memory; the next case may fit
            for row in rows.values():
                if row.status == "not measured":
                    row.status, row.reason = "failed", brief(failure)
            self.say(f"    failed: {brief(failure)}")
        return list(rows.values())

    def _run(self, case: Case, op: Op, able: list[Provider], rows: dict[str, Row]) -> None:
        if not case.curve:
            if self.settings.device.type == "cuda":
                torch.cuda.empty_cache()  # pieces that the last case left do not fit this one
            torch.compiler.reset()  # earlier cases count against torch.compile's limit of versions of a function
        x = op.inputs(case.shape, case.dtype, self.settings.device)
        checked = x
        if case.check:
            checked = op.inputs(case.shape._replace(trajectories=case.check), case.dtype, self.settings.device)
        runners = self._first_calls(case, op, able, x, checked, rows)
        del checked
        runners = [self._limit(op, x), *runners]
        self._time(runners, rows, self.settings.budget / (5 if case.curve else 1))
        if case.wall:
            self._wall([r for r in runners if rows[r.name].status == "timed"], rows)
        for row in [rows[r.name] for r in runners if r.name != LIMIT]:
            if row.status == "timed":
                self.took[case.op, row.dtype, row.provider] = (summary(row.seconds)["median"], case)

    def measure_memory(self, case: Case, rows: list[Row]) -> None:
        """Measure the memory of every timed row on a CPU. On a GPU, `run` has measured it.

        The limit's row gets the result of the control child, which only makes the outputs: the error of the method.
        """
        if self.settings.device.type == "cuda":
            return
        for row in [row for row in rows if row.status == "timed" and self.settings.memory]:
            name = memory.CONTROL if row.provider == LIMIT else row.provider
            try:
                if row.provider not in (*case.memory, LIMIT):
                    if not case.others:
                        raise memory.NotMeasured("left out")
                    if row.seconds[0] > self.settings.patience:
                        raise memory.NotMeasured(f"not measured: a call takes {row.seconds[0]:.0f} s")
                row.memory = memory.beyond_inputs_and_outputs(case.op, name, case.shape, case.dtype)
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
            case=case.name,
        )

    def _able(self, case: Case, provider: Provider, row: Row) -> bool:
        """Whether to run the provider in this case. If not, its row gets the reason.

        A peer must be expected to finish a call within `Settings.give_up`; our providers always run.
        """
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

    def _first_calls(
        self, case: Case, op: Op, able: list[Provider], x: Tensors, checked: Tensors, rows: dict[str, Row]
    ) -> list[Runner]:
        """Call every provider once and compare its outputs for the inputs `checked` with float64.

        The truth takes long, so two comparisons are skipped: a point of a curve (the table of the op has compared the
        provider), and peers that were all timed in this run at another shape. `Case.check` makes the truth short.
        """
        runners = []
        for computes in dict.fromkeys(p.computes for p in able):
            group = [p for p in able if p.computes == computes]
            peers = computes != FAMILIES[op.family]
            check = None  # frees the last group's truth
            known = not case.check and peers and all((case.op, rows[p.name].dtype, p.name) in self.took for p in group)
            if not (case.curve or known):
                check = Check(op, computes, checked, self.clock)
            for provider in group:
                row = rows[provider.name]
                try:
                    runner = self._first_call(op, provider, x, row, check)
                except Exception as failure:  # a peer may raise any exception; the other providers continue
                    row.status, row.reason = "failed", brief(failure)
                else:
                    runners += [runner] if runner else []
                self.say(f"    {provider.name}: {row.reason or f'{runners[-1].first:.3g} s'}")
        return runners

    def _first_call(self, op: Op, provider: Provider, x: Tensors, row: Row, check: Check | None) -> Runner | None:
        """Judge the outputs, and time the first call on x, or another call if the first was not representative.

        Returns None if the outputs are wrong.
        """
        function = provider.load()
        call, prepare = self._call_of(op, provider, function, x)
        if check and check.inputs is not x:
            check.judge(row, self._call_of(op, provider, function, check.inputs)[0](), provider)
            if row.status == "wrong":
                return None
            check = None
        if check and provider.name == "torch eager":
            seconds, out = check.eager  # the yardstick has made the call already
        else:
            seconds, out = self.clock.seconds(call)
        if check:
            check.judge(row, out, provider)
            if row.status == "wrong":
                return None
        del out
        if provider.compiled or seconds < 1:  # the first call compiled or loaded code
            if prepare:
                prepare()
            seconds = min(seconds, self.clock.seconds(call)[0])
        if self.settings.device.type == "cuda" and self.settings.memory:
            if prepare:
                prepare()
            row.memory = memory.beyond_on_gpu(call, self.settings.device)
        return Runner(provider.name, call, seconds, prepare)

    @staticmethod
    def _call_of(
        op: Op, provider: Provider, function: Function, x: Tensors
    ) -> tuple[Callable[[], Tensors], Callable[[], object] | None]:
        """The provider's call on x, and what restores the inputs before each call (None if nothing is to restore)."""
        own, prepare = x, None
        if name := provider.overwrites:
            own = x | {name: x[name].clone()}
            prepare = partial(own[name].copy_, x[name])
        return partial(op.run, function, own), prepare

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
            if r.first > s.patience:  # a slow call is not repeated
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
        finally:  # also after Ctrl-C
            for row in rows.values():
                row.status = "timed" if row.seconds else row.status

    def _wall(self, runners: list[Runner], rows: dict[str, Row]) -> None:
        walls = {r.name: rows[r.name].wall for r in runners}
        prepare = {r.name: r.prepare for r in runners if r.prepare}
        times = dict.fromkeys(walls, self.settings.most)
        for name in interleave(
            {r.name: r.call for r in runners}, times, wall_clock_for(self.settings.device), walls, prepare
        ):
            walls[name].clear()  # it failed


class Check:
    """The true outputs for some inputs, and plain PyTorch's error, to judge a provider's outputs by."""

    def __init__(self, op: Op, computes: str, inputs: Tensors, clock: CpuClock | CudaClock) -> None:
        right, self.plain = definition(op.family, computes)
        self.op, self.inputs = op, inputs
        self.truth = op.truth(right, inputs)
        self.eager = clock.seconds(partial(op.run, self.plain, inputs))
        """Seconds and outputs of plain PyTorch."""
        self.yardsticks: dict[Rounding | None, float] = {None: error(self.eager[1], self.truth)}
        """Plain PyTorch's error by the rounding of the operands, `Provider.rounds`."""

    def judge(self, row: Row, out: Tensors, provider: Provider) -> None:
        rounds = provider.rounds
        if rounds and rounds not in self.yardsticks:
            rounded = {k: rounds(t) if k in ("hidden", "weight") else t for k, t in self.inputs.items()}
            self.yardsticks[rounds] = error(self.op.run(self.plain, rounded), self.truth)
        judge(row, out, self.truth, self.yardsticks[rounds])


def brief(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:300]


def judge(row: Row, out: Tensors, truth: Tensors, yardstick: float) -> None:
    """Record the errors in the row, and mark the row as wrong if the error exceeds the bound that SLACK describes."""
    coarsest = max(torch.finfo(t.dtype).eps for t in out.values())
    bound = SLACK * yardstick + coarsest
    row.error, row.torch_error = error(out, truth), yardstick
    if row.error > bound:
        row.status = "wrong"
        row.reason = f"off by {row.error:.2g}, allowed is {bound:.2g} (torch: {yardstick:.2g})"
