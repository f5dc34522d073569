"""Do engine and trainer hold the same policy? The log-probabilities of a few tokens say so, after each sync.

Two programs that compute one model differ by rounding; a weight that did not arrive, or a cache that outlived it,
differs by much more. docs/rollouts.md has measured thresholds.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from ..batching import collate
from ..config import ModelConfig
from ..model.forward import token_values
from ..replay import Trajectory
from . import RolloutEngine

LogProbs = Callable[[list[list[int]], list[int]], list[list[float]]]


def choose(
    sequences: list[list[int]], starts: list[int], tokens: int, per_sequence: int = 8
) -> tuple[list[list[int]], list[int]]:
    """The first `tokens` tokens to compare: up to `per_sequence` of each response's first ones, each sequence cut
    off behind them. `starts` holds the index of each response's first token."""
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
    """log pi of each sequence's tokens from its start on, given what precedes them, at temperature 1."""
    masks = [np.arange(len(ids)) >= start for ids, start in zip(sequences, starts, strict=True)]
    known = [
        Trajectory(token_ids=np.array(ids), action_mask=mask, reward=0.0, score=0.0, iteration=0)
        for ids, mask in zip(sequences, masks, strict=True)
    ]
    batch = collate(known, model.device, share=False)
    found = token_values(model, batch, config).log_prob
    return [row[mask].tolist() for row, mask in zip(found.cpu(), batch.mask.cpu(), strict=True)]


def mismatch(
    engine: RolloutEngine, policy_log_probs: LogProbs | list[list[float]], sequences: list[list[int]], starts: list[int]
) -> dict[str, float]:
    """`rollout/mismatch_mean` and `rollout/mismatch_max`: |log pi_engine - log pi_trainer|, in nats.

    Args:
        policy_log_probs: the trainer's log-probabilities of the same tokens, or a function of (sequences, starts) that
            computes them.
        sequences: prompt and response; starts: where the response begins, at least 1. All tokens from there on are
            compared, and each costs the engine a request: see `choose`.

    Without a token to compare, there are no metrics.
    """
    theirs = engine.log_probs(sequences, starts)
    ours = policy_log_probs(sequences, starts) if callable(policy_log_probs) else policy_log_probs
    pairs = zip(theirs, ours, strict=True)
    differences = np.array([abs(a - b) for row, other in pairs for a, b in zip(row, other, strict=True)])
    if not differences.size:
        return {}
    # a NaN stays one, so that no threshold lets it pass
    return {"rollout/mismatch_mean": float(differences.mean()), "rollout/mismatch_max": float(differences.max())}


def worst(reports: list[dict[str, float]]) -> dict[str, float]:
    """The largest of every process's numbers; a NaN stays one, whichever process has it."""
    return {name: float(np.max([report[name] for report in reports])) for name in reports[0]}
