"""Runs with rollout.engine=none: training on logged rollouts alone. The log has texts without rewards, so every run
also encodes and scores it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import reval.loop
from reval.components import build
from reval.config import Config, ConfigError, load_config
from reval.curves import curves
from reval.loop import train
from reval.metric_names import GENERATED, TRAINING
from reval.model.loading import load_model
from reval.rollout.hf import HFRollout
from reval.rollout.none import NoRollout
from reval.rollout.probe import log_probs
from reval.rollout_log import load_rollouts

ALONE = ["data.held_out=0", "data.name=no_such_set"]  # reading the data source would fail
SUMS = [(a, b) for a in range(1, 8) for b in range(1, 8)]


@pytest.fixture
def log(tmp_path) -> Path:
    """98 answers to all problems that tiny.yaml generates, half of them right."""
    rows = [
        {
            "prompt": f"Calculate {a} + {b}. Reply with only the number.",
            "response": str(a + b + i),
            "answer": str(a + b),
        }
        for a, b in SUMS
        for i in (0, 1)
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def configured(tmp_path, log):
    def configured(folder: str, *overrides: str) -> Config:
        settings = ["rollout.engine=none", f"replay.preload={log}", "replay.batch_size=8", "replay.capacity=100"]
        own = [f"run.dir={tmp_path / folder}", "run.display=plain", "reward.workers=1", "tracking.tensorboard=false"]
        return load_config(["configs/tiny.yaml"], [*settings, *own, *overrides])

    return configured


def rows(folder: Path) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "time" not in k} for row in found]


def test_without_problems_there_is_no_engine_no_data_and_no_rollout(tmp_path, configured, capsys):
    config = configured("run", *ALONE, "replay.updates_per_iteration=3")
    with build(config) as components:
        assert isinstance(components.rollout_engine, NoRollout) and not components.training_problems
    train(config)
    found = rows(tmp_path / "run")
    assert len(found) == 3
    for i, row in enumerate(found, 1):
        assert set(row) <= {"iteration", *TRAINING} - set(GENERATED)
        assert {"replay/loss", "reval/replay/residual_abs", "buffer/size", "reference/version"} <= set(row)
        assert row["buffer/size"] == 98 and row["buffer/reuse_mean"] == pytest.approx(i * 3 * 8 / 98)
    assert found[0]["reval/replay/residual_abs"] != found[-1]["reval/replay/residual_abs"]
    assert (tmp_path / "run" / "samples.jsonl").read_text() == ""
    assert (tmp_path / "run" / "curves.png").exists()
    card = (tmp_path / "run" / "checkpoint" / "README.md").read_text()
    assert f"logged rollouts in {config.replay.preload}" in card and "responses" not in card
    out = capsys.readouterr().out
    assert "3 iterations of 3 updates on 8 logged rollouts" in out and "1/3 | residual " in out
    assert "fewer than" not in out and "left out" not in out


def test_a_policy_learns_from_a_log_alone(tmp_path, configured, log):
    """Two answers to one prompt, which the reward function scores 1 and 0."""
    row = {"prompt": "7?", "answer": "7"}
    log.write_text("".join(json.dumps(row | {"response": text}) + "\n" for text in "73" * 4))
    config = configured("run", *ALONE, "run.iterations=5", "replay.updates_per_iteration=4")
    train(config)

    def right(name: str) -> float:
        """The log-probability of the right answer, less that of the wrong one."""
        model, tokenizer = load_model(replace(config.model, name=name), seed=0)
        texts = [f"<|user|>7?<|end|><|assistant|>{answer}<|end|>" for answer in "73"]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        seven, three = (x[0] for x in log_probs(model, ids, [len(x) - 2 for x in ids], config.model))
        return seven - three

    before, after = right("tiny"), right(f"{tmp_path}/run/checkpoint")
    assert after > before + 1


def test_an_evaluation_is_answered_by_hf_and_its_rollouts_are_left_out(tmp_path, configured, capsys):
    config = configured("run", "run.best_metric=eval/accuracy", "evaluation.every=1")
    with build(config) as components:
        assert isinstance(components.rollout_engine, HFRollout) and components.rollout_engine.shares_weights
        asked = {p.columns["question"] for p in components.evaluation_problems}
    left_out = 2 * sum(f"Calculate {a} + {b}." in asked for a, b in SUMS)
    assert 0 < left_out <= 16
    train(config)
    found = rows(tmp_path / "run")
    assert all("eval/accuracy" in row and row["buffer/size"] == 98 - left_out for row in found)
    assert f"left out {left_out} rollouts, whose prompts the evaluation asks" in capsys.readouterr().out
    assert (tmp_path / "run" / "best").exists()


def test_a_benchmark_alone_needs_no_data_source(tmp_path, configured):
    asked = {"prompt": "1 + 1", "answer": "2"}
    (tmp_path / "asked.jsonl").write_text(json.dumps(asked))
    config = configured("run", *ALONE, f"evaluation.benchmarks=[{tmp_path}/asked.jsonl]", "evaluation.reward=number")
    with build(config) as components:
        assert [p.benchmark for p in components.evaluation_problems] == ["asked"] and not components.training_problems


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, configured, monkeypatch):
    settings = ["run.iterations=4", "run.save_every=1", "reference.reset_every=2", "data.held_out=4"]
    train(configured("whole", *settings))
    save = reval.loop.save_checkpoint

    def dying(folder, run, metrics):
        save(folder, run, metrics)
        if run.iteration == 3:
            raise RuntimeError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(reval.loop, "save_checkpoint", dying)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(configured("dies", *settings))
    train(configured("dies", *settings, "run.resume=auto"))
    assert rows(tmp_path / "dies") == rows(tmp_path / "whole")
    assert rows(tmp_path / "whole")[-1]["reference/version"] == 2


def test_a_run_may_go_on_with_generation(tmp_path, configured):
    """Offline first, then online: the buffer keeps the logged rollouts, and the problems come now."""
    train(configured("run", "run.iterations=1"))
    train(configured("run", "run.iterations=2", "run.resume=auto", "rollout.engine=hf"))
    first, second = rows(tmp_path / "run")
    assert "reward" not in first and second["num_tokens"] > 0 and second["buffer/size"] == 100


def test_what_no_offline_run_logs_is_refused(configured, tmp_path):
    with pytest.raises(ConfigError, match="run.best_metric must be a metric that the run logs; got 'reward'"):
        train(configured("run", *ALONE, "run.best_metric=reward"))
    train(configured("run", *ALONE, "run.iterations=1"))
    with pytest.raises(ConfigError, match="generated no rollouts .*--axis updates"):
        curves([tmp_path / "run"], ["replay/loss"])
    assert curves([tmp_path / "run"], ["replay/loss"], "updates")[0].x == [2]


def test_a_broken_log_leaves_the_folder_untouched(configured, tmp_path, log):
    log.write_text('{"prompt": "1 + 1", "response": "2"}\n')
    with pytest.raises(ConfigError, match="replay.preload: .*log.jsonl, row 1: has no 'reward', and .*column 'answer'"):
        train(configured("run", *ALONE))
    assert not (tmp_path / "run").exists()


def test_the_example_log_trains(tmp_path):
    """examples/rollouts.jsonl with configs/offline.yaml, whose comments count the rollouts."""
    own = [f"run.dir={tmp_path}/run", "run.iterations=1", "replay.capacity=144", "reward.workers=1"]
    train(load_config(["configs/tiny.yaml", "configs/offline.yaml"], [*own, "data.held_out=0"]))
    [row] = rows(tmp_path / "run")
    assert row["buffer/size"] == 144
    demo = load_config(["configs/demo.yaml", "configs/offline.yaml"])
    with build(replace(demo, model=replace(demo.model, name="tiny"))) as components:
        found = load_rollouts(demo, components)
    assert found.held_out == 12 and sum(t.score for t in found.trajectories) == 132 / 3


@pytest.mark.distributed
def test_two_processes_train_as_one(tmp_path, configured):
    settings = ["run.iterations=2", "data.held_out=4", "evaluation.samples=2"]
    train(configured("one", *settings))
    config = configured("two", *settings)
    (tmp_path / "two.yaml").write_text(config.to_yaml())
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "reval.train", str(tmp_path / "two.yaml")], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("left out") == 1
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert two["replay/loss"] == pytest.approx(one["replay/loss"], rel=1e-4)
        assert two["reval/replay/residual_abs"] == pytest.approx(one["reval/replay/residual_abs"], rel=1e-4)
