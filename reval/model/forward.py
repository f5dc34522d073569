"""The forward pass: from a batch of trajectories to hidden states and token values.

Letters in shapes: B trajectories, T states of each, D the width of the hidden states, S tokens of a prompt prefix.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel

from reval_kernels import TokenValues, linear_token_values

from ..batching import Batch
from ..config import ModelConfig
from .dtypes import head_precision
from .head import OutputHead, head_of

Result = TypeVar("Result")


def token_values(model: PreTrainedModel, batch: Batch, config: ModelConfig) -> TokenValues:
    """q, v and log_prob of every action of the batch: float32 [B, T], 0 where batch.mask is false, differentiable."""

    def values(hidden: Tensor, head: OutputHead) -> TokenValues:
        return linear_token_values(hidden, actions=batch.actions, mask=batch.mask, **head._asdict())

    return with_hidden(model, batch, config, values)


def with_hidden(
    model: PreTrainedModel, batch: Batch, config: ModelConfig, function: Callable[[Tensor, OutputHead], Result]
) -> Result:
    """Run the forward pass and return function(hidden states [B, T, D], head).

    With several processes, FSDP shards the model: `head.weight` is then whole only while `function` runs. For token
    values alone, call `token_values`.
    """

    def forward() -> Result:
        precision = config.head_precision  # a run's settings name it; settings made by hand may say auto
        precision = head_precision(config) if precision == "auto" else precision
        return function(hidden_states(model, batch, config), head_of(model)._replace(precision=precision))

    run_gathered: Any = getattr(model, "run_gathered", None)  # model/sharding.py adds this method to a sharded model
    out = forward() if run_gathered is None else run_gathered(forward)
    if isinstance(model, FSDPModule) and not torch.is_grad_enabled():
        model.reshard()  # no backward pass follows, in which FSDP would free the head's weight
    return out


def hidden_states(model: PreTrainedModel, batch: Batch, config: ModelConfig) -> Tensor:
    """The last hidden states [B, T, D] of the batch, in the type that the transformer computes in.

    If batch.share is set, a prompt that several trajectories share is computed once. Its keys and values are repeated
    for each trajectory, and gradients flow back through them.
    """
    if config.compute_dtype == "auto":
        raise ValueError(
            "model.compute_dtype must be float32 or bfloat16 by now; got auto, which reval.model.dtypes.with_dtypes "
            "replaces for the device"
        )
    bf16 = config.compute_dtype == "bfloat16" and config.dtype == "float32"
    cast = torch.autocast(model.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    body: Any = model.base_model
    prefixes, prefix_mask, of = batch.prefixes, batch.prefix_mask, batch.prefix_of
    whole = torch.cat([prefixes[of], batch.states], 1)
    attention = torch.cat([prefix_mask[of], batch.state_mask], 1)
    with cast:
        if batch.packed:
            return _packed_hidden(body, whole, attention.bool())[:, prefixes.shape[1] :]
        # Position 0 is the first token that is not padding. Padding on the left would have position -1.
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        if batch.share:
            cache = body(
                input_ids=prefixes,
                attention_mask=prefix_mask,
                use_cache=True,
                position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0),
            ).past_key_values
            if type(cache) is DynamicCache:  # other kinds of cache cannot be repeated
                cache.batch_select_indices(of)
                return body(
                    input_ids=batch.states,
                    attention_mask=attention,
                    position_ids=positions[:, prefixes.shape[1] :],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
        out = body(input_ids=whole, attention_mask=attention, position_ids=positions, use_cache=False)
    return out.last_hidden_state[:, prefixes.shape[1] :]


def _packed_hidden(body: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states [B, S + T, D], computed from one sequence of all tokens without padding; 0 at padding.

    transformers finds the start of each trajectory in the packed sequence by its position 0.
    """
    positions = (mask.cumsum(1) - 1)[mask]
    packed = body(input_ids=ids[mask][None], position_ids=positions[None], use_cache=False).last_hidden_state[0]
    return packed.new_zeros(*mask.shape, packed.shape[-1]).masked_scatter(mask[..., None], packed)
