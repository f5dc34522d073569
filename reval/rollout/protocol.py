"""The protocol that every rollout engine satisfies: token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..errors import RunError

if TYPE_CHECKING:  # the process of an engine imports this module and starts faster without torch and transformers
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RolloutError(RunError):
    """A rollout engine died, hung or cannot do what was requested. The policy's weights are not affected."""


class Episode(NamedTuple):
    """What a response of several turns has in addition (actor.py)."""

    prompt_ids: list[int]
    """The prompt: the environment's first messages. Empty if the environment gave none."""
    action_mask: list[bool]
    """One entry for each token of the response: true if the model chose it, false for the environment's tokens."""
    turns: int
    """Number of the model's turns."""
    reward: float | None
    """The sum of the environment's rewards. None if the environment failed."""
    error: str
    """What the environment raised or did wrong. Empty if it did nothing wrong, and if it was too slow."""


@dataclass(frozen=True, slots=True)
class Response:
    """The policy's response to a prompt, as the token ids that it sampled."""

    token_ids: list[int]
    """The response with its end-of-sequence token. Never empty, except for an environment that failed at its reset.
    With several turns, the tokens of the environment stand between the turns."""
    finished: bool
    """False if the length limit or the limit of turns cut the response off."""
    episode: Episode | None = None
    """Set for a response of several turns. An engine leaves it out."""

    @property
    def length(self) -> int:
        """Number of the model's own tokens."""
        return len(self.token_ids) if self.episode is None else sum(self.episode.action_mask)


class RolloutEngine(Protocol):
    """Samples responses from the policy. Input and output are token ids; no text is encoded again.

    An engine serves one call at a time; a call from a second thread waits for the first. Every method raises
    RolloutError when the engine cannot continue.

    An engine may have an attribute `progress`. If it is not None, `generate` calls it about once a second with the
    number of tokens so far and the number of sequences left.
    """

    shares_weights: bool
    """The engine generates with the policy itself, so there is nothing to sync."""

    def generate(
        self, prompts: list[list[int]], *, responses: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[Response]]:
        """Generate `responses` responses to each prompt. Temperature 0 takes the most likely token.

        The same seed, prompts and weights give the same responses.
        """
        ...

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the policy's weights into the engine.

        Args:
            weights: (name in the model's state_dict, whole tensor of any dtype), one at a time. The engine must iterate
                in order and to the end, because each step may be a collective operation of all processes. A tensor is
                valid until the next one is requested. Tied weights appear once or under each of their names.

        Raises ValueError when a weight is missing, unknown or of another shape.
        """
        ...

    def log_probs(self, sequences: list[list[int]], starts: list[int]) -> list[list[float]]:
        """log pi(token | all tokens before) of the tokens of each sequence from its index in `starts` on.

        The temperature is 1. The engine computes them in the way it generates: with its weights, dtype and caches.
        """
        ...

    def close(self) -> None:
        """End the engine's processes and free its memory. A second call does nothing."""
        ...


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: those of the generation config and the end-of-sequence token of the tokenizer."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({e for e in (*ends, tokenizer.eos_token_id) if e is not None})
