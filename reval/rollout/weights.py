"""The policy's weights on their way to an engine: every one of them, under its name, in its shape.

An engine that misses a weight goes on with the old one and says nothing, so what is sent is compared with what the
model has before anything else happens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Size, Tensor, nn

ALIGN = 64  # bytes; a view of the file as another dtype needs its start aligned
Index = list[tuple[str, list[int], int]]


@dataclass(frozen=True, slots=True)
class Expected:
    """What a sync must bring."""

    shapes: dict[str, Size]
    """Of everything in the state_dict."""
    groups: list[frozenset[str]]
    """Names of one and the same weight; at least one of each group must come. Buffers may be left out."""


def expected_weights(model: nn.Module) -> Expected:
    """What a sync of this model must bring; the model must be whole (not sharded) and without adapters."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return Expected(shapes, [frozenset(group) for group in names.values()])


def checked(weights: Iterable[tuple[str, Tensor]], expected: Expected) -> Generator[tuple[str, Tensor], None, None]:
    """The same pairs; ValueError for a wrong one, and at the end for a missing one.

    The rest is still consumed after an error, the caller's own included when it uses `contextlib.closing`: other ranks
    may be waiting for this one in a gather.
    """
    seen = set()
    iterator = iter(weights)
    try:
        for name, weight in iterator:
            if name not in expected.shapes:
                raise ValueError(f"sync got a weight {name!r} that the model does not have{_near(name, expected)}")
            if weight.shape != expected.shapes[name]:
                given, want = list(weight.shape), list(expected.shapes[name])
                raise ValueError(f"sync got {name} of shape {given}; the model's is {want} (whole, not a shard)")
            seen.add(name)
            yield name, weight
    finally:
        for _ in iterator:
            pass
    missing = [sorted(group)[0] for group in expected.groups if not group & seen]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"sync got {len(seen)} weights, but {len(missing)} of the model's are missing ({shown}); the engine would "
            "keep old ones"
        )


def write_weights(fd: int, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Index:
    """Write the weights over what the file `fd` holds, floating-point ones in `dtype`; (name, shape, offset) of each.

    Memory beside the file: one weight.
    """
    index: Index = []
    offset = 0
    with open(fd, "wb", closefd=False) as file:
        for name, weight in weights:
            file.seek(offset)
            data = weight.detach().to("cpu", dtype).contiguous()
            file.write(data.reshape(-1).view(torch.uint8).numpy().data)
            index.append((name, list(weight.shape), offset))
            offset += -(-data.nbytes // ALIGN) * ALIGN
        file.truncate(max(offset, 1))
    return index


def read_weights(path: str, index: Index, dtype: torch.dtype) -> Generator[tuple[str, Tensor], None, None]:
    """What `write_weights` wrote, as views of the mapped file: copy what must outlive it or the next write."""
    size = Path(path).stat().st_size
    data = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    for name, shape, offset in index:
        count = prod(shape) * dtype.itemsize
        yield name, data[offset : offset + count].view(dtype).view(shape)


def _near(name: str, expected: Expected) -> str:
    """A hint for the usual reason: a wrapper's prefix."""
    for own in expected.shapes:
        if name.endswith("." + own):
            return f"; it has {own!r}: the prefix {name.removesuffix(own)!r} of a wrapper must be taken off"
    return ""
