"""Environments of the package gymnasium: observations as text, actions read from the completion."""

import math
import random
import re
from typing import Any

from reval.environments.protocol import EnvironmentFault, Message, short
from reval.user_code import find

_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


class Gymnasium:
    """An environment of gymnasium. The column `seed` seeds its reset; a column `options` is passed to reset.

    Observations: Text, Discrete, MultiDiscrete, MultiBinary and Box, and Tuple and Dict of these. Actions: Text (the
    whole completion), Discrete (the last number in the completion), MultiDiscrete, MultiBinary and Box (the last
    numbers, as many as the action has). A completion without a valid action is answered with what is allowed; it costs
    a turn, and the environment does not move.

    Args:
        id: a registered name ("FrozenLake-v1"), "module:name" with a module that registers it, or "file.py:Class".
        instruction: the beginning of the first message. Default: what the model may reply.
        options: arguments of the environment, and those of gymnasium.make if `id` is a registered name.

    Raises EnvironmentFault if gymnasium is not installed, or `id` is unknown or has other spaces.
    """

    def __init__(self, id: str, instruction: str | None = None, **options: Any):
        try:
            import gymnasium
        except ImportError:
            raise EnvironmentFault(
                "environment.name=gymnasium needs the package gymnasium: pip install gymnasium"
            ) from None
        if ".py:" in id:
            self._env = find(id, "gymnasium environment", [], EnvironmentFault)(**options)
        else:
            try:
                self._env = gymnasium.make(id, **options)
            except gymnasium.error.UnregisteredEnv as error:
                raise EnvironmentFault(f"environment.options.id={id!r} is unknown to gymnasium: {error}") from None
        self._spaces = gymnasium.spaces
        self._allowed = self._describe(self._env.action_space)
        self._check_observations(self._env.observation_space)
        self._instruction = self._allowed if instruction is None else instruction

    def reset(self, problem: dict[str, Any]) -> list[Message]:
        """The instruction and the first observation."""
        seed = problem.get("seed")
        if type(seed) is not int or seed < 0:
            raise EnvironmentFault(f"gymnasium needs a column 'seed', a whole number from 0; got {seed!r}")
        observation, _ = self._env.reset(seed=seed, options=problem.get("options"))
        text = self._text(self._env.observation_space, observation)
        return [{"role": "user", "content": f"{self._instruction}\n\n{text}"}]

    def step(self, completion: str) -> tuple[list[Message], float, bool]:
        """See Environment.step."""
        action = self._action(completion)
        if action is None:
            return [{"role": "user", "content": f"That is no action. {self._allowed}"}], 0.0, False
        observation, reward, terminated, truncated, _ = self._env.step(action)
        text = self._text(self._env.observation_space, observation)
        return [{"role": "user", "content": text}], reward, terminated or truncated

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    @staticmethod
    def problems(count: int, seed: int) -> list[dict[str, Any]]:
        """Rows with distinct seeds."""
        first = random.Random(seed).randrange(2**31 - count)
        return [{"prompt": f"seed {n}", "seed": n} for n in range(first, first + count)]

    def _describe(self, space: Any) -> str:
        """What the model may reply."""
        known = self._spaces
        if isinstance(space, known.Text):
            return f"Reply with a text of {space.min_length} to {space.max_length} characters."
        if isinstance(space, known.Discrete):
            return f"Reply with a number from {space.start} to {space.start + space.n - 1}."
        count = math.prod(space.shape or ())
        if isinstance(space, known.MultiDiscrete):
            ranges = [f"{a} to {a + n - 1}" for a, n in zip(space.start.flat, space.nvec.flat, strict=True)]
            return f"Reply with {count} numbers: {', '.join(ranges)}."
        if isinstance(space, known.MultiBinary):
            return f"Reply with {count} numbers that are 0 or 1."
        if isinstance(space, known.Box):
            ranges = [f"{a:.4g} to {b:.4g}" for a, b in zip(space.low.flat, space.high.flat, strict=True)]
            return f"Reply with {count} numbers: {', '.join(ranges)}."
        raise EnvironmentFault(
            f"gymnasium: the action space must be Text, Discrete, MultiDiscrete, MultiBinary or Box; got {short(space)}"
        )

    def _action(self, completion: str) -> Any:
        """The action in the completion. None if there is none that the action space allows."""
        space, known = self._env.action_space, self._spaces
        if isinstance(space, known.Text):
            texts = (completion, completion.strip())
            return next((text for text in texts if space.contains(text)), None)
        import numpy

        count = math.prod(space.shape)
        numbers = numpy.array([float(number) for number in _NUMBER.findall(completion)][-count:])
        if len(numbers) < count or not numpy.isfinite(numbers).all():
            return None
        with numpy.errstate(invalid="ignore"):  # a number that the type cannot hold is found below
            action = numbers.astype(space.dtype)
        if numpy.issubdtype(space.dtype, numpy.integer) and (action != numbers).any():
            return None
        action = action.reshape(space.shape)[()]
        return action if space.contains(action) else None

    def _check_observations(self, space: Any) -> None:
        known = self._spaces
        if isinstance(space, known.Tuple | known.Dict):
            inner = space.spaces.values() if isinstance(space, known.Dict) else space.spaces
            for part in inner:
                self._check_observations(part)
        elif not isinstance(space, known.Text | known.Discrete | known.MultiDiscrete | known.MultiBinary | known.Box):
            raise EnvironmentFault(
                "gymnasium: observations must be Text, Discrete, MultiDiscrete, MultiBinary or Box, or Tuple or Dict "
                f"of these; got {short(space)}"
            )

    def _text(self, space: Any, value: Any) -> str:
        known = self._spaces
        if isinstance(space, known.Dict):
            return "\n".join(f"{key}: {self._text(part, value[key])}" for key, part in space.spaces.items())
        if isinstance(space, known.Tuple):
            return ", ".join(self._text(part, one) for part, one in zip(space.spaces, value, strict=True))
        return value if isinstance(space, known.Text) else _numbers(value)


def _numbers(value: Any) -> str:
    """A number, or an array as nested lists. Fractions have four digits."""
    value = getattr(value, "tolist", lambda: value)()
    if isinstance(value, list):
        return "[" + ", ".join(map(_numbers, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
