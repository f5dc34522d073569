"""Rollouts by transformers' `generate` in this process. Each prompt has one prefill for all of its responses."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .protocol import Response, end_tokens
from .weights import checked, expected_weights

PAD = 0
"""The token that fills a row before the prompt and after the end of the response. Any token of the model's vocabulary
serves: it is masked before the prompt, and cut off after the end. The tokenizer may have no padding token at all."""


class HFRollout:
    """Generates with `model` itself or with a copy.

    Args:
        model: the policy.
        tokenizer: its end-of-sequence token ends a response.
        batch_size: number of sequences that are decoded at once.
        dtype: the dtype of the weights that generate. None: the dtype of `model`.
        private: True if `model` belongs to this engine; its weights then come with `sync`. False if `model` is the
            policy, which then generates itself if it has the type `dtype`, and otherwise through a copy.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        dtype: torch.dtype | None = None,
        private: bool = False,
    ):
        self.shares_weights = not private and dtype in (None, model.dtype)
        self._model: Any = model
        if not self.shares_weights:
            own: Any = model if private else copy.deepcopy(model)
            self._model = own.requires_grad_(False).eval().to(dtype or model.dtype)
            self._expected = expected_weights(model)
        self._batch_size = batch_size
        self._lock = threading.Lock()
        self._ends = end_tokens(model, tokenizer)

    @torch.no_grad()
    def sync(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See RolloutEngine.sync. An engine that shares the policy's weights only iterates to the end."""
        if self.shares_weights:
            for _ in weights:
                pass
            return
        own = self._model.state_dict()
        with self._lock, closing(checked(weights, self._expected)) as pairs:
            for name, weight in pairs:
                own[name].copy_(weight)

    @torch.no_grad()
    def log_probs(self, sequences: list[list[int]], starts: list[int]) -> list[list[float]]:
        """See RolloutEngine.log_probs."""
        out = []
        for ids, start in zip(sequences, starts, strict=True):  # no lock, because nothing is changed
            tokens = torch.tensor([ids], device=self._model.device)
            logits = self._model(input_ids=tokens[:, :-1], use_cache=False).logits[0, start - 1 :].float()
            chosen = tokens[0, start:, None]
            out.append(logits.log_softmax(-1).gather(-1, chosen)[:, 0].tolist())
        return out

    def close(self) -> None:
        """See RolloutEngine.close. This engine has no process."""

    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], *, responses: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[Response]]:
        """See RolloutEngine.generate."""
        group = min(responses, self._batch_size)
        together = max(1, self._batch_size // group)
        out: list[list[Response]] = [[] for _ in prompts]
        with self._lock, self._sampling(max_new_tokens, temperature, seed):
            for start in range(0, len(prompts), together):
                chunk = prompts[start : start + together]
                for done in range(0, responses, group):
                    for i, rows in enumerate(self._decode(chunk, min(group, responses - done))):
                        out[start + i] += rows
        return out

    @contextmanager
    def _sampling(self, max_new_tokens: int, temperature: float, seed: int) -> Iterator[None]:
        """Within the block the model samples without top_k, top_p and penalties, from the given seed. Afterwards the
        model and torch's global generator are as before.

        The block replaces the model's generation_config as a whole, because `generate` merges it into all other
        settings and it may contain top_k, top_p or penalties.
        """
        model: Any = self._model
        training, config = model.training, model.generation_config
        devices = [model.device] if model.device.type == "cuda" else []
        model.eval()
        model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0,
            top_p=1.0,
            eos_token_id=self._ends,
            pad_token_id=PAD,
            use_cache=True,
        )
        try:
            with torch.random.fork_rng(devices):
                torch.manual_seed(seed)
                yield
        finally:
            model.generation_config = config
            model.train(training)

    def _decode(self, prompts: list[list[int]], count: int) -> list[list[Response]]:
        """`count` responses to each prompt, in one batch."""
        empty = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        padded = [[PAD] * n + prompt for n, prompt in zip(empty, prompts, strict=True)]
        masks = [[0] * n + [1] * len(prompt) for n, prompt in zip(empty, prompts, strict=True)]
        ids, attention = (torch.tensor(rows, device=self._model.device) for rows in (padded, masks))
        policy: Any = self._model
        generated = policy.generate(
            input_ids=ids.repeat_interleave(count, 0),
            attention_mask=attention.repeat_interleave(count, 0),
            past_key_values=self._prefill(ids, attention, count),
        )
        rows = [self._response(row) for row in generated[:, ids.shape[1] :].tolist()]
        return [rows[i * count : (i + 1) * count] for i in range(len(prompts))]

    def _prefill(self, ids: Tensor, attention: Tensor, count: int) -> DynamicCache | None:
        """Keys and values of all prompt tokens except the last: computed once per prompt, repeated for its responses.

        None if there is nothing to save (one response, or prompts of one token) or if the model has a kind of cache
        that cannot be repeated.
        """
        if count == 1 or ids.shape[1] < 2:
            return None
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
        body: Any = self._model.base_model
        cache = body(
            input_ids=ids[:, :-1], attention_mask=attention[:, :-1], position_ids=positions[:, :-1], use_cache=True
        ).past_key_values
        if type(cache) is not DynamicCache:
            return None
        cache.batch_repeat_interleave(count)
        return cache

    def _response(self, row: list[int]) -> Response:
        """The generated row up to and including its first end-of-sequence token. The rest of the row is padding."""
        for i, token in enumerate(row):
            if token in self._ends:
                return Response(row[: i + 1], finished=True)
        return Response(row, finished=False)
