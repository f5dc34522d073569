"""Correct bf16 in Triton's interpreter, and a count of the bytes that a kernel loads and stores there.

The interpreter keeps bf16 as raw uint16. Without a repair, it adds and multiplies these raw bits, also in `tl.dot`, and
its fp32 -> bf16 cast truncates where a GPU rounds. `faithful` repairs casts and dots during a launch. All other
arithmetic on bf16 becomes an error, so that a kernel that forgets to widen cannot pass a test by luck. The kernels
contain no code for the interpreter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _from_bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def _to_bf16(x: np.ndarray) -> np.ndarray:
    """Round to nearest even, as `cvt.rn.bf16.f32` does."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


_BUILDER = interpreter.InterpreterBuilder
_cast, _binary = _BUILDER.cast_impl, _BUILDER.binary_op


def _faithful_cast(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target == tl.float32:
        return interpreter.TensorHandle(_from_bf16(src.data), target)
    if source == tl.float32 and target == tl.bfloat16:
        return interpreter.TensorHandle(_to_bf16(src.data), target)
    return _cast(self, src, dst_type)


def _faithful_dot(self, a, b, d, *precision):
    """a @ b + d with the operands widened to fp32. Products of bf16 or fp16 are exact there, as in a tensor core.

    Every sum is taken in the same order for every shape of the block, as on a GPU. A BLAS does not promise this order:
    on some processors the bits of np.matmul depend on the number of rows.
    """
    wide = [_faithful_cast(self, x, tl.float32).data for x in (a, b)]
    return interpreter.TensorHandle(np.einsum("mk,kn->mn", *wide) + d.data, d.dtype.scalar)


def _strict_binary(self, lhs, rhs, op):
    if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
        raise TypeError("arithmetic on bf16 in the interpreter works on raw bits: cast to fp32 after the load")
    return _binary(self, lhs, rhs, op)


@contextlib.contextmanager
def faithful(asserts: bool = False) -> Iterator[None]:
    """In this context bf16 casts round, bf16 dots multiply numbers, and other bf16 arithmetic raises TypeError.

    `asserts`: tl.device_assert raises AssertionError, as it stops a GPU kernel that is launched with debug=True.
    """
    options = replace(interpreter.interpreter_builder.options, debug=asserts, sanitize_overflow=False)
    with (
        mock.patch.object(interpreter.interpreter_builder, "options", options),
        mock.patch.object(_BUILDER, "cast_impl", _faithful_cast),
        mock.patch.object(_BUILDER, "create_dot", _faithful_dot),
        mock.patch.object(_BUILDER, "binary_op", _strict_binary),
        np.errstate(all="ignore"),  # no warnings from exp2(-inf), or from the branch that tl.where does not take
    ):
        yield


@dataclass
class Traffic:
    """Bytes that kernels load from and store to tensors: tensor name -> bytes."""

    loaded: dict[str, int] = field(default_factory=dict)
    """Bytes of all load instructions."""
    distinct: dict[str, int] = field(default_factory=dict)
    """The same, but bytes that a program, or a unit of programs, loads again count once: a cache serves them."""
    stored: dict[str, int] = field(default_factory=dict)


@contextlib.contextmanager
def counted(unit: Callable[[tuple], Any] = lambda program: program, **tensors: torch.Tensor) -> Iterator[Traffic]:
    """In this context, count the bytes that kernels load from and store to the named tensors, and "other" memory.

    `unit` gives the unit of a program (a tuple of three ids). The programs of one unit share a cache that is large
    enough for all their loads.
    """
    traffic = Traffic()
    spans = {
        name: (t.untyped_storage().data_ptr(), t.untyped_storage().data_ptr() + t.untyped_storage().nbytes())
        for name, t in tensors.items()
    }
    seen: dict[tuple, list[np.ndarray]] = {}
    load, store = _BUILDER.create_masked_load, _BUILDER.create_masked_store

    def owner(addresses: np.ndarray) -> str:
        inside = (name for name, (start, end) in spans.items() if start <= addresses[0] < end)
        return next(inside, "other")

    def add(book: dict[str, int], name: str, amount: int) -> None:
        book[name] = book.get(name, 0) + amount

    def counting_load(self, ptrs, mask, *rest, **options):
        addresses = np.broadcast_to(ptrs.data, np.broadcast(ptrs.data, mask.data).shape)[
            np.broadcast_to(mask.data, np.broadcast(ptrs.data, mask.data).shape)
        ]
        if addresses.size:
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            # an address that repeats within one instruction (a broadcast) is loaded once
            addresses = np.unique(addresses)
            add(traffic.loaded, owner(addresses), addresses.size * size)
            seen.setdefault((owner(addresses), size, unit(tuple(self.grid_idx))), []).append(addresses)
        return load(self, ptrs, mask, *rest, **options)

    def counting_store(self, ptrs, value, mask, *rest, **options):
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape)]
        if addresses.size:
            add(traffic.stored, owner(addresses), addresses.size * ptrs.get_element_ty().primitive_bitwidth // 8)
        return store(self, ptrs, value, mask, *rest, **options)

    with (
        mock.patch.object(_BUILDER, "create_masked_load", counting_load),
        mock.patch.object(_BUILDER, "create_masked_store", counting_store),
    ):
        yield traffic
    for (name, size, _), pieces in seen.items():
        add(traffic.distinct, name, np.unique(np.concatenate(pieces)).size * size)
