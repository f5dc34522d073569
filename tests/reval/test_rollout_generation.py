"""Generation ahead of training: the version of the weights that answers each iteration, with every sync and with rare
syncs; and errors of the engine."""

from __future__ import annotations

import threading
from collections import Counter

import pytest

from reval.config import load_config
from reval.data import Problem
from reval.distributed import World
from reval.rollout import Response, RolloutError
from reval.rollout.actor import Actor
from reval.rollout.generation import Generation, ProblemSampler


class Engine:
    """Every response is the version of the engine's weights. The engine records each request."""

    shares_weights = False

    def __init__(self, fails_at: int = -1):
        self.version, self.asked, self.fails_at, self.threads = 0, [], fails_at, set()

    def generate(self, prompts, *, responses, max_new_tokens, temperature, seed):
        self.threads.add(threading.current_thread())
        self.asked.append((prompts, seed))
        if len(self.asked) == self.fails_at:
            raise RolloutError("the engine is gone")
        return [[Response([self.version], True) for _ in range(responses)] for _ in prompts]

    def sync(self, weights):
        self.version = dict(weights)["iteration"]


def made(ahead: int, engine: Engine, world: World | None = None, start: int = 0) -> Generation:
    config = load_config(["configs/tiny.yaml"], [f"rollout.ahead={ahead}", "run.iterations=9", "rollout.prompts=3"])
    problems = [Problem(str(i), [i], {}) for i in range(100)]
    sampler = ProblemSampler(problems, 0)
    sampler.drawn = start
    return Generation(engine, Actor(engine, config, tokenizer=None), sampler, config, world or World())


def follow(generation: Generation, iterations, every: int = 1) -> list[tuple[int, int, list[str]]]:
    """(version of the weights, lag, problems) of each iteration. A sync follows every `every` iterations."""
    out = []
    for i in iterations:
        got = generation.next(i)
        out.append((got.own[0][0].token_ids[0], got.lag, [p.prompt for p in got.problems]))
        if i % every == 0:
            generation.sync([("iteration", i)], i)
    return out


def test_on_policy_without_ahead():
    engine = Engine()
    assert [x[:2] for x in follow(made(0, engine), range(1, 6))] == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]
    assert [x[:2] for x in follow(made(0, Engine()), range(1, 6), every=2)] == [(0, 0), (0, 1), (2, 0), (2, 1), (4, 0)]
    assert engine.threads == {threading.main_thread()}


def test_ahead_answers_with_older_weights_and_says_how_old():
    engine = Engine()
    one = follow(made(1, engine), range(1, 10))
    # iteration i is requested in iteration i - 1 before the updates, so with the weights after iteration i - 2
    assert [x[:2] for x in one] == [(0, 0), *((i - 2, 1) for i in range(2, 10))]
    assert threading.main_thread() not in engine.threads
    assert len(engine.asked) == 9, "nothing is generated that no iteration will use"
    two = follow(made(2, Engine()), range(1, 10))
    assert [x[1] for x in two] == [0, 1, 2, 2, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(("ahead", "every"), [(0, 1), (2, 1), (2, 3)])
def test_no_problem_is_skipped_or_repeated_and_a_resumed_run_goes_on(ahead, every):
    whole = follow(made(ahead, Engine()), range(1, 10), every)
    assert len({p for x in whole for p in x[2]}) == 27
    first = made(ahead, Engine())
    begun = follow(first, range(1, 5), every)
    first.sync([("iteration", 4)], 4)  # as the loop does before a checkpoint
    state, drawn = first.state(), first._problems.drawn
    engine = Engine()
    engine.version = 4
    second = made(ahead, engine, start=drawn)
    second.load_state(state)
    rest = follow(second, range(5, 10), every)
    assert [x[2] for x in begun + rest] == [x[2] for x in whole]
    if every == 1:
        assert begun + rest == whole


def test_processes_ask_for_their_share_with_different_seeds():
    engines = [Engine(), Engine()]
    for rank, engine in enumerate(engines):
        made(0, engine, World(rank, 2)).next(1)
    (first, seed), (second, other) = engines[0].asked[0], engines[1].asked[0]
    assert len(first) == 2 and len(second) == 1 and seed != other


def test_an_engine_that_dies_in_the_thread_ends_the_run():
    generation = made(1, Engine(fails_at=2))
    generation.next(1)
    with pytest.raises(RolloutError, match="the engine is gone"):
        generation.next(2)
    generation.close()


def test_every_problem_comes_once_an_epoch_and_epochs_differ():
    problems = [Problem(str(i), [i], {}) for i in range(7)]
    sampler = ProblemSampler(problems, seed=3)
    drawn = [p.prompt for _ in range(7) for p in sampler.draw(3)]
    for epoch in range(3):
        assert Counter(drawn[7 * epoch : 7 * epoch + 7]) == Counter(str(i) for i in range(7))
    assert drawn[:7] != drawn[7:14]
    assert drawn == [p.prompt for p in ProblemSampler(problems, seed=3).draw(21)]


def test_a_run_that_no_longer_generates_drops_what_was_requested_ahead():
    """Its problems are not even loaded. A later run that generates again asks for the same problems."""
    first = made(2, Engine())
    asked = follow(first, range(1, 4))
    first.sync([("iteration", 3)], 3)
    state, drawn = first.state(), first._problems.drawn
    offline = made(0, Engine(), start=drawn)
    offline._config = load_config(
        ["configs/tiny.yaml"], ["rollout.engine=none", "replay.preload=x.jsonl", "replay.batch_size=4"]
    )
    offline._problems.problems = []
    offline.load_state(state)
    assert not offline._pending and offline._problems.drawn == drawn - 2 * 4
    assert len(asked) == 3
