r"""The final answer in a completion, as text to be counted in a majority vote.

Two answers get one vote together when their texts are equal after the rewriting below. That is weaker than what a
verifier does: `x+1` and `1+x` stay two answers. A computer algebra system may never return (see `score_math`), and
votes are counted in the trainer's own process, so none is asked. A reward function of yours takes part in votes if it
has an attribute `extract_answer`, a function from the completion to text or None.
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
    """The number that `score_number` compares, or None where the completion breaks its rule."""
    number = _final_number(completion)
    return None if number is None else str(Fraction(number))


def math_answer(completion: str) -> str | None:
    r"""What the last closed `\boxed{...}` holds, normalised; without one, the last number."""
    box = _last_box(completion)
    if box is not None:
        return normalise(box) or None
    numbers = _LAST_NUMBER.findall(completion)
    return normalise(numbers[-1]) if numbers else None


def tagged_answer(completion: str) -> str | None:
    """The text in the last `<answer>...</answer>`, or else the whole completion, as `score_reasoning_gym` reads it."""
    found = _ANSWER_TAG.findall(completion)
    return (found[-1] if found else completion).strip() or None


EXTRACTORS: dict[str, Extractor] = {
    "number": number_answer,
    "math": math_answer,
    "reasoning_gym": tagged_answer,
}


def extractor_of(spec: str) -> Extractor | None:
    """How answers are read for the reward function `spec` (see `resolve`); None if it does not say."""
    if spec in EXTRACTORS:
        return EXTRACTORS[spec]
    return getattr(resolve(spec), "extract_answer", None)


def normalise(answer: str) -> str:
    r"""One spelling for the commonest variants of an answer in LaTeX.

    Away go spaces, $, \left and \right, \! \, \; and ~, \text{...} around words, units of % and degrees, thousands'
    commas, a final period; \dfrac and \tfrac are \frac; and what is then a decimal or a fraction of whole numbers is
    reduced: 0.50, 1/2 and \frac{2}{4} all give 1/2.
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
