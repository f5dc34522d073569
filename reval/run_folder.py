"""The run folder: the files that a run may overwrite, and the names of its checkpoints.

    checkpoints/iteration-000200/  a checkpoint (checkpoint.py has its contents)
    checkpoint                     link to the newest checkpoint
    best                           link to the checkpoint with the largest run.best_metric

A checkpoint is written under a hidden name and renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .config import Config, ConfigError
from .distributed import World
from .replay import Trajectory

WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "evaluations",
    "tensorboard",
    "curves.png",
    "checkpoint",
    "best",
    "checkpoints",
    "reward_errors.txt",
    "nonfinite.jsonl",
)
"""The names that a run writes. run.overwrite removes these and no other files."""
STATE = "training/state.json"
"""The file that makes a folder a checkpoint of a run."""


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint from which run.resume continues, or None for a new run.

    Raises ConfigError if run.resume is a path without a checkpoint.
    """
    if config.run.resume == "false":
        return None
    folder = Path(config.run.dir if config.run.resume == "auto" else config.run.resume)
    if (folder / STATE).is_file():
        return folder.resolve()
    found = [path for path in checkpoints_in(folder) if (path / STATE).is_file()]
    if found:
        return found[-1].resolve()
    if config.run.resume == "auto":
        return None
    raise ConfigError(
        f"run.resume must be auto, false, or the folder of a checkpoint or of a run that has one; got {str(folder)!r}"
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Every folder named iteration-* is a complete checkpoint."""
    return sorted((folder / "checkpoints").glob("iteration-*"))


def prepare_folder(config: Config, resumed: Path | None, iteration: int) -> Path:
    """Prepare `run.dir` and return it. It then contains config.yaml with the resolved settings.

    Args:
        resumed: the checkpoint from which the run continues, or None.
        iteration: the iteration of that checkpoint. Later checkpoints in the same folder are renamed to left-*, because
            the continued run writes new checkpoints of these iterations.

    Raises ConfigError if the folder has results of another run and the settings do not allow overwriting them.
    """
    folder = Path(config.run.dir)
    found = [name for name in WRITTEN if os.path.lexists(folder / name)]
    if resumed is not None and resumed.is_relative_to(folder.resolve()):
        found = []
        for path in checkpoints_in(folder):
            if path.name > _name(iteration):
                _set_aside(path)
        _link(folder / "checkpoint", folder / resumed.relative_to(folder.resolve()))
    elif found and not (config.run.overwrite or config.run.resume == "auto"):
        raise ConfigError(
            f"run.dir {str(folder)!r} already has results ({', '.join(found)}); give another run.dir, set "
            "run.overwrite=true to replace them, or go on from its checkpoint with --resume auto"
        )
    for name in found:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return folder


def start_checkpoint(folder: Path, world: World) -> Path:
    """Make a folder with a hidden name for a new checkpoint. Every process has to call this and gets the same path."""
    unfinished = ""
    if world.main:
        (folder / "checkpoints").mkdir(exist_ok=True)
        for pattern in (".unfinished-*", ".old-*"):
            for left in (folder / "checkpoints").glob(pattern):
                shutil.rmtree(left)  # from a run that was killed while it saved
        unfinished = tempfile.mkdtemp(prefix=".unfinished-", dir=folder / "checkpoints")
        os.chmod(unfinished, 0o755)  # mkdtemp allows the owner only
    return Path(world.broadcast(unfinished))


def finish_checkpoint(folder: Path, unfinished: Path, iteration: int, config: Config) -> Path:
    """Rename a complete checkpoint to its name, move the links, and delete the checkpoints that exceed
    run.save_total_limit. The best one stays."""
    target = folder / "checkpoints" / _name(iteration)
    if target.exists():
        _hide(target)
    unfinished.rename(target)
    _link(folder / "checkpoint", target)
    best = _best(folder, config.run.best_metric)
    if best is not None:
        _link(folder / "best", best)
    for old in checkpoints_in(folder)[: -config.run.save_total_limit]:
        if old != best:
            _hide(old)
    for left in (folder / "checkpoints").glob(".old-*"):
        shutil.rmtree(left)
    return target


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of training/state.json. Raises ConfigError for a folder that is not a checkpoint of a run."""
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint} is not a checkpoint that a run can go on from: {error}") from None


def save_trajectories(path: Path, trajectories: list[Trajectory]) -> Path:
    """Write trajectories as JSON lines for people to inspect."""
    rows = (
        {
            "token_ids": t.token_ids.tolist(),
            "action_mask": t.action_mask.tolist(),
            "reward": t.reward,
            "score": t.score,
            "iteration": t.iteration,
            "uses": t.uses,
            "reference": {k: v for k, v in t.reference.items() if k != "values"},
        }
        for t in trajectories
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _best(folder: Path, metric: str | None) -> Path | None:
    """The checkpoint with the largest value of the metric; of several, the newest. None if no checkpoint has the
    metric."""
    values = [(read_state(path)["metrics"].get(metric), path) for path in checkpoints_in(folder)]
    return max(((v, path) for v, path in values if v is not None), default=(None, None))[1]


def _hide(checkpoint: Path) -> None:
    """Give a checkpoint a hidden name before it is deleted. Otherwise a run that is killed while it deletes would leave
    an incomplete checkpoint under a valid name."""
    checkpoint.rename(checkpoint.with_name(f".old-{checkpoint.name}"))


def _set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint so that it no longer belongs to the run, without deleting it."""
    target = checkpoint.with_name(f"left-{checkpoint.name}")
    if target.exists():
        shutil.rmtree(target)
    checkpoint.rename(target)


def _name(iteration: int) -> str:
    return f"iteration-{iteration:06d}"


def _link(link: Path, target: Path) -> None:
    """Make a symbolic link. An existing link is replaced in one step, so that it always has a target."""
    new = link.with_name(f".{link.name}-next")
    new.unlink(missing_ok=True)
    new.symlink_to(target.relative_to(link.parent))
    new.replace(link)
