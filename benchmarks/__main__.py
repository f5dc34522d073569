"""make bench, or python -m benchmarks [--quick] [--only OP] [--provider NAME]: times every op by every provider.

Ctrl-C ends the run and writes the measurements made so far. A full run writes to benchmarks/results. A trial (--quick,
--only, --provider, --seconds, --runs, --no-memory or --no-curves) and an interrupted run write to runs/bench, so they
never replace a full run.

Letters: B trajectories, T tokens of each, N = B x T, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import reval_kernels

from . import report
from .bars import FASTEST_OF, bars
from .ops import OPS, Shape
from .providers import providers
from .suite import Case, Settings, Suite

FULL = Path(__file__).parent / "results"
TRIAL = Path("runs/bench")
F32, BF16 = torch.float32, torch.bfloat16
ROWS, BOTH, LINEAR, LOSS, BELLMAN = OPS
OURS = ("triton", "cpu")


def multiplies_bf16(device: str) -> bool:
    """Whether torch has fast bf16 matmuls on this device. Slow bf16 matmuls of the larger head take minutes."""
    return device == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()


def tables(device: str, quick: bool, patient: bool = False) -> list[Case]:
    """The cases of the tables.

    Where torch's bf16 matmuls are slow, the heads get a sixteenth of the tokens in bf16. `patient` keeps all tokens of
    the smaller head.
    """
    if quick:
        rows, head, heads, values = Shape(8, 4, 8192), Shape(8, 4, 4096, 64), [Shape(8, 4, 4096, 64)], Shape(8, 64)
    elif device == "cpu":  # the shapes that bars.py names
        rows, head, values = Shape(8, 64, 151_936), Shape(8, 128, 49_152, 576), Shape(64, 1024)
        heads = [head, Shape(8, 128, 151_936, 576)]
    else:
        rows, head, values = Shape(8, 512, 151_936), Shape(8, 512, 151_936, 2048), Shape(256, 4096)
        heads = [head]
    few = (*OURS, "torch eager")
    # Memory needs one child process for each provider of each case. To save time, most cases measure few providers.
    frugal = partial(Case, memory=few, others=False)
    cases = [frugal(ROWS, rows, dtype) for dtype in (F32, BF16)]
    cases += [frugal(BOTH, rows, F32), Case(BOTH, rows, BF16)]
    slow = not quick and not multiplies_bf16(device)

    def cut(shape: Shape, dtype: torch.dtype) -> Shape:
        few = slow and dtype == BF16 and not (patient and shape == head)
        return shape._replace(length=shape.length // 16) if few else shape

    cases += [frugal(LINEAR, cut(head, dtype), dtype) for dtype in (F32, BF16)]
    cases += [Case(LOSS, cut(heads[0], dtype), dtype, memory=few) for dtype in (F32, BF16)]
    # the larger head: only our backends and the peers that bars.py compares with
    named = (*OURS, *FASTEST_OF)
    cases += [frugal(LOSS, cut(h, dtype), dtype, only=named) for h in heads[1:] for dtype in (F32, BF16)]
    return [*cases, Case(BELLMAN, values, F32)]


def curves(device: str, quick: bool) -> list[Case]:
    """Time and memory against N at fixed V, and against V at fixed N.

    The providers are our default backend and plain PyTorch; for heads also cut-cross-entropy.
    """
    ours = next(name for name, info in reval_kernels.backends().items() if {device, "*"} & set(info.default_for))
    who = (ours, "torch eager", "cut-cross-entropy torch_compile" if device == "cpu" else "cut-cross-entropy")
    lengths, vocabularies = [8, 16, 32, 64], [16_384, 32_768, 65_536, 131_072]
    width, length = (576, 32) if device == "cpu" else (2048, 256)
    head, vocabulary = 49_152, 151_936
    if quick:
        lengths, vocabularies, width, length, head, vocabulary = [2, 4], [1024, 2048], 64, 4, 2048, 4096
    dtype = BF16 if multiplies_bf16(device) else F32
    loss = partial(Case, LOSS, dtype=dtype, only=who)
    rows = partial(Case, BOTH, dtype=F32, only=who[:2])
    return [
        *(loss(shape=Shape(8, t, head, width), curve="N") for t in lengths),
        *(loss(shape=Shape(8, length, v, width), curve="V") for v in vocabularies),
        *(rows(shape=Shape(8, t, vocabulary), curve="N") for t in lengths),
        *(rows(shape=Shape(8, length, v), curve="V") for v in vocabularies),
    ]


class Progress:
    """Prints the current step, the share of the work that is done, and an estimate of the time left."""

    def __init__(self, weights: list[float]) -> None:
        self.weights, self.done, self.start = weights, 0, time.monotonic()

    def begin(self, what: str) -> None:
        share = sum(self.weights[: self.done]) / sum(self.weights)
        gone = time.monotonic() - self.start
        left = f"about {gone / share * (1 - share) / 60:.1f} min left" if share > 0.02 else "estimating the time left"
        self.done += 1
        print(f"[{gone / 60:4.1f} min, {share:4.0%}, {left}] {self.done}/{len(self.weights)} {what}", flush=True)


def weight(case: Case, settings: Settings) -> float:
    """Rough estimate of a case's seconds, at 100 GFLOP/s and 10 GB/s."""
    op = OPS[case.op]
    once = op.flops(case.shape) / 1e11 + op.bytes(case.shape, case.dtype.itemsize) / 1e10
    members = len(case.only) or len(providers(op.family))
    return members * (2 + max(settings.budget / (5 if case.curve else 1), (settings.least + 3) * once))


def arguments(words: list[str] | None) -> argparse.Namespace:
    names = sorted({p.name for op in OPS.values() for p in providers(op.family)})
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, a minute or two: a trial")
    parser.add_argument("--only", action="append", choices=OPS, metavar="OP", help=f"an op: {', '.join(OPS)}")
    parser.add_argument("--provider", action="append", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, help="per provider and case [3; quick: 0.2]")
    parser.add_argument("--runs", type=int, help=f"at least, per provider and case [{Settings.least}]")
    parser.add_argument(
        "--patient", action="store_true", help="all tokens in bf16 where torch multiplies it slowly: 15 minutes more"
    )
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="times alone")
    parser.add_argument("--no-curves", dest="curves", action="store_false", help="the tables alone")
    parser.add_argument("--output", type=Path, help=f"a folder [{FULL}; trials: {TRIAL}]")
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    for name in ("seconds", "runs"):
        given = getattr(args, name)
        if given is not None and not 0 < given < math.inf:
            parser.error(f"--{name} must be positive, got {given}")
    args.trial = bool(
        args.quick or args.only or args.provider or args.seconds or args.runs or not (args.memory and args.curves)
    )
    folder = args.output or (TRIAL if args.trial else FULL)
    try:  # an unwritable folder must fail now, not after half an hour of measurements
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(f"--output: cannot write to {folder}: {error.strerror}")
    return args


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    seconds = args.seconds or (0.2 if args.quick else Settings.budget)
    settings = Settings(torch.device(args.device), seconds, least=args.runs or Settings.least, memory=args.memory)
    cases = tables(args.device, args.quick, args.patient) + (curves(args.device, args.quick) if args.curves else [])
    cases = [case for case in cases if not args.only or case.op in args.only]
    where = report.stamp(settings.device)
    suite = Suite(settings, say=lambda line: print(line, flush=True))
    progress = Progress([weight(case, settings) for case in cases])
    interrupted = False
    try:
        for case in cases:
            chosen = [p for p in providers(OPS[case.op].family) if not args.provider or p.name in args.provider]
            progress.begin(str(case))
            rows = suite.run(case, chosen)
            suite.measure_memory(case, rows)
            if not case.curve:
                print("\n".join(report.case_table(rows)), flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted; writing what was measured", file=sys.stderr)
    full = not (args.trial or interrupted)
    paths = report.write(args.output or (FULL if full else TRIAL), where, suite.rows, interrupted)
    if args.device == "cpu":
        print("\n".join(report.bar_table(bars(suite.rows))))
    print("written:", *paths, sep="\n  ")
    return 130 if interrupted else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` keeps the measurements, as Ctrl-C does
    sys.exit(main())
