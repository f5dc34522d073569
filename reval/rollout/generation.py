"""Asking the rollout engine for responses, perhaps some iterations ahead of training.

Each process generates for its share of the problems.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from torch import Tensor

from ..config import Config
from ..data import Problem
from ..distributed import World
from . import Response, RolloutEngine


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


class ProblemSampler:
    """An endless walk over the problems in shuffled epochs; every problem comes once an epoch."""

    def __init__(self, problems: list[Problem], seed: int):
        self.problems, self.seed = problems, seed
        self.drawn = 0

    def draw(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        out: list[Problem] = []
        while len(out) < count:
            epoch, place = divmod(self.drawn, len(self.problems))
            taken = self._order(epoch)[place : place + count - len(out)]
            out += [self.problems[i] for i in taken]
            self.drawn += len(taken)
        return out

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.problems)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


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
