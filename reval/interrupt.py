"""Ctrl-C, SIGTERM and SIGHUP (the terminal was closed): the first signal ends the run after the current iteration, with
a checkpoint. A second signal ends the run at once."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME = 2.0
"""Seconds. Two signals within this time count as one, because under torchrun a single Ctrl-C reaches each process
twice: from the terminal and from torchrun."""


class Interruptible:
    """Context manager. The first of SIGNALS sets `asked` to True and calls `say`. A later signal raises
    KeyboardInterrupt.

    A SIGHUP that the process ignores stays ignored: nohup asks for that.

    torchrun kills its processes 30 s after it receives a signal. An iteration that needs longer to finish is then lost,
    and a resumed run continues from the checkpoint before that iteration.
    """

    def __init__(self, say: Callable[[], None]):
        self.asked, self._when = False, 0.0
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruptible:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
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
        with contextlib.suppress(OSError):  # the terminal that was closed cannot show anything
            self._say()
