"""Runs cells in worker processes that stay, so that torch and transformers are imported once in each of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from types import TracebackType
from typing import Any

from .cells import Cell, run_cell


class Runner:
    """Context manager with `jobs` worker processes of one thread each.

    Args:
        jobs: number of worker processes. They start with the first cell that is not complete.
        total: number of cells of all calls to `run`, for the progress lines.
        retry: run cells again that failed.
        say: prints a progress line.
    """

    def __init__(self, jobs: int, total: int, *, retry: bool = False, say: Callable[[str], None] = print):
        self._jobs, self._total, self._retry, self._say = jobs, total, retry, say
        self._pool: ProcessPoolExecutor | None = None
        self._start, self._done, self._ran = time.monotonic(), 0, 0

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._pool is None:
            return
        if error is not None:
            # A run in a worker finishes its iteration; a worker that does not train ends at once.
            for process in multiprocessing.active_children():
                process.terminate()
        self._pool.shutdown(cancel_futures=True)

    def run(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Run the cells that are not complete, and return the results in the order of `cells`.

        Cells that another process runs come last, because this process has to wait for them.
        """
        results: dict[int, dict[str, Any]] = {}
        waiting = deque(range(len(cells)))
        busy: deque[int] = deque()
        running: dict[Future, int] = {}
        while waiting or busy or running:
            while (waiting or busy) and len(running) < self._jobs:
                patient = not waiting
                index = (busy if patient else waiting).popleft()
                known = cells[index].result()
                if known is not None and (known["status"] == "complete" or not self._retry):
                    results[index] = known
                    self._done += 1
                    if known["status"] == "failed":
                        self._say(f"{cells[index].label}: failed earlier: {known['error']} (--retry runs it again)")
                    continue
                running[self._submit(cells[index], patient)] = index
            if running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    index, result = running.pop(future), future.result()
                    if result["status"] == "busy":
                        busy.append(index)
                        continue
                    if result["status"] == "interrupted":
                        raise KeyboardInterrupt
                    results[index] = result
                    self._report(cells[index], result)
        return [results[index] for index in range(len(cells))]

    def _submit(self, cell: Cell, patient: bool) -> Future:
        if self._pool is None:
            os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # the workers inherit them
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self._jobs, mp_context=spawn, initializer=_prepare)
        return self._pool.submit(run_cell, cell, self._retry, patient)

    def _report(self, cell: Cell, result: dict[str, Any]) -> None:
        self._done += 1
        self._ran += 1
        minutes = (time.monotonic() - self._start) / 60
        rate = self._ran / minutes
        left = (self._total - self._done) / rate
        what = f"{result['accuracy']:.3f}" if result["status"] == "complete" else result["error"].splitlines()[0]
        self._say(
            f"[{minutes:5.1f} min] {self._done}/{self._total}  {cell.label}: {what} in {result['seconds']:.0f} s"
            f"  ({rate * 60:.0f} an hour, about {left:.0f} min left)"
        )


def _prepare() -> None:
    """Prepare a worker process: only the parent acts on Ctrl-C, until a run in this process listens too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers call this"
    parent.join()
    os._exit(1)  # the parent was killed, and nobody reads the result
