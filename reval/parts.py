"""What training and evaluation both need, made from the settings: model, problems, rollout engine, reward pool."""

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
from .models import load_model, rollout_dtype, whole_weights
from .rewards import RewardPool
from .rollout import RolloutEngine, make_rollout
from .sharding import unsharded


@dataclass(frozen=True, slots=True)
class Parts:
    """The pieces of a run, before anything has happened."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    training: list[Problem]
    held_out: list[Problem]
    rollout: RolloutEngine
    pool: RewardPool
    world: World


@contextmanager
def build(config: Config, checkpoint: Path | None = None) -> Iterator[Parts]:
    """Make the parts; worker processes stop when the block ends. Settings that cannot work raise ConfigError.

    With a checkpoint of a run the weights are its.
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
            training, held_out = load_problems(config.data, tokenizer, longest, config.evaluation)
            rollout = _rollout(config, model, tokenizer, processes)
            pool = RewardPool(config.reward.function, workers=config.reward.workers, timeout=config.reward.timeout)
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error
        with pool, closing(rollout):
            yield Parts(model, tokenizer, training, held_out, rollout, pool, processes)


def _rollout(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World) -> RolloutEngine:
    """The engine, holding the policy's weights. It generates with the policy itself where nothing speaks against it:
    neither shards, nor training at the same time, nor older weights, nor another dtype."""
    settings, dtype = config.rollout, rollout_dtype(config)
    alike = settings.engine == "hf" and dtype == model.dtype
    if alike and world.size == 1 and not settings.ahead and settings.sync_every == 1:
        return make_rollout(config, model, tokenizer)
    rollout = make_rollout(config, unsharded(model, dtype), tokenizer, device=model.device)
    rollout.sync(whole_weights(model))
    return rollout
