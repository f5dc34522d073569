"""The wheel, installed as a person would, into an empty environment outside the repository.

First with torch alone, then with the trainer. pip takes the versions of constraints.txt: torch's CPU build stays.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "REVAL"))}


def run(*command: str | Path, cwd: Path, status: int = 0, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=CLEAN | environment, capture_output=True, text=True)
    assert done.returncode == status, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of the commands of an environment that has the wheel and torch, and the wheel."""
    folder = tmp_path_factory.mktemp("empty")
    build = [sys.executable, "-m", "build", "--quiet", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run(*build, cwd=folder, REVAL_BUILD_CPU="0")
    assert len(list(folder.glob("reval_kernels-*.tar.gz"))) == 1
    (wheel,) = folder.glob("reval_kernels-*-py3-none-any.whl")
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    pip(folder / "env" / "bin", str(wheel))
    return folder / "env" / "bin", wheel


def pip(binaries: Path, requirement: str) -> None:
    constraints = str(ROOT / "constraints.txt")
    run(binaries / "pip", "install", "--quiet", "--no-compile", "-c", constraints, requirement, cwd=binaries)


def test_the_kernels_with_torch_alone(installed, tmp_path):
    binaries, _ = installed
    assert "numpy" not in run(binaries / "pip", "list", cwd=tmp_path)
    assert "checked" in run(binaries / "python", ROOT / "tests/wheel/smoke.py", cwd=tmp_path)
    assert "pip install 'reval-kernels[train]'" in run(binaries / "reval", "--help", cwd=tmp_path, status=1)


def test_a_library_for_another_torch_is_named_and_not_loaded(installed, tmp_path):
    binaries, _ = installed
    (note,) = binaries.parent.glob("lib/*/site-packages/reval_kernels/backends/cpu/not_built.txt")
    text = note.read_text()
    reason = "import reval_kernels; print(reval_kernels.backends()['cpu'].reason)"
    assert "made for every machine" in run(binaries / "python", "-c", reason, cwd=tmp_path)
    other = note.with_name("libreval_kernels_cpu-torch1.2.so")
    try:
        note.rename(other)
        assert "was built for torch 1.2, and this is torch 2" in run(binaries / "python", "-c", reason, cwd=tmp_path)
        assert "checked" in run(binaries / "python", ROOT / "tests/wheel/smoke.py", cwd=tmp_path)
    finally:
        other.unlink()
        note.write_text(text)


def test_the_trainer(installed, tmp_path):
    """The tiny run of README.md, whose config comes with the wheel."""
    binaries, wheel = installed
    pip(binaries, f"{wheel}[train]")
    options = ["run.iterations=2", "run.dir=run"]
    run(binaries / "python", "-m", "reval.train", "configs/tiny.yaml", *options, cwd=tmp_path)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
