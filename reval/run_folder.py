"""The run folder: the files that a run may overwrite, and the names of its checkpoints.

    checkpoints/iteration-000200/  a checkpoint (checkpoint.py has its contents)
    checkpoint                     link to the newest checkpoint
    best                           link to the checkpoint with the largest run.best_metric

A checkpoint is written under a hidden name and renamed when it is complete. `.lock` is the file of run_lock.py.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .config import Config, ConfigError
from .distributed import World
from .replay import Trajectory

WRITTEN = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "rollouts.jsonl",
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

    Raises ConfigError if run.resume is a path without a checkpoint, or if the checkpoint is damaged.
    """
    if config.run.resume == "false":
        return None
    folder = Path(config.run.dir if config.run.resume == "auto" else config.run.resume)
    found = [folder] if (folder / STATE).is_file() else checkpoints_in(folder)
    if found:
        return _undamaged(found[-1].resolve())
    if config.run.resume == "auto":
        return None
    raise ConfigError(
        f"run.resume must be auto, false, or the folder of a checkpoint or of a run that has one; got {str(folder)!r}"
    )


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. Every folder named iteration-* is a complete checkpoint."""
    return sorted((folder / "checkpoints").glob("iteration-*"))


def files_to_replace(config: Config, resumed: Path | None) -> list[str]:
    """The names in `run.dir` that the run replaces, because they are results of another run.

    Args:
        resumed: the checkpoint from which the run continues, or None.

    Raises ConfigError if there are any and the settings do not allow overwriting them.
    """
    folder = Path(config.run.dir)
    if resumed is not None and resumed.is_relative_to(folder.resolve()):
        return []
    found = [name for name in WRITTEN if os.path.lexists(folder / name)]
    if found and not (config.run.overwrite or config.run.resume == "auto"):
        raise ConfigError(
            f"run.dir {str(folder)!r} already has results ({', '.join(found)}); give another run.dir, set "
            "run.overwrite=true to replace them, or go on from its checkpoint with --resume auto"
        )
    return found


@contextmanager
def take_over(config: Config, resumed: Path | None, iteration: int) -> Iterator[None]:
    """Make `run.dir` the folder of this run; the block starts what may still fail, for example a tracking service.

    If the block fails, the folder is as before. Otherwise the results of another run are deleted, later checkpoints of
    this run are renamed to left-*, because the continued run writes new checkpoints of these iterations, and
    config.yaml gets the resolved settings.

    Args:
        resumed: the checkpoint from which the run continues, or None.
        iteration: the iteration of that checkpoint.
    """
    folder = Path(config.run.dir)
    if resumed is not None and resumed.is_relative_to(folder.resolve()):
        yield
        for path in checkpoints_in(folder):
            if path.name > _name(iteration):
                _set_aside(path)
        _link(folder / "checkpoint", folder / resumed.relative_to(folder.resolve()))
    else:
        with _replacing(folder, files_to_replace(config, resumed)):
            yield
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")


@contextmanager
def _replacing(folder: Path, old: list[str]) -> Iterator[None]:
    """Move the old results aside. They are deleted after the block, and come back if it fails."""
    aside = folder / ".replaced"
    _remove(aside)  # from a run that was killed while it started
    aside.mkdir()
    for name in old:
        (folder / name).rename(aside / name)
    try:
        yield
    except BaseException:
        for name in WRITTEN:
            _remove(folder / name)
        for name in old:
            (aside / name).rename(folder / name)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder, if there is one."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def start_checkpoint(folder: Path, world: World) -> Path:
    """Make a folder with a hidden name for a new checkpoint. Every process has to call this and gets the same path."""
    checkpoints = folder / "checkpoints"

    def make() -> Path:
        checkpoints.mkdir(exist_ok=True)
        for pattern in (".unfinished-*", ".old-*"):
            for left in checkpoints.glob(pattern):
                shutil.rmtree(left)  # from a run that was killed while it saved
        unfinished = checkpoints / f".unfinished-{os.getpid()}"
        unfinished.mkdir()
        return unfinished

    return world.broadcast(world.together(lambda: make() if world.main else checkpoints))


def finish_checkpoint(folder: Path, unfinished: Path, iteration: int, config: Config) -> Path:
    """Rename a complete checkpoint to its name, move the links, and delete the checkpoints that exceed
    run.save_total_limit. The best one stays."""
    target = folder / "checkpoints" / _name(iteration)
    mode = (unfinished / STATE).stat().st_mode & 0o777
    for path in unfinished.rglob("*"):
        if path.is_file():
            path.chmod(mode)  # safetensors makes files for the owner alone; the umask, which made STATE, decides
    if target.exists():
        _hide(target)
    unfinished.rename(target)
    _link(folder / "checkpoint", target)
    keep_best_and_newest(folder, config)
    return target


def keep_best_and_newest(folder: Path, config: Config) -> None:
    """Move the link `best`, and delete the checkpoints that exceed run.save_total_limit. The best one stays."""
    best = best_checkpoint(folder, config.run.best_metric)[1]
    if best is not None:
        _link(folder / "best", best)
    for old in checkpoints_in(folder)[: -config.run.save_total_limit]:
        if old != best:
            _hide(old)
    for left in (folder / "checkpoints").glob(".old-*"):
        shutil.rmtree(left)


def sizes(checkpoint: Path) -> dict[str, int]:
    """The size in bytes of each file that holds tensors, by its path in the checkpoint."""
    files = [path for path in checkpoint.rglob("*") if path.suffix in (".safetensors", ".distcp", "")]
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files if path.is_file()}


def _undamaged(checkpoint: Path) -> Path:
    """The checkpoint itself. Raises ConfigError if it is damaged; the message names the newest one that is not."""
    problem = _damage(checkpoint)
    if problem is None:
        return checkpoint
    others = [path for path in checkpoints_in(checkpoint.parent.parent) if _damage(path) is None]
    way = f"go on from the newest whole one: --resume {others[-1]}" if others else "there is no other one to go on from"
    raise ConfigError(f"the checkpoint {checkpoint} is damaged: {problem}; {way}")


def _damage(checkpoint: Path) -> str | None:
    """What is missing in the checkpoint or has another size than when it was saved. None if all is there."""
    try:
        expected = read_state(checkpoint).get("files", {})
        found = sizes(checkpoint)
    except (OSError, ConfigError) as error:
        return str(error)
    for name, size in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]} bytes, but {size} were written"
    return None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The contents of training/state.json. Raises ConfigError for a folder that is not a checkpoint of a run."""
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{checkpoint / STATE} cannot be read: {error}") from None


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


def best_checkpoint(folder: Path, metric: str | None) -> tuple[float, Path | None]:
    """The largest value of the metric, and the checkpoint that has it; of several, the newest. (-inf, None) if no
    checkpoint has the metric. A checkpoint that is damaged or whose value is NaN does not count."""
    best: tuple[float, Path | None] = (-math.inf, None)
    for path in checkpoints_in(folder) if metric else ():
        with suppress(ConfigError):
            value = read_state(path)["metrics"].get(metric)
            best = (value, path) if value is not None and value >= best[0] else best
    return best


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
