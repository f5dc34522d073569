"""From problems to scored trajectories: asking for responses, perhaps some iterations ahead, and scoring them.

Each process generates and scores for its share of the problems; then all of them hold all trajectories.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .components import Components
from .config import Config
from .data import Problem, ProblemSampler
from .distributed import World
from .evaluation.answering import decode, score
from .replay import Trajectory
from .rewards import RewardError, reward_metrics, shape_rewards
from .rollout import Response, RolloutEngine
from .tracking import Tracker


class Rollouts(NamedTuple):
    """This process's responses of one iteration."""

    problems: list[Problem]
    """Of all processes."""
    own: list[list[Response]]
    """Responses to this process's share of the problems."""
    lag: int
    """Iterations of training that the weights which answered had missed when the responses came to be used."""


class _Request(NamedTuple):
    problems: list[Problem]
    answers: Future[list[list[Response]]]
    synced: int
    """The iteration after which the engine got the weights that answer."""


class Generation:
    """Responses for one iteration after the other. With `rollout.ahead` they are asked for that many iterations before
    they are used, and generated in a thread while training goes on."""

    def __init__(self, engine: RolloutEngine, problems: ProblemSampler, config: Config, world: World):
        self._engine, self._problems, self._config, self._world = engine, problems, config, world
        self._pending: deque[_Request] = deque()
        self._synced = 0
        self._thread = ThreadPoolExecutor(1)

    def next(self, iteration: int) -> Rollouts:
        """The responses for this iteration."""
        for wanted in range(iteration + len(self._pending), iteration + self._config.rollout.ahead + 1):
            if wanted <= self._config.run.iterations:
                self._ask(wanted)
        request = self._pending.popleft()
        return Rollouts(request.problems, request.answers.result(), iteration - 1 - request.synced)

    def _ask(self, iteration: int) -> None:
        settings, problems = self._config.rollout, self._problems.draw(self._config.rollout.prompts)
        own = [p.token_ids for p in self._world.share(problems)]
        options: Any = {
            "responses": settings.responses,
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "seed": (self._config.run.seed << 32) + iteration + (self._world.rank << 52),
        }
        if settings.ahead:
            answers = self._thread.submit(self._engine.generate, own, **options)
        else:
            answers = Future()
            answers.set_result(self._engine.generate(own, **options))
        self._pending.append(_Request(problems, answers, self._synced))

    def sync(self, weights: Iterable[tuple[str, Tensor]], iteration: int) -> None:
        """Hand the engine the weights as they are after this iteration, once what it is doing is done."""
        for request in self._pending:
            request.answers.result()
        if not self._engine.shares_weights:
            self._engine.sync(weights)
        self._synced = iteration

    def close(self) -> None:
        """Wait for what is being generated, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def state(self) -> dict[str, Any]:
        """What has been generated and not used, for a checkpoint. Every process has to call this."""
        ahead = [(r.synced, self._world.join(r.answers.result())) for r in self._pending]
        rows = [[[[r.token_ids, r.finished] for r in group] for group in groups] for _, groups in ahead]
        return {"synced": self._synced, "requests": [[s, g] for (s, _), g in zip(ahead, rows, strict=True)]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned; the problem sampler stands behind the last request."""
        self._synced, count = state["synced"], self._config.rollout.prompts
        self._problems.drawn -= count * len(state["requests"])
        for synced, groups in state["requests"]:
            answers: Future[list[list[Response]]] = Future()
            answers.set_result([[Response(ids, done) for ids, done in group] for group in self._world.share(groups)])
            self._pending.append(_Request(self._problems.draw(count), answers, synced))


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
