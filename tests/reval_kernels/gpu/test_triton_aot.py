"""Checks of the machine code of every GPU kernel, on a machine without a GPU. This command prints the whole table:

python -m reval_kernels.aot
"""

import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

# The block sizes were chosen with Triton 3.9. Triton 3.6 also compiles all kernels, but two of them use 8 and 40 bytes
# of stack.
STRICT = tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 9)
KEYS = {
    "kernel",
    "target",
    "config",
    "registers",
    "spill_bytes",
    "stack_bytes",
    "shared_bytes",
    "occupancy",
    "load_bits",
    "store_bits",
    "tensor_core",
    "exp2_per_entry",
}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def compiled(*arguments: str) -> list[dict]:
    command = [sys.executable, "-W", "ignore", "-m", "reval_kernels.aot", "--json", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check(reports: list[dict]) -> None:
    for r in reports:
        assert set(r) == KEYS
        assert r["spill_bytes"] <= spills(r["kernel"], r["config"]) or not STRICT, r
        assert r["occupancy"] > 0, r
        if r["kernel"].startswith("row_"):
            assert r["load_bits"] == 128, r
            # one exponential rescales the sums of all entries that one load brings: 8 in bf16, 4 in fp32
            rescaling = {"bf16": 1 / 8, "fp32": 1 / 4}[r["config"]["logits"]] if r["kernel"] == "row_forward" else 0
            assert r["exp2_per_entry"] == (2 if r["config"].get("SOFTCAP") else 1) + rescaling, r
        if r["kernel"] == "row_backward":
            assert r["store_bits"] == 128, r
        if r["kernel"] == "linear_tiles" and not r["config"].get("GRADIENT"):
            assert round(r["exp2_per_entry"], 1) == (2 if r["config"].get("SOFTCAP") else 1), r
        if r["kernel"].startswith("linear_tiles") and r["config"]["operands"] == "bf16" and r["target"] in TENSOR_CORE:
            assert set(r["tensor_core"]) == {TENSOR_CORE[r["target"]]}, r
        if r["kernel"] == "linear_tiles_tma" and not r["config"].get("SOFTCAP"):
            assert 2 * (r["shared_bytes"] + 1024) <= 228 * 1024, r  # two programs on a processor


def spills(kernel: str, config: dict) -> int:
    """Bytes of spill instructions that a kernel may have. finish_tile runs once in a tile, after hundreds of matmul
    instructions, and keeps a tile twice while it writes one: the few instructions of a spill do not show."""
    if not kernel.startswith("linear_tiles"):
        return 0
    if config.get("SOFTCAP"):
        return 2048
    return 320 if kernel == "linear_tiles_tma" else 0


TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_linear(target):
    reports = compiled("--target", target, "--kernel", "linear_tiles", "linear_tiles_tma", "scale_weights")
    assert reports
    check(reports)


ROWS = ["row_forward", "row_backward"]
OTHERS = ["loss_kernel", "td_kernel", "td_backward_kernel", "loss_backward_kernel", "merge"]


@pytest.mark.parametrize("kernels", [ROWS, OTHERS], ids=["rows", "others"])
def test_row_bellman_and_merge_kernels_on_an_h100(kernels):
    reports = compiled("--target", "sm_90", "--kernel", *kernels)
    assert {r["kernel"] for r in reports} == set(kernels)
    check(reports)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_100", "sm_120", "gfx942"])
def test_all_kernels(target):
    reports = compiled("--target", target)
    if target == "gfx942":  # masks split its widest loads in kernels with softcap
        assert all(r["spill_bytes"] <= spills(r["kernel"], r["config"]) for r in reports)
    else:
        check(reports)


def test_triton_interpret_is_refused():
    command = [sys.executable, "-m", "reval_kernels.aot", "--kernel", "merge"]
    done = subprocess.run(command, env=ENVIRONMENT | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode != 0 and "TRITON_INTERPRET" in done.stderr
