"""Problems: reading them from their source, splitting off the evaluation problems, and encoding the prompts."""

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
    """A problem: a prompt for the model and columns for the reward function."""

    prompt: Prompt
    """Chat messages, or plain text for a model without a chat template."""
    token_ids: list[int]
    """The encoded prompt."""
    columns: dict[str, Any]
    """The other columns of the data set (answer, question, metadata, ...). The reward function gets them."""
    benchmark: str | None = None
    """The name of the benchmark. None for training and held-out problems."""


def load_problems(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest_prompt: int,
    evaluation: EvaluationConfig | None = None,
) -> tuple[list[Problem], list[Problem]]:
    """The training problems and the evaluation problems: the held-out ones, then those of each benchmark.

    No prompt of the evaluation problems is among the training problems.

    Args:
        longest_prompt: the number of prompt tokens that fit: the model's context minus rollout.max_new_tokens.

    Raises ValueError for an empty set, a broken row, a benchmark that cannot be found, or a prompt that is too long.
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
            # The benchmark's template may differ from that of training. Training must not use these problems either, so
            # the keys contain the prompts in the training template too.
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
    """The token ids of a prompt. Messages are formatted with the chat template; text is encoded as it is."""
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
    """The prompt of each row, as the model gets it, and the other columns of the row."""
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
    """`count` random rows in their original order. The same seed and rows give the same choice."""
    kept = random.Random(seed).sample(range(len(rows)), min(count, len(rows)))
    return [rows[i] for i in sorted(kept)]


def _key(prompt: Prompt) -> str:
    return json.dumps(prompt, sort_keys=True)


def _prompt(text: str, config: DataConfig, chat: bool) -> Prompt:
    """Messages for a chat model; plain text for a model without a chat template."""
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
