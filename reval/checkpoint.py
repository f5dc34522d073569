"""Checkpoints: saving and loading the state of a run. A resumed run computes the same as an uninterrupted run.

A checkpoint is a folder that from_pretrained loads. Beside the model it contains:

    training/state.json          iteration, counters, random state, responses generated ahead, the trackers' state
    training/replay.safetensors  the buffer: trajectories, rewards, and the reference's values with their versions
    training/rng.safetensors     the torch generators of every process
    training/optimizer/          in the format of torch.distributed.checkpoint (DCP), for any number of processes
    training/reference/          the reference, as from_pretrained's files; hard links while the reference is the same
    adapters.safetensors         with lora.rank: the adapters of the policy and of the reference

No file is a pickle, except DCP's own `.metadata`.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file as save_tensors

from .config import Config, ConfigError, load_config
from .distributed import World
from .model.lora import save_adapters
from .model.saving import save_model
from .model_card import model_card
from .run_folder import STATE, finish_checkpoint, read_state, start_checkpoint

if TYPE_CHECKING:  # training_run.py imports this module
    from .training_run import TrainingRun

FORMAT = 1


def save_checkpoint(folder: Path, run: TrainingRun, metrics: dict[str, float]) -> None:
    """Save the state of the run after iteration `run.iteration`. Every process has to call this.

    The folder gets its final name after all files are written. So a run that is killed earlier leaves no checkpoint.
    """
    world, model = run.world, run.learner.model
    unfinished = start_checkpoint(folder, world)
    save_model(model, unfinished, world.main)
    save_adapters(model, unfinished, world.main)
    with _without_warning(world):
        dcp.save(run.learner.state(), checkpoint_id=unfinished / "training" / "optimizer")
    _save_reference(run.previous, unfinished, run)
    generators = world.gather(_generators())
    ahead = run.generation.state()
    if world.main:
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
            "rng": run.rng.getstate(),
            "ahead": ahead,
            "tracker": run.tracker.state(),
        }
        (unfinished / STATE).write_text(json.dumps(state), encoding="utf-8")
    world.barrier()
    finished = finish_checkpoint(folder, unfinished, run.iteration, run.config) if world.main else None
    run.previous = world.broadcast(finished)


def load_checkpoint(checkpoint: Path, run: TrainingRun) -> None:
    """Set the state of the run to that of the checkpoint, except for the weights: these are loaded with the model.

    Raises ConfigError for another format and for settings that must not change.
    """
    state, training = read_state(checkpoint), checkpoint / "training"
    if state["format"] != FORMAT:
        raise ConfigError(f"{checkpoint} has format {state['format']}; this version of reval reads {FORMAT}")
    _check_settings(run.config, checkpoint, bool(state["ahead"]["requests"]))
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


def _check_settings(config: Config, checkpoint: Path, ahead: bool) -> None:
    """Raise ConfigError if a setting that determines the shape of the saved state has changed.

    Args:
        ahead: the checkpoint has responses that were generated ahead.
    """
    saved, now = load_config([checkpoint / "config.yaml"]).to_dict(), config.to_dict()
    fixed = ["model.dtype", "lora.rank", "lora.targets"]
    fixed += ["rollout.prompts", "rollout.responses"] if ahead else []
    for name in fixed:
        section, key = name.split(".")
        if saved[section][key] != now[section][key]:
            raise ConfigError(
                f"{name} must stay {saved[section][key]!r} to go on from {checkpoint}; got {now[section][key]!r}"
            )


def _save_reference(previous: Path | None, unfinished: Path, run: TrainingRun) -> None:
    """Save the weights of the reference. If the previous checkpoint has the same version of the reference, make hard
    links to its files instead."""
    if run.reference.model is None:
        return
    target, same = unfinished / "training" / "reference", False
    if run.world.main and previous is not None and previous.is_dir():
        source = previous / "training" / "reference"
        same = source.is_dir() and read_state(previous)["reference_version"] == run.reference.version
    if not run.world.broadcast(same):
        save_model(run.reference.model, target, run.world.main)
        if run.world.main:
            run.tokenizer.save_pretrained(target)
    elif run.world.main:
        target.mkdir(parents=True)
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
