"""A fake engine for the tests of the process protocol. The first token of the first prompt selects its behaviour."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch

from reval.rollout import Response
from reval.rollout.weights import Index, read_weights

ECHO, SLEEP, EXIT, KILL, WRONG, BROKEN, CHILD, REPORT, REPORT_FOR_EVER = range(9)


class Fake:
    """An engine whose "log-probability" of every token is the sum of its weights."""

    def __init__(self, dtype: str, fail: str = ""):
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._sum = 0.0
        self.progress: Callable[[int, int], None] | None = None
        if fail == "usage":
            raise ValueError("dtype must be something else")
        if fail == "crash":
            print("the last words", flush=True)
            os._exit(3)
        if fail == "hang":
            time.sleep(1000)

    def generate(
        self, prompts: list[list[int]], *, responses: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[Response]]:
        match prompts[0][0]:
            case 1:
                time.sleep(1000)
            case 2:
                os._exit(3)
            case 3:
                os.kill(os.getpid(), signal.SIGKILL)
            case 4:
                raise ValueError("a prompt is too long")
            case 5:
                raise RuntimeError("no blocks left")
            case 6:  # a worker process that keeps the socket open when this process dies
                if os.fork() == 0:
                    time.sleep(1000)
                os.kill(os.getpid(), signal.SIGKILL)
            case 7:
                self._report(10, 2)
                self._report(20, 1)
            case 8:
                while True:
                    self._report(0, 1)
        return [[Response([*p, seed, r], r % 2 == 0) for r in range(responses)] for p in prompts]

    def _report(self, tokens: int, left: int) -> None:
        assert self.progress is not None
        self.progress(tokens, left)

    def log_probs(self, sequences: list[list[int]], starts: list[int]) -> list[list[float]]:
        return [[self._sum] * (len(ids) - start) for ids, start in zip(sequences, starts, strict=True)]

    def load(self, path: str, index: Index) -> None:
        self._sum = sum(float(w.double().sum()) for _, w in read_weights(path, index, self._dtype))
