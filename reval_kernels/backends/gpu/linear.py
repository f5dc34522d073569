"""Token values and losses from hidden states and the head. Logits are never rounded to bf16 or stored.

The kernels of linear_kernels.py compute all logits, one tile at a time, as fp32 accumulators of tensor-core products.
For each token of the tile they write the part (see common.py) of the tile's words, and `merge_parts` joins the parts of
a token in a fixed order. For a gradient they also write a chunk of tokens times words, in the dtype of the matmuls that
follow: the weights of the words, from which scale_weights makes the gradient of the logits; or that gradient itself,
where it is known before. chunked_head.py has these steps.

The numbers of a token depend neither on the caller nor on the number of tokens in the call. So a policy equal to its
reference has loss exactly 0. And logits that are computed again are the same to the bit; otherwise the gradient of a
confident state would be noise.

Letters: N tokens, M of them unmasked, V words of the vocabulary, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import (
    BellmanOptions,
    Cotangents,
    HeadGradients,
    HeadInputs,
    Layout,
    LossAndGradients,
    Needs,
    Reference,
    RowValues,
    Statistics,
    Tokens,
    Transform,
    keeps_wide_gradients,
)
from .. import portable
from ..chunks import ChunkedHead, recompute_gradients, values_by_chunks, whole_trajectory_loss
from .chunked_head import GPUChunkedHead
from .common import new_values
from .linear_launch import compute_values
from .operands import becomes_bf16, operands


def linear_token_values(
    head: HeadInputs, tokens: Tokens, transform: Transform, with_entropy: bool, with_expected: bool
) -> tuple[RowValues, Tensor]:
    """See Backend.linear_token_values. Without `with_expected` nothing as large as the logits is stored."""
    hidden = head.hidden
    if with_expected:
        return values_by_chunks(_chunked(head, Needs(True, False, False), wide=True), tokens, transform, with_entropy)
    if not takes(head):
        return portable.linear_token_values(head, tokens, transform, with_entropy, False)
    out = new_values(hidden, tokens.mask)
    head = operands(head)
    hidden = head.hidden
    flat, actions, index = hidden.reshape(-1, hidden.shape[-1]), tokens.actions.reshape(-1), None
    transform = transform.flattened()
    if tokens.mask is not None:  # the CPU waits for the GPU here: the grid depends on the number of tokens
        index = tokens.mask.reshape(-1).nonzero()[:, 0]
        flat, actions, transform = flat[index], actions[index], transform.at((index,))
    compute_values(head._replace(hidden=flat), actions, transform, with_entropy, None, index, out)
    return out, out.q.new_empty(0)


def linear_token_values_backward(
    head: HeadInputs,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    needs: Needs,
) -> HeadGradients:
    """See Backend.linear_token_values_backward. The logits are computed again by chunks."""
    return recompute_gradients(_chunked(head, needs), tokens, transform, statistics, cotangents)


def linear_reval_loss(
    head: HeadInputs,
    actions: Tensor,
    layout: Layout,
    transform: Transform,
    reference: Reference,
    rewards: Tensor,
    options: BellmanOptions,
    needs: Needs,
) -> LossAndGradients:
    """See Backend.linear_reval_loss. A single trajectory that is longer than a chunk has its logits computed twice
    (8 N V D operations)."""
    shape = head.hidden.shape
    flat = head._replace(hidden=head.hidden.reshape(-1, shape[-1]))
    chunked = _chunked(flat, needs, keeps_wide_gradients(head))
    return whole_trajectory_loss(chunked, shape, actions, layout, transform, reference, rewards, options)


def _chunked(head: HeadInputs, needs: Needs, wide: bool = False) -> ChunkedHead:
    return (GPUChunkedHead if takes(head) else ChunkedHead)(head, needs, wide)


def takes(head: HeadInputs) -> bool:
    """Whether the kernels take these operands: hidden and weight of the same dtype, which is not float64. The kernels
    also take a pair of float32 and bfloat16 whose `precision` turns both into bfloat16."""
    hidden, weight, _ = head.tensors
    same = hidden.dtype == weight.dtype and hidden.dtype != torch.float64
    return (same or becomes_bf16(head)) and hidden.shape[-1] > 0
