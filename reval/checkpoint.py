"""The run folder: what it may hold before a run, and the checkpoints in it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .config import Config, ConfigError
from .replay import Trajectory

WRITTEN = (
    "config.yaml", "metrics.jsonl", "samples.jsonl", "evaluations", "tensorboard", "curves.png", "checkpoint",
    "checkpoints", "reward_errors.txt",
)  # fmt: skip
"""What a run writes. Overwriting removes these and leaves the rest of the folder alone."""


def prepare_folder(config: Config) -> Path:
    """The run's folder, with the resolved settings in it. Raises ConfigError where an earlier run's results lie."""
    folder = Path(config.run.dir)
    found = [name for name in WRITTEN if os.path.lexists(folder / name)]
    if found and not config.run.overwrite:
        raise ConfigError(
            f"run.dir {str(folder)!r} already has results ({', '.join(found)}); give another run.dir, or set "
            "run.overwrite=true to replace them"
        )
    for name in found:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return folder


def save_checkpoint(folder: Path, iteration: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Save what from_pretrained loads, and point the link `checkpoint` to it.

    Both steps are atomic: a checkpoint that has its final name is whole, and the link never dangles. The checkpoint
    before it is removed once the link has moved.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    target = checkpoints / f"iteration-{iteration:06d}"
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=checkpoints))
    unfinished.chmod(0o755)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    if target.exists():
        shutil.rmtree(target)
    unfinished.rename(target)
    link = folder / ".checkpoint-next"
    link.unlink(missing_ok=True)
    link.symlink_to(target.relative_to(folder))
    link.replace(folder / "checkpoint")
    for old in checkpoints.iterdir():
        if old != target:
            shutil.rmtree(old)
    return target


def save_trajectories(path: Path, trajectories: list[Trajectory]) -> Path:
    """Write trajectories for inspection, one JSON object each."""
    rows = (
        {
            "token_ids": t.token_ids.tolist(), "action_mask": t.action_mask.tolist(), "reward": t.reward,
            "score": t.score, "iteration": t.iteration, "uses": t.uses,
            "reference": {k: v for k, v in t.reference.items() if k != "values"},
        }
        for t in trajectories
    )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
