"""Environments of gymnasium with every space that the adapter knows. Workers load this file by its path."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Echo(gymnasium.Env):
    """Observes the last action, as text, and the seeded random digit. "end" terminates, "late" truncates."""

    observation_space = spaces.Text(20)
    action_space = spaces.Text(max_length=8, charset="abcdefghijklmnopqrstuvwxyz ")

    def __init__(self, reward=1.0):
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"digit {self.np_random.integers(10)} {options}", {}

    def step(self, action):
        return f"<{action}>", self.reward, action == "end", action == "late", {}


class Numbers(gymnasium.Env):
    """Observes the last action. `kind` names the action space."""

    def __init__(self, kind="Discrete"):
        self.action_space = {
            "Discrete": spaces.Discrete(3, start=-1),
            "MultiDiscrete": spaces.MultiDiscrete([3, 4]),
            "MultiBinary": spaces.MultiBinary(2),
            "Box": spaces.Box(-1.0, 2.0, (2,)),
            "Sequence": spaces.Sequence(spaces.Discrete(2)),
        }[kind]
        self.observation_space = spaces.Dict(
            {"pair": spaces.Tuple([spaces.Discrete(9), spaces.Text(9)]), "box": spaces.Box(-9, 9, (2, 2))}
        )
        if kind == "Sequence":
            self.observation_space = self.action_space

    def reset(self, *, seed=None, options=None):
        return self._see("start"), {}

    def step(self, action):
        self.taken = action
        return self._see("go"), np.float32(0.5), np.bool_(False), False, {}

    def _see(self, text):
        box = np.array([[0, 1], [1 / 3, -2]], np.float32)
        return {"pair": (np.int64(4), text), "box": box}


class OddObservations(Echo):
    """The observations are of a space that the adapter does not know."""

    observation_space = spaces.Sequence(spaces.Discrete(2))
