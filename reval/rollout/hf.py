"""Rollouts in this process, by a model of transformers."""

from __future__ import annotations

import copy
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .decoding import PAD, decode, why_unsupported
from .protocol import Response, end_tokens
from .weights import checked, expected_weights


class _Report:
    """Calls `HFRollout.progress` while the batches of one call of `generate` are decoded."""

    def __init__(self, call: Callable[[int, int], None] | None, sequences: int):
        self._call, self._waiting, self._last = call, sequences, time.monotonic()
        self._earlier = self._now = 0  # tokens of the batches before this one, and with this one

    @contextmanager
    def batch(self, sequences: int) -> Iterator[None]:
        """Within the block a batch of so many sequences is decoded."""
        self._waiting -= sequences
        yield
        self._earlier = self._now

    def __call__(self, tokens: int, left: int) -> None:
        """The batch has `tokens` tokens, and `left` of its sequences are not complete."""
        self._now = self._earlier + tokens
        if self._call is not None and time.monotonic() - self._last >= 1:
            self._last = time.monotonic()
            self._call(self._now, self._waiting + left)


class HFRollout:
    """Generates with `model` itself or with a copy.

    Args:
        model: the policy.
        tokenizer: its end-of-sequence token ends a response.
        batch_size: number of sequences that are decoded at once.
        dtype: the dtype of the weights that generate. None: the dtype of `model`.
        private: True if `model` belongs to this engine; its weights then come with `sync`. False if `model` is the
            policy, which then generates itself if it has the type `dtype`, and otherwise through a copy.

    Attributes:
        progress: called while `generate` works, at most once a second, with the number of tokens generated so far and
            the number of responses that are not complete. None: nobody asks. It runs in the thread that generates.
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
        self._decodes: bool | None = None  # known once there are weights
        self.progress: Callable[[int, int], None] | None = None

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
        # The noise of a response does not depend on the batch that it is in. numpy's generator takes the whole seed;
        # torch's takes 32 bits on a CPU, which lack run.seed and the number of the process.
        noise = np.random.default_rng(seed)
        out: list[list[Response]] = [[] for _ in prompts]
        report = _Report(self.progress, len(prompts) * responses)
        with self._lock, self._evaluating():
            for start in range(0, len(prompts), together):
                chunk = prompts[start : start + together]
                for done in range(0, responses, group):
                    count = min(group, responses - done)
                    with report.batch(len(chunk) * count):
                        rows = self._batch(chunk, count, max_new_tokens, temperature, noise, report)
                    for i in range(len(chunk)):
                        out[start + i] += rows[i * count : (i + 1) * count]
        return out

    def _batch(
        self,
        prompts: list[list[int]],
        count: int,
        max_new_tokens: int,
        temperature: float,
        noise: np.random.Generator,
        report: _Report,
    ) -> list[Response]:
        """`count` responses to each prompt, decoded together."""
        if self._can_decode():
            drawn = torch.from_numpy(noise.random((len(prompts) * count, max_new_tokens)))
            options: Any = {"ends": self._ends, "temperature": temperature, "noise": drawn, "progress": report}
            rows = decode(self._model, prompts, count, **options)
        else:
            rows = self._generate(prompts, count, max_new_tokens, temperature, int(noise.integers(1 << 62)))
        responses = [self._response(row) for row in rows]
        report(sum(len(response.token_ids) for response in responses), 0)
        return responses

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Within the block the model is in evaluation mode."""
        training = self._model.training
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(training)

    def _can_decode(self) -> bool:
        """Whether decoding.py works with the model. A warning says why if it does not."""
        if self._decodes is None:
            reason = why_unsupported(self._model)
            self._decodes = reason is None
            if reason:
                name = type(self._model).__name__
                warnings.warn(f"{name} generates slowly, by transformers' generate: {reason}", stacklevel=3)
        return self._decodes

    def _generate(
        self, prompts: list[list[int]], count: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """`count` responses to each prompt, by transformers' `generate`. After its end, a row has padding."""
        empty = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        padded = [[PAD] * n + prompt for n, prompt in zip(empty, prompts, strict=True)]
        masks = [[0] * n + [1] * len(prompt) for n, prompt in zip(empty, prompts, strict=True)]
        ids, attention = (torch.tensor(rows, device=self._model.device) for rows in (padded, masks))
        with self._sampling(max_new_tokens, temperature, seed):
            generated = self._model.generate(
                input_ids=ids.repeat_interleave(count, 0), attention_mask=attention.repeat_interleave(count, 0)
            )
        return generated[:, ids.shape[1] :].tolist()

    @contextmanager
    def _sampling(self, max_new_tokens: int, temperature: float, seed: int) -> Iterator[None]:
        """Within the block `generate` samples without top_k, top_p and penalties, from the given seed. Afterwards the
        model's settings and torch's global generator are as before.

        The block replaces the model's generation_config as a whole, because `generate` merges it into all other
        settings and it may contain top_k, top_p or penalties.
        """
        model = self._model
        config = model.generation_config
        devices = [model.device] if model.device.type == "cuda" else []
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

    def _response(self, row: list[int]) -> Response:
        """The row up to and including its first end-of-sequence token. The rest of the row is padding."""
        for i, token in enumerate(row):
            if token in self._ends:
                return Response(row[: i + 1], finished=True)
        return Response(row, finished=False)
