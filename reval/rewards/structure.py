r"""The structure of a normalized answer: lists, sets, tuples, intervals, unions, relations, values with a name.

`read` cuts a text into its parts and leaves the parts as texts. Examples: `(1, 2]` is an interval of two leaves;
`x < 3` is the interval from -\\infty to 3 with the name x; `x = 1 + 2 = 3` is the name x with two values.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from reval.rewards import algebra
from reval.rewards.quantities import number, quantity

_TOKEN = re.compile(r"\\begin\{[^{}]*\}|\\end\{[^{}]*\}|\\[a-zA-Z]+|\\.|⟦[^⟧]*⟧|[A-Za-z]+|\s+|.", re.DOTALL)
_OPEN = {"(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil"}
_CLOSE = {")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil"}
ORDERS = {"<": "<", ">": ">", r"\le": r"\le", r"\ge": r"\ge"}
_RELATIONS = {*ORDERS, "=", r"\ne", r"\approx", r"\in"}
FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}

_SYMBOL = r"(?:[A-Za-z]|\\(?!pi\b|frac|sqrt|begin|infty)[a-zA-Z]+)(?:_(?:\{[^{}]*\}|[A-Za-z0-9]))?'*"
_ARGUMENT = r"-?(?:[\d./]+|[A-Za-z]\w?|\\[a-zA-Z]+)"
NAME = re.compile(
    rf"(?:m?\s*\\(?:angle|triangle|overline|widehat|vec|hat|bar|mathbf|mathcal)\s*\{{?[A-Za-z]{{1,3}}\}}?|"
    rf"{_SYMBOL}|[A-Z]{{2,4}}|\|[A-Za-z]{{1,2}}\||\[[A-Z]{{3,5}}\]|"
    rf"[A-Za-z]'*\(\s*{_ARGUMENT}(?:\s*,\s*{_ARGUMENT})*\s*\)|[PE]\([^=]*\)|"
    r"\\frac\{d\w?\}\{d\w\}|(?:⟦[^⟧]*⟧|[A-Za-z]{3,})(?:\s+(?:⟦[^⟧]*⟧|[A-Za-z]+))*)"
)
_SET_BUILDER = re.compile(r"\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\{?R\}?\s*)?(?:\\mid|\||:)\s*(.+)", re.DOTALL)
_CLAUSE = re.compile(
    r"\b(?:if|let|suppose|assume|say|given|when|where|since|because|for|then|not|take|set)\b", re.IGNORECASE
)
_VARIABLE = re.compile(r"(?:[A-Za-z]|\\(?!pi\b|infty\b)[a-z]+)(?:_(?:\{\w+\}|\w))?(?:\([a-z]\))?")
_REALS = re.compile(r"\\mathbb\{?\s*R\s*\}?|\\R|⟦?\s*all real numbers\s*⟧?|⟦?\s*all reals\s*⟧?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Leaf:
    """A number, an expression or a word."""

    text: str


@dataclass(frozen=True, slots=True)
class Items:
    """Several values: without brackets if `left` is empty, else in brackets such as ( ], or joined by \\cup."""

    left: str
    right: str
    items: tuple[Node, ...]
    either: bool = False
    """Joined by "or"."""


@dataclass(frozen=True, slots=True)
class Relation:
    """Sides and the relations between them: a = b < c has three sides and two relations."""

    sides: tuple[str, ...]
    relations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Named:
    """A value with a name, as in x = 5, x = 2 + 3 = 5, x \\in (1, 2)."""

    name: str
    values: tuple[Node, ...]
    """All of them have to be right."""
    equation: Relation | None = None
    """`y = 2x + 1` as an equation, which `2x - y + 1 = 0` may equal."""


Node = Leaf | Items | Relation | Named


@functools.lru_cache(maxsize=4096)
def read(text: str) -> Node:
    """The structure of a normalized text. A relation becomes what it says of one name, where it does so."""
    return _settle(_read(text))


def _tokens(text: str) -> list[tuple[str, int]]:
    """The tokens of a text, each with the number of brackets around it. A closing bracket has that of its opening."""
    out, depth, bars = [], 0, text.count("|") % 2 == 0
    inside = False
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in _CLOSE or token.startswith(r"\end"):
            depth = max(0, depth - 1)
        if token == "|" and bars:
            inside = not inside
            depth += 1 if inside else -1
        out.append((token, depth))
        if token in _OPEN or token.startswith(r"\begin"):
            depth += 1
    return out


def _split(text: str, separator: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """Cut a text at the separators outside all brackets."""
    parts, found = [""], []
    for token, depth in _tokens(text):
        if depth == 0 and separator(token):
            parts.append("")
            found.append(token)
        else:
            parts[-1] += token
    return [p.strip() for p in parts], found


def _separates(token: str) -> bool:
    return token in (",", ";") or token.strip("⟦⟧ ,").lower() in ("and", "or")


def _read(text: str) -> Node:
    text = re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m.group().replace(",", ""), text.strip())
    parts, found = _split(text, _separates)
    if len(parts) > 1:
        items = [_read(p) for p in parts if p]
        flat = [i for item in items for i in (item.items if isinstance(item, Items) and not item.left else (item,))]
        either = any(token.strip("⟦⟧ ,").lower() == "or" for token in found)
        return items[0] if len(flat) == 1 else Items("", "", tuple(flat), either)
    parts, _ = _split(text, lambda token: token == r"\cup")
    if len(parts) > 1:
        return Items(r"\cup", "", tuple(_read(p) for p in parts))
    sides, relations = _split(text, lambda token: token in _RELATIONS)
    if relations:
        return Relation(tuple(sides), tuple(relations))
    if text.count(r"\pm") == 1:
        plus, minus = (text.replace(r"\pm", sign).strip() for sign in "+-")
        return Items("", "", (_read(plus.removeprefix("+")), _read(minus)))
    return _bracketed(text) or Leaf(text)


def _bracketed(text: str) -> Node | None:
    """The content of brackets that enclose the whole text."""
    tokens = [(t, d) for t, d in _tokens(text) if not t.isspace()]
    if len(tokens) < 3 or tokens[0][0] not in ("(", "[", r"\{", r"\langle") or any(d == 0 for _, d in tokens[1:-1]):
        return None
    left, right = tokens[0][0], tokens[-1][0]
    if right not in (")", "]", r"\}", r"\rangle"):
        return None
    inner = text.strip()[len(left) : -len(right)]
    builder = _SET_BUILDER.fullmatch(inner) if left == r"\{" else None
    if builder is not None:
        return _read(builder[1])
    parts, _ = _split(inner, lambda token: token in (",", ";"))
    if len(parts) == 1:
        content = _read(inner)
        if left == r"\{":
            content = content if isinstance(content, Items) and not content.left else Items("", "", (content,))
            return Items(left, right, content.items)
        return content if left + right in ("()", "[]") and not isinstance(content, Relation) else None
    if left == r"\langle":
        left, right = "(", ")"
    items = [_read(p) for p in parts]
    if left == r"\{":
        items = [i for item in items for i in (item.items if isinstance(item, Items) and not item.left else (item,))]
    return Items(left, right, tuple(items))


def _settle(node: Node) -> Node:
    """A relation as what it says of one name, where it does so: x = 5, x < 3, x \\in (1, 2)."""
    if isinstance(node, Items):
        items = tuple(_settle(i) for i in node.items)
        first = items[0] if items and not node.left else None
        if isinstance(first, Named) and all(isinstance(i, Leaf) for i in items[1:]):  # x = 1, 2
            items = (first, *(Named(first.name, (i,)) for i in items[1:]))
        if not node.left and all(isinstance(i, Named) for i in items):
            return _settle_named(items, node.either)  # type: ignore[arg-type]
        return Items(node.left, node.right, items, node.either)
    if not isinstance(node, Relation):
        if isinstance(node, Leaf) and _REALS.fullmatch(node.text):
            return Items("(", ")", (Leaf(r"-\infty"), Leaf(r"\infty")))
        return node
    sides, relations = node.sides, node.relations
    if len(sides) == 2 and not sides[0]:  # "= 5", "\approx 5"; but "< 3" stays a relation
        return _settle(_read(sides[1])) if relations[0] in (r"\approx", r"\in") else node
    if any(not s for s in sides):
        return node
    if set(relations) <= {"=", r"\approx"}:
        return _settle_equation(sides, relations, node)
    if relations == (r"\in",):
        return Named(spelling(sides[0]), (_settle(_read(sides[1])),))
    return _settle_inequality(sides, relations) or node


def _settle_named(items: tuple[Named, ...], either: bool) -> Node:
    """`x = 1 or x = 2` and `x_1 = 1, x_2 = 2` are one name with a list; `x = 1, y = 2` keeps its names."""
    stems = {re.sub(r"_\{?\d+\}?$", "", i.name) for i in items}
    if len(stems) > 1:
        return Items("", "", items)
    interval = all(isinstance(i.values[-1], Items) and i.values[-1].left in ("(", "[") for i in items)
    values = tuple(i.values[-1] for i in items)
    if interval and not either:
        return Items("", "", items)
    return Named(stems.pop(), (Items(r"\cup" if interval else "", "", values),))


def _settle_equation(sides: tuple[str, ...], relations: tuple[str, ...], node: Relation) -> Node:
    if not _is_name(sides[0]) and _is_name(sides[-1]) and len(sides) == 2:
        sides = (sides[1], sides[0])
    named = _is_name(sides[0])
    rest = sides[1:] if named else sides
    if not named and any(_has_variables(s) for s in sides):
        return node
    if r"\approx" in relations:
        # The last side has to be the one before it, rounded. Otherwise `7 \approx 8` would be right for 7 and for 8.
        kept = rest if len(rest) == 1 else rest[-2:] if _rounds(rest[-2], rest[-1]) else ()
        if not kept:
            return node
        return Named(sides[0] if named else "", (Items(r"\approx", "", tuple(_settle(_read(s)) for s in kept)),))
    return Named(spelling(sides[0]) if named else "", tuple(_settle(_read(s)) for s in rest), node)


def _is_name(text: str) -> bool:
    if re.fullmatch(r"\(\s*[a-z](?:\s*,\s*[a-z])+\s*\)", text):  # (x, y) = (1, 2), but not (y, x) = (1, 2)
        return sorted(re.findall("[a-z]", text)) == re.findall("[a-z]", text)
    return NAME.fullmatch(text) is not None and not _CLAUSE.search(text)


def _has_variables(text: str) -> bool:
    constants = re.sub(r"⟦[^⟧]*⟧|\\pi\b|\\(?:sqrt|frac|cdot|times|infty|circ|log|ln|sin|cos|tan|binom)\b", " ", text)
    return bool(re.search(r"[A-Za-df-hj-z]", constants))


def _rounds(exact: str, rounded: str) -> bool:
    found = number(rounded)
    value = quantity(exact).value
    value = algebra.value_of(quantity(exact).body) if value is None else value
    if found is None or value is None:
        return False
    digits = re.match(r"[^.]*\.?(\d*)", rounded)
    places = len(digits[1]) if digits else 0
    return abs(value - found[0]) * 2 <= Fraction(1, 10**places)


def _settle_inequality(sides: tuple[str, ...], relations: tuple[str, ...]) -> Node | None:
    variables = [i for i, s in enumerate(sides) if _VARIABLE.fullmatch(s) and s != "e"]
    others = [s for i, s in enumerate(sides) if i not in variables]
    if len(variables) != 1 or any(_has_variables(s) for s in others):
        return None
    place, name = variables[0], spelling(sides[variables[0]])
    infinite = (Leaf(r"-\infty"), Leaf(r"\infty"))
    if relations == (r"\ne",):
        point = _read(others[0])
        return Named(
            name, (Items(r"\cup", "", (Items("(", ")", (infinite[0], point)), Items("(", ")", (point, infinite[1])))),)
        )
    if any(r not in ORDERS for r in relations):
        return None
    lower, upper, left, right = infinite[0], infinite[1], "(", ")"
    steps = [(sides[place - 1], relations[place - 1])] if place else []
    steps += [(sides[place + 1], FLIPPED[relations[place]])] if place + 1 < len(sides) else []
    if len(steps) != len(sides) - 1:
        return None
    for side, relation in steps:  # side <relation> name
        bound = _read(side)
        if relation in ("<", r"\le"):
            lower, left = bound, "(" if relation == "<" else "["  # type: ignore[assignment]
        else:
            upper, right = bound, ")" if relation == ">" else "]"  # type: ignore[assignment]
    if len({relation in ("<", r"\le") for _, relation in steps}) < len(steps):
        return None  # a < x > b
    return Named(name, (Items(left, right, (lower, upper)),))


def spelling(text: str) -> str:
    """A text without the marks of words and without spaces; only for a comparison of two texts."""
    text = re.sub(r"[⟦⟧]", "", text)
    text = re.sub(r"_\{(\w)\}", r"_\1", re.sub(r"\^\{(\w)\}", r"^\1", text))
    text = re.sub(r"(?<=\d)\s+(?=\d)", "⋯", text)  # 1 0 is not 10
    return re.sub(r"\s+", "", re.sub(r"(\\[a-zA-Z]+)\s+(?=[a-zA-Z])", r"\1⋯", text))
