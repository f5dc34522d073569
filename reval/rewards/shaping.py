"""From raw rewards to the rewards in the loss: pure functions on plain lists.

`rewards` has one entry per response, None for one that could not be scored. `groups` has the group of each response:
any integer, the same for all responses to one prompt.
"""

import difflib
from statistics import mean, pstdev

SHAPINGS = ("plain", "centered", "normalized", "plus_minus_one")


def shape_rewards(rewards: list[float | None], groups: list[int], how: str) -> list[float | None]:
    """Shape rewards for the loss; a None stays None.

    Args:
        rewards: raw rewards, one per response.
        groups: group of each response, as long as `rewards`.
        how: "plain": r. "centered": r minus the mean of the scored responses of its group (no division by the
            deviation, so the only scored response of a group gets 0). "normalized": that, divided by the population
            deviation of the group's scored responses; 0 where all are alike. "plus_minus_one": 2r - 1, for r in 0..1.

    Raises:
        ValueError: unknown `how`; lengths differ; a reward outside 0..1 with "plus_minus_one".
    """
    if how not in SHAPINGS:
        near = difflib.get_close_matches(str(how), SHAPINGS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"how must be one of {', '.join(SHAPINGS)}, but is {how!r}{hint}")
    scored = _scored_by_group(rewards, groups)
    if how == "plain":
        return list(rewards)
    if how == "centered":
        means = {group: mean(values) for group, values in scored.items()}
        return [None if r is None else r - means[g] for r, g in zip(rewards, groups, strict=True)]
    if how == "normalized":
        scale = {group: (mean(values), pstdev(values) or 1.0) for group, values in scored.items()}
        return [None if r is None else (r - scale[g][0]) / scale[g][1] for r, g in zip(rewards, groups, strict=True)]
    for index, r in enumerate(rewards):
        if r is not None and not 0.0 <= r <= 1.0:
            raise ValueError(
                f"how='plus_minus_one' expects rewards in 0..1, but rewards[{index}] is {r}; use 'plain' or 'centered'"
            )
    return [None if r is None else 2.0 * r - 1.0 for r in rewards]


def reward_metrics(rewards: list[float | None], groups: list[int]) -> dict[str, float]:
    """Summarise raw rewards for the log; a key whose value would be 0/0 is left out.

    Returns:
        `reward`: mean over the scored responses. `reward_std`: mean over the groups of the population deviation of
        their scored responses. `frac_reward_zero_std`: share of groups whose scored responses all have one reward,
        as in a group of one. `reward_unscored`: share of responses without a score. A group without a scored
        response is in none of the first three.

    Raises:
        ValueError: lengths differ.
    """
    metrics: dict[str, float] = {}
    scored = _scored_by_group(rewards, groups)
    if scored:
        deviations = [pstdev(values) for values in scored.values()]
        metrics["reward"] = mean(r for r in rewards if r is not None)
        metrics["reward_std"] = mean(deviations)
        metrics["frac_reward_zero_std"] = deviations.count(0.0) / len(deviations)
    if rewards:
        metrics["reward_unscored"] = rewards.count(None) / len(rewards)
    return metrics


def _scored_by_group(rewards: list[float | None], groups: list[int]) -> dict[int, list[float]]:
    """The scored rewards of each group that has any.

    `statistics` sums exactly, so equal rewards have exactly their value as mean and exactly 0 as deviation; with a
    float sum, three rewards of 0.1 would leave 1e-17 behind and a group without signal would count as one with signal.
    """
    if len(rewards) != len(groups):
        raise ValueError(f"groups must have one entry per reward ({len(rewards)}), but has {len(groups)}")
    scored: dict[int, list[float]] = {}
    for reward, group in zip(rewards, groups, strict=True):
        if reward is not None:
            scored.setdefault(group, []).append(float(reward))
    return scored
