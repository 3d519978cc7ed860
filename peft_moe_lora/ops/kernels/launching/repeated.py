"""Recorded kernel launches, made again at other addresses.

Legend:
    slot: index into the addresses of a call
"""

from collections.abc import Callable, Sequence
from typing import Any

from triton.compiler import CompiledKernel

from .nested import Call, Text, function_of

# the stream of a launch, as an expression
STREAM = Text("stream")


def address_of(slot: int, offset: int) -> Text:
    """The address that lies `offset` bytes from the address of a slot, as an expression."""
    if offset == 0:
        return Text(f"addresses[{slot}]")
    return Text(f"addresses[{slot}]+{offset}")


class Launches:
    """Launches in their order.

    Args:
        calls: of the kernels' methods `run`. Their arguments hold `STREAM`, and addresses of slots.
        kernels: the compiled kernels, kept alive because a launch holds only their handles.
    """

    def __init__(self, calls: list[Call], kernels: list[CompiledKernel]) -> None:
        self._launch: Callable = function_of(f"addresses,{STREAM}", tuple(calls))
        self._kernels = kernels

    def __len__(self) -> int:
        return len(self._kernels)

    def __call__(self, addresses: Sequence[int], stream: int | None) -> None:
        """Make the launches.

        Args:
            addresses: an address for each slot.
            stream: handle of a stream.
        """
        self._launch(addresses, stream)


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


def descriptor_at(address: int, kind: type, fields: dict[str, Any]) -> Any:
    """A copy of a recorded descriptor at another address; its checks are not repeated."""
    descriptor = object.__new__(kind)
    descriptor.__dict__.update(fields)
    descriptor.base = _Address(address)
    return descriptor
