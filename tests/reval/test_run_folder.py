"""The run folder: its lock, its checkpoints when something fails, and what `run.overwrite` deletes.

Most tests share one finished run, because a run takes seconds.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from test_checkpoint import configured, rows, same_run
from torch.distributed.checkpoint.api import CheckpointException

import reval.checkpoint
import reval.loop
import reval.run_lock
import reval.tracking
from reval import config_io
from reval.checkpoint import FIXED, Unwritten, check_settings
from reval.config import Config, ConfigError
from reval.errors import RunError
from reval.evaluation.answers import Answered, Evaluation
from reval.loop import train
from reval.metric_names import TRAINING, check_best_metric
from reval.rewards import RewardError
from reval.run_folder import find_checkpoint
from reval.run_lock import LOCK, locked, refuse_running

QUICK = ["tracking.tensorboard=false", "run.iterations=3", "evaluation.every=0", "reference.reset_every=0"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three iterations that kept all its checkpoints. Its umask allowed the group to read."""
    folder, before = tmp_path_factory.mktemp("runs") / "run", os.umask(0o027)
    train(configured(folder, *QUICK, "run.save_every=1", "run.save_total_limit=3"))
    os.umask(before)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def accuracy(value: float) -> Evaluation:
    return Evaluation([Answered("1 + 1", ["2"], [value], "2", value, lengths=[1], finished=[True])])


# ---- The lock ----


def test_a_second_run_in_the_folder_is_refused_before_it_loads_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(reval.loop, "build", None)
    with locked(tmp_path):
        for enter in (lambda: locked(tmp_path).__enter__(), lambda: train(configured(tmp_path, *QUICK))):
            with pytest.raises(ConfigError, match=f"in use by another run .process {os.getpid()} on .*, since 20"):
                enter()
    refuse_running(tmp_path)


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = "import sys, time; from reval.run_lock import *\nwith locked(Path(sys.argv[1])): print(1); time.sleep(99)"
    holder = subprocess.Popen([sys.executable, "-uc", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"1\n"
    with pytest.raises(ConfigError, match=f"process {holder.pid} on"):
        refuse_running(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == ""


def test_a_run_on_another_machine_that_did_not_end_properly_is_mentioned(tmp_path):
    (tmp_path / LOCK).write_text('{"host": "node7", "process": 5, "since": "2026-11-01 10:00:00"}')
    with pytest.warns(UserWarning, match="process 5 on node7 since 2026-11-01 10:00:00, did not end properly"):
        with locked(tmp_path):
            pass


def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(reval.run_lock.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="has no locks .No locks available."), locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=f"run.dir '{folder}' cannot be made or written: "):
            train(configured(folder, *QUICK))


# ---- What a resumed run may change ----


def test_every_setting_is_fixed_or_listed_as_free():
    """A new setting must be in FIXED, or in the list of docs/scale.md."""
    text = Path("docs/scale.md").read_text(encoding="utf-8")
    section = re.search(r"may change all other settings:\n\n(.*?)\n\n", text, re.DOTALL)[1]
    names = set(re.findall(r"`(\w+\.\w+)`", section))
    for name in re.findall(r"`(\w+)\.\*`", section):
        names |= {setting for setting in config_io.settings(Config) if setting.startswith(f"{name}.")}
    assert not names & set(FIXED) and names | set(FIXED) == set(config_io.settings(Config))


@pytest.mark.parametrize(
    ("change", "was"),
    {
        "lora.alpha=64": "32.0",
        "lora.rank=2": "0",
        "model.name=/no/such/model": "'tiny'",
        "model.dtype=bfloat16": "'float32'",
        "data.size=999": "1000",
        "data.template={question}!": "'{question} Reply with only the number.'",
        "reward.function=math": "'number'",
        "run.seed=1": "0",
    }.items(),
)
def test_what_must_stay_is_refused_with_both_values(finished, change, was, monkeypatch):
    monkeypatch.setattr(reval.loop, "build", None)  # before the model is loaded
    name, _, now = change.partition("=")
    with pytest.raises(ConfigError, match=re.escape(f"{name} must stay {was} to go on from")) as caught:
        train(configured(finished, *QUICK, "run.resume=auto", change))
    assert now in str(caught.value) and change not in (finished / "config.yaml").read_text()


def test_other_settings_may_change(finished):
    config = configured(finished, "run.resume=auto", "optim.lr=1", "run.iterations=9", "lora.targets=all-linear")
    check_settings(config, finished / "checkpoint")


# ---- Damage and a full disk ----


@pytest.mark.parametrize("name", ["model.safetensors", "training/state.json", "training/replay.safetensors", ".distcp"])
@pytest.mark.parametrize("change", ["truncated", "missing"])
def test_a_damaged_checkpoint_is_named_and_so_is_the_newest_whole_one(copied, name, change):
    newest = (copied / "checkpoint").resolve()
    file = next(newest.rglob("*.distcp")) if name == ".distcp" else newest / name
    if change == "missing":
        file.unlink()
    else:
        os.truncate(file, file.stat().st_size // 2)
    message = f"{newest} is damaged: .*{file.name}.*--resume {newest.with_name('iteration-000002')}$"
    with pytest.raises(ConfigError, match=message):
        find_checkpoint(configured(copied, "run.resume=auto"))


def test_a_full_disk_ends_the_run_with_a_message_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    saved = []

    def full(*args):
        saved.append(1)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_file(*args)

    save_file = reval.checkpoint.save_file
    monkeypatch.setattr(reval.checkpoint, "save_file", full)
    monkeypatch.setattr(reval.checkpoint.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**5))
    small = [*QUICK, "run.save_every=1", "data.held_out=0"]
    message = r"of iteration 2 could not be saved: the disk is full: .* \(0 MB were free\); the newest .*000001"
    with pytest.raises(RunError, match=message):
        train(configured(tmp_path, *small))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000001"]
    train(configured(tmp_path, *small, "run.resume=auto"))
    assert (tmp_path / "checkpoint").resolve().name == "iteration-000003"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device"),
        CheckpointException("write", {0: (RuntimeError("No space left on device"), [])}),
    ],
)
def test_a_full_disk_has_many_faces(error):
    unwritten = Unwritten()
    with unwritten:
        raise error
    assert len(unwritten.errors) == 1 and "No space left on device" in unwritten.errors[0]
    with pytest.raises(KeyError), unwritten:
        raise KeyError


def test_a_disk_that_fills_between_two_checkpoints_is_a_message_too(finished, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reval.tracking.Tracker, "samples", full)
    with pytest.raises(RunError, match="^No space left on device: .*; nothing was saved yet"):
        train(configured(tmp_path, *QUICK, "data.held_out=0"))


def test_the_umask_decides_who_may_read_a_checkpoint(finished):
    paths = [path for path in (finished / "checkpoints").rglob("*") if path.is_file()]
    assert any(path.name == "model.safetensors" for path in paths)
    assert {oct(path.stat().st_mode & 0o777) for path in paths} == {"0o640"}
    assert {oct(path.stat().st_mode & 0o777) for path in (finished / "checkpoints").iterdir()} == {"0o750"}


def test_a_tracker_that_does_not_start_deletes_no_results(copied, monkeypatch):
    def down(*_):
        raise ConfigError("tracking.wandb: it did not start")

    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    monkeypatch.setattr(reval.tracking, "start", down)
    with pytest.raises(ConfigError, match="did not start"):
        train(configured(copied, *QUICK, "run.overwrite=true"))
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    monkeypatch.undo()
    train(configured(copied, *QUICK, "run.overwrite=true", "run.iterations=1"))
    assert [row["iteration"] for row in rows(copied)] == [1] and not (copied / ".replaced").exists()


# ---- Evaluations and checkpoints ----


def test_a_new_best_is_saved_when_it_is_found(tmp_path, monkeypatch):
    values = iter([0.0, 0.875, 1.0, 0.8125])  # before training, after iterations 2, 4 and 5
    monkeypatch.setattr(reval.loop, "evaluate_components", lambda *_: accuracy(next(values)))
    settings = ["run.iterations=5", "run.save_every=3", "evaluation.every=2", "run.best_metric=eval/accuracy"]
    train(configured(tmp_path, *QUICK, *settings))
    assert (tmp_path / "best").resolve().name == "iteration-000004"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"iteration-000004", "iteration-000005"}
    assert "| eval/accuracy | 0.8125 |" in (tmp_path / "checkpoint" / "README.md").read_text()
    assert set(rows(tmp_path)[-1]) - {"iteration"} <= {*TRAINING, *accuracy(1.0).metrics()}


def test_a_best_metric_that_nobody_logs_is_refused_at_the_start(tmp_path):
    for given, message in {
        "eval/acuracy": "got 'eval/acuracy'; did you mean 'eval/accuracy'?",
        "val": "got 'val'. The metrics of its evaluations: eval/accuracy, ",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            train(configured(tmp_path / "run", *QUICK, f"run.best_metric={given}"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="none, because there are no held-out problems"):
        check_best_metric(configured(tmp_path, "run.best_metric=eval/accuracy"), [])


def test_the_checkpoint_comes_before_an_evaluation_that_dies(finished, tmp_path, monkeypatch):
    calls = []

    def dies(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the machine is gone")
        return evaluate_components(*args)

    evaluate_components = reval.loop.evaluate_components
    monkeypatch.setattr(reval.loop, "evaluate_components", dies)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        train(configured(tmp_path, *QUICK))
    assert (tmp_path / "checkpoint").resolve().name == "iteration-000003" and len(rows(tmp_path)) == 2
    metrics = train(configured(tmp_path, *QUICK, "run.resume=auto"))
    same_run(tmp_path, finished)
    evaluation = (tmp_path / "evaluations" / "iteration-000003.jsonl").read_text()
    assert evaluation == (finished / "evaluations" / "iteration-000003.jsonl").read_text()
    assert metrics["eval/accuracy"] == rows(finished)[-1]["eval/accuracy"]
    assert train(configured(tmp_path, *QUICK, "run.resume=auto")) == {}, "there is nothing left to do"


def test_a_reward_function_that_breaks_in_an_evaluation_names_its_iteration(tmp_path, monkeypatch):
    def broken(*_):
        raise RewardError("no rewards")

    monkeypatch.setattr(reval.loop, "evaluate_components", broken)
    with pytest.raises(RunError, match="^the evaluation after iteration 0: no rewards\nnothing was saved yet$"):
        train(configured(tmp_path, *QUICK))
