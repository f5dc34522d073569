"""Training, top to bottom: METHOD.md section 5 as one visible loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch

from .checkpoint import save_checkpoint
from .components import Components, build
from .config import Config, ConfigError
from .errors import RunError
from .evaluation.answering import evaluate
from .evaluation.answers import Evaluation
from .evaluation.endogenous import endogenous_scorer
from .interrupt import Interruptible
from .learner import NonFiniteError
from .model.dtypes import with_dtypes
from .model.saving import whole_weights
from .replay import Trajectory
from .rewards import RewardError
from .rollout.probe import choose, log_probs, mismatch, worst
from .run_folder import find_checkpoint, save_trajectories
from .scoring import scored
from .tracking import check_installed
from .training_run import TrainingRun


def train(config: Config) -> dict[str, float]:
    """Train as the settings say, and return the last iteration's metrics.

    Writes into `run.dir`: config.yaml, metrics.jsonl, samples.jsonl, evaluations/, tensorboard/, curves.png and
    checkpoint/, which from_pretrained loads and `run.resume` goes on from. Ctrl-C ends the run after the iteration it
    is in, with a checkpoint. Under torchrun every process calls this.

    Raises ConfigError for settings that cannot work, before anything is written, and RunError when the loss stops being
    finite (weights untouched, batch saved) or the reward function is broken.
    """
    check_installed(config)
    config = with_dtypes(config)
    checkpoint = find_checkpoint(config)
    with build(config, checkpoint) as components, ExitStack() as stack:
        try:
            run = TrainingRun(config, components, checkpoint, stack)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        try:
            return _train(run, components)
        except RewardError as error:
            where = f"the newest checkpoint is {run.previous}" if run.previous else "nothing was saved yet"
            raise RunError(f"iteration {run.iteration + 1}: {error}\n{where}") from error
        except NonFiniteError as error:
            path = run.folder / "nonfinite.jsonl"
            if components.world.main:
                save_trajectories(path, error.trajectories)
            raise RunError(
                f"iteration {run.iteration + 1}: {error}. The weights are as they were and the batch is in {path}. A "
                "smaller optim.lr or a larger objective.beta usually helps"
            ) from error
        finally:
            run.tracker.plot()


def _train(run: TrainingRun, components: Components) -> dict[str, float]:
    config, display, tracker = run.config, run.display, run.tracker
    before, after = _evaluate_first(run, components), None
    metrics: dict[str, float] = {}
    if run.iteration >= config.run.iterations:
        display.note(f"nothing to do: the checkpoint is after {run.iteration} of {config.run.iterations} iterations")
    with Interruptible(lambda: display.note("finishing this iteration, then saving; again to stop at once")) as stop:
        for iteration in range(run.iteration + 1, config.run.iterations + 1):
            clock = Clock()
            with clock("rollout"):
                rollouts = run.generation.next(iteration)
            with clock("reward"):
                fresh, metrics = scored(config, components, rollouts, iteration, tracker)
            run.buffer.add(fresh)
            for k in range(config.replay.updates_per_iteration):
                batch = fresh if k == 0 else run.buffer.sample(config.replay_batch_size, run.rng)
                if not batch:
                    continue  # no response of this iteration could be scored
                with clock("reference"):
                    run.reference.annotate(batch)
                with clock("update"):
                    tracker.update("reval" if k == 0 else "reval/replay", run.learner.update(batch))
            if _due(config.reference.reset_every, iteration):
                run.reference.reset()
            run.iteration = iteration
            stopping = any(components.world.gather(stop.asked))
            last = iteration == config.run.iterations
            evaluating, saving = _due(config.evaluation.every, iteration) or last, last or stopping
            saving |= _due(config.run.save_every, iteration)
            if evaluating or saving or _due(config.rollout.sync_every, iteration):
                with clock("sync"):
                    metrics |= _sync(run, components, fresh)
            metrics |= run.buffer.metrics(iteration) | {"reference/version": run.reference.version} | clock.metrics()
            if evaluating:
                after = _evaluate(run, components)
                metrics |= tracker.evaluated(iteration, after)
            metrics = tracker.log(iteration, metrics)
            display.iteration(iteration, metrics)
            if saving:
                save_checkpoint(run.folder, run, metrics)
            if stopping and not last:
                display.note(f"interrupted after iteration {iteration}; go on with --resume auto")
                raise KeyboardInterrupt
    display.results(before, after, run.folder)
    return metrics


def _due(every: int, iteration: int) -> bool:
    return bool(every) and iteration % every == 0


def _sync(run: TrainingRun, components: Components, fresh: list[Trajectory]) -> dict[str, float]:
    """Give the rollout engine the policy's weights, and measure whether it then computes what the policy does."""
    run.generation.sync(whole_weights(components.model), run.iteration)
    if components.rollout_engine.shares_weights or not run.config.rollout.probe_tokens:
        return {}
    chosen = choose(
        [t.token_ids.tolist() for t in fresh],
        [int(t.action_mask.argmax()) for t in fresh],
        run.config.rollout.probe_tokens,
    )
    if not chosen[0]:
        return {}
    found = mismatch(components.rollout_engine, log_probs(components.model, *chosen, run.config.model), *chosen)
    return worst(components.world.gather(found))


def _evaluate_first(run: TrainingRun, components: Components) -> Evaluation | None:
    """The model's answers before training; a resumed run reads what it answered then."""
    saved = run.folder / "evaluations" / "iteration-000000.jsonl"
    if run.iteration and saved.exists():
        return Evaluation.load(saved)
    if run.iteration:
        return None
    evaluation = _evaluate(run, components)
    run.tracker.evaluated(0, evaluation)
    return evaluation


def _evaluate(run: TrainingRun, components: Components) -> Evaluation | None:
    if not components.evaluation_problems:
        return None
    scorer = (
        endogenous_scorer(components.model, run.config, components.world) if run.config.evaluation.best_of_n else None
    )
    with run.display.busy("answering the held-out problems"):
        result = evaluate(
            components.rollout_engine,
            components.evaluation_problems,
            components.reward_pool,
            components.tokenizer,
            run.config,
            world=components.world,
            scorer=scorer,
        )
    if components.world.main:
        result.save(run.folder / "evaluations" / f"iteration-{run.iteration:06d}.jsonl")
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
