"""The actor: the tokens of several turns, what is masked, where a conversation ends, and what an environment costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from reval.config import load_config
from reval.data import Problem
from reval.environments import EnvironmentPool
from reval.prompts import encode
from reval.rollout import Response
from reval.rollout.actor import Actor
from reval.scoring import score

MISBEHAVING = Path(__file__).parent / "environments" / "misbehaving.py"


class Scripted:
    """Says texts[problem][turn] in every response. The problem's number is the digit in its context. Text that ends
    in "…" is cut off at the length limit."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.asked = tokenizer, texts, []

    def generate(self, prompts, *, responses, max_new_tokens, temperature, seed):
        self.asked.append((prompts, responses, seed))
        turn = len(self.asked) - 1
        out = []
        for ids in prompts:
            number = int(next(c for c in self.tokenizer.decode(ids) if c.isdigit()))
            text = self.texts[number][turn]
            said = self.tokenizer(text.rstrip("…"), add_special_tokens=False)["input_ids"]
            cut = text.endswith("…")
            out.append([Response(said if cut else [*said, self.tokenizer.eos_token_id], not cut)] * responses)
        return out


@pytest.fixture(scope="module")
def pool():
    with EnvironmentPool(f"{MISBEHAVING}:Obedient", {}, workers=1, timeout=60) as pool:
        yield pool


def play(tiny, pool, texts, *overrides, responses=1, context=512):
    """(groups of responses, engine, problems), with the environment Obedient and one script for each problem."""
    spec = f"environment.name={MISBEHAVING}:Obedient"
    config = load_config(["configs/tiny.yaml"], [spec, "environment.max_turns=4", *overrides])
    tokenizer = tiny[1]
    problems = [Problem(f"task {i}", [9], {"row": i}) for i in range(len(texts))]
    engine = Scripted(tokenizer, texts)
    actor = Actor(engine, config, tokenizer, pool, context)
    return actor.respond(problems, responses=responses, temperature=1.0, seed=5), engine, problems


def test_the_tokens_are_those_of_the_conversation_and_the_environment_is_masked(tiny, pool):
    [[response], [other]], engine, _ = play(tiny, pool, [["a", "bb…", "stop"], ["stop"]])
    tokenizer, episode = tiny[1], response.episode
    messages = [{"role": "user", "content": "begin task 0"}]
    assert episode.prompt_ids == encode(messages, tokenizer)
    for text, told in (("a", "a 1"), ("bb", "bb 2")):
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": told}]
    end = tokenizer.eos_token_id
    whole = encode(messages, tokenizer) + tokenizer("stop")["input_ids"] + [end]
    assert episode.prompt_ids + response.token_ids == whole
    own = [t for t, m in zip(response.token_ids, episode.action_mask, strict=True) if m]
    # The end of the turn that was cut off is the chat template's, so the model did not choose it.
    assert tokenizer.decode(own) == "a<|end|>bbstop<|end|>" and response.length == len(own)
    assert (response.finished, episode.turns, episode.reward, episode.error) == (True, 3, 1.5, "")
    assert (other.finished, other.episode.turns, other.episode.reward) == (True, 1, 0.5)
    assert [len(prompts) for prompts, *_ in engine.asked] == [2, 1, 1]
    assert engine.asked[1][0] == [whole[: len(engine.asked[1][0][0])]], "the second turn reads the tokens of the first"
    assert len({seed for *_, seed in engine.asked}) == 3, "each turn samples with its own seed"


def test_equal_contexts_of_a_group_are_one_request(tiny, pool):
    """As in every first turn: the engine then reads a prompt once for all its responses."""
    groups, engine, _ = play(tiny, pool, [["a", "a", "stop"], ["b", "stop"]], responses=3)
    assert [(len(prompts), responses) for prompts, responses, _ in engine.asked] == [(2, 3), (2, 3), (3, 1)]
    assert [len(group) for group in groups] == [3, 3]


def test_a_conversation_ends_at_the_limit_of_turns(tiny, pool):
    [[response]], engine, _ = play(tiny, pool, [["a"] * 9])
    assert (response.finished, response.episode.turns, response.episode.reward) == (False, 4, 2.0)
    assert response.episode.action_mask[-1] and len(engine.asked) == 4


@pytest.mark.parametrize(("limit", "turns"), [(9 + 8, 1), (10 + 8, 2), (33, 3), (34, 4)])
@pytest.mark.parametrize("by", ["environment.max_tokens", "context"])
def test_a_turn_starts_only_if_it_fits(tiny, pool, by, limit, turns):
    """A turn has 2 tokens but may have 10. The answers of the environment have 6 tokens, the prompt has 15."""
    limits = {"context": limit + 15} if by == "context" else {}
    overrides = [] if limits else [f"{by}={limit}"]
    [[response]], _, _ = play(tiny, pool, [["a"] * 9], "rollout.max_new_tokens=10", *overrides, **limits)
    assert (response.episode.turns, response.finished) == (turns, False)
    assert len(response.token_ids) == 8 * turns - 6, "nothing stands after the last turn"


def test_a_prompt_that_fills_the_context_costs_its_trajectory(tiny, pool):
    [[response]], engine, _ = play(tiny, pool, [["a"]], context=12)
    assert "exceed the model's context of 12" in response.episode.error
    assert (response.token_ids, response.episode.reward, engine.asked) == ([], None, [])


def test_a_failed_environment_costs_its_trajectory_and_is_counted(tiny, pool):
    groups, _, problems = play(tiny, pool, [["a", "raise"], ["a", "stop"], ["nothing"]])
    flat = [group[0] for group in groups]
    texts, scores = score(problems, flat, None, tiny[1])
    assert scores.rewards == [None, 1.0, None] and (scores.errors, scores.timeouts) == (2, 0)
    assert "no such move" in scores.first_error and texts[1].startswith("a<|end|>")


def test_problems_of_a_benchmark_have_one_turn(tiny, pool, tiny_config):
    tokenizer = tiny[1]
    ids = tokenizer("7")["input_ids"]
    problems = [Problem("7", ids, {}, benchmark="b"), Problem("task 0", ids, {}), Problem("7", ids, {}, benchmark="b")]
    actor = Actor(Scripted(tokenizer, {7: ["one"], 0: ["-", "stop"]}), tiny_config, tokenizer, pool)
    first, second, third = (group[0] for group in actor.respond(problems, responses=1, temperature=1.0, seed=0))
    assert first.episode is None and third.episode is None and second.episode.turns == 1
    assert tokenizer.decode(first.token_ids) == "one<|end|>"


def test_one_problem_twice_has_two_conversations(tiny, pool, tiny_config):
    problem = Problem("task 0", [9], {})
    actor = Actor(Scripted(tiny[1], [["stop"]]), tiny_config, tiny[1], pool)
    found = actor.respond([problem, problem], responses=2, temperature=1.0, seed=0)
    assert [len(group) for group in found] == [2, 2]
    assert len({id(response) for group in found for response in group}) == 4
