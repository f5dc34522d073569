r"""Extracts the final answer of a completion as text, for majority votes (maj@k).

Two answers count as equal when their texts are equal after `normalise`. A verifier recognises more equal answers: here
`x+1` and `1+x` are two answers. This file uses no computer algebra system, because such a system may never return (see
`score_math`) and the votes are counted in the process of the trainer. Your own reward function supports votes if it has
the attribute `extract_answer`, a function from the completion to text or None.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from .verifiers import _final_number, _last_box, resolve

Extractor = Callable[[str], str | None]

_FRACTION = re.compile(r"(-?)\\frac\{?(\d+)\}?\{?(\d+)\}?")
_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")
_LAST_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def number_answer(completion: str) -> str | None:
    """The number that `score_number` compares. None if the completion does not follow the rule of `score_number`."""
    number = _final_number(completion)
    return None if number is None else str(Fraction(number))


def math_answer(completion: str) -> str | None:
    r"""The normalised content of the last closed `\boxed{...}`. Without such a box: the last number, or None."""
    box = _last_box(completion)
    if box is not None:
        return normalise(box) or None
    numbers = _LAST_NUMBER.findall(completion)
    return normalise(numbers[-1]) if numbers else None


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


def extractor_of(spec: str) -> Extractor | None:
    """The function that extracts answers for the reward function `spec` (see `resolve`).

    None if `spec` is your own reward function and has no attribute `extract_answer`.
    """
    if spec in EXTRACTORS:
        return EXTRACTORS[spec]
    return getattr(resolve(spec), "extract_answer", None)


def normalise(answer: str) -> str:
    r"""The same text for common LaTeX spellings of an answer.

    Removes spaces, $, \left and \right, \! \, \; and ~, \text{...} around words, the units % and degree, commas between
    thousands, and a final period. Replaces \dfrac and \tfrac by \frac. If the result is a decimal number or a fraction
    of whole numbers, the fraction is reduced: 0.50, 1/2 and \frac{2}{4} all give 1/2.
    """
    text = answer.strip().strip("$").strip()
    text = re.sub(r"\\(?:left|right|[!,;:]| )|~|\$", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = _TEXT.sub(r"\1", text)
    text = re.sub(r"\\?%|\^\{?\\circ\}?|\\degree", "", text)
    text = re.sub(r"\s+", "", text).removesuffix(".")
    if re.fullmatch(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        text = text.replace(",", "")
    plain = _FRACTION.sub(r"\1\2/\3", text) if _FRACTION.fullmatch(text) else text
    if _NUMBER.fullmatch(plain):
        try:
            return str(Fraction(plain))
        except (ValueError, ZeroDivisionError):  # 1.5/2, 1/0
            return plain
    return text
