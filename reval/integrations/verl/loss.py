"""The policy loss `reval` and the advantage estimator `reval` of verl.

verl calls a policy loss with log-probabilities and advantages. It passes no V and no reference. The engine of engine.py
therefore calls verl's loss function inside `given`, and `reval_policy_loss` reads both from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.utils.padding import no_padding_2_padding

from reval_kernels import TokenValues, bellman_loss
from reval_kernels.losses import LEVELS

_given: ContextVar[tuple[dict[str, Tensor], TensorDict] | None] = ContextVar("model output and data", default=None)


@contextmanager
def given(model_output: dict[str, Tensor], data: TensorDict) -> Iterator[None]:
    """Inside, `reval_policy_loss` finds the model's output of a micro-batch and the micro-batch."""
    token = _given.set((model_output, data))
    try:
        yield
    finally:
        _given.reset(token)


@dataclass
class ReValLossConfig(PolicyLossConfig):
    """`actor_rollout_ref.actor.policy_loss`, where `_target_` is reval.integrations.verl.loss.ReValLossConfig."""

    loss_mode: str = "reval"
    beta: float | None = None
    """The reward's temperature: positive. Longer responses need a smaller one (docs/method.md section 6)."""
    level: str = "trajectory"
    """trajectory, token or subtrajectory: which residuals the loss squares."""
    semi_gradient: bool = False
    """No gradient through the TD target; for level=token only."""

    def __post_init__(self) -> None:
        at = "actor_rollout_ref.actor.policy_loss"
        beta = None if isinstance(self.beta, bool) else self.beta
        if not isinstance(beta, int | float) or not 0 < beta < math.inf:
            raise ValueError(f"{at}.beta must be a positive number, got {self.beta!r}")
        if self.level not in tuple(LEVELS):
            raise ValueError(f"{at}.level must be one of {', '.join(LEVELS)}; got {self.level!r}")
        if not isinstance(self.semi_gradient, bool) or (self.semi_gradient and self.level != "token"):
            raise ValueError(
                f"{at}.semi_gradient must be false, or true with {at}.level=token; "
                f"got {self.semi_gradient!r} with {self.level}"
            )


@register_policy_loss("reval")
def reval_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The squared Bellman residual (arXiv 2603.23355, Eq. 2), divided by the trajectories of verl's mini-batch.

    Args:
        old_log_prob, loss_agg_mode: not used. ReVal has no importance ratio, and no choice of an average over tokens.
        log_prob: [B, T], differentiable.
        advantages: [B, T]; the shaped reward r, the same on every action of a trajectory. So algorithm.adv_estimator is
            reval (r as it is), or grpo with algorithm.norm_adv_by_std_in_grpo=false (r minus its group's mean).
        response_mask: [B, T], true for the model's own tokens.
        config: its `policy_loss` is a ReValLossConfig, its `global_batch_info` what verl's ppo_loss puts there.
        rollout_is_weights: must be None.

    Returns:
        The loss, a scalar, times the number of data-parallel ranks, because FSDP averages their gradients; and metrics.

    Raises:
        RuntimeError, TypeError, ValueError: the engine, a setting or a field of the data is missing.
    """
    options = config.policy_loss if config is not None else None
    if config is None or not isinstance(options, ReValLossConfig) or options.beta is None:
        target = f"{ReValLossConfig.__module__}.{ReValLossConfig.__name__}"
        raise TypeError(f"loss_mode=reval needs actor.policy_loss._target_={target}, got {type(options).__name__}")
    if rollout_is_weights is not None:
        raise ValueError("loss_mode=reval has no importance weights: set algorithm.rollout_correction=null")
    mask = response_mask.bool()
    values, reference = _values(log_prob)
    first = mask.int().argmax(1, keepdim=True)
    info = config.global_batch_info
    total = info.get("global_batch_size") or max(int(mask.any(1).sum()), 1)
    out = bellman_loss(
        values,
        reference,
        advantages.gather(1, first)[:, 0],
        mask=mask,
        beta=options.beta,
        level=options.level,
        semi_gradient=options.semi_gradient,
        normalizer=total,
    )
    acting = mask.any(1)
    residual, v_gap = out.residual.detach()[acting], (values.v - reference.v).detach().gather(1, first)[acting]
    metrics = {"actor/reval_residual_abs": _mean(residual.abs()), "actor/reval_v_gap": _mean(v_gap)}
    return out.loss * info.get("dp_size", 1), metrics


def _values(log_prob: Tensor) -> tuple[TokenValues, TokenValues]:
    """The values of the policy and of the reference in the layout of `log_prob`, [B, T]."""
    found = _given.get()
    if found is None or "state_values" not in found[0]:
        raise RuntimeError(
            "loss_mode=reval needs the engine that returns V: start verl with VERL_ENGINE_VENDOR=reval in the "
            "environment of all workers, and actor.strategy=fsdp or fsdp2"
        )
    output, data = found
    for field in ("ref_log_prob", "ref_state_values"):
        if field not in data:
            raise ValueError(f"loss_mode=reval needs the field {field}: set trainer.v1.trainer_mode=reval")
    v = no_padding_2_padding(output["state_values"], data)
    ref_v, ref_log_prob = (
        torch.nested.to_padded_tensor(data[field], 0.0).to(v.dtype) for field in ("ref_state_values", "ref_log_prob")
    )
    return TokenValues(v + log_prob, v, log_prob), TokenValues(ref_v + ref_log_prob, ref_v, ref_log_prob)


def _mean(x: Tensor) -> float:
    return float(x.mean()) if x.numel() else 0.0


@register_adv_est("reval")
def reward_on_every_action(token_level_rewards: Tensor, response_mask: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """The reward of each trajectory on every one of its actions, twice: verl wants advantages and returns, [B, T]."""
    rewards = token_level_rewards.sum(-1, keepdim=True) * response_mask
    return rewards, rewards
