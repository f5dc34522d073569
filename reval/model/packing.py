"""Which forms of a micro-batch a model can compute, and which one it gets.

A model that does more than plain causal attention would compute a prefix tree wrongly, and no error would say so. So
nothing is taken from its name: it computes a few tokens in each form once, when it is loaded, and the results are
compared.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedModel

from ..batching import Form, MicroBatch, collate, plan
from ..config import Config, ConfigError, ModelConfig
from ..distributed import World
from ..replay import Trajectory
from .attention import NAME
from .forward import hidden_states

TREE_ATTENTIONS = ("sdpa", "eager", "flex_attention")
"""Values of model.attn_implementation that `tree_attention` may stand for: all compute plain attention."""
REACH = 1 << 20
"""The longest trajectory for which a model's mask is looked at. A mask that is causal up to here is causal."""


class Packing(NamedTuple):
    """What a model can compute without padding."""

    longest: int
    """Trajectories with at most this many tokens can be a prefix tree."""
    joined: bool
    """Trajectories can stand one after the other in one row, in an attention that knows such rows."""
    reason: str
    """Why something is not possible. Empty if all is."""


def plan_for(model: PreTrainedModel, trajectories: list[Trajectory], world: World, config: Config) -> list[MicroBatch]:
    """The micro-batches of this process, in the form that suits model and settings (`plan`)."""
    form = form_for(model, max(map(len, trajectories)) - 1, config)
    return plan(trajectories, world, model.device, form, config.optim.micro_batch_tokens)


def form_for(model: PreTrainedModel, longest: int, config: Config) -> Form:
    """The form of micro-batches whose longest trajectory has `longest` tokens.

    Raises ConfigError for optim.packing=packed if the model needs padding.
    """
    if config.optim.packing == "padded":
        return Form.PADDED
    attention, packing = config.model.attn_implementation, packing_of(model)
    if attention in TREE_ATTENTIONS and longest <= packing.longest:
        return Form.TREE
    if attention.startswith("flash_attention") and packing.joined:
        return Form.JOINED
    if config.optim.packing == "auto":
        return Form.PADDED
    if attention not in TREE_ATTENTIONS:
        reason = f"model.attn_implementation is {attention}"
    else:
        reason = packing.reason or f"it packs at most {packing.longest} tokens of a trajectory, and one has {longest}"
    raise ConfigError(f"optim.packing=packed is not possible with {type(model).__name__}: {reason}. Set auto or padded")


def packing_of(model: PreTrainedModel) -> Packing:
    """What the model can compute. The first call looks; under FSDP it must come before the model is sharded."""
    if not hasattr(model, "reval_packing"):
        note_packing(model, _look(model))
    packing: Any = model.reval_packing
    return packing


def note_packing(model: PreTrainedModel, packing: Packing) -> PreTrainedModel:
    """Keep on the model what it can compute: only the main process has looked. Returns the model."""
    setattr(model, "reval_packing", packing)  # noqa: B010
    return model


@torch.no_grad()
def _look(model: PreTrainedModel) -> Packing:
    few = [(1, 2, 3, 4, 5), (1, 2, 3, 6), (1, 7, 8), (9, 2, 3, 4)]
    embedding: Any = model.get_input_embeddings()
    members = [_trajectory(np.array(ids) % embedding.weight.shape[0]) for ids in few]
    padded = _hidden(model, members, Form.PADDED)
    try:
        joined = _near(_hidden(model, members, Form.JOINED), padded)
    except Exception:  # as below
        joined = False
    try:
        longest = _longest(model, members[:1])
        if not _near(_hidden(model, members, Form.TREE), padded):
            return Packing(0, joined, "its tokens depend on more than the tokens before them and their positions")
    except Exception as error:  # what an unknown model raises, if it cannot take our arguments, is unknown
        return Packing(0, joined, str(error) or type(error).__name__)
    return Packing(longest, joined, "")


def _trajectory(ids: np.ndarray) -> Trajectory:
    return Trajectory(token_ids=ids, action_mask=np.arange(len(ids)) > 0, reward=0.0, score=0.0, iteration=0)


def _hidden(model: PreTrainedModel, members: list[Trajectory], form: Form) -> Tensor:
    return hidden_states(model, collate(members, model.device, form), ModelConfig())


def _near(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding. Tokens that see a wrong token differ by about as much as hidden states are large."""
    return bool((a - b).abs().max() <= (1e-3 if a.dtype == torch.float32 else 5e-2) * b.abs().max())


def _longest(model: PreTrainedModel, one: list[Trajectory]) -> int:
    """The longest trajectory for which every mask that the model asks for is the plain causal one.

    A sliding window, for example, is in the mask of some models only.
    """
    found: list[int] = []

    def look(*, mask_function: Any, **_: Any) -> None:
        zero, far = torch.tensor(0), torch.arange(REACH)
        first = mask_function(zero, zero, far, zero)  # which tokens see the first one
        if mask_function(zero, zero, zero, torch.tensor(1)):
            raise NotImplementedError("its attention is not causal")
        found.append(sys.maxsize if first.all() else int(first.int().argmin()))

    AttentionMaskInterface.register(NAME, look)
    try:
        _hidden(model, one, Form.TREE)
    finally:
        del AttentionMaskInterface._global_mapping[NAME]
    if not found:
        raise NotImplementedError("it makes its own attention masks")
    return min(found)
