"""The state of a training run: everything that changes while it trains, and the outputs that record it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from random import Random

from .checkpoint import load_checkpoint
from .components import Components
from .config import Config
from .display import Display
from .learner import Learner
from .reference_policy import ReferencePolicy
from .replay import ReplayBuffer, load_rollouts
from .rollout.generation import Generation, ProblemSampler
from .run_folder import prepare_folder, read_state
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
        self.rng = Random(config.run.seed)
        """Draws the replayed batches. It has the same seed on every process, so all processes draw the same batches."""
        self.problems = ProblemSampler(components.training_problems, config.run.seed)
        self.buffer = ReplayBuffer(config.replay.capacity)
        if config.replay.preload and checkpoint is None:
            self.buffer.add(load_rollouts(config.replay.preload, components.model.config.get_text_config().vocab_size))
        self.reference = ReferencePolicy(components.model, config, components.world, checkpoint)
        self.learner = Learner(components.model, config, components.world)
        self.generation = Generation(components.rollout_engine, self.problems, config, components.world)
        stack.callback(self.generation.close)
        # The checkpoint comes before the folder: a checkpoint that does not fit must leave the folder untouched.
        if checkpoint is not None:
            load_checkpoint(checkpoint, self)
        main = components.world.main
        self.folder = prepare_folder(config, checkpoint, self.iteration) if main else Path(config.run.dir)
        self.previous = checkpoint
        """The checkpoint that this run loaded or saved last."""
        components.world.barrier()  # until the main process has prepared the folder
        tracked = read_state(checkpoint)["tracker"] if checkpoint is not None else None
        self.tracker = stack.enter_context(Tracker(self.folder, config, self.iteration, tracked, main))
        self.display = stack.enter_context(Display(config, self.iteration, quiet=not main))
