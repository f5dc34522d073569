"""Worker processes that run a user's code: reward functions and environments. They can be killed.

A computer algebra system that gets `10^{10^{10}}` computes for ever. It does so in C code, which signals and exceptions
do not interrupt: only killing the process ends the computation. So worker processes run such code, and a killed worker
is replaced. A process is not a sandbox: the code has all rights of the user who runs the trainer.

`Workers` starts and kills the processes, and gives them the tasks of a `Job`. `_work` is the function that a worker
process runs. A worker leads a process group of its own: whoever kills the worker also kills the processes that the
user's code started. Only a process that leaves the group (`start_new_session=True`) escapes. The stdout of workers goes
to stderr, so that the output of the user's code does not mix with the trainer's output.
"""

import contextlib
import faulthandler
import math
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol

from reval.output import lenient

_STARTUP_SECONDS = 120.0  # limit for the imports of a worker; importing torch from a cold disk takes tens of seconds
_TRANSFER_SECONDS = 30  # limit for one message through a pipe
_ORPHAN_SECONDS = 5.0  # a worker ends itself this long after its time limit, if no trainer is left to kill it
_MOST_TRACEBACK = 2000  # characters

Run = Callable[[Any], tuple[str, Any]]
"""Does one task in a worker process: from the task's message to (kind, value). An exception becomes ("raised", its
traceback)."""
Load = Callable[[str], tuple[Any, Run]]
"""Finds the user's code by its name, in a worker process: from the name to (information for the trainer, `Run`)."""


class Task(NamedTuple):
    """What one worker does at a time."""

    ticket: Any
    """Tells the job which task this is."""
    message: Any
    """What the worker gets. It is pickled."""
    steps: int = 1
    """The task may take this many times the time limit of one step."""


class Job(Protocol):
    """Tasks that belong together, and their results."""

    def waiting(self) -> bool:
        """Whether a task is left that no worker has taken."""
        ...

    def take(self, worker: "Worker") -> Task | None:
        """The next task for this idle worker. None if there is none for it."""
        ...

    def record(self, ticket: Any, worker: "Worker", kind: str, value: Any) -> None:
        """The result of a task: what `Run` returned, or "late" (past the time limit), or "died" with the reason."""
        ...


@dataclass(slots=True, eq=False)
class Worker:
    """A worker process and its state: starting, idle (`deadline` is None), or busy with `task`."""

    process: BaseProcess
    connection: Connection
    deadline: float | None
    starting: bool = True
    task: Task | None = None
    discarded: bool = False
    """The process was killed, so all that it held is gone."""

    @property
    def idle(self) -> bool:
        return self.deadline is None


class Workers:
    """Worker processes for one piece of a user's code.

    They are spawned processes. They import the main module of the program and then the user's code; these imports do
    not count against `timeout`. The main module is imported under another name, so protect the code that it runs with
    `if __name__ == "__main__":`. Use the workers from one thread at a time. The user's code may start processes, with
    multiprocessing too; they end with their worker.

    Args:
        load: finds the code in the worker. A function of a module, since it is pickled by name.
        spec: the argument of `load`.
        name: what error messages call the code. Example: "reward function 'number'".
        count: number of processes, at least 1.
        timeout: maximum number of seconds for one step of a task.
        error: the exception for code that cannot be found or loaded.

    Raises `error`, and ValueError for `count` or `timeout` out of range.
    """

    def __init__(
        self, load: Load, spec: str, name: str, *, count: int, timeout: float, error: type[ValueError]
    ) -> None:
        if count < 1:
            raise ValueError(f"workers must be at least 1, but is {count}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, but is {timeout}")
        self._load, self._spec, self._name, self._error = load, spec, name, error
        self._count, self._timeout = count, timeout
        self._context = multiprocessing.get_context("spawn")
        self.all: list[Worker] = []
        self.information: Any = None
        """What `load` returned for the trainer."""
        self._closed = False
        weakref.finalize(self, _kill_all, self.all)  # at the end of a program that forgets to close
        try:
            self._fill()
            while any(worker.starting for worker in self.all):
                self._wait()
        except BaseException:
            self.close()
            raise

    def do(self, job: Job) -> None:
        """Run all tasks of the job."""
        if self._closed:
            raise RuntimeError(f"{self._name} was used after close()")
        for worker in [w for w in self.all if not w.process.is_alive()]:
            self._discard(worker)  # this worker died between two calls, so no task has failed
        try:
            self._fill()
            while job.waiting() or any(worker.task for worker in self.all):
                for worker in [w for w in self.all if w.idle]:
                    if (task := job.take(worker)) is not None:
                        self._send(worker, task, job)
                for ended in self._wait():
                    job.record(*ended)
                self._fill()  # a replacement for the last worker then starts while the trainer does other work
        finally:
            # After an exception, some workers are still busy. Nobody will read their answers.
            for worker in [w for w in self.all if w.task]:
                self._discard(worker)

    def close(self) -> None:
        """Kill the workers. A second call does nothing."""
        self._closed = True
        for worker in list(self.all):
            self._discard(worker)

    def _fill(self) -> None:
        """Start workers until there are `count` of them, without waiting for them."""
        while len(self.all) < self._count:
            ours, theirs = self._context.Pipe()
            _bound_transfers(ours, _TRANSFER_SECONDS)
            process = self._context.Process(
                target=_work,
                args=(theirs, self._load, self._spec, self._name, self._error),
                daemon=True,
                name="reval-worker",
            )
            process.start()
            theirs.close()  # otherwise the pipe stays open when the worker dies, and recv never raises EOFError
            self.all.append(Worker(process, ours, deadline=time.monotonic() + _STARTUP_SECONDS))

    def _discard(self, worker: Worker) -> None:
        self.all.remove(worker)
        worker.discarded = True
        _kill(worker)
        worker.connection.close()
        worker.process.join(_TRANSFER_SECONDS)
        with contextlib.suppress(ValueError):  # the process still runs: it is stuck in a system call
            worker.process.close()

    def _send(self, worker: Worker, task: Task, job: Job) -> None:
        # Mark the worker as busy first, then send. With the other order, Ctrl-C in between would leave a worker that
        # counts as idle and later returns the answer of this task for another task.
        seconds = self._timeout * task.steps
        worker.task, worker.deadline = task, time.monotonic() + seconds
        try:
            worker.connection.send((seconds, pickle.dumps(task.message)))
        except OSError:  # the worker is dead, or it hangs and the pipe is full
            kind, value = _death(worker)
            self._discard(worker)
            job.record(task.ticket, worker, kind, value)

    def _wait(self) -> list[tuple[Any, Worker, str, Any]]:
        """Wait until a worker answers, dies or reaches its deadline.

        Returns (ticket, worker, kind, value) of each task that ended, see `Job.record`.
        """
        active = [(worker, worker.deadline) for worker in self.all if worker.deadline is not None]
        if not active:
            return []
        patience = min(deadline for _, deadline in active) - time.monotonic()
        answered = wait([worker.connection for worker, _ in active], max(0.0, patience))
        ended: list[tuple[Any, Worker, str, Any]] = []
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
            assert worker.task is not None, "a worker with a deadline that is not starting has a task"
            ended.append((worker.task.ticket, worker, kind, value))
            worker.task = worker.deadline = None
            if kind in ("late", "died"):
                self._discard(worker)
        return ended

    def _finish_start(self, worker: Worker, kind: str, value: Any) -> None:
        if kind == "ready":
            worker.starting, worker.deadline, self.information = False, None, value
            return
        self._discard(worker)
        if kind == "unloadable":
            raise self._error(value)
        if kind == "late":
            raise self._error(
                f"{self._name}: a worker was not ready after {_STARTUP_SECONDS:.0f} s; its imports take too long"
            )
        raise self._error(
            f"{self._name}: a worker could not start: {value}. Its output is on stderr. A script that starts workers "
            'must do so under `if __name__ == "__main__":`, since workers import the script'
        )


def _kill(worker: Worker) -> None:
    """Kill a worker and the processes that it started."""
    pid = worker.process.pid
    with contextlib.suppress(OSError):  # there is no such group: the worker has not made it yet, or all have ended
        os.killpg(pid, signal.SIGKILL)  # type: ignore[arg-type]
    worker.process.kill()


def _kill_all(workers: list[Worker]) -> None:
    for worker in workers:
        _kill(worker)


def _receive(worker: Worker) -> tuple[str, Any]:
    try:
        return worker.connection.recv()
    except (EOFError, OSError):
        return _death(worker)


def _death(worker: Worker) -> tuple[str, str]:
    worker.process.join(1.0)  # the pipe closes slightly before the process ends and has an exit code
    code = worker.process.exitcode
    if code is None:
        return "died", "the worker process stopped answering"
    if code >= 0:
        return "died", f"the worker process ended itself with exit code {code}"
    return "died", f"the worker process was killed by {signal.Signals(-code).name}"


def _bound_transfers(connection: Connection, seconds: int) -> None:
    """Make a read or write raise OSError after `seconds` without progress (a worker that hangs, a full pipe)."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.setblocking(True)  # the socket is non-blocking if the program has called `socket.setdefaulttimeout`
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, 0))


# The functions below run in the worker process.


def _work(connection: Connection, load: Load, spec: str, name: str, wrong: type[ValueError]) -> None:
    """Do tasks until the trainer closes the pipe or the trainer's process ends."""
    os.setpgid(0, 0)  # a group of its own, see `_kill`; the terminal's Ctrl-C does not reach it
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # only the trainer acts on an interrupt or a closed terminal
    multiprocessing.current_process().daemon = False  # a daemonic process may not start processes
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    # multiprocessing ends its processes with SIGTERM. If the trainer ignores SIGTERM, the worker inherits that.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout = sys.stderr = lenient(sys.stderr)  # code that prints works without a terminal too
    os.dup2(2, 1)  # redirects the output of C code and of subprocesses, which do not use sys.stdout
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, Linux then kills a worker, which is replaceable, before the trainer
    with contextlib.suppress(EOFError, OSError):
        _serve(connection, load, spec, name, wrong)
    sys.stderr.flush()
    os.killpg(0, signal.SIGKILL)  # sys.exit would wait for threads and processes that the user's code started


def _end_with_trainer() -> None:
    """If the trainer is killed, end this worker and the processes that it started."""
    trainer = multiprocessing.parent_process()
    assert trainer is not None
    wait([trainer.sentinel])
    os.killpg(0, signal.SIGKILL)


def _serve(connection: Connection, load: Load, spec: str, name: str, wrong: type[ValueError]) -> None:
    with open(os.devnull, "w") as nowhere:
        # If the trainer is killed, `_end_with_trainer` ends this worker, unless C code holds the interpreter lock for
        # ever. This timer then ends the worker. The timer needs neither the lock nor a signal handler.
        faulthandler.dump_traceback_later(_STARTUP_SECONDS + _ORPHAN_SECONDS, exit=True, file=nowhere)
        try:
            information, run = load(spec)
        except wrong as error:
            connection.send(("unloadable", str(error)))
            return
        except BaseException as error:
            connection.send(("unloadable", f"{name} cannot be loaded:\n{short_traceback(error)}"))
            return
        connection.send(("ready", information))
        while True:
            faulthandler.cancel_dump_traceback_later()
            seconds, message = connection.recv()
            faulthandler.dump_traceback_later(seconds + _ORPHAN_SECONDS, exit=True, file=nowhere)
            try:
                answer = run(pickle.loads(message))
            except BaseException as error:  # includes SystemExit, which a script that a verifier runs may raise
                answer = "raised", short_traceback(error)
            connection.send(answer)


def short_traceback(error: BaseException) -> str:
    """The end of the traceback: the four innermost frames and the message."""
    return "".join(traceback.format_exception(error, limit=-4)).strip()[-_MOST_TRACEBACK:]
