"""The trainer's side of a rollout engine that runs in a separate process (server.py).

Every wait for this process has a deadline, and the error message says which operation was not done in time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from .protocol import Response, RolloutError
from .server import receive, send
from .weights import Expected, checked, write_weights

# Variables that torchrun sets for the trainer. An engine with these variables would join the trainer's process group.
TORCHRUN = {
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
}
POLL = 0.2  # seconds between two checks that the process still runs


class ServerRollout:
    """An engine in a new process. The process ends when this object is closed or the trainer's process ends.

    Args:
        factory: "module:name" of the function or class that makes the engine in the new process.
        arguments: arguments of the factory; they are sent as JSON.
        expected: names and shapes of the weights that a sync must contain.
        dtype: data type of the engine's weights.
        timeout: maximum number of seconds for the start, for a generation and for a sync.
        environment: environment variables to set in the new process.

    Raises ValueError if the engine refuses its arguments, RolloutError if the engine does not start.
    """

    shares_weights = False

    def __init__(
        self,
        factory: str,
        arguments: dict[str, Any],
        *,
        expected: Expected,
        dtype: torch.dtype,
        timeout: float,
        environment: Mapping[str, str] | None = None,
    ):
        self._expected, self._dtype, self._timeout = expected, dtype, timeout
        self.progress: Callable[[int, int], None] | None = None
        """See RolloutEngine."""
        self._lock = threading.Lock()
        self._closed = False
        # Anonymous memory: the system frees it when the last process with this descriptor ends, even after a crash.
        self._weights = os.memfd_create("reval-weights")
        self._log = tempfile.TemporaryFile()
        self._connection, theirs = socket.socketpair()
        with theirs:
            shared = (theirs.fileno(), self._weights)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "reval.rollout.server", *map(str, (*shared, os.getpid()))],
                pass_fds=shared,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=_environment(environment or {}),
                start_new_session=True,  # Ctrl-C then reaches only the trainer, which saves a checkpoint before it ends
            )
        self.pid = self._process.pid
        self._connection.settimeout(POLL)
        self._exchange("starting", {"factory": factory, "arguments": arguments})

    def generate(
        self, prompts: list[list[int]], *, responses: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[Response]]:
        """See RolloutEngine.generate."""
        groups = self._call(
            f"generating {responses} responses to each of {len(prompts)} prompts",
            "generate",
            prompts=prompts,
            responses=responses,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        return [[Response(ids, finished) for ids, finished in group] for group in groups]

    def log_probs(self, sequences: list[list[int]], starts: list[int]) -> list[list[float]]:
        """See RolloutEngine.log_probs."""
        what = f"computing log-probabilities in {len(sequences)} sequences"
        return self._call(what, "log_probs", sequences=sequences, starts=starts)

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See RolloutEngine.sync."""
        with self._lock, closing(checked(weights, self._expected)) as pairs:
            try:
                index = write_weights(self._weights, pairs, self._dtype)
            except OSError as error:
                raise RolloutError(f"no room for the weights that the engine should get: {error}") from error
            self._exchange("taking new weights", {"call": "load", "arguments": {"index": index}})

    def close(self) -> None:
        """End the process. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._connection.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            self._kill()
            os.close(self._weights)
            self._log.close()

    def _call(self, what: str, call: str, **arguments: Any) -> Any:
        with self._lock:
            return self._exchange(what, {"call": call, "arguments": arguments})

    def _exchange(self, what: str, message: Any) -> Any:
        """Send a request and wait for the reply. If this fails, the process is killed, because its state is unknown."""
        if self._closed:
            raise RolloutError(f"the engine was closed before {what}")
        deadline = time.monotonic() + self._timeout

        def waiting() -> None:
            if self._process.poll() is not None:
                raise EOFError
            if time.monotonic() > deadline:
                raise TimeoutError

        try:
            self._connection.settimeout(self._timeout)
            send(self._connection, message)
            self._connection.settimeout(POLL)
            reply = receive(self._connection, waiting)
            while "progress" in reply:
                waiting()
                if self.progress is not None:
                    self.progress(*reply["progress"])
                reply = receive(self._connection, waiting)
        except (EOFError, ConnectionError):
            raise RolloutError(f"the engine's process {self.pid} {self._ended()} while {what}{self._tail()}") from None
        except TimeoutError:
            self._kill()
            raise RolloutError(
                f"the engine's process {self.pid} was not done {what} within rollout.timeout={self._timeout:g} seconds "
                f"and was ended{self._tail()}"
            ) from None
        except BaseException:
            self._kill()
            raise
        if "result" in reply:
            return reply["result"]
        if reply["usage"]:
            raise ValueError(reply["text"])
        raise RolloutError(f"the engine failed while {what}: {reply['error']}{self._tail()}")

    def _ended(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._kill()
            return "closed its connection"
        self._kill()  # kills the processes that the engine's process had started
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def _tail(self, lines: int = 15) -> str:
        """The last `lines` lines of the process's output, for an error message."""
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()[-lines:]
        return "\nIts last output:\n" + "\n".join(f"  {line}" for line in said) if said else ""


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    """The environment variables of this process, without those of torchrun, updated with `changes`."""
    kept = {k: v for k, v in os.environ.items() if k not in TORCHRUN and not k.startswith("TORCHELASTIC_")}
    return kept | dict(changes)
