"""A calculator: the model may have expressions computed before it answers."""

import ast
import math
import operator
import re
from decimal import Decimal
from typing import Any

from reval.environments.protocol import Message, question
from reval.rewards.verifiers import score_number

INSTRUCTION = (
    "You have a calculator. Write an expression between <calc> and </calc> and stop; you get its value. "
    "When you know the answer, reply with only the number."
)
EXAMPLE = [
    {"role": "user", "content": "What is 12 * 34?"},
    {"role": "assistant", "content": "<calc>12 * 34</calc>"},
    {"role": "user", "content": "408"},
    {"role": "assistant", "content": "408"},
]
_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_OPERATIONS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_LONGEST = 200  # characters of an expression


class Calculator:
    """A task with a calculator. The column `answer` holds the right number.

    A completion with `<calc>EXPRESSION</calc>` gets the value of the last such expression: numbers, + - * / and
    parentheses. Any other completion is the answer, with the reward of reward.function=number: 1 or 0.

    Args:
        example: begin the conversation with an example of a call.
    """

    def __init__(self, example: bool = True):
        self._example = example
        self._answer: Any = None

    def reset(self, problem: dict[str, Any]) -> list[Message]:
        """The instruction and the question of the row."""
        self._answer = problem["answer"]
        score_number([], ["0"], [[]], answer=[self._answer])  # raises if the answer is no number
        example = EXAMPLE if self._example else []
        return [
            {"role": "system", "content": INSTRUCTION},
            *example,
            {"role": "user", "content": question(problem)},
        ]

    def step(self, completion: str) -> tuple[list[Message], float, bool]:
        """See Environment.step."""
        calls = _CALL.findall(completion)
        if calls:
            return [{"role": "user", "content": compute(calls[-1])}], 0.0, False
        [score] = score_number([], [completion], [[]], answer=[self._answer])
        return [], score or 0.0, True


def compute(expression: str) -> str:
    """The value of an expression as text, or what is wrong with it. Decimals are exact to 28 digits.

    Example: "12 * 34" gives "408", "1 / 0" gives "error: division by zero".
    """
    if len(expression) > _LONGEST:
        return f"error: at most {_LONGEST} characters"
    try:
        value = _value(ast.parse(expression.strip(), mode="eval").body)
        plain = -_LONGEST < value.adjusted() < _LONGEST  # else the text would have as many digits
        return f"{value.normalize():f}" if plain else str(value)
    except ZeroDivisionError:
        return "error: division by zero"
    except (ArithmeticError, SyntaxError, ValueError, RecursionError, MemoryError):
        return "error: numbers, + - * / and parentheses only"


def _value(node: ast.AST) -> Decimal:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and math.isfinite(node.value):
        return Decimal(str(node.value))  # True and False are no numbers for Decimal
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.operand))
    raise ValueError("unknown operation")
