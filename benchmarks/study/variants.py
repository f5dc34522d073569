"""Objectives that only the studies use: what an option of ReVal is compared with (docs/evidence.md)."""

from __future__ import annotations

from reval.batching import Batch
from reval.config import ObjectiveConfig
from reval.objectives import ObjectiveOutput, Reference, Totals, from_values, taper_weight
from reval_kernels import TokenValues


def no_v(
    values: TokenValues, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """`reval.objectives.modified` with objective.taper, and without the terms V(s_1) - V_ref(s_1)."""
    log_prob = values.log_prob.sum(1)
    residual = log_prob - reference.log_prob - batch.rewards / config.beta
    return from_values(
        (taper_weight(values, batch) * residual.square()).sum() / totals.trajectories, residual, values, batch, config
    )
