r"""Extracts the final answer of a completion as text, for majority votes (maj@k).

Two answers count as equal when their texts are equal after `canonical`. A verifier recognises more equal answers: here
`x+1` and `1+x` are two answers. `RewardPool.extract` runs these functions in its workers. Your own reward function
supports votes if it has the attribute `extract_answer`, a function from the completion to text or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from .final_answer import final_answer
from .normalize import normalize
from .quantities import quantity
from .structure import spelling
from .verifiers import RewardFunction, _final_number

Extractor = Callable[[str], str | None]

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def number_answer(completion: str) -> str | None:
    """The number that `score_number` compares. None if the completion does not follow the rule of `score_number`."""
    number = _final_number(completion)
    if number is None:
        return None
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def math_answer(completion: str) -> str | None:
    r"""The final answer as `score_math` finds it, in its canonical text. None if there is none."""
    final = final_answer(completion)
    return None if final is None else canonical(final) or None


def tagged_answer(completion: str) -> str | None:
    """The text in the last `<answer>...</answer>`, else the whole completion, as in `score_reasoning_gym`.

    None if this text is empty.
    """
    found = _ANSWER_TAG.findall(completion)
    return (found[-1] if found else completion).strip() or None


EXTRACTORS: dict[str, Extractor] = {
    "number": number_answer,
    "math": math_answer,
    "reasoning_gym": tagged_answer,
}


def extractor_of(spec: str, function: RewardFunction) -> Extractor | None:
    """The function that extracts answers for the reward function `spec`, which `resolve` found.

    None if `function` is your own and has no attribute `extract_answer`.
    """
    return EXTRACTORS.get(spec) or getattr(function, "extract_answer", None)


def canonical(answer: str) -> str:
    r"""The same text for common spellings of an answer.

    A number becomes a reduced fraction without its unit: 0.50, 1/2 and \frac{2}{4} all give 1/2; 50\%, 50 and 50^\circ
    all give 50. Another answer becomes its normalized text without spaces.
    """
    text = normalize(answer)
    value: Fraction | None = quantity(text).value
    return spelling(text) if value is None else str(value)
