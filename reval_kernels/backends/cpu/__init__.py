"""C++ kernels for the CPU. They read the logits once forward and once backward, and write the gradient once.

build.py builds the library beside this file. The library registers `torch.ops.reval_kernels_cpu` and
computes in float32. The portable backend takes float64 inputs, and logits whose last dimension is not contiguous.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...contract import (
    BellmanOptions,
    Cotangents,
    HeadGradients,
    HeadInputs,
    Layout,
    LossAndGradients,
    LossTerms,
    Needs,
    Reference,
    RowValues,
    Statistics,
    Tokens,
    Transform,
    UnitGradients,
    keeps_wide_gradients,
)
from ...types import TokenValues
from .. import portable
from ..frozen_head import gradient_of_hidden
from .build import NOTE, library_name

DEVICES: tuple[str, ...] | None = ("cpu",)
CHECKS_DATA: frozenset[str] = frozenset()
LIBRARY = Path(os.environ.get("REVAL_CPU_LIBRARY") or Path(__file__).with_name(library_name(torch.__version__)))
"""The library. REVAL_CPU_LIBRARY names another build, for example the build with sanitizers."""


@functools.cache
def missing() -> str | None:
    """Why the library cannot be used. The first call loads the library."""
    if not LIBRARY.exists():
        return f"{_why_no_library()}; build it with: python -m reval_kernels.build (needs CMake and a C++ compiler)"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"its C++ library does not load with torch {torch.__version__}: {error}; build it again"
    return None


def _why_no_library() -> str:
    note = LIBRARY.with_name(NOTE)
    if note.exists():
        return note.read_text().strip()
    others = sorted(path.stem.partition("-torch")[2] for path in LIBRARY.parent.glob("libreval_kernels_cpu-torch*.so"))
    if others:
        return f"its C++ library was built for torch {', '.join(others)}, and this is torch {torch.__version__}"
    return "its C++ library has not been built"


def token_values(logits: Tensor, tokens: Tokens, transform: Transform, with_entropy: bool) -> RowValues:
    """See Backend.token_values."""
    if not _takes(logits):
        return portable.token_values(logits, tokens, transform, with_entropy)
    return RowValues(*_ops().token_values(logits, *tokens, *transform, with_entropy))


def token_values_backward(
    logits: Tensor,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    inplace: bool,
) -> Tensor:
    """See Backend.token_values_backward."""
    if not _takes(logits):
        return portable.token_values_backward(logits, tokens, transform, statistics, cotangents, inplace)
    out = logits if inplace else _ops().gradient_like(logits)
    _ops().token_values_backward(logits, *tokens, *transform, statistics, _tensors(cotangents), out)
    return out


def linear_token_values(
    head: HeadInputs, tokens: Tokens, transform: Transform, with_entropy: bool, with_expected: bool
) -> tuple[RowValues, Tensor]:
    """See Backend.linear_token_values."""
    if head.has(torch.float64) or (with_entropy and with_expected):
        return portable.linear_token_values(head, tokens, transform, with_entropy, with_expected)
    if not with_expected:
        values = RowValues(*_ops().linear_token_values(*head.tensors, *tokens, *transform, with_entropy))
        return values, values.q.new_empty(0)
    *numbers, rows = _ops().linear_expected(*head.tensors, *tokens, *transform)  # rows: [M, D], M unmasked tokens
    if tokens.mask is None:
        return RowValues(*numbers), rows.view(head.hidden.shape)
    expected = rows.new_zeros(head.hidden.shape)
    expected[tokens.mask] = rows
    return RowValues(*numbers), expected


def linear_token_values_backward(
    head: HeadInputs,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    needs: Needs,
) -> HeadGradients:
    """See Backend.linear_token_values_backward."""
    if head.has(torch.float64):
        return portable.linear_token_values_backward(head, tokens, transform, statistics, cotangents, needs)
    return _head_gradients(head, tokens, transform, statistics, cotangents, needs, [])


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
    """See Backend.linear_reval_loss. Two passes over the vocabulary for all tokens; no chunks of trajectories.

    With a frozen head the first pass also sums `expected` (frozen_head.py), and there is no second pass. If the weight
    needs a gradient, the first pass keeps logits for the second pass: as many as fit into the memory of the weight's
    gradient (kept.h).
    """
    if head.has(torch.float64):
        return portable.linear_reval_loss(head, actions, layout, transform, reference, rewards, options, needs)
    if keeps_wide_gradients(head):
        head = HeadInputs(*(None if x is None else x.float() for x in head.tensors))  # type: ignore[arg-type]  # bias alone is None
    tokens, kept = Tokens(actions, layout.mask), []
    if needs.needs_weight:
        *numbers, room, strips, anchors, action_logits = _ops().linear_keeping(*head.tensors, *tokens, *transform)
        values, kept = RowValues(*numbers), [room, strips, anchors, action_logits]
    else:
        values, expected = linear_token_values(head, tokens, transform, False, needs.frozen_head)
    token_values = TokenValues(values.q, values.v, values.log_prob)
    terms = bellman_loss(token_values, reference, rewards, layout, options)
    d_hidden, d_weight = head.hidden.new_empty(0), head.weight.new_empty(0)
    d_bias = (head.weight if head.bias is None else head.bias).new_empty(0)
    if needs.frozen_head:
        d_hidden = gradient_of_hidden(expected, head, tokens, transform, values.log_prob, terms.unit)
    elif any(needs):
        cotangents = Cotangents(*terms.unit, None)
        gradients = _head_gradients(head, tokens, transform, values.statistics, cotangents, needs, kept)
        d_hidden, d_weight, d_bias = gradients
    return LossAndGradients(terms.loss, terms.residual, d_hidden, d_weight, d_bias)


def _head_gradients(
    head: HeadInputs,
    tokens: Tokens,
    transform: Transform,
    statistics: Statistics,
    cotangents: Cotangents,
    needs: Needs,
    kept: list[Tensor],
) -> HeadGradients:
    """The second pass. `kept` is empty, or holds the tensors that linear_keeping returned for this pass."""
    upstream = _tensors(cotangents)
    out = _ops().linear_token_values_backward(*head.tensors, *tokens, *transform, statistics, upstream, *needs, kept)
    return HeadGradients(*out)


def _tensors(cotangents: Cotangents) -> list[Tensor]:
    """The four cotangents, as the C++ functions take them."""
    *by_values, dentropy = cotangents
    return [*by_values, torch.zeros_like(cotangents.dq) if dentropy is None else dentropy]


def td_targets(
    values: TokenValues,
    reference: Reference,
    rewards: Tensor,
    layout: Layout,
    beta: float,
    gamma: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See Backend.td_targets."""
    return tuple(_ops().td_targets(values.q, values.v, *reference[:2], rewards, *layout, beta, gamma))


def td_targets_backward(d_target: Tensor, d_error: Tensor, layout: Layout, gamma: float) -> tuple[Tensor, Tensor]:
    """See Backend.td_targets_backward."""
    return tuple(_ops().td_targets_backward(d_target, d_error, *layout, gamma))


def bellman_loss(
    values: TokenValues,
    reference: Reference,
    rewards: Tensor,
    layout: Layout,
    options: BellmanOptions,
) -> LossTerms:
    """See Backend.bellman_loss."""
    return LossTerms(*_ops().bellman_loss(*values[:3], *reference, rewards, *layout, *options))


def bellman_loss_backward(
    d_loss: Tensor, d_residual: Tensor | None, unit: UnitGradients, layout: Layout
) -> UnitGradients:
    """See Backend.bellman_loss_backward."""
    return UnitGradients(*_ops().bellman_loss_backward(d_loss, d_residual, *unit, *layout))


def _ops() -> Any:
    return torch.ops.reval_kernels_cpu


def _takes(logits: Tensor) -> bool:
    """Whether the row kernels take these logits."""
    return logits.dtype != torch.float64 and (logits.stride(-1) == 1 or logits.shape[-1] == 1)
