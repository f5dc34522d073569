"""Problems: reading them from their source, splitting off the evaluation problems, and encoding the prompts."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .config import DataConfig, EnvironmentConfig, EvaluationConfig
from .evaluation.benchmarks import load_benchmark
from .prompts import Prompt, encode, make_prompt
from .sources import Row, pick, read_environment, read_file, read_hub, read_jsonl, read_parquet, read_reasoning_gym


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
    where: str = ""
    """Where the problem comes from, for messages. Example: problems.jsonl, row 7."""


class Problems(NamedTuple):
    """All problems of a run."""

    training: list[Problem]
    """Empty if training generates nothing."""
    evaluation: list[Problem]
    """The held-out problems, then those of each benchmark. No prompt of them is among the training problems."""
    digests: dict[str, str]
    """A hash of the prompts' token ids and of the columns: of the training problems, if there are any, and of all
    held-out problems. Equal hashes mean equal problems in equal order."""
    held_out: frozenset[tuple[int, ...]]
    """The token ids of every prompt that training must not use: of all held-out problems and all problems of the
    benchmarks, in the template of training and in that of the evaluation. Logged rollouts of them are left out."""


class _Asked(NamedTuple):
    """A row of a data set as the model is asked it."""

    prompt: Prompt
    columns: Row
    where: str

    @property
    def key(self) -> str:
        return json.dumps(self.prompt, sort_keys=True)


def load_problems(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest_prompt: int,
    evaluation: EvaluationConfig | None = None,
    environment: EnvironmentConfig | None = None,
    generates: bool = True,
) -> Problems:
    """The training problems and the evaluation problems.

    Rows with the same prompt and the same columns count once. Rows with the same prompt and other columns are different
    problems; all of them are held out, or all are trained on.

    Args:
        longest_prompt: the number of prompt tokens that fit: the model's context minus rollout.max_new_tokens.
        environment: makes the problems of data.source=environment.
        generates: False if training generates nothing. There are then no training problems, and the data source is read
            only if held-out problems come from it.

    Raises ValueError for an empty set, a broken row, a benchmark that cannot be found, or a prompt that is too long.
    """
    chat = tokenizer.chat_template is not None
    _check_template_variables(config, tokenizer)
    needed = generates or (config.held_out and config.held_out_path is None)
    groups = _groups(config, chat, environment) if needed else []
    if config.held_out_path is not None:
        held_out = list(_prompts(read_file(config.held_out_path), config.held_out_path, config, chat))
    else:
        held_out = [row for group in groups[: config.held_out] for row in group]
    sets: dict[str | None, list[_Asked]] = {None: held_out}
    kept = [*held_out]
    if evaluation is not None:
        asked = replace(config, template=evaluation.template or config.template, columns={})
        for name, own in (load_benchmark(spec, evaluation.folder) for spec in evaluation.benchmarks):
            sets[name] = list(_prompts(own, name, asked, chat))
            # The benchmark's template may differ from that of training. Training must not use these problems either, so
            # the keys contain the prompts in the training template too.
            kept += [*sets[name], *_prompts(own, name, replace(config, columns={}), chat)]
    keys = {row.key for row in kept}
    training = [row for group in groups if group[0].key not in keys for row in group] if generates else []
    if generates and not training:
        raise ValueError(
            f"no problems are left to train on: {len(groups)} distinct ones came from data.{_origin(config)}, and "
            f"{len({row.key for row in held_out})} are held out (data.held_out)"
        )
    encoded = _encoded(training, tokenizer, longest_prompt, config)
    answered = {name: _encoded(own, tokenizer, longest_prompt, config, name) for name, own in sets.items()}
    digests = ({"training": _digest(encoded)} if generates else {}) | {"held-out": _digest(answered[None])}
    if evaluation is not None and evaluation.problems is not None:
        answered = {name: _sample(own, evaluation.problems, f"{config.seed}/{name}") for name, own in answered.items()}
    prompts = frozenset(tuple(encode(row.prompt, tokenizer, config.chat_template_kwargs)) for row in kept)
    return Problems(encoded, [problem for own in answered.values() for problem in own], digests, prompts)


def _groups(config: DataConfig, chat: bool, environment: EnvironmentConfig | None) -> list[list[_Asked]]:
    """The rows of the data source in groups with the same prompt, shuffled by data.seed."""
    generated = config.source == "reasoning_gym"
    groups = _by_prompt(_generated(config, chat) if generated else _read(config, chat, environment))
    random.Random(config.seed).shuffle(groups)
    return groups


def _generated(config: DataConfig, chat: bool) -> Iterator[_Asked]:
    """The generated problems. A generator may give one question several times; only the first time counts."""
    seen = set()
    entries = read_reasoning_gym(config.name, config.options, config.size, config.seed)
    for number, entry in enumerate(entries, 1):
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield _asked(entry["question"], entry, f"data.name={config.name!r}, problem {number}", config, chat)


def _read(config: DataConfig, chat: bool, environment: EnvironmentConfig | None) -> Iterator[_Asked]:
    if config.source == "environment":
        assert environment is not None and environment.name is not None, "the settings name an environment"
        rows = read_environment(environment.name, config.options, config.size, config.seed)
        yield from _prompts(rows, f"environment.name={environment.name!r}", config, chat)
        return
    if config.source == "hub":
        yield from _prompts(read_hub(config.name, config.subset, config.split), config.name, config, chat)
        return
    assert config.path is not None
    read = read_parquet if config.source == "parquet" else read_jsonl
    yield from _prompts(read(config.path), config.path, config, chat)


def _prompts(rows: Iterable[Row], source: str, config: DataConfig, chat: bool) -> Iterator[_Asked]:
    """Each row as the model is asked it. Its columns are all columns except the prompt."""
    for number, row in enumerate(rows, 1):
        where, columns = f"{source}, row {number}", pick(row, config.columns)
        prompt = columns.pop("prompt", None)
        if not isinstance(prompt, str | list) or not prompt:
            raise ValueError(
                f"{where}: needs `prompt`, a text or a list of chat messages; it has "
                f"{', '.join(row) or 'nothing'} (data.columns='{{prompt: ...}}' names another column)"
            )
        yield _asked(prompt, columns, where, config, chat)


def _asked(prompt: Any, columns: Row, where: str, config: DataConfig, chat: bool) -> _Asked:
    try:
        return _Asked(make_prompt(prompt, config, chat), columns, where)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _by_prompt(rows: Iterable[_Asked]) -> list[list[_Asked]]:
    """The rows in groups with the same prompt. A row that equals an earlier row is left out."""
    groups: dict[str, list[_Asked]] = {}
    seen = set()
    for row in rows:
        own = (row.key, _text(row.columns))
        if own not in seen:
            seen.add(own)
            groups.setdefault(row.key, []).append(row)
    return list(groups.values())


def _sample(problems: list[Problem], count: int, seed: str) -> list[Problem]:
    """`count` random problems in their original order. The same seed and problems give the same choice."""
    kept = random.Random(seed).sample(range(len(problems)), min(count, len(problems)))
    return [problems[i] for i in sorted(kept)]


def _encoded(
    rows: list[_Asked],
    tokenizer: PreTrainedTokenizerBase,
    longest_prompt: int,
    config: DataConfig,
    name: str | None = None,
) -> list[Problem]:
    problems = []
    for row in rows:
        try:
            ids = encode(row.prompt, tokenizer, config.chat_template_kwargs)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None
        if not 0 < len(ids) <= longest_prompt:
            raise ValueError(
                f"{row.where}: a prompt has {len(ids)} tokens; 1 to {longest_prompt} fit (the model's context less "
                f"rollout.max_new_tokens): {str(row.prompt)[:200]!r}"
            )
        problems.append(Problem(row.prompt, ids, row.columns, name, row.where))
    return problems


def _digest(problems: list[Problem]) -> str:
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(f"{problem.token_ids}{_text(problem.columns)}\n".encode())
    return digest.hexdigest()


def _text(columns: Row) -> str:
    """The columns as text, the same in every process. Their order does not matter."""
    return json.dumps(sorted(columns.items()), default=_plain, skipkeys=True)


def _plain(value: Any) -> Any:
    """Stands for a value that JSON does not have. The order of a set and the address of an object have no effect,
    because they differ in every process."""
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _check_template_variables(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a variable that the chat template does not mention: it would have no effect."""
    template = str(tokenizer.chat_template or "")
    for name in config.chat_template_kwargs:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            whose = "the model's chat template does not mention it" if template else "the model has no chat template"
            raise ValueError(f"data.chat_template_kwargs: {name!r} would have no effect, because {whose}")


def _origin(config: DataConfig) -> str:
    if config.source == "environment":
        return "source=environment"
    return f"path={config.path!r}" if config.source in ("jsonl", "parquet") else f"name={config.name!r}"
