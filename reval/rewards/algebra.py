r"""Whether two expressions are equal. math-verify judges; its roundings are judged again.

math-verify calls two numbers equal whose difference is below 1e-15, for example 9.1e-31 and 1.6e-19, and writes all
variables in lower case. So expressions are parsed here with their case, decimals become fractions, and an answer must
also agree with the right answer at sample points, relative to its size.
"""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction
from typing import Any

_DECIMAL = re.compile(r"(?<![\d.])(\d*\.\d+|\d+\.(?!\d))")
_MIXED = re.compile(r"(?<![\d.}])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}")
_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp max min gcd lcm det lim".split()
_PLAIN_FUNCTION = re.compile(rf"(?<![A-Za-z\\])({'|'.join(_FUNCTIONS)})(?![A-Za-z])")
_NO_EXPRESSION = re.compile(
    r"[⟦⟧'\"?@;&§¢€£]|\d\.\d+\.|(?<![_^\d])\d+\s+[\d.]|\d\s*(?:_|:\s*\d)|(?<![\\A-Za-z{])(?:[A-Za-z]{4,}|mod|and|per|the|not|odd|all|for|div)(?![A-Za-z])"
)
_POINTS = (Fraction(7, 5), Fraction(-13, 11), Fraction(31, 12), Fraction(5, 17), Fraction(-29, 9), Fraction(3, 7))
_DIGITS = 50
_AGREE = Fraction(1, 10**40)
# The parser takes I for the imaginary unit and cannot read e_1. Letters that nobody uses stand for them.
_LETTERS = {"I": r"\varrho ", "e": r"\varsigma ", "E": r"\varpi "}
_LONGEST = 2000  # characters of an expression; a longer one is not parsed


def latex_of(text: str) -> str:
    """Normalized text as LaTeX for the parser. Empty if it holds words, which the parser would take for products."""
    text = re.sub(r"⟦\s*([A-Za-z])\s*⟧", r"\1", text)
    text = re.sub(r"⟦\s*(" + "|".join(_FUNCTIONS) + r")\s*⟧", r"\\\1 ", text)
    text = _PLAIN_FUNCTION.sub(r"\\\1 ", text)
    if len(text) > _LONGEST or (r"\begin" not in text and _NO_EXPRESSION.search(text)):
        return ""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text) if r"\begin" not in text else text
    text = _MIXED.sub(_improper, text)
    text = _DECIMAL.sub(_fraction, text)
    text = re.sub(r"(?<=\d)\s*(?=\()", r"\\cdot ", text)  # the parser takes 2(3) for 2 + 3
    text = re.sub(r"_\{(\w)\}", r"_\1", text)
    text = re.sub(r"\\[a-zA-Z]+|I|[eE](?=_)", lambda m: _LETTERS.get(m.group(), m.group()), text)
    return text.strip()


def _improper(match: re.Match[str]) -> str:
    whole, above, below = (int(g) for g in match.groups())
    return rf"\frac{{{whole * below + above}}}{{{below}}}" if above < below else match.group()


def _fraction(match: re.Match[str]) -> str:
    value = Fraction(match.group(1) + ("0" if match.group(1).endswith(".") else ""))
    return rf"{{\frac{{{value.numerator}}}{{{value.denominator}}}}}" if value.denominator > 1 else str(value.numerator)


@functools.lru_cache(maxsize=4096)  # all responses to a prompt have the same right answer
def parse(text: str) -> Any:
    """The sympy object of a normalized text. None if it cannot be parsed."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
    from math_verify.grader import should_treat_as_complex

    latex = latex_of(text)
    if not latex:
        return None
    config = ConversionConfig(lowercase_symbols=False, interpret_as_mixed_fractions=False)
    real = not should_treat_as_complex(latex) and not re.search(r"\\(?:bar|overline)\b", latex)
    try:
        found = latex2sympy(
            latex, is_real=real or None, convert_degrees=False, normalization_config=None, conversion_config=config
        )
    except Exception:  # the parser raises Exception itself
        return None
    if not isinstance(found, sympy.Basic | sympy.MatrixBase):
        return None
    units = {s: sympy.I for s in found.free_symbols if s.name in ("i", r"\imath")}
    return found.subs(units) if units else found


def equal(gold: str, answer: str) -> bool:
    """Whether two normalized expressions or matrices are equal for all values of their variables."""
    from math_verify import verify

    left, right = parse(gold), parse(answer)
    if left is None or right is None:
        return False
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # hides the warning that its time limits are off
    try:
        return bool(_agree(left, right) and verify(left, right, timeout_seconds=None))
    except Exception:  # see `values`
        return False


def _agree(left: Any, right: Any) -> bool:
    """Whether two sympy objects have the same values at the sample points. Only a difference is certain."""
    import sympy

    if isinstance(left, sympy.MatrixBase) or isinstance(right, sympy.MatrixBase):
        same_shape = isinstance(left, sympy.MatrixBase) and left.shape == getattr(right, "shape", None)
        return same_shape and all(_agree(a, b) for a, b in zip(left, right, strict=True))
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return bool(left == right)
    pairs = [(a, b) for a, b in zip(values(left, right), values(right, left), strict=True) if a is not None]
    return all(b is not None and _close(a, b) for a, b in pairs)


def values(expression: Any, other: Any) -> list[Any]:
    """The values of an expression at the sample points; None where it has none. `other` adds its variables."""
    import sympy

    symbols = sorted(expression.free_symbols | other.free_symbols, key=str)
    out: list[Any] = []
    for shift in range(len(_POINTS) if symbols else 1):
        point = {s: sympy.Rational(_POINTS[(shift + i) % len(_POINTS)]) for i, s in enumerate(symbols)}
        try:
            value = expression.subs(point).doit().evalf(_DIGITS)
        except Exception:  # sympy raises exceptions of all kinds for unusual expressions
            out.append(None)
            continue
        if value.is_Float and value._prec == 1:  # what is left of an exact 0
            value = sympy.S.Zero
        out.append(value if value.is_number and value.is_finite else None)
    return out


def _close(a: Any, b: Any) -> bool:
    return bool(abs(a - b) <= _AGREE.numerator * max(abs(a), abs(b)) / _AGREE.denominator)


def exact_of(text: str) -> Fraction | None:
    """The value of an expression that is a rational number, as 5! is. None for every other expression."""
    import sympy

    found = parse(text)
    value = found.doit() if isinstance(found, sympy.Expr) and not found.free_symbols else None
    return Fraction(int(value.p), int(value.q)) if isinstance(value, sympy.Rational) else None


def value_of(text: str) -> Fraction | None:
    """The value of an expression without variables, to 50 digits."""
    import sympy

    found = parse(text)
    if not isinstance(found, sympy.Expr) or found.free_symbols:
        return None
    value = values(found, found)[0]
    return Fraction(str(value)) if value is not None and value.is_real else None


def equivalent_relations(gold: list[str], answer: list[str], *, directed: bool) -> bool:
    """Whether left - right of one relation is a constant times that of the other; with `directed` a positive one.

    Args:
        gold, answer: the two sides.
    """
    import sympy

    sides = [parse(s) for s in (*gold, *answer)]
    if not all(isinstance(s, sympy.Expr) for s in sides):
        return False
    left, right = sides[0] - sides[1], sides[2] - sides[3]
    if left.free_symbols != right.free_symbols:
        return False
    pairs = [(a, b) for a, b in zip(values(left, right), values(right, left), strict=True) if a is not None]
    ratios = [a / b for a, b in pairs if b not in (None, 0)]
    if len(ratios) < 3 or len(ratios) < len(pairs):
        return False
    return all(_close(r, ratios[0]) for r in ratios) and (not directed or bool(ratios[0] > 0))
