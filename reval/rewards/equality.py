r"""Whether a final answer equals the right answer. docs/extending.md lists what counts as equal."""

from __future__ import annotations

import re
from fractions import Fraction

from reval.rewards import algebra
from reval.rewards.normalize import normalize
from reval.rewards.quantities import Quantity, based, equal_numbers, quantity
from reval.rewards.structure import FLIPPED, NAME, ORDERS, Items, Leaf, Named, Node, Relation, read, spelling
from reval.rewards.units import conversion

MOST_CHARACTERS = 2000  # of an answer; a longer one is wrong, unless the right answer is long
_CHOICE = re.compile(r"⟦?\s*\(?\s*([A-J])\s*\)?\s*⟧?")
_CHOICE_WITH_TEXT = re.compile(r"(?:⟦\s*)?(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])(?:\s*⟧)?(?P<rest>.+)", re.DOTALL)
_CHOICE_WORD = re.compile(
    r"(?:the\s+)?(?:correct\s+|right\s+)?(?:option|choice|answer)\s*:?\s*(?=\(?[A-J]\b)", re.IGNORECASE
)
_OTHER_CHOICE = re.compile(r"\([A-J]\)|\b(?!A [a-z]|I\b)[A-J]\b|\b(?:or|nor|not|either)\b")
_EMPTY = re.compile(
    r"\\emptyset|\\\{\s*\\\}|⟦?\s*(?:there (?:is|are) )?(?:no solutions?|the empty set|empty set)\s*⟧?", re.IGNORECASE
)


def equal(gold: str, answer: str) -> bool:
    """Whether a final answer equals the right answer. Neither needs to be normalized."""
    if len(answer) > max(MOST_CHARACTERS, 4 * len(gold)):
        return False
    right, given = normalize(gold), normalize(answer)
    if not right or not given:
        return False
    letter = _CHOICE.fullmatch(right)
    if letter is not None:
        return choice(given) == letter[1] or (not right.startswith(("(", "⟦(")) and spelling(given) == letter[1])
    return _same(read(right), read(given))


def readable(gold: str) -> bool:
    """Whether some answer can be equal to this one."""
    text = normalize(gold)
    return bool(text) and (_CHOICE.fullmatch(text) is not None or _readable(read(text)))


def choice(text: str) -> str | None:
    """The letter of a normalized answer to a multiple choice: `B`, `(B)`, `option B`, `(B) 12 cm`. Else None."""
    text = _CHOICE_WORD.sub("", text)
    alone = _CHOICE.fullmatch(text)
    if alone is not None:
        return alone[1]
    found = _CHOICE_WITH_TEXT.fullmatch(text)
    if found is None or _OTHER_CHOICE.search(re.sub(r"[⟦⟧]", " ", found["rest"])):
        return None
    return found[1] or found[2]


def is_value(text: str) -> bool:
    """Whether a normalized text is an answer by itself: mathematics or the letter of a choice, and no sentence."""
    if choice(text) is not None:
        return True
    return bool(text) and _mathematical(read(text))


def _same(gold: Node, answer: Node) -> bool:
    if isinstance(gold, Named) or isinstance(answer, Named):
        return _same_named(gold, answer)
    if isinstance(gold, Items) and gold.left == r"\approx":
        return _same(gold.items[-1], answer)
    if isinstance(answer, Items) and answer.left == r"\approx":
        return any(_same(gold, i) for i in answer.items)
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _same_relation(gold, answer)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return False
    if isinstance(gold, Leaf) and isinstance(answer, Leaf):
        return _same_leaf(gold.text, answer.text)
    if any(isinstance(side, Leaf) and _EMPTY.fullmatch(side.text) for side in (gold, answer)):
        return False  # {0} and the set of the empty set are not empty
    return _same_items(_as_items(gold), _as_items(answer))


def _same_named(gold: Node, answer: Node) -> bool:
    """A name that only one of the two has does not count; two different names are different answers."""
    if isinstance(gold, Named) and isinstance(answer, Named):
        if gold.name and answer.name and gold.name != answer.name:
            ours, theirs = gold.equation, answer.equation
            return ours is not None and theirs is not None and _same_relation(ours, theirs)
        return all(_same(gold.values[-1], v) for v in answer.values)
    if isinstance(answer, Named):
        several = isinstance(gold, Items) and any(isinstance(i, Named) for i in gold.items)
        return not several and all(_same(gold, v) for v in answer.values)
    assert isinstance(gold, Named)
    if isinstance(answer, Relation):
        return gold.equation is not None and _same_relation(gold.equation, answer)
    return _same(gold.values[-1], answer)


def _as_items(node: Node) -> Items:
    return node if isinstance(node, Items) else Items("", "", (node,))


def _same_items(gold: Items, answer: Items) -> bool:
    """Sets and lists: in any order. Tuples, intervals and matrices: in order, with the same brackets."""
    if gold.left == r"\{" or answer.left == r"\{":
        gold, answer = _without_repeats(gold), _without_repeats(answer)
    if len(gold.items) != len(answer.items):
        return False
    named = [all(isinstance(i, Named) and i.name for i in side.items) for side in (gold, answer)]
    if any(named) and not all(named):  # x = 1, y = 2 and (1, 2)
        gold, answer = (
            _by_name(side) if is_named else side for side, is_named in zip((gold, answer), named, strict=True)
        )
    brackets, given = (gold.left, gold.right), (answer.left, answer.right)
    if brackets != given:
        loose = {("", ""), (r"\{", r"\}")} >= {brackets, given}
        # 1, 2 is the point (1, 2) without its brackets, but never the interval (1, 2).
        loose = loose or ({("", ""), ("(", ")")} >= {brackets, given} and not _may_be_interval(gold, answer))
        if not loose and not (_is_interval(gold) and _is_interval(answer)):
            return False
        if not loose and (_open_ends(gold) != _open_ends(answer)):
            return False
    in_order = "(" in (gold.left, answer.left) or "[" in (gold.left, answer.left)
    if in_order:
        return all(_same(g, a) for g, a in zip(gold.items, answer.items, strict=True))
    left = list(answer.items)
    for item in gold.items:
        match = next((a for a in left if _same(item, a)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _is_interval(node: Items) -> bool:
    return node.left in ("(", "[") and node.right in (")", "]") and len(node.items) == 2


def _may_be_interval(*sides: Items) -> bool:
    """Whether the side with brackets is an interval: two ends, the first below the second."""
    node = next(side for side in sides if side.left)
    if len(node.items) != 2 or not all(isinstance(i, Leaf) for i in node.items):
        return False
    low, high = (algebra.value_of(i.text) for i in node.items if isinstance(i, Leaf))
    return low is None or high is None or low < high


def _open_ends(node: Items) -> tuple[bool, bool]:
    """Whether the ends are open; an infinite end always is."""
    low, high = (isinstance(i, Leaf) and i.text.replace(" ", "").lstrip("+-") == r"\infty" for i in node.items)
    return node.left == "(" or low, node.right == ")" or high


def _without_repeats(node: Items) -> Items:
    return Items(node.left, node.right, tuple(dict.fromkeys(node.items)))


def _by_name(node: Items) -> Items:
    ordered = sorted((i for i in node.items if isinstance(i, Named)), key=lambda i: i.name)
    return Items("(", ")", tuple(i.values[-1] for i in ordered))


def _same_relation(gold: Relation, answer: Relation) -> bool:
    if tuple(map(spelling, gold.sides)) == tuple(map(spelling, answer.sides)) and gold.relations == answer.relations:
        return True
    if len(gold.sides) != 2 or len(answer.sides) != 2:
        return False
    ours, theirs = gold.relations[0], answer.relations[0]
    sides = list(answer.sides)
    if ours != theirs and FLIPPED.get(theirs) == ours:
        theirs, sides = ours, sides[::-1]
    if ours != theirs or ours not in (*ORDERS, "=", r"\ne"):
        return False
    several = len(set(re.findall(r"[A-Za-z]", algebra.latex_of(" ".join(gold.sides))))) > 1
    return several and algebra.equivalent_relations(list(gold.sides), sides, directed=ours in ORDERS)


def _same_leaf(gold: str, answer: str) -> bool:
    if gold and _unended(spelling(gold)) == _unended(spelling(answer)):
        return True
    if _EMPTY.fullmatch(gold) and _EMPTY.fullmatch(answer):
        return True
    if based(gold) or based(answer):
        return based(gold) == based(answer)
    if re.fullmatch(r"\d+(?:\s*:\s*\d+)+", gold):
        parts = re.split(r"\s*:\s*|\s*/\s*|⟦? to ⟧?", re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1:\2", answer))
        return [p.strip() for p in parts] == re.split(r"\s*:\s*", gold)
    if _is_word(gold) or _is_word(answer):
        return _same_words(gold, answer)
    right, given = quantity(gold), quantity(answer)
    factor = conversion(right.unit, given.unit)
    if right.percent and given.unit or given.percent and right.unit:
        return False
    if factor is None or given.value is None and right.value is None and factor != 1:
        return False
    if right.value is not None and given.value is not None:
        step = None if given.step is None else given.step * factor
        return _same_percent(right.value, right.percent, right.step, given.value * factor, given.percent, step)
    if right.percent != given.percent or factor != 1:
        return False
    for known, other in ((right, given), (given, right)):
        if known.value is not None and known.step is not None:  # 3.14159265 and \pi
            exact, value = algebra.exact_of(other.body), algebra.value_of(other.body)
            if exact is not None:
                return equal_numbers(exact, None, known.value, known.step)
            return value is not None and abs(value - known.value) * 2 <= known.step
    return algebra.equal(_exact(right), _exact(given))


def _unended(text: str) -> str:
    return re.sub(r"(?<!\.)\.$", "", text)


def _exact(side: Quantity) -> str:
    """The body for the parser, which would read 1e-5 as a product with Euler's number."""
    return side.body if side.value is None else rf"\frac{{{side.value.numerator}}}{{{side.value.denominator}}}"


def _same_percent(
    gold: Fraction,
    gold_percent: bool,
    gold_step: Fraction | None,
    answer: Fraction,
    percent: bool,
    step: Fraction | None,
) -> bool:
    """50% is right for 0.5, and for 50: the problem may ask for per cents. But 0.5% is not right for 0.5."""
    if gold_percent == percent:
        return equal_numbers(gold, gold_step, answer, step)
    if gold == answer and gold > 1:
        return True
    return gold / (100 if gold_percent else 1) == answer / (100 if percent else 1)


def _is_word(text: str) -> bool:
    """Words, in \\text or without: two letters or more, and nothing that counts."""
    plain = re.sub(r"[⟦⟧]", " ", text).strip()
    if not re.fullmatch(r"[^\W\d_][^\\\d=<>+*^_{}()]*", plain) or not re.search(r"[A-Za-z]{2}", plain):
        return False
    return bool("⟦" in text or re.search(r"[A-Za-z]{3}|[eiou]|[A-Z]{2}", plain)) and not re.fullmatch(
        r"(?:sin|cos|tan|log|ln)\s*[a-z]", plain
    )


def _same_words(gold: str, answer: str) -> bool:
    """The case counts, except in ordinary words: `yes` is right for `Yes`, and `CO` is wrong for `Co`."""
    right, given = (
        re.sub(r"^(?:the|an?) |[-\s]+", lambda m: " " if not m.group().strip(" -") else "", w, flags=re.I)
        for w in (_plain_words(gold), _plain_words(answer))
    )
    if right == given:
        return True
    ordinary = len(right) > 2 or right.lower() == "no"
    return (
        ordinary
        and right.lower() == given.lower()
        and all(w.islower() or w.istitle() for w in re.findall("[A-Za-z]+", right))
    )


def _plain_words(text: str) -> str:
    return " ".join(re.sub(r"[⟦⟧\"'`*.!]", " ", text).split())


def _mathematical(node: Node) -> bool:
    """Whether no part is a word or a sentence."""
    if isinstance(node, Relation):
        return all(_mathematical(read(s)) for s in node.sides if s and not NAME.fullmatch(s))
    if isinstance(node, Items):
        return all(_mathematical(i) for i in node.items)
    if isinstance(node, Named):
        return all(_mathematical(v) for v in node.values)
    text = node.text
    if _EMPTY.fullmatch(text) or based(text):
        return True
    found = quantity(text)
    return found.value is not None or (not _is_word(text) and bool(algebra.latex_of(found.body)))


def _readable(node: Node) -> bool:
    if isinstance(node, Relation):
        return all(algebra.parse(s) is not None for s in node.sides)
    if isinstance(node, Items):
        return bool(node.items) and all(_readable(i) for i in node.items)
    if isinstance(node, Named):
        return _readable(node.values[-1])
    text = node.text
    if _EMPTY.fullmatch(text) or based(text) or re.fullmatch(r"[\d\s:]+", text):
        return True
    found = quantity(text)
    if found.value is not None or algebra.parse(found.body) is not None:
        return True
    return not re.search(r"[\\{}^_]", re.sub(r"⟦[^⟧]*⟧", "", text)) and bool(re.search(r"\w\w", text))
