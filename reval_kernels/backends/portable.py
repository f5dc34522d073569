"""The backend for every device: PyTorch, a chunk of tokens at a time. No float32 tensor holds the logits of all tokens.

This file is the complete example of the contract (contract.py). Every function computes in float32, or in float64 for
float64 inputs. chunks.py has the functions from hidden states, bellman.py the losses.
"""

from __future__ import annotations

from torch import Tensor

from ..contract import (
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
from .bellman import bellman_loss, bellman_loss_backward, td_targets, td_targets_backward
from .chunks import ChunkedHead, recompute_gradients, values_by_chunks, whole_trajectory_loss
from .rows import row_gradient_, row_values
from .tokens import chunks, per_token, unmasked, widened

__all__ = [
    "CHECKS_DATA",
    "DEVICES",
    "bellman_loss",
    "bellman_loss_backward",
    "linear_reval_loss",
    "linear_token_values",
    "linear_token_values_backward",
    "missing",
    "td_targets",
    "td_targets_backward",
    "token_values",
    "token_values_backward",
]

DEVICES: tuple[str, ...] | None = None
CHECKS_DATA: frozenset[str] = frozenset()
ROWS_CHUNK = 1 << 21
"""The number of logits in one chunk: 8 MiB in float32, small enough for a CPU's cache."""


def missing() -> str | None:
    """None: this backend runs wherever torch runs."""
    return None


def token_values(logits: Tensor, tokens: Tokens, transform: Transform, with_entropy: bool) -> RowValues:
    """See Backend.token_values."""
    rows, actions = unmasked(tokens)
    values = [
        row_values(widened(logits[at]), actions[piece], transform.at(at), with_entropy)
        for piece, at in chunks(rows, ROWS_CHUNK // logits.shape[-1])
    ]
    return per_token(values, rows, logits)


def token_values_backward(
    logits: Tensor,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    inplace: bool,
) -> Tensor:
    """See Backend.token_values_backward."""
    rows, actions = unmasked(tokens)
    out = logits if inplace else logits.new_zeros(logits.shape)
    if inplace and tokens.mask is not None:
        out.masked_fill_(~tokens.mask[..., None], 0)
    for piece, at in chunks(rows, ROWS_CHUNK // logits.shape[-1]):
        chunk = widened(logits[at])  # indexing copies, so the caller's logits stay as they are
        gradient = row_gradient_(chunk, actions[piece], transform.at(at), statistics.at(at), cotangents.at(at))
        out[at] = gradient.to(out.dtype)
    return out


def linear_token_values(
    head: HeadInputs, tokens: Tokens, transform: Transform, with_entropy: bool, with_expected: bool
) -> tuple[RowValues, Tensor]:
    """See Backend.linear_token_values."""
    return values_by_chunks(
        ChunkedHead(head, Needs(with_expected, False, False), wide=True), tokens, transform, with_entropy
    )


def linear_token_values_backward(
    head: HeadInputs,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    needs: Needs,
) -> HeadGradients:
    """See Backend.linear_token_values_backward. The logits are computed again by chunks."""
    return recompute_gradients(ChunkedHead(head, needs), tokens, transform, statistics, cotangents)


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
    """See Backend.linear_reval_loss."""
    shape = head.hidden.shape
    flat = head._replace(hidden=head.hidden.reshape(-1, shape[-1]))
    chunked = ChunkedHead(flat, needs, keeps_wide_gradients(head))
    return whole_trajectory_loss(chunked, shape, actions, layout, transform, reference, rewards, options)
