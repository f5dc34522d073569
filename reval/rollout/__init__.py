"""Rollouts: generating responses. The protocol of a rollout engine, and the engine that the settings name."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from ..config import ENGINES, Config, ConfigError
from ..user_code import find
from .protocol import Response, RolloutEngine, RolloutError, end_tokens

if TYPE_CHECKING:  # the process of an engine imports this package and starts faster without torch and transformers
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Response", "RolloutEngine", "RolloutError", "end_tokens", "make_rollout", "own_engine"]

PARTS = [name for name in (*RolloutEngine.__annotations__, *vars(RolloutEngine)) if not name.startswith("_")]
"""What an engine must have: the attributes and methods of the protocol."""


def own_engine(name: str) -> Any:
    """The user's class that `rollout.engine` names, or None for an engine of the trainer.

    Raises ConfigError if there is no such class, or if it lacks a part of the protocol.
    """
    if name in ENGINES:
        return None
    found = find(name, "rollout.engine", ENGINES, ConfigError)
    if missing := [part for part in PARTS if not hasattr(found, part)]:
        raise ConfigError(
            f"rollout.engine {name!r} lacks {', '.join(missing)}: an engine is a class with {', '.join(PARTS)} "
            "(docs/extending.md)"
        )
    return found


def make_rollout(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, device: torch.device | None = None
) -> RolloutEngine:
    """The engine that `rollout.engine` names, for this policy.

    Args:
        model: if `device` is None, the policy itself; the hf engine generates with the policy if the dtypes agree. Else
            a model of the policy's shape, which the hf engine may keep. The weights of this model are not read.
        device: the policy's device. Give it for an engine with its own weights, which come with the first `sync`.

    An engine of the user is made with model, tokenizer and rollout.options. A vllm engine has no weights before its
    first `sync`. Raises ValueError when the engine cannot be used here.
    """
    from ..model.dtypes import rollout_dtype, with_engine

    config = with_engine(config)
    settings, dtype = config.rollout, rollout_dtype(config)
    if (own := own_engine(settings.engine)) is not None:
        try:
            inspect.signature(own).bind(model, tokenizer, **settings.options)
        except TypeError as error:
            raise ConfigError(
                f"rollout.engine {settings.engine!r} is made by {own.__name__}(model, tokenizer, **rollout.options), "
                f"which does not fit its constructor: {error}"
            ) from error
        return own(model, tokenizer, **settings.options)
    if settings.engine == "hf":
        from .hf import HFRollout

        if device is not None:
            model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` untyped
        return HFRollout(model, tokenizer, batch_size=settings.batch_size, dtype=dtype, private=device is not None)
    from .vllm import make_vllm

    return make_vllm(config, model, tokenizer, dtype, device or model.device)
