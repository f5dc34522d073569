"""The names of trl.trainer.utils in TRL 1.16 that compute log-probs and entropies from logits.

    from trl.trainer.utils import selective_log_softmax                  # before
    from reval_kernels.compat.trl_utils import selective_log_softmax     # after

docs/coming_from.md has the differences from TRL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks
from ..values import token_values
from .naming import call
from .trl_kernels import NAMES, as_bool, row_values

__all__ = ["entropy_from_logits", "selective_log_softmax", "selective_log_softmax_and_entropy"]


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """The log-probs of one word, or of K words, in each row.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64; any strides; on any device.
        index: [...] or [..., K], int64 or int32, in [0, V) where `row_mask` is not 0.
        temperature: divides the logits; positive.
        row_mask: of the shape of `index`, bool or integer. Where it is 0, the output and its gradient are 0.

    Returns:
        float32 (float64 for float64 logits) of the shape of `index`, differentiable in the logits.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument.
    """
    if isinstance(logits, Tensor) and isinstance(index, Tensor) and index.dim() == logits.dim():
        return _log_probs_of_several(logits, index, temperature, as_bool(row_mask))
    return row_values(logits, index, temperature, row_mask, with_entropy=False).log_prob


def _log_probs_of_several(logits: Tensor, index: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """log p = (x - largest) / temperature + log p(largest), for index [..., K].

    The difference of two logits is small, so an offset that all logits have costs no digits.
    """
    shape = (*logits.shape[:-1], index.shape[-1])
    checks.tensor("index", index, (torch.int64, torch.int32), torch.Size(shape), logits.device)
    rows = None
    if mask is not None:
        checks.tensor("row_mask", mask, (torch.bool,), torch.Size(shape), logits.device)
        index, rows = index.masked_fill(~mask, 0), mask.any(-1)
    best = logits.detach().argmax(-1)
    values = call(NAMES, token_values, logits, best, mask=rows, temperature=temperature)
    largest = logits.detach().gather(-1, best[..., None]).to(values.v.dtype)
    own = (logits.gather(-1, index.long()).to(values.v.dtype) - largest) / temperature
    # value: log p(largest); gradient: that of -V, which gives every word its -p
    rest = values.log_prob.detach() - (values.v - values.v.detach())
    out = own + rest[..., None]
    return out if mask is None else out.where(mask, 0)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-prob of one word in each row, and the row's entropy in nats.

    Args:
        logits, index, temperature, row_mask: as in `selective_log_softmax`; index is [...].
        entropy_requires_grad: if false, the entropy has no gradient.

    Returns:
        log-prob and entropy, [...] float32 (float64 for float64 logits), differentiable in the logits.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument.
    """
    values = row_values(logits, index, temperature, row_mask, with_entropy=True)
    assert values.entropy is not None
    return values.log_prob, values.entropy if entropy_requires_grad else values.entropy.detach()


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """The entropy of softmax(logits) in nats.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64.
        chunk_size: without effect: the backends choose their chunks.

    Returns:
        [...] float32 (float64 for float64 logits), differentiable in the logits.

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit; the message names the argument.
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = token_values(logits, index, with_entropy=True).entropy
    assert entropy is not None
    return entropy
