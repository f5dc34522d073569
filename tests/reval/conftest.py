"""The tiny random model, and trajectories for it. Two layers and 102 words: enough for every path, fast on a CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reval.config import Config, load_config
from reval.models import load_model
from reval.replay import Trajectory


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return load_config(["configs/tiny.yaml"])


@pytest.fixture
def tiny(tiny_config):
    """(model, tokenizer), fresh for every test, since training changes it."""
    return load_model(tiny_config.model, seed=0)


def random_trajectories(count: int, seed: int = 0, turns: int = 1, vocabulary: int = 102) -> list[Trajectory]:
    """Trajectories of unequal lengths; with several turns the environment's tokens lie between the actions."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        mask = np.concatenate(
            [
                np.repeat([False, True], [rng.integers(1, 6), rng.integers(1, 9)])
                for _ in range(turns)
            ]
        )
        ids = rng.integers(6, vocabulary, len(mask))
        reward = float(rng.normal())
        out.append(Trajectory(token_ids=ids, action_mask=mask, reward=reward, score=reward, iteration=1))
    return out


@pytest.fixture
def trajectories():
    return random_trajectories


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
