"""The reward of the fast tasks."""

from __future__ import annotations


def exact(
    prompts: list, completions: list[str], completion_ids: list[list[int]], answer: list[str], **columns: list
) -> list[float | None]:
    """1.0 for a completion that is exactly the answer, else 0.0. One more word, or a space, makes it wrong."""
    return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]


def nothing(
    prompts: list, completions: list[str], completion_ids: list[list[int]], **columns: list
) -> list[float | None]:
    """0.0 for every completion: what an objective does without any reward."""
    return [0.0] * len(completions)
