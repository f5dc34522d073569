"""From responses to scored trajectories: decode, score in the pool, shape the rewards.

Each process scores its share; then all of them hold all trajectories.
"""

from __future__ import annotations

import difflib
from statistics import mean, pstdev
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from .components import Components
from .config import Config
from .data import Problem
from .replay import Trajectory
from .rewards import RewardError, RewardPool, Scores
from .rollout import Response
from .rollout.generation import Rollouts

if TYPE_CHECKING:
    from .tracking import Tracker

SHAPINGS = ("plain", "centered", "normalized", "plus_minus_one")


def scored(
    config: Config, components: Components, rollouts: Rollouts, iteration: int, tracker: Tracker
) -> tuple[list[Trajectory], dict[str, float]]:
    """Trajectories of all responses that could be scored, rewards shaped, and the metrics of the whole."""
    world = components.world
    own = [(p, r) for p, rs in zip(world.share(rollouts.problems), rollouts.own, strict=True) for r in rs]
    texts = decode([r for _, r in own], components.tokenizer)
    failure, timeouts, errors, first_error = "", 0, 0, None
    rewards: list[float | None] = [None] * len(own)
    try:
        scores = score([p for p, _ in own], texts, [r.token_ids for _, r in own], components.reward_pool)
        rewards, timeouts, errors, first_error = scores.rewards, scores.timeouts, scores.errors, scores.first_error
    except RewardError as error:
        failure = str(error)
    reports = world.gather((failure, timeouts, errors, first_error))
    for message, *_ in reports:
        if message:
            raise RewardError(message)
    n = config.rollout.responses
    rows = [(r, text, reward) for (_, r), text, reward in zip(own, texts, rewards, strict=True)]
    groups = world.join([rows[i : i + n] for i in range(0, len(rows), n)])
    flat = [(g, p, *row) for g, (p, group) in enumerate(zip(rollouts.problems, groups, strict=True)) for row in group]
    tracker.samples(iteration, [(p.prompt, text, reward) for _, p, _, text, reward in flat])
    for *_, exception in reports:
        if exception:
            tracker.reward_error(iteration, exception)
    return _trajectories(config, flat, iteration), _metrics(flat, rollouts.lag) | {
        "reward_timeouts": sum(r[1] for r in reports),
        "reward_errors": sum(r[2] for r in reports),
    }


Row = tuple[int, Problem, Response, str, float | None]
"""The number of a response's prompt, the problem, the response, its text and its raw reward."""


def _trajectories(config: Config, rows: list[Row], iteration: int) -> list[Trajectory]:
    raw = [row[4] for row in rows]
    try:
        shaped = shape_rewards(raw, [row[0] for row in rows], config.reward.shaping)
    except ValueError as error:
        raise RewardError(f"reward.shaping={config.reward.shaping}: {error}") from error
    return [
        Trajectory(
            token_ids=np.array(p.token_ids + r.token_ids),
            action_mask=np.arange(len(p.token_ids) + len(r.token_ids)) >= len(p.token_ids),
            reward=reward,
            score=unshaped,
            iteration=iteration,
            finished=r.finished,
        )
        for (_, p, r, _, unshaped), reward in zip(rows, shaped, strict=True)
        if reward is not None and unshaped is not None
    ]


def _metrics(rows: list[Row], lag: int) -> dict[str, float]:
    lengths = [len(row[2].token_ids) for row in rows]
    return reward_metrics([row[4] for row in rows], [row[0] for row in rows]) | {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(not row[2].finished for row in rows) / len(rows),
        "num_tokens": sum(lengths),
        "rollout/lag": lag,
    }


def decode(responses: list[Response], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What the reward function and people read; training uses the token ids."""
    ids = [r.token_ids for r in responses]
    return tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []  # it makes one text of no ids


def score(problems: list[Problem], texts: list[str], token_ids: list[list[int]], pool: RewardPool) -> Scores:
    """Scores of one completion for each of the problems (a problem may come several times)."""
    names = sorted({name for p in problems for name in p.columns})
    columns = {name: [p.columns.get(name) for p in problems] for name in names}
    return pool.score([p.prompt for p in problems], texts, token_ids, columns)


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
