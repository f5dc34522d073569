r"""Units of a quantity: metres, square feet, miles per hour, dollars, degrees, per cent, and words such as cookies."""

import re
from fractions import Fraction
from typing import NamedTuple

# Words of the closed classes: a phrase with one of them says more than a unit does ("12 or more", "3 halves").
_NO_UNIT = frozenset(
    """
    and or nor not no none but till until through thru between than if when plus minus times over
    divided multiplied squared cubed factorial choose mod modulo base root roots radical radicals power log sin cos tan
    more less fewer greater least most above below under about around approximately roughly nearly almost up down
    exactly other others either both all any some half halves third thirds fourth fourths quarter quarters fifth fifths
    sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths
    one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
    nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion dozen
    score pair pairs couple double triple twice is are was equals equal where which that because since so then
    maybe perhaps wrong correct incorrect st nd rd th infinity undefined
    """.split()
)
_SYMBOLS = {r"\$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen", "₹": "rupee"}


class Unit(NamedTuple):
    """A unit. Two units with the same dimensions convert into each other.

    Attributes:
        dimensions: the exponent of each base dimension, sorted; None for a unit that no table knows, as in 5 apples.
        factor: the unit in base units: 1000 for km.
        words: the unit's words without plural endings.
    """

    dimensions: tuple[tuple[str, int], ...] | None
    factor: Fraction
    words: frozenset[str]


def _table() -> dict[str, tuple[str, Fraction]]:
    """The dimension and the factor of each unit that has a name."""
    table: dict[str, tuple[str, Fraction]] = {}

    def add(dimension: str, factor: Fraction | int | str, names: str) -> None:
        table.update(dict.fromkeys(names.split(), (dimension, Fraction(factor))))

    prefixes = [("n", "nano", "1e-9"), ("\\mu ", "micro", "1e-6"), ("m", "milli", "0.001"), ("c", "centi", "0.01")]
    prefixes += [("d", "deci", "0.1"), ("", "", "1"), ("k", "kilo", "1000"), ("M", "mega", "1e6"), ("G", "giga", "1e9")]
    si = [("m", "meter metre", "length", "1"), ("g", "gram", "mass", "1"), ("s", "second", "time", "1")]
    si += [("L", "liter litre", "volume", "0.001"), ("J", "joule", "energy", "1"), ("W", "watt", "power", "1")]
    si += [("N", "newton", "force", "1"), ("V", "volt", "voltage", "1"), ("Hz", "hertz", "frequency", "1")]
    si += [("Pa", "pascal", "pressure", "1"), ("A", "ampere amp", "current", "1"), ("eV", "electronvolt", "eV", "1")]
    for short, names, dimension, base in si:
        for letter, word, factor in prefixes:
            value = Fraction(base) * Fraction(factor)
            table[letter + short] = (dimension, value)
            table.update({word + name: (dimension, value) for name in names.split()})
    for names, dimension, factor in [
        ("inch inches in", "length", "0.0254"),
        ("foot feet ft", "length", "0.3048"),
        ("yard yd", "length", "0.9144"),
        ("mile mi", "length", "1609.344"),
        ("kgs", "mass", "1000"),
        ("pound lb lbs", "mass", "453.59237"),
        ("ounce oz", "mass", "28.349523125"),
        ("sec", "time", "1"),
        ("minute min", "time", "60"),
        ("hour hr h", "time", "3600"),
        ("day", "time", "86400"),
        ("week wk", "time", "604800"),
        ("month", "month", "1"),
        ("year yr", "month", "12"),
        ("degree deg", "angle", "1"),
        ("arcminute", "angle", "1/60"),
        ("arcsecond", "angle", "1/3600"),
        ("radian rad", "radian", "1"),
        ("celsius", "celsius", "1"),
        ("fahrenheit", "fahrenheit", "1"),
        ("kelvin K", "kelvin", "1"),
        ("ml mL cc", "volume", "0.000001"),
        ("l", "volume", "0.001"),
        ("gallon gal", "volume", "0.003785411784"),
        ("dollar USD usd buck", "dollar", "1"),
        ("cent ¢", "dollar", "0.01"),
        ("euro EUR", "euro", "1"),
        ("rupee Rs", "rupee", "1"),
        ("yen", "yen", "1"),
        ("mol mole", "mole", "1"),
        ("Da dalton u amu", "dalton", "1"),
        ("calorie cal", "calorie", "1"),
        ("kcal", "calorie", "1000"),
    ]:
        add(dimension, factor, names)
    return table


_UNITS = _table()
_SHORT_FOR = {"mph": "mile/hour", "kph": "km/hour", "kmph": "km/hour", "sq": "square", "cu": "cubic", "bucks": "dollar"}
_PEOPLE = {"people": "person", "men": "man", "women": "woman", "children": "child", "feet": "foot", "inches": "inch"}
_LOOSE_LETTERS = frozenset("mgsLhJNWVKl")  # as a unit without \text: `12 m`, but never `12m` or `12 x`


def unit_of(rest: str) -> tuple[Unit | None, bool]:
    """(unit, percent) of the text after a number. (None, False) if the text is no unit."""
    plain = re.sub(r"\s+", " ", re.sub(r"[⟦⟧]|(?<=[A-Za-z])\.", " ", rest)).strip()
    if re.fullmatch(r"%|percent|per cent|pct|percentage points?|%age|percentage", plain):
        return None, True
    if re.match(r"(?:\\cdot|\\times|[*/])\s*(?!⟦)", rest.lstrip()):
        return None, False
    circle = re.fullmatch(r"\^\\circ ?([CFK]?)", plain)
    if circle:
        return known_unit({"": "degree", "C": "celsius", "F": "fahrenheit", "K": "kelvin"}[circle[1]]), False
    if plain in ("'", '"', "''"):
        return known_unit("arcminute" if plain == "'" else "arcsecond"), False
    marked, spaced = rest.lstrip().startswith("⟦"), rest[:1].isspace()
    if (
        not marked
        and len(plain.split("^")[0].strip()) == 1
        and plain != "¢"
        and (not spaced or plain[0] not in _LOOSE_LETTERS)
    ):
        return None, False
    known = known_unit(plain)
    if known is not None:
        return known, False
    return (_plain_unit(plain) if marked or spaced else None), False


def known_unit(plain: str) -> Unit | None:
    """The unit if every word of it is in the table: `cm^2`, `square feet`, `km/h`, `miles per hour`."""
    text = re.sub(r"\b(?:per|an?)\b", lambda m: "/" if m.group() == "per" else "", plain)
    text = re.sub(r"\b[Dd]egrees? (?=[CcFf](?:elsius|ahrenheit)?\b)", "°", text)
    text = re.sub(r"°([CcFf])[a-z]*", lambda m: "celsius" if m[1] in "Cc" else "fahrenheit", text)
    text = re.sub(r"\\cdot|\*|\\times", " ", text)
    text = re.sub(r"[A-Za-z]+", lambda m: _SHORT_FOR.get(m.group(), m.group()), text)
    tokens = re.findall(r"\\mu [A-Za-z]+|[A-Za-z]+|¢|/|\^\s*\{?\s*-?\d+\s*\}?|\S", text)
    dimensions: dict[str, int] = {}
    names: set[str] = set()
    factor, direction, power = Fraction(1), 1, 1
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        if token == "/":
            direction = -1
        elif token in ("square", "cubic"):
            power = 2 if token == "square" else 3
        elif not token.startswith("^"):
            entry = _UNITS.get(token) or _UNITS.get(token.lower() if len(token) > 2 else token)
            entry = entry or (_UNITS.get(token.lower().removesuffix("s")) if len(token) > 2 else None)
            if entry is None or len(re.sub(r"\D", "", following)) > 1:
                return None
            exponent = int(re.sub(r"[^\d-]", "", following)) if following.startswith("^") else power
            exponent *= direction
            dimension, size = entry
            dimension, exponent_of = ("length", 3 * exponent) if dimension == "volume" else (dimension, exponent)
            dimensions[dimension] = dimensions.get(dimension, 0) + exponent_of
            factor *= size**exponent
            power = 1
            names.add(token)
    left = tuple(sorted((k, v) for k, v in dimensions.items() if v))
    return Unit(left, factor, frozenset(names)) if left else None


def money_unit(symbol: str) -> Unit | None:
    """The unit of a currency sign, `$` written as in LaTeX."""
    return known_unit(_SYMBOLS[symbol]) or _plain_unit(_SYMBOLS[symbol])


def _plain_unit(plain: str) -> Unit | None:
    """A unit of words alone, as in 12 cookies. None if the words say more than a unit (see _NO_UNIT)."""
    if not re.fullmatch(r"[A-Za-z]+(?:[ /-][A-Za-z]+)*", plain):
        return None
    words = re.split(r"[ /-]", plain.lower())
    letters = any(len(w) == 1 and w != "a" for w in words)
    if len(words) > 5 or letters or _NO_UNIT.intersection(words) or not any(_word(w) for w in words):
        return None
    return Unit(None, Fraction(1), frozenset(_singular(w) for w in words if w not in ("a", "of", "per", "the")))


def _word(word: str) -> bool:
    """Whether letters are a word and no product of variables such as abc or xyz."""
    return len(word) > 2 and word not in "abcdefghijklmnopqrstuvwxyz" and bool(re.search("[aeiouy]", word))


def _singular(word: str) -> str:
    if word in _PEOPLE:
        return _PEOPLE[word]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return re.sub(r"(?<=[xszh])es$|(?<=[^s])s$", "", word)


def conversion(gold: Unit | None, answer: Unit | None) -> Fraction | None:
    """The number of gold's units in one of answer's units. None if the units do not fit.

    A missing unit fits every unit, except that 30' is never 30.
    """
    if gold is None or answer is None:
        known = answer or gold
        return None if known is not None and known.words & {"arcminute", "arcsecond"} else Fraction(1)
    if gold.dimensions is None or answer.dimensions is None:
        alike = gold.words <= answer.words or answer.words <= gold.words
        return Fraction(1) if alike and gold.dimensions == answer.dimensions else None
    return answer.factor / gold.factor if gold.dimensions == answer.dimensions else None
