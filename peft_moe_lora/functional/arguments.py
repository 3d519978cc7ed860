"""Groups of arguments, and the flat arguments of an operator that stand for them.

Legend:
    group: a named tuple or a frozen dataclass of arguments that are passed together. Its
        annotations give the operator's schema, and `__match_args__` gives the order of its fields.
    values: the values of all fields of some groups, field by field.
    arguments: what an operator takes: one argument for each value, and `stored` after them. A
        weight is a list of tensors; one tensor if it is dense. `stored` is text and says how the
        quantized weights are made of their tensors.
"""

from collections.abc import Iterable, Sequence
from typing import Any, get_type_hints

import torch

from ..ops import QuantizedWeight
from ..ops.quantized import described, from_description

_WEIGHT = torch.Tensor | QuantizedWeight
# annotation of a group's field -> its type in an operator's schema
_SCHEMA = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    _WEIGHT: "Tensor[]",
    int: "int",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
    tuple[int, ...] | None: "int[]?",
}
# separates the weights in `stored`. No line break: inductor writes an operator's arguments into a
# comment of its code as they are, and what follows the break would be code (torch 2.11)
_NEXT = "|"


def flatten(groups: Iterable[Any]) -> list[Any]:
    """The values of all groups, field by field."""
    values: list[Any] = []
    is_traced = torch.compiler.is_compiling()
    for group in groups:
        if isinstance(group, tuple) and not is_traced:
            values += group
        else:
            # torch 2.11's Dynamo cannot add a named tuple to a list
            values += [getattr(group, name) for name in type(group).__match_args__]
    return values


def unflatten(kinds: Iterable[type[Any]], values: Sequence[Any]) -> list[Any]:
    """The inverse of `flatten`.

    Args:
        kinds: the class of each group.
        values: the values of all groups, field by field.
    """
    groups = []
    start = 0
    for kind in kinds:
        end = start + len(kind.__match_args__)
        groups.append(kind(*values[start:end]))
        start = end
    assert start == len(values), "the number of values differs from the number of fields"
    return groups


def holds_tensors(kind: type[Any]) -> bool:
    """Whether a field of a group may be a tensor."""
    return any("Tensor" in _SCHEMA[hint] for hint in get_type_hints(kind).values())


class Arguments:
    """The arguments of an operator.

    Args:
        kinds: the class of each group.
    Attributes:
        schema: the arguments in an operator's schema.
    """

    def __init__(self, kinds: Sequence[type[Any]]) -> None:
        self.kinds = kinds
        hints = [item for kind in kinds for item in get_type_hints(kind).items()]
        declared = [f"{_SCHEMA[hint]} {name}" for name, hint in hints]
        self.schema = ", ".join([*declared, "str stored"])
        # positions of the weights among the values
        self._weights = tuple(i for i, (_, hint) in enumerate(hints) if hint == _WEIGHT)

    def of(self, groups: Sequence[Any]) -> list[Any]:
        """The arguments that stand for the groups."""
        arguments = flatten(groups)
        stored = []
        for i in self._weights:
            weight = arguments[i]
            if isinstance(weight, QuantizedWeight):
                arguments[i] = weight.tensors()
                stored.append(described(weight))
            else:
                arguments[i] = [weight]
                stored.append("")
        return [*arguments, _NEXT.join(stored)]

    def groups(self, arguments: Sequence[Any]) -> list[Any]:
        """The groups that the arguments stand for."""
        *values, stored = arguments
        texts = stored.split(_NEXT) if self._weights else []
        for i, text in zip(self._weights, texts, strict=True):
            values[i] = from_description(text, values[i]) if text else values[i][0]
        # an operator receives a tuple of integers as a list
        values = [tuple(v) if isinstance(v, list) else v for v in values]
        return unflatten(self.kinds, values)

    def without_gradients(self, arguments: Sequence[Any]) -> list[Any]:
        """What a backward returns where no argument gets a gradient."""
        nothing: list[Any] = [None] * len(arguments)
        for i in self._weights:
            nothing[i] = [None] * len(arguments[i])
        return nothing
