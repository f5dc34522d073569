"""The components of a run, made from the settings: model, tokenizer, problems, rollout engine and reward pool."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from .config import Config, ConfigError
from .data import Problem, Problems, load_problems
from .distributed import World, world
from .environments import EnvironmentPool
from .model.dtypes import rollout_dtype
from .model.loading import load_model
from .model.saving import whole_weights
from .model.sharding import unsharded
from .rewards import RewardPool, check_columns
from .rollout import RolloutEngine, make_rollout, own_engine
from .rollout.actor import Actor
from .rollout.none import NoRollout
from .sources import check_files


@dataclass(frozen=True, slots=True)
class Components:
    """Everything that training and evaluation both need."""

    model: PreTrainedModel
    """The policy."""
    tokenizer: PreTrainedTokenizerBase
    training_problems: list[Problem]
    evaluation_problems: list[Problem]
    """The held-out problems first, then the problems of each benchmark. Training uses none of them."""
    problem_digests: dict[str, str]
    """See Problems.digests."""
    held_out_prompts: frozenset[tuple[int, ...]]
    """See Problems.held_out."""
    rollout_engine: RolloutEngine
    """Generates with the policy's weights."""
    actor: Actor
    """Responds to problems, with the engine and the environment."""
    reward_pool: RewardPool | None
    """Runs reward.function. None if an environment gives the rewards."""
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
    with world(config.model.device, config.distributed.timeout) as processes, ExitStack() as stack:
        try:
            processes.from_main(lambda: check_files(config))  # first, because loading the model takes long
            model, tokenizer = load_model(config.model, config.run.seed, config.lora, processes, checkpoint)
            # The main process makes the problems, because another process may read or generate other ones.
            problems = processes.from_main(lambda: _problems(config, model, tokenizer))
            answering = bool(problems.evaluation)
            engine = stack.enter_context(closing(_rollout_engine(config, model, tokenizer, processes, answering)))
            environments, rewards = _scorers(config, stack)
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error
        actor = Actor(engine, config, tokenizer, environments, _engine_context(model, config))
        yield Components(model, tokenizer, *problems, engine, actor, rewards, processes)


def _scorers(config: Config, stack: ExitStack) -> tuple[EnvironmentPool | None, RewardPool | None]:
    """The workers of environment.name, or of reward.function if there is no environment."""
    own = config.environment
    if own.name is None:
        rewards = RewardPool(config.reward.function, workers=config.reward.workers, timeout=config.reward.timeout)
        return None, stack.enter_context(rewards)
    environments = EnvironmentPool(own.name, own.options, workers=own.workers, timeout=own.timeout)
    return stack.enter_context(environments), None


def _problems(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Problems:
    """The problems. Raises ValueError for one that the model cannot read or the reward function can never score."""
    context, shape = _context(model), model.config.get_text_config()
    longest = context - config.rollout.max_new_tokens
    if longest < 1 and config.generates:
        raise ValueError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a prompt: the model's context "
            f"has {context} tokens"
        )
    if config.environment.name is not None and tokenizer.chat_template is None:
        raise ValueError("environment.name needs a model with a chat template, which separates the turns; it has none")
    problems = load_problems(config.data, tokenizer, longest, config.evaluation, config.environment, config.generates)
    for problem in problems.training + problems.evaluation:
        if (largest := max(problem.token_ids)) >= shape.vocab_size:
            raise ValueError(
                f"{problem.where}: the token {largest} ({tokenizer.decode([largest])!r}) is not in the model's "
                f"vocabulary of {shape.vocab_size}; the tokenizer has more tokens than the model"
            )
        if problem.benchmark is None and config.environment.name is not None:
            continue  # an environment says itself, at its reset, which columns it needs
        try:
            check_columns(_reward_function(problem, config), problem.columns)
        except ValueError as error:
            raise ValueError(f"{problem.where}: {error}") from None
    return problems


def _context(model: PreTrainedModel) -> int:
    """Maximum number of tokens of the model's context."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def _engine_context(model: PreTrainedModel, config: Config) -> int:
    """Maximum number of tokens that the engine reads: vLLM may be started for fewer than the model can."""
    own = config.rollout.vllm_options.get("max_model_len") if config.rollout.engine == "vllm" else None
    return min(_context(model), own or 1 << 30)


def _reward_function(problem: Problem, config: Config) -> str:
    return config.reward.function if problem.benchmark is None else config.evaluation.reward


def _rollout_engine(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, answering: bool
) -> RolloutEngine:
    """The rollout engine, with the policy's weights.

    With rollout.engine=none it only answers the evaluation problems: it is hf, or NoRollout if there is none to answer.

    The hf engine generates with the policy itself, without a copy, if all of this holds: one process (no shards),
    nothing is generated while the policy trains (rollout.ahead=0), the engine never uses older weights
    (rollout.sync_every=1), and the weights that generate have the policy's dtype. An engine of the user that shares
    the policy's weights needs all of this.
    """
    if not config.generates:
        if not answering:
            return NoRollout()
        config = replace(config, rollout=replace(config.rollout, engine="hf"))
    settings, dtype = config.rollout, rollout_dtype(config)
    own = own_engine(settings.engine)
    shares = own.shares_weights if own is not None else settings.engine == "hf"
    alike = dtype == model.dtype and world.size == 1 and not settings.ahead and settings.sync_every == 1
    if shares and alike:
        return make_rollout(config, model, tokenizer)
    if shares and own is not None:
        raise ValueError(
            f"rollout.engine {settings.engine!r} generates with the policy itself (shares_weights is true). This needs "
            "one process, rollout.ahead=0, rollout.sync_every=1 and a rollout.dtype that is model.dtype"
        )
    engine = make_rollout(config, unsharded(model, dtype), tokenizer, device=model.device)
    engine.sync(whole_weights(model))
    return engine
