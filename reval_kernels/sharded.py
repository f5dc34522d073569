"""Token values when each rank holds a slice of the vocabulary: the ranks merge their row maxima and sums.

Forward: every rank runs the ordinary op on its slice. Then all_reduce merges five numbers for each token: the maximum,
the sum, the number of slices with this maximum, q - maximum, and a sum for the entropy.
Backward: every rank runs the ordinary backward op with the merged maximum and sum as statistics. The result is exactly
this slice's part of the gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from . import library
from .checks import check_token_data
from .contract import Cotangents, HeadInputs, Needs, Statistics, Tokens, Transform
from .types import TokenValues


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, hidden, weight, bias, precision, tokens, transform, with_entropy, backend):
        offset, vocabulary = _slice(group, weight)
        check_token_data(tokens, transform, vocabulary, hidden)  # the op below sees only `local`, which always passes
        actions, mask = tokens
        mask = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask
        local = actions.long() - offset
        owned = mask & (local >= 0) & (local < len(weight))
        local = local.where(owned, 0)
        own, _ = library.linear_token_values(
            HeadInputs(hidden, weight, bias, precision), Tokens(local, mask), transform, with_entropy, False, backend
        )
        # A slice whose logits are all -inf reports maximum 0 and sum 0. Its 0 must not win over a negative maximum.
        row_max = own.row_max.where(own.log_sum > -torch.inf, -torch.inf)
        dist.all_reduce(row_max, dist.ReduceOp.MAX, group)
        row_max = row_max.where(row_max > -torch.inf, 0)
        share = torch.exp(own.row_max - row_max + own.log_sum)
        # As in row_values (backends/rows.py), the largest weight, 1, stays out of the sum. `top` marks the slices that
        # have this weight, and all_reduce counts them.
        top = (own.row_max == row_max) & (own.log_sum > -torch.inf)
        others = torch.where(top, own.log_sum.expm1(), share)
        spread = torch.where(share > 0, share * ((own.log_sum - own.entropy) + (own.row_max - row_max)), 0)
        sums = torch.stack([others, top.to(share.dtype), torch.where(owned, own.q - row_max, 0), spread])
        dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        others, top, q_shifted, spread = sums
        others = others + (top - 1)
        log_sum = others.log1p().where(mask, 0)
        values = [q_shifted + row_max, row_max + log_sum, q_shifted - log_sum, log_sum - spread / (1 + others)]
        values = [x.where(mask, 0) for x in values]
        ctx.save_for_backward(
            hidden, weight, bias, local, owned, mask, transform.temperatures, row_max, log_sum, values[3]
        )
        ctx.group, ctx.precision, ctx.backend = group, precision, backend
        ctx.temperature, ctx.softcap = transform.temperature, transform.softcap
        return tuple(values)

    @staticmethod
    def backward(ctx, *upstream):
        dq, dv, dlog_prob, dentropy = upstream
        hidden, weight, bias, local, owned, mask, temperatures, *statistics = ctx.saved_tensors
        # If another rank owns the action, `local` is 0 as a placeholder, so the op takes word 0 for the action. Word 0
        # must get the gradient of an ordinary word, (dv - dlog_prob) * p. The action gets this gradient if its dv is
        # dv - dlog_prob, and its dq and dlog_prob are 0.
        dv = torch.where(owned, dv, dv - dlog_prob)
        dq, dlog_prob = dq.where(owned, 0), dlog_prob.where(owned, 0)
        needs = Needs(*ctx.needs_input_grad[1:4])
        d_hidden, d_weight, d_bias = library.linear_token_values_backward(
            HeadInputs(hidden, weight, bias, ctx.precision),
            Tokens(local, mask),
            Transform(ctx.temperature, temperatures, ctx.softcap),
            Statistics(*statistics),
            Cotangents(dq, dv, dlog_prob, dentropy),
            needs,
            ctx.backend,
        )
        if needs.needs_hidden:
            d_hidden = d_hidden.to(statistics[0].dtype)  # the sum over ranks is taken in float32
            dist.all_reduce(d_hidden, dist.ReduceOp.SUM, ctx.group)
            d_hidden = d_hidden.to(hidden.dtype)
        gradients = (g if need else None for g, need in zip((d_hidden, d_weight, d_bias), needs, strict=True))
        return None, *gradients, *(None,) * 5


def sharded_token_values(
    group: dist.ProcessGroup,
    head: HeadInputs,
    tokens: Tokens,
    transform: Transform,
    with_entropy: bool,
    backend: str | None,
) -> TokenValues:
    """Token values over the whole vocabulary. `head` holds this rank's slice of the vocabulary."""
    q, v, log_prob, entropy = _Sharded.apply(
        group, *head.tensors, head.precision, tokens, transform, with_entropy, backend
    )
    return TokenValues(q, v, log_prob, entropy if with_entropy else None)


def _slice(group: dist.ProcessGroup, weight: Tensor) -> tuple[int, int]:
    """The first word of this rank's slice, and the size of the whole vocabulary. Slices may differ in size."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.long, device=weight.device)
    rank = dist.get_rank(group)
    sizes[rank] = len(weight)
    dist.all_reduce(sizes, dist.ReduceOp.SUM, group)
    return int(sizes[:rank].sum()), int(sizes.sum())
