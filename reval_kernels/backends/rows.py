"""One chunk of logits in fp32 (or fp64): its token values, and its gradient written over it.

Letters: C tokens of the chunk, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Transform(NamedTuple):
    """What happens to logits before anything is read off them: softcap * tanh(z / softcap), then z / temperature."""

    temperature: float | Tensor = 1.0
    """A number, or one per token [...]."""
    softcap: float | None = None

    def at(self, index: tuple[Tensor, ...]) -> Transform:
        """The transform of some tokens: temperature [C, 1]."""
        if isinstance(self.temperature, Tensor):
            return self._replace(temperature=self.temperature[index][:, None])
        return self

    def flattened(self) -> Transform:
        if isinstance(self.temperature, Tensor):
            return self._replace(temperature=self.temperature.reshape(-1))
        return self

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The transformed logits, and tanh(logits / softcap) where there is a softcap. `logits` is left alone."""
        z, tanh = logits, None
        if self.softcap is not None:
            tanh = torch.tanh(logits / self.softcap)
            z = tanh * self.softcap
        if isinstance(self.temperature, Tensor) or self.temperature != 1.0:
            z = z / (self.temperature.to(z.dtype) if isinstance(self.temperature, Tensor) else self.temperature)
        return z, tanh

    def slope(self, logits: Tensor) -> Tensor:
        """The derivative of softcap * tanh(logits / softcap), without the cancellation of 1 - tanh^2 far out."""
        e = torch.exp(-2 / self.softcap * logits.abs())
        return 4 * e / (1 + e).square()


def row_values(logits: Tensor, actions: Tensor, transform: Transform, with_entropy: bool) -> tuple[Tensor, ...]:
    """q, v, log_prob, entropy (0 if not wanted), row_max, log_sum: each [C].

    v = row_max + log_sum; both parts are returned because v alone, near 1e4, would lose the digits that the gradient
    needs.
    """
    z, _ = transform.apply(logits)
    top, first = z.max(dim=-1, keepdim=True)
    row_max = torch.where(top.isinf(), 0, top)  # a row of -inf alone: exp(-inf - 0) is 0, -inf - -inf is NaN
    shifted = z - row_max
    # The largest weight, 1, stays out of the sum: next to it the rest would lose the digits in which a confident
    # state's 1 - p is written. log1p keeps them.
    weights = shifted.exp().scatter_(-1, first, 0)
    others = weights.sum(dim=-1)
    top, row_max = top[:, 0], row_max[:, 0]
    log_sum = torch.where(top.isinf(), top, others.log1p())
    q = z.gather(-1, actions[:, None])[:, 0]
    entropy = torch.zeros_like(q)
    if with_entropy:
        # a word at -inf has weight 0 and would contribute 0 * -inf = NaN
        entropy = log_sum - (weights * shifted.clamp(min=torch.finfo(z.dtype).min)).sum(dim=-1) / (1 + others)
    return q, row_max + log_sum, (q - row_max) - log_sum, entropy, row_max, log_sum


def row_gradient_(
    logits: Tensor,
    actions: Tensor,
    transform: Transform,
    statistics: tuple[Tensor, Tensor, Tensor],
    cotangents: tuple[Tensor, Tensor, Tensor, Tensor],
) -> Tensor:
    """The gradient [C, V] of the chunk's logits; `logits` is overwritten.

    statistics: row_max, log_sum, entropy; cotangents: dq, dv, dlog_prob, dentropy; each [C]. METHOD.md section 4:
    dlogits = dq * onehot + dv * softmax, with log_prob = q - v, and d entropy / dz = -p (log p + entropy).
    """
    row_max, log_sum, entropy = (x[:, None] for x in statistics)
    dq, dv, dlog, dentropy = (x[:, None] for x in cotangents)
    action = actions[:, None]
    z, tanh = transform.apply(logits)
    log_pi = torch.sub(z, row_max, out=logits).sub_(log_sum)
    log_pi_action = log_pi.gather(-1, action)
    # What the others lose the action gains: its 1 - p comes from expm1, so that a confident state keeps its gradient.
    # dv * p stands alone, so that an unlikely action keeps its own.
    at_action = dq + dv * log_pi_action.exp() - dlog * torch.expm1(log_pi_action)
    if (dentropy != 0).any():
        p = log_pi.exp()
        # p = 0 meets log p = -inf: their product is 0 in the limit
        spread = torch.where(p > 0, p * (log_pi + entropy), 0).mul_(dentropy)
        gradient = p.mul_(dv - dlog)
        at_action = at_action - spread.gather(-1, action)
        gradient.sub_(spread)
    else:
        gradient = log_pi.exp_().mul_(dv - dlog)
    gradient.scatter_(-1, action, at_action)
    if tanh is not None:
        gradient.mul_(tanh.square_().neg_().add_(1))
    if isinstance(transform.temperature, Tensor) or transform.temperature != 1.0:
        gradient.div_(transform.temperature)
    return gradient
