"""Memory beyond inputs and outputs: how far a call pushes the peak of a process of its own.

The child makes the inputs, lets the provider warm up on a small case (threads, machine code made at run time; compiled
providers on the whole case), resets the peak that Linux keeps for it (VmHWM), and makes one call. What remains after
subtracting what was resident before and the outputs' bytes is the provider's. A child whose "provider" only makes the
outputs shows how exact that is. On a GPU: torch's own peak of allocated memory, in the same kind of child.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
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


def beyond_inputs_and_outputs(
    op: str, provider: str, shape: Shape, dtype: torch.dtype, device: torch.device, timeout: float = 300
) -> int:
    """Bytes, of one call in a child process. Raises NotMeasured, with the child's message, if that is not possible."""
    if device.type == "cpu" and not os.access(CLEAR, os.W_OK):
        raise NotMeasured(f"needs Linux's {CLEAR}, this is {sys.platform}")
    # a server that has imported torch and done nothing else: its forks start at once, and share no threads
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    mine, theirs = context.Pipe()
    args = (theirs, op, provider, shape, dtype, device, torch.get_num_threads())
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
    """For processes started in here, glibc's malloc gives every tensor of 128 KiB and more back when it is freed,
    whatever the times are taken with. By default that threshold grows to the sizes seen before, and a peak is luck."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("MALLOC_")}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(128 << 10)
    try:
        yield
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        os.environ.update(before)


def _child(
    answer: Connection, op: str, provider: str, shape: Shape, dtype: torch.dtype, device: torch.device, threads: int
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no workers, whose semaphores a killed child would leave behind
    try:
        torch.set_num_threads(threads)
        answer.send(_measure(OPS[op], provider, shape, dtype, device))
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}".splitlines()[0])


def _measure(op: Op, name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> int:
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
    meter = _CudaMeter(device) if device.type == "cuda" else _LinuxMeter()
    out = run(x)
    return meter.grown() - sum(t.nbytes for t in out.values())


def _outputs_alone(op: Op, x: Tensors):
    """Makes tensors like the inputs' gradients, and fills them."""
    return lambda like: {k: torch.ones_like(like[k]) for k in op.wrt}


class _LinuxMeter:
    """Growth of the peak resident memory since its construction."""

    def __init__(self) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not look like free room
        CLEAR.write_text("5")
        self.before = self._read("VmRSS")

    def grown(self) -> int:
        return self._read("VmHWM") - self.before

    @staticmethod
    def _read(what: str) -> int:
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(what))
        return int(line.split()[1]) * 1024


class _CudaMeter:
    def __init__(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.device, self.before = device, torch.cuda.memory_allocated(device)

    def grown(self) -> int:
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - self.before
