"""The names of trl.kernels in TRL 1.16: log-probs and entropy from logits, and from hidden states and head.

    from trl.kernels import ChunkedLogProbFunction, selective_log_softmax_and_entropy                          # before
    from reval_kernels.compat.trl_kernels import ChunkedLogProbFunction, selective_log_softmax_and_entropy     # after

TRL 1.16 has two functions selective_log_softmax_and_entropy. The other one is in `trl_utils`. docs/coming_from.md has
the differences from TRL.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..backends.chunks import ChunkedHead
from ..contract import HeadInputs, Needs
from ..types import TokenValues
from ..values import linear_token_values, token_values
from .naming import call

__all__ = ["ChunkedLogProbFunction", "LogProbs", "chunked_log_probs", "selective_log_softmax_and_entropy"]

OPTIONAL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
"""The outputs of ChunkedLogProbFunction that a caller may leave out."""
NAMES = {"actions": "index", "mask": "row_mask"}
HEAD_NAMES = {"actions": "targets", "softcap": "final_logit_softcapping / logit_scale"}


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The log-prob of one word in each row, and the row's entropy in nats, with the arguments of TRL's row kernel.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64; any strides; on any device.
        index: [...] int64 or int32, in [0, V) where `row_mask` is not 0.
        temperature: divides the logits; positive.
        row_mask: [...] bool or integer; where it is 0, both outputs and the gradient are 0, and the row is never read.

    Returns:
        log-prob and entropy, [...] float32 (float64 for float64 logits), both differentiable in the logits.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument.
    """
    values = row_values(logits, index, temperature, row_mask, with_entropy=True)
    assert values.entropy is not None
    return values.log_prob, values.entropy


def row_values(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, with_entropy: bool
) -> TokenValues:
    """token_values with TRL's arguments."""
    mask = as_bool(row_mask)
    return call(NAMES, token_values, logits, index, mask=mask, temperature=temperature, with_entropy=with_entropy)


def as_bool(row_mask: Tensor | None) -> Tensor | None:
    """A mask of any dtype as a bool mask."""
    if row_mask is not None and not isinstance(row_mask, Tensor):
        raise TypeError(f"row_mask must be a tensor or None, got {type(row_mask).__name__}")
    return row_mask if row_mask is None or row_mask.dtype == torch.bool else row_mask != 0


class LogProbs(NamedTuple):
    """What chunked_log_probs returns: tensors [...], float32 (float64 for float64 hidden states)."""

    logprobs: Tensor
    log_z: Tensor
    """logsumexp of the row's logits: V(s)."""
    entropy: Tensor | None
    """In nats; None unless with_entropy is true."""


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    final_logit_softcapping: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = True,
) -> LogProbs:
    """Log-prob, log Z and entropy from hidden states and head, with TRL's argument names. No logits are stored.

    logits = hidden @ weight.T + bias, times logit_scale, then softcap * tanh(. / softcap), then / temperature. TRL's
    own function returns no log Z, which is V(s) of ReVal.

    Args:
        hidden: [N, H] (or [..., H]) float32, bfloat16, float16 or float64.
        weight: [V, H]; bias: [V] or None.
        targets: [N] (or [...]) int64 or int32, in [0, V).
        temperature: positive.
        final_logit_softcapping: positive, or None for none.
        logit_scale: positive.
        with_entropy: also return the entropy.

    Returns:
        LogProbs, all differentiable in hidden, weight and bias.

    Raises:
        TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument.
    """
    checks.number("temperature", temperature, torch.float64)
    checks.number("logit_scale", logit_scale, torch.float64)
    if hasattr(weight, "ds_id"):
        raise ValueError(
            "weight must be whole in the backward pass too; got a parameter of DeepSpeed ZeRO-3, which is split again "
            "after the forward pass. Use TRL's own ChunkedLogProbFunction, or another ZeRO stage"
        )
    cap = final_logit_softcapping
    # scale and softcap commute: cap * tanh(s x / cap) / T = c * tanh(x / c) / t with c = cap / s, t = T / s
    values = call(
        HEAD_NAMES,
        linear_token_values,
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature / logit_scale,
        softcap=None if cap is None else cap / logit_scale,
        with_entropy=with_entropy,
    )
    return LogProbs(values.log_prob, values.v, values.entropy)


class ChunkedLogProbFunction:
    """TRL's autograd function of the same name. It has `apply` alone, and is called as TRL calls it."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = OPTIONAL_OUTPUTS,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Log-probs of `targets`, and the outputs that `outputs` names; None for the others.

        Args:
            hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale: as in `chunked_log_probs`.
            chunk_size: a positive integer without effect: the backends choose their chunks.
            outputs: names among "entropy", "log_sum_sq_probs", "mean_logits", "is_top1". One of the last three, or
                all of them, costs one more product of hidden states and head.

        Returns:
            (logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1), [N] each: float32 (float64 for float64 hidden
            states), is_top1 bool. The first two are differentiable in hidden, weight and bias. log_sum_sq_probs is
            log sum_v p_v^2, mean_logits the mean of the transformed logits; is_top1 says whether the target is the
            first largest logit.

        Raises:
            TypeError, ValueError: a dtype, shape, device, name or value that does not fit; the message names the
                argument.
        """
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ValueError(f"chunk_size must be a positive integer, got {chunk_size!r}")
        for name in outputs:
            if name not in OPTIONAL_OUTPUTS:
                raise ValueError(checks.unknown("outputs", name, OPTIONAL_OUTPUTS))
        found = chunked_log_probs(
            hidden, weight, bias, targets, temperature, final_logit_softcapping, logit_scale, "entropy" in outputs
        )
        more: dict[str, Tensor] = {}
        if set(outputs) - {"entropy"}:
            head = HeadInputs(hidden.detach(), weight.detach(), None if bias is None else bias.detach(), "exact")
            more = _statistics(head, targets, temperature, final_logit_softcapping, logit_scale)
        squares, mean, top = (more[n] if n in outputs else None for n in OPTIONAL_OUTPUTS[1:])
        return found.logprobs, found.entropy, squares, mean, top


@torch.no_grad()
def _statistics(
    head: HeadInputs, targets: Tensor, temperature: float, softcap: float | None, logit_scale: float
) -> dict[str, Tensor]:
    """The three outputs without a gradient, a chunk of tokens at a time, in plain PyTorch."""
    flat = head._replace(hidden=head.hidden.flatten(0, -2))
    chunked = ChunkedHead(flat, Needs(False, False, False))
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, max(len(flat.hidden), 1), chunked.size):  # one chunk at least, from which results get dtypes
        at = slice(start, start + chunked.size)
        z = chunked.logits((at,)).mul_(logit_scale)  # type: ignore[arg-type]  # a slice in place of a tensor
        z = (z if softcap is None else (z / softcap).tanh_().mul_(softcap)).div_(temperature)
        squares = z.softmax(-1).square_().sum(-1).log_()
        found.append((squares, z.mean(-1), z.argmax(-1) == targets.flatten()[at]))
    parts = [torch.cat(part).view(targets.shape) for part in zip(*found, strict=True)]
    return dict(zip(OPTIONAL_OUTPUTS[1:], parts, strict=True))
