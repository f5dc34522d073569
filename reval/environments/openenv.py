"""Environments of OpenEnv: a server plays, the completion is sent to it as an action."""

import json
import random
from typing import Any

from reval.environments.protocol import EnvironmentFault, Message


class OpenEnv:
    """A session with a server of OpenEnv. The columns of the row, without `prompt`, are the arguments of its reset.

    An action that is no JSON object, or that the server refuses, is answered with the error. It costs a turn.

    Args:
        url: the address of the server, "http://HOST:PORT". It must allow as many sessions as there are trajectories.
        action: the field of the action that gets the completion as text. None: the completion is the action, a JSON
            object.
        observation: the field of the observation that the model reads. None: all fields, as JSON.
        instruction: the beginning of the first message.
        timeout: maximum number of seconds for an answer of the server.

    Raises EnvironmentFault if openenv-core is not installed.
    """

    def __init__(
        self,
        url: str,
        action: str | None = None,
        observation: str | None = None,
        instruction: str = "",
        timeout: float = 60.0,
    ):
        try:
            from openenv.core import GenericEnvClient
        except ImportError as error:
            raise EnvironmentFault(
                f"environment.name=openenv needs the package openenv-core: pip install openenv-core ({error})"
            ) from None
        self._client = GenericEnvClient(url, message_timeout_s=timeout).sync()
        self._url, self._action, self._observation, self._instruction = url, action, observation, instruction

    def reset(self, problem: dict[str, Any]) -> list[Message]:
        """The instruction and the first observation."""
        try:
            self._client.connect()
        except OSError as error:
            raise EnvironmentFault(f"environment.options.url={self._url!r} gives no answer: {error}") from None
        result = self._client.reset(**{key: value for key, value in problem.items() if key != "prompt"})
        text = f"{self._instruction}\n\n{self._text(result.observation)}".strip()
        return [{"role": "user", "content": text}]

    def step(self, completion: str) -> tuple[list[Message], float, bool]:
        """See Environment.step. A server that gives no reward gives 0."""
        try:
            action = {self._action: completion} if self._action is not None else json.loads(completion)
            if not isinstance(action, dict):
                raise ValueError("the action must be a JSON object")
            result = self._client.step(action)
        except (ValueError, RuntimeError) as error:  # RuntimeError: the server's answer is an error
            return [{"role": "user", "content": f"error: {error}"}], 0.0, False
        return [{"role": "user", "content": self._text(result.observation)}], result.reward or 0.0, result.done

    def close(self) -> None:
        """End the session."""
        self._client.close()

    @staticmethod
    def problems(count: int, seed: int) -> list[dict[str, Any]]:
        """Rows with distinct seeds."""
        first = random.Random(seed).randrange(2**31 - count)
        return [{"prompt": f"seed {n}", "seed": n} for n in range(first, first + count)]

    def _text(self, observation: dict[str, Any]) -> str:
        if self._observation is None:
            return json.dumps(observation, ensure_ascii=False)
        if self._observation not in observation:
            raise EnvironmentFault(
                f"environment.options.observation={self._observation!r} must be one of {', '.join(observation)}"
            )
        return str(observation[self._observation])
