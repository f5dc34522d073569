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
from pathlib import Path

import torch

from . import report
from .cases import curves, tables
from .ops import OPS
from .providers import precisions, providers
from .suite import Case, Settings, Suite

FULL = Path(__file__).parent / "results"
TRIAL = Path("runs/bench")


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
            family = OPS[case.op].family
            chosen = precisions(family) if case.precision else providers(family)
            chosen = [p for p in chosen if not args.provider or p.name in args.provider]
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
    print("\n".join(report.bar_table(report.bars_of(args.device, suite.rows))))
    print("written:", *paths, sep="\n  ")
    return 130 if interrupted else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` keeps the measurements, as Ctrl-C does
    sys.exit(main())
