"""Objectives that only the studies use: what an option of ReVal is compared with (docs/evidence.md)."""

from __future__ import annotations

from reval.batching import Batch
from reval.config import ObjectiveConfig
from reval.objectives import ObjectiveOutput, Reference, Totals, from_values
from reval_kernels import TokenValues


def no_v(
    values: TokenValues, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """`reval.objectives.tapered` without the terms V(s_1) - V_ref(s_1)."""
    log_prob = values.log_prob.sum(1)
    residual = log_prob - reference.log_prob - batch.rewards / config.beta
    mu = batch.behavior.where(~batch.behavior.isnan(), values.log_prob.detach()).sum(1)
    weight = (log_prob.detach() - mu).clamp(max=0).exp().where(batch.rewards < 0, 1.0)
    return from_values((weight * residual.square()).sum() / totals.trajectories, residual, values, batch, config)
