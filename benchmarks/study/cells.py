"""A cell: one training run of a study, cached by what it computes.

The key of a cell is a hash of its resolved settings and of the files that they name. Its folder has the files of every
run, log.txt, and cell.json when the run has ended. Two studies that ask for the same cell share it.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import importlib.util
import json
import shutil
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from reval.config import PATHS, Config, load_config
from reval.model.dtypes import with_dtypes

CELL = "cell.json"
EVERY = (  # what every cell has in common: one thread, and no output that a study does not read
    "run.threads=1",
    "run.display=plain",
    "run.table=0",
    "run.save_every=0",
    "run.overwrite=true",
    "reward.workers=1",
    "tracking.tensorboard=false",
    "tracking.samples=8",
)
NOT_COMPUTED = ("dir", "display", "table", "overwrite", "resume", "save_every", "save_total_limit")
"""Settings of the section `run` that change nothing in metrics.jsonl."""
NAMES_FILES = PATHS - {"run.dir", "run.resume", "evaluation.folder"}


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    config: Config
    """All settings. run.dir is the folder of the cell."""
    files: dict[str, str]
    """A hash of the file, or the key of the base model, that a setting names."""
    label: str = ""
    """What the progress line calls it."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    def result(self) -> dict[str, Any] | None:
        """cell.json, or None if the run has not ended."""
        try:
            return json.loads((self.folder / CELL).read_text())
        except (FileNotFoundError, ValueError):
            return None


def make(folder: Path, files: Sequence[str], overrides: Sequence[str], *, label: str = "") -> Cell:
    """The cell of these settings, in `folder`. Raises ConfigError for settings that cannot work."""
    # Resolved as the trainer resolves it: the config.yaml of the run, which `rekey` reads, has these values.
    config = with_dtypes(load_config(files, [*EVERY, *overrides]))
    named = _digests(config)
    own = replace(config.run, dir=str(folder / "cells" / key(config, named)))
    return Cell(replace(config, run=own), named, label)


def key(config: Config, files: dict[str, str]) -> str:
    """The name of the folder of a cell: equal for equal settings and equal files."""
    settings = config.to_dict()
    settings["tracking"] = {"rollouts": config.tracking.rollouts}  # another study may read rollouts.jsonl
    for name in NOT_COMPUTED:
        del settings["run"][name]
    for setting, digest in files.items():
        section, name = setting.split(".")
        settings[section][name] = digest
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _digests(config: Config) -> dict[str, str]:
    values = config.to_dict()
    named = {name: values[name.split(".")[0]][name.split(".")[1]] for name in sorted(NAMES_FILES)}
    found = {name: _digest(value) for name, value in named.items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def _digest(value: Any) -> str | None:
    """A hash of the file that a setting names. None if it names no file: a hub name, or a built-in function."""
    if isinstance(value, list):
        return "+".join(_digest(item) or item for item in value) or None
    if not value:
        return None
    if (Path(value) / "recipe.json").exists():
        return Path(value).name  # a base model of the fast tasks; its folder is named by its recipe
    where, _, function = value.rpartition(":")
    if where and not where.endswith(".py"):
        where = _module_file(where)
    path = Path(where or value)
    if not path.is_file():
        return None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return f"{digest}:{function}" if where else digest


def _module_file(module: str) -> str:
    """The file of a module of the working folder. "" for other names, such as `random` of model.name=random:NAME."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a path, or a package that is not there: the run will say so
        return ""
    file = (spec and spec.origin) or ""
    return file if file and Path(file).is_relative_to(Path.cwd()) else ""


def rekey(folder: Path) -> int:
    """Give every cell the name that its settings have now, and return how many changed. Needed after a setting was
    added to the trainer: its default becomes part of every key. Run it while no study runs."""
    changed = 0
    for found in sorted((folder / "cells").glob(f"*/{CELL}")):
        old = found.parent
        if not (old / "config.yaml").exists():
            continue  # it failed before it wrote anything
        target = old.with_name(key(load_config([old / "config.yaml"]), json.loads(found.read_text())["files"]))
        if target != old and not target.exists():
            old.rename(target)
            changed += 1
    return changed


# ---- In a worker process -------------------------------------------------------------------------------------------


@contextmanager
def _locked(cell: Cell, wait: bool) -> Iterator[bool]:
    """Hold the lock of the cell. Yields False if another process holds it and `wait` is false."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.folder / "cell.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def run_cell(cell: Cell, retry: bool = False, wait: bool = False) -> dict[str, Any]:
    """Train, unless the cell is complete, and return cell.json. A cell that failed is not run again without `retry`.

    The status is `complete` or `failed`, with the error; or, without a file, `busy` (another process runs this cell and
    `wait` is false) or `interrupted`.
    """
    with _locked(cell, wait) as mine:
        if not mine:
            return {"status": "busy"}
        known = cell.result()
        if known is not None and (known["status"] == "complete" or not retry):
            return known
        (cell.folder / CELL).unlink(missing_ok=True)
        start, stamp = time.perf_counter(), _stamp()
        try:
            result = _train(cell)
        except KeyboardInterrupt:
            return {"status": "interrupted"}
        except Exception as error:  # any setting of a grid may fail in its own way; the other cells go on
            result = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            with open(cell.folder / "log.txt", "a", encoding="utf-8") as log:
                traceback.print_exc(file=log)
        finally:
            _delete_checkpoints(cell.folder)
            gc.collect()  # the next cell of this process needs the memory
        result |= {"seconds": time.perf_counter() - start, "label": cell.label, "files": cell.files, "stamp": stamp}
        unfinished = cell.folder / f".{CELL}"
        unfinished.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(cell.folder / CELL)
        return result


def _train(cell: Cell) -> dict[str, Any]:
    from reval.loop import train  # imports torch and transformers, once in each worker process
    from reval.tracking import Tracker

    with ExitStack() as stack:
        log = stack.enter_context(open(cell.folder / "log.txt", "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(log))
        stack.enter_context(redirect_stderr(log))
        # No setting leaves out curves.png. It takes longer than five iterations of a fast task, and nobody looks at it.
        stack.enter_context(patch.object(Tracker, "plot"))
        metrics = train(cell.config)
    return {"status": "complete", "accuracy": metrics.get("eval/accuracy", metrics.get("reward"))}


def _stamp() -> dict[str, object]:
    import torch

    from ..report import stamp

    return stamp(torch.device("cpu"))


def _delete_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    for name in ("checkpoint", "best"):
        with suppress(FileNotFoundError):
            (folder / name).unlink()
