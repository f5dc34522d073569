"""Settings for every test of the kernels: the same seed, deterministic algorithms, and scratch memory full of NaN."""

import os

# Set before the first import of triton, so that its kernels run on CPU tensors, in the interpreter.
if os.environ.get("REVAL_TEST_DEVICE", "cpu") == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from cases import BACKENDS, DEVICE

if "triton" in BACKENDS and DEVICE == "cpu" and os.environ.get("REVAL_RECORD_LAUNCHES"):
    import launches

    launches.record(os.environ["REVAL_RECORD_LAUNCHES"])

if DEVICE != "cpu" and not torch.cuda.is_available():
    pytest.exit(f"REVAL_TEST_DEVICE={DEVICE}: torch {torch.__version__} finds no GPU here", returncode=4)
if DEVICE != "cpu":  # REVAL_TEST_DEVICE=cuda runs all tests here on a GPU
    torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty and similar functions return NaN (or the largest integer), so that a read before a write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS, scope="session")
def backend(request) -> str:
    """Every backend that can run here."""
    return request.param
