"""The environments of this package."""

import pytest

from reval.environments import EnvironmentFault, question
from reval.environments.calculator import Calculator, compute
from reval.environments.guessing import Guessing


@pytest.mark.parametrize("secret", range(10))
def test_who_halves_the_range_finds_every_digit_in_four_guesses(secret):
    game = Guessing()
    assert game.reset({"secret": secret}) == [{"role": "user", "content": "guess"}]
    low, high = 0, 9
    for turn in range(4):
        guess = (low + high) // 2
        messages, reward, done = game.step(f" {guess} is my guess")
        if guess == secret:
            assert (messages, reward, done) == ([], 1.0, True)
            return
        assert (reward, done) == (0.0, turn == 3)
        low, high = (guess + 1, high) if messages[0]["content"] == "up" else (low, guess - 1)
    raise AssertionError("not found")


def test_the_game_ends_after_its_guesses_and_what_is_no_digit_costs_one():
    game = Guessing(guesses=3, bonus=0.5)
    game.reset({"secret": 7})
    assert game.step("x") == ([{"role": "user", "content": "no"}], 0.0, False)
    assert game.step("²") == ([{"role": "user", "content": "no"}], 0.0, False)
    assert game.step("") == ([{"role": "user", "content": "no"}], 0.0, True)
    game.reset({"secret": 7})
    assert game.step("7")[1] == 2.0


@pytest.mark.parametrize("secret", [None, "7", 10, -1, True])
def test_a_game_without_a_secret_is_refused(secret):
    with pytest.raises(EnvironmentFault, match="'secret'"):
        Guessing().reset({"secret": secret})


def test_games_are_the_same_for_the_same_seed():
    assert Guessing.problems(50, 1) == Guessing.problems(50, 1) != Guessing.problems(50, 2)
    assert {row["secret"] for row in Guessing.problems(200, 0)} == set(range(10))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 * 34", "408"),
        (" (1 + 2) * -3 ", "-9"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 4", "0.25"),
        ("123456789 * 987654321", "121932631112635269"),
        ("10000000000000 * 10", "100000000000000"),
        ("1 / 0", "error: division by zero"),
        ("0 / 0", "error: numbers, + - * / and parentheses only"),
        ("2 ** 8", "error: numbers, + - * / and parentheses only"),
        ("__import__('os')", "error: numbers, + - * / and parentheses only"),
        ("1e999", "error: numbers, + - * / and parentheses only"),
        ("", "error: numbers, + - * / and parentheses only"),
        ("1 +", "error: numbers, + - * / and parentheses only"),
        ("-" * 150 + "1", "1"),
        ("1+" * 200 + "1", "error: at most 200 characters"),
    ],
)
def test_the_calculator_computes(expression, value):
    assert compute(expression) == value


def test_huge_numbers_stay_short():
    assert len(compute("*".join(["1e300"] * 30))) < 60


def test_a_task_with_the_calculator():
    task = Calculator(example=False)
    prompt = [{"role": "user", "content": "What is 12 * 34 + 5?"}]
    messages = task.reset({"prompt": prompt, "answer": "413"})
    assert messages[-1] == prompt[0] and messages[0]["role"] == "system"
    assert task.step("I compute <calc>1</calc> no, <calc>12 * 34 + 5</calc>") == (
        [{"role": "user", "content": "413"}],
        0.0,
        False,
    )
    assert task.step("413") == ([], 1.0, True)
    assert Calculator().step and [m["role"] for m in Calculator().reset({"prompt": "?", "answer": 1})][0] == "system"
    task.reset({"prompt": "?", "answer": "413"})
    assert task.step("It is 413") == ([], 0.0, True)


def test_a_task_whose_answer_is_no_number_is_refused():
    with pytest.raises(ValueError, match="must hold numbers"):
        Calculator().reset({"prompt": "?", "answer": "many"})


def test_the_question_is_the_last_user_message():
    assert question({"prompt": "2+2"}) == "2+2"
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "system", "content": "c"}]
    assert question({"prompt": messages}) == "b"
