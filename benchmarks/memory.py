"""Memory beyond inputs and outputs: how far one call raises the peak memory of a fresh child process.

The child works in four steps:
1. It makes the inputs.
2. It lets the provider warm up, because the first call starts threads and makes machine code. A small case is enough;
   a compiled provider warms up on the whole case.
3. It resets the peak that Linux records for the process (VmHWM).
4. It makes one call.

The result is the new peak, minus the resident memory before the call, minus the bytes of the outputs. A control child
only makes the outputs: its result is the error of the method.

On a GPU no child is needed: torch counts every byte that it allocates there, and its peak.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from .ops import OPS, Op, Shape, Tensors
from .providers import providers

CONTROL = "outputs alone"
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SMALL = Shape(2, 4, 512, 64)


class NotMeasured(RuntimeError):
    """The child could not measure."""


def beyond_on_gpu(call: Callable[[], Tensors], device: torch.device) -> int:
    """Bytes of GPU memory that one call needs beyond its inputs and outputs. The call must have been made before."""
    gc.collect()  # garbage of earlier calls that is freed during the call would hide what the call takes
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before - sum(t.nbytes for t in out.values())


def beyond_inputs_and_outputs(op: str, provider: str, shape: Shape, dtype: torch.dtype, timeout: float = 300) -> int:
    """Bytes of CPU memory that one call needs beyond its inputs and outputs, measured in a child process.

    Raises NotMeasured, with the child's message, if the child fails, and after `timeout` seconds without an answer.
    """
    if not os.access(CLEAR, os.W_OK):
        raise NotMeasured(f"needs Linux's {CLEAR}, this is {sys.platform}")
    # The fork server has imported torch and done nothing else. Its forks start at once and inherit no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    mine, theirs = context.Pipe()
    args = (theirs, op, provider, shape, dtype, torch.get_num_threads())
    child = context.Process(target=_child, args=args)
    with _exact_malloc():
        child.start()
    theirs.close()
    try:
        if not mine.poll(timeout):
            raise NotMeasured(f"no answer in {timeout:.0f} s")
        answer = mine.recv()
    except EOFError:
        child.join()
        raise NotMeasured(f"its process ended with code {child.exitcode}") from None
    finally:
        child.kill()
        child.join()
    if isinstance(answer, str):
        raise NotMeasured(answer)
    return answer


@contextlib.contextmanager
def _exact_malloc() -> Iterator[None]:
    """In processes started within this block, glibc's malloc returns every freed tensor of 128 KiB or more to Linux.

    By default this threshold grows to the sizes that were freed before, and then the peak depends on luck. The MALLOC_*
    variables of the environment, which may be set for the timings, do not reach these processes.
    """
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("MALLOC_")}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)
    try:
        yield
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        os.environ.update(before)


def _child(answer: Connection, op: str, provider: str, shape: Shape, dtype: torch.dtype, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # no compile workers: a killed child would leave their semaphores behind
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    try:
        torch.set_num_threads(threads)
        answer.send(_measure(OPS[op], provider, shape, dtype))
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _measure(op: Op, name: str, shape: Shape, dtype: torch.dtype) -> int:
    device = torch.device("cpu")
    x = op.inputs(shape, dtype, device)
    if name == CONTROL:
        function, compiled = _outputs_alone(op, x), False
        run = function
    else:
        provider = next(p for p in providers(op.family) if p.name == name)
        function, compiled = provider.load(), provider.compiled

        def run(x: Tensors) -> Tensors:
            return op.run(function, x)

    run(x if compiled else op.inputs(SMALL, dtype, device))
    gc.collect()
    meter = _LinuxMeter()
    out = run(x)
    return meter.grown() - sum(t.nbytes for t in out.values())


def _outputs_alone(op: Op, x: Tensors):
    """A function that only makes and fills tensors of the shapes of the inputs' gradients."""
    return lambda like: {k: torch.ones_like(like[k]) for k in op.wrt}


class _LinuxMeter:
    """Growth of the process's peak resident memory since the meter was made."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would count as resident before the call
        CLEAR.write_text("5")  # resets VmHWM
        self.before = self._read("VmRSS")

    def grown(self) -> int:
        return self._read("VmHWM") - self.before

    @staticmethod
    def _read(what: str) -> int:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(what))
        return int(line.split()[1]) * 1024
