r"""One spelling for one mathematical text: LaTeX, Unicode and plain text become one small LaTeX.

`normalize` changes how a text is written and never what the text means. Examples: `½`, `\dfrac12` and `\tfrac{1}{2}`
become `\frac{1}{2}`; `90°` and `90\degree` become `90^\circ`; `x≤3` becomes `x\le 3`. Words in `\text{...}` and
similar commands are kept between the marks ⟦ and ⟧, so that later steps can tell words from products of letters.
"""

import re
import unicodedata

_CHARACTERS = {
    **dict.fromkeys("−–—‐‑‒﹣－⁻", "-"),
    **dict.fromkeys("×✕⨯", r"\times "),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("⁄∕÷", "/"),
    **dict.fromkeys("≤⩽", r"\le "),
    **dict.fromkeys("≥⩾", r"\ge "),
    **dict.fromkeys("≈≅", r"\approx "),
    **dict.fromkeys("∅⌀", r"\emptyset "),
    **dict.fromkeys("°º˚", r"^\circ "),
    **dict.fromkeys("′’‘", "'"),
    **dict.fromkeys("″“”", '"'),
    **dict.fromkeys("⟨〈", r"\langle "),
    **dict.fromkeys("⟩〉", r"\rangle "),
    **dict.fromkeys("µμ", r"\mu "),
    "≠": r"\ne ",
    "±": r"\pm ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∖": r"\setminus ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "…": r"\ldots ",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "∠": r"\angle ",
    "⟦": "",
    "⟧": "",
}
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma tau upsilon phi chi "
    "psi omega"
).split()
_CHARACTERS |= {unicodedata.lookup(f"GREEK SMALL LETTER {'LAMDA' if n == 'lambda' else n}"): rf"\{n} " for n in _GREEK}
_CHARACTERS |= {
    unicodedata.lookup(f"GREEK CAPITAL LETTER {'LAMDA' if n == 'lambda' else n}"): rf"\{n.capitalize()} "
    for n in "gamma delta theta lambda xi pi sigma phi psi omega".split()
}
_SCRIPTS = [("^", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣ", "0123456789+-nx"), ("_", "₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")]

_ONE_COMMAND = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), "frac"),
    **dict.fromkeys(("leq", "leqslant"), "le"),
    **dict.fromkeys(("geq", "geqslant"), "ge"),
    **dict.fromkeys(("varnothing",), "emptyset"),
    **dict.fromkeys(("land", "wedge"), "text{ and }"),
    **dict.fromkeys(("lor", "vee"), "text{ or }"),
    **dict.fromkeys(("dots", "cdots"), "ldots"),
    "neq": "ne",
    "infin": "infty",
    "lbrace": "{",
    "rbrace": "}",
    "varepsilon": "epsilon",
    "varphi": "phi",
    "bmod": "mod",
    "simeq": "approx",
}
_PLAIN = {
    "lt": "<",
    "gt": ">",
    "div": "/",
    "degree": r"^\circ ",
    "ast": "*",
    "colon": ":",
    "prime": "'",
    "lbrack": "[",
    "rbrack": "]",
    "lvert": "|",
    "rvert": "|",
    "vert": "|",
}
_SIZES = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it|"
    r"tiny|small|large|Large|LARGE|huge|Huge)"
    r"(?![a-zA-Z])(?:\s*\.(?!\d))?"
)
_COLOR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}")
_SPACES = re.compile(
    r"(?<!\\)\\(?:quad|qquad|thinspace|enspace|hspace\*?\{[^{}]*\}|phantom\{[^{}]*\}|[,;:> \n])|~|&nbsp;"
)
_COMMAND = re.compile(r"\\([a-zA-Z]+)")
_TEXT = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|boldsymbol|operatorname\*?|bm)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,;:! ]|\{,\}|,\\!|\{,\}\\!|~|(?<=\d) )\d{3})+(?![\d,])")
_WRAPPERS = [
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("**", "**"),
    ("__", "__"),
    ("`", "`"),
    ('"', '"'),
]
_WORDS = "|".join([*_GREEK, "infinity", "sqrt"])
_PLAIN_WORD = re.compile(rf"(?<![A-Za-z\\⟦])({_WORDS})(?![A-Za-z])(?![^⟦⟧]*⟧)")
_ARGUMENT = r"\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|(\\[a-zA-Z]+|[^\s{}\\]))"
_FRACTION = re.compile(r"\\frac" + _ARGUMENT + _ARGUMENT)
_ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*(?:(\d+(?:\.\d+)?|[a-zA-Z]|\\[a-zA-Z]+)|\(((?:[^()]|\([^()]*\))*)\))")


def normalize(text: str) -> str:
    """The text in the one spelling that this package compares."""
    text = _unicode(text)
    text = _unwrap(re.sub(r"(?<!\S)\*\*(\S[^*]*)\*\*", r"\1", text))
    text = _THOUSANDS.sub(lambda m: re.sub(r"\D+", ",", m.group()), text)
    text = text.replace(r"\!", "").replace("{,}", ",")
    text = _SPACES.sub(" ", text)
    text = re.sub(r"^([+-]?)\$(?=[\d.])(?=[^$]*$)", r"\1\\$", text)  # the dollar of $5 is money
    text = text.replace(r"\$", "¤").replace("$", " ").replace("¤", r"\$")
    text = (
        _SIZES.sub("", _COLOR.sub("", text))
        .replace(r"\%", "%")
        .replace(r"\&", "&")
        .replace(r"\#", "#")
        .replace(r"\_", "_")
    )
    text = _COMMAND.sub(_command, text)
    for _ in range(3):  # \text{\textbf{B}}
        text = _TEXT.sub(r"⟦\1⟧", text)
    text = re.sub(r"⟦+", "⟦", re.sub(r"⟧+", "⟧", text))
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?", r"^\\circ ", text)
    text = text.replace("<=", r"\le ").replace(">=", r"\ge ").replace("!=", r"\ne ").replace("+/-", r"\pm ")
    text = re.sub(r"(?<=[\w)}])\*\*(?=[\w({-])", "^", text)
    text = _PLAIN_WORD.sub(lambda m: r"\infty " if m.group() == "infinity" else rf"\{m.group()} ", text)
    text = re.sub(r"[ \t\r\n]+", " ", text)
    text = _ROOT.sub(lambda m: rf"\sqrt{m.group(1) or ''}{{{m.group(2) or m.group(3)}}}", text)
    for _ in range(4):  # a fraction of fractions
        text = _FRACTION.sub(_fraction, text)
    return _unwrap(text.replace("⟪", r"\frac{").replace("⟫", "}"))


def _unicode(text: str) -> str:
    for mark, raised, plain in _SCRIPTS:
        for run in set(re.findall(f"[{raised}]+", text)):
            text = text.replace(run, f"{mark}{{{run.translate(str.maketrans(raised, plain))}}}")
    out = []
    for char in text:
        if char in _CHARACTERS:
            out.append(_CHARACTERS[char])
        elif char.isascii():
            out.append(char)
        elif unicodedata.category(char) == "Cf":  # zero-width characters, marks of the writing direction
            continue
        elif unicodedata.category(char) == "Zs":
            out.append(" ")
        elif char.isdecimal():
            out.append(str(unicodedata.decimal(char)))
        elif unicodedata.decomposition(char).startswith("<fraction>"):
            above, below = unicodedata.normalize("NFKC", char).split("⁄")
            out.append(rf"\frac{{{above}}}{{{below or '?'}}}")
        else:
            plain = unicodedata.normalize("NFKC", char)  # full-width and mathematical letters
            out.append(plain if len(plain) == 1 and plain.isascii() else char)
    return "".join(out)


def _unwrap(text: str) -> str:
    """Without white space, punctuation at the end, and dollars, brackets or stars around the whole."""
    while True:
        before = text
        text = re.sub(r"(?:\\\\|\\,|\\;|\\!|[\s,;:]|(?<!\.)\.|(?<!\\)\\)+$", "", text.strip())
        for left, right in _WRAPPERS:
            inner = text[len(left) : -len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner and right not in inner:
                text = inner
        if text.startswith("⟦") and text.endswith("⟧") and "⟧" not in text[:-1]:
            words = text[1:-1].strip().rstrip(".,;:")
            text = words if re.match(r"[+-]?[\d.$\\]", words) else f"⟦{words}⟧"
        if text.startswith("{") and _closes(text) == len(text) - 1:
            text = text[1:-1]
        if text == before:
            return text


def _closes(text: str) -> int:
    """The index of the brace that closes the brace at index 0, or -1."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return -1


def _command(match: re.Match[str]) -> str:
    name = match.group(1)
    return _PLAIN[name] if name in _PLAIN else rf"\{_ONE_COMMAND.get(name, name)}"


def _fraction(match: re.Match[str]) -> str:
    above, below = match.group(1) or match.group(2), match.group(3) or match.group(4)
    return f"⟪{above}}}{{{below}⟫"  # the marks hide finished fractions from the next pass
