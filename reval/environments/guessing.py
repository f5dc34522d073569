"""A guessing game: find a secret digit in a few guesses. A random model can learn it from nothing."""

import random
from typing import Any

from reval.environments.protocol import EnvironmentFault, Message


class Guessing:
    """The model guesses a digit, and is told whether the secret is higher or lower, until it has found the secret.

    The first character of a completion is the guess. With `guesses` = 4 a player who halves the range finds each of the
    ten digits.

    Args:
        guesses: number of guesses.
        bonus: reward for a right guess, in addition to 1, for each guess that is left.
    """

    def __init__(self, guesses: int = 4, bonus: float = 0.0):
        self._guesses, self._bonus = guesses, bonus
        self._secret = self._made = 0

    def reset(self, problem: dict[str, Any]) -> list[Message]:
        """Start with the secret in the column `secret`: a whole number from 0 to 9."""
        secret = problem.get("secret")
        if type(secret) is not int or not 0 <= secret <= 9:
            raise EnvironmentFault(f"the game needs a column 'secret', a digit from 0 to 9; got {secret!r}")
        self._secret, self._made = secret, 0
        return [{"role": "user", "content": "guess"}]

    def step(self, completion: str) -> tuple[list[Message], float, bool]:
        """See Environment.step. What is no digit costs a guess and teaches nothing."""
        self._made += 1
        guess = completion.strip()[:1]
        known = guess.isascii() and guess.isdigit()
        if known and int(guess) == self._secret:
            return [], 1.0 + self._bonus * (self._guesses - self._made), True
        word = "no" if not known else "up" if int(guess) < self._secret else "down"
        return [{"role": "user", "content": word}], 0.0, self._made == self._guesses

    @staticmethod
    def problems(count: int, seed: int) -> list[dict[str, Any]]:
        """Rows with secrets. `number` tells rows with equal secrets apart."""
        draw = random.Random(seed)
        return [{"prompt": f"game {i}", "secret": draw.randrange(10), "number": i} for i in range(count)]
