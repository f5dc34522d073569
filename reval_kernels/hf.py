"""Token values of any causal language model of transformers, without logits: `token_values_of`.

Which state goes with which token. A model reads T tokens and has a hidden state after each of them:

    position            0         1         2         3
    input_ids           The       sky       is        blue
    state               h0        h1        h2        h3
    what h stands for   "The"     "The sky" ...       all of it
    action (default)    sky       is        blue      -          the token that was chosen in the state
    attention_mask      1         1         1         1
    mask                false     true      true      -          true where the policy chose: here after "The sky"

By default the action of a state is the next token of input_ids, so the outputs are [B, T - 1]: output [b, t] belongs to
the token input_ids[b, t + 1]. With `actions` [B, T] there is no shift: output [b, t] belongs to actions[b, t].
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checks
from .model_head import (
    OutputHead,
    at_head,
    at_sharded_head,
    causal_lm,
    head_of,
    note_transform,
    transform_of,
)
from .types import TokenValues
from .values import linear_token_values

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["OutputHead", "at_head", "head_of", "note_transform", "token_values_of", "transform_of"]

IDS = (torch.int64, torch.int32)
MEDIA = ("pixel", "image", "video", "mm_token")
"""Parts of the names of inputs from which a model may make positions: those of images and videos have several axes."""
FLAGS = (torch.bool, torch.int64, torch.int32, torch.uint8, *checks.FLOATS)


def token_values_of(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    actions: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    with_entropy: bool = False,
    precision: str = "exact",
    backend: str | None = None,
    **model_inputs: Any,
) -> TokenValues:
    """`token_values` of a model's logits. The logits are never stored as a whole, and only those of actions are
    computed.

    The model is called as it is (`model(input_ids=..., ...)`), so a wrapper (FSDP2, DistributedDataParallel, peft,
    torch.compile), autocast, gradient checkpointing and hooks do what they do in any call. What the model does to its
    hidden states and logits (norms, biases, softcap, scales) is done here too, or refused. The first call for a model
    measures it, and waits for the device.

    Args:
        model: a causal language model of transformers; also inside DistributedDataParallel, torch.compile or peft.
        input_ids: [B, T] int64 or int32. Packed sequences are [1, N] with position_ids that start again at 0.
        attention_mask: [B, T], 0 at padding, on the left or on the right. No output belongs to a state or a next token
            at padding, whatever `mask` says. Another form ([B, 1, T, T], a dict) is passed to the model as it is. With
            packed sequences it may pad on the right only, and the model does not get it.
        position_ids: [B, T] or [1, T], passed to the model. Where they do not grow, another sequence begins, and the
            first token of a sequence is no action. If they are not given and attention_mask is [B, T], positions count
            the tokens that are not padding, as in transformers' `generate`; with images or videos the model makes them.
            A model with several axes of positions (Qwen2-VL) also takes [N, B, T], in which no sequences are seen.
        actions: [B, T] int64 or int32, the token taken in each state. By default the next tokens, [B, T - 1].
        mask: bool, of the shape of the actions; true where the token is an action.
        temperature: as in `token_values`; a tensor has the shape of the actions. The model's own scale of its logits is
            applied in addition.
        with_entropy, precision, backend: as in `linear_token_values`.
        model_inputs: passed to the model, for example cu_seq_lens_q, or pixel_values.

    Returns:
        TokenValues [B, T - 1] (with `actions` [B, T]) of float32 (float64 for a float64 model), differentiable in all
        parameters of the model. They are 0 where masked out. A model's auxiliary loss (of routers) is not returned.

    Raises:
        TypeError: `model` is no causal language model, or an argument has a wrong dtype.
        ValueError: an argument has a wrong shape; the model does to its logits what no argument of
            `linear_token_values` describes; its head has an adapter.
    """
    inner = causal_lm(model)
    checks.tensor("input_ids", input_ids, IDS, ["B", "T"], None)
    shift = actions is None
    actions, wanted, temperature = _tokens(input_ids, actions, mask, temperature)
    real = None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        checks.tensor("attention_mask", attention_mask, FLAGS, input_ids.shape, input_ids.device)
        real = attention_mask != 0
        wanted = wanted & (real & _next(real, False) if shift else real)
    if position_ids is not None:
        _check_positions(inner, position_ids, input_ids)
        if position_ids.dim() == 2:
            if shift:
                wanted = wanted & (_next(position_ids, -1) > position_ids)
            if real is not None and _packed(position_ids, real):
                # transformers tells sequences apart by position_ids only where no mask is given
                _check_padding_on_the_right(real)
                attention_mask = None
    elif "cu_seq_lens_q" in model_inputs:
        raise ValueError("cu_seq_lens_q needs position_ids, which start again at 0 for each sequence")
    elif real is not None and not any(word in name for name in model_inputs for word in MEDIA):
        position_ids = _positions(inner, real)
    given = {"attention_mask": attention_mask, "position_ids": position_ids} | model_inputs
    inputs = {"input_ids": input_ids} | {name: x for name, x in given.items() if x is not None}

    def values(hidden: Tensor, head: OutputHead, group: ProcessGroup | None) -> TokenValues:
        if hidden.shape[:-1] != input_ids.shape:
            raise ValueError(
                f"the head of {type(inner).__name__} gets states of shape {list(hidden.shape)} for input_ids of shape "
                f"{list(input_ids.shape)}; values need one state a token"
            )
        device = hidden.device
        scale: Any = temperature.to(device) if isinstance(temperature, Tensor) else temperature
        return linear_token_values(
            hidden,
            actions=actions.to(device),
            mask=wanted.to(device),
            with_entropy=with_entropy,
            backend=backend,
            process_group=group,
            **head._replace(precision=precision, temperature=head.temperature * scale)._asdict(),
        )

    out = at_sharded_head(model, values, inputs)
    parts: Any = [x if x is None or not shift else x[:, :-1] for x in out]
    return TokenValues(*parts)


def _tokens(
    input_ids: Tensor, actions: Tensor | None, mask: Tensor | None, temperature: float | Tensor
) -> tuple[Tensor, Tensor, float | Tensor]:
    """Actions, mask and temperature [B, T]: with the shift, the last state of each row has no action."""
    batch, length = input_ids.shape
    device, shift = input_ids.device, actions is None
    if shift and length < 2:
        raise ValueError(f"input_ids must have at least 2 tokens a row, or actions be given; got {[batch, length]}")
    if actions is not None:
        checks.tensor("actions", actions, IDS, input_ids.shape, device)
    shape = torch.Size([batch, length - shift])
    if mask is not None:
        checks.tensor("mask", mask, [torch.bool], shape, device)
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        checks.tensor("temperature", temperature, checks.FLOATS, shape, device)
        temperature = torch.nn.functional.pad(temperature, (0, int(shift)), value=1.0)
    wanted = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
    if shift:
        return _next(input_ids, 0), torch.nn.functional.pad(wanted, (0, 1)), temperature
    assert actions is not None
    return actions, wanted, temperature


def _next(x: Tensor, end: int | bool) -> Tensor:
    """`x` of the next token; `end` after the last one."""
    return torch.nn.functional.pad(x[:, 1:], (0, 1), value=end)


def _positions(inner: Any, real: Tensor) -> Tensor | None:
    """The positions of the tokens that are not padding. None if the model makes its own."""
    if "position_ids" not in inspect.signature(type(inner).forward).parameters:
        return None
    if any(hasattr(m, "create_position_ids_from_input_ids") for m in inner.modules()):  # RoBERTa starts at pad + 1
        return None
    return (real.long().cumsum(1) - 1).clamp(min=0)


def _check_positions(inner: Any, position_ids: Any, input_ids: Tensor) -> None:
    """Raise ValueError for a shape of position_ids that does not fit input_ids [B, T]."""
    checks.tensor("position_ids", position_ids, IDS, None, None)
    batch, length = input_ids.shape
    several = any(hasattr(m, "get_rope_index") for m in inner.modules())  # rotary positions in time, height and width
    dims = (2, 3) if several else (2,)
    if position_ids.dim() not in dims or position_ids.shape[-1] != length or position_ids.shape[-2] not in (1, batch):
        more = f", or [N, {batch}, {length}]" if several else ""
        raise ValueError(
            f"position_ids must have shape [{batch}, {length}] or [1, {length}]{more}, as input_ids have; got "
            f"{list(position_ids.shape)}"
        )


def _packed(position_ids: Tensor, real: Tensor) -> bool:
    """Whether a row has several sequences: the position of a token is not above all positions before it."""
    highest = position_ids.masked_fill(~real, -1).cummax(1).values
    before = torch.nn.functional.pad(highest[:, :-1], (1, 0), value=-1)
    return bool((real & (position_ids <= before)).any())


def _check_padding_on_the_right(real: Tensor) -> None:
    """Raise ValueError for padding before a token, which would see it if the model gets no mask."""
    if bool((real[:, 1:] & ~real[:, :-1]).any()):
        raise ValueError(
            "attention_mask must pad on the right only, or not be given, where position_ids pack several sequences in "
            "a row: transformers ignores the packing if it gets a mask [B, T]; got padding before a token"
        )
