"""Studies: cells and their cache, halving, the report. Only two short runs train, with the tiny random model."""

import fcntl
import json
import random
import re
import shlex
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.study.__main__ import arguments, main
from benchmarks.study.cells import CELL, _digest, make, rekey, run_cell
from benchmarks.study.conduct import Cells, _rollouts
from benchmarks.study.curves import Point, area, first_at, read
from benchmarks.study.halving import budget, search, survivors
from benchmarks.study.models import TEXTS, Recipe, questions
from benchmarks.study.report import EVIDENCE, PAGE, RESULTS, fill, findings, merge, summary, table
from benchmarks.study.rewards import exact
from benchmarks.study.runner import Runner
from benchmarks.study.studies import STUDIES, Method, Study, Trial
from benchmarks.study.tasks import TASKS, Task
from reval.config import ModelConfig, load_config
from reval.model.loading import load_model

TINY = ["run.iterations=2", "evaluation.every=1", "data.held_out=2", "evaluation.greedy=false"]


def tiny(folder, *overrides, **more):
    return make(folder, ["configs/tiny.yaml"], [*TINY, *overrides], **more)


def pretend(cell, **result):
    """Write cell.json as if the run had ended."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / CELL).write_text(json.dumps({"status": "complete", "accuracy": 0.5, "seconds": 1.0} | result))


# ---- Cells ---------------------------------------------------------------------------------------------------------


def test_the_key_follows_what_is_computed(tmp_path):
    first = tiny(tmp_path)
    same = [["run.save_total_limit=3"], ["tracking.samples=1"], ["run.display=rich"]]
    assert {tiny(tmp_path, *more).folder for more in same} == {first.folder}
    other = [["run.seed=1"], ["optim.lr=2e-3"], ["run.threads=2"], ["tracking.rollouts=true"]]
    assert len({first.folder, *(tiny(tmp_path, *more).folder for more in other)}) == 5


def test_the_key_follows_the_contents_of_the_files(tmp_path):
    problems, reward = tmp_path / "problems.jsonl", tmp_path / "reward.py"

    def folder():
        named = [f"data.path={problems}", f"reward.function={reward}:right"]
        return tiny(tmp_path, "data.source=jsonl", *named).folder.name

    problems.write_text('{"prompt": "a"}\n')
    reward.write_text("def right(): ...\n")
    first = folder()
    problems.write_text('{"prompt": "b"}\n')
    second = folder()
    reward.write_text("def right(): return 1\n")
    assert len({first, second, folder()}) == 3
    reward.write_text("def right(): ...\n")
    assert folder() == second
    moved = tmp_path / "moved.jsonl"
    problems.rename(moved)
    problems = moved
    assert folder() == second  # equal contents in another place


def test_only_functions_of_the_working_folder_have_files():
    for name in ("random:Qwen2.5-1.5B", "random:/a/b", "no.such.module:f", "number", "smollm2-135m-instruct", "", None):
        assert _digest(name) is None, name
    assert _digest("benchmarks.study.rewards:exact").endswith(":exact")


def test_a_complete_cell_is_not_run_again(tmp_path):
    cell = tiny(tmp_path)
    done = run_cell(cell)
    assert done["status"] == "complete"
    assert set(done["files"]) == set() and done["seconds"] > 0 and done["stamp"]["commit"]
    assert not (cell.folder / "checkpoints").exists() and not (cell.folder / "checkpoint").is_symlink()
    assert not (cell.folder / "curves.png").exists()
    before = (cell.folder / "metrics.jsonl").stat().st_mtime_ns
    assert run_cell(cell) == done
    assert (cell.folder / "metrics.jsonl").stat().st_mtime_ns == before
    points = read(cell.folder, "eval/accuracy", 16)
    assert [p.rollouts for p in points] == [0, 16, 32]
    assert all(a.tokens < b.tokens and a.seconds < b.seconds for a, b in pairwise(points))


def test_a_run_that_stopped_in_the_middle_starts_anew(tmp_path):
    cell = tiny(tmp_path, "run.iterations=1")
    cell.folder.mkdir(parents=True)
    (cell.folder / "metrics.jsonl").write_text('{"iteration": 1}\n')
    assert cell.result() is None
    assert run_cell(cell)["status"] == "complete"
    assert [json.loads(line)["iteration"] for line in open(cell.folder / "metrics.jsonl")] == [1]


def test_a_failure_is_recorded_and_not_retried(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.study.cells._train", lambda cell: 1 / 0)
    cell = tiny(tmp_path)
    failed = run_cell(cell)
    assert failed["status"] == "failed" and failed["error"] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in (cell.folder / "log.txt").read_text()
    monkeypatch.setattr("benchmarks.study.cells._train", lambda cell: {"status": "complete", "accuracy": 1.0})
    assert run_cell(cell)["status"] == "failed"
    lines = []
    with Runner(1, 1, say=lines.append) as runner:
        assert runner.run([cell])[0]["status"] == "failed" and "division by zero (--retry" in lines[0]
    assert run_cell(cell, retry=True)["status"] == "complete"


def test_an_interrupted_cell_is_not_complete(tmp_path, monkeypatch):
    def interrupt(cell):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.study.cells._train", interrupt)
    assert run_cell(tiny(tmp_path)) == {"status": "interrupted"}
    assert tiny(tmp_path).result() is None


def test_two_processes_never_run_one_cell(tmp_path):
    cell = tiny(tmp_path)
    cell.folder.mkdir(parents=True)
    with open(cell.folder / "cell.lock", "w") as other:  # a lock of this process excludes itself too
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run_cell(cell) == {"status": "busy"}


def test_rekey_renames_what_an_older_trainer_kept(tmp_path):
    cell = tiny(tmp_path)
    run_cell(cell)  # its config.yaml is that of a real run
    cell.folder.rename(cell.folder.with_name("older"))
    assert rekey(tmp_path) == 1 and cell.result() and rekey(tmp_path) == 0


def test_the_runner_takes_what_is_complete_and_counts_it(tmp_path):
    cells = [tiny(tmp_path, f"run.seed={seed}") for seed in range(3)]
    for seed, cell in enumerate(cells):
        pretend(cell, accuracy=seed)
    with Runner(2, 3) as runner:
        assert [result["accuracy"] for result in runner.run(cells)] == [0, 1, 2]
        assert runner._pool is None, "no worker was needed"


def run_in_worker(cell, retry, wait):
    """Stands for run_cell in the worker processes: the first try finds another process at work."""
    if cell.label == "busy" and not wait:
        return {"status": "busy"}
    if cell.label == "stop":
        return {"status": "interrupted"}
    return {"status": "complete", "accuracy": float(cell.config.run.seed), "seconds": 1.0}


def test_the_runner_waits_for_busy_cells_last_and_stops_when_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.study.runner.run_cell", run_in_worker)
    lines = []
    cells = [tiny(tmp_path, f"run.seed={seed}", label=label) for seed, label in ((5, "busy"), (6, "b"))]
    with Runner(1, 2, say=lines.append) as runner:
        assert [result["accuracy"] for result in runner.run(cells)] == [5, 6]
        assert "1/2  b: 6.000" in lines[0] and "2/2  busy: 5.000" in lines[1]
        with pytest.raises(KeyboardInterrupt):
            runner.run([tiny(tmp_path, label="stop")])


# ---- Halving -------------------------------------------------------------------------------------------------------


def trials(name, count):
    return [Trial(name, (f"optim.lr={i + 1}",)) for i in range(count)]


def test_halving_finds_the_best_and_spends_equally():
    runs = []

    def run(wanted):
        runs.extend(wanted)
        return [-abs(float(t.overrides[0].split("=")[1]) - 5.2) + 0.01 * seed for t, seed in wanted]

    best, scores = search({"a": trials("a", 8), "b": trials("b", 8)}, (1, 2, 4), run)
    assert [best[name].overrides[0] for name in "ab"] == ["optim.lr=5"] * 2
    for name in "ab":
        own = [(trial, seed) for trial, seed in runs if trial.method == name]
        assert len(own) == len(set(own)) == budget(8, (1, 2, 4)) == 8 + 4 + 2 * 2
        assert sorted(len(scores[trial]) for trial in trials(name, 8)) == [1] * 4 + [2] * 2 + [4] * 2


def test_a_lucky_first_seed_does_not_decide():
    areas = {"optim.lr=1": (0.9, 0.1), "optim.lr=2": (0.6, 0.7), "optim.lr=3": (0.5, 0.9), "optim.lr=4": (0.1, 0.9)}

    def best(*rungs):
        run = lambda wanted: [areas[trial.overrides[0]][seed] for trial, seed in wanted]  # noqa: E731
        return search({"a": trials("a", 4)}, rungs, run)[0]["a"].overrides[0]

    assert best(1) == "optim.lr=1"
    assert best(1, 2) == "optim.lr=2"  # 3 and 4 ended after their first seed
    assert best(2) == "optim.lr=3"
    assert survivors(12, 3) == [12, 6, 3] and survivors(1, 2) == [1, 1]


def test_methods_must_have_equal_numbers_of_trials():
    with pytest.raises(ValueError, match="a 4, b 2"):
        search({"a": trials("a", 4), "b": trials("b", 2)}, (1,), lambda wanted: [])
    method = Method(name="m", overrides=(), grid={"optim.lr": (1, 2), "objective.beta": (1, 2, 3)})
    assert len(set(method.trials(4))) == 4 and method.trials(4) == method.trials(4)
    with pytest.raises(ValueError, match="6 points, fewer than the study's 7"):
        method.trials(7)


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_equal_budgets_and_settings_that_exist(name, tmp_path):
    study = STUDIES[name]
    task = replace(study.task, recipe=None, files=("configs/tiny.yaml",), overrides=())  # without its base model
    cells = Cells(replace(study, task=task), tmp_path, ["replay.capacity=640"], Runner(1, 1))
    for method in study.methods:
        assert len({cells.cell(trial, 0).folder for trial in method.trials(study.trials)}) == study.trials


def test_without_generation_an_iteration_counts_what_it_draws():
    config = load_config(["configs/tiny.yaml"])
    assert _rollouts(config) == 16
    drawn = ["rollout.engine=none", "replay.preload=a.jsonl", "replay.batch_size=24", "replay.updates_per_iteration=2"]
    assert _rollouts(load_config(["configs/tiny.yaml"], drawn)) == 48


# ---- The report ----------------------------------------------------------------------------------------------------


def curve(*accuracies):
    return [Point(64 * i, 640 * i, 2.0 * i, accuracy) for i, accuracy in enumerate(accuracies)]


def test_levels_are_null_where_never_reached():
    runs = [curve(0, 0.5, 0.9), curve(0, 0.4, 0.6), curve(0.1, 0.2, 0.3)]
    assert first_at(runs[0], 0.5).rollouts == 64 and first_at(runs[2], 0.5) is None
    assert area(runs[0]) == pytest.approx(0.7)
    found = findings(runs, (0.5, 0.9))["to reach"]
    assert found["0.5"]["rollouts"] == {"median": 128, "low": 64, "high": None, "each": [64, 128, None]}
    assert found["0.9"]["tokens"] == {"median": None, "low": 1280, "high": None, "each": [1280, None, None]}
    assert summary([None, 2.0])["median"] is None  # between 2 and never


def test_a_seed_that_failed_counts():
    found = findings([curve(0, 0.9), [], []], (0.5,))
    assert found["failed"] == 2 and found["to reach"]["0.5"]["rollouts"]["median"] is None
    assert found["final accuracy"]["median"] == 0 and found["area"]["high"] == 0.9


def test_a_study_replaces_only_its_own_entry(tmp_path):
    path = tmp_path / "evidence.json"
    merge(path, "b", {"x": 1})
    merge(path, "a", {"x": 2})
    merge(path, "b", {"x": 3})
    assert json.loads(path.read_text()) == {"a": {"x": 2}, "b": {"x": 3}}


def test_reward_is_that_of_the_policy_before_the_iteration(tmp_path):
    rows = [{"iteration": i, "reward": i / 10, "num_tokens": 100 * i, "step_time": 2.0} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path, "reward", 64) == [Point(0, 0, 0.0, 0.1), Point(64, 100, 2.0, 0.2)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(r | {"reval/log_ratio": r["reward"]}) + "\n" for r in rows)
    )
    assert read(tmp_path, "reval/log_ratio", 64) == read(tmp_path, "reward", 64), "also of the fresh responses"


def test_a_whole_study_from_its_kept_runs(tmp_path, monkeypatch, capsys):
    task = Task(name="t", start=(0, 1), files=("configs/tiny.yaml",), overrides=tuple(TINY))
    method = Method(name="M", overrides=(), grid={"optim.lr": (1e-3, 2e-3)})
    monkeypatch.setitem(
        STUDIES, "methods", Study(name="s", task=task, methods=(method,), trials=2, rungs=(1,), seeds=2)
    )
    monkeypatch.setattr("benchmarks.study.conduct.read", lambda folder, *rest: curve(0, 0.6))
    monkeypatch.setattr("benchmarks.study.cells.Cell.result", lambda self: {"status": "complete", "accuracy": 0.6})
    assert main(["methods", "--folder", str(tmp_path), "optim.warmup=0"]) == 0
    entry = json.loads((tmp_path / "trial" / "evidence.json").read_text())["s"]
    assert entry["methods"]["M"]["seeds"] == [100, 101] and entry["runs of each method"] == 4
    assert len(entry["methods"]["M"]["search"]) == 2 and (tmp_path / "trial" / "study-s.png").exists()
    assert table(entry)[2].startswith("| M | lr 0.001 | 64 | never |")
    assert table(entry)[2] in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- study s -->\nold\n<!-- end -->\nb\n<!-- study other -->\nkept\n<!-- end -->\n")
    fill(page, tmp_path / "trial" / "evidence.json")
    lines = page.read_text().splitlines()
    assert lines[:6] == ["a", "<!-- study s -->", *table(entry), "<!-- end -->"] and lines[6:8] == [
        "b",
        "<!-- study other -->",
    ]
    assert "kept" in lines


def test_the_page_has_the_tables_of_the_results(tmp_path):
    """docs/evidence.md shows every study of evidence.json as it is there."""
    page = tmp_path / "evidence.md"
    page.write_text(PAGE.read_text())
    fill(page, RESULTS / EVIDENCE)
    assert page.read_text() == PAGE.read_text()
    shown = set(re.findall(r"<!-- study ([\w-]+) -->", PAGE.read_text()))
    assert shown == {*json.loads((RESULTS / EVIDENCE).read_text())}


@pytest.mark.parametrize(("given", "jobs"), [([], 2), (["STUDY=methods --jobs 1"], 1)])
def test_make_study_runs_a_study(given, jobs):
    """`make -n` prints the commands and runs none."""
    make = ["make", "-n", "--no-print-directory", "study", *given]
    printed = subprocess.run(make, capture_output=True, text=True, check=True).stdout
    words = shlex.split(printed.splitlines()[-1])
    assert words[1:3] == ["-m", "benchmarks.study"]
    args = arguments(words[3:])
    assert (args.name, args.jobs) == ("methods", jobs)


def test_wrong_words_are_said_before_anything_runs(capsys):
    for words in (["nothing"], ["methods", "--jobs", "0"], ["methods", "lr"]):
        with pytest.raises(SystemExit):
            main(words)
        assert words[-1] in capsys.readouterr().err


# ---- The tasks -----------------------------------------------------------------------------------------------------

FAST = {name: task for name, task in TASKS.items() if task.recipe is not None}


def asked(task):
    return [pair for pair in questions(task.recipe.family) if task.question in (None, pair[0])]


@pytest.mark.parametrize("name", FAST)
def test_the_texts_have_the_stated_success_rate(name):
    """A base model learns the distribution of its texts; the next test checks that."""
    task, rng = FAST[name], random.Random(0)
    pairs = asked(task) * (40_000 // len(asked(task)))
    right = sum(TEXTS[task.recipe.family](*pair, task.recipe, rng) == pair[1] for pair in pairs) / len(pairs)
    assert task.start[0] < right < task.start[1], right


@pytest.mark.parametrize("name", FAST)
def test_the_base_models_have_the_stated_success_rate(name):
    """Only where a study has trained them: that takes a minute each."""
    task = FAST[name]
    folder = Path("build/study/models") / task.recipe.key
    if not folder.exists():
        pytest.skip(f"{folder} is not there")
    model, tokenizer = load_model(ModelConfig(name=str(folder), device="cpu"))
    pairs = asked(task) * max(2000 // len(asked(task)), 4)
    messages = [[{"role": "user", "content": question}] for question, _ in pairs]
    prompts = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    torch.manual_seed(0)
    out = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=42 if task.name == "long" else 17)
    texts = [tokenizer.decode(ids).partition("<|end|>")[0] for ids in out[:, prompts["input_ids"].shape[1] :]]
    right = sum(text == answer for text, (_, answer) in zip(texts, pairs, strict=True)) / len(pairs)
    assert task.start[0] < right < task.start[1], right


def test_a_task_makes_its_model_and_problems_once(tmp_path, capsys):
    task = replace(FAST["sums"], recipe=Recipe(family="sums", bare=0.5, steps=2))
    settings = task.settings(tmp_path)
    assert "training the base model" in capsys.readouterr().out
    assert task.settings(tmp_path) == settings and "training" not in capsys.readouterr().out
    config = make(tmp_path, (), [*settings, "optim.lr=1e-3"]).config
    rows = [[json.loads(line) for line in open(path)] for path in (config.data.path, config.data.held_out_path)]
    assert [len(own) for own in rows] == [360, 40] and len({row["prompt"] for own in rows for row in own}) == 400
    load_model(config.model)
    assert exact(["", ""], ["7", "7 "], [[], []], answer=["7", "7"]) == [1.0, 0.0]
