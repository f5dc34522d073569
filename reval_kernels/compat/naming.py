"""Error messages that name an argument as the caller named it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def call(names: dict[str, str], function: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
    """function(*arguments, **options). If it refuses an argument, the message gets the caller's name of it.

    Example: with names = {"actions": "index"}, "actions must lie in [0, 9)" becomes "index must lie in [0, 9)". Our
    messages begin with the name of the argument.
    """
    try:
        return function(*arguments, **options)
    except (TypeError, ValueError) as error:
        first, _, rest = str(error).partition(" ")
        if first not in names:
            raise
        raise type(error)(f"{names[first]} {rest}") from None
