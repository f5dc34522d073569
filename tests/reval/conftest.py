"""The tiny random model, and trajectories for it.

Two layers and 102 tokens are enough to reach every code path, and fast on a CPU.
"""

from __future__ import annotations

import pytest
import torch
from made import random_trajectories

from reval.config import Config, load_config
from reval.model.loading import load_model


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return load_config(["configs/tiny.yaml"])


@pytest.fixture
def tiny(tiny_config):
    """(model, tokenizer), fresh for every test, since training changes it."""
    return load_model(tiny_config.model, seed=0)


@pytest.fixture
def trajectories():
    return random_trajectories


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
