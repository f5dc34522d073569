"""Operands for tensor cores in place of float32 operands: the argument `precision` of the linear functions.

Tensor cores multiply bf16 numbers exactly and sum in fp32. Written as hi + lo, two bf16 numbers, a float32 number keeps
16 of its 24 bits, and the product of two of them is nearly hi hi + hi lo + lo hi (Henry, Tang and Heinecke, arXiv
1904.06376). So "bf16x3" needs no kernel of its own: it is one product of bf16 operands that are three times as wide,
[hi, hi, lo] of the hidden states with [hi, lo, hi] of the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...contract import HeadInputs

WIDE = {torch.float32, torch.bfloat16}


def becomes_bf16(head: HeadInputs) -> bool:
    """Whether the kernels multiply bf16 numbers in place of the float32 operands of this head."""
    kinds = {head.hidden.dtype, head.weight.dtype}
    return head.precision in ("bf16", "bf16x3") and torch.float32 in kinds and kinds <= WIDE


def operands(head: HeadInputs) -> HeadInputs:
    """The operands of the kernels of linear_kernels.py: hidden [..., D] or [..., 3 D], weight [V, D] or [V, 3 D]."""
    if not becomes_bf16(head):
        return head
    hidden, weight = head.hidden.bfloat16(), head.weight.bfloat16()
    if head.precision == "bf16x3":
        hidden = torch.cat([hidden, hidden, _rest(head.hidden, hidden)], -1)
        weight = torch.cat([weight, _rest(head.weight, weight), weight], -1)
    return head._replace(hidden=hidden, weight=weight)


def _rest(x: Tensor, high: Tensor) -> Tensor:
    """What bf16 lost of x, in bf16."""
    return (x.float() - high.float()).bfloat16()
