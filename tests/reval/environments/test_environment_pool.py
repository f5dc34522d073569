"""The pool of environments, with environments that misbehave in every way that we know."""

import time
from pathlib import Path

import pytest

from reval.environments import Conversation, EnvironmentFault, EnvironmentPool

FILE = str(Path(__file__).with_name("misbehaving.py"))
OBEDIENT = f"{FILE}:Obedient"


def begun(pool, count, **problem):
    found = [Conversation({"prompt": str(i)} | problem) for i in range(count)]
    pool.start()
    pool.advance(found)
    return found


def say(pool, conversations, completions):
    for conversation, completion in zip(conversations, completions, strict=True):
        conversation.completions.append(completion)
    pool.advance(conversations)


def told(conversations):
    return [c.observations[-1][0]["content"] for c in conversations]


def test_each_conversation_has_its_own_environment():
    with EnvironmentPool(OBEDIENT, {}, workers=2, timeout=60) as pool:
        talks = begun(pool, 7)
        assert told(talks) == [f"begin {i}" for i in range(7)]
        say(pool, talks[:3], ["a"] * 3)
        say(pool, talks, ["b"] * 6 + ["stop"])
        assert told(talks) == ["b 2"] * 3 + ["b 1"] * 3 + ["stop 1"]
        assert [c.reward for c in talks] == [1.0] * 3 + [0.5] * 4
        assert [c.done for c in talks] == [False] * 6 + [True]
        assert not any(c.lost for c in talks)


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ("raise", "step 2, on the completion 'raise': .*RuntimeError: no such move"),
        ("die", "ended itself with exit code 3"),
        ("exit", "SystemExit: gone"),
        ("nothing", r"must return \(messages, reward, done\), but returned NoneType"),
        ("pair", r"must return \(messages, reward, done\), but returned tuple"),
        ("text", "must return a list of chat messages with at least one message, but returned str: 'hello'"),
        ("no messages", "with at least one message"),
        ("role", "a role of system, developer, user, tool, but returned dict"),
        ("no content", "must return messages"),
        ("nan", "a finite number as reward, but returned float: nan"),
        ("reward as text", "a finite number as reward, but returned str: '1.0'"),
    ],
)
def test_a_failure_costs_one_conversation(completion, message):
    """The others keep their state, even if their process died with the failed one."""
    with EnvironmentPool(OBEDIENT, {}, workers=1, timeout=60) as pool:
        talks = begun(pool, 4)
        say(pool, talks, ["a"] * 4)
        say(pool, talks, ["b", completion, "b", "b"])
        assert [c.lost for c in talks] == [False, True, False, False]
        assert __import__("re").search(message, talks[1].error, 16), talks[1].error
        rest = [talks[0], *talks[2:]]
        assert told(rest) == ["b 2"] * 3
        say(pool, rest, ["c"] * 3)
        assert told(rest) == ["c 3"] * 3 and all(c.reward == 1.5 for c in rest)


def test_a_hanging_environment_costs_one_conversation():
    with EnvironmentPool(OBEDIENT, {}, workers=2, timeout=1.0) as pool:
        talks = begun(pool, 6)
        say(pool, talks, ["a"] * 6)
        say(pool, talks, ["b", "b", "sleep", "b", "b", "b"])
        assert [c.timed_out for c in talks] == [False, False, True, False, False, False]
        assert told(talks[:2] + talks[3:]) == ["b 2"] * 5
        assert talks[2].error == "" and talks[2].lost


@pytest.mark.parametrize(
    ("how", "message"), [("raise", "no such row"), ("text", "reset must return a list"), ("nothing", "at least one")]
)
def test_a_reset_that_fails(how, message):
    with EnvironmentPool(OBEDIENT, {}, workers=1, timeout=60) as pool:
        talks = begun(pool, 2, reset=how)
        assert all(c.lost and message in c.error and c.error.startswith("reset(") for c in talks)
        assert told(begun(pool, 1)) == ["begin 0"]


def test_an_environment_that_gives_other_messages_when_it_is_made_again_is_lost():
    with EnvironmentPool(f"{FILE}:Forgetful", {}, workers=1, timeout=60) as pool:
        talks = begun(pool, 2)
        say(pool, talks, ["die", "a"])
        assert talks[0].lost and "made again, but it then gave other messages" in talks[1].error


def test_an_environment_stays_in_its_process():
    with EnvironmentPool(OBEDIENT, {}, workers=2, timeout=60) as pool:
        talks = begun(pool, 8)
        pids = []
        for _ in range(3):
            say(pool, talks, ["pid"] * 8)
            pids.append([text.split()[2] for text in told(talks)])
        assert pids[0] == pids[1] == pids[2] and len(set(pids[0])) == 2


def test_environments_are_closed_at_the_end_and_when_new_conversations_begin(tmp_path):
    with EnvironmentPool(OBEDIENT, {"folder": str(tmp_path)}, workers=1, timeout=60) as pool:
        talks = begun(pool, 3)
        made = len(list(tmp_path.iterdir()))  # the pool makes one environment to test the options
        say(pool, talks, ["stop", "a", "a"])
        assert len(list(tmp_path.iterdir())) == made + 1
        begun(pool, 1)
        assert len(list(tmp_path.iterdir())) == made + 3


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("calculater", {}, "did you mean 'calculator'"),
        (f"{FILE}:Obedien", {}, "did you mean 'Obedient'"),
        (f"{FILE}x.py:Obedient", {}, "there is no file"),
        (OBEDIENT, {"limits": 3}, r"environment.options=\{'limits': 3\}"),
        ("guessing", {"guesses": 3, "x": 1}, "environment.options"),
    ],
)
def test_an_environment_that_cannot_be_made(spec, options, message):
    with pytest.raises(EnvironmentFault, match=message):
        EnvironmentPool(spec, options, workers=1)


def test_an_interrupted_call_leaves_no_old_answers(monkeypatch):
    with EnvironmentPool(OBEDIENT, {}, workers=2, timeout=60) as pool:
        talks = begun(pool, 4)
        monkeypatch.setattr(pool._workers, "_wait", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            say(pool, talks, ["a"] * 4)
        monkeypatch.undo()
        assert told(begun(pool, 4)) == [f"begin {i}" for i in range(4)]


def test_a_slow_environment_has_the_time_of_all_steps_when_it_is_made_again():
    """The time limit is for one step; a repeated conversation may take as many times this limit."""
    with EnvironmentPool(f"{Path(__file__)}:Slow", {}, workers=1, timeout=1.0) as pool:
        talks = begun(pool, 2)
        for _ in range(3):
            say(pool, talks, ["a"] * 2)
        say(pool, talks, ["die", "a"])
        assert talks[0].lost and not talks[1].lost and len(talks[1].observations) == 5


class Slow:
    """Every step takes 0.4 s."""

    def reset(self, problem):
        return [{"role": "user", "content": "go"}]

    def step(self, completion):
        if completion == "die":
            __import__("os")._exit(3)
        time.sleep(0.4)
        return [{"role": "user", "content": "on"}], 0.0, False
