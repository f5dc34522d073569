"""ReVal's loss on a batch in TRL's layout, see batches.py and docs/method.md section 4."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from reval_kernels import TokenValues, bellman_loss

from .config import ReValConfig


class Loss(NamedTuple):
    """The loss of a batch of B completions and, detached, the terms of each residual."""

    loss: Tensor
    """float32 scalar, differentiable."""
    residual: Tensor
    """float32 [B], V(s_1) - V_ref(s_1) + D - r / beta; 0 for a row without action."""
    v: Tensor
    """float32 [B], V(s_1)"""
    log_ratio: Tensor
    """float32 [B], D = sum_h (log pi - log pi_ref)(a_h|s_h)"""


def reval_loss(values: TokenValues, batch: dict[str, Any], config: ReValConfig, normalizer: float) -> Loss:
    """The sum of the squared residuals, divided by `normalizer`.

    Args:
        values: the policy's values [B, C] of the completion's tokens, 0 where `batch["action_mask"]` is false.
        batch: from `collate`, with reference values.
        normalizer: the number of completions of the whole update.
    """
    rewards, mask, beta = batch["rewards"], batch["action_mask"], config.objective_beta
    first = mask.int().argmax(1, keepdim=True)
    v, log_prob = values.v.gather(1, first)[:, 0], values.log_prob.sum(1)
    if config.objective_taper or not config.objective_value_gradient:
        v = v if config.objective_value_gradient else v.detach()
        residual = v - batch["reference_v"] + log_prob - batch["reference_log_prob"] - rewards / beta
        weight = _taper(log_prob.detach(), batch) if config.objective_taper else 1.0
        loss = (weight * residual.square()).sum() / normalizer
    else:
        known = batch["reference_returns"] if config.objective_level == "trajectory" else batch["reference_values"]
        loss, residual = bellman_loss(
            values,
            known,
            rewards,
            mask=mask,
            beta=beta,
            level=config.objective_level,
            semi_gradient=config.objective_semi_gradient,
            normalizer=normalizer,
        )
    return Loss(loss, residual.detach(), v.detach(), log_prob.detach() - batch["reference_log_prob"])


def _taper(log_prob: Tensor, batch: dict[str, Any]) -> Tensor:
    """min(1, pi(tau) / mu(tau)) where the reward is negative, else 1: float32 [B]. 1 where mu is not known."""
    log_ratio = (log_prob - batch["behavior_log_prob"]).nan_to_num(nan=0.0)
    return log_ratio.clamp(max=0).exp().where(batch["rewards"] < 0, 1.0)


def has_signal(loss: Loss, batch: dict[str, Any], eps: float) -> Tensor:
    """bool [], whether a completion has a reward other than 0, or a residual that is larger than rounding makes it.

    AdamW divides the gradient by its own size: where nothing but rounding errors are left, they would move every weight
    by the learning rate.

    Args:
        eps: the precision of the type that the transformer computes in.
    """
    stored = torch.finfo(torch.float32).eps * (batch["reference_v"].abs() + batch["reference_log_prob"].abs())
    rounding = 4 * stored + 16 * eps * batch["action_mask"].sum(1).sqrt()
    return ((batch["rewards"] != 0) | ~(loss.residual.abs() <= rounding)).any()


class SkipWithoutSignal(TrainerCallback):
    """Takes all gradients away before the optimizer's step if no batch of the update has a signal.

    An optimizer leaves weights without gradient alone, and their momentum. A gradient of 0 would not do: momentum and
    weight decay move the weights all the same.
    """

    def __init__(self) -> None:
        self.seen = False
        """Whether a batch of this update, of any process, has a signal: the same on all processes."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model: nn.Module = kwargs["model"]
        if not self.seen:
            model.zero_grad(set_to_none=True)
        self.seen = False
