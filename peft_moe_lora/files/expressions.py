"""Regular expressions of a configuration: valid ones, which are matched in bounded time.

Python's `re` tries one way of matching after the other, and it cannot be interrupted. An expression
such as "(a+)+b" has so many ways to match the path of a module that it runs for ever. So the
ways are counted before an expression is used:

    a sequence      the product of its parts
    a choice        the largest option, times the options that can match the same text
    a repetition    the numbers of times that it may match, where each time matches in one way
"""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from re import _constants as code  # type: ignore[attr-defined]  # not in typeshed
from re import _parser  # type: ignore[attr-defined]  # not in typeshed
from typing import Any, NamedTuple

from .text import quoted

# about 4 million steps a path: 0.04 s
MOST_WAYS = 2.0**22
LONGEST_EXPRESSION = 100_000
# characters of a long path
_LENGTH = 64

_Part = tuple[Any, Any]


class _Ways(NamedTuple):
    """In how many ways an expression can match a text.

    Attributes:
        ways: of everything but its repetitions without a limit.
        unlimited: the number of repetitions without a limit, one after the other.
    """

    ways: float = 1.0
    unlimited: int = 0

    def times(self, other: "_Ways") -> "_Ways":
        return _Ways(self.ways * other.ways, self.unlimited + other.unlimited)

    def total(self) -> float:
        # the repetitions share one text
        return self.ways * math.comb(_LENGTH + self.unlimited, self.unlimited)


def check_expression(name: str, given: str, around: str = "{}") -> None:
    """Check that an expression is valid and matches any path in bounded time.

    Args:
        name: name of the field, for the message.
        given: the expression in the configuration.
        around: the expression that PEFT makes of it, with {} in its place.
    Raises:
        ValueError: if it is not valid, or if its time has no bound.
    """
    if len(given) > LONGEST_EXPRESSION:
        raise ValueError(
            f"{name}: an expression must have at most {LONGEST_EXPRESSION} characters, got "
            f"{quoted(given)}; name fewer modules, or shorter ends of their paths."
        )
    try:
        re.compile(around.replace("{}", given))
        ways = _of_sequence(_parser.parse(given)).total()
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{name}: {quoted(given)} is neither a path nor a regular expression "
            f"({quoted(str(error))}); correct it."
        ) from error
    if ways > MOST_WAYS:
        raise ValueError(
            f"{name}: {quoted(given)} can match a path in so many ways that it may run for ever; "
            "repeat nothing that holds a repetition or a choice itself, and use at most four of "
            "* and + in it."
        )


def _of_sequence(parts: Iterable[_Part]) -> _Ways:
    ways = _Ways()
    for operation, argument in parts:
        ways = ways.times(_of_part(operation, argument))
    return ways


def _of_part(operation: Any, argument: Any) -> _Ways:
    if operation in (code.MAX_REPEAT, code.MIN_REPEAT, code.POSSESSIVE_REPEAT):
        return _of_repetition(*argument)
    if operation == code.SUBPATTERN:
        return _of_sequence(argument[-1])
    if operation in (code.ASSERT, code.ASSERT_NOT):
        return _of_sequence(argument[1])
    if operation == code.ATOMIC_GROUP:
        return _of_sequence(argument)
    if operation == code.BRANCH:
        return _of_choice(argument[1])
    if operation == code.GROUPREF_EXISTS:
        _, then, otherwise = argument
        return _of_choice([then, otherwise or []])
    return _Ways()


def _of_choice(options: Sequence[Iterable[_Part]]) -> _Ways:
    largest = max(map(_of_sequence, options), key=_Ways.total)
    texts = sorted(_first_text(option) for option in options)
    if any(after.startswith(text) for text, after in pairwise(texts)):
        return largest.times(_Ways(len(options)))
    return largest


def _first_text(option: Iterable[_Part]) -> str:
    """The plain characters with which an option begins."""
    text = ""
    for operation, argument in option:
        if operation != code.LITERAL:
            break
        text += chr(argument)
    return text


def _of_repetition(least: int, most: int, body: Iterable[_Part]) -> _Ways:
    once = _of_sequence(body)
    if most <= 1:
        # left out, or matched once
        return once.times(_Ways(2.0 - least))
    if once.total() == 1:
        if most - least >= _LENGTH:
            return _Ways(1.0, 1)
        return _Ways(most - least + 1.0)
    # every time has its own choice of ways
    times = min(most, _LENGTH)
    bits = times * math.log2(once.total())
    if bits > math.log2(MOST_WAYS):
        return _Ways(math.inf)
    return _Ways(2.0**bits * (times + 1.0))
