"""Sampling the next token of each sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256


def sample(logits: Tensor, temperature: float, noise: Tensor) -> Tensor:
    """A token for each sequence from softmax(logits / temperature), or the most likely token at temperature 0.

    Args:
        logits: [V, N] float32 for V words and N sequences. They are overwritten.
        noise: [N] float64, uniform in [0, 1). The token is the one in whose share of [0, 1) the noise lies, with the
            words in order. So one number for each sequence is enough.

    Returns int64 [N]; -1 where a logit is not finite or all are -inf.
    """
    top = logits.amax(0)
    if temperature == 0:
        return torch.where(top.isfinite(), logits.argmax(0), -1)
    weights = logits.sub_(top).div_(temperature).exp_()
    if missing := -weights.shape[0] % BLOCK:
        weights = F.pad(weights, (0, 0, 0, missing))
    blocks = weights.view(-1, BLOCK, weights.shape[1])
    # The block first, then the word in it. A running sum over all V words would be slow, and imprecise in float32.
    block, rest = _first_above(blocks.sum(1), noise)
    inside = blocks[block, :, torch.arange(len(block), device=block.device)].T
    word, _ = _first_above(inside, rest)
    return torch.where(top.isfinite() & rest.isfinite(), block * BLOCK + word, -1)


def _first_above(weights: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """For each column, the index in whose share of the column's sum the noise lies, and where in that share it lies.

    weights [K, N]; noise [N] float64 in [0, 1); returns int64 [N] and float64 [N] in [0, 1). A weight of 0 is never
    chosen.
    """
    ends = weights.double().cumsum(0)
    target = torch.minimum(noise * ends[-1], ends[-1] * (1 - 2**-52))  # rounding must not reach the end of the last
    index = (ends <= target).sum(0).clamp(max=len(weights) - 1)
    end = ends.gather(0, index[None])[0]
    weight = weights.gather(0, index[None])[0].double()
    return index, ((target - (end - weight)) / weight).clamp(0, 1 - 2**-52)
