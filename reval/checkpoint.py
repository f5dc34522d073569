"""Checkpoints: saving and loading the state of a run. A resumed run computes the same as an uninterrupted run.

A checkpoint is a folder that from_pretrained loads. Beside the model it contains:

    training/state.json          iteration, counters, random state, responses generated ahead, the trackers' state,
                                 and the sizes of the files that hold tensors
    training/replay.safetensors  the buffer: trajectories, rewards, and the reference's values with their versions
    training/rng.safetensors     the torch generators of every process
    training/optimizer/          in the format of torch.distributed.checkpoint (DCP), for any number of processes
    training/reference/          the reference, as from_pretrained's files; hard links while the reference is the same
    adapters.safetensors         with lora.rank: the adapters of the policy and of the reference

No file is a pickle, except DCP's own `.metadata`.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors
from torch.distributed.checkpoint.api import CheckpointException

from .config import Config, ConfigError, load_config
from .config_io import show
from .distributed import World
from .errors import RunError
from .model.lora import save_adapters
from .model.saving import save_model
from .model_card import model_card
from .run_folder import STATE, finish_checkpoint, keep_best_and_newest, read_state, sizes, start_checkpoint

if TYPE_CHECKING:  # training_run.py imports this module
    from .training_run import TrainingRun

FORMAT = 3
"""3: a trajectory has its group and may have behaviour log-probs."""
# Settings that decide what the weights, the buffer and the order of the problems mean. A resumed run must have those of
# its checkpoint. docs/scale.md lists all other settings: a resumed run may change them.
FIXED = (
    "model.name",
    "model.dtype",
    "data.source",
    "data.name",
    "data.options",
    "data.subset",
    "data.split",
    "data.columns",
    "data.template",
    "data.system_prompt",
    "data.chat_template_kwargs",
    "data.size",
    "data.held_out",
    "data.seed",
    "reward.function",
    "reward.shaping",
    "environment.name",
    "environment.options",
    "replay.preload",
    "replay.preload_shaping",
    "lora.rank",
    "lora.alpha",
    "lora.targets",
    "run.seed",
)


def save_checkpoint(folder: Path, run: TrainingRun, metrics: dict[str, float]) -> None:
    """Save the state of the run after iteration `run.iteration`. Every process has to call this.

    The folder gets its final name after all files are written. So a run that is killed earlier leaves no checkpoint.

    Raises RunError on every process if a file cannot be written. The checkpoints are then as before.
    """
    world, unwritten = run.world, Unwritten()
    with _as_run_error(run):
        unfinished = start_checkpoint(folder, world)
    with unwritten:
        save_model(run.learner.model, unfinished, world.main)
    with unwritten:
        save_adapters(run.learner.model, unfinished, world.main)
    with unwritten, _without_warning(world):
        dcp.save(run.learner.state(), checkpoint_id=unfinished / "training" / "optimizer")
    _save_reference(run.previous, unfinished, run, unwritten)
    generators = world.gather(_generators())
    ahead = run.generation.state()
    with unwritten:
        if world.main and not unwritten.errors:
            _write_rest(unfinished, run, metrics, generators, ahead)
    errors = [error for errors in world.gather(unwritten.errors) for error in errors]
    if errors:
        free = shutil.disk_usage(folder).free // 10**6  # torch's own error may not say that the disk is full
        world.barrier()
        if world.main:
            shutil.rmtree(unfinished, ignore_errors=True)  # frees the space too
        raise _not_saved(run, f"{'' if free else 'the disk is full: '}{errors[0]} ({free} MB were free)")
    finished = functools.partial(finish_checkpoint, folder, unfinished, run.iteration, run.config)
    with _as_run_error(run):
        run.previous = world.broadcast(world.together(lambda: finished() if world.main else folder))


def complete_checkpoint(run: TrainingRun, metrics: dict[str, float]) -> None:
    """Add to the newest checkpoint what was not known when it was saved: the metrics of the evaluation of its
    iteration, and the trackers' state after the iteration was logged. Every process has to call this."""
    checkpoint = run.previous
    if checkpoint is None or not checkpoint.resolve().is_relative_to(run.folder.resolve()):
        return  # it belongs to another run, from which this one continued

    def complete() -> None:
        state = read_state(checkpoint) | {"metrics": metrics, "tracker": run.tracker.state()}
        for name, text in ((STATE, json.dumps(state)), ("README.md", model_card(run.config, run.iteration, metrics))):
            new = checkpoint / f"{name}-new"
            new.write_text(text, encoding="utf-8")
            new.replace(checkpoint / name)
        keep_best_and_newest(run.folder, run.config)

    with _as_run_error(run):
        run.world.together(lambda: complete() if run.world.main else None)


class Unwritten:
    """Context manager for blocks that write files. It catches the errors of a full disk and keeps their texts in
    `errors`, because a process that raised alone would leave the others waiting."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, OSError | SafetensorError | CheckpointException):
            return False
        failures = error.failures.values() if isinstance(error, CheckpointException) else ()
        causes = [failure[0] if isinstance(failure, tuple) else failure for failure in failures]
        self.errors.append(" ".join(str(next(iter(causes), error)).split()))
        return True


@contextmanager
def _as_run_error(run: TrainingRun) -> Iterator[None]:
    """Within the block, an error that all processes have together says that the checkpoint was not saved."""
    try:
        yield
    except ConfigError as error:
        raise _not_saved(run, str(error)) from error


def _not_saved(run: TrainingRun, error: str) -> RunError:
    newest = f"the newest one is {run.previous}" if run.previous else "there is none yet"
    return RunError(f"the checkpoint of iteration {run.iteration} could not be saved: {error}; {newest}")


def _write_rest(
    unfinished: Path,
    run: TrainingRun,
    metrics: dict[str, float],
    generators: list[dict[str, torch.Tensor]],
    ahead: dict[str, Any],
) -> None:
    """Write the files that the main process writes alone: all except weights and optimizer. state.json is the last."""
    training = unfinished / "training"
    run.tokenizer.save_pretrained(unfinished)
    (unfinished / "README.md").write_text(model_card(run.config, run.iteration, metrics), encoding="utf-8")
    (unfinished / "config.yaml").write_text(run.config.to_yaml(), encoding="utf-8")
    save_file(run.buffer.state(), training / "replay.safetensors")
    named = {f"{rank}/{device}": state for rank, of in enumerate(generators) for device, state in of.items()}
    save_tensors(named, training / "rng.safetensors")
    state = {
        "format": FORMAT,
        "iteration": run.iteration,
        "metrics": metrics,
        "updates": run.learner.updates,
        "reference_version": run.reference.version,
        "problems_drawn": run.problems.drawn,
        "problem_digests": run.problem_digests,
        "rng": run.rng.getstate(),
        "ahead": ahead,
        "tracker": run.tracker.state(),
        "files": sizes(unfinished),
    }
    (unfinished / STATE).write_text(json.dumps(state), encoding="utf-8")


def load_checkpoint(checkpoint: Path, run: TrainingRun) -> None:
    """Set the state of the run to that of the checkpoint, except for the weights: these are loaded with the model.

    `check_settings` comes first. Raises ConfigError if the problems are others than those of the checkpoint.
    """
    state, training = read_state(checkpoint), checkpoint / "training"
    _check_problems(run.problem_digests, state["problem_digests"], checkpoint)
    run.iteration = state["iteration"]
    run.reference.version = state["reference_version"]
    run.problems.drawn = state["problems_drawn"]
    version, inner, gauss = state["rng"]
    run.rng.setstate((version, tuple(inner), gauss))
    run.buffer.load_state(load_file(training / "replay.safetensors"))
    optimizer = run.learner.state()
    with _without_warning(run.world):
        dcp.load(optimizer, checkpoint_id=training / "optimizer")
    run.learner.load_state(optimizer, state["updates"])
    run.generation.load_state(state["ahead"])
    _set_generators(load_tensors(training / "rng.safetensors"), run.world.rank)


def check_settings(config: Config, checkpoint: Path) -> None:
    """Raise ConfigError if the checkpoint has another format, or if a setting has changed that must stay."""
    state = read_state(checkpoint)
    if state["format"] != FORMAT:
        raise ConfigError(f"{checkpoint} has format {state['format']}; this version of reval reads {FORMAT}")
    saved, now = load_config([checkpoint / "config.yaml"]).to_dict(), config.to_dict()
    # Responses that were generated ahead are still in groups of the old size.
    ahead = ("rollout.prompts", "rollout.responses") if state["ahead"]["requests"] else ()
    for name in (*FIXED, *ahead):
        section, key = name.split(".")
        if saved[section][key] != now[section][key]:
            raise ConfigError(
                f"{name} must stay {show(saved[section][key])} to go on from {checkpoint}; got "
                f"{show(now[section][key])}. To train its weights with other settings, start a new run with "
                f"model.name={checkpoint} and another run.dir"
            )


def _check_problems(now: dict[str, str], saved: dict[str, str], checkpoint: Path) -> None:
    """Raise ConfigError if the problems are others than those of the checkpoint."""
    for name, digest in saved.items():
        if name in now and now[name] != digest:  # with rollout.engine=none there are no training problems
            raise ConfigError(
                f"the {name} problems are not those of {checkpoint}, so the run cannot go on from it: the settings "
                "under data, the data itself, evaluation.benchmarks (training leaves their problems out), the "
                "tokenizer, its chat template or the version of reasoning_gym has changed"
            )


def _save_reference(previous: Path | None, unfinished: Path, run: TrainingRun, unwritten: Unwritten) -> None:
    """Save the weights of the reference. If the previous checkpoint has the same version of the reference, make hard
    links to its files instead."""
    if run.reference.model is None:
        return
    target, same = unfinished / "training" / "reference", False
    if run.world.main and previous is not None and previous.is_dir():
        source = previous / "training" / "reference"
        same = source.is_dir() and read_state(previous)["reference_version"] == run.reference.version
    same = run.world.broadcast(same)
    with unwritten:
        if not same:
            save_model(run.reference.model, target, run.world.main)
            if run.world.main:
                run.tokenizer.save_pretrained(target)
        elif run.world.main:
            target.mkdir(parents=True, exist_ok=True)
            for file in source.iterdir():
                try:
                    os.link(file, target / file.name)
                except OSError:  # this file system has no hard links
                    shutil.copy2(file, target / file.name)


@contextmanager
def _without_warning(world: World) -> Iterator[None]:
    """Hide DCP's warning that torch.distributed is not initialized: with one process this is intended."""
    with warnings.catch_warnings():
        if world.size == 1:
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _generators() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_generators(saved: dict[str, Any], rank: int) -> None:
    if f"{rank}/cpu" in saved:
        torch.set_rng_state(saved[f"{rank}/cpu"])
    if f"{rank}/cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved[f"{rank}/cuda"])
