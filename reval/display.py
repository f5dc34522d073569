"""Progress of a run on the terminal: a live table and a progress bar, or one plain line per iteration.

What the run waits for stands below the progress bar. The plain display prints it when nothing else was printed for
QUIET seconds, from a thread of its own, because the code that takes long does not return meanwhile.

Printing never raises (output.py), so it cannot end a run.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .config import Config
from .data import Prompt
from .evaluation.answers import Evaluation
from .evaluation.compare import describe
from .evaluation.estimators import is_right
from .output import lenient
from .rewards import ROUNDING
from .waiting import Waiting, duration

QUIET = 30.0
TICK = 1.0  # seconds between two checks whether to print what the run waits for
SHOWN = {
    "reward": "reward {:.2f}",
    "reval/residual_abs": "residual {:.2f}",
    "completions/mean_length": "{:.0f} tokens long",
    "rollout/tokens_per_second": "{:.0f} tokens/s",
}
OFFLINE = {"reval/replay/residual_abs": "residual {:.2f}", "replay/loss": "loss {:.3g}"}
"""What is shown of an iteration that generates nothing (rollout.engine=none)."""


class Display:
    """Progress of a run: rich on a terminal, plain elsewhere (run.display).

    Args:
        config: settings of the run.
        iteration: last finished iteration of the checkpoint that the run resumes; 0 for a new run.
        quiet: True shows nothing. With several processes, only one of them is not quiet.
    """

    def __init__(self, config: Config, iteration: int = 0, quiet: bool = False):
        self._config, self._first, self._done = config, iteration, iteration
        self.waiting = Waiting()
        """What the run waits for. The display shows it."""
        stdout = lenient(sys.stdout)
        rich = not quiet and (config.run.display == "rich" or (config.run.display == "auto" and stdout.isatty()))
        self._console = Console(
            file=stdout, soft_wrap=True, no_color=None if rich else True, highlight=rich, quiet=quiet
        )
        self._started = self._printed = time.perf_counter()
        self._closing = threading.Event()
        self._thread = None if rich or quiet else threading.Thread(target=self._watch, daemon=True)
        self._progress = None
        if rich:
            self._progress = _Bar(
                self.waiting,
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("iterations"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                speed_estimate_period=math.inf,  # rich's default of 30 s may be shorter than one iteration
            )
            self._task = self._progress.add_task("ReVal", total=config.run.iterations, completed=iteration)

    def __enter__(self) -> Display:
        rollout, replay, run = self._config.rollout, self._config.replay, self._config.run
        batches = (
            f"{rollout.prompts} prompts x {rollout.responses} responses, {replay.updates_per_iteration} updates each"
        )
        if not self._config.generates:
            batches = (
                f"{replay.updates_per_iteration} updates on {replay.batch_size} logged rollouts of {replay.preload}"
            )
        self.note(
            f"{self._config.model.name}: {run.iterations} iterations of {batches}; results in {run.dir} "
            "(settings: config.yaml there)" + (f"; resumed after iteration {self._first}" if self._first else "")
        )
        if self._progress is not None:
            self._progress.start()
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._closing.wait(TICK):
            self._tick()

    def _tick(self) -> None:
        """Print what the run waits for, if nothing was printed for QUIET seconds."""
        text = self.waiting.text()
        if text and time.perf_counter() - self._printed >= QUIET:
            self.note(f"  {text}")

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Show the text `what`, and the rollout engine's reports, while the code of the block runs."""
        start = time.perf_counter()
        if self._progress is None:
            self.note(what)
        with self.waiting(what, asks_engine=True):
            yield
        if self._progress is None:
            self.note(f"  done in {duration(time.perf_counter() - start)}")
        if self._done == self._first:
            self._started = time.perf_counter()  # work before the first iteration does not count for the time left

    def iteration(self, iteration: int, metrics: dict[str, float]) -> None:
        """Show the metrics of a finished iteration, and an estimate of the time left."""
        shown = SHOWN if self._config.generates else OFFLINE
        parts = [text.format(metrics[key]) for key, text in shown.items() if key in metrics]
        for key, name in (("reward_errors", "reward errors"), ("reward_timeouts", "reward timeouts")):
            if metrics.get(key):
                parts.append(f"{metrics[key]:.0f} {name}!")
        if "eval/accuracy" in metrics:
            parts.append(f"held-out accuracy {metrics['eval/accuracy']:.2f}")
        text = " | ".join(parts)
        self._done = iteration
        if self._progress is not None:
            self._progress.console.print(f"[bold]{iteration:4d}[/]  {escape(text)}")
            self._progress.update(self._task, completed=iteration)
            return
        total = self._config.run.iterations
        rate = (time.perf_counter() - self._started) / max(
            iteration - self._first, 1
        )  # an iteration that is only evaluated counts as one
        left = duration(rate * (total - iteration))
        self.note(f"{iteration}/{total} | {text} | {metrics['step_time']:.1f} s | {left} left")

    def note(self, text: str) -> None:
        """Print a line of text."""
        self._printed = time.perf_counter()
        self._console.print(text, markup=False)

    def results(self, before: Evaluation | None, after: Evaluation | None, folder: Path) -> None:
        """Print answers and accuracies before and after training, and the run folder."""
        if before is not None and after is not None:
            earlier, later = (describe(a.settings for a in each.answers) for each in (before, after))
            if earlier == later:
                self._compare(before, after)
            else:  # a resumed run may evaluate with other settings
                self.note(f"no comparison: answered with {earlier} before training, with {later} after it")
        self.note(f"metrics, samples, curves.png and the checkpoint are in {folder}")

    def _compare(self, before: Evaluation, after: Evaluation) -> None:
        if self._config.run.table:
            self._console.print(_answers(before, after, self._config.run.table))
        first, then = before.metrics(), after.metrics()
        problems = sum(a.benchmark is None for a in after.answers)
        settings = self._config.evaluation
        names = {
            "eval/accuracy": f"held-out accuracy, temperature {settings.temperature:g} "
            f"({problems} problems x {settings.samples} answers)",
            "eval/accuracy_greedy": "held-out accuracy, greedy",
        }
        if not problems:
            names = {"eval/accuracy": "mean accuracy of the benchmarks"}
        names |= {key: key.removeprefix("eval/").replace("/", ", ") for key in then if "/avg@" in key}
        for key, name in names.items():
            if key in first and key in then:
                self.note(f"{name}: {first[key]:.3f} -> {then[key]:.3f}")


class _Bar(Progress):
    """The progress bar, and below it what the run waits for."""

    def __init__(self, waiting: Waiting, *columns: ProgressColumn, **options: Any):
        self._waiting = waiting
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterator[RenderableType]:
        """See Progress.get_renderables."""
        yield self.make_tasks_table(self.tasks)
        if text := self._waiting.text():
            yield Text(text, style="dim", no_wrap=True, overflow="ellipsis")


def _answers(before: Evaluation, after: Evaluation, count: int) -> Table:
    """Table of the first `count` problems that both evaluations answered, with one sampled answer each."""
    table = Table(title="Held-out problems", show_lines=False)
    for name in ("problem", "before", "", "after", ""):
        table.add_column(name, overflow="fold")
    earlier = {(a.benchmark, str(a.prompt)): a for a in before.answers}
    pairs = [(earlier.get((new.benchmark, str(new.prompt))), new) for new in after.answers]
    for old, new in [(old, new) for old, new in pairs if old is not None][:count]:
        cells = [_short(old.sampled[0]), _mark(old.scores[0]), _short(new.sampled[0]), _mark(new.scores[0])]
        table.add_row(*map(escape, [_short(_question(new.prompt)), *cells]))
    return table


def _question(prompt: Prompt) -> str:
    """The text of a prompt. For chat messages: the last user message. The last message may be the assistant's begin."""
    if isinstance(prompt, str):
        return prompt
    asked = [message for message in prompt if message["role"] == "user"] or prompt
    return str(asked[-1]["content"])


def _short(text: str) -> str:
    """A long text shortened to 100 characters of its beginning and 200 of its end, because the end matters more."""
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}"


def _mark(score: float | None) -> str:
    return "?" if score is None else "right" if is_right(score) else "wrong" if score <= ROUNDING else f"{score:.2f}"
