r"""Finds the final answer of a completion.

An answer counts if the completion marks it as the answer, or if the completion is nothing else (see `final_answer`).
Numbers in the course of a derivation do not count. Of several marked answers the last one counts.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from reval.rewards.equality import MOST_CHARACTERS, equal, is_value
from reval.rewards.normalize import normalize

_THINKING = r"think(?:ing)?|thought|reasoning"
_THOUGHT_END = re.compile(rf"</(?:{_THINKING})>|<\|end_of_thought\|>", re.IGNORECASE)
_THOUGHT_START = re.compile(rf"<(?:{_THINKING})>|<\|begin_of_thought\|>", re.IGNORECASE)
_BOX_OR_BRACE = re.compile(r"\\{1,2}(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_BETWEEN_BOXES = re.compile(r"(?:\\\]|\\\)|\\\[|\\\(|\\\\|\\text\{\s*(?:and|or)\s*\}|and\b|or\b|[\s$,;&])*")
_ONLY_A_BOX = re.compile(r"\s*\$?\s*\\(?:boxed|fbox|framebox)\s*\{(.*)\}\s*\$?\s*", re.DOTALL)
_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_STATEMENT = re.compile(
    r"\b(?:answer|solution|option|choice)s?\b(?P<about>[^.\n:=]{0,80}?)"
    r"(?:\*\*|\$)*(?:\s+(?:is|are|equals?)(?:\s+(?:therefore|thus|then|hence|just|simply))?\b\s*:?|\s*:|\s*=)"
    r"[ \t]*(?:\*\*|__)?[ \t]*(?P<content>\n?\s*[^\n]+)",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####[ \t]*(?P<content>[^\n]+)")
_SENTENCE_END = re.compile(
    r"(?<=[^\s.])\.(?=\s|$|\*\*)(?!\s*\.)|,?\s+\(?(?:because|since)\b|,\s*(?:as|which|so|i\.e)\b", re.IGNORECASE
)
_TAKEN_BACK = re.compile(
    r"\b(?:that|this|it|which)(?:'s| is| was) (?:(?!not )\w+ )?(?:wrong|incorrect|not (?:right|correct)|a mistake)|"
    r"\bi (?:made|have made) (?:a|an)(?: \w+)? (?:mistake|error)\b|\bi was wrong\b|\bscratch that\b|"
    r"\bcorrection\s*[:,]|\boops\b|(?<![\w ])\s*no\s*[,.!:—–-]|\bshould (?:be|have been)\b(?=[^.\n]*\binstead\b)",
    re.IGNORECASE,
)
_DOUBTED = re.compile(r"\b(?:wait|hold on|hmm+|actually|sorry|on second thought|let me re\w*|but)\b", re.IGNORECASE)
_CORRECTION = re.compile(
    r"(?:\b(?:should|must) (?:be|have been|equal)|\b(?:it|that|this|answer|result|value)(?:'s| is| equals)|"
    r"\bcorrect \w+ is)\s*:?\s+(?=(?P<content>[^\n]{1,300}))",
    re.IGNORECASE,
)
_MOST_CORRECTIONS = 20
_DISPLAY = re.compile(r"(?:^|\n)\s*(\$\$[^$]+\$\$|\\\[(?:(?!\\\[).)+\\\])\s*$", re.DOTALL)
_CONCLUSION = re.compile(
    r"^(?:and\s+)?(?:therefore|thus|hence|so|finally|it is|it's|the result is)\b[\s,:]*", re.IGNORECASE
)


class _Found(NamedTuple):
    """A marked answer, and where it stands."""

    start: int
    end: int
    content: str


def final_answer(completion: str) -> str | None:
    r"""The text of the final answer. None if the completion gives none.

    Only what follows the last `</think>` counts; a thought that is not closed has no answer. In that part an answer is
    1. the content of a closed `\boxed{...}` or `\fbox{...}`; boxes with nothing but "and", "or" or a comma between
       them are one answer, a list;
    2. the content of `<answer>...</answer>`;
    3. what follows "the answer is", "Answer:", "#### " or the like, to the end of the sentence.
    The last box or tag counts; without one, the last statement. A statement after the box takes its place if the box is
    taken back in between ("Wait, that is wrong"); otherwise two different answers are none. Without box, tag and
    statement: the whole completion or its last line, if it is nothing but a value ("72", "x = 5", "B").
    """
    text = _after_thought(completion)
    if text is None:
        return None
    marked = sorted([*_boxes(text), *_tags(text)], key=lambda f: f.end)
    stated = [s for s in _statements(text) if not any(_within(s, m) or _within(m, s) for m in marked)]
    values = sorted((s for s in stated if _is_value(s.content)), key=lambda f: f.end) or stated
    if not marked and not values:
        return _whole(text)
    last = (marked or values)[-1]
    if marked and values and values[-1].start >= last.end and _is_value(values[-1].content):
        if _doubt(text[last.end : values[-1].start]):
            last = values[-1]
        elif not equal(last.content, values[-1].content):
            return None
    return _unless_taken_back(last.content, text[last.end :])


def _doubt(text: str) -> re.Match[str] | None:
    return _TAKEN_BACK.search(text) or _DOUBTED.search(text)


def _unless_taken_back(content: str, after: str) -> str | None:
    """The answer, or what the text after it puts in its place."""
    doubt = _doubt(after)
    correction = None if doubt is None else _correction(after[doubt.start() :])
    if correction is None and _TAKEN_BACK.search(after):
        return None
    return (correction or content).strip() or None


def _is_value(text: str) -> bool:
    return len(text) <= MOST_CHARACTERS and is_value(normalize(text))


def _within(inner: _Found, outer: _Found) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def _after_thought(completion: str) -> str | None:
    ends = list(_THOUGHT_END.finditer(completion))
    text = completion[ends[-1].end() :] if ends else completion
    return None if _THOUGHT_START.search(text) else text


def _boxes(text: str) -> list[_Found]:
    """The closed boxes outside all other boxes; neighbours are joined by commas."""
    boxes: list[_Found] = []
    for start, inner, end in _outer_boxes(text):
        content = _inside(text[inner : end - 1])
        if boxes and _BETWEEN_BOXES.fullmatch(text, boxes[-1].end, start):
            before = boxes.pop()
            same = normalize(before.content) == normalize(content)
            start, content = before.start, content if same else f"{before.content}, {content}"
        boxes.append(_Found(start, end, content))
    return boxes


def _outer_boxes(text: str) -> Iterator[tuple[int, int, int]]:
    """(start, start of the content, end) of each closed box, found in one pass. A box in a box is not listed."""
    braces: list[tuple[int, int] | None] = []  # for a box, where it and its content start; for any other brace, None
    closed: list[tuple[int, int, int]] = []
    for match in _BOX_OR_BRACE.finditer(text):
        token = match.group()
        if token == "}":
            box = braces.pop() if braces else None
            if box is not None:
                while closed and closed[-1][0] > box[0]:
                    closed.pop()
                closed.append((*box, match.end()))
        elif token == "{":
            braces.append(None)
        elif token.endswith("{") and len(token) > 2:
            braces.append((match.start(), match.end()))
    yield from closed


def _inside(content: str) -> str:
    """The content of a box that holds nothing but a box."""
    while inner := _ONLY_A_BOX.fullmatch(content):
        if inner[1].count("{") != inner[1].count("}"):
            break
        content = inner[1]
    return content


def _tags(text: str) -> Iterator[_Found]:
    """The content of each `<answer>...</answer>`."""
    for opening, closing in pairwise(_TAG.finditer(text)):
        if not opening[1] and closing[1]:
            content = text[opening.end() : closing.start()]
            boxes = _boxes(content)
            yield _Found(opening.start(), closing.end(), boxes[-1].content if boxes else content)


def _statements(text: str) -> Iterator[_Found]:
    """Each "the answer is ..." and "#### ..."."""
    for match in [*_STATEMENT.finditer(text), *_HASHES.finditer(text)]:
        content, start = match["content"], match.start("content")
        if re.search(r"\bnot\b", match.groupdict().get("about") or ""):
            continue
        inner = list(_STATEMENT.finditer(content))
        if inner:  # "Final answer: the final answer is 7"
            content, start = inner[-1]["content"], start + inner[-1].start("content")
        content = _sentence(content)
        yield _Found(match.start(), start + len(content), content.strip("*_ "))


def _sentence(text: str) -> str:
    """Up to the end of the sentence; a period inside $...$ or a number ends none."""
    text = text.lstrip()
    math = re.match(r"(\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\])(?=[\s.,;!*]|$)", text)
    end = _SENTENCE_END.search(text, math.end() if math else 0)
    return text[: end.start()] if end else text


def _correction(text: str) -> str | None:
    """The answer after "Wait, ...": the last value that a sentence ends with."""
    for match in list(_CORRECTION.finditer(text))[:-_MOST_CORRECTIONS:-1]:
        value = _sentence(match["content"])
        if _is_value(value):
            return value
    return None


def _whole(text: str) -> str | None:
    """The whole text or its last line, if that is nothing but a value; or a few words, such as "yes"."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    display = _DISPLAY.search(text[-MOST_CHARACTERS:])
    for candidate in (text.strip(), display[1] if display else "", lines[-1]):
        value = _CONCLUSION.sub("", candidate, count=1)
        if value and "\n\n" not in value and _is_value(value):
            return value
    words = len(lines) == 1 and len(lines[0]) <= 100 and not re.search(r"[\d\\=]", lines[0])
    return lines[0] if words and len(lines[0].split()) <= 5 else None
