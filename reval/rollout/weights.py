"""Sends the policy's weights to an engine, and checks that names and shapes are complete and right.

An engine that does not get a weight continues with the old weight and reports nothing. So `checked` compares the
weights that are sent with the weights of the model.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Size, Tensor, nn

ALIGN = 64  # bytes; a weight must start at an aligned offset, so that the file can be viewed as another dtype there
Index = list[tuple[str, list[int], int]]
"""(name, shape, offset in bytes) of each weight in a file."""


@dataclass(frozen=True, slots=True)
class Expected:
    """Names and shapes that a sync must contain."""

    shapes: dict[str, Size]
    """Shapes of all tensors in the state_dict, by name."""
    groups: list[frozenset[str]]
    """For each parameter, all its names: a tied weight has several names. A sync must contain at least one name of each
    group. It may leave out buffers."""


def expected_weights(model: nn.Module) -> Expected:
    """The names and shapes that a sync of `model` must contain. `model` must not be sharded or have adapters."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return Expected(shapes, [frozenset(group) for group in names.values()])


def checked(weights: Iterable[tuple[str, Tensor]], expected: Expected) -> Generator[tuple[str, Tensor], None, None]:
    """Yield the pairs (name, weight) unchanged. ValueError for a wrong pair, and at the end for a missing weight.

    After an error, the remaining pairs are still consumed. The iterable may be a collective operation: other ranks
    would wait in a gather if this rank stopped early. A caller that may raise an error itself must use
    `contextlib.closing`, which consumes the remaining pairs too.
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
    """Write the weights to the file descriptor `fd`, converted to `dtype`, over its old content. Returns the index.

    The weights are written one after another, so only one weight is in memory besides the file.
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
    """Yield (name, weight) for the weights that `write_weights` wrote with the same `dtype`.

    The weights are views of the mapped file. Copy a weight that is needed after the next write or without the file.
    """
    size = Path(path).stat().st_size
    data = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    for name, shape, offset in index:
        count = prod(shape) * dtype.itemsize
        yield name, data[offset : offset + count].view(dtype).view(shape)


def _near(name: str, expected: Expected) -> str:
    """A hint for the most common mistake: names with the prefix of a wrapper module. Empty if there is no prefix."""
    for own in expected.shapes:
        if name.endswith("." + own):
            return f"; it has {own!r}: the prefix {name.removesuffix(own)!r} of a wrapper must be taken off"
    return ""
