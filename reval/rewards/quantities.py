r"""Numbers with units: `3\frac{1}{2}`, `1.5\times 10^{3}`, `12⟦ cm⟧^2`, `\$5`, `50%`, `101_{2}`.

A number is exact, as a fraction. `3.50` and `7/2` are the same number; `9.1e-31` and `1.6e-19` are not.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from reval.rewards.units import Unit, known_unit, money_unit, unit_of

MOST_DIGITS = 1000  # of a number; a longer one, or an exponent beyond this, is compared as text only
FEWEST_DIGITS = 6  # a decimal with fewer significant digits stands for itself alone

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_POWER = r"10\s*\^\s*(?:\{\s*(?P<{0}>[+-]?\s*\d+)\s*\}|(?P<{0}_bare>[+-]?\d+))"
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?:"
    r"(?P<whole>\d+)(?:\s*\\frac\{(?P<above>\d+)\}\{(?P<below>\d+)\}|\s+(?P<above_>\d+)/(?P<below_>\d+))"
    rf"|\\frac\{{(?P<top>[+-]?{_DECIMAL})\}}\{{(?P<bottom>{_DECIMAL})\}}"
    r"|(?P<start>\d*\.\d*)(?:\\(?:overline|bar|dot)\{(?P<period>\d+)\}|\((?P<period_>\d+)\))"
    r"|(?P<dotted>\d*\.\d*?(?P<again>\d{1,6}?)(?P=again){2,})(?:\\ldots|\.\.\.)"
    rf"|(?P<mantissa>{_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*{_POWER.replace('{0}', 'power')}"
    rf"|(?P<sci>{_DECIMAL})[eE](?P<exponent>[+-]?\d+)"
    rf"|{_POWER.replace('{0}', 'bare')}"
    rf"|(?P<over>{_DECIMAL})\s*/\s*(?P<under>{_DECIMAL})"
    rf"|(?P<plain>{_DECIMAL})"
    r")"
)
_BASE = re.compile(r"([+-]?)0*([0-9A-Za-z]+?(?:\.[0-9A-Za-z]+)?)_\{?⟦?\s*(\d+|[a-z]+)\s*⟧?\}?")
_BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_BASES |= {"ten": "10", "twelve": "12", "sixteen": "16"}
_MULTIPLIERS = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
_MULTIPLIER = re.compile(rf"\s*(⟦?)\s*({'|'.join(_MULTIPLIERS)})s?\b")
_CURRENCY = re.compile(r"(?P<sign>[+-]?)\s*(?:US)?(?P<symbol>\\\$|[€£¥₹])\s*(?P<rest>.*)", re.DOTALL)


class Quantity(NamedTuple):
    """A number or an expression, and its unit.

    Attributes:
        body: the text without the unit.
        value: the number; None if `body` is an expression, as in 2\\pi.
        step: one unit of the last digit of a decimal with at least FEWEST_DIGITS significant digits, else None.
        unit: None if there is none.
        percent: whether % follows. `value` is then the number before the sign.
    """

    body: str
    value: Fraction | None
    step: Fraction | None
    unit: Unit | None
    percent: bool


def number(text: str) -> tuple[Fraction, Fraction | None, int] | None:
    """The number at the start of a normalized text, its step (see Quantity), and the number of characters read."""
    match = _NUMBER.match(text)
    if match is None or len(match.group()) > MOST_DIGITS:
        return None
    value, written = _value(match)
    if value is None:
        return None
    if match["sign"] == "-":
        value = -value
    return value, _step(written, value), match.end()


def _value(match: re.Match[str]) -> tuple[Fraction | None, str]:
    """The number without its sign, and the decimal as written, if it is one."""
    part = {key: text.replace(",", "") for key, text in match.groupdict().items() if text}
    if "whole" in part:
        above, below = int(part.get("above") or part["above_"]), int(part.get("below") or part["below_"])
        return (int(part["whole"]) + Fraction(above, below) if 0 <= above < below else None), ""
    if "top" in part or "over" in part:
        top, bottom = Fraction(part.get("top") or part["over"]), Fraction(part.get("bottom") or part["under"])
        return (top / bottom if bottom else None), ""
    if "start" in part or "dotted" in part:
        digits, period = part.get("start"), part.get("period") or part.get("period_") or part.get("again") or ""
        if digits is None:
            digits = part["dotted"]
        places = len(digits) - digits.index(".") - 1
        head = Fraction(digits + "0" if digits != "." else "0")
        return head + Fraction(int(period), (10 ** len(period) - 1) * 10**places), ""
    exponent = next((part[k] for k in ("power", "power_bare", "exponent", "bare", "bare_bare") if k in part), None)
    digits = part.get("mantissa") or part.get("sci") or part.get("plain") or "1"
    if exponent is None:
        return Fraction(digits), digits
    shift = int(exponent.replace(" ", ""))
    return (None if abs(shift) > MOST_DIGITS else Fraction(digits) * Fraction(10) ** shift), digits


def _step(written: str, value: Fraction) -> Fraction | None:
    whole, point, decimals = written.partition(".")
    if not point or len((whole + decimals).lstrip("0")) < FEWEST_DIGITS:
        return None
    shift = abs(value) / Fraction(written) if Fraction(written) else Fraction(1)
    return shift * Fraction(1, 10 ** len(decimals))


def based(text: str) -> tuple[str, str] | None:
    """(digits, base) of a numeral with a base other than ten, as in `101_{2}`. None for anything else."""
    match = _BASE.fullmatch(re.sub(r"[\s()]", "", text))
    if match is None or not match[2][0].isdigit():
        return None
    base = _BASES.get(match[3], match[3])
    return (match[1].replace("+", "") + match[2].upper(), base) if base.isdigit() and base != "10" else None


def quantity(text: str) -> Quantity:
    """Split a normalized text into its number or expression, and its unit."""
    money = _CURRENCY.fullmatch(text)
    if money:
        inner = quantity(money["sign"] + money["rest"])
        return inner._replace(unit=inner.unit or money_unit(money["symbol"]))
    text = re.sub(r"(?<=\d)_\{?\s*10\s*\}?$", "", text)  # base ten is no base
    found = number(text)
    if found is not None:
        value, step, end = found
        rest = text[end:]
        multiplier = _MULTIPLIER.match(rest)
        if multiplier is not None:  # 5 million
            value, step = value * _MULTIPLIERS[multiplier[2]], None
            rest = re.sub(r"^⟦\s*⟧", "", multiplier[1] + rest[multiplier.end() :])
        if not rest.strip():
            return Quantity(text, value, step, None, False)
        unit, percent = unit_of(rest)
        if unit or percent:
            return Quantity(text[:end], value, step, unit, percent)
    body, rest = _expression_and_unit(text)
    unit, percent = unit_of(rest) if rest else (None, False)
    if unit or percent:
        return Quantity(body, None, None, unit, percent)
    return Quantity(text, None, None, None, False)


def _expression_and_unit(text: str) -> tuple[str, str]:
    """For an expression a unit is a marked text, a degree, a percent sign, or a known word after a space."""
    match = re.fullmatch(r"(.*[^\s⟧^/])(\s*(?:\^\\circ.*|%|⟦[^⟦⟧]*[^⟦⟧\s][^⟦⟧]*⟧\S*))", text, re.DOTALL)
    if match is None:
        match = re.fullmatch(r"(.*[\w})!])(\s+[A-Za-z]{2,}(?:\s*\^\s*\{?\d\}?)?)", text, re.DOTALL)
        if match is None or known_unit(match[2].split("^")[0].strip()) is None:
            return text, ""
    return match[1].strip(), match[2]


def equal_numbers(gold: Fraction, gold_step: Fraction | None, answer: Fraction, answer_step: Fraction | None) -> bool:
    """Equal, or one of them is the other one correctly rounded to at least FEWEST_DIGITS significant digits.

    Rounding counts only for a number that has no end as a decimal: 0.333333 is right for 1/3, and 2.500001 is wrong
    for 2.5. A decimal of 15 digits or more counts as one without end, because floating point wrote it:
    0.30000000000000004 is 0.3.
    """
    if gold == answer:
        return True
    if _is_float(gold, gold_step) and abs(gold - answer) <= abs(gold) / 10**15:
        return True
    for exact, own_step, rounded, step in (
        (gold, gold_step, answer, answer_step),
        (answer, answer_step, gold, gold_step),
    ):
        endless = not _ends(exact) or _is_float(exact, own_step)
        if step is not None and endless and abs(exact - rounded) * 2 <= step:
            return True
    return False


def _is_float(value: Fraction, step: Fraction | None) -> bool:
    return step is not None and abs(value) >= step * 10**14


def _ends(value: Fraction) -> bool:
    """Whether a number has an end as a decimal."""
    below = value.denominator
    for prime in (2, 5):
        while below % prime == 0:
            below //= prime
    return below == 1
