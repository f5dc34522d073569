"""Liger 0.8.5's fused linear scaled cross entropy: -log-prob and entropy from hidden states and head.

    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction                   # before
    from reval_kernels.compat.liger import LigerFusedLinearScaledCrossEntropyFunction         # after

docs/coming_from.md has the differences from Liger.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import checks
from ..contract import wide_dtype
from ..types import TokenValues
from ..values import linear_token_values
from .naming import call

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "LigerFusedLinearScaledCrossEntropyFunction",
    "LigerFusedLinearScaledCrossEntropyTPFunction",
    "liger_fused_linear_scaled_cross_entropy_tp",
]

NAMES = {"hidden": "_input", "actions": "target"}


class LigerFusedLinearScaledCrossEntropyFunction:
    """Liger's function of the same name. It has `apply` alone, as Liger's has."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """-log p(target) of each token, with logits = _input @ weight.T / temperature, which are never stored.

        Args:
            _input: [M, H] float32, bfloat16, float16 or float64.
            weight: [V, H]; its dtype may differ from that of `_input`.
            target: [M] int64 or int32, in [0, V) or `ignore_index`.
            temperature: positive.
            ignore_index: where target has this value, all outputs and the gradient are 0, and the row is never read.
            m_tiles_per_cluster: a positive integer without effect: the backends choose their tiles.
            return_entropy: also return the entropy in nats.
            selected_token_ids: [K] int64, words whose log-probs are returned for every token.

        Returns:
            nll [M], or a tuple: nll, entropy [M] (if return_entropy), selected log-probs [M, K] (if
            selected_token_ids is given). All are float32 (float64 for float64 `_input`) and differentiable.

        Raises:
            TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument.
        """
        _positive("m_tiles_per_cluster", m_tiles_per_cluster)
        values, mask = _values(_input, weight, target, temperature, ignore_index, return_entropy, None)
        outputs = _outputs(values)
        if selected_token_ids is not None:
            above = _logits_above_target(_input, weight, target, selected_token_ids, mask)
            outputs += (above / temperature + values.log_prob[:, None],)  # both are 0 where masked out
        return outputs if len(outputs) > 1 else outputs[0]


class LigerFusedLinearScaledCrossEntropyTPFunction:
    """Liger's function of the same name, for a head whose words are split over the ranks of a process group."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        tp_group: ProcessGroup | None,
        temperature: float = 1.0,
        ignore_index: int = -100,
        tiles_per_reduce: int = 1,
        return_entropy: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """-log p(target) of each token over the whole vocabulary, on any device.

        Args:
            _input, target, temperature, ignore_index, return_entropy: as in
                LigerFusedLinearScaledCrossEntropyFunction; the same on all ranks.
            weight: [V of this rank, H], this rank's slice of the words. The slices may differ in size.
            tp_group: the ranks, in the order of their slices; None means all ranks.
            tiles_per_reduce: 1, 2 or 4, without effect.

        Returns:
            nll [M], or (nll, entropy). The gradient of `_input` is that of the whole vocabulary, the gradient of
            `weight` that of the slice.

        Raises:
            TypeError, ValueError: a dtype, shape, device or value that does not fit; the message names the argument.
        """
        if tiles_per_reduce not in (1, 2, 4):
            raise ValueError(f"tiles_per_reduce must be one of 1, 2, 4; got {tiles_per_reduce!r}")
        if tp_group is None:
            tp_group = torch.distributed.group.WORLD
        if tp_group is None:
            raise RuntimeError("tp_group is None, which means all ranks, but torch.distributed is not initialized")
        outputs = _outputs(_values(_input, weight, target, temperature, ignore_index, return_entropy, tp_group)[0])
        return outputs if len(outputs) > 1 else outputs[0]


def liger_fused_linear_scaled_cross_entropy_tp(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: ProcessGroup | None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    tiles_per_reduce: int = 1,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """LigerFusedLinearScaledCrossEntropyTPFunction.apply, under the name of liger_kernel.transformers.functional."""
    return LigerFusedLinearScaledCrossEntropyTPFunction.apply(
        input, weight, target, tp_group, temperature, ignore_index, tiles_per_reduce, return_entropy
    )


def _values(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    ignore_index: int,
    with_entropy: bool,
    group: ProcessGroup | None,
) -> tuple[TokenValues, Tensor]:
    """The token values, and the mask of the tokens that are not ignored."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, got {type(target).__name__}")
    mask = target != ignore_index
    values = call(
        NAMES,
        linear_token_values,
        hidden,
        weight,
        target,
        mask=mask,
        temperature=temperature,
        with_entropy=with_entropy,
        process_group=group,
    )
    return values, mask


def _outputs(values: TokenValues) -> tuple[Tensor, ...]:
    return (-values.log_prob,) if values.entropy is None else (-values.log_prob, values.entropy)


def _logits_above_target(hidden: Tensor, weight: Tensor, target: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """[M, K] logits of the selected words less that of the target, in float32 (float64) also under autocast.

    They are 0 where masked out. The difference of two logits is small, so an offset that all logits have costs no
    digits.
    """
    checks.tensor("selected_token_ids", words, (torch.int64,), ["K"], weight.device)
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = wide_dtype(hidden)
        rows = hidden.where(mask[:, None], 0).to(dtype)
        own = (rows * weight.index_select(0, target.where(mask, 0)).to(dtype)).sum(1, keepdim=True)
        return rows @ weight.index_select(0, words).to(dtype).T - own


def _positive(name: str, x: object) -> None:
    if isinstance(x, bool) or not isinstance(x, int) or x < 1:
        raise ValueError(f"{name} must be a positive integer, got {x!r}")
