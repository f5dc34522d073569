"""What a model does to the output of its head, measured on stand-in logits instead of read from its configuration.

The same name means different things in different models: `logits_scaling` divides the logits in Granite, multiplies
them in HyperCLOVA X, and divides the hidden states in MiniCPM3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

    It may scale them, apply c * tanh(x / c), and drop the last words. Raises ValueError for anything else.

    Args:
        split: ranks share the words. A rank's slice of the logits would look like dropped words, so none may be.
    """
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
        if not near or scale <= 0:
            continue
        if eps > 1e-3 and (softcap, scale) != (None, 1.0):
            raise ValueError(
                f"the logits of {name} come out as {logits.dtype}, too coarse to measure its softcap or scale; "
                "call reval_kernels.hf.head_of(model) once before the model is wrapped (FSDP2's output_dtype)"
            )
        return LogitTransform(_short(softcap, eps), _inverse(scale, eps), kept)
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


def _short(x: float | None, eps: float) -> float | None:
    """`x` without its rounding error: the shortest decimal number near it, if there is one."""
    if x is None:
        return None
    for digits in range(1, 9):
        if abs(float(f"{x:.{digits}g}") - x) <= 64 * eps * abs(x):
            return float(f"{x:.{digits}g}")
    return x


def _inverse(scale: float, eps: float) -> float:
    """1 / scale. One of the two is a short decimal number in a configuration."""
    short: Any = _short(scale, eps)
    inverse: Any = _short(1 / scale, eps)
    return 1 / short if len(repr(short)) <= len(repr(inverse)) else inverse


def _unknown(name: str, what: str) -> str:
    return (
        f"{name} does more to its logits than a scale, a softcap and dropping the last words: it {what}. Values "
        "depend on the logits exactly. reval_kernels.token_values takes any: token_values(model(...).logits, ...)"
    )
