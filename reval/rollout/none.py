"""The engine of a run that generates nothing: rollout.engine=none and no evaluation problems."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from .protocol import Response


class NoRollout:
    """Satisfies RolloutEngine without weights. Nothing may be asked of it."""

    shares_weights = True
    """There is nothing to sync."""

    def generate(
        self, prompts: list[list[int]], *, responses: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[Response]]:
        """See RolloutEngine.generate."""
        raise AssertionError("a run without problems asks for no responses")

    def log_probs(self, sequences: list[list[int]], starts: list[int]) -> list[list[float]]:
        """See RolloutEngine.log_probs."""
        raise AssertionError("a run without problems has no responses to probe")

    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See RolloutEngine.sync."""
        for _ in weights:
            pass

    def close(self) -> None:
        """See RolloutEngine.close."""
