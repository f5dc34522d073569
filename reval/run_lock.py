"""The lock of a run folder, so that two runs never write into one folder.

It is the operating system's lock (flock) on the file `.lock`. The process that holds it loses it when it ends, even by
SIGKILL: a dead run leaves no lock behind. The content of the file says which process holds the lock, for the messages.

The lock holds between all processes of one machine. Between machines it holds where the file system shares locks:
NFS 4, or Lustre mounted with `flock`. On a file system without locks the run gives a warning and continues.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from .config import ConfigError

LOCK = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the run folder until the block ends.

    Raises ConfigError if another run holds the lock, or if the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run.dir {str(folder)!r} cannot be made or written: {error.strerror} ({error.filename})"
        ) from None
    with file:
        _lock(file, folder, fcntl.LOCK_EX)
        _warn_about(_owner(file), folder)
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        _write(file, json.dumps(owner))
        try:
            yield
        finally:
            _write(file, "")


def refuse_running(folder: Path) -> None:
    """Raise ConfigError if another run holds the lock of the folder. `locked` decides; this is the early message."""
    try:
        file = open(folder / LOCK, encoding="utf-8")
    except OSError:
        return  # `locked` will name what is wrong, if anything is
    with file:
        _lock(file, folder, fcntl.LOCK_SH)


def _lock(file: IO[str], folder: Path, kind: int) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(file)
        who = "process {process} on {host}, since {since}".format(**owner) if owner else "its process is unknown"
        raise ConfigError(
            f"run.dir {str(folder)!r} is in use by another run ({who}): give another run.dir, or wait for its end"
        ) from None
    except OSError as error:
        warnings.warn(
            f"the file system of run.dir {str(folder)!r} has no locks ({error.strerror}): a second run that writes "
            "there is not noticed",
            stacklevel=2,
        )


def _owner(file: IO[str]) -> dict[str, str]:
    """The process that holds the lock, or that ended without removing its name. {} if the file names none."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return {name: str(owner[name]) for name in ("host", "process", "since")}
    except (ValueError, KeyError, TypeError):
        return {}


def _warn_about(owner: dict[str, str], folder: Path) -> None:
    """Warn if a run on another machine ended without removing its name. A run that still goes on there looks the same
    if the file system does not share locks."""
    if owner and owner["host"] != socket.gethostname():
        warnings.warn(
            "the last run in {!r}, process {process} on {host} since {since}, did not end properly; if it still goes "
            "on, end one of the two runs".format(str(folder), **owner),
            stacklevel=2,
        )


def _write(file: IO[str], text: str) -> None:
    file.truncate(0)
    file.write(text)
    file.flush()
