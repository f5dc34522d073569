"""The built-in reward functions, called directly: right answers, wrong answers and broken data sets.

Most cases of `number` are wrong answers. A rule "take the last number" would pass every test with right answers.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reval.rewards import VERIFIERS, RewardError, RewardPool, resolve, verifiers
from reval.rewards.final_answer import final_answer


def score(name, completion, **columns):
    return VERIFIERS[name](["prompt"], [completion], [[1]], **{key: [value] for key, value in columns.items()})[0]


def run_python(code):
    """Run code in a new process. Returns its standard output and standard error."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=env)
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("7", "7"),
        (" 7\n", "7"),
        ("7.", "7"),
        ("7.0", "7"),
        ("+7", 7),
        ("07", "7"),
        ("-7", "-7"),
        ("7", 7.0),
        (".5", "0.5"),
        ("0.1", 0.1),
        ("1,000", "1000"),
        ("1000", "1,000"),
        ("-12,345,678.90.", "-12345678.9"),
        ("3 + 4 = 7", "7"),
        ("3+4=7.", "7"),
        ("(1 + 6) x 1 × 2 / 2 - 0 * 5 = +7.0", "7"),
        ("1 + 1 = 7", "7"),  # the expression is not evaluated
        ("12345678901234567890.1", "12345678901234567890.10"),  # more digits than a float has
    ],
)
def test_number_right(completion, answer):
    assert score("number", completion, answer=answer) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "8",
        "-7",
        "",
        ".",
        "7..",
        "7 .",
        "7 or 8",
        "8 or 7",
        "7 7",
        "6 7",
        "6\n7",
        "6, 7",
        "The answer is 7",
        "The answer is 7.",
        "7 apples",
        "First 3 + 4. That makes 7",
        "3 + 4",
        "3 + 4 = 7 = 7",
        "7 = 3 + 4",
        "3 + 4 = 7 or 8",
        "3 + 4 = 8",
        "= 7",
        "x = 7",
        "y = 7",
        "3 + 4 ==7",
        "3 +\n4 = 7",
        "7%",
        "$7",
        "7e0",
        "0x7",
        "٧",  # a digit, but not ASCII
        "７",
        "0,007",
        "7,",
        "nan",
        "Infinity",
        "6 " * 20000 + "7",  # a long wrong answer must not take long
        "6 + " * 20000 + "=",
    ],
)
def test_number_wrong(completion):
    assert score("number", completion, answer="7") == 0.0


def test_number_badly_placed_commas():
    for completion in ("1,00", "10,00", "1000,000", ",100", "1,000,00"):
        assert score("number", completion, answer=completion.replace(",", "")) == 0.0


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3), st.text(min_size=1, max_size=5))
def test_number_takes_its_answer_and_nothing_around_it(number, prose):
    assert score("number", f"{number:,}", answer=str(number)) == 1.0
    assert score("number", f"so {prose} {number}", answer=str(number)) == 0.0
    assert score("number", f"{number} {prose} so", answer=str(number)) == 0.0


@pytest.mark.parametrize("answer", ["seven", "", None, True, "7 or 8", float("nan"), [7]])
def test_number_refuses_an_answer_that_is_no_number(answer):
    with pytest.raises(ValueError, match="column 'answer' must hold numbers"):
        score("number", "7", answer=answer)


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        (r"so it is \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"so it is \boxed{\frac{1}{2}}", r"$\frac12$", 1.0),
        (r"\boxed{7}", 7, 1.0),
        (r"first \boxed{3}, no: \boxed{7}", "7", 1.0),
        (r"first \boxed{7}, no: \boxed{3}", "7", 0.0),
        (r"\boxed{7} and finally 8, or $x = 9$", "7", 1.0),  # text after the box does not count
        (r"\boxed{8}. The answer is $7$. Therefore 7.", "7", 0.0),
        (r"\boxed{7 or 8}", "7", 0.0),
        (r"\boxed{7}, and then \boxed{8", "7", 1.0),  # the second box is not closed, so the first box counts
        (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1.0),
        (r"\boxed{\boxed{7}}", "7", 1.0),
        (r"\boxed {7}", "7", 1.0),
        (r"\boxed{}", "7", 0.0),
        ("The answer is 12", "12", 1.0),
        ("The answer is 12", "13", 0.0),
        ("no answer at all", "13", 0.0),
        ("", "13", 0.0),
        (r"\frac{1}{", "13", 0.0),
        ("7", "", None),
        ("7", "$$", None),
        ("7", None, None),
        ("7", r"\frac{1}{", None),
    ],
)
def test_math(completion, answer, reward):
    assert score("math", completion, answer=answer) == reward


def test_the_last_box_ends_at_its_own_brace():
    assert final_answer(r"{ } } \boxed{3} or so \boxed{\left\{\frac{1}{2}\right.} }") == r"\left\{\frac{1}{2}\right."
    assert final_answer(r"so it is \boxed 7 or boxed{7}") is None
    assert final_answer("\\boxed{" * 100_000) is None  # one scan per box instead of one pass would take minutes


def test_math_and_its_table():
    r"""Every row of math_pairs.jsonl: the column `answer`, a completion, and whether a mathematician calls it right."""
    lines = (Path(__file__).parent / "math_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    golds, completions = [row["gold"] for row in rows], [row["response"] for row in rows]
    right = sum(row["right"] for row in rows)
    assert len(rows) >= 1000 and 0.4 < right / len(rows) < 0.6
    with RewardPool("math", workers=2, timeout=60) as pool:
        scores = pool.score([""] * len(rows), completions, [[1]] * len(rows), {"answer": golds})
    assert (scores.timeouts, scores.errors, scores.first_error) == (0, 0, None)
    assert [row for row, reward in zip(rows, scores.rewards, strict=True) if reward != row["right"]] == []


def test_math_is_quiet_about_its_disabled_time_limits():
    # Run in a new process, because math-verify prints its warning only once per process.
    code = "from reval.rewards import resolve; print(resolve('math')([''], ['7'], [[1]], answer=['7']))"
    assert run_python(code) == ("[1.0]\n", "")


COUNTING = {"question": "How many legs have 2 cats?", "answer": "8", "metadata": {"source_dataset": "leg_counting"}}
COUNTDOWN = {
    "question": "Calculate 10 from 4, 6, 1.",
    "answer": "4 + 6",
    "metadata": {"source_dataset": "countdown", "numbers": [4, 6, 1], "target": 10},
}


@pytest.mark.parametrize(
    ("columns", "completion", "reward"),
    [
        (COUNTING, " 8\n", 1.0),
        (COUNTING, "I think <answer>9</answer>, no, <answer> 8 </answer>!", 1.0),
        (COUNTING, "8 <answer>9</answer>", 0.0),
        (COUNTING, "it is 8!", 1 / 8),  # contains the right answer, which is 1 of 8 characters
        (COUNTDOWN, "<answer>(6 + 4) * 1</answer>", 1.0),  # another expression with the same value
        (COUNTDOWN, "<answer>6 + 1</answer>", 0.05),
    ],
)
def test_reasoning_gym(columns, completion, reward):
    assert score("reasoning_gym", completion, **columns) == pytest.approx(reward)


def test_reasoning_gym_takes_metadata_as_json():
    assert score("reasoning_gym", "8", **COUNTING | {"metadata": '{"source_dataset": "leg_counting"}'}) == 1.0


def test_reasoning_gym_names_a_wrong_source():
    with pytest.raises(ValueError, match="'leg_count'; did you mean 'leg_counting'"):
        score("reasoning_gym", "8", **COUNTING | {"metadata": {"source_dataset": "leg_count"}})
    with pytest.raises(ValueError, match=r"needs metadata\['source_dataset'\].*\{'a': 1\}"):
        score("reasoning_gym", "8", **COUNTING | {"metadata": {"a": 1}})


@pytest.mark.parametrize("name", ["number", "math", "reasoning_gym"])
def test_missing_column(name):
    with pytest.raises(ValueError, match=r"needs the column .*columns are answers, other"):
        score(name, "7", answers="7", other=1)


def test_resolve_finds_registered_names_modules_and_files(tmp_path, monkeypatch):
    assert all(resolve(name) is function for name, function in VERIFIERS.items())
    assert resolve("reval.rewards.verifiers:score_number") is VERIFIERS["number"]
    (tmp_path / "mine.py").write_text("def fn(prompts, completions, completion_ids, **columns):\n    return [0.25]\n")
    assert resolve(f"{tmp_path}/mine.py:fn")([], [], []) == [0.25]
    monkeypatch.chdir(tmp_path)
    assert resolve("mine.py:fn")([], [], []) == [0.25]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nubmer", "'nubmer' is unknown: expected one of number, math, reasoning_gym, or .*; did you mean 'number'"),
        ("", "'' is unknown"),
        (":fn", "':fn' is unknown"),
        ("reval.rewards.verifiers:", "is unknown"),
        ("reval.rewards.verifiers:score_nubmer", "'score_nubmer' does not exist .*; did you mean 'score_number'"),
        ("reval.rewards.verifiers:VERIFIERS", "'VERIFIERS' is not callable"),
        ("reval.no_such_module:fn", "there is no module 'reval.no_such_module'"),
        ("no_such_package.module:fn", "there is no module 'no_such_package'"),
        ("no/such/file.py:fn", "there is no file .*no/such/file.py"),
        (__file__.replace("verifiers", "verifier") + ":fn", "there is no file .*; did you mean 'test_verifiers.py'"),
    ],
)
def test_resolve_says_what_is_wrong(spec, message):
    with pytest.raises(RewardError, match=message):
        resolve(spec)


def test_resolve_passes_errors_inside_the_module_on(tmp_path, monkeypatch):
    # The error is not "there is no module", because the requested module exists.
    (tmp_path / "needs_more.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    for spec in (f"{tmp_path}/needs_more.py:fn", "needs_more:fn"):
        with pytest.raises(ModuleNotFoundError, match="'a_package_nobody_has'"):
            resolve(spec)
    monkeypatch.setitem(verifiers._PACKAGES, "number", ("needs_more", "needs-more"))
    with pytest.raises(ModuleNotFoundError, match="'a_package_nobody_has'"):
        resolve("number")


def test_resolve_names_the_package_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)  # the import then fails as if it were not installed
    with pytest.raises(RewardError, match=r"needs the package math_verify.*pip install 'math-verify\[antlr4_13_2\]'"):
        resolve("math")


def test_importing_the_package_is_slim():
    heavy = ("torch", "transformers", "numpy", "sympy", "reasoning_gym")
    assert run_python(f"import sys, reval.rewards; print([m for m in {heavy} if m in sys.modules])") == ("[]\n", "")
