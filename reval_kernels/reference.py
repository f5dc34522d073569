"""The definition of every public function in plain PyTorch: written to be obviously right, not to be fast.

The functions work in every floating dtype up to float64, on every device, with plain autograd. The tests compare every
backend with this file in float64. The only source of this file is docs/method.md (arXiv 2603.23355, with the
corrections noted there). Arguments and results are those of the functions of the same name in `reval_kernels`.

Example: a fused result against its definition.

    >>> import torch
    >>> from reval_kernels import reference, token_values
    >>> logits, actions = torch.randn(2, 3, 10), torch.randint(10, (2, 3))
    >>> torch.allclose(token_values(logits, actions).v, reference.token_values(logits, actions).v)
    True

Letters: `...` is [B, T] (padded) or [N] (packed), M unmasked tokens, V words of the vocabulary, D features, B
trajectories.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .types import BellmanLoss, TDTargets, TokenValues


def token_values(
    logits: Tensor,
    actions: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> TokenValues:
    """Q, V and log pi of each action from logits [..., V]. See `reval_kernels.token_values`."""
    mask = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask
    z = logits[mask]  # [M, V]. Masked positions may hold NaN: indexing keeps them out of the graph
    z = z if z.dtype == torch.float64 else z.float()
    if softcap is not None and softcap != math.inf:
        z = softcap * torch.tanh(z / softcap)
    cooled = z / (temperature[mask].to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    z = torch.where(z.isinf(), z, cooled)  # -inf at an infinite temperature too, where the quotient is NaN

    taken = actions[mask].long()[:, None]
    log_pi = torch.log_softmax(z, dim=-1)
    q, v, log_prob = z.gather(-1, taken)[:, 0], torch.logsumexp(z, dim=-1), log_pi.gather(-1, taken)[:, 0]
    # a word with logit -inf contributes 0; the product 0 * -inf would be NaN
    entropy = -(log_pi.exp() * log_pi.masked_fill(log_pi == -torch.inf, 0)).sum(-1) if with_entropy else None

    def scatter(x: Tensor) -> Tensor:
        return x.new_zeros(mask.shape).masked_scatter(mask, x)

    return TokenValues(scatter(q), scatter(v), scatter(log_prob), None if entropy is None else scatter(entropy))


def linear_token_values(
    hidden: Tensor,
    weight: Tensor,
    actions: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> TokenValues:
    """`token_values` of logits = hidden [..., D] @ weight [V, D].T + bias [V]."""
    logits = _head(hidden, weight, bias, mask)
    return token_values(logits, actions, mask=mask, temperature=temperature, softcap=softcap, with_entropy=with_entropy)


def td_targets(
    values: TokenValues,
    reference: TokenValues,
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float,
    gamma: float = 1.0,
) -> TDTargets:
    """TD targets, TD errors and endogenous rewards of every action (docs/method.md section 2)."""
    q, v, shape = values.q.flatten(), values.v.flatten(), values.q.shape
    q_ref, v_ref = (_constant(x, q.dtype).flatten() for x in (reference.q, reference.v))
    target, error = (torch.zeros_like(q) + _zero(q, v) for _ in range(2))
    endogenous = torch.zeros_like(q)
    for b, steps in enumerate(_trajectories(values.q, mask, cu_seqlens)):
        outcome = torch.zeros_like(q[steps])
        outcome[-1:] = rewards[b].to(q.dtype) / beta
        v_next, v_ref_next = _shift(v[steps]), _shift(v_ref[steps])
        e = q_ref[steps] - gamma * v_ref_next
        endogenous = endogenous.index_put((steps,), e)
        target = target.index_put((steps,), e + outcome + gamma * v_next)
        # subtract the reference first: each difference is exactly 0 where policy and reference agree
        error = error.index_put((steps,), (q[steps] - q_ref[steps]) - gamma * (v_next - v_ref_next) - outcome)
    return TDTargets(target.view(shape), error.view(shape), endogenous.view(shape))


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
) -> BellmanLoss:
    """The squared Bellman residual at one of three levels (docs/method.md sections 3 and 4)."""
    v, log_prob = values.v.flatten(), values.log_prob.flatten()
    trajectories = _trajectories(values.q, mask, cu_seqlens)
    if level == "token":
        frozen = TokenValues(values.q, values.v.detach(), values.log_prob) if semi_gradient else values
        assert isinstance(reference, TokenValues)
        errors = td_targets(frozen, reference, rewards, mask=mask, cu_seqlens=cu_seqlens, beta=beta).error.flatten()

    residuals, total = [], _zero(values.q.flatten(), v, log_prob)
    for b, steps in enumerate(trajectories):
        if len(steps) == 0:
            residuals.append(_zero(v, log_prob))
            continue
        outcome = rewards[b].to(v.dtype) / beta
        if isinstance(reference, TokenValues):
            dv = v[steps] - _constant(reference.v, v.dtype).flatten()[steps]
            dlog = log_prob[steps] - _constant(reference.log_prob, v.dtype).flatten()[steps]
            residual = dv[0] + dlog.sum() - outcome
        else:
            residual = v[steps][0] + log_prob[steps].sum() - _constant(reference[b], v.dtype) - outcome
        residuals.append(residual)
        if level == "trajectory":
            total = total + residual**2
        elif level == "token":
            total = total + (errors[steps] ** 2).sum()
        else:  # subtrajectory: for every action, the sum of the TD errors from this action to the last
            to_go = dv + dlog.flip(0).cumsum(0).flip(0) - outcome
            total = total + (to_go**2).sum()
    residual = torch.stack(residuals) if residuals else v[:0] + log_prob[:0]
    return BellmanLoss(total / (max(len(trajectories), 1) if normalizer is None else normalizer), residual)


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
) -> BellmanLoss:
    """`bellman_loss` of `token_values`."""
    values = token_values(logits, actions, mask=mask, temperature=temperature, softcap=softcap)
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
) -> BellmanLoss:
    """`reval_loss` of logits = hidden @ weight.T + bias."""
    return reval_loss(
        _head(hidden, weight, bias, mask),
        actions,
        reference,
        rewards,
        mask=mask,
        cu_seqlens=cu_seqlens,
        beta=beta,
        level=level,
        semi_gradient=semi_gradient,
        normalizer=normalizer,
        temperature=temperature,
        softcap=softcap,
    )


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    if mask is not None:  # masked positions may hold NaN, which must not reach the weight's gradient
        hidden = hidden.where(mask[..., None], 0)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)


def _zero(*inputs: Tensor) -> Tensor:
    """0 with a graph to each input [N], so that a result without actions has gradient 0. Reads no entry, which may be
    NaN where masked out."""
    return torch.stack([x[:0].sum() for x in inputs]).sum()


def _constant(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype)


def _trajectories(like: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> list[Tensor]:
    """The flat indices of each trajectory's actions, in order."""
    flat = torch.arange(like.numel(), device=like.device)
    if cu_seqlens is None:
        pieces = list(flat.view(like.shape))
    else:
        pieces = [flat[a:b] for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)]
    return pieces if mask is None else [piece[mask.flatten()[piece]] for piece in pieces]


def _shift(v: Tensor) -> Tensor:
    """V(s_{h+1}) from V(s_h), where s_{h+1} is the state of the next action. 0 after the last action (terminal)."""
    return torch.cat([v[1:], v.new_zeros(min(1, len(v)))])
