"""Which answers count as equal in a majority vote, and which do not."""

from __future__ import annotations

import pytest

from reval.rewards import resolve
from reval.rewards.answers import canonical, extractor_of, math_answer, number_answer, tagged_answer


@pytest.mark.parametrize(
    "alike",
    [
        ["1/2", "0.5", "0.50", ".5", r"\frac{1}{2}", r"\dfrac{2}{4}", r"\frac12", "$1/2$", r" \tfrac{1}{2}. "],
        ["1000", "1,000", "1000.0", "+1000", r"\text{1000}"],
        ["-3", r"-\frac{6}{2}", r"$-3$", "-3.0"],
        [r"\left(1, 2\right)", "(1,2)", r"(1,\ 2)", r"\left( 1,\! 2 \right)"],
        ["50", r"50\%", "50%", r"50^\circ", r"50^{\circ}"],
        ["B", r"\text{B}", r"\textbf{B}", r"\mathrm{B}", "B."],
    ],
)
def test_spellings_of_one_answer(alike):
    assert len({canonical(text) for text in alike}) == 1, [canonical(text) for text in alike]


def test_answers_that_differ_stay_apart():
    texts = ["1/2", "1/3", "(1,2)", "[1,2]", "x+1", "x-1", "1,23", "123", "12", "a", "b", "", "1/0", r"\sqrt{2}"]
    assert len({canonical(text) for text in texts}) == len(texts)


def test_number_follows_the_verifier_s_rule():
    assert [number_answer(t) for t in ("7", " 3 + 4 = 7.0.", "1,000", "about 7", "")] == ["7", "7", "1000", None, None]


def test_a_number_may_have_any_number_of_digits():
    # Python refuses to convert integers of more than 4300 digits to text.
    assert number_answer("9" * 4301) == "9" * 4301
    assert number_answer("-0.0" + "9" * 4301) == "-0.0" + "9" * 4301
    assert math_answer(r"\boxed{" + "9" * 4301 + "}") == "9" * 4301
    assert [number_answer(t) for t in ("-0.0", "007.50", "100", "1,000,000")] == ["0", "7.5", "100", "1000000"]


def test_math_takes_the_final_answer_of_the_verifier():
    assert math_answer(r"first \boxed{1}, no: \boxed{\frac{1}{2}} and 9") == "1/2"
    assert math_answer("so 3 apples and 1,200 pears. The answer is 1,200 pears.") == "1200"
    assert math_answer("There are 3 apples and 1,200 pears.") is None
    assert math_answer(r"<think>\boxed{1}</think> \boxed{2}") == "2"
    assert math_answer(r"\boxed{}") is None


def test_math_extraction_computes_nothing():
    assert math_answer(r"\boxed{10^{10^{10}}}") == "10^{10^{10}}"


def test_tags_are_read_as_reasoning_gym_does():
    assert tagged_answer("a <answer>x</answer> b <answer> y\n</answer>") == "y"
    assert tagged_answer(" plain ") == "plain"
    assert tagged_answer(" ") is None


def test_a_function_of_yours_may_bring_its_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def score(prompts, completions, completion_ids, **columns):\n    return [0.0 for _ in completions]\n"
        "def other(prompts, completions, completion_ids, **columns):\n    return [0.0 for _ in completions]\n"
        "score.extract_answer = str.upper\n"
    )
    extract = extractor_of(f"{path}:score", resolve(f"{path}:score"))
    assert extract is not None and extract("a") == "A"
    assert extractor_of(f"{path}:other", resolve(f"{path}:other")) is None
