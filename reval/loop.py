"""Training, top to bottom: METHOD.md section 5 as one visible loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import torch

from .checkpoint import prepare_folder, save_checkpoint, save_trajectories
from .config import Config
from .data import Problem, ProblemSampler
from .display import Display
from .engine import Engine, NonFiniteError
from .errors import RunError
from .evaluate import Evaluation, decode, evaluate, score
from .parts import Parts, build
from .reference_policy import ReferencePolicy
from .replay import ReplayBuffer, Trajectory
from .rewards import RewardError, reward_metrics, shape_rewards
from .rollout import Response
from .tracking import Tracker


def train(config: Config) -> dict[str, float]:
    """Train as the settings say, and return the last iteration's metrics.

    Writes into `run.dir`: config.yaml, metrics.jsonl, samples.jsonl, evaluations/, tensorboard/, curves.png and
    checkpoint/, which from_pretrained loads. Ctrl-C saves a checkpoint first.

    Raises ConfigError for settings that cannot work, before anything is written, and RunError when the loss stops being
    finite (weights untouched, batch saved) or the reward function is broken.
    """
    with build(config) as parts:
        folder = prepare_folder(config)
        with Tracker(folder, config) as tracker, Display(config) as display:
            try:
                return _train(config, parts, folder, tracker, display)
            finally:
                tracker.plot()


def _train(config: Config, parts: Parts, folder: Path, tracker: Tracker, display: Display) -> dict[str, float]:
    model, rng = parts.model, Random(config.run.seed)
    problems = ProblemSampler(parts.training, config.run.seed)
    engine, reference = Engine(model, config), ReferencePolicy(model, config)
    buffer = ReplayBuffer(config.replay.capacity)
    before = after = _evaluate(config, parts, display, folder, 0)
    tracker.evaluated(0, before)
    metrics: dict[str, float] = {}
    iteration = 0
    try:
        for iteration in range(1, config.run.iterations + 1):
            clock = Clock()
            with clock("rollout"):
                prompts = problems.draw(config.rollout.prompts)
                groups = parts.rollout.generate(
                    [p.token_ids for p in prompts], responses=config.rollout.responses,
                    max_new_tokens=config.rollout.max_new_tokens, temperature=config.rollout.temperature,
                    seed=(config.run.seed << 32) + iteration,
                )  # fmt: skip
            with clock("reward"):
                fresh, metrics = _scored(config, parts, prompts, groups, iteration, tracker)
            buffer.add(fresh)
            for k in range(config.replay.updates_per_iteration):
                batch = fresh if k == 0 else buffer.sample(config.replay_batch_size, rng)
                if not batch:
                    continue  # no response of this iteration could be scored
                with clock("reference"):
                    reference.annotate(batch)
                with clock("update"):
                    tracker.update("reval" if k == 0 else "reval/replay", engine.update(batch))
            with clock("sync"):
                parts.rollout.sync(model)
            if config.reference.reset_every and iteration % config.reference.reset_every == 0:
                reference.reset(model)
            metrics |= buffer.metrics(iteration) | {"reference/version": reference.version} | clock.metrics()
            last = iteration == config.run.iterations
            if last or (config.evaluation.every and iteration % config.evaluation.every == 0):
                after = _evaluate(config, parts, display, folder, iteration)
                metrics |= tracker.evaluated(iteration, after)
            metrics = tracker.log(iteration, metrics)
            display.iteration(iteration, metrics)
            if last or (config.run.save_every and iteration % config.run.save_every == 0):
                save_checkpoint(folder, iteration, model, parts.tokenizer)
    except KeyboardInterrupt:
        save_checkpoint(folder, iteration, model, parts.tokenizer)
        display.note(f"interrupted in iteration {iteration}; checkpoint saved in {folder / 'checkpoint'}")
        raise
    except RewardError as error:
        save_checkpoint(folder, iteration - 1, model, parts.tokenizer)
        where = folder / "checkpoint"
        raise RunError(f"iteration {iteration}: {error}\nThe weights are saved in {where}") from error
    except NonFiniteError as error:
        path = save_trajectories(folder / f"nonfinite-{iteration}.jsonl", error.trajectories)
        raise RunError(
            f"iteration {iteration}: {error}. The weights are as they were and the batch is in {path}. A smaller "
            "optim.lr or a larger objective.beta usually helps"
        ) from error
    display.results(before, after, folder)
    return metrics


def _scored(
    config: Config, parts: Parts, prompts: list[Problem], groups: list[list[Response]], iteration: int, tracker: Tracker
) -> tuple[list[Trajectory], dict[str, float]]:
    """Trajectories of all responses that could be scored, rewards shaped, and the metrics of the whole."""
    flat = [(g, p, r) for g, (p, rs) in enumerate(zip(prompts, groups, strict=True)) for r in rs]
    texts = decode([r for _, _, r in flat], parts.tokenizer)
    scored = score([p for _, p, _ in flat], texts, [r.token_ids for _, _, r in flat], parts.pool)
    tracker.samples(iteration, [(p.prompt, t, s) for (_, p, _), t, s in zip(flat, texts, scored.rewards, strict=True)])
    numbers = [g for g, _, _ in flat]
    shaped = shape_rewards(scored.rewards, numbers, config.reward.shaping)
    trajectories = [
        Trajectory(
            token_ids=np.array(p.token_ids + r.token_ids),
            action_mask=np.arange(len(p.token_ids) + len(r.token_ids)) >= len(p.token_ids),
            reward=reward, score=raw, iteration=iteration, finished=r.finished,
        )
        for (_, p, r), reward, raw in zip(flat, shaped, scored.rewards, strict=True)
        if reward is not None and raw is not None
    ]  # fmt: skip
    lengths = [len(r.token_ids) for _, _, r in flat]
    metrics = reward_metrics(scored.rewards, numbers) | {
        "reward_timeouts": scored.timeouts,
        "reward_errors": scored.errors,
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(not r.finished for _, _, r in flat) / len(flat),
        "num_tokens": sum(lengths),
    }
    if scored.first_error:
        tracker.reward_error(iteration, scored.first_error)
    return trajectories, metrics


def _evaluate(config: Config, parts: Parts, display: Display, folder: Path, iteration: int) -> Evaluation | None:
    if not parts.held_out:
        return None
    with display.busy("answering the held-out problems"):
        result = evaluate(parts.rollout, parts.held_out, parts.pool, parts.tokenizer, config)
    result.save(folder / "evaluations" / f"iteration-{iteration:06d}.jsonl")
    return result


@dataclass
class Clock:
    """Seconds that the stages of one iteration take."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """`step_time` and `time/<stage>`, in seconds."""
        stages = {f"time/{stage}": seconds for stage, seconds in self.seconds.items()}
        return {"step_time": time.perf_counter() - self.started} | stages
