"""The training loop, from top to bottom: docs/method.md section 5.

K = replay.updates_per_iteration is the number of updates of one iteration.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .checkpoint import check_settings, complete_checkpoint, save_checkpoint
from .components import Components, build
from .config import Config, ConfigError
from .errors import RunError
from .evaluation.answering import evaluate_components
from .evaluation.answers import Evaluation
from .interrupt import Interruptible
from .learner import NonFiniteError
from .metric_names import check_best_metric
from .model.dtypes import with_dtypes
from .model.saving import whole_weights
from .objectives import FUSED
from .policy_gradients import value_objective
from .replay import Trajectory
from .rewards import RewardError
from .rollout import own_engine
from .rollout.probe import choose, log_probs, mismatch, worst
from .rollout_log import rollout_rows
from .run_folder import (
    best_checkpoint,
    checkpoints_in,
    files_to_replace,
    find_checkpoint,
    read_state,
    save_trajectories,
)
from .run_lock import refuse_running
from .scoring import NOTHING, ScoredRollouts, score_rollouts
from .tracking import check_installed
from .training_run import TrainingRun
from .waiting import Progress, Waiting

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNSCORED_PROMPTS = 4
"""After this many prompts in a row without a score, the reward function or a column is wrong, not one row."""


def train(config: Config) -> dict[str, float]:
    """Train with the given settings and return the metrics of the last iteration.

    Writes into `run.dir`: config.yaml, metrics.jsonl, samples.jsonl, evaluations/, tensorboard/, curves.png and
    checkpoint/. from_pretrained loads the checkpoint, and `run.resume` continues from it. After Ctrl-C the run finishes
    its iteration, saves a checkpoint and ends. Under torchrun every process calls this function.

    Raises ConfigError for settings that cannot work, before it writes anything. Raises RunError when the loss is not
    finite (the weights are untouched and the batch is saved) or when the reward function is broken.
    """
    check_installed(config)  # this and the other checks come before the model, because loading it takes long
    if config.objective.name not in FUSED:
        value_objective(config.objective.name)
    own_engine(config.rollout.engine)
    config = with_dtypes(config)
    refuse_running(Path(config.run.dir))
    checkpoint = find_checkpoint(config)
    files_to_replace(config, checkpoint)
    if checkpoint is not None:
        check_settings(config, checkpoint)
    try:
        with build(config, checkpoint) as components, ExitStack() as stack:
            try:
                check_best_metric(config, components.evaluation_problems)
                run = TrainingRun(config, components, checkpoint, stack)
            except ValueError as error:
                raise ConfigError(str(error)) from error
            return _train_or_explain(run, components)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        saved = checkpoints_in(Path(config.run.dir))[-1:]
        where = f"the newest checkpoint is {saved[0]}" if saved else "nothing was saved yet"
        raise RunError(f"{error.strerror}: {error.filename or config.run.dir}; {where}") from error


def _train_or_explain(run: TrainingRun, components: Components) -> dict[str, float]:
    """`_train`. What the user can mend becomes a RunError."""
    try:
        return _train(run, components)
    except RewardError as error:
        raise RunError(f"iteration {run.iteration + 1}: {error}\n{_newest(run)}") from error
    except NonFiniteError as error:
        path = run.folder / "nonfinite.jsonl"
        if components.world.main:
            save_trajectories(path, error.trajectories)
        raise RunError(
            f"iteration {run.iteration + 1}: {error}. The weights are as they were and the batch is in {path}. A "
            "smaller optim.lr or a larger objective.beta usually helps"
        ) from error
    finally:
        run.tracker.plot()  # a run that fails has curves too


def _newest(run: TrainingRun) -> str:
    return f"the newest checkpoint is {run.previous}" if run.previous else "nothing was saved yet"


def _train(run: TrainingRun, components: Components) -> dict[str, float]:
    """The loop. Returns the metrics of the last iteration."""
    config, display, world = run.config, run.display, components.world
    before, after = _evaluate_first(run, components), None
    metrics: dict[str, float] = {}
    if run.previous is not None and run.tracker.logged < run.iteration:
        # The run ended while it evaluated this iteration, whose checkpoint was saved before.
        saved = read_state(run.previous)["metrics"]
        metrics, after = _report(run, components, saved, _evaluating(config, run.iteration))
        complete_checkpoint(run, metrics)
    elif run.iteration >= config.run.iterations:
        display.note(f"nothing to do: the checkpoint is after {run.iteration} of {config.run.iterations} iterations")
    with Interruptible(lambda: display.note("finishing this iteration, then saving; again to stop at once")) as stop:
        for iteration in range(run.iteration + 1, config.run.iterations + 1):
            clock = Clock(run.display.waiting)
            scored = NOTHING
            if config.generates:
                with clock("rollout"):
                    # With rollout.ahead these responses were requested in an earlier iteration.
                    rollouts = run.generation.next(iteration)
                with clock("reward"):
                    scored = score_rollouts(rollouts, iteration, config, components)
            try:
                _check_scores(run, scored, iteration)
                # The buffer gets the fresh trajectories before the updates, so that the replayed batches contain them
                # too: every trajectory of the buffer then has the same chance.
                run.buffer.add(scored.trajectories)
                _update(run, scored, clock)
            finally:
                # Also after a failure: the responses help to understand it, for example a loss that is not finite.
                _record_responses(run, scored, iteration)
            # The reset comes after all updates of the iteration, so that they have one reference. It makes the stored
            # reference values stale; `annotate` recomputes the values of a trajectory when it is drawn next.
            if _due(config.reference.reset_every, iteration):
                run.reference.reset()
            run.iteration = iteration  # an error before this line belongs to iteration run.iteration + 1
            # A signal reaches the processes at different times. They decide together, because a process that stopped
            # alone would leave the others waiting in a collective operation.
            stopping = any(world.gather(stop.asked))
            last = iteration == config.run.iterations
            evaluating = _evaluating(config, iteration)
            saving = last or stopping or _due(config.run.save_every, iteration)
            metrics = scored.metrics()
            # Sending the weights is expensive, so rollout.sync_every may skip it. An evaluation needs the current
            # weights. A checkpoint needs a sync because a resumed run starts with the saved weights in the engine.
            syncing = evaluating or (config.generates and (saving or _due(config.rollout.sync_every, iteration)))
            if syncing:
                with clock("sync"):
                    metrics |= _sync(run, components, scored.trajectories)
            metrics |= run.buffer.metrics(iteration) | {"reference/version": run.reference.version} | clock.metrics()
            # The checkpoint comes before the evaluation, which takes long and may fail.
            if saving:
                save_checkpoint(run.folder, run, metrics)
            metrics, evaluation = _report(run, components, metrics, evaluating)
            after = evaluation or after
            if not saving and _is_best(run, metrics):
                if config.generates and not syncing:
                    _sync(run, components, scored.trajectories)
                save_checkpoint(run.folder, run, metrics)
            elif saving:
                complete_checkpoint(run, metrics)
            if stopping and not last:
                display.note(f"interrupted after iteration {iteration}; go on with --resume auto")
                raise KeyboardInterrupt  # the command line then exits with status 130, as after any Ctrl-C
    display.results(before, after, run.folder)
    return metrics


def _report(
    run: TrainingRun, components: Components, metrics: dict[str, float], evaluating: bool
) -> tuple[dict[str, float], Evaluation | None]:
    """Evaluate and log the iteration `run.iteration`. Returns its row of metrics.jsonl, and the evaluation."""
    evaluation = _evaluate(run, components) if evaluating else None
    # The log comes after the evaluation, so that one row has all metrics of the iteration.
    metrics = run.tracker.log(run.iteration, metrics | run.tracker.evaluated(run.iteration, evaluation))
    run.display.iteration(run.iteration, metrics)
    if (text := run.value_lag.note(metrics)) is not None:
        run.display.note(text)
    return metrics, evaluation


def _evaluating(config: Config, iteration: int) -> bool:
    return iteration == config.run.iterations or _due(config.evaluation.every, iteration)


def _is_best(run: TrainingRun, metrics: dict[str, float]) -> bool:
    """Whether the metrics have a new largest value of run.best_metric."""
    name = run.config.run.best_metric
    best = name in metrics and metrics[name] > best_checkpoint(run.folder, name)[0]
    return run.world.broadcast(best)  # the processes measured different times, and must decide together


def _update(run: TrainingRun, scored: ScoredRollouts, clock: Clock) -> None:
    """The K updates of one iteration: one on the fresh batch, K - 1 on batches from the buffer. With
    rollout.engine=none there is no fresh batch, and all K are on batches from the buffer."""
    for k in range(run.config.replay.updates_per_iteration):
        # The first update uses the fresh batch, so that every trajectory is used at least once. The other batches are
        # random draws. With replay.batch_size=null a trajectory is used about K times on average.
        replayed = k > 0 or scored is NOTHING
        batch = scored.trajectories
        if replayed:
            batch = run.buffer.sample(run.config.replay_batch_size, run.rng, run.config.replay.draw)
        if not batch:
            continue  # k = 0: no fresh response has a score; k > 0: the buffer is empty too
        # Most replayed trajectories have their reference values already. After a reset, only the trajectories that are
        # drawn again cost a forward pass of the reference.
        with clock("reference") as progress:
            run.reference.annotate(batch, progress)
        with clock("update") as progress:
            update = run.learner.update(batch, progress)
        # Separate metrics: older policies generated the replayed batches, so the residuals of these differ.
        run.tracker.update("reval/replay" if replayed else "reval", update)
    if run.config.rollout.sleeps:  # vLLM takes its memory back past torch's allocator, which keeps what it once had
        torch.cuda.empty_cache()


def _check_scores(run: TrainingRun, scored: ScoredRollouts, iteration: int) -> None:
    """Raise RewardError if the scores cannot be used, or if there are none.

    One row that cannot be scored must not end the run, because a resumed run draws this row again. So the run goes on
    after an iteration without a score if it has few prompts, but not if nothing was ever scored.
    """
    if scored is NOTHING:
        return
    if scored.failure:
        raise RewardError(scored.failure)
    run.unscored_prompts = 0 if scored.trajectories else run.unscored_prompts + run.config.rollout.prompts
    last = iteration == run.config.run.iterations
    if run.unscored_prompts >= UNSCORED_PROMPTS or (run.unscored_prompts and last and not len(run.buffer)):
        raise RewardError(f"{scored.unscored()}\n{run.unscored_prompts} prompts in a row had no score")


def _record_responses(run: TrainingRun, scored: ScoredRollouts, iteration: int) -> None:
    """Write the samples, the rollouts and the reward function's exceptions of this iteration."""
    run.tracker.samples(iteration, scored.samples())
    if run.config.tracking.rollouts:
        run.tracker.rollouts(rollout_rows(scored.trajectories, scored.groups()))
    for exception in scored.exceptions:
        run.tracker.reward_error(iteration, exception)


def _due(every: int, iteration: int) -> bool:
    """True if `every` divides `iteration`. False if `every` is 0, which stands for never."""
    return bool(every) and iteration % every == 0


def _sync(run: TrainingRun, components: Components, fresh: list[Trajectory]) -> dict[str, float]:
    """Send the policy's weights to the rollout engine, and measure whether both compute the same log-probabilities."""
    config, engine, model = run.config, components.rollout_engine, components.model
    run.generation.sync(whole_weights(model), run.iteration)
    if engine.shares_weights or not config.rollout.probe_tokens:
        return {}  # an engine that generates with the policy itself cannot differ from the policy
    chosen = choose(
        [t.token_ids.tolist() for t in fresh],
        [int(t.action_mask.argmax()) for t in fresh],
        config.rollout.probe_tokens,
    )
    if not chosen[0]:
        return {}
    found = mismatch(engine, log_probs(model, *chosen, config.model), *chosen)
    return worst(components.world.gather(found))


def _evaluate_first(run: TrainingRun, components: Components) -> Evaluation | None:
    """The answers of the model before training. A resumed run reads the answers that it saved when it started."""
    saved = _evaluation_file(run, 0)
    if run.iteration and saved.exists():
        return Evaluation.load(saved)
    if run.iteration:
        return None  # the model before training is gone
    evaluation = _evaluate(run, components)
    run.tracker.evaluated(0, evaluation)
    return evaluation


def _evaluate(run: TrainingRun, components: Components) -> Evaluation | None:
    """Answer the evaluation problems with the current policy and save the answers. None if there are no problems."""
    if not components.evaluation_problems:
        return None
    try:
        with run.display.busy("answering the held-out problems"):
            result = evaluate_components(components, run.config)
    except RewardError as error:
        raise RunError(f"the evaluation after iteration {run.iteration}: {error}\n{_newest(run)}") from error
    if components.world.main:
        result.save(_evaluation_file(run, run.iteration))
    return result


def _evaluation_file(run: TrainingRun, iteration: int) -> Path:
    return run.folder / "evaluations" / f"iteration-{iteration:06d}.jsonl"


STAGES = {
    "rollout": "generating",
    "reward": "scoring",
    "reference": "computing reference values",
    "update": "updating",
    "sync": "sending the weights",
}
"""The stages of an iteration, and what the display says about them."""


@dataclass
class Clock:
    """Measures how many seconds each stage of one iteration takes, and tells the display which stage it is."""

    waiting: Waiting
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[Progress]:
        start = time.perf_counter()
        # With rollout.ahead, a sync waits until the engine has finished its requests.
        with self.waiting(STAGES[stage], asks_engine=stage in ("rollout", "sync")) as progress:
            yield progress
        if torch.cuda.is_available():
            # A GPU works asynchronously. Without this call, the next stage would include the time of this stage.
            torch.cuda.synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """`step_time` and `time/<stage>`, in seconds."""
        stages = {f"time/{stage}": seconds for stage, seconds in self.seconds.items()}
        return {"step_time": time.perf_counter() - self.started} | stages
