"""Curves of several runs: which runs share a curve, and its mean and range. The tests write the files of the runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reval.config import ConfigError, load_config
from reval.curves import curves, table
from reval.plots import compare_runs


@pytest.fixture
def write(tmp_path):
    def run(name: str, rewards: list[float], *overrides: str, before: float | None = None) -> Path:
        folder = tmp_path / name
        (folder / "evaluations").mkdir(parents=True)
        small = ["rollout.prompts=2", "rollout.responses=4", f"run.dir={folder}"]
        (folder / "config.yaml").write_text(load_config([], [*small, *overrides]).to_yaml())
        rows = [{"iteration": i, "reward": r} for i, r in enumerate(rewards, 1)]
        rows[-1]["eval/accuracy"] = rewards[-1]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if before is not None:
            answer = {"prompt": "1 + 1", "sampled": ["2", "3"], "scores": [before, before]}
            (folder / "evaluations" / "iteration-000000.jsonl").write_text(json.dumps(answer) + "\n")
        return folder

    return run


def test_seeds_of_one_setting_are_averaged_at_equal_rollouts(write):
    runs = [
        write("a", [0.5, 2.0, 9.0], "run.seed=0"),
        write("b", [0.0, 1.0], "run.seed=1", "tracking.samples=3"),
        write("c", [7.0], "replay.updates_per_iteration=4"),
    ]
    two, four = curves(runs, ["reward"])
    assert two.label == "replay.updates_per_iteration=2" and four.label == "replay.updates_per_iteration=4"
    assert (two.runs, two.x, two.mean, two.low, two.high) == (2, [8, 16], [0.25, 1.5], [0.0, 1.0], [0.5, 2.0])
    assert (four.runs, four.x, four.mean) == (1, [8], [7.0])
    assert [c.x for c in curves(runs, ["reward"], "updates")] == [[2, 4], [4]]
    assert [c.x for c in curves(runs, ["reward"], "iterations")] == [[1, 2], [1]]


def test_longer_runs_are_another_setting(write):
    runs = [write("a", [0.0], "run.iterations=5"), write("b", [0.0], "run.iterations=9")]
    assert [c.label for c in curves(runs, ["reward"])] == ["run.iterations=5", "run.iterations=9"]


def test_the_evaluation_before_training_is_the_first_point(write):
    [curve] = curves([write("a", [0.0, 0.75], before=0.5)], ["eval/accuracy"])
    assert (curve.x, curve.mean, curve.label) == ([0, 16], [0.5, 0.75], "all runs")


def test_the_table_shows_the_last_and_the_best_point(write):
    runs = [write("a", [0.0, 1.0, 0.5]), write("b", [0.0, 0.8, 0.7], "run.seed=1")]
    expected = "reward  all runs  2 runs  last 0.600 (0.500 to 0.700) at 24  best 0.900 (0.800 to 1.000) at 16"
    assert table(curves(runs, ["reward"])) == expected
    assert table(curves(runs[:1], ["reward"])) == "reward  all runs  1 runs  last 0.500 at 24  best 1.000 at 16"


def test_the_picture_is_drawn(write, tmp_path):
    runs = [write("a", [0.0, 1.0], before=0.0), write("b", [0.0, 0.8], "run.seed=1", before=0.0)]
    drawn = compare_runs(tmp_path / "x.png", runs)
    assert [c.metric for c in drawn] == ["eval/accuracy", "reward"]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_not_there_is_named(write, tmp_path):
    run = write("a", [0.0])
    with pytest.raises(ConfigError, match=r"has no metric 'rewad'; it has eval/accuracy, iteration, reward"):
        curves([run], ["rewad"])
    with pytest.raises(ConfigError, match="is not a run folder: it has no config.yaml"):
        curves([tmp_path / "nowhere"], ["reward"])
    with pytest.raises(ConfigError, match="axis must be one of rollouts, updates, iterations; got 'tokens'"):
        curves([run], ["reward"], "tokens")
