"""How much must one read to follow a prompt to its weight update? Counts the files and functions of one iteration.

    python tools/reading_path.py
    PYTHONPATH=/path/of/another/checkout python tools/reading_path.py    # counts that one

Runs configs/tiny.yaml in a temporary folder, in one process, and records every call from the first `Generation.next`
to the first `AdamW.step`. The count is the same for every model, because the path does not depend on its size.

Counted are:

- the public functions, methods and properties of `reval` that this process calls, and the files that contain them;
- `reval/loop.py` and its `train`, where one starts to read;
- the functions of `reval_kernels.__all__` at which the path ends, and the package as one file: a reader of the trainer
  needs the docstrings of these functions only.

A function is public if no name in its class path begins with an underscore. Constructors and other dunder methods,
lambdas, comprehensions and nested functions are not counted: they are read with the function that contains or uses
them. Private helpers are a number of their own. A private helper is called only in its own file, which is open already
when one meets the call.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

import reval
import reval_kernels
from reval.config import load_config

START = ("loop.py", "train")


class ReadingPath(NamedTuple):
    """The functions on the way, each as (file, qualified name), in the order of their first calls."""

    public: list[tuple[str, str]]
    private: list[tuple[str, str]]

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(file for file, _ in self.public))


class _Updated(Exception):
    """Ends the run at the first step of the optimizer."""


def reading_path() -> ReadingPath:
    """Run one iteration of configs/tiny.yaml up to its first weight update, and return the functions it called."""
    from reval.loop import train

    package = Path(reval.__file__).parent
    kernels = {getattr(reval_kernels, name) for name in reval_kernels.__all__}
    ends = {f.__code__: f.__name__ for f in kernels if hasattr(f, "__code__")}
    called: dict[CodeType, None] = {}
    recording = False

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal recording
        if event == "call":
            recording = recording or frame.f_code.co_qualname == "Generation.next"
            if recording:
                called.setdefault(frame.f_code)

    def step(*args: Any, **kwargs: Any) -> None:
        sys.setprofile(None)
        raise _Updated

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        overrides = [f"run.dir={folder}/run", "run.iterations=1", "data.held_out=0", "tracking.tensorboard=false"]
        config = load_config([package.parent / "configs" / "tiny.yaml"], overrides)
        real, before = torch.optim.AdamW.step, sys.getprofile()
        torch.optim.AdamW.step = step  # type: ignore[method-assign]
        try:
            sys.setprofile(profile)
            train(config)
        except _Updated:
            pass
        finally:
            sys.setprofile(before)
            torch.optim.AdamW.step = real  # type: ignore[method-assign]
    public: list[tuple[str, str]] = [START]
    private: list[tuple[str, str]] = []
    for code in called:
        file, name = Path(code.co_filename), code.co_qualname
        if code in ends:
            public.append(("reval_kernels", ends[code]))
        elif file.is_relative_to(package) and "<" not in name and not name.endswith("__"):
            hidden = any(part.startswith("_") for part in name.split("."))
            (private if hidden else public).append((str(file.relative_to(package)), name))
    return ReadingPath(public, private)


def main() -> None:
    found = reading_path()
    for file in found.files:
        print(file)
        for name in (name for other, name in found.public if other == file):
            print(f"    {name}")
    print(f"{len(found.files)} files, {len(found.public)} public functions ({len(found.private)} private helpers)")


if __name__ == "__main__":  # the reward workers import this module
    main()
