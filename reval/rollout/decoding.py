"""Decoding: responses to a batch of prompts, one token of each sequence in a step.

Each prompt is computed once for all of its responses, and what all prompts begin with is computed once for all of them.
A step works on tensors of fixed shapes (cache.py). On a GPU a step is captured as a CUDA graph, because its kernels
take less time than their launches. Sequences that have ended leave the batch.
"""

from __future__ import annotations

import os.path
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from reval_kernels.hf import OutputHead, head_of

from .cache import GROUPED, Slots, is_plain
from .protocol import RolloutError
from .sampling import sample

PAD = 0
"""The token that fills a row before the prompt and after the end of the response. Any token of the model's vocabulary
serves: it is masked before the prompt, and cut off after the end. The tokenizer may have no padding token at all."""
LEAST_SHARED = 8
"""A common beginning of fewer tokens is not worth a pass of its own."""


class Prompts(NamedTuple):
    """Computed prompts."""

    cache: DynamicCache
    valid: Tensor
    """bool [prompts, slots]: False for padding."""
    hidden: Tensor
    """[prompts, D]: the last hidden state of each prompt's last token."""


class Unsupported(Exception):
    """Only transformers' `generate` handles the cache or the attention of the model."""


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    count: int,
    *,
    ends: list[int],
    temperature: float,
    noise: Tensor,
    progress: Callable[[int, int], None] = lambda tokens, left: None,
) -> list[list[int]]:
    """`count` responses to each prompt, in the order of the prompts.

    Args:
        model: the policy in evaluation mode.
        ends: the tokens that end a response.
        noise: float64 [responses, longest response], uniform in [0, 1): what samples each token of each response.
        progress: called in each step with the number of tokens generated so far and the number of sequences left.

    Raises RolloutError if the logits are not finite, and Unsupported.
    """
    with attention_for_decoding(model):
        return _decode(model, prompts, count, frozenset(ends), temperature, noise.T.to(model.device), progress)


def _decode(
    model: PreTrainedModel,
    prompts: list[list[int]],
    count: int,
    ends: frozenset[int],
    temperature: float,
    noise: Tensor,
    progress: Callable[[int, int], None],
) -> list[list[int]]:
    head, most = head_of(model), len(noise)
    computed = prefill(model, prompts)
    logits = logits_of(head, computed.hidden).repeat_interleave(count, 1)
    slots = Slots(computed.cache, computed.valid, count, computed.valid.shape[1] + most - 1)
    steps = Steps(model, head, slots)
    out: list[list[int]] = [[] for _ in range(len(prompts) * count)]
    rows = list(range(len(out)))  # the response of each sequence in the batch
    ended: set[int] = set()
    generated = 0
    for step in range(most):
        tokens = sample(logits, temperature, noise[step])
        for row, token in zip(rows, tokens.tolist(), strict=True):
            if row in ended:
                continue
            if token < 0:
                raise RolloutError("the policy's logits are not finite, so no token can be sampled")
            out[row].append(token)
            generated += 1
            if token in ends:
                ended.add(row)
        left = len(out) - len(ended)
        progress(generated, left)
        if not left or step + 1 == most:
            return out
        if left <= steps.worth_keeping * len(rows):
            places = [place for place, row in enumerate(rows) if row not in ended]
            index = torch.tensor(places, device=model.device)
            rows, tokens, noise = [rows[place] for place in places], tokens[index], noise[:, index]
            slots.keep(index)
        logits = steps(tokens)
    return out


def prefill(model: PreTrainedModel, prompts: list[list[int]]) -> Prompts:
    """Compute the prompts. The padding of a shorter prompt comes after the beginning that all prompts share.

    Raises Unsupported if the cache does not simply hold all keys and values.
    """
    body: Any = model.base_model
    device, cache = model.device, None
    shared = len(os.path.commonprefix(prompts))
    shared = min(shared, *(len(prompt) - 1 for prompt in prompts)) if len(prompts) > 1 else 0
    if shared < LEAST_SHARED:
        shared = 0
    else:
        cache = body(input_ids=torch.tensor([prompts[0][:shared]], device=device), use_cache=True).past_key_values
        if not is_plain(cache):
            raise Unsupported(type(cache).__name__)
        cache.batch_repeat_interleave(len(prompts))
    width = max(map(len, prompts))
    empty = [width - len(prompt) for prompt in prompts]
    ids = [[PAD] * n + prompt[shared:] for n, prompt in zip(empty, prompts, strict=True)]
    valid = torch.tensor([[True] * shared + [False] * n + [True] * (width - shared - n) for n in empty], device=device)
    out = body(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=valid.long(),
        position_ids=(valid.cumsum(-1) - 1).clamp(min=0)[:, shared:],
        past_key_values=cache,
        use_cache=True,
    )
    if not is_plain(out.past_key_values):
        raise Unsupported(type(out.past_key_values).__name__)
    return Prompts(out.past_key_values, valid, out.last_hidden_state[:, -1])


def logits_of(head: OutputHead, hidden: Tensor) -> Tensor:
    """The logits [V, N], float32, of the hidden states [N, D]. A row for each word: with few hidden states, matmuls on
    CPUs are faster that way."""
    logits = head.weight @ hidden.T
    if head.bias is not None:
        logits = logits + head.bias[:, None]
    logits = logits.float()
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits if head.temperature == 1 else logits / head.temperature


class Steps:
    """The steps of a batch. The first step with new tensors runs as it is, the second is captured on a GPU."""

    def __init__(self, model: PreTrainedModel, head: OutputHead, slots: Slots):
        self._body: Any = model.base_model
        self._head, self._slots, self._dtype = head, slots, model.dtype
        self._capturing = model.device.type == "cuda"
        self._graph: torch.cuda.CUDAGraph | None = None
        self._of: Tensor | None = None  # the tensor of `slots` that the last step used
        self.worth_keeping = 1 / 2 if self._capturing else 7 / 8
        """The share of the sequences from which on a smaller batch pays. A captured step takes about as long with half
        of the sequences, and a smaller batch needs a new capture."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits [V, B] after these tokens, [B]. They are valid until the next step."""
        self._slots.reserve()
        if self._of is not self._slots.valid:
            self._of, self._graph, self._tokens = self._slots.valid, None, tokens[:, None].clone()
            return self._step()
        self._tokens.copy_(tokens[:, None])
        if self._capturing and self._graph is None:
            self._capture()
        if self._graph is None:
            return self._step()
        self._graph.replay()
        return self._logits

    def _step(self) -> Tensor:
        slots = self._slots
        slots.valid.index_fill_(1, slots.slot, True)
        hidden = self._body(
            input_ids=self._tokens,
            attention_mask=slots.mask(self._dtype),
            position_ids=slots.positions,
            past_key_values=slots.cache,
            use_cache=True,
        ).last_hidden_state[:, 0]
        slots.positions.add_(1)
        slots.slot.add_(1)
        return logits_of(self._head, hidden)

    def _capture(self) -> None:
        """Record a step. It runs when it is replayed, on the same tensors. The graph does not outlive the batch, so it
        holds no memory while the policy trains, and the weights cannot move before its last replay."""
        graph = torch.cuda.CUDAGraph()
        try:
            # thread_local: another thread may train meanwhile (rollout.ahead).
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._step()
        except RuntimeError as error:
            self._capturing = False
            warnings.warn(f"a decoding step cannot be captured as a CUDA graph, so it is slow: {error}", stacklevel=2)
        else:
            self._graph = graph


@contextmanager
def attention_for_decoding(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model has an attention that works with masks of any kind. The mathematics is the same."""
    config: Any = model.config.get_text_config()
    own = config._attn_implementation
    if own != "eager":  # eager takes every mask, and some models add to it what other attentions do not have
        if not model._supports_sdpa:
            raise Unsupported(own)
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = own


@torch.no_grad()
def why_unsupported(model: PreTrainedModel) -> str | None:
    """None if `decode` works with this model, else the reason. The logits of two prompts and two steps are compared
    with the model's own. The weights must be there."""
    words = [(7 * i + 3) % model.config.get_text_config().vocab_size for i in range(LEAST_SHARED + 6)]
    prompts = [words[:-2], [*words[:LEAST_SHARED], words[-3]]]
    chosen = torch.tensor([words[-2:], words[:2]], device=model.device)
    try:
        with attention_for_decoding(model):
            computed, head = prefill(model, prompts), head_of(model)
            steps = Steps(model, head, Slots(computed.cache, computed.valid, 1, computed.valid.shape[1] + 2))
            found = [logits_of(head, computed.hidden), steps(chosen[:, 0]).clone(), steps(chosen[:, 1])]
            noise = torch.zeros(2, dtype=torch.float64).to(model.device)  # not every device has float64
            sample(found[0].clone(), 1.0, noise)
    except Unsupported as error:
        return f"its cache or attention is {error}"
    except Exception as error:  # any model can come here, and `generate` may still work with it
        return f"{type(error).__name__}: {error}"
    policy: Any = model
    for row, (prompt, more) in enumerate(zip(prompts, chosen.tolist(), strict=True)):
        ids = torch.tensor([prompt + more], device=model.device)
        own = policy(input_ids=ids, use_cache=False).logits[0, -3:].float()
        off = float((torch.stack([logits[:, row] for logits in found]) - own).abs().max() / own.abs().max())
        if not off < (1e-3 if model.dtype == torch.float32 else 1e-1):
            return f"its logits differ by {off:.1%} when they are computed one token at a time"
    return None
