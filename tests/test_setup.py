"""What a build installs. A fake cmake builds in no time; the sources are a copy without the trainer's rooms."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from reval_kernels.backends.cpu.build import library_name

ROOT = Path(__file__).parents[1]
CPU = Path("reval_kernels/backends/cpu")
LIBRARY = library_name(torch.__version__)
FAKE_CMAKE = """#!{python}
import pathlib, sys
if sys.argv[1] == "--build":
    pathlib.Path(pathlib.Path(sys.argv[2], "output").read_text()).write_text("new")
else:
    folder = pathlib.Path(sys.argv[sys.argv.index("-B") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "output").write_text(next(a for a in sys.argv if a.startswith("-DOUTPUT="))[9:])
"""


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with sources, and a fake cmake."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, tmp_path)
    for package in ("reval", "reval_kernels"):
        (tmp_path / package).mkdir()
        shutil.copy(ROOT / package / "__init__.py", tmp_path / package)
    (tmp_path / CPU).mkdir(parents=True)
    shutil.copy(ROOT / CPU / "build.py", tmp_path / CPU)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "cmake").write_text(FAKE_CMAKE.format(python=sys.executable))
    (tmp_path / "bin" / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def run(sources: Path, build_cpu: str, *arguments: str) -> None:
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    done = subprocess.run(
        command, cwd=sources, env=os.environ | {"REVAL_BUILD_CPU": build_cpu}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def in_wheel(sources: Path, build_cpu: str) -> set[str]:
    run(sources, build_cpu, "bdist_wheel", "--dist-dir", f"dist{build_cpu}")
    (wheel,) = (sources / f"dist{build_cpu}").iterdir()
    assert wheel.name.split("-", 2)[2].startswith("py3-none-any" if build_cpu == "0" else "py3-none-linux")
    return {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}


def test_a_wheel_holds_what_was_built_for_it(sources):
    (sources / "reval" / "gone.py").write_text("")
    names = in_wheel(sources, "1")
    assert {LIBRARY, "gone.py"} <= names and "not_built.txt" not in names
    (sources / "reval" / "gone.py").unlink()
    names = in_wheel(sources, "0")
    assert "not_built.txt" in names and not names & {LIBRARY, "gone.py"}


def test_a_build_in_place_removes_the_library_that_it_replaces(sources):
    other = sources / CPU / "libreval_kernels_cpu-torch1.0.so"
    other.write_text("of another torch, for another environment")
    (sources / CPU / LIBRARY).write_text("old")
    run(sources, "1", "build_ext", "--inplace")
    assert {path.name for path in (sources / CPU).iterdir()} == {"build.py", LIBRARY, other.name}
    assert (sources / CPU / LIBRARY).read_text() == "new"
    (sources / "bin" / "cmake").write_text("#!/bin/sh\nexit 1\n")
    run(sources, "", "build_ext", "--inplace")  # the build fails, and the old library may not fit the sources
    assert {path.name for path in (sources / CPU).iterdir()} == {"build.py", "not_built.txt", other.name}
    (sources / CPU / LIBRARY).write_text("kept")
    run(sources, "0", "build_ext", "--inplace")  # asks for no build: another environment may use the library
    assert (sources / CPU / LIBRARY).read_text() == "kept"
