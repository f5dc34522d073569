"""The keys and values of a batch of sequences that are decoded: one slot for each token.

The tensors keep their shape and their place in memory from step to step, so a step can be captured as a CUDA graph. A
batch that needs more slots gets larger tensors, and a batch that has lost sequences gets smaller ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

GROUPED = "reval_grouped"
"""The name of `grouped_attention` in transformers."""
MULTIPLE = 16
"""The number of slots is a multiple of this, because attention kernels of GPUs copy a mask of another width."""


def is_plain(cache: Any) -> bool:
    """Whether the cache holds all keys and values of all tokens, and nothing else: no sliding window, no state."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def grouped_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention `sdpa`, without copies of keys and values when each sequence has one new token.

    The heads that share keys and values are computed as if they were consecutive tokens: the mask is the same for all.
    query [B, heads, new tokens, D]; key and value [B, groups, slots, D]; the result [B, new tokens, heads, D].
    """
    batch, heads, new, width = query.shape
    if new > 1 or attention_mask is None or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return out.reshape(batch, 1, heads, value.shape[-1]), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


class _Layer(StaticLayer):
    """Keys and values of one layer, [B, heads, slots, D] each. The next token goes to `slot`, a tensor [1]."""

    def __init__(self, keys: Tensor, values: Tensor, slot: Tensor):
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.slot = keys, values, slot
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return self.slot[0]


class Slots:
    """The cache of a batch of B sequences, each of which gets one token in a step.

    Args:
        cache: the keys and values of the prompts, one row for each prompt. It is emptied.
        valid: [prompts, slots so far], False where a row has padding.
        count: number of sequences for each prompt.
        most: largest number of slots that will be needed.
    """

    def __init__(self, cache: DynamicCache, valid: Tensor, count: int, most: int):
        used = valid.shape[1]
        self._most = _rounded(most)
        size = self._size(used + 1)
        self.slot = torch.tensor([used], device=valid.device)
        """[1]: the slot of the next token, the same for all sequences."""
        self.valid = F.pad(valid.repeat_interleave(count, 0), (0, size - used))
        """[B, slots]: True where a sequence has a token."""
        self.positions = valid.sum(-1, keepdim=True).repeat_interleave(count, 0)
        """[B, 1]: the position of the next token in its sequence."""
        self._used = used
        layers: list[Any] = []
        plain: list[Any] = cache.layers  # see `is_plain`
        for layer in plain:
            keys, values = _repeated(layer.keys, count, size), _repeated(layer.values, count, size)
            layer.keys = layer.values = None  # the memory of one layer at a time is needed twice
            layers.append(_Layer(keys, values, self.slot))
        self._layers, self.cache = layers, Cache(layers=layers)

    @property
    def shape(self) -> torch.Size:
        """(B, slots)."""
        return self.valid.shape

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[B, 1, 1, slots]: what is added to the attention's logits."""
        mask = torch.zeros(self.shape, dtype=dtype, device=self.valid.device)
        return mask.masked_fill(~self.valid, torch.finfo(dtype).min)[:, None, None]

    def reserve(self) -> bool:
        """Make room for one more token. Returns True if the tensors were replaced by larger ones."""
        self._used += 1
        if self._used <= self.shape[1]:
            return False
        more = self._size(self._used) - self.shape[1]
        self.valid = F.pad(self.valid, (0, more))
        for layer in self._layers:
            layer.keys, layer.values = (F.pad(x, (0, 0, 0, more)) for x in (layer.keys, layer.values))
        return True

    def keep(self, rows: Tensor) -> None:
        """Keep these sequences only. `rows`: their indices, int64 [kept]."""
        self.valid, self.positions = self.valid[rows], self.positions[rows]
        for layer in self._layers:
            layer.keys, layer.values = layer.keys[rows], layer.values[rows]

    def _size(self, used: int) -> int:
        """A number of slots that leaves room to grow: copies are rare, and at most half of the slots are empty."""
        return min(_rounded(2 * used), self._most)


def _rounded(slots: int) -> int:
    return -(-slots // MULTIPLE) * MULTIPLE


def _repeated(states: Tensor, count: int, size: int) -> Tensor:
    """[prompts, heads, used, D] as [prompts * count, heads, size, D]: each row `count` times, then zeros."""
    rows, heads, used, width = states.shape
    out = states.new_zeros(rows, count, heads, size, width)
    out[:, :, :, :used] = states[:, None]
    return out.view(rows * count, heads, size, width)
