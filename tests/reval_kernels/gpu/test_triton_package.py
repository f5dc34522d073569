"""The Triton backend's report about itself, and the correctness of the interpreter that its tests use.

This folder is not named `triton`: its parent is on sys.path, so Python would import a folder of that name as the
package.
"""

import os
import subprocess
import sys

import pytest
import torch
from cases import DEVICE

import reval_kernels

pytest.importorskip("triton")

import triton
import triton.language as tl

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="about the interpreter")


def run(code: str, **environment: str) -> str:
    """The output of a new Python process that runs the code."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_library_imports_no_triton():
    code = "import sys, reval_kernels; reval_kernels.backends(); print('triton' in sys.modules)"
    assert run(code).strip() == "False"


def test_the_reason_without_triton():
    code = """
import importlib.util, reval_kernels
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
info = reval_kernels.backends()
print(info["triton"].available, info["triton"].default_for, info["triton"].reason, info["portable"].available)
"""
    assert run(code).strip() == "False () triton is not installed (pip install triton) True"


def test_a_triton_that_is_too_old_is_named():
    """torch 2.7 to 2.9 bring Triton 3.3 to 3.5, in which the kernels do not compile."""
    code = """
import importlib.metadata, reval_kernels
importlib.metadata.version = lambda name: {"triton": "3.5.1"}[name]
print(reval_kernels.backends()["triton"].reason)
"""
    assert run(code).startswith("triton 3.5.1 is too old: the kernels need 3.6 or newer")


def test_cpu_tensors_are_refused_outside_the_interpreter():
    code = """
import torch, reval_kernels
try:
    reval_kernels.token_values(torch.randn(2, 5), torch.tensor([1, 2]), backend="triton")
except ValueError as error:
    print(error)
"""
    message = run(code)
    assert "CUDA" in message and "cpu" in message and "TRITON_INTERPRET=1" in message


def test_triton_is_the_default_for_gpus():
    assert reval_kernels.backends()["triton"].default_for == ("cuda",)


@triton.jit
def bf16_arithmetic(x, y, out, ADD: tl.constexpr):
    lane = tl.arange(0, 16)
    a, b = tl.load(x + lane), tl.load(y + lane)
    if ADD:
        tl.store(out + lane, (a + b).to(tl.float32))
    else:
        tl.store(out + lane, a.to(tl.float32) + b.to(tl.float32))


@triton.jit
def bf16_dot(x, y, out):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def to_bf16(x, out):
    lane = tl.arange(0, 256)
    tl.store(out + lane, tl.load(x + lane).to(tl.bfloat16))


@interpreted
def test_canary_unpatched_bf16_arithmetic_is_wrong():
    """If this test fails, the interpreter computes bf16 correctly, and the repairs in interpreter.py can be deleted."""
    x, y, out = torch.ones(16).bfloat16(), torch.ones(16).bfloat16(), torch.zeros(16)
    bf16_arithmetic[(1,)](x, y, out, ADD=True)
    assert not torch.equal(out, torch.full((16,), 2.0))


@interpreted
def test_patched_bf16_arithmetic_is_an_error():
    from reval_kernels.backends.gpu.interpreter import faithful

    x, y, out = torch.ones(16).bfloat16(), torch.ones(16).bfloat16(), torch.zeros(16)
    with faithful():
        with pytest.raises(Exception, match="bf16"):
            bf16_arithmetic[(1,)](x, y, out, ADD=True)
        bf16_arithmetic[(1,)](x, y, out, ADD=False)
    assert torch.equal(out, torch.full((16,), 2.0))


@interpreted
def test_patched_bf16_dot_and_rounding_match_torch():
    from reval_kernels.backends.gpu.interpreter import faithful

    x, y, out = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.zeros(16, 16)
    numbers = torch.cat([torch.randn(252) * 3, torch.tensor([torch.inf, -torch.inf, torch.nan, 1.9999999])])
    rounded = torch.zeros(256).bfloat16()
    with faithful():
        bf16_dot[(1,)](x, y, out)
        to_bf16[(1,)](numbers, rounded)
    torch.testing.assert_close(out, x.float() @ y.float())
    torch.testing.assert_close(rounded, numbers.bfloat16(), rtol=0, atol=0, equal_nan=True)
