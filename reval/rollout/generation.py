"""Generation: which problems come next, and the rollout engine's responses to them.

With rollout.ahead=n the responses are requested n iterations before they are used. Each process generates for its share
of the problems.
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
from .actor import Actor
from .protocol import Episode, Response, RolloutEngine


class Rollouts(NamedTuple):
    """The responses of one iteration that this process generated."""

    problems: list[Problem]
    """The problems of all processes."""
    own: list[list[Response]]
    """The responses to each problem of this process's share, `world.share(problems)`."""
    lag: int
    """Age of the weights that generated the responses: the number of iterations between their sync and this iteration.
    Example: weights synced after iteration 4 have lag 0 in iteration 5 and lag 1 in iteration 6."""


class _Request(NamedTuple):
    problems: list[Problem]
    responses: Future[list[list[Response]]]
    synced: int
    """The iteration after which the engine got the weights that generate these responses."""


class ProblemSampler:
    """Draws problems in shuffled epochs without end: each epoch contains every problem once."""

    def __init__(self, problems: list[Problem], seed: int):
        self.problems, self.seed = problems, seed
        self.drawn = 0
        """Problems drawn so far. Seed and `drawn` determine all further draws."""

    def draw(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        out: list[Problem] = []
        while len(out) < count:
            epoch, position = divmod(self.drawn, len(self.problems))
            taken = self._order(epoch)[position : position + count - len(out)]
            out += [self.problems[i] for i in taken]
            self.drawn += len(taken)
        return out

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.problems)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


class Generation:
    """Gives the responses of one iteration after another.

    With rollout.ahead a thread generates the responses of later iterations while the policy trains.
    """

    def __init__(self, engine: RolloutEngine, actor: Actor, problems: ProblemSampler, config: Config, world: World):
        self._engine, self._actor, self._problems, self._config, self._world = engine, actor, problems, config, world
        self._pending: deque[_Request] = deque()
        """The requests for the next iterations, in order."""
        self._synced = 0
        """The iteration after which the engine last got the policy's weights."""
        self._thread = ThreadPoolExecutor(1)

    def next(self, iteration: int) -> Rollouts:
        """The responses for this iteration. Waits until they are complete."""
        # Example with ahead=2: iteration 1 requests the responses of 1, 2 and 3; iteration 2 requests those of 4.
        for later in range(iteration + len(self._pending), iteration + self._config.rollout.ahead + 1):
            if later <= self._config.run.iterations:
                self._request(later)
        request = self._pending.popleft()
        return Rollouts(request.problems, request.responses.result(), iteration - 1 - request.synced)

    def _request(self, iteration: int) -> None:
        """Draw the problems of an iteration and ask the engine for responses."""
        settings, problems = self._config.rollout, self._problems.draw(self._config.rollout.prompts)
        own = self._world.share(problems)
        options: Any = {
            "responses": settings.responses,
            "temperature": settings.temperature,
            # a seed for each iteration and each process, so that no two of them sample with the same noise
            "seed": (self._config.run.seed << 32) + iteration + (self._world.rank << 52),
        }
        if settings.ahead:
            responses = self._thread.submit(self._actor.respond, own, **options)
        else:
            responses = Future()
            responses.set_result(self._actor.respond(own, **options))
        self._pending.append(_Request(problems, responses, self._synced))

    def sync(self, weights: Iterable[tuple[str, Tensor]], iteration: int) -> None:
        """Wait until the engine has finished all pending requests. Then give it the policy's weights of `iteration`."""
        for request in self._pending:
            request.responses.result()
        if not self._engine.shares_weights:
            self._engine.sync(weights)
        self._synced = iteration

    def close(self) -> None:
        """Cancel the waiting requests, wait for the running request, and end the thread."""
        self._thread.shutdown(cancel_futures=True)

    def state(self) -> dict[str, Any]:
        """The responses that are generated but not used yet, for a checkpoint. Every process has to call this."""
        ahead = [(r.synced, self._world.join(r.responses.result())) for r in self._pending]
        rows = [[[_saved(r) for r in group] for group in groups] for _, groups in ahead]
        return {"synced": self._synced, "requests": [[s, g] for (s, _), g in zip(ahead, rows, strict=True)]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which `state()` returned.

        Restore `ProblemSampler.drawn` first. It counts the problems up to those of the last request.
        """
        self._synced, count = state["synced"], self._config.rollout.prompts
        # A state holds no problems. The sampler goes back and draws the same problems again.
        self._problems.drawn -= count * len(state["requests"])
        if not self._config.generates:
            return  # there are no problems, and nothing would use the responses
        for synced, groups in state["requests"]:
            responses: Future[list[list[Response]]] = Future()
            responses.set_result([[_loaded(*saved) for saved in group] for group in self._world.share(groups)])
            self._pending.append(_Request(self._problems.draw(count), responses, synced))


def _saved(response: Response) -> list[Any]:
    """A response as JSON has it."""
    return [response.token_ids, response.finished, *(response.episode or ())]


def _loaded(token_ids: list[int], finished: bool, *episode: Any) -> Response:
    return Response(token_ids, finished, Episode(*episode) if episode else None)
