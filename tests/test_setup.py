"""What a build installs. A fake cmake builds in no time; the sources are a copy without the trainer's rooms."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from reval_kernels.backends.cpu.build import library_name, missing_tools

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


def run(sources: Path, build_cpu: str, *arguments: str, without_cmake: bool = False) -> None:
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    environment = os.environ | {"REVAL_BUILD_CPU": build_cpu}
    if without_cmake:  # neither on PATH nor beside the Python that runs
        code = f"import runpy, sys; sys.executable = '/none/python'; sys.argv[:] = {command[1:]}; "
        command = [sys.executable, "-c", code + "runpy.run_path('setup.py', run_name='__main__')"]
        environment["PATH"] = str(sources / "bin")
    done = subprocess.run(command, cwd=sources, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def in_wheel(sources: Path, build_cpu: str) -> set[str]:
    run(sources, build_cpu, "bdist_wheel", "--dist-dir", f"dist{build_cpu}")
    (wheel,) = (sources / f"dist{build_cpu}").iterdir()
    assert wheel.name.split("-", 2)[2].startswith("py3-none-any" if build_cpu == "0" else "py3-none-linux")
    return {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}


def test_cmake_is_found_beside_python_too(tmp_path, monkeypatch):
    """pip puts the package cmake there, and a shell has that folder on PATH only while the environment is active."""
    (tmp_path / "cmake").write_text("#!/bin/sh\n")
    (tmp_path / "cmake").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing" / "python"))
    assert missing_tools() == "cmake was not found"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert missing_tools() is None


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
    for broken in ("#!/bin/sh\nexit 1\n", None):  # the build fails, or there is no CMake
        (sources / CPU / LIBRARY).write_text("may not fit the sources")
        (sources / "bin" / "cmake").write_text(broken) if broken else (sources / "bin" / "cmake").unlink()
        run(sources, "", "build_ext", "--inplace", without_cmake=broken is None)
        assert {path.name for path in (sources / CPU).iterdir()} == {"build.py", "not_built.txt", other.name}
    (sources / CPU / LIBRARY).write_text("kept")
    run(sources, "0", "build_ext", "--inplace")  # asks for no build: another environment may use the library
    assert (sources / CPU / LIBRARY).read_text() == "kept"
