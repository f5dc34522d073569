"""examples/one_file.py: the size and the imports that the example promises, and a run that learns."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "one_file.py"
ALLOWED = {"torch", "transformers", "reval_kernels"} | sys.stdlib_module_names
# The trainer package `reval` must stay out of the process, also as an import of an import.
RUN = f"""
import runpy, sys
sys.argv[0] = {str(EXAMPLE)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
assert "reval_kernels" in sys.modules
assert "reval" not in sys.modules
"""


def run(*words: str) -> str:
    """The output of the example as a program; its time is removed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RUN, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return re.sub(r"; \d+ s\n", "\n", done.stdout)


def test_the_example_is_one_short_file_that_needs_no_trainer():
    source = EXAMPLE.read_text()
    assert len(source.splitlines()) <= 200
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported <= ALLOWED
    assert {"transformers", "reval_kernels"} <= imported


def test_the_same_seed_gives_the_same_run():
    first = run("--seed", "3", "--iterations", "6")
    assert first == run("--seed", "3", "--iterations", "6")
    lines = first.splitlines()
    assert len(lines) == 7  # one line for each iteration, then the accuracy
    assert all(re.fullmatch(r" +\d+  reward \d.\d{3}  \|residual\| \d+.\d{3}  loss \d+.\d{3}", s) for s in lines[:-1])


@pytest.mark.slow
def test_the_policy_learns():
    """Seeds 0 to 4 end at 0.95 to 1.00. A guess of the digits with the right length has 0.01."""
    found = re.search(r"accuracy on held-out prompts: ([\d.]+) before, ([\d.]+) after", run("--seed", "0"))
    assert found
    before, after = map(float, found.groups())
    assert before < 0.1
    assert after > 0.7
