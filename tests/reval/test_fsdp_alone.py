"""A model with random weights that FSDP2 shards over one process: over gloo on a CPU, over NCCL on a GPU.

tools/gpu_check.py runs this file on a machine with one GPU, where two processes cannot use NCCL.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_sharded_model_learns_what_a_whole_one_does(device):
    path = os.pathsep.join([str(FOLDER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(FOLDER / "fsdp_alone.py"), device, str(FOLDER / "shape")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0 and done.stdout.endswith("equal\n"), done.stderr[-3000:]
