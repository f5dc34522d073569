"""Runs a reward function in worker processes, which the pool can kill.

A computer algebra system that gets `10^{10^{10}}` computes for ever. It does so in C code, which signals and exceptions
do not interrupt: only killing the process ends the computation. So worker processes score the completions, and a killed
worker is replaced. A process is not a sandbox: a reward function has all rights of the user who runs the trainer.

`RewardPool` starts and kills the processes. `_Job` keeps the state of one call to `score` or `extract`. `_work` is the
function that a worker process runs. A worker leads a process group of its own: whoever kills the worker also kills the
processes that the reward function started. Only a process that leaves the group (`start_new_session=True`) escapes. The
stdout of workers goes to stderr, so that the output of a reward function does not mix with the trainer's output.
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
import threading
import time
import traceback
import weakref
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from reval.output import lenient
from reval.rewards.answers import Extractor, extractor_of
from reval.rewards.verifiers import RewardError, RewardFunction, resolve

_STARTUP_SECONDS = 120.0  # limit for the imports of a worker; importing torch from a cold disk takes tens of seconds
_TRANSFER_SECONDS = 30  # limit for one message through a pipe
_ORPHAN_SECONDS = 5.0  # a worker ends itself this long after its time limit, if no trainer is left to kill it
_MOST_IN_A_CHUNK = 16  # a larger chunk saves no more time on messages, and a timeout repeats the whole chunk
_MOST_TRACEBACK = 2000  # characters


@dataclass(slots=True)
class Scores:
    """The rewards of a list of completions.

    Attributes:
        rewards: one per completion, in order. None if the function returned None, raised, or was killed.
        timeouts: number of completions that reached the time limit.
        errors: number of completions for which the function raised or the process died.
        first_error: text about the failed completion with the lowest index, with a short traceback. If `errors` is 0
            but the function raised for a chunk and then scored each completion of the chunk alone: the traceback of
            the chunk. Otherwise None.
    """

    rewards: list[float | None]
    timeouts: int
    errors: int
    first_error: str | None


class AllFailedError(RewardError):
    """The function failed for every one of at least two completions: it is wrong, or these completions belong to a row
    that it cannot score. `scores` counts the failures."""

    def __init__(self, message: str, scores: Scores):
        super().__init__(message)
        self.scores = scores


class RewardPool:
    """Worker processes that score completions with one reward function.

    The pool sends completions to the workers in chunks. A chunk fails if it takes longer than `timeout`, raises, or
    kills its process. The completions of a failed chunk are then scored one by one, so that only the faulty completion
    loses its reward. The function may thus get a completion twice. If every completion hangs, one call takes about
    `timeout * completions / workers` seconds.

    Workers are spawned processes. They import the main module of the program and then `function`; these imports do not
    count against `timeout`. The main module is imported under another name, so protect the code that it runs with
    `if __name__ == "__main__":`. Use a pool from one thread at a time. `function` may start processes, with
    multiprocessing too; they end with their worker.

    Args:
        function: spec for `resolve`: a registered name, "package.module:function" or "path/to/file.py:function".
        workers: number of processes, at least 1.
        timeout: maximum number of seconds for one completion.

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
        self._extracts = False
        weakref.finalize(self, _kill_all, self._workers)  # at the end of a program that forgets to close
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
            completion_ids: token ids of each completion.
            columns: the other columns of the data set by name, each with one entry per completion.

        Raises:
            RewardError: the function did not return a list with one finite number or None per completion.
            AllFailedError: the function failed for every one of at least two completions: then the function or a column
                is wrong. (A failure for a single completion may have either cause, and is only counted in `errors`.)
            ValueError: lengths differ, or a column has the name of another argument.
        """
        return self._do(
            _Job("score", self._function, prompts, completions, completion_ids, columns, workers=self._count)
        )

    def extract(self, completions: list[str]) -> list[str | None] | None:
        """The final answer of each completion, for majority votes. None if the reward function has no extractor.

        The extractor runs in the workers, under the time limit of `score`. The answer is None where the extractor
        returned None, raised or was killed.

        Raises:
            RewardError: the extractor returned something else than text or None, or failed for every one of at least
                two completions.
        """
        if not self._extracts:
            return None
        nothing: list = [None] * len(completions)
        return self._do(_Job("extract", self._function, nothing, completions, nothing, {}, workers=self._count)).rewards

    def _do(self, job: "_Job") -> Any:
        if self._closed:
            raise RuntimeError(f"RewardPool.{job.what} was called after close()")
        for worker in [w for w in self._workers if not w.process.is_alive()]:
            self._discard(worker)  # this worker died between two calls, so no completion counts as an error
        try:
            self._fill()
            while job.queue or any(worker.indices for worker in self._workers):
                for worker in [w for w in self._workers if w.idle][: len(job.queue)]:
                    self._send(worker, job)
                for indices, kind, value in self._wait():
                    job.record(indices, kind, value)
                self._fill()  # a replacement for the last worker then starts while the trainer does other work
            return job.result()
        finally:
            # After an exception, some workers are still busy. Nobody will read their answers.
            for worker in [w for w in self._workers if w.indices]:
                self._discard(worker)

    def close(self) -> None:
        """Kill the workers. A second call does nothing."""
        self._closed = True
        for worker in list(self._workers):
            self._discard(worker)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill(self) -> None:
        """Start workers until there are `workers` of them, without waiting for them."""
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
            theirs.close()  # otherwise the pipe stays open when the worker dies, and recv never raises EOFError
            self._workers.append(_Worker(process, ours, deadline=time.monotonic() + _STARTUP_SECONDS))

    def _discard(self, worker: "_Worker") -> None:
        self._workers.remove(worker)
        _kill(worker)
        worker.connection.close()
        worker.process.join(_TRANSFER_SECONDS)
        with contextlib.suppress(ValueError):  # the process still runs: it is stuck in a system call
            worker.process.close()

    def _send(self, worker: "_Worker", job: "_Job") -> None:
        indices = job.queue.popleft()
        # Mark the worker as busy first, then send. With the other order, Ctrl-C in between would leave a worker that
        # counts as idle and later returns the answer of this task for another task.
        worker.indices, worker.deadline = indices, time.monotonic() + self._timeout
        try:
            worker.connection.send(job.payload(indices))
        except OSError:  # the worker is dead, or it hangs and the pipe is full
            kind, value = _death(worker)
            self._discard(worker)
            job.record(indices, kind, value)

    def _wait(self) -> list[tuple[list[int], str, Any]]:
        """Wait until a worker answers, dies or reaches its deadline.

        Returns:
            (indices, kind, value) of each task that ended. `kind` is "late", "died", or a kind that `_run` returns.
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
                    kind = "late"  # the worker may have ended itself, see `_ORPHAN_SECONDS`
            elif late:
                # A process that the worker started may hold the pipe open after the worker's death.
                kind, value = ("late", None) if worker.process.is_alive() else _death(worker)
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
            worker.starting, worker.deadline, self._extracts = False, None, value
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
    """A worker process and its state: starting, idle (`deadline` is None), or scoring the completions `indices`."""

    process: BaseProcess
    connection: Connection
    deadline: float | None
    starting: bool = True
    indices: list[int] | None = None

    @property
    def idle(self) -> bool:
        return self.deadline is None


class _Job:
    """State of one call to `score` or `extract`: the queue of chunks not yet sent, and the results so far."""

    def __init__(
        self,
        what: str,
        function: str,
        prompts: list,
        completions: list,
        completion_ids: list,
        columns: dict,
        *,
        workers: int,
    ) -> None:
        own = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        for name in columns:
            if name in own:
                raise ValueError(f"columns must not have a column {name!r}: that is the name of another argument")
        count = len(completions)
        for name, values in {**own, **columns}.items():
            if len(values) != count:
                raise ValueError(f"{name} must have one entry per completion ({count}), but has {len(values)}")
        self.what = what
        self._name = _name(what, function)
        self._inputs = (prompts, completions, completion_ids)
        self._columns = columns
        self._scores = Scores(rewards=[None] * count, timeouts=0, errors=0, first_error=None)
        self._first_failure: int = count
        self._chunk_error: str | None = None
        # About four chunks per worker, so that at the end no worker waits long for the slowest one.
        size = max(1, min(_MOST_IN_A_CHUNK, math.ceil(count / (4 * workers))))
        self.queue = deque(list(range(start, min(start + size, count))) for start in range(0, count, size))

    def payload(self, indices: list[int]) -> tuple:
        """The message to a worker: (what, indices, inputs, columns) of these completions, for `_run`."""
        inputs = [[values[i] for i in indices] for values in self._inputs]
        columns = {name: [values[i] for i in indices] for name, values in self._columns.items()}
        return self.what, indices, inputs, columns

    def record(self, indices: list[int], kind: str, value: Any) -> None:
        """Store the result of a task: rewards, or the reason why there are none."""
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
            raise AllFailedError(
                f"{self._name} failed for all {count} completions; the first was {scores.first_error}", scores
            )
        if scores.errors == 0:
            scores.first_error = self._chunk_error
        return scores


def _name(what: str, function: str) -> str:
    return ("" if what == "score" else "extract_answer of ") + f"reward function {function!r}"


def _kill(worker: _Worker) -> None:
    """Kill a worker and the processes that it started."""
    pid = worker.process.pid
    with contextlib.suppress(OSError):  # there is no such group: the worker has not made it yet, or all have ended
        os.killpg(pid, signal.SIGKILL)  # type: ignore[arg-type]
    worker.process.kill()


def _kill_all(workers: list[_Worker]) -> None:
    for worker in workers:
        _kill(worker)


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        return _death(worker)


def _death(worker: _Worker) -> tuple[str, str]:
    worker.process.join(1.0)  # the pipe closes slightly before the process ends and has an exit code
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
    """Make a read or write raise OSError after `seconds` without progress (a worker that hangs, a full pipe)."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setblocking(True)  # the socket is non-blocking if the program has called `socket.setdefaulttimeout`
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, 0))


# The functions below run in the worker process.


def _work(connection: Connection, function: str, timeout: float) -> None:
    """Score tasks until the pool closes the pipe or the trainer's process ends."""
    os.setpgid(0, 0)  # a group of its own, see `_kill`; the terminal's Ctrl-C does not reach it
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the trainer acts on an interrupt or a closed terminal
    multiprocessing.current_process().daemon = False  # a daemonic process may not start processes
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    # multiprocessing ends its processes with SIGTERM. If the trainer ignores SIGTERM, the worker inherits that.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout = sys.stderr = lenient(sys.stderr)  # a reward function that prints works without a terminal too
    os.dup2(2, 1)  # redirects the output of C code and of subprocesses, which do not use sys.stdout
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, Linux then kills a worker, which is replaceable, before the trainer
    with contextlib.suppress(EOFError, OSError):
        _serve(connection, function, timeout)
    sys.stderr.flush()
    os.killpg(0, signal.SIGKILL)  # sys.exit would wait for threads and processes that the reward function started


def _end_with_trainer() -> None:
    """If the trainer is killed, end this worker and the processes that it started."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    wait([trainer.sentinel])
    os.killpg(0, signal.SIGKILL)


def _serve(connection: Connection, function: str, timeout: float) -> None:
    with open(os.devnull, "w") as nowhere:
        # If the trainer is killed, `_end_with_trainer` ends this worker, unless C code holds the interpreter lock for
        # ever. This timer then ends the worker. The timer needs neither the lock nor a signal handler.
        faulthandler.dump_traceback_later(_STARTUP_SECONDS + _ORPHAN_SECONDS, exit=True, file=nowhere)
        try:
            reward = resolve(function)
            extractor = extractor_of(function, reward)
        except RewardError as error:
            connection.send(("unloadable", str(error)))
            return
        except BaseException as error:
            text = f"reward function {function!r} cannot be loaded:\n{_short_traceback(error)}"
            connection.send(("unloadable", text))
            return
        connection.send(("ready", extractor is not None))
        while True:
            faulthandler.cancel_dump_traceback_later()
            task = connection.recv_bytes()
            faulthandler.dump_traceback_later(timeout + _ORPHAN_SECONDS, exit=True, file=nowhere)
            connection.send(_run(reward, extractor, function, task))


def _run(reward: RewardFunction, extractor: Extractor | None, function: str, task: bytes) -> tuple[str, Any]:
    """Do one task. Returns ("scored", results), ("raised", traceback) or ("invalid", message about the results)."""
    try:
        what, indices, (prompts, completions, completion_ids), columns = pickle.loads(task)
        if what == "extract":
            assert extractor is not None, "the pool asks only a function with an extractor"
            result: object = [extractor(completion) for completion in completions]
        else:
            result = reward(prompts, completions, completion_ids, **columns)
    except BaseException as error:  # includes SystemExit, which a script that a verifier runs may raise
        return "raised", _short_traceback(error)
    try:
        check = _checked_answers if what == "extract" else _checked
        return "scored", check(result, function, indices, completions)
    except RewardError as error:
        return "invalid", str(error)


def _checked_answers(result: Any, function: str, indices: list[int], completions: list[str]) -> list[str | None]:
    """The extracted answers. RewardError unless each is text or None."""
    for index, completion, answer in zip(indices, completions, result, strict=True):
        if answer is not None and not isinstance(answer, str):
            raise RewardError(
                f"{_name('extract', function)} must return text or None, but returned {reprlib.repr(answer)} "
                f"({type(answer).__name__}) for {_name_completion(index, completion)}"
            )
    return result


def _checked(result: object, function: str, indices: list[int], completions: list[str]) -> list[float | None]:
    """The rewards as floats. RewardError unless `result` is a list with one finite number or None per completion."""
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
            # Text is refused here, because float() would accept the text "1.0".
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
    """The end of the traceback: the four innermost frames and the message."""
    return "".join(traceback.format_exception(error, limit=-4)).strip()[-_MOST_TRACEBACK:]
