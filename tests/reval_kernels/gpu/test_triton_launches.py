"""tools/compile_launches.py finds what the interpreter does not show: kernels that Triton cannot compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
TOOL = Path(__file__).parents[3] / "tools" / "compile_launches.py"
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
KERNELS = """
import triton
import triton.language as tl

@triton.jit
def size(out, rows):
    tl.store(out, rows.to(tl.int64))

@triton.jit
def early(given):
    if given is not None:
        return tl.load(given + tl.arange(0, 16))
    return 0.5

@triton.jit
def value(out, given):
    tl.store(out + tl.arange(0, 16), early(given))

@triton.jit
def described(out, given):
    at = out + tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(at, given.load([0, 0]).to(tl.float32))
"""
OUT = {"pointer": "float32", "aligned": True}
LONG = {"pointer": "int64", "aligned": True}
DESCRIPTOR = {"descriptor": "bfloat16", "block": [64, 64]}


def compile_launches(folder: Path, *launches: tuple) -> subprocess.CompletedProcess:
    (folder / "kernels_of_a_test.py").write_text(KERNELS)
    rows = [
        {"module": "kernels_of_a_test", "kernel": kernel, "arguments": arguments, "constants": {"num_warps": 1}}
        for kernel, *arguments in launches
    ]
    (folder / "1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, TOOL, folder, "--target", "sm_90", "--workers", "1"]
    return subprocess.run(command, env=ENVIRONMENT | {"PYTHONPATH": str(folder)}, capture_output=True, text=True)


def test_launches_that_compile(tmp_path):
    done = compile_launches(tmp_path, ("size", LONG, 17), ("value", OUT, None), ("described", OUT, DESCRIPTOR))
    assert done.returncode == 0 and done.stdout.endswith("\nall compiled\n"), done.stdout + done.stderr


def test_launches_that_do_not_compile(tmp_path):
    """Both errors reached a GPU once: a size of 1 is a constant, and a second return has another type."""
    done = compile_launches(tmp_path, ("size", LONG, 1), ("value", OUT, OUT))
    assert done.returncode == 1 and done.stdout.endswith("\n2 of 2 did not compile\n"), done.stdout + done.stderr
    assert "'int' object has no attribute 'to'" in done.stdout and "return types" in done.stdout
