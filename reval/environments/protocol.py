"""The protocol of an environment, and `resolve`, which finds one by the name in environment.name."""

import importlib
import math
import reprlib
from collections.abc import Callable
from typing import Any, Protocol

from reval.user_code import find

Message = dict[str, Any]
"""A chat message: {"role": ..., "content": ...} and further keys that the chat template may read."""

BUILT_IN = {
    "calculator": "reval.environments.calculator:Calculator",
    "guessing": "reval.environments.guessing:Guessing",
    "gymnasium": "reval.environments.gymnasium:Gymnasium",
    "openenv": "reval.environments.openenv:OpenEnv",
    "trl": "reval.environments.trl:Trl",
}
"""Environments of this package, by the name that environment.name may have."""

FIRST_ROLES = ("system", "developer", "user", "assistant", "tool")
LATER_ROLES = ("system", "developer", "user", "tool")  # the assistant's messages are the model's own


class EnvironmentFault(ValueError):
    """The environment cannot be found or loaded, or it returned something that is no step."""


class Environment(Protocol):
    """The other side of one conversation. Each trajectory has an environment of its own.

    A class satisfies the protocol without importing it. Its constructor gets environment.options as arguments. It may
    also have

    - `close()`: called when the conversation has ended, unless the process was killed.
    - `problems(count, seed, **options)`, a static method: the rows of data.source=environment, with data.options.

    `reset` and `step` must depend on their arguments alone: when a worker process was killed, the environments that it
    held are made again, and get the same completions again.
    """

    def reset(self, problem: dict[str, Any]) -> list[Message]:
        """The messages that the conversation starts with. They become the prompt of the model.

        Args:
            problem: the columns of the row in the data set, and `prompt`, its text or chat messages.
        """
        ...

    def step(self, completion: str) -> tuple[list[Message], float, bool]:
        """Answer a completion.

        Returns (messages, reward, done): the messages that come next in the conversation, the reward of this step, and
        whether the conversation has ended. The reward of the trajectory is the sum over its steps. Messages of the last
        step are not used.
        """
        ...


def question(problem: dict[str, Any]) -> str:
    """The text of the problem's prompt. For chat messages: the content of the last user message."""
    prompt = problem["prompt"]
    if isinstance(prompt, str):
        return prompt
    return str(next(message["content"] for message in reversed(prompt) if message["role"] == "user"))


def resolve(spec: str) -> Callable[..., Environment]:
    """The class of an environment: a name in BUILT_IN, "package.module:Class" or "path/to/file.py:Class".

    Raises EnvironmentFault if there is no such class. An error inside your module or file is raised unchanged.
    """
    if spec in BUILT_IN:
        module, _, name = BUILT_IN[spec].partition(":")
        return getattr(importlib.import_module(module), name)
    return find(spec, "environment", BUILT_IN, EnvironmentFault)


def checked_messages(messages: Any, what: str, *, first: bool, empty: bool = False) -> list[Message]:
    """The messages. EnvironmentFault unless they are a list of chat messages.

    Args:
        what: the method that returned them, for the error message.
        first: these messages start the conversation, so the last one may be the beginning of the assistant's answer.
        empty: there may be no message.
    """
    roles = FIRST_ROLES if first else LATER_ROLES
    if not isinstance(messages, list) or not (messages or empty):
        at_least = "" if empty else " with at least one message"
        raise EnvironmentFault(f"{what} must return a list of chat messages{at_least}, but returned {short(messages)}")
    for message in messages:
        ok = isinstance(message, dict) and message.get("role") in roles and isinstance(message.get("content"), str)
        if not ok:
            raise EnvironmentFault(
                f'{what} must return messages {{"role": ..., "content": text}} with a role of {", ".join(roles)}, but '
                f"returned {short(message)}"
            )
    return messages


def checked_step(result: Any) -> tuple[list[Message], float, bool]:
    """What `step` returned. EnvironmentFault unless it is (messages, reward, done)."""
    if not isinstance(result, tuple | list) or len(result) != 3:
        raise EnvironmentFault(f"step must return (messages, reward, done), but returned {short(result)}")
    messages, reward, done = result
    try:
        # Text is refused here, because float() would accept the text "1.0".
        number = math.nan if isinstance(reward, str | bytes) else float(reward)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise EnvironmentFault(f"step must return a finite number as reward, but returned {short(reward)}")
    try:
        ended = bool(done)  # numpy has booleans of its own
    except (TypeError, ValueError):
        raise EnvironmentFault(f"step must return true or false as done, but returned {short(done)}") from None
    return checked_messages(messages, "step", first=False, empty=ended), number, ended


def short(value: Any) -> str:
    """A value as text for an error message."""
    return f"{type(value).__name__}: {reprlib.repr(value)}"
