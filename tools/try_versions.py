"""Tests the package with one version of Python, torch and transformers, in an environment of its own.

    python tools/try_versions.py --python python3.13 --torch 2.7.0 --build
    python tools/try_versions.py --torch 2.13.0 --transformers 5.16.0

makes build/versions/NAME, installs these versions there, and runs the smoke test of the kernels and the KERNELS tests
on the sources of this checkout. --build also builds the C++ kernels for this torch. --transformers adds the TRAINER
tests.
docs/install.md has the table of what was tried.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ["setuptools", "wheel", "cmake", "ninja", "numpy", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist"]
KERNELS = [f"tests/reval_kernels/test_{name}.py" for name in ("values", "linear_values", "bellman", "fused", "library")]
TRAINER = [
    "tests/reval/model/test_loading.py",
    "tests/reval/test_rollout_decoding.py",
    "tests/reval/test_learner.py",
    "tests/reval/test_loop.py",
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="the command of the Python (default: this one)")
    parser.add_argument("--torch", required=True, help="the version of torch")
    parser.add_argument("--triton", help="the version of triton (default: the one that torch brings, or none)")
    parser.add_argument("--transformers", help="the version of transformers; without it, the kernels alone are tested")
    parser.add_argument("--build", action="store_true", help="build the C++ kernels for this torch, in this checkout")
    given = parser.parse_args()
    wanted = {name: getattr(given, name) for name in ("torch", "triton", "transformers") if getattr(given, name)}
    name = "-".join([Path(given.python).name, *(f"{k}{v}" for k, v in wanted.items())])
    python = ROOT / "build" / "versions" / name / "bin" / "python"
    if not python.exists():
        run([given.python, "-m", "venv", str(python.parents[1])])
    packages = [f"{k}=={v}" for k, v in wanted.items()]
    run([str(python), "-m", "pip", "install", "--quiet", *TOOLS, *packages])
    if given.transformers:
        extra = subprocess.check_output([str(python), "-c", EXTRA], cwd=ROOT, text=True).split()
        run([str(python), "-m", "pip", "install", "--quiet", *packages, *extra, "gymnasium"])
    if given.build:
        run([str(python), "-m", "reval_kernels.build"])
    run([str(python), "-P", str(ROOT / "tests" / "wheel" / "smoke.py")], PYTHONPATH=str(ROOT))
    tests = KERNELS + (TRAINER if given.transformers else [])
    run([str(python), "-m", "pytest", "-q", "-n", "2", *tests])
    print(f"{name}: passed")
    return 0


EXTRA = """
import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["train"], sep="\\n")
"""


def run(command: list[str], **environment: str) -> None:
    """Run a command in the root of the repository. Its failure ends this program with its status."""
    print("$", *command, flush=True)
    path = f"{Path(command[0]).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path} | environment)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    sys.exit(main())
