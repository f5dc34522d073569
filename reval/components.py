"""The components of a run, made from the settings: model, tokenizer, problems, rollout engine and reward pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .config import Config, ConfigError
from .data import Problem, load_problems
from .distributed import World, world
from .model.dtypes import rollout_dtype
from .model.loading import load_model
from .model.saving import whole_weights
from .model.sharding import unsharded
from .rewards import RewardPool
from .rollout import RolloutEngine, make_rollout


@dataclass(frozen=True, slots=True)
class Components:
    """Everything that training and evaluation both need."""

    model: PreTrainedModel
    """The policy."""
    tokenizer: PreTrainedTokenizerBase
    training_problems: list[Problem]
    evaluation_problems: list[Problem]
    """The held-out problems first, then the problems of each benchmark. Training uses none of them."""
    rollout_engine: RolloutEngine
    """Generates responses with the policy's weights."""
    reward_pool: RewardPool
    """Runs reward.function."""
    world: World


@contextmanager
def build(config: Config, checkpoint: Path | None = None) -> Iterator[Components]:
    """Make the components. The worker processes stop when the block ends.

    Args:
        config: all settings.
        checkpoint: the checkpoint of a run. The model gets the weights of this checkpoint.

    Raises ConfigError for settings that cannot work.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with world(config.model.device, config.distributed.timeout) as processes:
        try:
            model, tokenizer = load_model(config.model, config.run.seed, config.lora, processes, checkpoint)
            context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
            longest = context - config.rollout.max_new_tokens
            training, evaluation = load_problems(config.data, tokenizer, longest, config.evaluation)
            engine = _rollout_engine(config, model, tokenizer, processes)
            pool = RewardPool(config.reward.function, workers=config.reward.workers, timeout=config.reward.timeout)
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error
        with pool, closing(engine):
            yield Components(model, tokenizer, training, evaluation, engine, pool, processes)


def _rollout_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World
) -> RolloutEngine:
    """The rollout engine, with the policy's weights.

    The hf engine generates with the policy itself, without a copy, if all of this holds: one process (no shards),
    nothing is generated while the policy trains (rollout.ahead=0), the engine never uses older weights
    (rollout.sync_every=1), and the weights that generate have the policy's dtype.
    """
    settings, dtype = config.rollout, rollout_dtype(config)
    alike = settings.engine == "hf" and dtype == model.dtype
    if alike and world.size == 1 and not settings.ahead and settings.sync_every == 1:
        return make_rollout(config, model, tokenizer)
    engine = make_rollout(config, unsharded(model, dtype), tokenizer, device=model.device)
    engine.sync(whole_weights(model))
    return engine
