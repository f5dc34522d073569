"""From rewards as the reward function gives them to rewards as the loss uses them. Imports no torch."""

import difflib
import math
from functools import partial
from statistics import mean, pstdev
from typing import get_args

from reval.config import Shaping
from reval.rewards.verifiers import ROUNDING

SHAPINGS = get_args(Shaping)


def shape_rewards(rewards: list[float | None], groups: list[int], how: str, beta: float = 1.0) -> list[float | None]:
    """The rewards as the loss uses them. None stays None.

    Args:
        rewards: the raw reward r of each response. None for a response without a score.
        groups: the group of each response: any integer, the same for all responses to one prompt.
        how: one of
            "plain": r.
            "centered": r minus the mean of the group. The only scored response of a group gets 0.
            "normalized": the centered reward divided by the population deviation of the group. A group with equal
            rewards gets 0.
            "soft_centered": r minus beta log mean exp(r / beta), the soft mean of the group: the optimal value of the
            prompt in KL-regularised reinforcement learning, estimated from the group (OAPL, docs/method.md section 4).
            "batch_normalized": as normalized, with all responses as one group. For one response per prompt.
            "plus_minus_one": 2r - 1, for r in 0..1.
            Means and deviations are over the scored responses of the group. Rewards are equal if they differ by
            rounding only (`ROUNDING`): otherwise "normalized" would divide rounding errors by rounding errors.
        beta: objective.beta, for "soft_centered".

    Raises ValueError for an unknown `how`, for different lengths, and for a reward outside 0..1 with "plus_minus_one".
    """
    if how not in SHAPINGS:
        near = difflib.get_close_matches(str(how), SHAPINGS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"how must be one of {', '.join(SHAPINGS)}, but is {how!r}{hint}")
    scored = _scored_by_group(rewards, groups)
    if how == "batch_normalized":
        return shape_rewards(rewards, [0] * len(rewards), "normalized")
    if how == "plain":
        return list(rewards)
    if how == "plus_minus_one":
        for index, r in enumerate(rewards):
            if r is not None and not -ROUNDING <= r <= 1.0 + ROUNDING:
                raise ValueError(
                    f"how='plus_minus_one' expects rewards in 0..1, but rewards[{index}] is {r}; use 'plain' or "
                    "'centered'"
                )
        return [None if r is None else 2.0 * r - 1.0 for r in rewards]
    middle = partial(_soft_mean, beta=beta) if how == "soft_centered" else mean
    scale = {group: (middle(values), _deviation(values)) for group, values in scored.items()}

    def shaped(reward: float, group: int) -> float:
        average, deviation = scale[group]
        if deviation == 0.0:
            return 0.0
        return (reward - average) / (deviation if how == "normalized" else 1.0)

    return [None if r is None else shaped(r, g) for r, g in zip(rewards, groups, strict=True)]


def reward_metrics(rewards: list[float | None], groups: list[int]) -> dict[str, float]:
    """Metrics of the raw rewards. A key whose value would be 0/0 is left out. The arguments are as in `shape_rewards`.

    Returns:
        `reward`: the mean over the scored responses.
        `reward_std`: the population deviation of the scored responses of a group, averaged over the groups.
        `frac_reward_zero_std`: the fraction of groups whose scored responses have equal rewards. A group with one
        scored response counts as equal.
        `reward_unscored`: the fraction of responses without a score.
        A group without scored responses does not count for the first three.

    Raises ValueError for different lengths.
    """
    metrics: dict[str, float] = {}
    scored = _scored_by_group(rewards, groups)
    if scored:
        deviations = [_deviation(values) for values in scored.values()]
        metrics["reward"] = mean(r for r in rewards if r is not None)
        metrics["reward_std"] = mean(deviations)
        metrics["frac_reward_zero_std"] = deviations.count(0.0) / len(deviations)
    if rewards:
        metrics["reward_unscored"] = rewards.count(None) / len(rewards)
    return metrics


def _scored_by_group(rewards: list[float | None], groups: list[int]) -> dict[int, list[float]]:
    """The rewards of each group that has a scored response."""
    if len(rewards) != len(groups):
        raise ValueError(f"groups must have one entry per reward ({len(rewards)}), but has {len(groups)}")
    scored: dict[int, list[float]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        if reward is not None:
            scored.setdefault(group, []).append(float(reward))
    return scored


def _soft_mean(rewards: list[float], beta: float) -> float:
    """beta log mean exp(r / beta)."""
    largest = max(rewards)
    return largest + beta * math.log(mean(math.exp((r - largest) / beta) for r in rewards))


def _deviation(rewards: list[float]) -> float:
    """The population deviation; exactly 0 if the rewards differ by rounding only."""
    if math.isclose(min(rewards), max(rewards), rel_tol=ROUNDING, abs_tol=ROUNDING):
        return 0.0
    return pstdev(rewards)
