"""python -m benchmarks.study NAME [section.field=value ...]: tunes the methods of a study equally, and compares them.

Ctrl-C stops; the same command goes on. Every run is kept in --folder and is not run again. Settings on the command line
hold for every run; the results then go to FOLDER/trial, so that a trial never replaces the results of the study.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from reval.config_io import is_override

from .report import RESULTS
from .studies import STUDIES


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    parser.add_argument("settings", nargs="*", metavar="section.field=value", help="for every run: a trial")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, of one thread each [2]")
    parser.add_argument("--folder", type=Path, default=Path("build/study"), help="where runs are kept [build/study]")
    parser.add_argument("--output", type=Path, help=f"where the results go [{RESULTS}; trials: FOLDER/trial]")
    parser.add_argument("--retry", action="store_true", help="run again what failed")
    parser.add_argument(
        "--rekey", action="store_true", help="first rename the runs kept, after the trainer got settings"
    )
    args = parser.parse_intermixed_args(words)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    for setting in args.settings:
        if not is_override(setting):
            parser.error(f"a setting is section.field=value, got {setting!r}")
    args.output = args.output or (args.folder / "trial" if args.settings else RESULTS)
    return args


def main(words: list[str] | None = None) -> int:
    args = arguments(words)
    from .cells import rekey
    from .conduct import conduct

    if args.rekey:
        print(f"{rekey(args.folder)} runs renamed")
    try:
        conduct(STUDIES[args.name], args)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` stops cleanly, as Ctrl-C does
    sys.exit(main())
