"""The arguments of a kernel in nested tuples, and functions that make them again.

A loop over nested tuples would take the host about as long as a launch. So a function that makes
them is compiled from its text, as the functions of a named tuple are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl


class Text(str):
    """An expression, in the place of a value."""

    __slots__ = ()


@dataclass(frozen=True)
class Call:
    """A call, in the place of its result; its arguments may hold `Text` and other calls."""

    function: Callable
    arguments: tuple


def tensors_in(operands: tuple) -> Iterator[torch.Tensor]:
    """The tensors of nested tuples, in their order."""
    for operand in operands:
        if isinstance(operand, tuple):
            yield from tensors_in(operand)
        elif isinstance(operand, torch.Tensor):
            yield operand


def replaced(operands: tuple, others: Iterator[Any]) -> tuple:
    """Nested tuples with others in the place of their tensors and expressions, in their order."""
    found: list[Any] = []
    for operand in operands:
        if isinstance(operand, tuple):
            found.append(replaced(operand, others))
        elif isinstance(operand, (torch.Tensor, Text)):
            found.append(next(others))
        else:
            found.append(operand)
    return tuple(found)


def function_of(parameters: str, result: tuple) -> Callable[..., tuple]:
    """A function that returns `result`, whose expressions and calls it computes from parameters."""
    values: dict[str, Any] = {}

    def text(part: Any) -> str:
        if isinstance(part, Text):
            return part
        if isinstance(part, Call):
            return text(part.function) + text(part.arguments)
        if isinstance(part, tuple):
            return "(" + "".join([text(member) + "," for member in part]) + ")"
        if part is None or isinstance(part, int):
            return repr(part)
        name = f"value{len(values)}"
        values[name] = part
        return name

    return eval(f"lambda {parameters}: {text(result)}", values)


def as_constexprs(constants: dict[str, Any]) -> dict[str, Any]:
    """The constants as Triton takes them: each member of a named tuple is a `tl.constexpr`.

    In Triton 3.6 a member of a tuple that is one `tl.constexpr` cannot be a part of a shape; drop
    when the floor is 3.9.
    """
    found = {}
    for name, constant in constants.items():
        if not isinstance(constant, tuple):
            found[name] = constant
        elif triton.knobs.runtime.interpret:
            # the interpreter would make a tensor of each int in a tuple
            found[name] = SimpleNamespace(**constant._asdict())
        else:
            found[name] = constant.__class__(*map(tl.constexpr, constant))
    return found
