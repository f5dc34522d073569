"""The forward pass: from a batch of trajectories to hidden states, where the head is whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..batching import Batch
from ..config import ModelConfig
from .dtypes import compute_dtype
from .head import OutputHead, head_of
from .sharding import inside, reshard

Result = TypeVar("Result")


def with_hidden(
    model: PreTrainedModel, batch: Batch, config: ModelConfig, function: Callable[[Tensor, OutputHead], Result]
) -> Result:
    """function(hidden [B, T, D], head) of the batch's states, where the head's weight is whole."""
    out = inside(model, lambda: function(hidden_states(model, batch, config), head_of(model)))
    if not torch.is_grad_enabled():
        reshard(model)  # no backward will do it
    return out


def hidden_states(model: PreTrainedModel, batch: Batch, config: ModelConfig) -> Tensor:
    """Hidden states [B, T, D] of the batch's states, in the type the transformer computes in.

    Where batch.share says so, a prompt that several trajectories share is computed once: its keys and values are
    repeated for them, and gradients flow back through them.
    """
    bf16 = compute_dtype(config) == torch.bfloat16 and config.dtype != "bfloat16"
    cast = torch.autocast(model.device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()
    body: Any = model.base_model
    prefixes, prefix_mask, of = batch.prefixes, batch.prefix_mask, batch.prefix_of
    whole = torch.cat([prefixes[of], batch.states], 1)
    attention = torch.cat([prefix_mask[of], batch.state_mask], 1)
    with cast:
        if batch.packed:
            return _packed_hidden(body, whole, attention.bool())[:, prefixes.shape[1] :]
        positions = (attention.cumsum(1) - 1).clamp(min=0)
        if batch.share:
            cache = body(
                input_ids=prefixes,
                attention_mask=prefix_mask,
                use_cache=True,
                position_ids=(prefix_mask.cumsum(1) - 1).clamp(min=0),
            ).past_key_values
            if type(cache) is DynamicCache:
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
    """Hidden states [B, S, D] computed on the true tokens alone, joined to one sequence; 0 elsewhere.

    transformers tells the trajectories apart by their positions, which start anew at 0.
    """
    positions = (mask.cumsum(1) - 1)[mask]
    packed = body(input_ids=ids[mask][None], position_ids=positions[None], use_cache=False).last_hidden_state[0]
    return packed.new_zeros(*mask.shape, packed.shape[-1]).masked_scatter(mask[..., None], packed)
