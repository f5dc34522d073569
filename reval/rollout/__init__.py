"""Generating responses: the protocol that every rollout engine implements, and which one the settings ask for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..config import Config
from ..errors import RunError

if TYPE_CHECKING:  # so that a server starts without them
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RolloutError(RunError):
    """A rollout engine died, hung or cannot do what it was asked. The policy's weights are not affected."""


@dataclass(frozen=True, slots=True)
class Response:
    """What the policy said, as the token ids it sampled."""

    token_ids: list[int]
    """The end-of-sequence token included; never empty."""
    finished: bool
    """False when the length limit cut it off."""


class RolloutEngine(Protocol):
    """Samples responses from the policy. Token ids go in and come out; nothing is encoded again.

    An engine answers one call at a time; a call from a second thread waits for the first. Raises RolloutError when it
    cannot go on.
    """

    shares_weights: bool
    """It generates with the policy itself, so there is nothing to sync."""

    def generate(
        self, prompts: list[list[int]], *, responses: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[Response]]:
        """`responses` answers to each prompt; temperature 0 takes the likeliest token. The same seed, prompts and
        weights give the same answers."""
        ...

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the policy's weights: (name in the model's state_dict, whole tensor), one at a time, any dtype.

        The iterable is always consumed to its end and in order, since it may be a collective; a tensor is not used
        after the next one is asked for. Tied weights may come once or under each name. Raises ValueError when a
        weight is missing, unknown or of another shape.
        """
        ...

    def log_probs(self, sequences: list[list[int]], starts: list[int]) -> list[list[float]]:
        """log pi(token | what precedes it) of each sequence's tokens from index `start` on, at temperature 1, under
        the engine's weights and as it generates (its dtype, its caches)."""
        ...

    def close(self) -> None:
        """End processes and free memory; a second call does nothing."""
        ...


def make_rollout(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, device: torch.device | None = None
) -> RolloutEngine:
    """The engine that `rollout.engine` names, for this policy.

    Args:
        model: the policy itself, which the hf engine generates with where the dtypes agree. With a `device`: a model of
            its shape that the hf engine may keep; no weights are read from it, they come with the first sync.
        device: the policy's device.

    A vllm engine has no weights before its first `sync`. Raises ValueError when the engine cannot be used here.
    """
    from ..model.dtypes import rollout_dtype

    settings, dtype = config.rollout, rollout_dtype(config)
    if settings.engine == "hf":
        from .hf import HFRollout

        if device is not None:
            model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` untyped
        return HFRollout(model, tokenizer, batch_size=settings.batch_size, dtype=dtype, private=device is not None)
    from .vllm import make_vllm

    return make_vllm(config, model, tokenizer, dtype, device or model.device)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the generation config's and the tokenizer's own."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({e for e in (*ends, tokenizer.eos_token_id) if e is not None})
