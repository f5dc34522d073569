"""The records of a run. A resumed run must have the same records as a run that was never interrupted.

The tests play a run with invented numbers instead of training. The services are fakes, except TensorBoard. If wandb and
trackio are installed, the last tests use the real packages.
"""

from __future__ import annotations

import importlib.machinery
import json
import math
import sqlite3
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reval.config import Config, ConfigError, ObjectiveConfig, TrackingConfig
from reval.evaluation.answers import Evaluation
from reval.tracking import Tracker, _cut
from reval.tracking.services import COLUMNS

FILES = ("metrics.jsonl", "samples.jsonl", "reward_errors.txt")


def test_rollouts_are_cut_to_the_checkpoint(tmp_path):
    """An incomplete last line, which kill -9 leaves, goes too."""
    whole = '{"iteration": 1}\n{"iteration": 2}\n'
    for iteration, after, kept in ((2, '{"iteration": 3}\n', whole), (3, '{"iteration": 3', whole), (0, "", "")):
        (tmp_path / "rollouts.jsonl").write_text(whole + after)
        _cut(tmp_path / "rollouts.jsonl", iteration)
        assert (tmp_path / "rollouts.jsonl").read_text() == kept


class Answers(Evaluation):
    """An evaluation of known accuracy."""

    def __init__(self, accuracy: float):
        object.__setattr__(self, "accuracy", accuracy)

    def metrics(self) -> dict[str, float]:
        return {"eval/accuracy": self.accuracy}


def settings(**tracking) -> Config:
    return replace(Config(), tracking=TrackingConfig(**{"tensorboard": False, "samples": 2} | tracking))


def play(tracker: Tracker, first: int, last: int) -> None:
    """Play the iterations from first to last. All written numbers depend only on the number of the iteration."""
    if first == 1:
        tracker.evaluated(0, Answers(0.125))
    for i in range(first, last + 1):
        play_without_log(tracker, i)
        metrics = {"num_tokens": 10 * i, "reward": 1 / (3 * i), "time/rollout": 2.0}
        if i % 2 == 0:
            metrics |= tracker.evaluated(i, Answers(i / 7))
        tracker.log(i, metrics)


def play_without_log(tracker: Tracker, i: int) -> None:
    chat = [{"role": "user", "content": f"1 + {i} \u2028"}]
    tracker.samples(i, [(chat, "two\nlines", 1.0), ("plain", "x", None), ("left out", "y", 0.0)])
    tracker.reward_error(i, f"boom\niteration {i + 100}\nKeyError: {i}")
    for kind, n in (("reval", 3), ("reval/replay", 2)):
        terms = {"residual": torch.arange(n) * 1.0 - i, "v_policy": torch.ones(n) * i}
        tracker.update(kind, {"loss": i + 0.1, "grad_norm": 2.0, "lr": 1e-3, "skipped": 0.0, "residual_terms": terms})


@pytest.fixture
def whole(tmp_path) -> Path:
    """The folder of a run of 6 iterations."""
    folder = tmp_path / "whole"
    folder.mkdir()
    with Tracker(folder, settings()) as tracker:
        play(tracker, 1, 6)
    return folder


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_row_holds_the_metrics_and_the_means_of_the_updates(whole):
    first, second = rows(whole)[:2]
    assert first["iteration"] == 1 and first["num_tokens"] == 10 and second["num_tokens"] == 30
    assert first["rollout/tokens_per_second"] == 5.0
    assert (first["loss"], first["replay/loss"], first["grad_norm"], first["lr"]) == (1.1, 1.1, 2.0, 1e-3)
    assert first["reval/residual_mean"] == 0.0 and first["reval/residual_abs"] == pytest.approx(2 / 3)
    assert first["reval/residual_p95"] == pytest.approx(1.0) and first["reval/v_policy"] == 1.0
    assert first["reval/replay/residual_mean"] == -0.5
    assert "eval/accuracy" not in first and second["eval/accuracy"] == 2 / 7
    lag = sum(math.exp(-x) for x in (-1, 0, 1)) / 3
    assert first["reval/value_lag"] == pytest.approx(math.log(lag)) and "reval/replay/value_lag" not in first


def test_only_fresh_batches_of_reval_have_a_value_lag(tmp_path):
    terms = {"residual": torch.zeros(2)}
    update = {"loss": 0.0, "grad_norm": 0.0, "lr": 0.0, "skipped": 0.0, "residual_terms": terms}
    for objective, prefix in (("reval", "reval/replay"), ("tbrm", "reval")):
        config = replace(settings(), objective=ObjectiveConfig(name=objective))
        with Tracker(tmp_path, config) as tracker:
            tracker.update(prefix, update)
            assert "reval/value_lag" not in tracker.log(1, {})


def test_samples_and_errors_of_the_reward(whole):
    samples = rows(whole, "samples.jsonl")
    assert [s["iteration"] for s in samples] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert samples[0] == {
        "iteration": 1,
        "prompt": [{"role": "user", "content": "1 + 1 \u2028"}],
        "completion": "two\nlines",
        "score": 1.0,
    }
    assert "KeyError: 6" in (whole / "reward_errors.txt").read_text()


def test_every_line_is_on_disk_at_once(tmp_path):
    with Tracker(tmp_path, settings()) as tracker:
        play(tracker, 1, 1)
        assert len(rows(tmp_path)) == 1 and len(rows(tmp_path, "samples.jsonl")) == 2


@pytest.mark.parametrize("torn", ["", '{"iteration": 6, "lo', '{"iteration": 4, "half', "\0\0\0\0"])
def test_a_resumed_run_records_what_an_uninterrupted_one_does(whole, tmp_path, torn):
    """A checkpoint is saved after iteration 3. The run is killed in a later iteration, in some cases while it writes a
    line (`torn`). Then the run resumes after iteration 3."""
    folder = tmp_path / "killed"
    folder.mkdir()
    with Tracker(folder, settings()) as tracker:
        play(tracker, 1, 3)
        state = json.loads(json.dumps(tracker.state()))
        play(tracker, 4, 5 if torn else 6)
        play_without_log(tracker, 6)
    for name, end in zip(FILES, (torn, torn, torn and "iteration 1"), strict=True):
        with open(folder / name, "a") as file:
            file.write(end)
    with Tracker(folder, settings(), iteration=3, state=state) as tracker:
        assert [r["iteration"] for r in rows(folder)] == [1, 2, 3]
        play(tracker, 4, 6)
    for name in FILES:
        assert (folder / name).read_text() == (whole / name).read_text(), name


def test_a_resumed_runs_curves_show_all_of_it(whole, monkeypatch):
    drawn = []
    monkeypatch.setattr("reval.plots.save_curves", lambda *what: drawn.append(what))
    with Tracker(whole, settings(), 6, {"tokens": 210, "evaluations": [[0, 0.125], [2, 0.3]], "runs": {}}) as tracker:
        tracker.plot()
    [(path, logged, evaluations)] = drawn
    assert path == whole / "curves.png" and logged == rows(whole) and evaluations == [(0, 0.125), (2, 0.3)]


def test_curves_that_cannot_be_drawn_are_a_warning(whole, monkeypatch):
    def fail(*what):
        raise RuntimeError("no font")

    monkeypatch.setattr("reval.plots.save_curves", fail)
    with Tracker(whole, settings(), 6) as tracker:
        with pytest.warns(UserWarning, match=r"curves.png could not be drawn \(RuntimeError: no font\)"):
            tracker.plot()


def test_a_torn_line_before_the_checkpoints_iteration_is_not_taken_for_one(whole):
    """The checkpoint of iteration 3 exists, but the line of iteration 3 is incomplete. The complete lines stay, and the
    incomplete line is removed, so the next line is not joined to it."""
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (whole / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    with Tracker(whole, settings(), iteration=3, state={"tokens": 60, "evaluations": [], "runs": {}}) as tracker:
        play(tracker, 4, 4)
    assert [r["iteration"] for r in rows(whole)] == [1, 2, 4] and rows(whole)[-1]["num_tokens"] == 100


def test_a_torn_entry_of_the_reward_errors_is_dropped(whole):
    path = whole / "reward_errors.txt"
    expected = path.read_text()
    path.write_text(expected + "iteration 1")  # the beginning of "iteration 13"
    with Tracker(whole, settings(), iteration=12):
        pass
    assert path.read_text() == expected


def test_a_reward_error_that_is_no_valid_text_is_written(tmp_path):
    with Tracker(tmp_path, settings()) as tracker:
        tracker.reward_error(1, "ValueError: \ud800")
    assert "ValueError: \\ud800" in (tmp_path / "reward_errors.txt").read_text(encoding="utf-8")


def test_without_a_state_the_files_say_how_far_the_run_was(whole):
    expected = (whole / "metrics.jsonl").read_text()
    with Tracker(whole, settings(), iteration=4) as tracker:
        assert tracker.state() == {
            "logged": 4,
            "tokens": 100,
            "evaluations": [(2, 2 / 7), (4, 4 / 7)],
            "runs": {},
            "summary": {},
        }
        play(tracker, 5, 6)
    assert (whole / "metrics.jsonl").read_text() == expected


def test_a_checkpoint_resumed_in_another_folder_goes_on_counting(whole, tmp_path):
    with Tracker(whole, settings(), iteration=3) as tracker:
        state = tracker.state()
    other = tmp_path / "other"
    other.mkdir()
    with Tracker(other, settings(), iteration=3, state=state) as tracker:
        play(tracker, 4, 4)
    assert [(r["iteration"], r["num_tokens"]) for r in rows(other)] == [(4, 100)]


def test_a_new_run_starts_with_empty_files(whole):
    with Tracker(whole, settings()) as tracker:
        play(tracker, 1, 1)
    assert len(rows(whole)) == 1 and len(rows(whole, "samples.jsonl")) == 2


def test_processes_other_than_the_main_one_write_nothing_and_return_the_same(whole, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with Tracker(empty, settings(tensorboard=True, wandb=True), main=False) as tracker:
        play(tracker, 1, 5)
        play_without_log(tracker, 6)
        metrics = {"num_tokens": 60, "reward": 1 / 18, "time/rollout": 2.0}
        row = tracker.log(6, metrics | tracker.evaluated(6, Answers(6 / 7)))
        tracker.plot()
    assert row == rows(whole)[-1]
    assert list(empty.iterdir()) == []


def test_one_that_resumes_beside_the_main_one_leaves_its_files_alone(whole):
    before = (whole / "metrics.jsonl").read_text()
    with Tracker(whole, settings(), iteration=3, main=False) as tracker:
        assert tracker.state()["tokens"] == 60
    assert (whole / "metrics.jsonl").read_text() == before


# ---- Services ----


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_shows_each_iteration_once_after_a_resume(tmp_path):
    tracking = settings(tensorboard=True)
    with Tracker(tmp_path, tracking) as tracker:
        play(tracker, 1, 5)
    with Tracker(tmp_path, tracking, iteration=3) as tracker:
        play(tracker, 4, 6)
    shown = scalars(tmp_path)
    assert [step for step, _ in shown["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in shown["eval/accuracy"]] == [0, 2, 4, 6]
    assert shown["num_tokens"][-1] == (6, 210.0)


class FakeRun:
    """A fake run of wandb or trackio, with the methods that reval uses."""

    def __init__(self, given: dict):
        self.given, self.logged, self.finished, self.broken = given, [], [], False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "iteration")

    def log(self, row: dict, step: int | None = None) -> None:
        if self.broken:
            raise BrokenPipeError("gone")
        self.logged.append((step, row))

    def finish(self, exit_code: int = 0) -> None:
        self.finished.append(exit_code)


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch):
    """Replaces the package of a service by a fake. Returns (name of the service, list of runs started in it)."""
    runs: list[FakeRun] = []
    module = types.ModuleType(request.param)
    module.__spec__ = importlib.machinery.ModuleSpec(request.param, None)
    module.init = lambda **given: runs.append(FakeRun(given)) or runs[-1]
    module.finish = lambda: runs[-1].finish()
    module.Table = lambda columns, data: [dict(zip(columns, row, strict=True)) for row in data]
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, runs


def test_a_service_gets_the_rows_and_a_table_of_samples(service, tmp_path):
    name, runs = service
    with Tracker(tmp_path, settings(**{name: True, "project": "sums", "name": "first"})) as tracker:
        play(tracker, 1, 2)
        tracker.log(3, {"num_tokens": 0})
    [run] = runs
    assert run.given["project"] == "sums" and run.given["name"].startswith("first") and run.finished == [0]
    assert "1e-06" in str(run.given["config"]), "the settings of the run"
    rows_sent = [row for _, row in run.logged]
    assert [row.get("iteration", 0) for row in rows_sent] == [0, 1, 2, 3]
    assert rows_sent[0]["eval/accuracy"] == 0.125 and "samples" not in rows_sent[3]
    assert {k: v for k, v in rows_sent[2].items() if k != "samples"} == rows(tmp_path)[1]
    first = dict(zip(COLUMNS, (2, "user: 1 + 2 \u2028", "two\nlines", 1.0), strict=True))
    assert rows_sent[2]["samples"][0] == first and len(rows_sent[2]["samples"]) == 2


def test_a_resumed_run_goes_on_in_the_services_run(service, tmp_path):
    name, runs = service
    tracking = settings(**{name: True})
    with Tracker(tmp_path, tracking) as tracker:
        play(tracker, 1, 2)
        state = json.loads(json.dumps(tracker.state()))
    with Tracker(tmp_path, tracking, iteration=2, state=state) as tracker:
        play(tracker, 3, 3)
        assert tracker.state()["runs"] == state["runs"]
    key = {"wandb": "id", "trackio": "name"}[name]
    assert runs[0].given[key] == runs[1].given[key] == state["runs"][name] and runs[1].given["resume"] == "allow"
    assert runs[0].given["resume"] != "allow" and len(runs[1].logged) == 1
    with Tracker(tmp_path, tracking):
        assert runs[2].given[key] != runs[0].given[key], "another run, though its folder has the same name"


def test_a_service_that_fails_on_the_way_does_not_stop_the_run(service, tmp_path):
    name, runs = service
    with Tracker(tmp_path, settings(**{name: True})) as tracker:
        play(tracker, 1, 1)
        runs[0].broken = True
        with pytest.warns(UserWarning, match=f"tracking.{name} failed in iteration 2 .BrokenPipeError: gone"):
            play(tracker, 2, 2)
        runs[0].broken = False
        play(tracker, 3, 3)
    assert len(rows(tmp_path)) == 3 and len(runs[0].logged) == 2


def test_a_service_that_cannot_start_says_so(service, tmp_path, monkeypatch):
    name, _ = service

    def refuse(**given):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules[name], "init", refuse)
    with pytest.raises(ConfigError, match=f"tracking.{name}: it did not start: RuntimeError: no API key"):
        Tracker(tmp_path, settings(**{name: True}))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named(name, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=f"the package {name} is not installed: pip install {name}"):
        Tracker(tmp_path, settings(**{name: True}))
    assert list(tmp_path.iterdir()) == []


# ---- The packages themselves, where they are installed ----


def resumed_after_two(folder: Path, name: str) -> str:
    """Play iterations 1 to 3, resume after iteration 2 and play 3 again. Returns the name of the run in the service."""
    with Tracker(folder, settings(**{name: True})) as tracker:
        play(tracker, 1, 2)
        state = json.loads(json.dumps(tracker.state()))
        play(tracker, 3, 3)
    with Tracker(folder, settings(**{name: True}), iteration=2, state=state) as tracker:
        play(tracker, 3, 3)
    return state["runs"][name]


@pytest.mark.slow
def test_wandb_keeps_both_parts_of_a_run_under_one_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    pytest.importorskip("wandb")
    run = resumed_after_two(tmp_path, "wandb")
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{run}*/run-{run}.wandb"))) == 2
    tables = [json.loads(p.read_text()) for p in tmp_path.glob("wandb/offline-run-*/files/media/table/*.json")]
    assert len(tables) == 4 and all(table["columns"] == list(COLUMNS) for table in tables)


@pytest.mark.slow
def test_trackio_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads this variable when it is imported
    pytest.importorskip("trackio")
    run = resumed_after_two(tmp_path, "trackio")
    with sqlite3.connect(tmp_path / "trackio" / "reval.db") as database:
        logged = database.execute("select step, run_name, metrics from metrics").fetchall()
    assert [step for step, *_ in logged] == [0, 1, 2, 3, 3] and {name for _, name, _ in logged} == {run}
    assert b"two\\nlines" in logged[1][2]
