"""The state of a training run: everything that changes while it trains, and the outputs that record it."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from random import Random

from .advice import ValueLag, at_start
from .checkpoint import load_checkpoint
from .components import Components
from .config import Config, ConfigError, load_config
from .display import Display
from .learner import Learner
from .reference_policy import ReferencePolicy
from .replay import ReplayBuffer
from .rollout.generation import Generation, ProblemSampler
from .rollout_log import load_rollouts
from .run_folder import find_checkpoint, read_state, take_over
from .run_lock import locked
from .tracking import Tracker


class TrainingRun:
    """The state of a run. A checkpoint saves it (checkpoint.py).

    Args:
        config: all settings.
        components: model, problems, rollout engine and reward pool.
        checkpoint: the checkpoint that the run continues from. Its weights are in components.model already. None for a
            new run.
        stack: closes the threads and files of the run at its end.

    Raises ConfigError or ValueError for settings that cannot work.
    """

    def __init__(self, config: Config, components: Components, checkpoint: Path | None, stack: ExitStack):
        self.config, self.world, self.tokenizer = config, components.world, components.tokenizer
        self.iteration = 0
        """The last finished iteration."""
        self.unscored_prompts = 0
        """How many of the last prompts in a row had no response with a score. Only whole iterations are counted."""
        self.rng = Random(config.run.seed)
        """Draws the replayed batches. It has the same seed on every process, so all processes draw the same batches."""
        self.problems = ProblemSampler(components.training_problems, config.run.seed)
        self.problem_digests = components.problem_digests
        self.buffer = ReplayBuffer(config.replay.capacity)
        preload = None
        if config.replay.preload and checkpoint is None:
            # The main process reads the file, which may call the reward function.
            preload = self.world.from_main(lambda: load_rollouts(config, components))
            self.buffer.add(preload.trajectories)
        self.reference = ReferencePolicy(components.model, config, components.world, checkpoint)
        self.learner = Learner(components.model, config, components.world)
        self.generation = Generation(
            components.rollout_engine, components.actor, self.problems, config, components.world
        )
        stack.callback(self.generation.close)
        # The checkpoint comes before the folder: a checkpoint that does not fit must leave the folder untouched.
        if checkpoint is not None:
            load_checkpoint(checkpoint, self)
            saved = load_config([checkpoint / "config.yaml"]).reference.reset_every
            if config.reference.reset_every == 1 != saved:
                # Trajectories take their behaviour log-probs from a reference that is the policy at the start of the
                # iteration. That of the checkpoint is older.
                self.reference.reset()
        self.folder = Path(config.run.dir)
        self.previous = checkpoint
        """The checkpoint that this run loaded or saved last."""
        self.tracker = components.world.together(lambda: self._start_tracker(stack))
        self.display = stack.enter_context(Display(config, self.iteration, quiet=not self.world.main))
        if hasattr(components.rollout_engine, "progress"):
            components.rollout_engine.progress = self.display.waiting.engine_progress()
        if (left := len(components.training_problems)) < config.rollout.prompts and config.generates:
            self.display.note(
                f"training has {left} problem{'s'[: left > 1]} (data.held_out={config.data.held_out}), fewer than "
                f"rollout.prompts={config.rollout.prompts}: each iteration uses some of them several times"
            )
        for text in at_start(config):
            self.display.note(text)
        self.value_lag = ValueLag(config)
        if preload is not None:
            for text in preload.notes(config.replay.capacity):
                self.display.note(text)
            for exception in preload.exceptions:
                self.tracker.reward_error(0, exception)

    def _start_tracker(self, stack: ExitStack) -> Tracker:
        """Lock the run folder and take it over. This comes last, because everything before may still fail."""
        config, resumed, main = self.config, self.previous, self.world.main
        tracked = read_state(resumed)["tracker"] if resumed is not None else None
        if main:
            stack.enter_context(locked(self.folder))
            if config.run.resume == "auto" and find_checkpoint(config) != resumed:
                raise ConfigError(
                    f"another run saved a checkpoint in run.dir {config.run.dir!r} meanwhile; start again"
                )
        with take_over(config, resumed, self.iteration) if main else nullcontext():
            return stack.enter_context(Tracker(self.folder, config, self.iteration, tracked, main))
