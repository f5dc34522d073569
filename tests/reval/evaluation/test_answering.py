"""Evaluation with answers that are known beforehand: a rollout that recites, and a pool that looks the score up."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from reval.config import ConfigError, load_config
from reval.data import Problem
from reval.distributed import World
from reval.errors import RunError
from reval.evaluation.answering import _settings, evaluate, main
from reval.evaluation.answers import Answered, Evaluation
from reval.rewards import RewardError, Scores
from reval.rewards.answers import number_answer
from reval.rollout import Response


class Recite:
    """An actor. Response j to problem p, whose prompt is [p], is texts[p][j] ("g" at temperature 0)."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts, self.calls = tokenizer, texts, []

    def respond(self, problems, *, responses, temperature, seed):
        prompts = [problem.token_ids for problem in problems]
        self.calls.append((prompts, responses, temperature, seed))
        texts = [[self.texts[p][j] if temperature else "g" for j in range(responses)] for (p,) in prompts]
        return [[Response(self.tokenizer(t)["input_ids"], finished="." not in t) for t in own] for own in texts]


class Lookup:
    """Scores a completion 1 when it begins with the column `answer`."""

    def score(self, prompts, completions, completion_ids, columns):
        pairs = zip(completions, columns["answer"], strict=True)
        return Scores([None if c == "?" else float(c.startswith(a)) for c, a in pairs], 0, 0, None)

    def extract(self, completions):
        return [number_answer(c) for c in completions]


@dataclass(frozen=True)
class Threads(World):
    """A process of several, which are threads here."""

    meeting: Any = None
    slots: Any = None

    def gather(self, item):
        self.slots[self.rank] = item
        self.meeting.wait(10)
        items = list(self.slots)
        self.meeting.wait(10)
        return items


@pytest.fixture
def setting(tiny, tiny_config):
    """(rollout, problems, pool, tokenizer, config): four answers to each of five held-out problems."""
    texts = [["7", "7.", "8", "8"], ["1", "1", "1", "2"], ["3", "4", "5", "6"], ["?", "9", "9", "x"], ["2"] * 4]
    problems = [Problem(f"p{i}", [i], {"answer": a}) for i, a in enumerate(["7", "2", "3", "9", "5"])]
    evaluation = replace(tiny_config.evaluation, samples=4, greedy=True, k=[1, 2, 4])
    return Recite(tiny[1], texts), problems, Lookup(), tiny[1], replace(tiny_config, evaluation=evaluation)


def test_metrics_of_the_held_out_problems(setting):
    rollout, _, _, _, config = setting
    result = evaluate(*setting)
    assert [a.scores for a in result.answers] == [
        [1, 1, 0, 0],
        [0, 0, 0, 1],
        [1, 0, 0, 0],
        [None, 1, 1, 0],
        [0, 0, 0, 0],
    ]
    assert rollout.calls == [([[0], [1], [2], [3], [4]], 4, 1.0, 0), ([[0], [1], [2], [3], [4]], 1, 0.0, 0)]
    metrics = result.metrics()
    assert metrics["eval/accuracy"] == pytest.approx(6 / 20) == metrics["eval/pass@1"]
    assert metrics["eval/accuracy_greedy"] == 0.0
    assert metrics["eval/pass@4"] == pytest.approx(4 / 5)
    assert metrics["eval/pass@2"] == pytest.approx((5 / 6 + 1 / 2 + 1 / 2 + 5 / 6 + 0) / 5)
    # 7 and 8 tie; 1 wins, wrongly; four answers tie; of those that are numbers 9 wins; 2 is wrong
    assert metrics["eval/maj@4"] == pytest.approx((1 / 2 + 0 + 1 / 4 + 1 + 0) / 5)
    # by blocks of two: (1 + 0) / 2; (0 + 1/2) / 2; (1/2 + 0) / 2; (1 + 1) / 2; 0
    assert metrics["eval/maj@2"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 4 + 1 + 0) / 5)
    assert metrics["eval/mean_length"] == pytest.approx(21 / 20)
    assert metrics["eval/clipped_ratio"] == pytest.approx(1 / 20)
    assert not any("best@" in key for key in metrics)


def test_without_k_it_is_the_number_of_samples(setting):
    *rest, config = setting
    metrics = evaluate(*rest, replace(config, evaluation=replace(config.evaluation, k=[], greedy=False))).metrics()
    assert set(metrics) == {"eval/accuracy", "eval/pass@4", "eval/maj@4", "eval/mean_length", "eval/clipped_ratio"}


def test_best_of_n_takes_what_the_scorer_likes_most(setting):
    *rest, config = setting
    config = replace(config, evaluation=replace(config.evaluation, best_of_n=True))
    with pytest.raises(AssertionError, match="needs a scorer"):
        evaluate(*rest, config)
    asked = []

    def scorer(pairs):  # likes an early place in each problem's answers
        asked.extend(pairs)
        return [-float(i) for i in range(len(pairs))]

    result = evaluate(*rest, config, scorer=scorer)
    tokenizer = rest[3]
    assert asked[5] == ([1], tokenizer("1")["input_ids"]) and len(asked) == 20
    assert all(a.endogenous == sorted(a.endogenous, reverse=True) for a in result.answers)
    metrics = result.metrics()
    assert metrics["eval/best@4"] == pytest.approx(2 / 5)  # first answers right: 7 and 3
    assert metrics["eval/best@2"] == pytest.approx((1 / 2 + 0 + 1 / 2 + 1 / 2 + 0) / 5)


def test_benchmarks_have_metrics_and_a_reward_function_of_their_own(setting, monkeypatch):
    rollout, problems, pool, tokenizer, config = setting
    names = [None, "b", "b", "c", "c"]
    problems = [replace(p, benchmark=name) for p, name in zip(problems, names, strict=True)]
    config = replace(config, evaluation=replace(config.evaluation, k=[], greedy=True, reward="math"))
    made = []

    class Math(Lookup):
        def __init__(self, function, *, workers, timeout):
            made.append((function, workers, timeout))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            made.append("closed")

        def score(self, prompts, completions, completion_ids, columns):
            assert set(prompts) <= {"p1", "p2", "p3", "p4"}
            return super().score(prompts, completions, completion_ids, columns)

    monkeypatch.setattr("reval.evaluation.answering.RewardPool", Math)
    metrics = evaluate(rollout, problems, pool, tokenizer, config).metrics()
    assert made == [("math", config.reward.workers, config.reward.timeout), "closed"]
    assert metrics["eval/accuracy"] == pytest.approx(2 / 4)
    assert metrics["eval/b/avg@4"] == pytest.approx(2 / 8)
    assert metrics["eval/c/avg@4"] == pytest.approx(2 / 8)
    assert metrics["eval/benchmarks/avg@4"] == pytest.approx(1 / 4)
    assert {"eval/b/greedy", "eval/b/pass@4", "eval/b/maj@4", "eval/c/mean_length"} <= set(metrics)
    only = Evaluation([a for a in evaluate(rollout, problems, pool, tokenizer, config).answers if a.benchmark])
    assert only.metrics()["eval/accuracy"] == pytest.approx(1 / 4)


@pytest.mark.parametrize("size", [2, 3, 7])  # 7: more processes than problems
def test_processes_answer_their_share_and_all_know_everything(setting, size):
    rollout, problems, pool, tokenizer, config = setting
    # a tiny iteration, so that the endogenous rewards come in several rounds
    settings = replace(config.evaluation, best_of_n=True)
    config = replace(config, evaluation=settings, rollout=replace(config.rollout, prompts=1, responses=size))
    meeting, slots, results = threading.Barrier(size), [None] * size, [None] * size

    def scorer(pairs):
        return [float(100 * p[0] + sum(r)) for p, r in pairs]

    def work(rank):
        world = Threads(rank, size, meeting, slots)
        results[rank] = evaluate(rollout, problems, pool, tokenizer, config, world=world, scorer=scorer)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    [t.start() for t in threads]
    [t.join(20) for t in threads]
    alone = evaluate(rollout, problems, pool, tokenizer, config, scorer=scorer)
    assert results == [alone] * size
    asked = {seed: [p for (p,) in prompts] for prompts, _, temperature, seed in rollout.calls[:-2] if temperature}
    assert asked == {rank: list(range(5))[rank::size] for rank in range(min(size, 5))}


def test_a_reward_function_that_breaks_on_one_process_ends_the_evaluation_on_all(setting):
    rollout, problems, pool, tokenizer, config = setting
    meeting, slots, messages = threading.Barrier(2), [None] * 2, [""] * 2

    class Broken(Lookup):
        def score(self, *_):
            raise RewardError("no rewards")

    def work(rank):
        try:
            world = Threads(rank, 2, meeting, slots)
            evaluate(rollout, problems, (pool, Broken())[rank], tokenizer, config, world=world)
        except RewardError as error:
            messages[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    [t.start() for t in threads]
    [t.join(20) for t in threads]
    assert messages == ["no rewards"] * 2


def test_answers_are_saved_one_problem_a_line(setting, tmp_path):
    result = evaluate(*setting)
    result.save(tmp_path / "deep" / "a.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "deep" / "a.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["p0", "p1", "p2", "p3", "p4"]
    assert rows[3]["scores"] == [None, 1, 1, 0] and rows[3]["score"] == 0.5
    assert rows[3]["extracted"] == [None, "9", "9", None]
    assert (rows[0]["sampled"][1], rows[0]["lengths"], rows[0]["finished"]) == ("7.", [1, 2, 1, 1], [1, 0, 1, 1])
    assert (rows[0]["answer"], rows[0]["greedy"], rows[0]["benchmark"]) == ("7", "g", None)
    assert Evaluation.load(tmp_path / "deep" / "a.jsonl").answers == result.answers


def test_what_others_make_by_hand_still_has_metrics():
    assert Evaluation([Answered("p", ["a", "b"], [1.0, None])]).metrics() == {"eval/accuracy": 0.5, "eval/pass@2": 1.0}
    assert Evaluation([]).metrics() == {"eval/accuracy": 0.0}


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """(a checkpoint's folder, overrides that evaluate it on held-out problems and a benchmark, with every metric)."""
    folder = tmp_path / "checkpoint"
    for part in tiny:
        part.save_pretrained(folder)
    rows = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(4)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"evaluation.benchmarks=[{tmp_path / 'own.jsonl'}]",
        "evaluation.template={question}",
        "data.held_out=5",
        "evaluation.samples=2",
        "evaluation.best_of_n=true",
        "evaluation.problems=3",
        "reward.workers=1",
        # so cold that sampling is greedy, whatever the seed
        "evaluation.temperature=1e-4",
    ]
    return folder, overrides


def rows_of(folder, name="evaluation.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_command_answers_and_saves(checkpoint, capsys):
    folder, overrides = checkpoint
    config = load_config(["configs/tiny.yaml"], overrides)
    assert main(config, folder, as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["problems"], printed["answers"]) == (6, str(folder / "evaluation.jsonl"))
    assert {"eval/accuracy", "eval/best@2", "eval/maj@2", "eval/own/avg@2", "eval/own/best@2"} <= set(printed)
    rows = rows_of(folder)
    assert [row["benchmark"] for row in rows] == [None] * 3 + ["own"] * 3
    assert all(row["sampled"] == [row["greedy"]] * 2 for row in rows)
    how = {"samples": 2, "temperature": 1e-4, "max_new_tokens": 8}
    assert [row["settings"] for row in rows] == [how | {"reward": "number"}] * 3 + [how | {"reward": "math"}] * 3
    # The same answers replace the file. Other answers leave it alone.
    assert main(config, folder) == 0 and rows_of(folder) == rows
    shown = capsys.readouterr().out.splitlines()
    values = {name: f"{value:.3f}" for name, value in printed.items() if name.startswith("eval/")}
    assert [line.split() for line in shown[:-1]] == [list(pair) for pair in values.items()]
    assert shown[-1] == (
        "6 problems; samples=2, temperature=0.0001, max_new_tokens=8, reward=number or math; the answers are in "
        f"{folder}/evaluation.jsonl"
    )
    assert main(replace(config, rollout=replace(config.rollout, max_new_tokens=7)), folder) == 0
    assert f"the answers are in {folder}/evaluation-2.jsonl" in capsys.readouterr().out
    assert rows_of(folder) == rows and rows_of(folder, "evaluation-2.jsonl")[0]["settings"]["max_new_tokens"] == 7
    with pytest.raises(ConfigError, match="nothing to answer"):
        main(load_config(["configs/tiny.yaml"], ["data.held_out=0"]), folder)


def test_answers_that_cannot_be_saved_are_a_message(checkpoint, capsys, monkeypatch, tmp_path):
    folder, overrides = checkpoint
    config = load_config(["configs/tiny.yaml"], [*overrides, "evaluation.benchmarks=[]", "evaluation.problems=1"])
    with monkeypatch.context() as patch:
        # Nothing is answered where nothing can be saved.
        patch.setattr("reval.evaluation.answering.build", lambda *_: pytest.fail("loaded a model"))
        for out in ("/proc/a.jsonl", "/proc/a/b.jsonl", str(tmp_path), f"{tmp_path}/own.jsonl/a.jsonl"):
            with pytest.raises(ConfigError, match=f"^the answers cannot be saved as '{out}' .*; --out names a file"):
                main(config, folder, Path(out))
        patch.setattr("tempfile.TemporaryFile", refuse)
        with pytest.raises(ConfigError, match="evaluation.jsonl' .Read-only file system.; --out names a file"):
            main(config, folder)
    assert main(config, folder, tmp_path / "new" / "a.jsonl") == 0
    assert len(rows_of(tmp_path / "new", "a.jsonl")) == 1 and not (folder / "evaluation.jsonl").exists()
    capsys.readouterr()
    monkeypatch.setattr(Evaluation, "save", refuse)  # a disk that becomes full: the metrics are printed first
    with pytest.raises(RunError, match="could not be saved: .*Read-only file system"):
        main(config, folder)
    assert "eval/accuracy" in capsys.readouterr().out


def refuse(*_, **__):
    raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.distributed
def test_two_processes_find_what_one_finds(checkpoint):
    folder, overrides = checkpoint
    main(load_config(["configs/tiny.yaml"], overrides), folder)
    alone = rows_of(folder)
    (folder / "evaluation.jsonl").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "reval"]
    arguments = ["evaluate", str(folder), "configs/tiny.yaml", *overrides]
    done = subprocess.run([*command, *arguments, "--json"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("eval/accuracy") == 2  # one line, with accuracy and accuracy_greedy
    for one, two in zip(alone, rows_of(folder), strict=True):
        assert one.pop("endogenous") == pytest.approx(two.pop("endogenous"), abs=1e-4)
        assert one == two


def test_answers_of_a_game_hold_the_limits_of_the_game(setting):
    """`reval compare` refuses answers with other settings: with fewer turns the same policy finds less."""
    _, problems, _, _, config = setting
    game = replace(config.environment, name="guessing", options={"guesses": 3}, max_turns=3)
    config = replace(config, environment=game)
    found = _settings(problems[0], config)
    assert (found["reward"], found["max_turns"], found["max_tokens"]) == ("guessing", 3, 4096)
    assert found["environment.options"] == {"guesses": 3}
    assert "max_turns" not in _settings(replace(problems[0], benchmark="b"), config)
