"""Runs environments in worker processes, which can be killed (workers.py).

An environment has a state, so it stays in the worker that made it. If this worker is killed, because another
environment in it hung, the environment is made again in another worker: `reset` and all steps so far are repeated. So
an environment that hangs costs only its own trajectory. `_load` and the functions below it run in the worker processes.
"""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from reval.environments.protocol import (
    Environment,
    EnvironmentFault,
    Message,
    checked_messages,
    checked_step,
    resolve,
    short,
)
from reval.workers import Run, Task, Worker, Workers


@dataclass(slots=True, eq=False)
class Conversation:
    """One environment and what was said so far."""

    problem: dict[str, Any]
    """The argument of `reset`."""
    observations: list[list[Message]] = field(default_factory=list)
    """What `reset` and then each step returned."""
    completions: list[str] = field(default_factory=list)
    """What the model said. The next step answers the last completion."""
    reward: float = 0.0
    """The sum over the steps."""
    done: bool = False
    """The environment has ended the conversation."""
    error: str = ""
    """Why the conversation cannot go on: the environment raised, returned no step, or its process died."""
    timed_out: bool = False
    """The environment took longer than environment.timeout."""

    @property
    def lost(self) -> bool:
        """The environment has failed, so the trajectory has no reward."""
        return self.timed_out or bool(self.error)


class EnvironmentPool:
    """Worker processes in which environments run.

    Args:
        spec: a name that `resolve` takes.
        options: arguments of the environment's constructor.
        workers: number of processes, at least 1.
        timeout: maximum number of seconds for one `reset` or `step`.

    Raises EnvironmentFault if the class cannot be found, loaded or made. Use a pool from one thread at a time.
    """

    def __init__(self, spec: str, options: dict[str, Any], *, workers: int = 2, timeout: float = 10.0):
        load = partial(_load, options)
        name = f"environment {spec!r}"
        self._workers = Workers(load, spec, name, count=workers, timeout=timeout, error=EnvironmentFault)
        self._homes: dict[int, Worker] = {}
        """The worker that holds the environment of each conversation, by id(conversation)."""
        self._rounds = itertools.count()
        self._round = 0

    def start(self) -> None:
        """Forget all environments. The next `advance` begins new conversations."""
        self._homes, self._round = {}, next(self._rounds)

    def advance(self, conversations: list[Conversation]) -> None:
        """Reset the environments of new conversations; let the others answer the last completion.

        A failure of the environment is recorded in the conversation. All conversations since `start` must be alive.
        """
        self._workers.do(_Job(conversations, self._homes, self._round))

    def close(self) -> None:
        """Kill the workers. A second call does nothing."""
        self._workers.close()

    def __enter__(self) -> "EnvironmentPool":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Job:
    """One call to `advance`. The ticket of a task is its conversation."""

    def __init__(self, conversations: list[Conversation], homes: dict[int, Worker], number: int):
        self._queue, self._homes, self._round = list(conversations), homes, number

    def waiting(self) -> bool:
        """See Job.waiting."""
        return bool(self._queue)

    def take(self, worker: Worker) -> Task | None:
        """See Job.take. A worker first takes the environments that it holds, then those that no worker holds."""

        def held(conversation: Conversation) -> bool:
            return self._homes.get(id(conversation)) is worker

        def free(conversation: Conversation) -> bool:
            home = self._homes.get(id(conversation))
            return home is None or home.discarded

        for suits in (held, free):
            for place, conversation in enumerate(self._queue):
                if suits(conversation):
                    del self._queue[place]
                    return self._task(conversation, at_home=suits is held)
        return None

    def _task(self, conversation: Conversation, at_home: bool) -> Task:
        done = len(conversation.completions)
        # A worker that holds the environment needs only the last completion. Any other repeats the whole conversation,
        # and compares the answers with those that the model has seen.
        said = conversation.completions[-1:] if at_home else conversation.completions
        seen = None if at_home else conversation.observations
        message = (self._round, id(conversation), conversation.problem, said, seen)
        return Task(conversation, message, steps=1 if at_home else 1 + done)

    def record(self, ticket: Conversation, worker: Worker, kind: str, value: Any) -> None:
        """See Job.record."""
        if kind == "late":
            ticket.timed_out = True
        elif kind != "step":
            ticket.error = f"{_where(ticket)}: {value}"
        else:
            messages, reward, ticket.done = value
            ticket.observations.append(messages)
            ticket.reward += reward
            self._homes[id(ticket)] = worker


def _where(conversation: Conversation) -> str:
    """What the environment was doing, for the text of an error."""
    count = len(conversation.completions)
    if not count:
        return f"reset({short(conversation.problem)})"
    return f"step {count}, on the completion {conversation.completions[-1]!r:.200}"


# The functions below run in the worker process.


def _load(options: dict[str, Any], spec: str) -> tuple[None, Run]:
    """The environment's class, ready to make environments. See workers.Load."""
    make = resolve(spec)
    try:
        _close(make(**options))  # wrong options show here, before the first rollout
    except TypeError as error:
        raise EnvironmentFault(
            f"environment {spec!r} cannot be made with environment.options={options}: {error}"
        ) from error
    return None, _Held(partial(make, **options))


class _Held:
    """The environments in this process. A call does one task."""

    def __init__(self, make: Callable[[], Environment]):
        self._make = make
        self._round = -1
        self._environments: dict[int, Environment] = {}

    def __call__(self, message: Any) -> tuple[str, Any]:
        number, key, problem, completions, seen = message
        if number != self._round:  # the trainer has begun new conversations
            for environment in self._environments.values():
                _close(environment)
            self._environments, self._round = {}, number
        try:
            if seen is None:
                return "step", self._ended(key, checked_step(self._environments[key].step(completions[0])))
            return "step", self._ended(key, self._repeat(key, problem, completions, seen))
        except EnvironmentFault as error:
            return "fault", str(error)

    def _repeat(
        self, key: int, problem: dict[str, Any], completions: list[str], seen: list[list[Message]]
    ) -> tuple[list[Message], float, bool]:
        """Make the environment and take all steps. `seen` are the observations that the model has had."""
        environment = self._environments[key] = self._make()
        result = checked_messages(environment.reset(problem), "reset", first=True), 0.0, False
        for number, completion in enumerate(completions):
            if result[0] != seen[number]:
                raise EnvironmentFault(
                    "its process was ended and the environment was made again, but it then gave other messages than "
                    f"before: {short(result[0])} instead of {short(seen[number])}"
                )
            result = checked_step(environment.step(completion))
        return result

    def _ended(self, key: int, result: tuple[list[Message], float, bool]) -> tuple[list[Message], float, bool]:
        """The result. An environment that has ended the conversation is forgotten."""
        if result[2]:
            _close(self._environments.pop(key))
        return result


def _close(environment: Environment) -> None:
    close = getattr(environment, "close", None)
    if close is not None:
        with contextlib.suppress(Exception):  # the conversation has ended, so nothing depends on it
            close()
