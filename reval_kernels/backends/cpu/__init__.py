"""C++ kernels for the CPU: one read of the logits forward, one read and one write backward.

The library beside this file is built by setup.py (CMakeLists.txt) and registers `torch.ops.reval_kernels_cpu`. It
computes in float32; float64 inputs and logits whose vocabulary is not contiguous go to the portable backend.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from .. import portable
from ..rows import Transform

DEVICES = ("cpu",)
# REVAL_CPU_LIBRARY: another build of it, such as the one with sanitizers.
LIBRARY = Path(os.environ.get("REVAL_CPU_LIBRARY") or Path(__file__).with_name("libreval_kernels_cpu.so"))


@functools.cache
def missing() -> str | None:
    if not LIBRARY.exists():
        note = LIBRARY.with_name("not_built.txt")
        why = note.read_text().strip() if note.exists() else "its C++ library has not been built"
        return f"{why}; build it with: pip install --no-build-isolation -e . (needs torch, CMake and a C++ compiler)"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"its C++ library does not load with torch {torch.__version__}: {error}; build it again"
    return None


def token_values(
    logits: Tensor, actions: Tensor, mask: Tensor | None, transform: Transform, with_entropy: bool
) -> tuple[Tensor, ...]:
    """As `portable.token_values`."""
    if not _rows(logits):
        return portable.token_values(logits, actions, mask, transform, with_entropy)
    return tuple(_ops().token_values(logits, actions, mask, *_flat(transform), with_entropy))


def token_values_backward(
    logits: Tensor,
    actions: Tensor,
    mask: Tensor | None,
    transform: Transform,
    statistics: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
    inplace: bool,
) -> Tensor:
    """As `portable.token_values_backward`."""
    if not _rows(logits):
        return portable.token_values_backward(logits, actions, mask, transform, statistics, cotangents, inplace)
    out = logits if inplace else _ops().gradient_like(logits)
    _ops().token_values_backward(logits, actions, mask, *_flat(transform), list(statistics), list(cotangents), out)
    return out


def linear_token_values(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    transform: Transform,
    with_entropy: bool,
    with_expected: bool,
) -> tuple[Tensor, ...]:
    """As `portable.linear_token_values`."""
    if torch.float64 in _dtypes(hidden, weight, bias) or (with_entropy and with_expected):
        args = (hidden, weight, bias, actions, mask, transform, with_entropy, with_expected)
        return portable.linear_token_values(*args)
    args = (hidden, weight, bias, actions, mask, *_flat(transform))
    if not with_expected:
        values = _ops().linear_token_values(*args, with_entropy)
        return *values, values[0].new_empty(0)
    *values, rows = _ops().linear_expected(*args)  # [M, D] of the unmasked tokens
    expected = rows.view(hidden.shape) if mask is None else rows.new_zeros(hidden.shape)
    if mask is not None:
        expected[mask] = rows
    return *values, expected


def linear_token_values_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    transform: Transform,
    statistics: tuple[Tensor, ...],
    cotangents: tuple[Tensor, ...],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """As `portable.linear_token_values_backward`."""
    if torch.float64 in _dtypes(hidden, weight, bias):
        return portable.linear_token_values_backward(
            hidden, weight, bias, actions, mask, transform, statistics, cotangents, needs
        )
    return tuple(
        _ops().linear_token_values_backward(
            hidden, weight, bias, actions, mask, *_flat(transform), list(statistics), list(cotangents), *needs, []
        )
    )


def linear_reval_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    actions: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    transform: Transform,
    reference: tuple[Tensor, ...],
    rewards: Tensor,
    beta: float,
    level: str,
    semi_gradient: bool,
    normalizer: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `portable.linear_reval_loss`, with two passes over the vocabulary instead of chunks of logits.

    With a frozen head, what the gradient of the hidden states needs of the logits is summed up beside the values, up to
    a factor per token, and the second pass falls away. Else as many logits as the memory of the head's gradient holds
    stay there until the second pass (kept.h).
    """
    if torch.float64 in _dtypes(hidden, weight, bias):
        return portable.linear_reval_loss(
            hidden,
            weight,
            bias,
            actions,
            mask,
            cu_seqlens,
            transform,
            reference,
            rewards,
            beta,
            level,
            semi_gradient,
            normalizer,
            needs,
        )
    if portable.wide_loss(hidden, weight, bias):
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
    args = (hidden, weight, bias, actions, mask, *_flat(transform))
    frozen_head = tuple(needs) == (True, False, False)
    if needs[1]:
        q, v, log_prob, entropy, row_max, log_sum, *kept = _ops().linear_keeping(*args)
    else:
        values = linear_token_values(hidden, weight, bias, actions, mask, transform, False, frozen_head)
        (q, v, log_prob, entropy, row_max, log_sum, expected), kept = values, []
    loss, residual, *cotangents = bellman_loss(
        q, v, log_prob, reference, rewards, mask, cu_seqlens, beta, level, semi_gradient, normalizer
    )
    none = (hidden.new_empty(0), weight.new_empty(0), (weight if bias is None else bias).new_empty(0))
    if frozen_head:
        d_hidden = portable.linear_expected_backward(
            expected, hidden, weight, bias, actions, mask, transform, log_prob, cotangents
        )
        return loss, residual, d_hidden, *none[1:]
    if not any(needs):
        return loss, residual, *none
    after = ([row_max, log_sum, entropy], [*cotangents, torch.zeros_like(q)])
    return loss, residual, *_ops().linear_token_values_backward(*args, *after, *needs, kept)


def td_targets(
    q: Tensor,
    v: Tensor,
    reference: tuple[Tensor, ...],
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta: float,
    gamma: float,
) -> tuple[Tensor, ...]:
    """As `portable.td_targets`."""
    return tuple(_ops().td_targets(q, v, list(reference), rewards, mask, cu_seqlens, beta, gamma))


def td_targets_backward(
    d_target: Tensor, d_error: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, gamma: float
) -> tuple[Tensor, ...]:
    """As `portable.td_targets_backward`."""
    return tuple(_ops().td_targets_backward(d_target, d_error, mask, cu_seqlens, gamma))


def bellman_loss(
    q: Tensor,
    v: Tensor,
    log_prob: Tensor,
    reference: tuple[Tensor, ...],
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    beta: float,
    level: str,
    semi_gradient: bool,
    normalizer: float,
) -> tuple[Tensor, ...]:
    """As `portable.bellman_loss`."""
    return tuple(
        _ops().bellman_loss(
            q, v, log_prob, list(reference), rewards, mask, cu_seqlens, beta, level, semi_gradient, normalizer
        )
    )


def bellman_loss_backward(
    d_loss: Tensor, d_residual: Tensor, unit: tuple[Tensor, ...], mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, ...]:
    """As `portable.bellman_loss_backward`."""
    return tuple(_ops().bellman_loss_backward(d_loss, d_residual, list(unit), mask, cu_seqlens))


def _ops():
    return torch.ops.reval_kernels_cpu


def _rows(logits: Tensor) -> bool:
    """Whether the kernels take these logits."""
    return logits.dtype != torch.float64 and (logits.stride(-1) == 1 or logits.shape[-1] == 1)


def _dtypes(*tensors: Tensor | None) -> set[torch.dtype]:
    return {x.dtype for x in tensors if x is not None}


def _flat(transform: Transform) -> tuple[float, Tensor | None, float | None]:
    each = transform.temperature if isinstance(transform.temperature, Tensor) else None
    return (1.0 if each is not None else float(transform.temperature)), each, transform.softcap
