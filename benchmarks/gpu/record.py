"""The job of a check of a GPU machine, and the record of each part: a JSON file that grows while the part runs."""

from __future__ import annotations

import json
import os
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

RUNNING, DONE, FAILED, NOT_RUN = "running", "done", "failed", "not run"


class NotRun(Exception):
    """A part cannot run on this machine; the message says why."""


@dataclass
class Job:
    """What the parts need to know of the run that they belong to."""

    folder: Path
    """For files that are not results."""
    rehearse: bool
    """Tiny shapes on the CPU, with Triton's interpreter."""
    tests: list[str]
    """The arguments of pytest that choose the tests."""
    end: float = 0.0
    """When the current part's time is over (time.time())."""

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def left(self) -> float:
        """Seconds that are left to the current part, at least 1."""
        return max(1.0, self.end - time.time())


@dataclass
class Record:
    """The results of one part, in a file that is whole at every moment."""

    path: Path
    data: dict[str, Any] = field(default_factory=dict)

    def write(self, **facts: Any) -> None:
        self.data |= facts
        self.data["seconds"] = round(time.time() - self.data["started"], 1)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.data))
        os.replace(new, self.path)

    def begin(self, part: str, budget: float) -> None:
        self.data = {"part": part, "started": time.time(), "budget": round(budget, 1)}
        self.write(status=RUNNING, reason="")

    def failed(self, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        self.write(status=FAILED, reason=reason, traceback="".join(traceback.format_exception(error))[-4000:])


def read(folder: Path, part: str) -> dict[str, Any] | None:
    """The record of a part, or None if the part was not begun."""
    path = folder / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else None
