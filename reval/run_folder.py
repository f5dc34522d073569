"""The run folder: what it may hold before a run, and the checkpoints in it.

A checkpoint is a folder that from_pretrained loads, with all that a run needs to go on in `training/`
(checkpoint.py). It is written under another name and renamed when whole.
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
"""What a run writes. Overwriting removes these and leaves the rest of the folder alone."""
STATE = "training/state.json"


def find_checkpoint(config: Config) -> Path | None:
    """The checkpoint that run.resume asks to go on from; None: start anew. Raises ConfigError where there is none."""
    if config.run.resume == "false":
        return None
    folder = Path(config.run.dir if config.run.resume == "auto" else config.run.resume)
    if (folder / STATE).is_file():
        return folder.resolve()
    whole = [path for path in checkpoints_in(folder) if (path / STATE).is_file()]
    if whole:
        return whole[-1].resolve()
    if config.run.resume == "auto":
        return None
    raise ConfigError(
        f"run.resume must be auto, false, or the folder of a checkpoint or of a run that has one; got {str(folder)!r}"
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first. All that have their names are whole."""
    return sorted((folder / "checkpoints").glob("iteration-*"))


def prepare_folder(config: Config, resumed: Path | None, iteration: int) -> Path:
    """The run's folder, with the resolved settings in it.

    Where the run goes on from a checkpoint of its own (`resumed`, after `iteration`), later ones are renamed to left-*:
    they belong to a branch that is left. Raises ConfigError where another run's results lie and may not be overwritten.
    """
    folder = Path(config.run.dir)
    found = [name for name in WRITTEN if os.path.lexists(folder / name)]
    if resumed is not None and resumed.is_relative_to(folder.resolve()):
        found = []
        for path in checkpoints_in(folder):
            if path.name > _name(iteration):
                _leave(path)
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
    """A new folder in which to write a checkpoint, the same on every process."""
    unfinished = ""
    if world.main:
        (folder / "checkpoints").mkdir(exist_ok=True)
        for pattern in (".unfinished-*", ".old-*"):
            for left in (folder / "checkpoints").glob(pattern):
                shutil.rmtree(left)  # by a run that was killed while it saved
        unfinished = tempfile.mkdtemp(prefix=".unfinished-", dir=folder / "checkpoints")
        os.chmod(unfinished, 0o755)
    return Path(world.broadcast(unfinished))


def finish_checkpoint(folder: Path, unfinished: Path, iteration: int, config: Config) -> Path:
    """Give a whole checkpoint its name, point the link `checkpoint` to it, and remove what need not be kept."""
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
    """The checkpoint's numbers. Raises ConfigError for a folder that is not one of ours."""
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint} is not a checkpoint that a run can go on from: {error}") from None


def save_trajectories(path: Path, trajectories: list[Trajectory]) -> Path:
    """Write trajectories for inspection, one JSON object each."""
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
    """The checkpoint with the largest value of the metric, the newest of equals; None where none has it."""
    values = [(read_state(path)["metrics"].get(metric), path) for path in checkpoints_in(folder)]
    return max(((v, path) for v, path in values if v is not None), default=(None, None))[1]


def _hide(checkpoint: Path) -> None:
    """Take a checkpoint's name away before it is deleted, or a run killed meanwhile would leave half of it."""
    checkpoint.rename(checkpoint.with_name(f".old-{checkpoint.name}"))


def _leave(checkpoint: Path) -> None:
    """Take a checkpoint out of the run without deleting it."""
    target = checkpoint.with_name(f"left-{checkpoint.name}")
    if target.exists():
        shutil.rmtree(target)
    checkpoint.rename(target)


def _name(iteration: int) -> str:
    return f"iteration-{iteration:06d}"


def _link(link: Path, target: Path) -> None:
    """Make or move a symbolic link, which at no time dangles or is missing."""
    new = link.with_name(f".{link.name}-next")
    new.unlink(missing_ok=True)
    new.symlink_to(target.relative_to(link.parent))
    new.replace(link)
