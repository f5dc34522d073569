"""TD targets and Bellman losses, from token values, from logits or from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, library
from .contract import BellmanOptions, HeadInputs, Layout, Level, Needs, Reference
from .types import BellmanLoss, TDTargets, TokenValues
from .values import token_values, transform_of

LEVELS = {level.name.lower(): level for level in Level}
"""The level for each name that users pass: "trajectory", "token", "subtrajectory"."""


def td_targets(
    values: TokenValues,
    reference: TokenValues,
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float,
    gamma: float = 1.0,
    backend: str | None = None,
) -> TDTargets:
    """TD target, TD error and endogenous reward of every action.

    h = 1, ..., H counts the actions of a trajectory, and V(s_{H+1}) = 0. Sources: arXiv 2603.23355, the Bellman
    operator behind Eq. 2; for the endogenous reward e_h, arXiv 2506.23235.

        e_h = Q_ref(s_h, a_h) - gamma V_ref(s_{h+1})
        y_h = e_h + 1[h=H] r / beta + gamma V(s_{h+1})
        d_h = Q(s_h, a_h) - y_h

    Args:
        values: the policy's TokenValues, [B, T] padded or [N] packed; only q and v are used.
        reference: the reference policy's TokenValues, of the same shape. They get no gradient.
        rewards: [B] float, the outcome reward r of each trajectory. They get no gradient.
        mask: [B, T] or [N] bool, true where the token is an action. s_{h+1} is the state of the next action: tokens of
            the environment between two actions are skipped.
        cu_seqlens: [B + 1] int32 or int64, for packed tokens: 0, ..., N. Trajectory b has the tokens cu_seqlens[b] to
            cu_seqlens[b + 1] - 1.
        beta: the reward's temperature, positive. A finite beta must be in the range of the values' dtype; inf removes
            the rewards.
        gamma: the discount, a finite number.
        backend: as in `token_values`.

    Returns:
        TDTargets(target, error, endogenous_reward) in the shape and dtype of the values, 0 where masked out. `target`
        and `error` are differentiable in values.q and values.v. Detach `target` for a semi-gradient.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument. On a
            GPU wrong values in the data (actions, cu_seqlens) fail a device-side assert instead, as in `token_values`.

    Examples:
        >>> import torch
        >>> from reval_kernels import td_targets, token_values
        >>> actions = torch.zeros(1, 2, dtype=torch.long)  # 1 trajectory of 2 actions
        >>> values = token_values(torch.zeros(1, 2, 10), actions)  # uniform: Q = 0, V = log 10
        >>> targets = td_targets(values, values, torch.tensor([1.0]), beta=0.5)
        >>> targets.endogenous_reward  # Q - V of the next state, which is 0 at the end
        tensor([[-2.3026,  0.0000]])
        >>> targets.error  # the policy is its reference, so only r / beta is left, at the last action
        tensor([[ 0., -2.]])
    """
    if not isinstance(reference, TokenValues):
        raise TypeError(f"reference must be TokenValues (returns are not enough), got {type(reference).__name__}")
    _check_values(values)
    checks.bellman_arguments(values.q.shape, values.q, reference, rewards, mask, cu_seqlens, beta)
    checks.finite("gamma", gamma, values.q.dtype)
    target, error, endogenous = library.td_targets(
        TokenValues(values.q, values.v, values.log_prob.detach()),
        Reference.of(reference),
        rewards,
        Layout(mask, cu_seqlens),
        float(beta),
        float(gamma),
        backend,
    )
    return TDTargets(target, error, endogenous.detach())  # autograd gives every output of an op a graph


def bellman_loss(
    values: TokenValues,
    reference: TokenValues | Tensor,
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float,
    level: str = "trajectory",
    semi_gradient: bool = False,
    normalizer: float | None = None,
    backend: str | None = None,
) -> BellmanLoss:
    """The squared Bellman residual of whole trajectories (arXiv 2603.23355, Eq. 2), of tokens, or of subtrajectories.

        residual = sum_h d_h = V(s_1) - V_ref(s_1) + sum_h (log pi - log pi_ref)(a_h|s_h) - r / beta

        level "trajectory":     loss = sum over trajectories of residual^2 / normalizer
        level "token":          loss = sum over trajectories and h of d_h^2 / normalizer
        level "subtrajectory":  loss = sum over trajectories and h of (sum_{k>=h} d_k)^2 / normalizer

    The reference's values are subtracted from the policy's values first. So a policy that equals its reference has loss
    and gradient exactly 0 where r = 0. For TBRM (arXiv 2505.15311), pass the returns sum_h log pi_ref, without V_ref,
    as `reference`.

    Args:
        values: the policy's TokenValues, [B, T] padded or [N] packed, differentiable.
        reference: the reference policy's TokenValues of the same shape. Or, for level "trajectory", its returns [B],
            V_ref(s_1) + sum_h log pi_ref(a_h|s_h), best summed in float64 and then rounded to the dtype of the values,
            as it is done here with the policy's return. They get no gradient.
        rewards, mask, cu_seqlens, beta, backend: as in `td_targets`.
        level: "trajectory", "token" or "subtrajectory".
        semi_gradient: no gradient through the TD target; for level "token" only. arXiv 2505.15311, appendix H.3, shows
            that the form with this gradient (the residual gradient) collapses.
        normalizer: the divisor of the sum, positive and in the range of the values' dtype; None means the number of
            trajectories B. For micro-batches or several ranks, pass the number of trajectories of the whole batch: then
            their losses add up to the loss of that batch.

    Returns:
        BellmanLoss(loss [], residual [B]), both differentiable. A trajectory without actions has residual 0.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument. On a
            GPU wrong values in the data (actions, cu_seqlens) fail a device-side assert instead, as in `token_values`.

    Examples:
        >>> import torch
        >>> from reval_kernels import bellman_loss, token_values
        >>> actions = torch.zeros(2, 3, dtype=torch.long)
        >>> values = token_values(torch.zeros(2, 3, 10, requires_grad=True), actions)
        >>> reference = token_values(torch.zeros(2, 3, 10), actions)
        >>> bellman_loss(values, reference, torch.tensor([1.0, 0.0]), beta=0.5).residual.detach()
        tensor([-2.,  0.])
        >>> loss, _ = bellman_loss(values, reference.returns(), torch.tensor([1.0, 0.0]), beta=0.5)
        >>> loss.item()  # the returns alone are enough at level "trajectory"
        2.0
    """
    _check_values(values)
    checks.bellman_arguments(values.q.shape, values.q, reference, rewards, mask, cu_seqlens, beta, normalizer)
    options = _options(beta, level, semi_gradient, normalizer, reference)
    out = library.bellman_loss(
        TokenValues(values.q, values.v, values.log_prob),
        Reference.of(reference),
        rewards,
        Layout(mask, cu_seqlens),
        options,
        backend,
    )
    return BellmanLoss(out.loss, out.residual)


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
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument. On a
            GPU wrong values in the data (actions, cu_seqlens) fail a device-side assert instead, as in `token_values`.

    Examples:
        >>> import torch
        >>> from reval_kernels import reval_loss
        >>> logits = torch.zeros(2, 3, 10, requires_grad=True)
        >>> actions = torch.zeros(2, 3, dtype=torch.long)
        >>> returns = torch.full((2,), -4.6052)  # of a uniform reference: log 10 - 3 log 10
        >>> loss, residual = reval_loss(logits, actions, returns, torch.tensor([1.0, 0.0]), beta=0.5)
        >>> loss.backward()
        >>> logits.grad[0, :2, 0]  # of the action's logit: Q(s_1, a_1) shall rise by 1, log pi(a_2|s_2) too
        tensor([-2.0000, -1.8000])
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
    precision: str = "exact",
    backend: str | None = None,
) -> BellmanLoss:
    """`reval_loss` of logits = hidden @ weight.T + bias. The logits are never stored as a whole.

    The residual of a trajectory depends on this trajectory alone. So the forward pass works on chunks of whole
    trajectories, and computes the gradient of a chunk before it frees the chunk's logits. A trajectory longer than a
    chunk has its logits computed twice.

    Args:
        hidden: [B, T, D] padded, or [N, D] packed together with cu_seqlens.
        weight: [V, D], the head; bias: [V] or None.
        actions, reference, rewards, mask, cu_seqlens, beta, level, semi_gradient, normalizer: as in `reval_loss`.
        temperature, softcap, backend: as in `token_values`.
        precision: as in `linear_token_values`.

    Returns:
        BellmanLoss(loss [], residual [B]). The loss is differentiable in hidden, weight and bias: with any upstream
        gradient, and several times if the graph is retained. The residual is detached; for a gradient through the
        residual, use `linear_token_values` and `bellman_loss`.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument. On a
            GPU wrong values in the data (actions, cu_seqlens) fail a device-side assert instead, as in `token_values`.

    Examples:
        >>> import torch
        >>> from reval_kernels import linear_reval_loss
        >>> hidden, head = torch.zeros(5, 4, requires_grad=True), torch.randn(10, 4)
        >>> ends = torch.tensor([0, 2, 5])  # packed: trajectories of 2 and 3 tokens
        >>> returns = torch.tensor([-2.3026, -4.6052])
        >>> actions, rewards = torch.zeros(5, dtype=torch.long), torch.tensor([1.0, 0.0])
        >>> loss, residual = linear_reval_loss(hidden, head, actions, returns, rewards, cu_seqlens=ends, beta=0.5)
        >>> residual.round(decimals=3)
        tensor([-2.,  0.])
    """
    checks.head_arguments(hidden, weight, bias, precision)
    checks.token_arguments(actions, hidden, mask, temperature, softcap)
    checks.bellman_arguments(hidden.shape[:-1], hidden, reference, rewards, mask, cu_seqlens, beta, normalizer)
    options = _options(beta, level, semi_gradient, normalizer, reference)
    grad = torch.is_grad_enabled()
    out = library.linear_reval_loss(
        HeadInputs(hidden, weight, bias, precision),
        actions,
        Layout(mask, cu_seqlens),
        transform_of(temperature, softcap),
        Reference.of(reference),
        rewards,
        options,
        Needs(*(grad and x is not None and x.requires_grad for x in (hidden, weight, bias))),
        backend,
    )
    return BellmanLoss(out.loss, out.residual.detach())


def _options(
    beta: float, level: str, semi_gradient: bool, normalizer: float | None, reference: TokenValues | Tensor
) -> BellmanOptions:
    """Check the options of a loss and pack them for the ops."""
    if level not in list(LEVELS):  # a list: `level` may be unhashable
        raise ValueError(checks.unknown("level", level, list(LEVELS)))
    if level != "trajectory" and not isinstance(reference, TokenValues):
        raise ValueError(f"level {level!r} needs the reference's TokenValues, got its returns (a tensor)")
    if semi_gradient and level != "token":
        raise ValueError(f"semi_gradient stops the gradient at the TD target of level 'token', got level {level!r}")
    if normalizer is None:
        return BellmanOptions(float(beta), LEVELS[level], semi_gradient)
    # a tensor, because torch.compile makes one graph for all values of a tensor, but a new graph for every number
    divisor = torch.ones((), dtype=torch.float64, device="cpu") * float(normalizer)
    return BellmanOptions(float(beta), LEVELS[level], semi_gradient, divisor)


def _check_values(values: TokenValues) -> None:
    if not isinstance(values, TokenValues):
        raise TypeError(f"values must be TokenValues, got {type(values).__name__}")
    q, v, log_prob = values.q, values.v, values.log_prob  # torch.compile of torch 2.7 cannot slice a named tuple
    checks.tensor("values.q", q, checks.WIDE, None, None)
    checks.alike(("values.v", "values.log_prob"), (v, log_prob), (q.dtype,), q.shape, q.device)
