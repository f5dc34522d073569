r"""Reward functions that check a completion against the data set, and the way to name your own.

A reward function is called as `fn(prompts, completions, completion_ids, **columns)` and returns one reward per
completion: a number, or None for "cannot be scored".

    prompts         list of str, or of chat messages (list of dict)
    completions     list of str
    completion_ids  list of list of int, the sampled tokens
    columns         the other columns of the data set by name, each a list with one entry per completion

The functions here give no partial credit for form. Their packages are imported on first use, not with this file.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any

RewardFunction = Callable[..., list[float | None]]


class RewardError(ValueError):
    """The reward function itself is at fault: it cannot be found or loaded, breaks its contract, or always raises."""


_NUMBER = re.compile(r"[+-]?(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_EXPRESSION = re.compile(r"[0-9 +\-*/x×()]+")
_BOX_OR_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def score_number(
    prompts: list, completions: list[str], completion_ids: list[list[int]], **columns: list
) -> list[float | None]:
    """Reward "reply with only the number" tasks: 1.0 if the completion is the number in column `answer`, else 0.0.

    The rule: strip white space at both ends, then one final period if there is one. What is left must be, as a whole,
    `NUMBER` or `EXPRESSION = NUMBER`, with NUMBER equal to the answer.
        NUMBER      an optional sign, digits (with or without commas between thousands), an optional decimal part;
                    compared as a decimal: 7, 7.0, +7 and 07 are the same, so are 1000 and 1,000.
        EXPRESSION  a restated task: digits, spaces and + - * / x × ( ), with at least one digit. It is not evaluated.
    Anything else is 0.0: words before or after, two numbers, "7 or 8", "7%", "1e3", a second `=`.

    Raises:
        ValueError: no column `answer`, or an answer that is not a number.
    """
    answers = _column("number", "answer", columns)
    return [float(_final_number(c) == _gold_number(a)) for c, a in zip(completions, answers, strict=True)]


def score_math(
    prompts: list, completions: list[str], completion_ids: list[list[int]], **columns: list
) -> list[float | None]:
    r"""Reward 1.0 if math-verify finds the completion's final answer equal to column `answer`, else 0.0.

    The final answer is the last closed `\boxed{...}` where there is one, else what math-verify extracts. `answer` is
    LaTeX, with or without $ around it, and only the answer: no worked solution. A completion that math-verify cannot
    read is wrong (0.0); an answer that it cannot read gives None, since then nothing could be right.

    This call has no time limit of its own: `10^{10^{10}}` in a completion never returns. math-verify's limits are
    signal handlers, which wait for the C code they should interrupt and which sympy may swallow, so they are off; run
    it in a RewardPool, which kills the process.

    Raises:
        ValueError: no column `answer`.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off: they are meant to be
    rewards: list[float | None] = []
    for completion, answer in zip(completions, _column("math", "answer", columns), strict=True):
        gold = [] if answer is None else _parse_gold(str(answer).strip())
        if not gold:
            rewards.append(None)
            continue
        box = _last_box(completion)
        final = completion if box is None else rf"\boxed{{{box}}}"
        found = parse(final, [LatexExtractionConfig(), ExprExtractionConfig()], parsing_timeout=None)
        rewards.append(float(verify(gold, found, timeout_seconds=None)))
    return rewards


def score_reasoning_gym(
    prompts: list, completions: list[str], completion_ids: list[list[int]], **columns: list
) -> list[float | None]:
    """Reward as reasoning_gym does, with the scorer of the data set named in `metadata["source_dataset"]`.

    The scorer gets the text in the last `<answer>...</answer>`, or else the whole stripped completion, and the columns
    `question`, `answer` and `metadata` (a dict, or its JSON text). Partial scores are passed on as they are. The
    default scorer of reasoning_gym gives len(oracle) / len(answer) to an answer that only contains the oracle, so
    a completion with prose around the right answer gets something between 0 and 1. Scorers with settings of their own
    (decimal_arithmetic, polynomial_equations, puzzle24, time_intervals) run with their defaults.

    Raises:
        ValueError: a missing column, no `source_dataset` in the metadata, or a data set reasoning_gym does not know.
    """
    from reasoning_gym.utils import extract_answer

    questions, answers, metadata = (
        _column("reasoning_gym", name, columns) for name in ("question", "answer", "metadata")
    )
    rewards: list[float | None] = []
    for completion, question, answer, about in zip(completions, questions, answers, metadata, strict=True):
        about = json.loads(about) if isinstance(about, str) else about
        if not isinstance(about, dict) or "source_dataset" not in about:
            raise ValueError(
                "reward function 'reasoning_gym' needs metadata['source_dataset'], the name of a reasoning_gym data "
                f"set, but the metadata is {about!r:.200}"
            )
        found = extract_answer(completion)
        entry = {"question": question, "answer": answer, "metadata": about}
        scorer = _gym_scorer(about["source_dataset"])
        rewards.append(float(scorer(answer=completion.strip() if found is None else found, entry=entry)))
    return rewards


VERIFIERS: dict[str, RewardFunction] = {
    "number": score_number,
    "math": score_math,
    "reasoning_gym": score_reasoning_gym,
}
_PACKAGES = {"math": ("math_verify", "math-verify[antlr4_13_2]"), "reasoning_gym": ("reasoning_gym", "reasoning_gym")}


def resolve(spec: str) -> RewardFunction:
    """Find a reward function, and import what it needs.

    Args:
        spec: a name in VERIFIERS, "package.module:function", or "path/to/file.py:function" (relative to the current
            directory; the file's own directory is not added to the import path).

    Raises:
        RewardError (a ValueError): nothing of that name, or a package that is not installed. An error inside a module
            or file of yours comes through as it is.
    """
    if spec in VERIFIERS:
        if spec in _PACKAGES:
            _import_package(spec, *_PACKAGES[spec])
        return VERIFIERS[spec]
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise RewardError(
            f"reward function {spec!r} is unknown: expected one of {', '.join(VERIFIERS)}, or "
            f"'package.module:function', or 'path/to/file.py:function'{_did_you_mean(spec, VERIFIERS)}"
        )
    module = _load_file(spec, where) if where.endswith(".py") else _load_module(spec, where)
    function = getattr(module, name, None)
    if not callable(function):
        callables = [n for n, value in vars(module).items() if inspect.isfunction(value) and not n.startswith("_")]
        fault = "is not callable" if hasattr(module, name) else "does not exist"
        raise RewardError(
            f"reward function {spec!r}: {name!r} {fault} in {where!r}; its functions are "
            f"{', '.join(callables) or '(none)'}{_did_you_mean(name, callables)}"
        )
    return function


def _import_package(spec: str, package: str, to_install: str) -> None:
    # Now rather than at the first completion, whose time limit would pay for it.
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise RewardError(
            f"reward function {spec!r} needs the package {package}, which is not installed: pip install '{to_install}'"
        ) from error


def _load_module(spec: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        # Only the module asked for is the user's slip; a package missing inside it deserves its own traceback.
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise
        raise RewardError(
            f"reward function {spec!r}: there is no module {error.name!r} on the import path; expected "
            "'package.module:function', or 'path/to/file.py:function' for a file outside it"
        ) from error


def _load_file(spec: str, where: str) -> ModuleType:
    path = Path(where).expanduser().resolve()
    if not path.is_file():
        raise RewardError(
            f"reward function {spec!r}: there is no file {path}{_did_you_mean(path.name, _siblings(path))}"
        )
    name = f"reval_reward_file_{path.stem}"
    file_spec = importlib.util.spec_from_file_location(name, path)
    assert file_spec is not None and file_spec.loader is not None, "a path that ends in .py has a loader"
    module = importlib.util.module_from_spec(file_spec)
    sys.modules[name] = module  # dataclasses and pickle look modules up by name
    file_spec.loader.exec_module(module)
    return module


def _siblings(path: Path) -> list[str]:
    return [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []


def _did_you_mean(given: str, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(allowed), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _column(function: str, name: str, columns: dict[str, list]) -> list[Any]:
    if name not in columns:
        raise ValueError(
            f"reward function {function!r} needs the column {name!r}, but the data set's columns are "
            f"{', '.join(columns) or '(none)'}{_did_you_mean(name, columns)}"
        )
    return columns[name]


def _to_decimal(text: str) -> Decimal | None:
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _final_number(completion: str) -> Decimal | None:
    """The number that the completion consists of, by the rule of `score_number`; None where it breaks the rule."""
    text = completion.strip().removesuffix(".")
    expression, equals, number = text.rpartition("=")
    if equals:
        if not _EXPRESSION.fullmatch(expression) or not any(c.isdigit() for c in expression):
            return None
        text = number.strip(" ")
    return _to_decimal(text)


def _gold_number(answer: Any) -> Decimal:
    number = None
    if isinstance(answer, str):
        number = _to_decimal(answer.strip())
    elif isinstance(answer, int | float | Decimal) and not isinstance(answer, bool):
        number = Decimal(str(answer))  # through str, so that 0.1 is 0.1 and not its binary neighbour
    if number is None or not number.is_finite():
        raise ValueError(f"column 'answer' must hold numbers for reward function 'number', but holds {answer!r:.200}")
    return number


@functools.lru_cache(maxsize=4096)  # every response of a group has the same one
def _parse_gold(answer: str) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    wrapped = answer if len(answer) > 1 and answer[0] == answer[-1] == "$" else f"${answer}$"
    configs = [LatexExtractionConfig(), ExprExtractionConfig()]
    return parse(wrapped, configs, fallback_mode="no_fallback", parsing_timeout=None)


def _last_box(text: str) -> str | None:
    r"""Content of the `\boxed{...}` that closes last, in one pass; None without a closed one."""
    box = None
    open_braces: list[int | None] = []  # where the content of a box starts, None for any other brace
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            box = box if start is None else text[start : match.start()]
        elif token == "{":
            open_braces.append(None)
        elif token.startswith(r"\boxed"):
            open_braces.append(match.end())
    return box


@functools.cache  # one per data set name; making a scorer makes its whole data set object
def _gym_scorer(name: str) -> Callable[..., float]:
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    if name not in DATASETS:
        raise ValueError(
            f"metadata['source_dataset'] must name a reasoning_gym data set, but is {name!r}"
            f"{_did_you_mean(name, DATASETS) or '; reasoning_gym.factory.DATASETS lists them'}"
        )
    return get_score_answer_fn(name)
