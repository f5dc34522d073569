"""From logits or hidden states to the ReVal loss in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, library
from .bellman import bellman_loss, normalizer_tensor, reference_tensors
from .types import BellmanLoss, TokenValues
from .values import _temperature, token_values


def reval_loss(
    logits: Tensor,
    actions: Tensor,
    reference: TokenValues | Tensor,
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float,
    level: str = "trajectory",
    semi_gradient: bool = False,
    normalizer: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    inplace_grad: bool = False,
    backend: str | None = None,
) -> BellmanLoss:
    """The ReVal loss (arXiv 2603.23355, Eq. 2) from logits: `bellman_loss` of `token_values`.

    Args:
        logits: [B, T, V] padded, or [N, V] packed together with cu_seqlens.
        actions: [B, T] or [N], the token taken in each state.
        reference: TokenValues of the reference policy, or its returns [B].
        rewards: [B].
        mask, cu_seqlens, beta, level, semi_gradient, normalizer: as in `bellman_loss`.
        temperature, softcap, inplace_grad, backend: as in `token_values`.

    Returns:
        BellmanLoss(loss [], residual [B]), both differentiable in the logits.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument.
    """
    values = token_values(
        logits,
        actions,
        mask=mask,
        temperature=temperature,
        softcap=softcap,
        inplace_grad=inplace_grad,
        backend=backend,
    )
    return bellman_loss(
        values,
        reference,
        rewards,
        mask=mask,
        cu_seqlens=cu_seqlens,
        beta=beta,
        level=level,
        semi_gradient=semi_gradient,
        normalizer=normalizer,
        backend=backend,
    )


def linear_reval_loss(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    reference: TokenValues | Tensor,
    rewards: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float,
    level: str = "trajectory",
    semi_gradient: bool = False,
    normalizer: float | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    backend: str | None = None,
) -> BellmanLoss:
    """`reval_loss` of logits = hidden @ weight.T + bias, which never exist as a whole.

    A trajectory's residual closes within the trajectory, so the gradient is computed in the forward pass, chunk by
    chunk of whole trajectories, before their logits are dropped. A trajectory longer than a chunk falls back to
    computing its logits twice.

    Args:
        hidden: [B, T, D] padded, or [N, D] packed together with cu_seqlens.
        weight: [V, D], the head; bias: [V] or None.
        actions, reference, rewards, mask, cu_seqlens, beta, level, semi_gradient, normalizer: as in `reval_loss`.
        temperature, softcap, backend: as in `token_values`.

    Returns:
        BellmanLoss(loss [], residual [B]). The loss is differentiable in hidden, weight and bias, any number of times
        and with any upstream gradient; the residual is detached (use `linear_token_values` and `bellman_loss` for a
        gradient through it). There is no second-order gradient: asking for one is a RuntimeError.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument.
    """
    checks.head_arguments(hidden, weight, bias)
    checks.token_arguments(actions, hidden.shape[:-1], hidden.device, mask, temperature, softcap)
    checks.bellman_arguments(hidden.shape[:-1], hidden.device, reference, rewards, mask, cu_seqlens, beta)
    checks.level(level, reference, semi_gradient, normalizer)
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, residual, *_ = library.linear_reval_loss(
        hidden,
        weight,
        bias,
        actions,
        mask,
        cu_seqlens,
        *_temperature(temperature),
        softcap,
        reference_tensors(reference),
        rewards,
        float(beta),
        level,
        semi_gradient,
        normalizer_tensor(normalizer),
        needs,
        backend,
    )
    return BellmanLoss(loss, residual.detach())
