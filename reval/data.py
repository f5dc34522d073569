"""Problems: where they come from, how they are put to the model, and in which order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import DataConfig

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem as the model sees it and as the reward function needs it."""

    prompt: Prompt
    """Chat messages, or plain text for a model that continues it."""
    token_ids: list[int]
    """The prompt, encoded once."""
    columns: dict[str, Any]
    """Whatever else the data set says about it (answer, question, metadata, ...): the reward function's columns."""


def load_problems(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, longest_prompt: int
) -> tuple[list[Problem], list[Problem]]:
    """The training problems and the held-out ones, which share no prompt.

    `longest_prompt` is the number of tokens that the model's context leaves for a prompt. Raises ValueError for an
    empty set, a broken line, or a prompt that is too long.
    """
    chat = tokenizer.chat_template is not None
    rows = list(_generated(config, chat) if config.source == "reasoning_gym" else _lines(config.path, config, chat))
    distinct = {json.dumps(prompt, sort_keys=True): (prompt, columns) for prompt, columns in rows}
    rows = list(distinct.values())
    random.Random(config.seed).shuffle(rows)
    if config.held_out_path is not None:
        held_out = list(_lines(config.held_out_path, config, chat))
        keys = {json.dumps(prompt, sort_keys=True) for prompt, _ in held_out}
        training = [row for row in rows if json.dumps(row[0], sort_keys=True) not in keys]
    else:
        held_out, training = rows[: config.held_out], rows[config.held_out :]
    if not training:
        raise ValueError(
            f"no problems are left to train on: {len(rows)} distinct ones came from data.{_origin(config)}, and "
            f"{len(held_out)} are held out (data.held_out)"
        )
    return _encoded(training, tokenizer, longest_prompt), _encoded(held_out, tokenizer, longest_prompt)


class ProblemSampler:
    """An endless walk over the problems in shuffled epochs; every problem comes once an epoch."""

    def __init__(self, problems: list[Problem], seed: int):
        self.problems, self.seed = problems, seed
        self.drawn = 0

    def draw(self, count: int) -> list[Problem]:
        """The next `count` problems."""
        places = range(self.drawn, self.drawn + count)
        self.drawn += count
        return [self.problems[self._order(i // len(self.problems))[i % len(self.problems)]] for i in places]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.problems)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a prompt: through the chat template for messages, as they are for text."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template, so it cannot encode chat messages; give prompts as text (a JSONL file "
            "whose `prompt` is a string), or set tokenizer.chat_template"
        )
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _generated(config: DataConfig, chat: bool) -> Iterator[tuple[Prompt, dict[str, Any]]]:
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(config.name, size=config.size, seed=config.seed, **config.options)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning_gym refuses data.name={config.name!r} with data.options: {error}") from error
    for entry in dataset:
        text = config.template.replace("{question}", entry["question"])
        yield _prompt(text, config, chat), dict(entry)


def _lines(path: str | None, config: DataConfig, chat: bool) -> Iterator[tuple[Prompt, dict[str, Any]]]:
    assert path is not None
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path!r} (data.path, data.held_out_path)")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
            prompt = row.pop("prompt", None) if isinstance(row, dict) else None
            if not isinstance(prompt, str | list) or not prompt:
                raise ValueError(f"{path}, line {number}: needs `prompt`, a text or a list of chat messages")
            if isinstance(prompt, str):
                prompt = _prompt(config.template.replace("{question}", prompt), config, chat)
            yield prompt, row


def _prompt(text: str, config: DataConfig, chat: bool) -> Prompt:
    """A user's message to a chat model; to a model without a chat template, text to continue."""
    if not chat:
        return text if config.system_prompt is None else f"{config.system_prompt}\n\n{text}"
    system = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    return [*system, {"role": "user", "content": text}]


def _encoded(
    rows: list[tuple[Prompt, dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, longest_prompt: int
) -> list[Problem]:
    problems = [Problem(prompt, encode(prompt, tokenizer), columns) for prompt, columns in rows]
    for problem in problems:
        if not 0 < len(problem.token_ids) <= longest_prompt:
            raise ValueError(
                f"a prompt has {len(problem.token_ids)} tokens; 1 to {longest_prompt} fit (the model's context less "
                f"rollout.max_new_tokens): {str(problem.prompt)[:200]!r}"
            )
    return problems


def _origin(config: DataConfig) -> str:
    return f"name={config.name!r}" if config.source == "reasoning_gym" else f"path={config.path!r}"
