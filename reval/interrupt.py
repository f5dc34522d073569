"""Ctrl-C and SIGTERM end a run after the iteration it is in, with a checkpoint; a second one ends it at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SAME = 2.0
"""Seconds: under torchrun one Ctrl-C comes twice, from the terminal and from torchrun."""


class Interruptible:
    """Within the block, the first SIGINT or SIGTERM sets `asked` and calls `say`; a later one raises KeyboardInterrupt.

    torchrun kills its processes 30 s after it was told to stop: an iteration that takes longer is lost then, and the
    run goes on from the checkpoint before.
    """

    def __init__(self, say: Callable[[], None]):
        self.asked, self._when = False, 0.0
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self._when < SAME:
                return
            raise KeyboardInterrupt
        self.asked, self._when = True, time.monotonic()
        self._say()
