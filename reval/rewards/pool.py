"""Run a reward function in worker processes, which can be killed.

A computer algebra system asked for `10^{10^{10}}` computes for ever, in C, deaf to signals and exceptions. Only killing
its process ends that, so every completion is scored in a process we can afford to lose. A process is not a sandbox:
what a reward function runs can do whatever the user can.

`_work` is the worker's side. `RewardPool` owns the processes, `_Job` the bookkeeping of one call to `score`. Workers
print to stderr, so that what a reward function prints never lands in the trainer's own output.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import reprlib
import signal
import socket
import struct
import sys
import time
import traceback
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from reval.rewards.verifiers import RewardError, RewardFunction, resolve

_STARTUP_SECONDS = 120.0  # for the imports of a worker; importing torch from a cold disk takes tens of seconds
_TRANSFER_SECONDS = 30  # for one message to pass through a pipe
_ORPHAN_SECONDS = 5.0  # how long after its time a worker nobody killed ends itself
_MOST_IN_A_CHUNK = 16  # more would save no time on messages, and a timeout repeats the whole chunk
_MOST_TRACEBACK = 2000  # characters


@dataclass(slots=True)
class Scores:
    """What a reward function gave for a list of completions.

    Attributes:
        rewards: one per completion, in order; None where the function gave None, or was killed, or raised.
        timeouts: completions that used up their time.
        errors: completions for which the function raised, or its process died.
        first_error: the failing completion with the lowest index and a short traceback. With `errors` 0: the traceback
            of a function that raised for a chunk and then scored each of its completions alone. Else None.
    """

    rewards: list[float | None]
    timeouts: int
    errors: int
    first_error: str | None


class RewardPool:
    """Worker processes that score completions with one reward function.

    Completions are handed out in chunks. A chunk that takes longer than `timeout`, raises or kills its process is
    repeated one completion at a time, so that only the guilty completion is lost; the function may thus see a
    completion twice. One call takes at most about `timeout * completions / workers` seconds, if all of them hang.

    Workers are spawned: they import the main module of the program (under another name, so keep `if __name__ ==
    "__main__":` there) and then `function`. Neither counts against `timeout`. Use a pool from one thread at a time.

    Args:
        function: spec for `resolve`: a registered name, "package.module:function" or "path/to/file.py:function".
        workers: number of processes.
        timeout: seconds for one completion.

    Raises:
        RewardError: `function` cannot be found or loaded.
        ValueError: `workers` or `timeout` out of range.
    """

    def __init__(self, function: str, *, workers: int = 2, timeout: float = 10.0) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, but is {workers}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, but is {timeout}")
        self._function = function
        self._count = workers
        self._timeout = timeout
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._closed = False
        try:
            self._fill()
            while any(worker.starting for worker in self._workers):
                self._wait()
        except BaseException:
            self.close()
            raise

    def score(
        self,
        prompts: list[str | list[dict]],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list],
    ) -> Scores:
        """Score completions; see `Scores`.

        Args:
            prompts: one per completion.
            completions: decoded texts.
            completion_ids: their tokens.
            columns: the other columns of the data set by name, one entry per completion each.

        Raises:
            RewardError: the function returned something other than a list with one finite number or None per
                completion; or it failed with an error for every completion and there were at least two: a fault of
                the function or the columns, not of the data. (One completion alone cannot tell, and is counted.)
            ValueError: lengths differ, or a column has the name of one of the other arguments.
        """
        if self._closed:
            raise RuntimeError("RewardPool.score was called after close()")
        job = _Job(self._function, prompts, completions, completion_ids, columns, workers=self._count)
        for worker in [w for w in self._workers if not w.process.is_alive()]:
            self._discard(worker)  # it died between two calls, which is no completion's fault
        try:
            self._fill()
            while job.queue or any(worker.indices for worker in self._workers):
                for worker in [w for w in self._workers if w.idle][: len(job.queue)]:
                    self._send(worker, job)
                for indices, kind, value in self._wait():
                    job.record(indices, kind, value)
                self._fill()  # now, so that the last replacement starts while the trainer goes on
            return job.result()
        finally:
            # Only after an exception: nobody waits for these answers any more.
            for worker in [w for w in self._workers if w.indices]:
                self._discard(worker)

    def close(self) -> None:
        """Kill the workers. May be called twice."""
        self._closed = True
        for worker in list(self._workers):
            self._discard(worker)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill(self) -> None:
        """Start workers until there are as many as asked for; does not wait for them."""
        while len(self._workers) < self._count:
            ours, theirs = self._context.Pipe()
            _bound_transfers(ours, _TRANSFER_SECONDS)
            process = self._context.Process(
                target=_work,
                args=(theirs, self._function, self._timeout),
                daemon=True,
                name="reval-reward",
            )
            process.start()
            theirs.close()  # with our copy open, the death of the worker would not show as the end of the pipe
            self._workers.append(_Worker(process, ours, deadline=time.monotonic() + _STARTUP_SECONDS))

    def _discard(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        worker.process.kill()
        worker.connection.close()
        worker.process.join(_TRANSFER_SECONDS)
        with contextlib.suppress(ValueError):  # still there: stuck in the kernel, which nobody can end
            worker.process.close()

    def _send(self, worker: "_Worker", job: "_Job") -> None:
        indices = job.queue.popleft()
        # First marked busy, then sent: an interrupt in between must not leave an idle worker with an old answer.
        worker.indices, worker.deadline = indices, time.monotonic() + self._timeout
        try:
            worker.connection.send(job.payload(indices))
        except OSError:  # dead, or frozen with a full pipe
            kind, value = _death(worker)
            self._discard(worker)
            job.record(indices, kind, value)

    def _wait(self) -> list[tuple[list[int], str, Any]]:
        """Wait until a worker answers, dies or runs out of time.

        Returns:
            (indices, kind, value) of each task that ended; kind is what `_run` returns, or "late", or "died".
        """
        active = [(worker, worker.deadline) for worker in self._workers if worker.deadline is not None]
        if not active:
            return []
        patience = min(deadline for _, deadline in active) - time.monotonic()
        answered = wait([worker.connection for worker, _ in active], max(0.0, patience))
        ended: list[tuple[list[int], str, Any]] = []
        for worker, deadline in active:
            late = time.monotonic() >= deadline
            if worker.connection in answered:
                kind, value = _receive(worker)
                if kind == "died" and late:
                    kind = "late"  # it may have ended itself, see `_ORPHAN_SECONDS`
            elif late:
                kind, value = "late", None
            else:
                continue
            if worker.starting:
                self._finish_start(worker, kind, value)
                continue
            ended.append((worker.indices or [], kind, value))
            worker.indices = worker.deadline = None
            if kind in ("late", "died"):
                self._discard(worker)
        return ended

    def _finish_start(self, worker: "_Worker", kind: str, value: Any) -> None:
        if kind == "ready":
            worker.starting, worker.deadline = False, None
            return
        self._discard(worker)
        name = f"reward function {self._function!r}"
        if kind == "unloadable":
            raise RewardError(value)
        if kind == "late":
            raise RewardError(
                f"{name}: a worker was not ready after {_STARTUP_SECONDS:.0f} s; its imports take too long"
            )
        raise RewardError(
            f"{name}: a worker could not start: {value}. Its output is on stderr. A script that makes a RewardPool "
            'must do so under `if __name__ == "__main__":`, since workers import the script'
        )


@dataclass(slots=True, eq=False)
class _Worker:
    """A process and what it is doing: starting, idle (no deadline) or scoring `indices`."""

    process: BaseProcess
    connection: Connection
    deadline: float | None
    starting: bool = True
    indices: list[int] | None = None

    @property
    def idle(self) -> bool:
        return self.deadline is None


class _Job:
    """One call to `score`: what is still to be handed out and what came back."""

    def __init__(
        self, function: str, prompts: list, completions: list, completion_ids: list, columns: dict, *, workers: int
    ) -> None:
        own = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        for name in columns:
            if name in own:
                raise ValueError(f"columns must not have a column {name!r}: that is the name of another argument")
        count = len(completions)
        for name, values in {**own, **columns}.items():
            if len(values) != count:
                raise ValueError(f"{name} must have one entry per completion ({count}), but has {len(values)}")
        self._function = function
        self._inputs = (prompts, completions, completion_ids)
        self._columns = columns
        self._scores = Scores(rewards=[None] * count, timeouts=0, errors=0, first_error=None)
        self._first_failure: int = count
        self._chunk_error: str | None = None
        # A few chunks per worker, so that none waits long for the slowest.
        size = max(1, min(_MOST_IN_A_CHUNK, math.ceil(count / (4 * workers))))
        self.queue = deque(list(range(start, min(start + size, count))) for start in range(0, count, size))

    def payload(self, indices: list[int]) -> tuple:
        """What `_run` unpacks."""
        inputs = [[values[i] for i in indices] for values in self._inputs]
        columns = {name: [values[i] for i in indices] for name, values in self._columns.items()}
        return indices, inputs, columns

    def record(self, indices: list[int], kind: str, value: Any) -> None:
        """Take the outcome of a task: rewards, or the reason why there are none."""
        scores = self._scores
        if kind == "invalid":
            raise RewardError(value)
        if kind == "scored":
            for index, reward in zip(indices, value, strict=True):
                scores.rewards[index] = reward
        elif len(indices) > 1:
            self.queue.extend([index] for index in indices)
            if kind == "raised" and self._chunk_error is None:
                self._chunk_error = f"{len(indices)} completions at once raised, each alone did not:\n{value}"
        elif kind == "late":
            scores.timeouts += 1
        else:
            scores.errors += 1
            if indices[0] < self._first_failure:
                self._first_failure = indices[0]
                scores.first_error = f"{_name_completion(indices[0], self._inputs[1][indices[0]])}: {value}"

    def result(self) -> Scores:
        scores, count = self._scores, len(self._scores.rewards)
        if scores.errors == count > 1:
            raise RewardError(
                f"reward function {self._function!r} failed for all {count} completions; the first was "
                f"{scores.first_error}"
            )
        if scores.errors == 0:
            scores.first_error = self._chunk_error
        return scores


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        return _death(worker)


def _death(worker: _Worker) -> tuple[str, str]:
    worker.process.join(1.0)  # its pipe ends a moment before it does
    code = worker.process.exitcode
    if code is None:
        return "died", "the worker process stopped answering"
    if code >= 0:
        return "died", f"the worker process ended itself with exit code {code}"
    return "died", f"the worker process was killed by {signal.Signals(-code).name}"


def _name_completion(index: int, completion: str) -> str:
    text = completion if len(completion) <= 200 else f"{completion[:100]} ... {completion[-100:]}"
    return f"completion {index} ({text!r})"


def _bound_transfers(connection: Connection, seconds: int) -> None:
    """Let a read or write that makes no progress for `seconds` raise OSError (a frozen worker, a full pipe)."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setblocking(True)  # `socket.setdefaulttimeout` anywhere in the program would have made it non-blocking
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, 0))


# The worker's side.


def _work(connection: Connection, function: str, timeout: float) -> None:
    """Serve tasks until the pool closes the pipe or its process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # multiprocessing's own clean-up must work if the trainer ignores it
    sys.stdout = sys.stderr
    os.dup2(2, 1)  # for what C code and subprocesses print
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # short of memory, Linux should end a replaceable worker and not the trainer
    with contextlib.suppress(EOFError, OSError):
        _serve(connection, function, timeout)
    sys.stderr.flush()
    os._exit(0)  # an ordinary exit would wait for threads that the reward function left behind


def _serve(connection: Connection, function: str, timeout: float) -> None:
    with open(os.devnull, "w") as nowhere:
        # If the trainer is killed there is no one left to kill a worker that hangs. This alarm needs neither the
        # interpreter lock nor a signal handler.
        faulthandler.dump_traceback_later(_STARTUP_SECONDS + _ORPHAN_SECONDS, exit=True, file=nowhere)
        try:
            reward = resolve(function)
        except RewardError as error:
            connection.send(("unloadable", str(error)))
            return
        except BaseException as error:
            text = f"reward function {function!r} cannot be loaded:\n{_short_traceback(error)}"
            connection.send(("unloadable", text))
            return
        connection.send(("ready", None))
        while True:
            faulthandler.cancel_dump_traceback_later()
            task = connection.recv_bytes()
            faulthandler.dump_traceback_later(timeout + _ORPHAN_SECONDS, exit=True, file=nowhere)
            connection.send(_run(reward, function, task))


def _run(reward: RewardFunction, function: str, task: bytes) -> tuple[str, Any]:
    """Score one task: ("scored", rewards), ("raised", traceback) or ("invalid", what is wrong with the result)."""
    try:
        indices, (prompts, completions, completion_ids), columns = pickle.loads(task)
        result = reward(prompts, completions, completion_ids, **columns)
    except BaseException as error:  # SystemExit too: a verifier may run a script
        return "raised", _short_traceback(error)
    try:
        return "scored", _checked(result, function, indices, completions)
    except RewardError as error:
        return "invalid", str(error)


def _checked(result: object, function: str, indices: list[int], completions: list[str]) -> list[float | None]:
    """The rewards as floats; RewardError unless `result` is a list of finite numbers and None of the right length."""
    name, got = f"reward function {function!r}", reprlib.repr(result)
    if not isinstance(result, list):
        raise RewardError(
            f"{name} must return a list with one number or None per completion, but returned "
            f"{type(result).__name__}: {got}"
        )
    if len(result) != len(completions):
        raise RewardError(f"{name} must return one reward per completion ({len(completions)}), but returned {got}")
    rewards: list[float | None] = []
    for index, completion, value in zip(indices, completions, result, strict=True):
        try:
            # float() would also read the text "1.0"
            reward = value if value is None else math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            reward = math.nan
        if reward is not None and not math.isfinite(reward):
            raise RewardError(
                f"{name} must return finite numbers or None, but returned {reprlib.repr(value)} "
                f"({type(value).__name__}) for {_name_completion(index, completion)}"
            )
        rewards.append(reward)
    return rewards


def _short_traceback(error: BaseException) -> str:
    """The end of the traceback: the innermost frames and the message."""
    return "".join(traceback.format_exception(error, limit=-4)).strip()[-_MOST_TRACEBACK:]
