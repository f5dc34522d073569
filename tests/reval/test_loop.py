"""Whole runs of the tiny model through the real command line: the files they write, and their behaviour on failures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from reval.config import ModelConfig, load_config
from reval.errors import RunError
from reval.loop import train
from reval.model.loading import load_model

TINY = [sys.executable, "-m", "reval.train", "configs/tiny.yaml"]
METRICS = {
    "iteration",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "num_tokens",
    "step_time",
    "loss",
    "grad_norm",
    "lr",
    "skipped",
    "reference/version",
    "rollout/lag",
    "buffer/size",
    "buffer/age_mean",
    "buffer/reuse_mean",
    "rollout/tokens_per_second",
    "reward_errors",
    "reward_timeouts",
}
RESIDUAL_TERMS = {"residual_mean", "residual_abs", "residual_p95", "v_policy", "v_reference", "log_ratio"}


def run(folder, *overrides, check=True, config="tiny"):
    command = [*TINY[:3], f"configs/{config}.yaml", f"run.dir={folder}", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    return folder, run(folder)


def test_a_run_writes_every_file(finished):
    folder, done = finished
    assert yaml.safe_load((folder / "config.yaml").read_text())["run"]["dir"] == str(folder)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events*"))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert {s["iteration"] for s in samples} == {1, 2, 3} and {"prompt", "completion", "score"} <= set(samples[0])
    assert len((folder / "evaluations" / "iteration-000003.jsonl").read_text().splitlines()) == 8
    assert "held-out accuracy, temperature 1" in done.stdout and "s left" in done.stdout
    assert "Reply with only" in done.stdout


def test_the_written_config_has_the_dtypes_that_auto_selected(tmp_path):
    run(tmp_path / "auto", "run.iterations=1", "model.compute_dtype=auto", "rollout.dtype=auto")
    written = yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())
    assert written["model"]["compute_dtype"] == written["rollout"]["dtype"] != "auto"


def test_metrics_have_their_documented_names(finished):
    rows = metrics(finished[0])
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) >= METRICS
        assert set(row) >= {f"reval/{p}" for p in RESIDUAL_TERMS} | {f"reval/replay/{p}" for p in RESIDUAL_TERMS}
    assert [row["buffer/size"] for row in rows] == [16, 32, 32]
    assert rows[0]["reval/residual_abs"] == pytest.approx(10.0), "the policy is its reference, and r / beta is -1 / 0.1"
    assert rows[0]["num_tokens"] < rows[1]["num_tokens"] < rows[2]["num_tokens"]
    assert "eval/accuracy" in rows[2] and "eval/accuracy" not in rows[1]


def test_the_checkpoint_loads_and_has_moved(finished):
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint")
    assert tokenizer.chat_template and tokenizer.eos_token_id == 1
    initial, _ = load_model(ModelConfig(name="tiny"), seed=0)
    assert not torch.equal(model.lm_head.weight, initial.lm_head.weight)
    assert (folder / "checkpoint").resolve().name == "iteration-000003"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["iteration-000003"]


def test_evaluate_answers_with_the_checkpoint(finished):
    folder, _ = finished
    command = [sys.executable, "-m", "reval", "evaluate", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    final = metrics(folder)[-1]
    assert result["eval/accuracy"] == final["eval/accuracy"] and result["problems"] == 8
    rows = (folder / "checkpoint" / "evaluation.jsonl").read_text()
    assert rows == (folder / "evaluations" / "iteration-000003.jsonl").read_text()


def test_the_same_seed_repeats_a_run_and_another_seed_does_not(finished, tmp_path):
    folder, _ = finished
    run(tmp_path / "again")
    run(tmp_path / "other", "run.seed=1")
    assert without_times(metrics(tmp_path / "again")) == without_times(metrics(folder))
    assert without_times(metrics(tmp_path / "other")) != without_times(metrics(folder))


def test_every_objective_and_a_reset_train(tmp_path):
    small = ["run.iterations=2", "data.held_out=0", "run.save_every=0", "tracking.tensorboard=false"]
    for name, overrides in {
        "token": ["objective.level=token", "objective.semi_gradient=true", "reference.reset_every=1"],
        "tbrm": ["objective.name=tbrm"],
        "grpo": [
            "objective.name=grpo",
            "reward.shaping=normalized",
            "reference.reset_every=1",
            "rollout.ahead=1",
            "reward.function=tests/reval/rewards_by_length.py:score",
        ],
    }.items():
        run(tmp_path / name, "reward.shaping=plus_minus_one", *small, *overrides)
        rows = metrics(tmp_path / name)
        assert len(rows) == 2 and rows[1]["grad_norm"] > 0
        assert rows[1]["reference/version"] == (0 if name == "tbrm" else 2)


def test_a_run_without_a_reward_moves_no_weight(tmp_path):
    """The random model has no right answer, so all centered rewards are 0."""
    run(tmp_path / "still", "reward.shaping=centered", "run.iterations=2", "data.held_out=0")
    for row in metrics(tmp_path / "still"):
        assert row["skipped"] == row["replay/skipped"] == 1.0 and row["reval/residual_abs"] == row["loss"] == 0.0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "still" / "checkpoint")
    initial, _ = load_model(ModelConfig(name="tiny"), seed=0)
    assert all(torch.equal(p, initial.state_dict()[name]) for name, p in model.state_dict().items())


def test_an_earlier_runs_results_are_not_overwritten(finished):
    folder, _ = finished
    before = (folder / "metrics.jsonl").read_text()
    done = run(folder, check=False)
    assert done.returncode == 2
    assert "already has results" in done.stderr and "run.overwrite=true" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "metrics.jsonl").read_text() == before


def test_settings_that_cannot_work_say_so_before_anything_is_written(tmp_path):
    for override, message in {
        "data.name=no_such_set": "data.name='no_such_set'",
        "rollout.max_new_tokens=500": "the model's context less rollout.max_new_tokens",
        "reward.function=no.such.module:f": "no.such.module",
        "model.name=./nowhere": "nowhere",
    }.items():
        done = run(tmp_path / "x", override, check=False)
        assert done.returncode == 2 and message in done.stderr, done.stderr[-2000:]
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "x").exists()


REWARDS = """
def short(prompts, completions, completion_ids, **columns):
    return [0.0] * (len(completions) - 1)

def nan(prompts, completions, completion_ids, **columns):
    return [float("nan")] * len(completions)

def huge(prompts, completions, completion_ids, **columns):
    return [1e38 * (-1) ** len(c) for c in completions]

def some(prompts, completions, completion_ids, **columns):
    if any("7" in c for c in completions):
        raise KeyError("seven")
    return [1.0 if sum(map(ord, c)) % 3 else None for c in completions]

def by_answer(prompts, completions, completion_ids, answer, **columns):
    return [None if a is None else float(int(a) == len(c)) for a, c in zip(answer, completions)]
"""


@pytest.mark.parametrize(("name", "message"), [("short", "short"), ("nan", "nan"), ("huge", "nonfinite.jsonl")])
def test_a_broken_reward_stops_the_run_and_loses_nothing(tmp_path, name, message):
    (tmp_path / "rewards.py").write_text(REWARDS)
    options = [f"reward.function={tmp_path}/rewards.py:{name}", "reward.shaping=centered", "data.held_out=0"]
    done = run(tmp_path / "run", *options, check=False)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr[-2000:]
    if name == "huge":
        rows = [json.loads(line) for line in (tmp_path / "run" / "nonfinite.jsonl").read_text().splitlines()]
        assert len(rows) == 16 and all(len(r["token_ids"]) == len(r["action_mask"]) for r in rows)
        assert (tmp_path / "run" / "samples.jsonl").read_text(), "the responses of the failed iteration are recorded"
    else:
        assert "nothing was saved yet" in done.stderr  # iteration 1 failed, so there is no checkpoint


def test_unscored_responses_stay_out_of_the_buffer_and_exceptions_are_shown(tmp_path):
    (tmp_path / "rewards.py").write_text(REWARDS)
    options = [f"reward.function={tmp_path}/rewards.py:some", "reward.shaping=centered", "data.held_out=0"]
    done = run(tmp_path / "run", *options, "run.iterations=2")
    rows = metrics(tmp_path / "run")
    errors = sum(row["reward_errors"] for row in rows)
    assert errors > 0 and "reward errors!" in done.stdout
    assert "KeyError: 'seven'" in (tmp_path / "run" / "reward_errors.txt").read_text()
    assert all(0 < row["reward_unscored"] < 1 and row["reward"] == 1.0 for row in rows)
    assert rows[0]["buffer/size"] == round(16 * (1 - rows[0]["reward_unscored"]))


def by_answer(folder, answers, *overrides):
    """Settings of a run in which row i has the answer answers[i]. An answer that is no number cannot be scored."""
    (folder / "rewards.py").write_text(REWARDS)
    rows = [{"prompt": f"{i} + {i} = ?", "answer": answer} for i, answer in enumerate(answers)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_config(
        ["configs/tiny.yaml"],
        [
            f"run.dir={folder}/run",
            "data.source=jsonl",
            f"data.path={folder}/rows.jsonl",
            "data.held_out=0",
            f"reward.function={folder}/rewards.py:by_answer",
            "run.save_every=0",
            "tracking.tensorboard=false",
            *overrides,
        ],
    )


def test_a_row_that_cannot_be_scored_is_left_out_and_counted(tmp_path):
    answers = ["8"] * 5 + ["n/a"]
    train(by_answer(tmp_path, answers, "rollout.prompts=1", "run.iterations=6"))
    rows = metrics(tmp_path / "run")
    assert sorted(row["reward_errors"] for row in rows) == [0, 0, 0, 0, 0, 4]
    assert sorted(row["reward_unscored"] for row in rows) == [0, 0, 0, 0, 0, 1]
    assert "invalid literal" in (tmp_path / "run" / "reward_errors.txt").read_text()


@pytest.mark.parametrize(
    ("answer", "overrides", "message"),
    [
        ("n/a", [], "(?s)none of 16 responses has a score: for 16, the reward function raised.*invalid literal"),
        (None, [], "none of 16 responses has a score: for 16, the reward function returned None"),
        (None, ["rollout.prompts=1", "run.iterations=9"], "(?s)iteration 4: none of 4 resp.*4 prompts in a row"),
        (None, ["rollout.prompts=1", "run.iterations=1"], "iteration 1: none of 4 responses has a score"),
        ("n/a", ["data.held_out=3"], "(?s)no answer to the held-out problems has a score.*invalid literal"),
    ],
)
def test_a_run_that_nothing_can_be_scored_in_ends_with_an_error(tmp_path, answer, overrides, message):
    with pytest.raises(RunError, match=message):
        train(by_answer(tmp_path, [answer] * 8, *overrides))


def test_ctrl_c_saves_a_checkpoint(tmp_path):
    folder = tmp_path / "run"
    command = [*TINY, f"run.dir={folder}", "run.iterations=100000", "data.held_out=0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background ignores SIGINT, and its child processes would inherit this setting
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= 2
    ):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted after iteration" in out and "Traceback" not in err, err[-2000:]
    last = metrics(folder)[-1]["iteration"]
    assert (folder / "checkpoint").resolve().name == f"iteration-{last:06d}", "the iteration was finished and saved"
    AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert (folder / "curves.png").exists()


GUESSING = ["rollout.prompts=4", "rollout.responses=4", "data.held_out=2", "tracking.rollouts=true"]


def test_a_task_of_several_turns_trains_replays_resumes_and_preloads(tmp_path):
    """A run of four iterations, and its second half again from a checkpoint. Its rollouts then fill another buffer."""
    whole, parts, other = tmp_path / "whole", tmp_path / "parts", tmp_path / "other"
    game = [*GUESSING, "rollout.ahead=1", "evaluation.every=1"]
    run(whole, *game, "run.iterations=4", "run.save_every=2", "run.save_total_limit=2", config="guessing")
    run(parts, *game, "run.iterations=4", f"run.resume={whole}/checkpoints/iteration-000002", config="guessing")
    rows = metrics(whole)
    assert without_times(rows)[2:] == without_times(metrics(parts))[-2:]
    assert all(1 <= row["completions/mean_turns"] <= 4 for row in rows)
    assert all(row["completions/mean_length"] == row["completions/mean_turns"] for row in rows), "a turn is one token"
    assert {"eval/accuracy", "reval/residual_abs", "reval/replay/residual_abs"} <= set(rows[-1])
    logged = [json.loads(line) for line in (whole / "rollouts.jsonl").read_text().splitlines()]
    assert len(logged) == 4 * 16 and any(not all(row.get("action_mask", [True])) for row in logged)
    sample = json.loads((whole / "samples.jsonl").read_text().splitlines()[0])
    assert "<|user|>" in sample["completion"], "a sample shows all turns"
    assert sample["prompt"].endswith("guess<|end|><|assistant|>"), "and what the environment asked first"
    preload = [f"replay.preload={whole}/rollouts.jsonl", "replay.capacity=100", "run.iterations=1"]
    run(other, *GUESSING, *preload, config="guessing")
    assert metrics(other)[0]["buffer/size"] == 4 * 16 + 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Broken", "no answer to the held-out problems has a score: the environment .* failed.*I am broken"),
        ("Silent", r"needs an environment with problems\(count, seed\)"),
        ("Missing", "did you mean|its functions and classes are"),
    ],
)
def test_an_environment_that_is_broken_for_all_ends_the_run_at_once(tmp_path, name, message):
    spec = f"environment.name=tests/reval/environments/misbehaving.py:{name}"
    source = [] if name == "Broken" else ["data.source=environment"]
    done = run(tmp_path / "a", spec, *source, check=False)
    assert done.returncode in (1, 2) and re.search(message, done.stderr, re.DOTALL), done.stderr


def test_an_environment_that_never_ends_stops_at_the_limit_of_turns(tmp_path):
    spec = "environment.name=tests/reval/environments/misbehaving.py:Silent"
    run(tmp_path / "a", spec, "environment.max_turns=3", "run.iterations=1")
    [row] = metrics(tmp_path / "a")
    assert (row["reward"], row["completions/clipped_ratio"], row["completions/mean_turns"]) == (0.75, 1.0, 3.0)


def test_failures_of_the_environment_are_counted_and_written_down(tmp_path):
    """A game without a secret fails at its reset. Half of the problems have none."""
    rows = [{"prompt": f"game {i}", "secret": i if i % 2 else None} for i in range(10)]
    (tmp_path / "games.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data.source=jsonl", f"data.path={tmp_path}/games.jsonl", "data.held_out=2"]
    run(tmp_path / "a", *GUESSING, *data, "run.iterations=2", config="guessing")
    found = metrics(tmp_path / "a")
    assert all(0 < row["reward_errors"] < 16 and row["reward_unscored"] == row["reward_errors"] / 16 for row in found)
    assert "needs a column 'secret'" in (tmp_path / "a" / "reward_errors.txt").read_text()
