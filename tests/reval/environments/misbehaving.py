"""Environments that do what the completion says. Workers load this file by its path."""

import os
import time


class Obedient:
    """Counts its steps and tells the count. The completion says how it misbehaves."""

    def __init__(self, limit=100, folder=None):
        self.limit, self.folder, self.count = limit, folder, 0

    def reset(self, problem):
        how = problem.get("reset", "")
        if how == "raise":
            raise KeyError("no such row")
        if how == "sleep":
            time.sleep(1000)
        if how == "text":
            return "hello"
        if how == "nothing":
            return []
        return [{"role": "user", "content": f"begin {problem['prompt']}"}]

    def step(self, completion):
        self.count += 1
        if completion == "raise":
            raise RuntimeError("no such move")
        if completion == "sleep":
            time.sleep(1000)
        if completion == "die":
            os._exit(3)
        if completion == "exit":
            raise SystemExit("gone")
        wrong = {
            "nothing": None,
            "pair": ([], 1.0),
            "text": ("hello", 1.0, False),
            "no messages": ([], 1.0, False),
            "role": ([{"role": "assistant", "content": "x"}], 1.0, False),
            "no content": ([{"role": "user"}], 1.0, False),
            "nan": ([], float("nan"), True),
            "reward as text": ([], "1.0", True),
        }
        if completion in wrong:
            return wrong[completion]
        told = f"{completion} {self.count}" + (f" {os.getpid()}" if completion == "pid" else "")
        return [{"role": "user", "content": told}], 0.5, completion == "stop" or self.count >= self.limit

    def close(self):
        if self.folder is not None:
            with open(f"{self.folder}/{os.getpid()}-{id(self)}-{time.monotonic_ns()}", "w"):
                pass


class Silent:
    """Has no problems of its own, and never ends."""

    def reset(self, problem):
        return [{"role": "user", "content": "go"}]

    def step(self, completion):
        return [{"role": "user", "content": "more"}], 0.25, False


class Forgetful(Obedient):
    """Says something else each time it is made."""

    def reset(self, problem):
        return [{"role": "user", "content": str(time.monotonic_ns())}]


class Broken:
    """Fails for every problem."""

    def reset(self, problem):
        raise ValueError("I am broken")

    def step(self, completion):
        raise AssertionError


def not_a_class(**options):
    raise TypeError("no such option")
