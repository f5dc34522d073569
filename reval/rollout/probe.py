"""The probe: after each sync, compares the log-probabilities of a few tokens between rollout engine and trainer.

Two programs that compute the same model differ by rounding. They differ by much more if the engine missed a weight in
the sync, or if it still has a cache from the old weights. docs/rollouts.md has measured thresholds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from ..batching import Form, collate
from ..config import ModelConfig
from ..model.forward import token_values
from ..replay import Trajectory
from .protocol import RolloutEngine

LogProbs = Callable[[list[list[int]], list[int]], list[list[float]]]


def choose(
    sequences: list[list[int]], starts: list[int], tokens: int, per_sequence: int = 8
) -> tuple[list[list[int]], list[int]]:
    """Choose about `tokens` tokens to compare: the first ones of each response, at most `per_sequence`.

    Args:
        sequences: prompts with their responses.
        starts: the index of each response's first token.

    Returns the sequences, each cut off after its last chosen token, and their starts. Sequences without a chosen token
    are left out.
    """
    out = []
    for ids, start in zip(sequences, starts, strict=True):
        count = min(per_sequence, tokens, len(ids) - start)
        if count > 0:
            out.append((ids[: start + count], start))
            tokens -= count
    return [ids for ids, _ in out], [start for _, start in out]


@torch.no_grad()
def log_probs(
    model: PreTrainedModel, sequences: list[list[int]], starts: list[int], config: ModelConfig
) -> list[list[float]]:
    """The trainer's counterpart of RolloutEngine.log_probs: log pi of the tokens from each sequence's start on."""
    masks = [np.arange(len(ids)) >= start for ids, start in zip(sequences, starts, strict=True)]
    known = [
        Trajectory(token_ids=np.array(ids), action_mask=mask, reward=0.0, score=0.0, iteration=0)
        for ids, mask in zip(sequences, masks, strict=True)
    ]
    batch = collate(known, model.device, Form.PADDED)
    found = token_values(model, batch, config).log_prob
    return [row[mask].tolist() for row, mask in zip(found.cpu(), batch.mask.cpu(), strict=True)]


def mismatch(
    engine: RolloutEngine, policy_log_probs: LogProbs | list[list[float]], sequences: list[list[int]], starts: list[int]
) -> dict[str, float]:
    """`rollout/mismatch_mean` and `rollout/mismatch_max`: |log pi_engine - log pi_trainer| in nats.

    Args:
        policy_log_probs: the trainer's log-probabilities of the same tokens, or a function of (sequences, starts) that
            computes them.
        sequences: prompts with their responses.
        starts: the index of each response's first token, at least 1. All tokens from there on are compared. Each token
            costs the engine a request, so give few: see `choose`.

    Without a token to compare the result is empty.
    """
    theirs = engine.log_probs(sequences, starts)
    ours = policy_log_probs(sequences, starts) if callable(policy_log_probs) else policy_log_probs
    pairs = zip(theirs, ours, strict=True)
    differences = np.array([abs(a - b) for row, other in pairs for a, b in zip(row, other, strict=True)])
    if not differences.size:
        return {}
    # mean and max keep a NaN, so that it exceeds every threshold
    return {"rollout/mismatch_mean": float(differences.mean()), "rollout/mismatch_max": float(differences.max())}


def worst(reports: list[dict[str, float]]) -> dict[str, float]:
    """The largest value of each metric over all processes. A NaN on any process stays NaN."""
    return {name: float(np.max([report[name] for report in reports])) for name in reports[0]}
