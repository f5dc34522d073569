"""The adapter for gymnasium, with gymnasium's own environments and with small ones for every space."""

import builtins
from pathlib import Path

import pytest

from reval.environments import Conversation, EnvironmentFault, EnvironmentPool
from reval.environments.gymnasium import Gymnasium

gymnasium = pytest.importorskip("gymnasium")
FILE = str(Path(__file__).with_name("gymnasium_tasks.py"))


def said(result):
    return result[0][0]["content"]


def test_text_actions_and_observations():
    task = Gymnasium(f"{FILE}:Echo", reward=2.0)
    first = task.reset({"seed": 3})[0]["content"]
    assert first.startswith("Reply with a text of 1 to 8 characters.\n\ndigit ")
    assert task.step("left") == ([{"role": "user", "content": "<left>"}], 2.0, False)
    assert said(task.step(" left ")) == "< left >"  # the text as it is, if it is an action
    assert task.step("end\n")[1:] == (2.0, True)
    assert task.step("late")[2] is True
    assert task.step("LEFT") == (
        [{"role": "user", "content": "That is no action. Reply with a text of 1 to 8 characters."}],
        0.0,
        False,
    )


def test_the_row_seeds_the_environment():
    task = Gymnasium(f"{FILE}:Echo", instruction="Go.")
    starts = {task.reset({"seed": seed})[0]["content"] for seed in range(20)}
    assert starts == {f"Go.\n\ndigit {n} None" for n in range(10)} & starts and len(starts) > 3
    again = Gymnasium(f"{FILE}:Echo", instruction="Go.")
    for seed in range(5):
        assert task.reset({"seed": seed}) == again.reset({"seed": seed})
    assert said([task.reset({"seed": 1, "options": {"a": 2}})]).endswith("{'a': 2}")
    for seed in (None, "1", -1, True):
        with pytest.raises(EnvironmentFault, match="column 'seed'"):
            task.reset({"seed": seed})


@pytest.mark.parametrize(
    ("kind", "completion", "action"),
    [
        ("Discrete", "I take 1", 1),
        ("Discrete", "not 0 but -1.", -1),
        ("Discrete", "1.0", 1),
        ("Discrete", "2", None),
        ("Discrete", "0.5", None),
        ("Discrete", "left", None),
        ("Discrete", "9" * 400, None),
        ("Discrete", "9" * 40, None),
        ("MultiDiscrete", "9 9, then 2 and 3", [2, 3]),
        ("MultiDiscrete", "3 3", None),
        ("MultiDiscrete", "-1 3", None),
        ("MultiDiscrete", "2", None),
        ("MultiBinary", "[0, 1]", [0, 1]),
        ("MultiBinary", "[0, 2]", None),
        ("MultiBinary", "[0, 256]", None),
        ("Box", "x=-0.5, y=.25", [-0.5, 0.25]),
        ("Box", "2.5 0", None),
        ("Box", "1e999 0", None),
    ],
)
def test_numbers_in_the_completion_are_the_action(kind, completion, action):
    task = Gymnasium(f"{FILE}:Numbers", kind=kind)
    task.reset({"seed": 0})
    messages, reward, done = task.step(completion)
    if action is None:
        assert messages[0]["content"].startswith("That is no action. Reply with ") and (reward, done) == (0.0, False)
        assert not hasattr(task._env, "taken")
    else:
        assert messages[0]["content"] == "box: [[0, 1], [0.3333, -2]]\npair: 4, go" and reward == 0.5
        assert getattr(task._env.taken, "tolist", lambda: task._env.taken)() == action


def test_the_model_is_told_what_is_allowed():
    def told(kind):
        return Gymnasium(f"{FILE}:Numbers", kind=kind).reset({"seed": 0})[0]["content"].partition("\n")[0]

    assert told("Discrete") == "Reply with a number from -1 to 1."
    assert told("MultiDiscrete") == "Reply with 2 numbers: 0 to 2, 0 to 3."
    assert told("MultiBinary") == "Reply with 2 numbers that are 0 or 1."
    assert told("Box") == "Reply with 2 numbers: -1 to 2, -1 to 2."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"id": f"{FILE}:Numbers", "kind": "Sequence"}, "the action space must be Text, .*Sequence"),
        ({"id": f"{FILE}:OddObservations"}, "observations must be Text, .*Sequence"),
        ({"id": "FrozenLake-v99999"}, "environment.options.id='FrozenLake-v99999'"),
        ({"id": "Nowhere-v0"}, "environment.options.id='Nowhere-v0'"),
        ({"id": f"{FILE}:Ech"}, "did you mean 'Echo'"),
    ],
)
def test_what_cannot_be_played_is_refused(options, message):
    with pytest.raises(EnvironmentFault, match=message):
        Gymnasium(**options)


def test_the_package_is_named_if_it_is_missing(monkeypatch):
    real = builtins.__import__

    def refusing(name, *rest):
        if name == "gymnasium":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refusing)
    with pytest.raises(EnvironmentFault, match="pip install gymnasium"):
        Gymnasium("FrozenLake-v1")


def test_problems_have_distinct_seeds():
    rows = Gymnasium.problems(50, 1)
    assert rows == Gymnasium.problems(50, 1) != Gymnasium.problems(50, 2)
    assert len({row["seed"] for row in rows}) == len({row["prompt"] for row in rows}) == 50


def test_a_lake_of_gymnasium_in_the_workers():
    """Right, right, down, down, down, right leads around the holes of the map with 4 x 4 fields."""
    options = {"id": "FrozenLake-v1", "is_slippery": False, "instruction": "0 left, 1 down, 2 right, 3 up"}
    with EnvironmentPool("gymnasium", options, workers=1, timeout=60) as pool:
        pool.start()
        good, bad = (Conversation({"prompt": "p", "seed": n}) for n in range(2))
        pool.advance([good, bad])
        for move in "221112":
            good.completions.append(move)
            pool.advance([good])
        bad.completions.append("2 or 1?")
        pool.advance([bad])
        assert good.error == bad.error == ""
        assert [m[0]["content"] for m in good.observations[1:]] == ["1", "2", "6", "10", "14", "15"]
        assert (good.reward, good.done) == (1.0, True)
        assert (bad.reward, bad.done, bad.observations[-1][0]["content"]) == (0.0, False, "4")


def test_an_environment_ends_at_its_own_limit():
    task = Gymnasium("FrozenLake-v1", max_episode_steps=2, is_slippery=False)
    task.reset({"seed": 0})
    assert [task.step("0")[2] for _ in range(2)] == [False, True]
    task.close()
