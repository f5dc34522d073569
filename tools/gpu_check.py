"""Job and measure a GPU machine in 8 minutes: tests, racecheck, limits, benchmarks, the trainer.

    python tools/gpu_check.py [--minutes 8] [--parts rows,linear] [--output FOLDER]
    python tools/gpu_check.py --rehearse    # on a CPU: tiny shapes, in Triton's interpreter

The script needs no installation and no network: docs/benchmarks.md says which packages it uses if they are there. It
writes <card>.json and <card>.md. Whatever is finished is in these files at once, so a timeout or Ctrl-C loses nothing
of it.

The parts run one after another in a child process. When the child crashes, hangs, or ruins its CUDA context (a
device-side assert), the script records this, and a new child goes on with the next part.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SCRIPT = __file__
ROOT = Path(SCRIPT).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for `python tools/gpu_check.py` in a copy that is not installed

from benchmarks.gpu.record import DONE, FAILED, NOT_RUN, RUNNING, Job, NotRun, Record, read  # noqa: E402

SHARES = {  # of 8 minutes, in seconds. What a part leaves goes to the parts after it.
    "tests": 105,
    "race": 30,
    "limits": 20,
    "rows": 80,
    "linear": 100,
    "bellman": 15,
    "precision": 25,
    "trainer": 45,
    "sizes": 35,
    "generation": 25,
    "vllm": 240,
}
PARTS = [part for part in SHARES if part != "vllm"]
"""Without --parts. vLLM needs packages that few machines have, and a minute to start each engine."""
TESTS = "tests/reval_kernels tests/reval/test_fsdp_alone.py"
FEW_TESTS = "tests/reval_kernels/test_backends.py"
GRACE = 20.0
"""Seconds after the end of a part's time until its process is killed."""
RUINED = 3
"""The child's exit status when the GPU does not answer any more."""


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: %(default)s,vllm [all but vllm]")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts [%(default)s]")
    parser.add_argument("--output", type=Path, help="a folder [benchmarks/results; rehearsal: runs/gpu_check]")
    parser.add_argument("--commit", help="the commit of this copy, where it is no git checkout [$REVAL_COMMIT]")
    parser.add_argument("--tests", help=f"arguments of pytest [{TESTS}; rehearsal: {FEW_TESTS}]")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU: tiny shapes, in Triton's interpreter")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)  # the folder of the records
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)  # time.time() when the last part must end
    options = parser.parse_args(words)
    options.parts = options.parts.split(",")
    if unknown := [part for part in options.parts if part not in SHARES]:
        parser.error(f"--parts: no part {unknown[0]!r}; there are {', '.join(SHARES)}")
    if not 0 < options.minutes < float("inf"):
        parser.error(f"--minutes must be positive, got {options.minutes}")
    options.tests = options.tests or (FEW_TESTS if options.rehearse else TESTS)
    options.output = options.output or ROOT / ("runs/gpu_check" if options.rehearse else "benchmarks/results")
    return options


# --- the child: runs the parts ---------------------------------------------------------------------------------------


def functions() -> dict[str, Callable[[Job, Record], None]]:
    from benchmarks.cases import GPU_PARTS
    from benchmarks.gpu import checks, generation, measure, sizes

    programs: dict[str, Callable[[Job, Record], None]] = {
        "tests": checks.tests,
        "race": checks.race,
        "trainer": checks.trainer,
        "vllm": checks.vllm,
        "limits": measure.limits,
        "sizes": sizes.sizes,
        "generation": generation.generation,
    }
    return programs | {part: partial(measure.measured, part) for part in GPU_PARTS}


def child(options: argparse.Namespace) -> int:
    import torch

    from benchmarks import report

    job = Job(options.child, options.rehearse, shlex.split(options.tests))
    where = report.stamp(torch.device(job.device))
    (options.child / "stamp").write_text(json.dumps(where))
    for i, part in enumerate(options.parts):
        left = options.end - time.time()
        budget = left * SHARES[part] / sum(SHARES[p] for p in options.parts[i:])
        job.end = time.time() + budget
        record = Record(options.child / f"{part}.json")
        record.begin(part, budget)
        print(f"[{left / 60:.1f} min left] {part}: {budget:.0f} s", flush=True)
        try:
            functions()[part](job, record)
            record.write(status=DONE)
        except NotRun as reason:
            record.write(status=NOT_RUN, reason=str(reason))
        except Exception as error:  # the next part may work
            record.failed(error)
            print(f"  {part} failed: {record.data['reason']}", flush=True)
        if job.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception as error:
                record.failed(error)
                return RUINED
    return 0


# --- the parent: starts children, watches the time, writes the results -----------------------------------------------


class Run:
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.end = time.time() + 60 * options.minutes - GRACE
        self.written: dict[str, float] = {}
        """The time of each record that the results hold."""

    def all_parts(self) -> None:
        waiting = list(self.options.parts)
        while waiting:
            reason = self._watch(waiting)
            unfinished = [p for p in waiting if (read(self.folder, p) or {}).get("status", RUNNING) == RUNNING]
            if unfinished:  # the child stopped in the first of them
                self._mark(unfinished[0], reason)
            waiting = unfinished[1:]

    def _watch(self, waiting: list[str]) -> str:
        """Start a child for these parts, and wait until it has ended or is killed. Returns why it ended."""
        o = self.options
        command = [sys.executable, SCRIPT, "--child", str(self.folder), "--parts", ",".join(waiting)]
        command += ["--end", str(self.end), *(["--rehearse"] if o.rehearse else []), "--tests", o.tests]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        environment |= {"TRITON_INTERPRET": "1"} if o.rehearse else {}
        environment |= {"REVAL_COMMIT": o.commit} if o.commit else {}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, process_group=0)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                self.write()
                if late := self._late(waiting):
                    return f"killed: {late} did not end in its time"
            return f"its process ended with status {process.returncode}"
        finally:  # also after Ctrl-C: pytest and the trainer are processes of the same group
            self._stop(process)
            self.write()

    def _late(self, waiting: list[str]) -> str | None:
        for part in waiting:
            record = read(self.folder, part)
            if record and record["status"] == RUNNING and time.time() > record["started"] + record["budget"] + GRACE:
                return part
        return None

    @staticmethod
    def _stop(process: subprocess.Popen) -> None:
        for number, seconds in ((signal.SIGINT, 8), (signal.SIGKILL, 8)):
            if process.poll() is not None:
                return
            os.killpg(process.pid, number)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                continue

    def _mark(self, part: str, reason: str) -> None:
        record = Record(self.folder / f"{part}.json", read(self.folder, part) or {"part": part, "started": time.time()})
        record.write(status=FAILED, reason=reason)
        print(f"  {part}: {reason}", flush=True)

    def interrupt(self) -> None:
        for part in self.options.parts:
            if (read(self.folder, part) or {}).get("status") == RUNNING:
                self._mark(part, "interrupted")

    def records(self) -> list[dict[str, Any]]:
        never = {"status": "not begun", "reason": ""}
        return [read(self.folder, part) or {"part": part} | never for part in self.options.parts]

    def write(self, interrupted: bool = False, always: bool = False) -> list[Path]:
        """Write the results if a record has changed."""
        times = {p.name: p.stat().st_mtime for p in self.folder.glob("*.json")}
        if times == self.written and not always:
            return []
        self.written = times
        from benchmarks import report
        from benchmarks.gpu import page

        stamp = self.folder / "stamp"
        where = json.loads(stamp.read_text()) if stamp.exists() else {"device": "unknown"}
        name = "rehearsal" if self.options.rehearse else report.file_name(where)
        return page.write(self.options.output, name, where, self.records(), interrupted)


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    if options.child:
        return child(options)
    import torch

    from benchmarks.gpu import page

    if not options.rehearse and not torch.cuda.is_available():
        raise SystemExit("gpu_check: torch sees no GPU here; --rehearse runs the script on a CPU")
    options.output.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written must fail now
    interrupted = False
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options, Path(folder))
        try:
            run.all_parts()
        except KeyboardInterrupt:
            interrupted = True
            run.interrupt()
        paths = run.write(interrupted, always=True)
        good = all(page.ok(part) for part in run.records())
        for part in run.records():
            print(f"{part['part']:<10} {part['status']:<9} {part.get('reason', '')}")
    print("written:", *paths, sep="\n  ")
    return 130 if interrupted else 0 if good else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` and `timeout` keep the results, as Ctrl-C does
    sys.exit(main())
