"""The code on the pages for newcomers runs, from the first block of a page to the last.

A block whose first line names a file (`# ddp.py`) is a program for two processes, as the command below it says.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAM = re.compile(r"# (\w+\.py)\n")


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", ["recipes.md", "python.md", "faq.md"])
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": page}
    shown = [block for block in blocks(page) if not PROGRAM.match(block)]
    assert shown
    for number, block in enumerate(shown, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_settings_and_buffer_load_no_torch():
    """docs/python.md says so."""
    code = "import sys, reval.config, reval.replay; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.distributed
@pytest.mark.parametrize("program", ["ddp.py", "fsdp.py"])
def test_the_programs_of_the_recipes_run_in_two_processes(program, tmp_path):
    [code] = [block for block in blocks("recipes.md") if block.startswith(f"# {program}\n")]
    (tmp_path / program).write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
