r"""Built-in reward functions, which check a completion against the data set, and `resolve`, which finds one by name.

The caller runs `fn(prompts, completions, completion_ids, **columns)`. The function returns a list with one reward per
completion: a number, or None if the completion cannot be scored.

    prompts         list of str, or of chat messages (list of dict)
    completions     list of str
    completion_ids  list of list of int, the sampled tokens
    columns         the other columns of the data set by name, each a list with one entry per completion

The built-in functions give no partial credit for the form of an answer. They import their packages on first use, so
that importing this file is fast.
"""

import functools
import importlib
import importlib.util
import json
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from reval.rewards.equality import equal, readable
from reval.rewards.final_answer import final_answer
from reval.user_code import did_you_mean, find

RewardFunction = Callable[..., list[float | None]]


ROUNDING = 1e-6
"""Rewards that differ by at most this, absolutely or relatively, count as equal: the sum of ten times 0.1 is not 1."""


class RewardError(ValueError):
    """The reward function is wrong: it cannot be found or loaded, returns invalid rewards, or raises every time."""


_NUMBER = re.compile(r"[+-]?(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_EXPRESSION = re.compile(r"[0-9 +\-*/x×()]+")


def score_number(
    prompts: list, completions: list[str], completion_ids: list[list[int]], **columns: list
) -> list[float | None]:
    """Reward for "reply with only the number" tasks: 1.0 if the completion is the number in `answer`, else 0.0.

    The rule: remove white space at both ends, then one final period. The remaining text must be, as a whole, `NUMBER`
    or `EXPRESSION = NUMBER`, with NUMBER equal to the answer.
        NUMBER      an optional sign, digits (with or without commas between thousands), an optional decimal part.
                    Numbers are compared as decimals: 7, 7.0, +7 and 07 are equal, and 1000 and 1,000 are equal.
        EXPRESSION  the task repeated: digits, spaces and + - * / x × ( ), with at least one digit. It is not evaluated.
    Every other text scores 0.0. Examples: words before or after, two numbers, "7 or 8", "7%", "1e3", a second `=`.

    Raises:
        ValueError: no column `answer`, or an answer that is not a number.
    """
    answers = _column("number", "answer", columns)
    return [float(_final_number(c) == _gold_number(a)) for c, a in zip(completions, answers, strict=True)]


def score_math(
    prompts: list, completions: list[str], completion_ids: list[list[int]], **columns: list
) -> list[float | None]:
    r"""Reward 1.0 if the completion's final answer is equal to the column `answer`, else 0.0.

    `final_answer` says what the final answer of a completion is; docs/extending.md says what counts as equal.
    math-verify judges expressions. The column `answer` holds only the answer, no worked solution: LaTeX or plain text,
    with or without $ around it, a number, or a list of answers that are all required. What follows "####" in it is the
    answer, as in GSM8K. If the column's answer is empty or cannot be read, the reward is None, because no completion
    could then be right.

    This function has no time limit: `10^{10^{10}}` in a completion never returns. Run this function in a RewardPool,
    which kills the process. The time limits of math-verify are switched off, because they are signal handlers: a
    handler runs only after the C code that it should interrupt, and sympy may swallow its exception.

    Raises:
        ValueError: no column `answer`.
    """
    rewards: list[float | None] = []
    for completion, answer in zip(completions, _column("math", "answer", columns), strict=True):
        gold = _gold_text(answer)
        if not readable(gold):
            rewards.append(None)
            continue
        try:
            final = final_answer(completion)
            rewards.append(float(final is not None and equal(gold, final)))
        except RecursionError:  # thousands of brackets in each other
            rewards.append(0.0)
    return rewards


def score_reasoning_gym(
    prompts: list, completions: list[str], completion_ids: list[list[int]], **columns: list
) -> list[float | None]:
    """Reward from reasoning_gym: the scorer of the data set that `metadata["source_dataset"]` names.

    The scorer gets the text in the last `<answer>...</answer>`, else the whole stripped completion, and the columns
    `question`, `answer` and `metadata` (a dict, or JSON text of a dict). Partial scores are returned unchanged. The
    default scorer of reasoning_gym gives len(oracle) / len(answer) to an answer that contains the oracle (the right
    answer) and more text, so such a completion scores between 0 and 1. Scorers with their own settings
    (decimal_arithmetic, polynomial_equations, puzzle24, time_intervals) run with their default settings.

    Raises:
        ValueError: a missing column, no `source_dataset` in the metadata, or a data set reasoning_gym does not know.
    """
    from reasoning_gym.utils import extract_answer

    questions, answers, metadata = (
        _column("reasoning_gym", name, columns) for name in ("question", "answer", "metadata")
    )
    rewards: list[float | None] = []
    for completion, question, answer, about in zip(completions, questions, answers, metadata, strict=True):
        about = _gym_metadata(about)
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
ARGUMENTS = ("prompts", "completions", "completion_ids")
"""The arguments of every reward function besides the columns."""


def check_columns(spec: str, columns: dict[str, Any]) -> None:
    """Raise ValueError if the reward function `spec` could score no completion of a problem with these columns.

    Of your own function, only the names of the columns are checked. A row that it cannot score shows when it is used.
    """
    for name in ARGUMENTS:
        if name in columns:
            raise ValueError(f"the column {name!r} must have another name, because reward functions have this argument")
    if spec == "number":
        _gold_number(_column(spec, "answer", columns))
    if spec == "math" and ((answer := _column(spec, "answer", columns)) is None or not str(answer).strip()):
        raise ValueError(f"column 'answer' must hold LaTeX for reward function 'math', but holds {answer!r}")
    if spec == "reasoning_gym":
        for name in ("question", "answer", "metadata"):
            _column(spec, name, columns)
        _gym_metadata(columns["metadata"])


_PACKAGES = {"math": ("math_verify", "math-verify[antlr4_13_2]"), "reasoning_gym": ("reasoning_gym", "reasoning_gym")}


def resolve(spec: str) -> RewardFunction:
    """Find a reward function and import the packages that it needs.

    Args:
        spec: a name in VERIFIERS, "package.module:function", or "path/to/file.py:function". The path is relative to the
            current directory. The directory of the file is not added to the import path.

    Raises:
        RewardError (a ValueError): there is no such function, or its package is not installed. An error inside your
            module or file is raised unchanged.
    """
    if spec in VERIFIERS:
        if spec in _PACKAGES:
            _import_package(spec, *_PACKAGES[spec])
        return VERIFIERS[spec]
    return find(spec, "reward function", VERIFIERS, RewardError)


def _import_package(spec: str, package: str, to_install: str) -> None:
    # Import the package now. At the first completion, the import would count against the time limit of the completion.
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise RewardError(
            f"reward function {spec!r} needs the package {package}, which is not installed: pip install '{to_install}'"
        ) from error


def _column(function: str, name: str, columns: dict[str, Any]) -> Any:
    if name not in columns:
        raise ValueError(
            f"reward function {function!r} needs the column {name!r}, but the data set's columns are "
            f"{', '.join(columns) or '(none)'}{did_you_mean(name, columns)}"
        )
    return columns[name]


def _to_decimal(text: str) -> Decimal | None:
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _final_number(completion: str) -> Decimal | None:
    """The number in the completion, by the rule of `score_number`. None if the completion does not follow the rule."""
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
        number = Decimal(str(answer))  # str first: Decimal(0.1) is 0.1000000000000000055..., Decimal("0.1") is 0.1
    if number is None or not number.is_finite():
        raise ValueError(f"column 'answer' must hold numbers for reward function 'number', but holds {answer!r:.200}")
    return number


def _gold_text(answer: Any) -> str:
    if answer is None:
        return ""
    text = ", ".join(map(str, answer)) if isinstance(answer, list | tuple) else str(answer)
    return text.rpartition("####")[2].strip()


def _gym_metadata(given: Any) -> dict[str, Any]:
    about = json.loads(given) if isinstance(given, str) else given
    if not isinstance(about, dict) or "source_dataset" not in about:
        raise ValueError(
            "reward function 'reasoning_gym' needs metadata['source_dataset'], the name of a reasoning_gym data set, "
            f"but the metadata is {about!r:.200}"
        )
    return about


@functools.cache  # get_score_answer_fn builds a whole data set object in every call
def _gym_scorer(name: str) -> Callable[..., float]:
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    if name not in DATASETS:
        raise ValueError(
            f"metadata['source_dataset'] must name a reasoning_gym data set, but is {name!r}"
            f"{did_you_mean(name, DATASETS) or '; reasoning_gym.factory.DATASETS lists them'}"
        )
    return get_score_answer_fn(name)
