"""Environments as TRL's GRPOTrainer(environment_factory=...) takes them. Workers load this file by its path."""


class Counter:
    """A number that the model must bring to the target."""

    def reset(self, target=3, told="", **row):
        self.value, self.target, self.row = 0, target, row
        return told or None

    def add(self, amount: int, times: int = 1) -> int:
        """Add to the number.

        Args:
            amount: What to add.
            times: How often.

        Returns:
            The number, for example "5".
        """
        self.value += amount * times
        if self.value > 100:
            raise OverflowError("too large")
        return self.value

    async def look(self) -> dict:
        """Tell the number."""
        return {"number": self.value}

    def get_reward(self):
        return float(self.value == self.target)

    def _hidden(self):
        raise AssertionError


class Unrewarded:
    """Has no tools, and leaves the reward to a function."""

    def reset(self, **row):
        return None


class Undescribed(Counter):
    """A tool without type hints."""

    def jump(self, height):
        """Jump."""


class NoReset:
    """Cannot begin."""

    def get_reward(self):
        return 1.0


class Lists(Unrewarded):
    """Its reset returns content blocks."""

    def reset(self, **row):
        return [{"type": "text", "text": "?"}]

    def get_reward(self):
        return 1.0


def length(prompts, completions, environments, bonus, log_metric, log_extra, **columns):
    """One for each message of the completion, and the bonus of the row."""
    log_metric("length", 1.0)
    log_extra("length", [1.0])
    assert len(prompts) == len(completions) == len(environments) == len(bonus) == 1
    assert prompts[0][-1]["role"] == "user" and columns["other"] == ["x"]
    return [len(completions[0]) + bonus[0]]


async def nothing(**columns):
    """No score."""
    return [None]


def endless(**columns):
    """No number."""
    return [float("nan")]
