"""Token values when each rank holds a slice of the vocabulary: the ranks' row maxima and sums, merged.

Every rank runs the ordinary op on its slice. Its parts (max, sum, q - max, entropy) are merged by all_reduce, five
numbers a token. With the merged max and sum as its statistics, the ordinary backward op gives exactly the slice's part
of the gradient.
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
    def forward(ctx, group, hidden, weight, bias, tokens, transform, with_entropy, backend):
        offset, vocabulary = _slice(group, weight)
        check_token_data(tokens, transform, vocabulary)
        actions, mask = tokens
        mask = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask
        local = actions.long() - offset
        owned = mask & (local >= 0) & (local < len(weight))
        local = local.where(owned, 0)
        own, _ = library.linear_token_values(
            HeadInputs(hidden, weight, bias), Tokens(local, mask), transform, with_entropy, False, backend
        )
        # A slice at -inf reports max 0 and sum 0; its 0 must not win.
        row_max = own.row_max.where(own.log_sum > -torch.inf, -torch.inf)
        dist.all_reduce(row_max, dist.ReduceOp.MAX, group)
        row_max = row_max.where(row_max > -torch.inf, 0)
        share = torch.exp(own.row_max - row_max + own.log_sum)
        # As in one row, the largest weight, 1, stays out of the sum; `top` counts the slices that have it.
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
        ctx.group, ctx.temperature, ctx.softcap, ctx.backend = (
            group,
            transform.temperature,
            transform.softcap,
            backend,
        )
        return tuple(values)

    @staticmethod
    def backward(ctx, *upstream):
        dq, dv, dlog_prob, dentropy = upstream
        hidden, weight, bias, local, owned, mask, temperatures, *statistics = ctx.saved_tensors
        # Where the action lies on another rank, index 0 stands in for it and must get the gradient of every word,
        # which is (dv - dlog_prob) * p: the gradient of v alone.
        dv = torch.where(owned, dv, dv - dlog_prob)
        dq, dlog_prob = dq.where(owned, 0), dlog_prob.where(owned, 0)
        needs = Needs(*ctx.needs_input_grad[1:4])
        d_hidden, d_weight, d_bias = library.linear_token_values_backward(
            HeadInputs(hidden, weight, bias),
            Tokens(local, mask),
            Transform(ctx.temperature, temperatures, ctx.softcap),
            Statistics(*statistics),
            Cotangents(dq, dv, dlog_prob, dentropy),
            needs,
            ctx.backend,
        )
        if needs.needs_hidden:
            d_hidden = d_hidden.to(statistics[0].dtype)  # ranks add up in float32
            dist.all_reduce(d_hidden, dist.ReduceOp.SUM, ctx.group)
            d_hidden = d_hidden.to(hidden.dtype)
        gradients = (g if need else None for g, need in zip((d_hidden, d_weight, d_bias), needs, strict=True))
        return None, *gradients, *(None,) * 4


def sharded_token_values(
    group: dist.ProcessGroup,
    head: HeadInputs,
    tokens: Tokens,
    transform: Transform,
    with_entropy: bool,
    backend: str | None,
) -> TokenValues:
    """The values of the whole vocabulary, of which `head` holds this rank's slice."""
    q, v, log_prob, entropy = _Sharded.apply(group, *head, tokens, transform, with_entropy, backend)
    return TokenValues(q, v, log_prob, entropy if with_entropy else None)


def _slice(group: dist.ProcessGroup, weight: Tensor) -> tuple[int, int]:
    """Where this rank's slice starts, and the size of the whole vocabulary; slices may differ in size."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.long, device=weight.device)
    rank = dist.get_rank(group)
    sizes[rank] = len(weight)
    dist.all_reduce(sizes, dist.ReduceOp.SUM, group)
    return int(sizes[:rank].sum()), int(sizes.sum())
