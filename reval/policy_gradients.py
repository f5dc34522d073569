"""Policy gradients: GRPO, the baseline of ReVal, and its off-policy relatives. Each is a `ValueObjective`.

A is the advantage, which is the shaped reward r. mu is the behaviour policy (`Batch.behavior`): the policy at the start
of the iteration that first used the response. w = pi / mu is the importance ratio: of a token, or of a whole response.
Where mu is not known, w is 1 and only carries the gradient, as in the first update on a fresh response.
"""

from __future__ import annotations

from torch import Tensor

from reval_kernels import TokenValues

from .batching import Batch
from .config import OBJECTIVES, ConfigError, ObjectiveConfig
from .objectives import (
    ObjectiveOutput,
    Reference,
    Totals,
    ValueObjective,
    from_values,
    log_ratio,
    regression,
    taper_weight,
    tba,
)
from .user_code import find


def grpo(
    values: TokenValues, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """-min(w_h A, clip(w_h, 1 - clip_low, 1 + clip_high) A) of each token (GRPO, arXiv 2402.03300, without a KL term).

    objective.normalization says how tokens are averaged: as in GRPO, in DAPO (arXiv 2503.14476) or in Dr. GRPO (arXiv
    2503.20783). With reward.shaping=normalized A is GRPO's, with centered Dr. GRPO's.
    """
    ratio = log_ratio(values, batch).exp()
    advantage = batch.rewards[:, None]
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -(ratio * advantage).minimum(clipped * advantage)
    return _output(_average(loss, batch, config, totals), values, batch, reference, config)


def topr(
    values: TokenValues, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """-sg(w) A log pi with w = 1 for A >= 0, else min(pi(tau) / mu(tau), 1) (TOPR, arXiv 2503.14286).

    A response that was right pulls in full, whoever wrote it. A wrong one pushes only as far as the policy would still
    write it.
    """
    loss = -(taper_weight(values, batch) * batch.rewards * values.log_prob.sum(1)).sum() / totals.trajectories
    return _output(loss, values, batch, reference, config)


def asymre(
    values: TokenValues, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """-(A + baseline_shift) log pi, without a ratio (AsymRE, arXiv 2506.20520).

    A positive shift lowers the baseline: right responses count more than wrong ones, which an off-policy gradient
    without a ratio needs.
    """
    loss = -((batch.rewards + config.baseline_shift) * values.log_prob.sum(1)).sum() / totals.trajectories
    return _output(loss, values, batch, reference, config)


def kimi(
    values: TokenValues, batch: Batch, reference: Reference, config: ObjectiveConfig, totals: Totals
) -> ObjectiveOutput:
    """-w_h A + beta (log w_h)^2 of each token, averaged over all tokens of the batch (Kimi K2.5).

    The first term has no gradient where w_h is below 1 - clip_low or above 1 + clip_high, whatever the sign of A.
    """
    log_w = log_ratio(values, batch)
    ratio = log_w.exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    loss = -clipped * batch.rewards[:, None] + config.beta * log_w.square()
    return _output(loss.where(batch.mask, 0).sum() / totals.actions, values, batch, reference, config)


def _average(loss: Tensor, batch: Batch, config: ObjectiveConfig, totals: Totals) -> Tensor:
    """The average over tokens and responses that objective.normalization names, of a loss [B, H]."""
    loss = loss.where(batch.mask, 0)
    if config.normalization == "response":
        return (loss.sum(1) / batch.mask.sum(1)).sum() / totals.trajectories
    if config.normalization == "token":
        return loss.sum() / totals.actions
    return loss.sum() / (totals.trajectories * totals.longest)


def _output(
    loss: Tensor, values: TokenValues, batch: Batch, reference: Reference, config: ObjectiveConfig
) -> ObjectiveOutput:
    """The losses here have no residual. The metrics get D - r / beta, as for the other objectives."""
    return from_values(
        loss, values.log_prob.sum(1) - reference.log_prob - batch.rewards / config.beta, values, batch, config
    )


FROM_VALUES: dict[str, ValueObjective] = {
    "regression": regression,
    "tba": tba,
    "grpo": grpo,
    "topr": topr,
    "asymre": asymre,
    "kimi": kimi,
}


def value_objective(name: str) -> ValueObjective:
    """The objective of this name, or the user's own: "package.module:function" or "path/to/file.py:function".

    Raises ConfigError if there is no such file, module or function.
    """
    return FROM_VALUES.get(name) or find(name, "objective.name", OBJECTIVES, ConfigError)
