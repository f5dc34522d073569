"""Token values, gradients and the ReVal loss from hidden states, a chunk of tokens at a time.

The drivers `values_by_chunks`, `recompute_gradients` and `whole_trajectory_loss` cut the unmasked tokens into chunks.
A `ChunkedHead` computes one chunk and adds up the gradients. The GPU backend runs the same drivers with a ChunkedHead
of its own.

Letters: N tokens, M of them unmasked, C tokens of one chunk, V words, D features, B trajectories.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
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
    wide_dtype,
)
from ..types import TokenValues
from .bellman import bellman_loss
from .frozen_head import expected_cotangents
from .rows import row_gradient_, row_values
from .tokens import Index, chunks, per_token, unmasked, widened
from .trajectories import Trajectories

LINEAR_CHUNK = 1 << 24
"""The number of logits in one chunk: 64 MiB in float32, enough for the matmuls to run at full speed."""


class ChunkedHead:
    """Logits = hidden @ weight.T + bias, a chunk at a time, and the gradients that add up over the chunks.

    A backend with better kernels overrides `size`, `values`, `add_gradient_`, `add_dlogits` and `bellman_loss`. The
    weight's gradient adds up in float32 (float64).
    """

    bellman_loss = staticmethod(bellman_loss)
    single = False
    """Whether add_dlogits is called once: nothing adds up. The drivers set it."""

    def __init__(self, head: HeadInputs, needs: Needs, wide: bool = False):
        """`wide`: all gradients in float32 (float64) rather than in the dtypes of the inputs."""
        self.hidden, self.weight, self.bias = head.tensors
        self.needs, self.wide = needs, wide
        dtype = wide_dtype(self.hidden)
        hidden_dtype = dtype if wide else self.hidden.dtype
        self.d_hidden = self.hidden.new_zeros(self.hidden.shape if needs.needs_hidden else (0,), dtype=hidden_dtype)
        self.d_weight: Tensor | None = None  # the first chunk makes it: no zeros are written and read again
        self.d_bias = self.weight.new_zeros(len(self.weight) if needs.needs_bias else 0, dtype=dtype)

    @property
    def size(self) -> int:
        """Tokens of one chunk."""
        return max(1, LINEAR_CHUNK // len(self.weight))

    def logits(self, at: Index) -> Tensor:
        """[C, V] in float32 (float64) of the tokens `at`.

        A bfloat16 logit near 20 is off by up to 0.06, and a residual sums thousands of them.
        """
        hidden = widened(self.hidden[at])
        logits = hidden.new_empty(len(hidden), len(self.weight))
        for words, tile in tiles(self.weight, hidden.dtype):
            torch.mm(hidden, tile.T, out=logits[:, words])
        return logits if self.bias is None else logits.add_(self.bias)

    def values(
        self, at: Index, actions: Tensor, transform: Transform, with_entropy: bool = False, keep: bool = False
    ) -> tuple[Any, RowValues]:
        """What add_gradient_ can use again if `keep` (here the logits of the tokens `at`), and the six numbers [C] of
        each row."""
        logits = self.logits(at)
        return logits if keep else None, row_values(logits, actions, transform, with_entropy)

    def add_gradient_(
        self,
        at: Index,
        kept: Any,
        actions: Tensor,
        transform: Transform,
        statistics: Statistics,
        cotangents: Cotangents,
    ) -> None:
        """Add the gradient of the tokens `at`. `kept` is what `values` returned for them, and may be overwritten; if it
        is None, the logits are computed again."""
        logits = self.logits(at) if kept is None else kept
        self.add_dlogits(at, row_gradient_(logits, actions, transform, statistics, cotangents))

    def add_dlogits(self, at: Index, dlogits: Tensor) -> None:
        """Add the gradients of hidden, weight and bias that follow from dlogits [C, V] of the tokens `at`."""
        if self.needs.needs_hidden:
            d_hidden = dlogits.new_zeros(len(dlogits), self.weight.shape[1])
            for words, tile in tiles(self.weight, dlogits.dtype):
                d_hidden.addmm_(dlogits[:, words], tile)
            self.d_hidden[at] = d_hidden.to(self.d_hidden.dtype)
        if self.needs.needs_weight:
            hidden = self.hidden[at].to(dlogits.dtype)
            self.d_weight = dlogits.T @ hidden if self.d_weight is None else self.d_weight.addmm_(dlogits.T, hidden)
        if self.needs.needs_bias:
            self.d_bias += dlogits.sum(0)

    def gradients(self) -> HeadGradients:
        """The sums over all chunks so far."""
        d_weight = self.d_weight
        if d_weight is None:
            shape = self.weight.shape if self.needs.needs_weight else (0,)
            d_weight = self.weight.new_zeros(shape, dtype=self.d_bias.dtype)
        if self.wide:
            return HeadGradients(self.d_hidden, d_weight, self.d_bias)
        bias = self.weight if self.bias is None else self.bias
        return HeadGradients(self.d_hidden, d_weight.to(self.weight.dtype), self.d_bias.to(bias.dtype))


# --- drivers --------------------------------------------------------------------------------------------------------


def values_by_chunks(
    head: ChunkedHead,
    tokens: Tokens,
    transform: Transform,
    with_entropy: bool,
) -> tuple[RowValues, Tensor]:
    """The values of each token, and `expected` [..., D] (frozen_head.py). `expected` is an empty tensor if
    head.needs.needs_hidden is false."""
    rows, actions = unmasked(tokens)
    found: list[RowValues] = []
    kept, keep = None, head.needs.needs_hidden
    for piece, at in chunks(rows, head.size):
        kept = None  # free what is kept of one chunk before the next chunk makes new tensors
        kept, values = head.values(at, actions[piece], transform.at(at), with_entropy, keep)
        found.append(values)
        if keep:
            by = expected_cotangents(values)
            head.add_gradient_(at, kept, actions[piece], transform.at(at), values.statistics, by)
    return per_token(found, rows, head.hidden), head.d_hidden


def recompute_gradients(
    head: ChunkedHead, tokens: Tokens, transform: Transform, statistics: Statistics, cotangents: Cotangents
) -> HeadGradients:
    """Gradients of the head's inputs. The logits of every chunk are computed again."""
    rows, actions = unmasked(tokens)
    head.single = len(actions) <= head.size
    for piece, at in chunks(rows, head.size):
        head.add_gradient_(at, None, actions[piece], transform.at(at), statistics.at(at), cotangents.at(at))
    return head.gradients()


def whole_trajectory_loss(
    head: ChunkedHead,
    shape: torch.Size,
    actions: Tensor,
    layout: Layout,
    transform: Transform,
    reference: Reference,
    rewards: Tensor,
    options: BellmanOptions,
) -> LossAndGradients:
    """`linear_reval_loss` for hidden states of this shape [..., D], which `head` holds as [N, D].

    A chunk is made of whole trajectories. So its residuals are complete and its gradient is known while its logits
    still exist: 6 M V D operations instead of 8. A trajectory longer than a chunk has its logits computed twice.
    """
    trajectories = Trajectories(shape[:-1], actions.device, layout)
    _, actions = unmasked(Tokens(actions, layout.mask))
    transform = transform.flattened()
    options = options._replace(
        normalizer=torch.tensor(options.divisor(len(rewards)), dtype=torch.float64, device="cpu")
    )
    loss = widened(head.hidden.new_zeros(()))
    residual = loss.new_zeros(len(trajectories.counts))

    head.single = len(actions) <= head.size
    kept = None
    for some, span in whole_trajectories(trajectories.counts.tolist(), head.size):
        tokens, taken, lengths = trajectories.actions[span], actions[span], trajectories.counts[some]
        found = []
        pieces = list(chunks((tokens,), head.size))
        keep = any(head.needs) and len(pieces) == 1
        for piece, at in pieces:
            kept = None  # free what is kept of one chunk before the next chunk makes new tensors
            kept, values = head.values(at, taken[piece], transform.at(at), keep=keep)
            found.append(values)
        values = RowValues(*(torch.cat(x) for x in zip(*found, strict=True)))
        terms = head.bellman_loss(
            TokenValues(values.q, values.v, values.log_prob),
            _of_trajectories(reference, some, tokens),
            rewards[some],
            Layout(None, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])),
            options,
        )
        loss += terms.loss
        residual[some] = terms.residual
        if not any(head.needs):
            continue
        cotangents = Cotangents(*terms.unit, None)
        for piece, at in pieces:
            own = transform.at(at)
            head.add_gradient_(at, kept, taken[piece], own, values.statistics.at(piece), cotangents.at(piece))
    d_hidden, d_weight, d_bias = head.gradients()
    d_hidden = d_hidden.view(shape) if head.needs.needs_hidden else d_hidden
    return LossAndGradients(loss, residual, d_hidden, d_weight, d_bias)


def _of_trajectories(reference: Reference, some: slice, tokens: Tensor) -> Reference:
    """The reference of the trajectories `some`. `tokens` holds the flat indices of their actions."""
    returns = None if reference.returns is None else reference.returns[some]
    q, v, log_prob = (None if x is None else x.reshape(-1)[tokens] for x in reference[:3])
    return Reference(q, v, log_prob, returns)


# --- cutting --------------------------------------------------------------------------------------------------------


def whole_trajectories(counts: list[int], size: int) -> Iterator[tuple[slice, slice]]:
    """Ranges of trajectories with at most `size` actions together, and the ranges of their actions. The ranges
    are about equally long. A range of one trajectory may have more actions.

    Example: counts [3, 4, 2] and size 7 give trajectories 0 to 1 with actions 0 to 6, then trajectory 2 with 7 to 8.
    """
    total, first, start, held = sum(counts), 0, 0, 0
    share = total / max(1, -(-total // size))
    for b, count in enumerate(counts):
        if held and (held + count > size or held >= share):
            yield slice(first, b), slice(start, start + held)
            first, start, held = b, start + held, 0
        held += count
    if held:
        yield slice(first, len(counts)), slice(start, start + held)


def tiles(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the head in `dtype`, some words at a time: a narrower weight never exists in `dtype` as a whole."""
    size = len(weight) if weight.dtype == dtype else max(1, LINEAR_CHUNK // 4 // max(1, weight.shape[1]))
    for start in range(0, len(weight), size):
        words = slice(start, min(start + size, len(weight)))
        yield words, weight[words].to(dtype)
