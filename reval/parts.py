"""What training and evaluation both need, made from the settings: model, problems, rollout engine, reward pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .config import Config, ConfigError
from .data import Problem, load_problems
from .models import load_model
from .rewards import RewardPool
from .rollout import RolloutEngine
from .rollout.hf import HFRollout


@dataclass(frozen=True, slots=True)
class Parts:
    """The pieces of a run, before anything has happened."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    training: list[Problem]
    held_out: list[Problem]
    rollout: RolloutEngine
    pool: RewardPool


@contextmanager
def build(config: Config) -> Iterator[Parts]:
    """Make the parts; the reward workers stop when the block ends. Settings that cannot work raise ConfigError."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, tokenizer = load_model(config.model, config.run.seed)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        training, held_out = load_problems(config.data, tokenizer, context - config.rollout.max_new_tokens)
        dtype = None if config.rollout.dtype == "same" else torch.bfloat16
        rollout = HFRollout(model, tokenizer, batch_size=config.rollout.batch_size, dtype=dtype)
        pool = RewardPool(config.reward.function, workers=config.reward.workers, timeout=config.reward.timeout)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    with pool:
        yield Parts(model, tokenizer, training, held_out, rollout, pool)
