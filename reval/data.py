"""Problems: where they come from, how they are put to the model, and in which order."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from .config import DataConfig, EvaluationConfig
from .evaluation.benchmarks import load_benchmark
from .sources import Row, pick, read_file, read_hub, read_jsonl, read_parquet

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
    benchmark: str | None = None
    """The benchmark it belongs to; None for training and held-out problems."""


def load_problems(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest_prompt: int,
    evaluation: EvaluationConfig | None = None,
) -> tuple[list[Problem], list[Problem]]:
    """The training problems and those of the evaluation (the held-out ones, then each benchmark's), which share no
    prompt with training.

    `longest_prompt` is the number of tokens that the model's context leaves for a prompt. Raises ValueError for an
    empty set, a broken row, a benchmark that cannot be found, or a prompt that is too long.
    """
    chat = tokenizer.chat_template is not None
    rows = list(_generated(config, chat) if config.source == "reasoning_gym" else _read(config, chat))
    distinct = {_key(prompt): (prompt, columns) for prompt, columns in rows}
    rows = list(distinct.values())
    random.Random(config.seed).shuffle(rows)
    if config.held_out_path is not None:
        held_out, training = list(_prompts(read_file(config.held_out_path), config.held_out_path, config, chat)), rows
    else:
        held_out, training = rows[: config.held_out], rows[config.held_out :]
    sets: dict[str | None, list[tuple[Prompt, Row]]] = {None: held_out}
    keys = {_key(prompt) for prompt, _ in held_out}
    if evaluation is not None:
        asked = replace(config, template=evaluation.template or config.template, columns={})
        for name, own in (load_benchmark(spec, evaluation.folder) for spec in evaluation.benchmarks):
            sets[name] = list(_prompts(own, name, asked, chat))
            # the same problem in training is put by its own template
            keys |= {_key(prompt) for prompt, _ in _prompts(own, name, replace(config, columns={}), chat)}
        if evaluation.problems is not None:
            sets = {name: _sample(own, evaluation.problems, f"{config.seed}/{name}") for name, own in sets.items()}
    training = [row for row in training if _key(row[0]) not in keys]
    if not training:
        raise ValueError(
            f"no problems are left to train on: {len(rows)} distinct ones came from data.{_origin(config)}, and "
            f"{len(held_out)} are held out (data.held_out)"
        )
    answered = [p for name, own in sets.items() for p in _encoded(own, tokenizer, longest_prompt, name)]
    return _encoded(training, tokenizer, longest_prompt), answered


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


def _read(config: DataConfig, chat: bool) -> Iterator[tuple[Prompt, Row]]:
    if config.source == "hub":
        yield from _prompts(read_hub(config.name, config.subset, config.split), config.name, config, chat)
        return
    assert config.path is not None
    read = read_parquet if config.source == "parquet" else read_jsonl
    yield from _prompts(read(config.path), config.path, config, chat)


def _prompts(rows: Iterable[Row], source: str, config: DataConfig, chat: bool) -> Iterator[tuple[Prompt, Row]]:
    """Each row's prompt as the model gets it, and its other columns."""
    for number, row in enumerate(rows, 1):
        columns = pick(row, config.columns)
        prompt = columns.pop("prompt", None)
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(
                f"{source}, row {number}: needs `prompt`, a text or a list of chat messages; it has "
                f"{', '.join(row) or 'nothing'} (data.columns='{{prompt: ...}}' names another column)"
            )
        if isinstance(prompt, str):
            prompt = _prompt(config.template.replace("{question}", prompt), config, chat)
        yield prompt, columns


def _sample(rows: list[tuple[Prompt, Row]], count: int, seed: str) -> list[tuple[Prompt, Row]]:
    """`count` of the rows in their order, the same ones whenever seed and rows are the same."""
    kept = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[i] for i in sorted(kept)]


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt, sort_keys=True)


def _prompt(text: str, config: DataConfig, chat: bool) -> Prompt:
    """A user's message to a chat model; to a model without a chat template, text to continue."""
    if not chat:
        return text if config.system_prompt is None else f"{config.system_prompt}\n\n{text}"
    system = [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]
    return [*system, {"role": "user", "content": text}]


def _encoded(
    rows: list[tuple[Prompt, Row]], tokenizer: PreTrainedTokenizerBase, longest_prompt: int, name: str | None = None
) -> list[Problem]:
    problems = [Problem(prompt, encode(prompt, tokenizer), columns, name) for prompt, columns in rows]
    for problem in problems:
        if not 0 < len(problem.token_ids) <= longest_prompt:
            raise ValueError(
                f"a prompt has {len(problem.token_ids)} tokens; 1 to {longest_prompt} fit (the model's context less "
                f"rollout.max_new_tokens): {str(problem.prompt)[:200]!r}"
            )
    return problems


def _origin(config: DataConfig) -> str:
    return f"path={config.path!r}" if config.source in ("jsonl", "parquet") else f"name={config.name!r}"
