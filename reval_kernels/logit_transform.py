"""What a model does to the output of its head, measured on stand-in logits instead of read from its configuration.

The same name means different things in different models: `logits_scaling` divides the logits in Granite, multiplies
them in HyperCLOVA X, and divides the hidden states in MiniCPM3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import WIDE

PROBES = 13
"""The powers of 2 from 1/16 on that are logits of a stand-in."""


class LogitTransform(NamedTuple):
    """What a model does to the output of its head: logits = softcap(output[:words]) / temperature."""

    softcap: float | None = None
    temperature: float = 1.0
    words: int | None = None
    """None: all words."""


def stand_in_logits(words: int, device: torch.device) -> Tensor:
    """Logits [1, 1, V] of one state, float64, all different: 0, powers of 2, then evenly spaced from -128 to 128."""
    x = torch.linspace(-128, 128, words, dtype=torch.float64)
    powers = 2.0 ** (torch.arange(min(PROBES, words - 1), dtype=torch.float64) - 4)
    x[0] = 0
    x[1 : 1 + len(powers)] = powers
    return x[None, None].to(device)


def measure(name: str, words: int, logits: Tensor, *, split: bool) -> LogitTransform:
    """What the model `name` did to `stand_in_logits`, if they are now `logits`.

    It may scale them, apply c * tanh(x / c), and drop the last words. Raises ValueError for anything else, and for
    logits narrower than float32: in bfloat16 a factor of 1.03 looks like none.

    Args:
        split: ranks share the words. A rank's slice of the logits would look like dropped words, so none may be.
    """
    if logits.dtype not in WIDE:
        raise ValueError(
            f"the logits of {name} come out as {logits.dtype}, too coarse to measure what the model does to them. If a "
            "wrapper rounds them (FSDP2's output_dtype), call reval_kernels.hf.head_of(model) once before the model is "
            "wrapped. If the model does, take reval_kernels.token_values(model(...).logits, ...)"
        )
    y = logits.detach().double().flatten().cpu()
    x = stand_in_logits(words, torch.device("cpu")).flatten()[: len(y)]
    eps = torch.finfo(logits.dtype).eps
    least = words if split else 2
    if logits.shape[:-1] != (1, 1) or not least <= len(y) <= words or not y.isfinite().all():
        raise ValueError(_unknown(name, f"turned logits of shape [1, 1, {words}] into {list(logits.shape)}"))
    kept = None if len(y) == words else len(y)
    for softcap, scale in _candidates(x, y):
        expected = (x if softcap is None else softcap * torch.tanh(x / softcap)) * scale
        near = torch.allclose(y, expected, rtol=16 * eps, atol=16 * eps * float(y.abs().max()))
        if near and scale > 0:
            # a scale is measured at a power of 2, where a model rounds once; a softcap at a tanh, where more is lost
            slack = (1 if softcap is None else 64) * eps
            return LogitTransform(_short(softcap, slack), _inverse(scale, slack), kept)
    raise ValueError(_unknown(name, f"turned {x[-1]:.4g} into {y[-1]:.4g}, and {x[1]:.4g} into {y[1]:.4g}"))


def _candidates(x: Tensor, y: Tensor) -> Iterator[tuple[float | None, float]]:
    """(c, s) in y = s * c * tanh(x / c). None: no softcap."""
    yield None, 1.0
    yield None, float(y[-1] / x[-1])
    # tanh(2u) / tanh(u) = 2 / (1 + tanh(u)^2): two logits x and 2x give u = x / c. Best where tanh bends most.
    last = min(PROBES, len(x) - 1)
    if last < 2:
        return
    ratio = y[2 : last + 1] / y[1:last]
    at = int((ratio - 1.3).abs().argmin())
    t = (2 / ratio[at] - 1).clamp(1e-9, 1 - 1e-9).sqrt()
    c = float(x[1 + at] / torch.atanh(t))
    yield c, float(y[1 + at] / (c * t))


def _short(x: float | None, slack: float) -> float | None:
    """`x` without its rounding error: the shortest decimal number within the relative `slack`, if there is one."""
    if x is None:
        return None
    for digits in range(1, 9):
        if abs(float(f"{x:.{digits}g}") - x) <= slack * abs(x):
            return float(f"{x:.{digits}g}")
    return x


def _inverse(scale: float, slack: float) -> float:
    """1 / scale. One of the two is a short decimal number in a configuration."""
    short: Any = _short(scale, slack)
    inverse: Any = _short(1 / scale, slack)
    return 1 / short if len(repr(short)) <= len(repr(inverse)) else inverse


def _unknown(name: str, what: str) -> str:
    return (
        f"{name} does more to its logits than a scale, a softcap and dropping the last words: it {what}. Values "
        "depend on the logits exactly. reval_kernels.token_values takes any: token_values(model(...).logits, ...)"
    )
