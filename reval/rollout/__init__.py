"""Generating responses: the protocol that every rollout engine implements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy said, as the token ids it sampled."""

    token_ids: list[int]
    """The end-of-sequence token included; never empty."""
    finished: bool
    """False when the length limit cut it off."""


class RolloutEngine(Protocol):
    """Samples responses from the policy. Token ids go in and come out; nothing is encoded again."""

    def generate(
        self, prompts: list[list[int]], *, responses: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[Response]]:
        """`responses` answers to each prompt; temperature 0 takes the likeliest token. The same seed, prompts and
        weights give the same answers."""
        ...

    def sync(self, model: PreTrainedModel) -> None:
        """Take over the policy's weights as they are now."""
        ...
