"""Checkpoints: a run that died and was resumed equals an uninterrupted run bit for bit, except for the times.

Most runs here die by an exception in the middle of an iteration. One test kills the process with SIGKILL at random
moments.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made import offline_components
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import reval.loop
import reval.run_folder
from reval.config import ConfigError, load_config
from reval.errors import RunError
from reval.loop import train
from reval.model.loading import load_model
from reval.model.saving import save_model
from reval.model_card import model_card
from reval.replay import ReplayBuffer
from reval.rollout_log import load_rollouts

SMALL = ["run.iterations=7", "run.save_every=2", "data.held_out=4", "evaluation.every=3", "reference.reset_every=3"]


def configured(folder: Path, *overrides: str):
    return load_config(["configs/tiny.yaml"], [*SMALL, f"run.dir={folder}", "run.display=plain", *overrides])


def rows(folder: Path):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "time" not in k and "per_second" not in k} for row in lines]


def same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    a, b = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def die_in(monkeypatch, iteration: int) -> None:
    score_rollouts = reval.loop.score_rollouts

    def dies(rollouts, now, config, components):
        if now == iteration:
            raise RuntimeError("the machine is gone")
        return score_rollouts(rollouts, now, config, components)

    monkeypatch.setattr(reval.loop, "score_rollouts", dies)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim.schedule=linear", "optim.warmup=3", "rollout.dtype=bfloat16", "replay.updates_per_iteration=3"],
        ["lora.rank=2", "rollout.ahead=2", "rollout.sync_every=3", "objective.level=subtrajectory", "optim.lr=1e-2"],
        [
            "objective.name=grpo",
            "reference.reset_every=1",
            "replay.draw=groups",
            "replay.updates_per_iteration=3",
            "reward.function=tests/reval/rewards_by_length.py:score",
            "reward.shaping=normalized",
        ],
    ],
    ids=["plain", "schedule and bf16 rollouts", "adapters, token values, generating ahead", "groups, behaviour"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, overrides):
    train(configured(tmp_path / "whole", *overrides))
    with monkeypatch.context() as patch:
        die_in(patch, 6)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(configured(tmp_path / "dies", *overrides))
    assert len(rows(tmp_path / "dies")) == 5 and (tmp_path / "dies" / "checkpoint").resolve().name.endswith("4")
    train(configured(tmp_path / "dies", "run.resume=auto", *overrides))
    same_run(tmp_path / "dies", tmp_path / "whole")
    last = rows(tmp_path / "whole")[-1]
    assert last["reference/version"] == 7 // configured(tmp_path, *overrides).reference.reset_every
    assert (tmp_path / "dies" / "evaluations" / "iteration-000000.jsonl").exists()


@pytest.mark.slow
def test_kill_9_at_any_moment(tmp_path):
    """SIGKILL arrives up to 0.2 s after a new row of metrics: between two checkpoints, or while a checkpoint is
    written."""
    overrides = ["run.save_every=1", "run.iterations=6"]
    train(configured(tmp_path / "whole", *overrides))
    folder, rng = tmp_path / "killed", random.Random(0)
    arguments = [*SMALL, f"run.dir={folder}", *overrides]
    command = [sys.executable, "-m", "reval.train", "configs/tiny.yaml", *arguments, "--resume", "auto"]

    def logged() -> int:
        path = folder / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    for reached in (2, 4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + 200
        while logged() < reached and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for path in (folder / "checkpoints").glob("iteration-*"):
            AutoModelForCausalLM.from_pretrained(path)  # a folder with a final name is a complete checkpoint
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    same_run(folder, tmp_path / "whole")


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """2 processes, then 1, then 2. The change has no effect on the buffer, the schedule, the reference and the order of
    the problems."""
    folder, steps = tmp_path / "run", [("2", 2), ("1", 4), ("2", 6)]
    for processes, iterations in steps:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        arguments = [*SMALL, f"run.dir={folder}", f"run.iterations={iterations}", "evaluation.every=0"]
        command = [*launch, "-m", "reval.train", "configs/tiny.yaml", *arguments, "--resume", "auto"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]
    got = rows(folder)
    assert [row["iteration"] for row in got] == [1, 2, 3, 4, 5, 6]
    assert [row["buffer/size"] for row in got] == [16, 32, 32, 32, 32, 32]
    assert [row["reference/version"] for row in got] == [0, 0, 1, 1, 1, 2]
    tokens = [row["num_tokens"] for row in got]
    assert tokens == sorted(tokens)
    train(configured(tmp_path / "one", "run.iterations=6", "evaluation.every=0"))
    # the answers differ, because each process has a different seed; the problems and their order are the same
    asked = [
        [json.loads(line)["prompt"] for line in (f / "samples.jsonl").read_text().splitlines()]
        for f in (folder, tmp_path / "one")
    ]
    assert asked[0] == asked[1]


def test_a_run_does_not_go_on_with_other_problems(tmp_path, capsys):
    path, folder = tmp_path / "p.jsonl", tmp_path / "run"
    rows_of = [{"prompt": f"{i}+1", "answer": i + 1} for i in range(5)]
    settings = ["data.source=jsonl", f"data.path={path}", "run.iterations=1", "evaluation.every=0"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of))
    train(configured(folder, *settings))
    assert "training has 1 problem (data.held_out=4), fewer than rollout.prompts=4" in capsys.readouterr().out
    path.write_text("".join(json.dumps(row | {"answer": 0}) + "\n" for row in rows_of))
    again = configured(folder, *settings, "run.resume=auto", "run.iterations=2")
    with pytest.raises(ConfigError, match="the training problems are not those of .*iteration-000001"):
        train(again)


def test_which_checkpoints_are_kept(tmp_path):
    train(configured(tmp_path, "run.save_every=1", "run.save_total_limit=2", "run.best_metric=completions/mean_length"))
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    lengths = {row["completions/mean_length"]: row["iteration"] for row in rows(tmp_path)}
    best = f"iteration-{lengths[max(lengths)]:06d}"
    assert kept == {"iteration-000006", "iteration-000007", best}
    assert (tmp_path / "best").resolve().name == best and (tmp_path / "checkpoint").resolve().name == "iteration-000007"
    card = (tmp_path / "checkpoint" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: tiny\n") and "| reward |" in card


def test_a_model_card_names_the_objective_and_no_folder_of_the_user():
    settings = ["objective.name=/home/me/losses.py:huber", "data.name=basic_arithmetic"]
    card = model_card(load_config([], settings), 3, {})
    assert "objective `huber`;" in card and "- huber\n" in card and "/home" not in card and "arXiv" not in card
    assert "objective `reval` ([arXiv 2603.23355]" in model_card(load_config(), 3, {})


def test_the_reference_is_written_once_for_each_version(tmp_path):
    train(configured(tmp_path, "run.save_every=1", "run.save_total_limit=9", "reference.reset_every=3"))
    folders = sorted((tmp_path / "checkpoints").iterdir())
    nodes = [(folder / "training" / "reference" / "model.safetensors").stat().st_ino for folder in folders]
    assert len(set(nodes)) == 3 and nodes[0] == nodes[1] != nodes[2] == nodes[4] != nodes[5]


def test_the_only_pickle_in_a_checkpoint_is_the_index_of_dcp(tmp_path):
    train(configured(tmp_path))
    names = {p.name for p in (tmp_path / "checkpoint").rglob("*") if p.is_file()}
    allowed = (".safetensors", ".json", ".md", ".yaml", ".jinja", ".distcp")
    assert {n for n in names if not n.endswith(allowed)} == {".metadata"}


def test_logged_rollouts_are_replayed(tmp_path, capsys):
    rollouts = tmp_path / "rollouts.jsonl"
    row = {"prompt_ids": [10, 11, 12], "response_ids": [13, 14, 1], "reward": 1.0}
    rollouts.write_text("".join(json.dumps(row | {"response_ids": [13 + i, 1]}) + "\n" for i in range(40)))
    train(configured(tmp_path / "run", f"replay.preload={rollouts}", "run.iterations=1"))
    first = rows(tmp_path / "run")[0]
    assert first["buffer/size"] == 32 and first["reval/replay/residual_abs"] > 1, "with rewards of 1 / beta = 10"
    assert "replay.preload has 40 rollouts, of which the last 32 stay (replay.capacity)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="replay.preload"):
        train(configured(tmp_path / "none", "replay.preload=nowhere.jsonl"))


def test_one_run_writes_the_rollouts_that_another_run_preloads(tmp_path, monkeypatch):
    """The run dies in iteration 6 and goes on after iteration 4: its file equals that of an uninterrupted run."""
    log = ["tracking.rollouts=true", "data.held_out=0", "replay.capacity=112"]
    train(configured(tmp_path / "whole", *log))
    with monkeypatch.context() as patch:
        die_in(patch, 6)
        with pytest.raises(RuntimeError, match="the machine is gone"):
            train(configured(tmp_path / "dies", *log))
    train(configured(tmp_path / "dies", "run.resume=auto", *log))
    written = tmp_path / "dies" / "rollouts.jsonl"
    assert written.read_text() == (tmp_path / "whole" / "rollouts.jsonl").read_text()
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [i for i in range(1, 8) for _ in range(16)]
    config = configured(tmp_path / "new", f"replay.preload={written}", "replay.capacity=112")
    saved = load_file(tmp_path / "whole" / "checkpoint" / "training" / "replay.safetensors")
    loaded = ReplayBuffer(112)
    loaded.add(load_rollouts(config, offline_components(*load_model(config.model))).trajectories)
    for name in ("token_ids", "action_mask", "lengths", "numbers"):
        assert loaded.state()[name].tolist() == saved[name].tolist(), name


def test_a_resume_with_another_shaping_is_refused(tmp_path):
    """The buffer holds shaped rewards."""
    train(configured(tmp_path, "run.iterations=1", "data.held_out=0"))
    with pytest.raises(ConfigError, match="reward.shaping must stay 'plus_minus_one'.*got 'centered'"):
        train(configured(tmp_path, "run.resume=auto", "reward.shaping=centered", "data.held_out=0"))


def test_a_resume_that_cannot_work_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="run.resume must be auto, false, or the folder of a checkpoint"):
        train(configured(tmp_path / "run", "run.resume=nowhere"))
    assert not (tmp_path / "run").exists()
    train(configured(tmp_path / "old", "run.iterations=1"))
    state = tmp_path / "old" / "checkpoint" / "training" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 99}))
    with pytest.raises(ConfigError, match="has format 99; this version of reval reads 3"):
        train(configured(tmp_path / "old", "run.resume=auto"))


def test_a_run_can_start_from_another_runs_checkpoint(tmp_path):
    train(configured(tmp_path / "one", "run.iterations=2"))
    train(configured(tmp_path / "two", "run.iterations=4", f"run.resume={tmp_path / 'one'}"))
    assert [row["iteration"] for row in rows(tmp_path / "two")] == [3, 4]
    shutil.rmtree(tmp_path / "one")
    AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "checkpoint")


def test_resuming_from_an_earlier_checkpoint_renames_the_later_ones(tmp_path):
    keep = ["run.save_total_limit=3", "reference.reset_every=4"]
    train(configured(tmp_path, "run.iterations=6", *keep))
    whole = rows(tmp_path)
    early = tmp_path / "checkpoints" / "iteration-000002"
    train(configured(tmp_path, "run.iterations=4", "optim.lr=5e-3", f"run.resume={early}", *keep))
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"iteration-000002", "iteration-000004", "left-iteration-000004", "left-iteration-000006"}
    assert (tmp_path / "checkpoint").resolve().name == "iteration-000004"
    assert [row["iteration"] for row in rows(tmp_path)] == [1, 2, 3, 4] and rows(tmp_path)[:2] == whole[:2]
    # both references have version 1, but their weights differ
    new, old = (
        (tmp_path / "checkpoints" / f"{name}iteration-000004" / "training" / "reference" / "model.safetensors")
        for name in ("", "left-")
    )
    assert new.read_bytes() != old.read_bytes()


def test_another_runs_folder_is_not_taken_over(tmp_path):
    train(configured(tmp_path / "one", "run.iterations=2"))
    train(configured(tmp_path / "two", "run.iterations=1"))
    before = (tmp_path / "two" / "metrics.jsonl").read_text()
    with pytest.raises(ConfigError, match="already has results"):
        train(configured(tmp_path / "two", f"run.resume={tmp_path / 'one'}"))
    assert (tmp_path / "two" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("change", ["lora.rank=2", "model.dtype=bfloat16"])
def test_settings_that_must_stay_are_named(tmp_path, change):
    train(configured(tmp_path, "run.iterations=1"))
    with pytest.raises(ConfigError, match=change.partition("=")[0]):
        train(configured(tmp_path, "run.iterations=2", "run.resume=auto", change))


def test_settings_that_may_change_are_taken(tmp_path):
    train(configured(tmp_path, "run.iterations=2"))
    changes = ["objective.level=token", "optim.weight_decay=0.3", "replay.capacity=16", "run.iterations=3"]
    train(configured(tmp_path, "run.resume=auto", *changes))
    last = rows(tmp_path)[-1]
    assert last["iteration"] == 3 and last["buffer/size"] == 16


def test_a_resume_that_now_resets_every_iteration_starts_with_its_policy_as_the_reference(tmp_path):
    """Behaviour log-probs are those of the reference, so it must be the policy that generates the first responses."""
    train(configured(tmp_path, "run.iterations=1"))
    train(configured(tmp_path, "run.iterations=2", "run.resume=auto", "reference.reset_every=1"))
    first, second = rows(tmp_path)
    assert (first["reference/version"], second["reference/version"]) == (0, 2)
    assert first["reval/log_ratio"] == second["reval/log_ratio"] == 0


def test_a_generation_config_that_samples_without_saying_so_is_saved(tiny, tmp_path):
    model, _ = tiny
    model.generation_config.temperature, model.generation_config.do_sample = 0.6, False
    save_model(model, tmp_path, write=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.6
    assert model.generation_config.do_sample is False


def test_other_files_in_the_checkpoints_folder_stay(tmp_path):
    (tmp_path / "checkpoints" / ".mine").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".DS_Store").write_text("x")
    train(configured(tmp_path, "run.iterations=1", "run.overwrite=true", "run.resume=auto"))
    assert (tmp_path / "checkpoint" / "config.json").exists()


def test_a_finished_run_has_nothing_to_do(tmp_path, capsys):
    train(configured(tmp_path, "run.iterations=2"))
    before = (tmp_path / "metrics.jsonl").read_text()
    assert train(configured(tmp_path, "run.iterations=2", "run.resume=auto")) == {}
    assert "nothing to do: the checkpoint is after 2 of 2 iterations" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_reward_that_its_shaping_cannot_take_ends_the_run_with_a_message(tmp_path):
    (tmp_path / "threes.py").write_text(
        "def score(prompts, completions, completion_ids, **columns):\n    return [3.0] * len(completions)\n"
    )
    settings = [f"reward.function={tmp_path}/threes.py:score", "reward.shaping=plus_minus_one", "data.held_out=0"]
    with pytest.raises(RunError, match="iteration 1: reward.shaping=plus_minus_one: .* expects rewards in 0..1"):
        train(configured(tmp_path / "run", *settings))
    assert (tmp_path / "run" / "samples.jsonl").read_text(), "the responses that were refused are recorded"


def test_a_checkpoint_is_renamed_before_it_is_deleted(tmp_path, monkeypatch):
    """A run that dies in the middle of a deletion must not leave half a checkpoint under the name of a complete one."""
    deleted, rmtree = [], shutil.rmtree

    def note(path, *args, **kwargs):
        deleted.append(Path(path).name)
        rmtree(path, *args, **kwargs)

    monkeypatch.setattr(reval.run_folder.shutil, "rmtree", note)
    train(configured(tmp_path, "run.iterations=4", "run.save_every=1"))
    assert [name for name in deleted if "iteration-" in name] == [f".old-iteration-00000{i}" for i in (1, 2, 3)]
