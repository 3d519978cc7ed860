"""Recorded kernel launches, made again at other addresses.

Legend:
    slot: index into the addresses of a call
    place: (position among the arguments of a launch, slot, byte offset from the slot's address)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from triton.compiler import CompiledKernel

# position of the stream among the arguments of a compiled kernel's method `run`; the grid is first
_STREAM = 3


class Launch(NamedTuple):
    """One launch.

    Attributes:
        run: the compiled kernel's method `run`.
        arguments: all of its arguments; those that `tensors` and `descriptors` name are replaced.
        tensors: the places of the addresses.
        descriptors: for each, its place, its class and its fields except the tensor.
    """

    run: Callable
    arguments: list[Any]
    tensors: list[tuple[int, int, int]]
    descriptors: list[tuple[tuple[int, int, int], type, dict[str, Any]]]

    def slots(self) -> Iterator[int]:
        """The slots that the launch uses."""
        for _, slot, _ in self.tensors:
            yield slot
        for (_, slot, _), _, _ in self.descriptors:
            yield slot


class Launches:
    """Launches in their order.

    Args:
        launches: the launches.
        kernels: the compiled kernels, kept alive because a launch holds only their handles.
    """

    def __init__(self, launches: list[Launch], kernels: list[CompiledKernel]) -> None:
        self._launches = launches
        self._kernels = kernels

    def __len__(self) -> int:
        return len(self._launches)

    def __call__(self, addresses: Sequence[int], stream: int | None) -> None:
        """Make the launches.

        Args:
            addresses: an address for each slot.
            stream: handle of a stream.
        """
        for run, template, tensors, descriptors in self._launches:
            # a copy, because other threads may make the same launches
            arguments = template.copy()
            arguments[_STREAM] = stream
            for position, slot, offset in tensors:
                arguments[position] = addresses[slot] + offset
            for (position, slot, offset), kind, fields in descriptors:
                arguments[position] = _descriptor(kind, fields, addresses[slot] + offset)
            run(*arguments)


class _Address:
    """Takes the place of a descriptor's tensor: it has nothing but an address."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def fields_of(descriptor: Any) -> dict[str, Any]:
    """All fields of a descriptor, Triton's or Gluon's, except the tensor.

    The tensor is left out because the record must not keep it alive.
    """
    return {name: value for name, value in vars(descriptor).items() if name != "base"}


def _descriptor(kind: type, fields: dict[str, Any], address: int) -> Any:
    """A copy of a recorded descriptor at another address; its checks are not repeated."""
    descriptor = object.__new__(kind)
    descriptor.__dict__.update(fields)
    descriptor.base = _Address(address)
    return descriptor
