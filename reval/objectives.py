"""ReVal and its family: each objective is a function from hidden states and what is known of the trajectories to a
loss, and knows what of the reference policy it needs.

All sum over trajectories and divide by `normalizer`, the number in the whole batch, so micro-batches add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reval_kernels import BellmanLoss, TokenValues, linear_reval_loss, linear_token_values

from .batching import Batch
from .config import ObjectiveConfig
from .model.head import OutputHead


class Reference(NamedTuple):
    """What the reference policy says about a batch."""

    v: Tensor
    """[B], V_ref(s_1)"""
    log_prob: Tensor
    """[B], sum_h log pi_ref(a_h|s_h)"""
    values: TokenValues | None = None
    """[B, T], for objectives that look at single tokens."""

    def returns(self) -> Tensor:
        """[B], V_ref(s_1) + sum_h log pi_ref: all that a trajectory's residual needs."""
        return self.v + self.log_prob


def reval(
    hidden: Tensor, head: OutputHead, batch: Batch, reference: Reference, config: ObjectiveConfig, normalizer: int
) -> BellmanLoss:
    """(V(s_1) - V_ref(s_1) + D - r / beta)^2, or its parts (arXiv 2603.23355, Eq. 2)."""
    known = reference.returns() if config.level == "trajectory" else reference.values
    assert known is not None, "reference_policy keeps token values where the level needs them"
    return linear_reval_loss(
        hidden,
        head.weight,
        batch.actions,
        known,
        batch.rewards,
        mask=batch.mask,
        beta=config.beta,
        level=config.level,
        semi_gradient=config.semi_gradient,
        normalizer=normalizer,
        **head.options(),
    )


def tbrm(
    hidden: Tensor, head: OutputHead, batch: Batch, reference: Reference, config: ObjectiveConfig, normalizer: int
) -> BellmanLoss:
    """(V(s_1) + D - r / beta)^2: ReVal with V_ref := 0 (arXiv 2505.15311)."""
    return linear_reval_loss(
        hidden,
        head.weight,
        batch.actions,
        reference.log_prob,
        batch.rewards,
        mask=batch.mask,
        beta=config.beta,
        normalizer=normalizer,
        **head.options(),
    )


def regression(
    hidden: Tensor, head: OutputHead, batch: Batch, reference: Reference, config: ObjectiveConfig, normalizer: int
) -> BellmanLoss:
    """(D - (r - mean_G r) / beta)^2, without any V (Kimi k1.5, arXiv 2501.12599); the rewards come centred."""
    values = linear_token_values(hidden, head.weight, batch.actions, mask=batch.mask, **head.options())
    residual = values.log_prob.sum(1) - reference.log_prob - batch.rewards / config.beta
    return BellmanLoss(residual.square().sum() / normalizer, residual.detach())


def grpo(
    hidden: Tensor, head: OutputHead, batch: Batch, reference: Reference, config: ObjectiveConfig, normalizer: int
) -> BellmanLoss:
    """-A / H sum_h log pi(a_h|s_h), A the shaped reward: GRPO (arXiv 2402.03300, Eq. 3) at its first update, where the
    importance ratio is 1, without a KL term. The residual is D - r / beta, for the metrics alone."""
    values = linear_token_values(hidden, head.weight, batch.actions, mask=batch.mask, **head.options())
    log_prob = values.log_prob.sum(1)
    loss = -(batch.rewards * log_prob / batch.mask.sum(1)).sum() / normalizer
    return BellmanLoss(loss, (log_prob - reference.log_prob - batch.rewards / config.beta).detach())


Objective = Callable[[Tensor, OutputHead, Batch, Reference, ObjectiveConfig, int], BellmanLoss]
OBJECTIVES: dict[str, Objective] = {"reval": reval, "tbrm": tbrm, "regression": regression, "grpo": grpo}


@torch.no_grad()
def residual_parts(
    hidden: Tensor, head: OutputHead, batch: Batch, reference: Reference, config: ObjectiveConfig, residual: Tensor
) -> dict[str, Tensor]:
    """What the residuals [B] are made of, for the metrics: V(s_1), V_ref(s_1), D and the residual, each [B].

    The fused loss returns no token values. V(s_1) is one state a trajectory, so it is computed apart, and D follows
    from the residual.
    """
    v = linear_token_values(hidden[:, 0], head.weight, batch.actions[:, 0], **head.options()).v
    baseline = {"reval": v - reference.v, "tbrm": v}.get(config.name, torch.zeros_like(v))
    return {
        "residual": residual,
        "v_policy": v,
        "v_reference": reference.v,
        "log_ratio": residual - baseline + batch.rewards / config.beta,
    }
