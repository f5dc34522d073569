"""Memory beyond inputs and outputs, measured in child processes that make one call each."""

import os

import pytest
import torch

from benchmarks.memory import CLEAR, CONTROL, NotMeasured, beyond_inputs_and_outputs
from benchmarks.ops import Shape

if not os.access(CLEAR, os.W_OK):
    pytest.skip(f"needs {CLEAR}", allow_module_level=True)

OP, SHAPE = "token_values forward+backward", Shape(8, 8, 40_000)
LOGITS = 64 * 40_000 * 4  # bytes of float32


def beyond(provider, shape=SHAPE):
    return beyond_inputs_and_outputs(OP, provider, shape, torch.float32)


def test_outputs_alone_are_nothing_and_eager_keeps_copies_of_the_logits():
    """Eager PyTorch stores exp(logits) in one or two new tensors of their size. Linux's count may be 1 MiB off."""
    assert abs(beyond(CONTROL)) < 1 << 20
    assert beyond("torch eager") > LOGITS - (1 << 20)


def test_a_peak_holds_nothing_that_was_freed(monkeypatch):
    """The portable backend's chunks take 15 MiB. When glibc kept freed chunks, the peak was 41 to 111 MiB."""
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert beyond("portable", Shape(8, 16, 151_936)) < 24 << 20
    assert os.environ["MALLOC_MMAP_MAX_"] == "0"  # the environment is restored


def test_a_child_that_fails_says_why():
    with pytest.raises(NotMeasured, match="StopIteration"):
        beyond("no such provider")
