"""Builds the C++ library with CMake, for the torch that is installed: `python -m reval_kernels.build`.

setup.py runs this file before the package is installed, so it imports the standard library alone, and torch to build.
The name of a library holds the version of torch it was built for. (The kernels call torch's `brgemm`, which torch's
stable C++ interface does not have.) So another torch finds no library, instead of one that would crash.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
NOTE = "not_built.txt"
"""A file in place of the library: why it was not built when the package was installed."""


def library_name(torch_version: str) -> str:
    """The file name of the library for a version of torch: for 2.13.0+cpu libreval_kernels_cpu-torch2.13.so"""
    return f"libreval_kernels_cpu-torch{'.'.join(torch_version.split('.')[:2])}.so"


def missing_tools() -> str | None:
    """What the build needs and this machine lacks; None if nothing. CMake looks for the compiler itself."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch was not there to build against (pip builds without it, if --no-build-isolation is not given)"
    return None if _program("cmake") else "cmake was not found"


def _program(name: str) -> str | None:
    """Its path: on PATH, or beside the Python that runs, where pip puts the packages cmake and ninja."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def build_library(output: Path, work: Path) -> str | None:
    """Build the library into the folder `output`, with CMake's own files in a folder of `work`.

    Returns the reason if the build failed, else None.
    """
    if (reason := missing_tools()) is not None:
        return reason
    import torch

    library = output / library_name(torch.__version__)
    work = work / library.stem  # the objects of another torch do not fit
    shutil.rmtree(work, ignore_errors=True)  # CMake refuses a folder of another generator, or of another path
    cmake, ninja = _program("cmake"), _program("ninja")
    assert cmake is not None  # missing_tools would have said so
    configure = [
        cmake,
        *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
        "-S",
        str(FOLDER),
        "-B",
        str(work),
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DTORCH_DIR={Path(torch.__file__).parent}",
        f"-DOUTPUT={library}",
        f"-DTORCH_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    for command in (configure, [cmake, "--build", str(work), "--parallel", str(os.cpu_count() or 1)]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            print(done.stdout, file=sys.stderr)
            lines = [line for line in done.stdout.splitlines() if "rror" in line] or done.stdout.splitlines()
            return f"cmake {command[1]} failed: {lines[0].strip() if lines else 'no output'}"
    return None


def main() -> int:
    """Build the library beside this file and say so. Returns the exit status."""
    if not os.access(FOLDER, os.W_OK):
        print(f"{FOLDER} cannot be written to; run this command as the user who installed the package", file=sys.stderr)
        return 1
    print("building the C++ kernels, which takes a minute or two", file=sys.stderr)
    with tempfile.TemporaryDirectory() as work:
        reason = build_library(FOLDER, Path(work))
    if reason:
        print(f"The C++ kernels were not built: {reason}", file=sys.stderr)
        return 1
    (FOLDER / NOTE).unlink(missing_ok=True)
    print("The C++ kernels are built.", file=sys.stderr)
    return 0
