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


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, hidden, weight, bias, actions, mask, temperature, temperatures, softcap, entropy, backend):
        offset, vocabulary = _slice(group, weight)
        mask = torch.ones_like(actions, dtype=torch.bool) if mask is None else mask
        _check_actions(actions[mask], vocabulary)
        local = actions.long() - offset
        owned = mask & (local >= 0) & (local < len(weight))
        local = local.where(owned, 0)
        q, _, _, own_entropy, own_max, own_sum, _ = library.linear_token_values(
            hidden, weight, bias, local, mask, temperature, temperatures, softcap, entropy, False, backend
        )
        # A slice at -inf reports max 0 and sum 0; its 0 must not win.
        row_max = own_max.where(own_sum > -torch.inf, -torch.inf)
        dist.all_reduce(row_max, dist.ReduceOp.MAX, group)
        row_max = row_max.where(row_max > -torch.inf, 0)
        share = torch.exp(own_max - row_max + own_sum)
        # As in one row, the largest weight, 1, stays out of the sum; `top` counts the slices that have it.
        top = (own_max == row_max) & (own_sum > -torch.inf)
        others = torch.where(top, own_sum.expm1(), share)
        spread = torch.where(share > 0, share * ((own_sum - own_entropy) + (own_max - row_max)), 0)
        parts = torch.stack([others, top.to(share.dtype), torch.where(owned, q - row_max, 0), spread])
        dist.all_reduce(parts, dist.ReduceOp.SUM, group)
        others, top, q_shifted, spread = parts
        others = others + (top - 1)
        log_sum = others.log1p().where(mask, 0)
        values = [q_shifted + row_max, row_max + log_sum, q_shifted - log_sum, log_sum - spread / (1 + others)]
        values = [x.where(mask, 0) for x in values]
        ctx.save_for_backward(hidden, weight, bias, local, owned, mask, temperatures, row_max, log_sum, values[3])
        ctx.group, ctx.temperature, ctx.softcap, ctx.backend = group, temperature, softcap, backend
        return tuple(values)

    @staticmethod
    def backward(ctx, dq, dv, dlog_prob, dentropy):
        hidden, weight, bias, local, owned, mask, temperatures, *statistics = ctx.saved_tensors
        # Where the action lies on another rank, index 0 stands in for it and must get what every word gets, which is
        # (dv - dlog_prob) * p: the gradient of v alone.
        dv = torch.where(owned, dv, dv - dlog_prob)
        dq, dlog_prob = dq.where(owned, 0), dlog_prob.where(owned, 0)
        needs = list(ctx.needs_input_grad[1:4])
        d_hidden, d_weight, d_bias = library.linear_token_values_backward(
            hidden,
            weight,
            bias,
            local,
            mask,
            ctx.temperature,
            temperatures,
            ctx.softcap,
            statistics,
            [dq, dv, dlog_prob, dentropy],
            needs,
            ctx.backend,
        )
        if needs[0]:
            d_hidden = d_hidden.to(statistics[0].dtype)  # ranks add up in fp32
            dist.all_reduce(d_hidden, dist.ReduceOp.SUM, ctx.group)
            d_hidden = d_hidden.to(hidden.dtype)
        gradients = (g if need else None for g, need in zip((d_hidden, d_weight, d_bias), needs, strict=True))
        return None, *gradients, *(None,) * 7


def sharded_token_values(group: dist.ProcessGroup, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, v, log_prob, entropy [...]; arguments after the group as `library.linear_token_values` takes them."""
    return _Sharded.apply(group, *args)


def _slice(group: dist.ProcessGroup, weight: Tensor) -> tuple[int, int]:
    """Where this rank's slice starts, and the size of the whole vocabulary; slices may differ in size."""
    sizes = torch.zeros(dist.get_world_size(group), dtype=torch.long, device=weight.device)
    rank = dist.get_rank(group)
    sizes[rank] = len(weight)
    dist.all_reduce(sizes, dist.ReduceOp.SUM, group)
    return int(sizes[:rank].sum()), int(sizes.sum())


def _check_actions(actions: Tensor, vocabulary: int) -> None:
    outside = actions[(actions < 0) | (actions >= vocabulary)]
    if len(outside):
        raise ValueError(f"actions must lie in [0, {vocabulary}) where they are not masked out; got {int(outside[0])}")
