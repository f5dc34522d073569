"""The adapter for OpenEnv, with a server of openenv-core on this machine."""

import socket
import threading
import time

import pytest

from reval.environments import Conversation, EnvironmentFault, EnvironmentPool
from reval.environments.openenv import OpenEnv

core = pytest.importorskip("openenv.core")
uvicorn = pytest.importorskip("uvicorn")


class Guess(core.Action):
    """A number; the server reads it from text."""

    number: int


class Told(core.Observation):
    """What the player is told."""

    word: str
    made: int = 0


class Game(core.Environment):
    """Find the seed."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, hint="", **kwargs):
        self.secret, self.made = seed, 0
        return Told(word=f"begin{hint}")

    def step(self, action, timeout_s=None, **kwargs):
        self.made += 1
        if action.number < 0:
            raise RuntimeError("negative")
        right = action.number == self.secret
        return Told(word="right" if right else "wrong", made=self.made, done=right, reward=2 if right else None)

    @property
    def state(self):
        return core.State()


@pytest.fixture(scope="module")
def url():
    """The address of a running server."""
    app = core.create_fastapi_app(Game, Guess, Told, max_concurrent_envs=8)
    with socket.socket() as end:
        end.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [end]}, daemon=True)
        thread.start()
        for _ in range(600):
            if server.started:
                break
            time.sleep(0.1)
        assert server.started
        yield f"http://127.0.0.1:{end.getsockname()[1]}"
        server.should_exit = True
        thread.join(20)


def test_a_game_on_a_server(url):
    task = OpenEnv(url, action="number", observation="word", instruction="Find it.")
    try:
        first = task.reset({"prompt": "p", "seed": 7, "hint": " now", "other": 1})
        assert first == [{"role": "user", "content": "Find it.\n\nbegin now"}]
        assert task.step("3") == ([{"role": "user", "content": "wrong"}], 0.0, False)
        for refused, why in (("three", "Invalid message"), ("-1", "negative")):
            messages, reward, done = task.step(refused)
            assert messages[0]["content"].startswith("error: ") and why in messages[0]["content"]
            assert (reward, done) == (0.0, False)
        assert task.step("7")[1:] == (2, True)
    finally:
        task.close()


def test_the_completion_may_be_the_whole_action(url):
    task = OpenEnv(url)
    try:
        assert task.reset({"prompt": "p", "seed": 7})[0]["content"] == '{"word": "begin", "made": 0}'
        assert task.step('{"number": 6}')[0][0]["content"] == '{"word": "wrong", "made": 1}'
        for refused in ("7", "[7]", "", '{"numbr": 7}', '{"number": 7'):
            messages, reward, done = task.step(refused)
            assert messages[0]["content"].startswith("error: ") and (reward, done) == (0.0, False)
        assert task.step('{"number": 7}')[1:] == (2, True)
    finally:
        task.close()


def test_an_unknown_field_of_the_observation_is_named(url):
    task = OpenEnv(url, observation="words")
    try:
        with pytest.raises(EnvironmentFault, match="'words' must be one of word, made"):
            task.reset({"prompt": "p", "seed": 7})
    finally:
        task.close()


def test_a_server_that_is_not_there_is_named():
    task = OpenEnv("http://127.0.0.1:9")
    try:
        with pytest.raises(EnvironmentFault, match="environment.options.url='http://127.0.0.1:9' gives no answer"):
            task.reset({"prompt": "p", "seed": 7})
    finally:
        task.close()


def test_each_trajectory_has_a_session(url):
    options = {"url": url, "action": "number", "observation": "word"}
    with EnvironmentPool("openenv", options, workers=2, timeout=60) as pool:
        pool.start()
        talks = [Conversation({"prompt": "p", "seed": n}) for n in range(4)]
        pool.advance(talks)
        for completion in ("0", "2"):
            going = [talk for talk in talks if not talk.done]
            for talk in going:
                talk.completions.append(completion)
            pool.advance(going)
        assert [talk.error for talk in talks] == [""] * 4
        assert [(talk.reward, talk.done) for talk in talks] == [(2.0, True), (0.0, False), (2.0, True), (0.0, False)]


def test_problems_have_distinct_seeds():
    rows = OpenEnv.problems(50, 1)
    assert rows == OpenEnv.problems(50, 1) != OpenEnv.problems(50, 2) and len({row["seed"] for row in rows}) == 50
