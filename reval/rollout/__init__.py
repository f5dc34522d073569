"""Rollouts: generating responses. The protocol of a rollout engine, and the engine that the settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import Config
from .protocol import Response, RolloutEngine, RolloutError, end_tokens

if TYPE_CHECKING:  # the process of an engine imports this package and starts faster without torch and transformers
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Response", "RolloutEngine", "RolloutError", "end_tokens", "make_rollout"]


def make_rollout(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, device: torch.device | None = None
) -> RolloutEngine:
    """The engine that `rollout.engine` names, for this policy.

    Args:
        model: if `device` is None, the policy itself; the hf engine generates with the policy if the dtypes agree. Else
            a model of the policy's shape, which the hf engine may keep. The weights of this model are not read.
        device: the policy's device. Give it for an engine with its own weights, which come with the first `sync`.

    A vllm engine has no weights before its first `sync`. Raises ValueError when the engine cannot be used here.
    """
    from ..model.dtypes import rollout_dtype, with_engine

    config = with_engine(config)
    settings, dtype = config.rollout, rollout_dtype(config)
    if settings.engine == "hf":
        from .hf import HFRollout

        if device is not None:
            model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` untyped
        return HFRollout(model, tokenizer, batch_size=settings.batch_size, dtype=dtype, private=device is not None)
    from .vllm import make_vllm

    return make_vllm(config, model, tokenizer, dtype, device or model.device)
