"""The forward pass: from a batch of trajectories to hidden states and token values.

Letters in shapes: B trajectories, M actions in all, H of the longest trajectory, D the width of the hidden states.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reval_kernels import TokenValues, linear_token_values
from reval_kernels.hf import OutputHead, at_head

from ..batching import Batch
from ..config import ModelConfig
from .attention import attention_for, layout_of
from .dtypes import head_precision

Result = TypeVar("Result")


def token_values(model: PreTrainedModel, batch: Batch, config: ModelConfig) -> TokenValues:
    """q, v and log_prob of every action of the batch: float32 [B, H], 0 where batch.mask is false, differentiable."""
    return TokenValues(*(batch.pad(x) for x in action_values(model, batch, config)[:3]))


def action_values(model: PreTrainedModel, batch: Batch, config: ModelConfig) -> TokenValues:
    """q, v and log_prob of every action of the batch: float32 [M], in the order of batch.actions, differentiable."""

    def values(hidden: Tensor, head: OutputHead) -> TokenValues:
        return linear_token_values(hidden, actions=batch.actions, **head._asdict())

    return with_hidden(model, batch, config, values)


def with_hidden(
    model: PreTrainedModel, batch: Batch, config: ModelConfig, function: Callable[[Tensor, OutputHead], Result]
) -> Result:
    """Run the forward pass and return function(hidden states [M, D], head).

    The hidden states are those of the states of all actions, in the type that the transformer computes in. With several
    processes, FSDP shards the model: `head.weight` is then whole only while `function` runs. For token values alone,
    call `token_values`.
    """
    if config.compute_dtype == "auto":
        raise ValueError(
            "model.compute_dtype must be float32 or bfloat16 by now; got auto, which reval.model.dtypes.with_dtypes "
            "replaces for the device"
        )
    precision = config.head_precision  # a run's settings name it; settings made by hand may say auto
    precision = head_precision(config) if precision == "auto" else precision
    bf16 = config.compute_dtype == "bfloat16" and config.dtype == "float32"
    cast = torch.autocast(model.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    inputs: dict[str, Any] = {"input_ids": batch.tokens, "position_ids": batch.positions}
    if batch.tree is not None:
        inputs["layout"] = layout_of(batch.tree, model.device)
    if batch.token_mask is not None:
        inputs["attention_mask"] = batch.token_mask

    def of_actions(hidden: Tensor, head: OutputHead) -> Result:
        return function(hidden.flatten(0, 1)[batch.states], head._replace(precision=precision))

    with cast, attention_for(model, batch.tree):
        return at_head(model, of_actions, **inputs)


def hidden_states(model: PreTrainedModel, batch: Batch, config: ModelConfig) -> Tensor:
    """The last hidden states [M, D] of the states of all actions, as the head gets them."""
    return with_hidden(model, batch, config, lambda hidden, head: hidden)
