"""What the run waits for at this moment, and how far it is: `generating for 40 s: 512 tokens/s, 30 sequences left`.

A report stores a few numbers and does nothing else, so it neither slows the loop nor raises. The display reads them
when it shows something. Reports may come from another thread than the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]


class Waiting:
    """The current wait. `with waiting("updating") as progress:` makes a wait current within the block."""

    def __init__(self) -> None:
        self._what = ""
        self._started = 0.0
        self._done: tuple[int, int] | None = None
        """Micro-batches: done, all."""
        self._asks_engine = False
        self._first: tuple[float, int] | None = None
        """The engine's first report of its request: the time, and the tokens so far."""
        self._generated: tuple[float, int] | None = None
        """The engine's last report: tokens per second since its first report, or 0, and sequences left."""

    @contextmanager
    def __call__(self, what: str, asks_engine: bool = False) -> Iterator[Progress]:
        """Within the block the run waits for `what`. Gives a function that takes the micro-batches done, and all.

        Args:
            asks_engine: the wait is for the rollout engine, so its reports belong to it. With rollout.ahead the engine
                also reports while the run waits for other things.
        """
        self._what, self._started, self._asks_engine = what, time.perf_counter(), asks_engine
        self._done = None
        if asks_engine:
            self._first = self._generated = None

        def progress(done: int, total: int) -> None:
            self._done = done, total

        try:
            yield progress
        finally:
            self._what = ""

    def engine_progress(self) -> Progress:
        """A function for the engine's attribute `progress`: it takes the tokens so far and the sequences left."""

        last = 0

        def progress(tokens: int, left: int) -> None:
            nonlocal last
            now = time.perf_counter()
            since, base = self._first or (now, tokens)
            if tokens < last:  # the engine has a new request
                since, base = now, tokens
            last = tokens
            self._first = since, base
            self._generated = (tokens - base) / max(now - since, 1e-9), left

        return progress

    def text(self) -> str:
        """What the run waits for, how long it has waited, and how far it is. Empty if it waits for nothing."""
        what, done, generated = self._what, self._done, self._generated  # another thread may change them meanwhile
        if not what:
            return ""
        parts = []
        if done is not None:
            parts.append(f"{done[0]} of {done[1]} micro-batches")
        if generated is not None and self._asks_engine:
            rate, left = generated
            parts += [f"{rate:.0f} tokens/s"] * (rate > 0) + [f"{left} sequences left"]
        return f"{what} for {duration(time.perf_counter() - self._started)}" + ": " * bool(parts) + ", ".join(parts)


def duration(seconds: float) -> str:
    """A number of seconds as text with a unit: 45 s, 12 min, 5.2 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
