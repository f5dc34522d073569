"""Made-up objects for tests. They are not in conftest.py, because several folders of tests have a conftest."""

from typing import Any

import numpy as np

from reval.components import Components
from reval.config import Config
from reval.distributed import World
from reval.replay import Trajectory
from reval.rollout.actor import Actor
from reval.rollout.none import NoRollout


def offline_components(model: Any, tokenizer: Any, pool: Any = None, held_out: Any = ()) -> Components:
    """The components of a run that generates nothing. `held_out` are prompts as token ids."""
    engine = NoRollout()
    actor = Actor(engine, Config(), tokenizer)
    return Components(model, tokenizer, [], [], {}, frozenset(held_out), engine, actor, pool, World())


def random_trajectories(count: int, seed: int = 0, turns: int = 1, vocabulary: int = 102) -> list[Trajectory]:
    """Trajectories of unequal lengths. With several turns, environment tokens stand between the actions."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        mask = np.concatenate(
            [np.repeat([False, True], [rng.integers(1, 6), rng.integers(1, 9)]) for _ in range(turns)]
        )
        ids = rng.integers(6, vocabulary, len(mask))
        reward = float(rng.normal())
        out.append(Trajectory(token_ids=ids, action_mask=mask, reward=reward, score=reward, iteration=1))
    return out
