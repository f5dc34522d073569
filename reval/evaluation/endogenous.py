"""The endogenous reward of a response. best@k takes the answer with the largest one.

Q is the policy's logit and V its logsumexp over the vocabulary. The endogenous reward of the action a_h in the state
s_h is e_h = Q(s_h, a_h) - V(s_{h+1}) (arXiv 2506.23235; docs/method.md section 2, with the policy instead of the
reference). The sum over a response telescopes to V(s_1) + sum_h log pi(a_h|s_h). All answers to one problem have the
same V(s_1), so their order is the order of their log-probabilities. This does not hold for answers to different
problems.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from ..config import Config
from ..distributed import World
from ..model.forward import token_values
from ..model.packing import plan_for
from ..replay import Trajectory

Scorer = Callable[[list[tuple[list[int], list[int]]]], list[float]]
"""(prompt, response) pairs of token ids, the same on every process -> each response's sum of endogenous rewards."""


def endogenous_scorer(model: PreTrainedModel, config: Config, world: World | None = None) -> Scorer:
    """A Scorer for `model` at temperature 1, in micro-batches of optim.micro_batch_tokens.

    Each process computes its share. The logits are never stored as a whole.
    """
    world = world or World()

    @torch.no_grad()
    def scores(pairs: list[tuple[list[int], list[int]]]) -> list[float]:
        trajectories = [_trajectory(*pair) for pair in pairs]
        found: dict[int, float] = {}
        for micro in plan_for(model, trajectories, world, config) if trajectories else ():
            values = token_values(model, micro.batch, config.model)
            sums = (values.v[:, 0] + values.log_prob.sum(1)).tolist()
            found.update(zip(micro.indices, sums, strict=False))  # a padding micro-batch has no indices
        everyone = {i: value for own in world.gather(found) for i, value in own.items()}
        return [everyone[i] for i in range(len(pairs))]

    return scores


def _trajectory(prompt: list[int], response: list[int]) -> Trajectory:
    ids = np.array([*prompt, *response])
    return Trajectory(token_ids=ids, action_mask=np.arange(len(ids)) >= len(prompt), reward=0.0, score=0.0, iteration=0)
