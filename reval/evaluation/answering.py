"""Answering the evaluation problems, which training never uses: held-out ones and benchmarks (docs/evaluation.md)."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..components import Components, build
from ..config import Config, ConfigError
from ..data import Problem
from ..distributed import World
from ..errors import RunError
from ..model.dtypes import with_dtypes
from ..rewards import RewardError, RewardPool
from ..rollout import Response
from ..rollout.actor import Actor
from ..scoring import score
from .answers import Answered, Evaluation
from .compare import describe
from .endogenous import Scorer, endogenous_scorer

ALONE = World()


def evaluate(
    actor: Actor,
    problems: list[Problem],
    pool: RewardPool | None,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    *,
    world: World = ALONE,
    scorer: Scorer | None = None,
) -> Evaluation:
    """Answer the problems and score the answers. Each process of `world` answers its share of the problems.

    Every call uses the same seed, so evaluations of different checkpoints differ by their weights only.

    Args:
        pool: the reward pool for reward.function. None if an environment gives the rewards.
        scorer: computes endogenous rewards; required with evaluation.best_of_n.

    Raises, on every process:
        RewardError: a reward function is broken on one of them.
        RunError: no answer to the held-out problems, or none to a benchmark, has a score. Its accuracy would be 0
            whatever the answers are.
    """
    settings = config.evaluation
    own = world.share(problems)
    seed = config.run.seed + world.rank  # the processes answer different problems and need different noise
    sampled = _responses(actor, own, settings.samples, settings.temperature, seed)
    greedy = _responses(actor, own, 1, 0.0, seed) if settings.greedy else [[] for _ in own]
    errors: list[str] = []
    broken = None
    try:
        with _pools(own, pool, config) as pools:
            texts, scores = _scored(own, sampled, pools, tokenizer, config, errors)
            greedy_texts, greedy_scores = _scored(own, greedy, pools, tokenizer, config, errors)
            extracted = _extracted(own, texts, pools, config)
    except RewardError as error:
        broken = str(error)
    # All processes raise together. If one raised alone, the others would wait for it in the next collective.
    for message in world.gather(broken):
        if message:
            raise RewardError(message)
    answers = [
        Answered(
            p.prompt,
            texts[i],
            scores[i],
            next(iter(greedy_texts[i]), None),
            next(iter(greedy_scores[i]), None),
            benchmark=p.benchmark,
            answer=p.columns.get("answer"),
            extracted=extracted[i],
            lengths=[r.length for r in sampled[i]],
            finished=[r.finished for r in sampled[i]],
            settings=_settings(p, config),
        )
        for i, p in enumerate(own)
    ]
    joined = world.join(answers)
    failures = [error for of_process in world.gather(errors) for error in of_process]
    _check_scores(joined, failures, config.environment.name)
    if settings.best_of_n:
        assert scorer is not None, "evaluation.best_of_n needs a scorer"
        together = max(1, config.trajectories_per_iteration // (settings.samples * world.size))
        values = _endogenous(scorer, problems, sampled, together, world)
        joined = [replace(a, endogenous=v) for a, v in zip(joined, values, strict=True)]
    return Evaluation(joined, tuple(settings.k))


def _responses(
    actor: Actor, problems: list[Problem], count: int, temperature: float, seed: int
) -> list[list[Response]]:
    if not problems:
        return []  # there are more processes than problems
    return actor.respond(problems, responses=count, temperature=temperature, seed=seed)


def _function(problem: Problem, config: Config) -> str:
    """The name of what scores this problem: a reward function, or the environment."""
    if problem.benchmark is not None:
        return config.evaluation.reward
    return config.environment.name or config.reward.function


def _settings(problem: Problem, config: Config) -> dict[str, Any]:
    """The settings that the score of this problem depends on. The file of answers holds them."""
    settings = {
        "samples": config.evaluation.samples,
        "temperature": config.evaluation.temperature,
        "max_new_tokens": config.rollout.max_new_tokens,
        "reward": _function(problem, config),
    }
    if problem.benchmark is None and config.environment.name is not None:
        own = config.environment
        settings |= {"max_turns": own.max_turns, "max_tokens": own.max_tokens, "environment.options": own.options}
    template = config.data.chat_template_kwargs
    return settings | ({"chat_template_kwargs": template} if template else {})


@contextmanager
def _pools(problems: list[Problem], pool: RewardPool | None, config: Config) -> Iterator[dict[str, RewardPool | None]]:
    """A reward pool for each reward function of these problems, by name: `pool` for reward.function, and None for the
    environment."""
    pools = {config.environment.name or config.reward.function: pool}
    with ExitStack() as stack:
        for name in {_function(p, config) for p in problems} - pools.keys():
            own = RewardPool(name, workers=config.reward.workers, timeout=config.reward.timeout)
            pools[name] = stack.enter_context(own)
        yield pools


def _scored(
    problems: list[Problem],
    groups: list[list[Response]],
    pools: dict[str, RewardPool | None],
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    failures: list[str],
) -> tuple[list[list[str]], list[list[float | None]]]:
    """The texts and the scores of each problem's responses. Adds the reward functions' first errors to `failures`."""
    flat = [(p, r) for p, group in zip(problems, groups, strict=True) for r in group]
    texts = [""] * len(flat)
    rewards: list[float | None] = [None] * len(flat)
    for function, pool in pools.items():
        places = [i for i, (p, _) in enumerate(flat) if _function(p, config) == function]
        if places:
            own_texts, own_scores = score([flat[i][0] for i in places], [flat[i][1] for i in places], pool, tokenizer)
            failures += [] if own_scores.first_error is None else [own_scores.first_error]
            for i, text, reward in zip(places, own_texts, own_scores.rewards, strict=True):
                texts[i], rewards[i] = text, reward
    ends = list(accumulate(map(len, groups), initial=0))
    return [texts[a:b] for a, b in pairwise(ends)], [rewards[a:b] for a, b in pairwise(ends)]


def _check_scores(answers: list[Answered], failures: list[str], environment: str | None) -> None:
    """See `evaluate`."""
    for name in dict.fromkeys(a.benchmark for a in answers):
        if all(s is None for a in answers if a.benchmark == name for s in (*a.scores, a.greedy_score)):
            which = "the held-out problems" if name is None else f"the benchmark {name}"
            why = (
                "the reward function returned None, raised or took longer than reward.timeout; does it accept the "
                "answers of these rows?"
            )
            if name is None and environment is not None:
                why = f"the environment {environment!r} failed or took longer than environment.timeout every time"
            raise RunError(f"no answer to {which} has a score: {why}" + "".join(f"\n{f}" for f in failures[:1]))


def _endogenous(
    scorer: Scorer, problems: list[Problem], sampled: list[list[Response]], together: int, world: World
) -> list[list[float]]:
    """The endogenous rewards of the answers to all problems.

    Every process has to call this with the answers that it generated, because the forward pass of a sharded model needs
    all processes.

    Args:
        sampled: the responses to each problem of this process's share.
        together: number of problems of each process per call of the scorer.
    """
    out = []
    for start in range(0, len(problems), together * world.size):
        done = start // world.size
        groups = world.join([[r.token_ids for r in group] for group in sampled[done : done + together]])
        prompts = [p.token_ids for p in problems[start : start + len(groups)]]
        values = iter(scorer([(p, r) for p, group in zip(prompts, groups, strict=True) for r in group]))
        out += [[next(values) for _ in group] for group in groups]
    return out


def _extracted(
    problems: list[Problem], texts: list[list[str]], pools: dict[str, RewardPool | None], config: Config
) -> list[list[str | None] | None]:
    """The final answers in each problem's texts. None if the reward function has no extractor."""
    out: list[list[str | None] | None] = [None] * len(problems)
    for function, pool in pools.items():
        places = [i for i, p in enumerate(problems) if _function(p, config) == function]
        found = None if pool is None else pool.extract([text for i in places for text in texts[i]])
        if found is not None:
            answers = iter(found)
            for i in places:
                out[i] = [next(answers) for _ in texts[i]]
    return out


def evaluate_components(components: Components, config: Config) -> Evaluation:
    """`evaluate` with the model, the engine and the problems of a run. Every process has to call this."""
    scorer = endogenous_scorer(components.model, config, components.world) if config.evaluation.best_of_n else None
    return evaluate(
        components.actor,
        components.evaluation_problems,
        components.reward_pool,
        components.tokenizer,
        config,
        world=components.world,
        scorer=scorer,
    )


def main(config: Config, checkpoint: Path, out: Path | None = None, as_json: bool = False) -> int:
    """`reval evaluate CHECKPOINT`: answer the evaluation problems with a checkpoint, print the metrics, and save the
    answers.

    Args:
        out: file for the answers; an existing one is replaced. None: a file in the checkpoint, see `_answers_file`.
        as_json: print the metrics as one line of JSON, with all digits.

    Raises ConfigError, before anything is answered, if there are no problems or if the answers could not be saved.
    Raises RunError if saving fails at the end; the metrics are printed first.
    """
    folder = checkpoint / "checkpoint" if (checkpoint / "checkpoint").exists() else checkpoint
    config = with_dtypes(replace(config, model=replace(config.model, name=str(folder))))
    _check_writable(folder / "evaluation.jsonl" if out is None else out)
    with build(config) as components:
        if not components.evaluation_problems:
            raise ConfigError("there is nothing to answer: data.held_out is 0 and evaluation.benchmarks is empty")
        result = evaluate_components(components, config)
        if components.world.main:
            path = out or _answers_file(folder, result)
            print(_report(result, path, as_json), flush=True)
            try:
                result.save(path)
            except OSError as error:
                raise RunError(f"the answers could not be saved: {error}; --out FILE names another file") from error
    return 0


def _report(result: Evaluation, path: Path, as_json: bool) -> str:
    """What `reval evaluate` prints: a line per metric, or everything as one line of JSON."""
    metrics = result.metrics()
    if as_json:
        return json.dumps(metrics | {"problems": len(result.answers), "answers": str(path)})
    width = max(map(len, metrics))
    lines = [f"{name:<{width}} {value:9.3f}" for name, value in metrics.items()]
    how = describe(a.settings for a in result.answers)
    return "\n".join([*lines, f"{len(result.answers)} problems; {how}; the answers are in {path}"])


def _check_writable(path: Path) -> None:
    """Raise ConfigError if the file `path` could not be written. Makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
    except OSError as error:
        raise ConfigError(f"the answers cannot be saved as '{path}' ({error.strerror}); --out names a file") from error


def _answers_file(folder: Path, result: Evaluation) -> Path:
    """evaluation.jsonl in the checkpoint. If this file holds other answers, for example with other settings, it stays,
    and the result is evaluation-2.jsonl, and so on."""
    text = result.to_jsonl()
    names = (folder / f"evaluation{f'-{n}' * (n > 1)}.jsonl" for n in count(1))
    return next(p for p in names if not p.exists() or p.read_text(encoding="utf-8", errors="replace") == text)
