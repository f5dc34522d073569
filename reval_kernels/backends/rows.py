"""The token values of one chunk of logits in float32 (or float64), and the gradient, which overwrites the chunk.

Letters: C tokens of the chunk, V words of the vocabulary, z a logit after softcap and temperature, p = softmax(z).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Cotangents, RowValues, Statistics, Transform


def row_values(logits: Tensor, actions: Tensor, transform: Transform, with_entropy: bool) -> RowValues:
    """The six numbers [C] of each row of logits [C, V]; `transform` has temperatures [C]."""
    z, _ = _transformed(logits, transform)
    top, first = z.max(dim=-1, keepdim=True)
    row_max = torch.where(top.isinf(), 0, top)  # for a row with only -inf: exp(-inf - 0) is 0, but -inf - -inf is NaN
    shifted = z - row_max
    # The largest weight, 1, stays out of the sum. Added to 1, the other weights would lose digits: float32 cannot
    # hold 1 + 1e-9. In a confident state, 1 - p consists of these digits. log1p adds the 1 without losing them.
    weights = shifted.exp().scatter_(-1, first, 0)
    others = weights.sum(dim=-1)
    top, row_max = top[:, 0], row_max[:, 0]
    log_sum = torch.where(top.isinf(), top, others.log1p())
    q = z.gather(-1, actions[:, None])[:, 0]
    entropy = torch.zeros_like(q)
    if with_entropy:
        # a word at -inf has weight 0 and would contribute 0 * -inf = NaN
        entropy = log_sum - (weights * shifted.clamp(min=torch.finfo(z.dtype).min)).sum(dim=-1) / (1 + others)
    return RowValues(q, row_max + log_sum, (q - row_max) - log_sum, entropy, row_max, log_sum)


def row_gradient_(
    logits: Tensor, actions: Tensor, transform: Transform, statistics: Statistics, cotangents: Cotangents
) -> Tensor:
    """The gradient [C, V] of the chunk's logits; `logits` is overwritten. The other tensors are [C].

    docs/method.md section 4: dlogits = dq * onehot + dv * softmax, with log_prob = q - v. And
    d entropy / dz = -p (log p + entropy).
    """
    row_max, log_sum, entropy = (x[:, None] for x in statistics)
    dq, dv, dlog = (x[:, None] for x in cotangents[:3])
    action = actions[:, None]
    z, tanh = _transformed(logits, transform)
    log_pi = torch.sub(z, row_max, out=logits).sub_(log_sum)
    log_pi_action = log_pi.gather(-1, action)
    # log_prob has the derivative 1 - p at the action. It comes from expm1, so a confident state keeps its gradient.
    # The product dv * p is a separate term, so an unlikely action keeps its gradient.
    at_action = dq + dv * log_pi_action.exp() - dlog * torch.expm1(log_pi_action)
    if cotangents.dentropy is not None:
        p = log_pi.exp()
        # where p = 0 and log p = -inf, p log p must be 0, its limit; the product would be NaN
        spread = torch.where(p > 0, p * (log_pi + entropy), 0).mul_(cotangents.dentropy[:, None])
        gradient = p.mul_(dv - dlog)
        at_action = at_action - spread.gather(-1, action)
        gradient.sub_(spread)
    else:
        gradient = log_pi.exp_().mul_(dv - dlog)
    gradient.scatter_(-1, action, at_action)
    if tanh is not None:
        gradient.mul_(tanh.square_().neg_().add_(1))
    if transform.temperatures is not None or transform.temperature != 1.0:
        gradient.mul_(inverse_temperature(transform, gradient.dtype))
    return gradient


def inverse_temperature(transform: Transform, dtype: torch.dtype) -> Tensor | float:
    """1 / temperature as a factor of a tensor [C, *] of this dtype: a tensor [C, 1], or one number.

    For an infinite temperature it is not 0 but the smallest positive number: a logit of -inf times 0 would be NaN.
    """
    least = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    if transform.temperatures is None:
        return max(1 / transform.temperature, least)
    return transform.temperatures[:, None].to(dtype).reciprocal().clamp_(min=least)


def softcap_slope(logits: Tensor, softcap: float) -> Tensor:
    """The derivative of softcap * tanh(logits / softcap).

    1 - tanh^2 would cancel for a large logit: at 10 times the softcap its true value, 8e-9, would be 0 in float32.
    """
    e = torch.exp(-2 / softcap * logits.abs())
    return 4 * e / (1 + e).square()


def _transformed(logits: Tensor, transform: Transform) -> tuple[Tensor, Tensor | None]:
    """The transformed logits, and tanh(logits / softcap) where there is a softcap. `logits` stays unchanged."""
    z, tanh = logits, None
    if transform.softcap is not None:
        tanh = torch.tanh(logits / transform.softcap)
        z = tanh * transform.softcap
    if transform.temperatures is not None or transform.temperature != 1.0:
        z = z * inverse_temperature(transform, z.dtype)
    return z, tanh
