"""Record the allocations and the kernel launches of a call.

Legend:
    buffer: memory that was allocated in the recorded call. If the call returns it, it is a result.
    workspace: one allocation that holds all other buffers. Buffers that are never used at the same
        time may share bytes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import launch
from .nested import Call, Text, replaced
from .repeated import STREAM, Launches, address_of, descriptor_at, fields_of
from .table import ceil_div

# a buffer begins at a multiple of this many bytes in the workspace
_ALIGNMENT = 512
_ALLOCATIONS = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    }
)
# operators that read dtypes, not data
_HARMLESS = frozenset({torch.ops.aten.promote_types.default})


class _Origin(NamedTuple):
    """Where an address lay in the recorded call: `offset` bytes into an argument or a buffer."""

    kind: Literal["argument", "buffer"]
    index: int
    offset: int


class _Launched(NamedTuple):
    """One recorded launch.

    Attributes:
        descriptors: for each, the origin of its tensor, its class and its other fields; or None.
        tensors: the origins of the tensors of the operands, in their order.
        sizes: as in `launch.launch`.
    """

    plan: launch.Plan
    grid: launch.Grid
    descriptors: list[tuple[_Origin, type, dict[str, Any]] | None]
    tensors: list[_Origin]
    sizes: tuple[int, ...]


@dataclass
class Buffer:
    """Memory that was allocated in the recorded call.

    Attributes:
        first: number of the first launch after its allocation.
        last: number of the last launch that uses it.
    """

    nbytes: int
    first: int
    last: int


class Made(NamedTuple):
    """A result that is a new tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Recorded(NamedTuple):
    """What it takes to make a recorded call again.

    The addresses of a call are those of the arguments in `used`, of the new tensors in `made`, and
    of the workspace.

    Attributes:
        launches: the launches, at addresses in this order.
        used: indices of the arguments that kernels use.
        results: for each result its value, or None for a tensor.
        made: (index of the result, what it is) of each result that is a tensor.
        workspace: size of the workspace in bytes.
    """

    launches: Launches
    used: list[int]
    results: list[Any]
    made: list[tuple[int, Made]]
    workspace: int


class Recording(TorchDispatchMode):
    """A context manager that records allocations and launches.

    Attributes:
        failed: why the call cannot be repeated, or None.
        ranges: (index, first address, end) of each argument that has elements.
        buffers: in the order of their allocation.
        current: {address: index of the buffer that lies there now}.
        launched: the recorded launches.
    """

    def __init__(self, arguments: list[torch.Tensor]) -> None:
        super().__init__()
        self.failed: str | None = None
        self.ranges = [
            (i, a.data_ptr(), a.data_ptr() + _span(a)) for i, a in enumerate(arguments) if a.numel()
        ]
        self.buffers: list[Buffer] = []
        self.current: dict[int, int] = {}
        self.launched: list[_Launched] = []
        spans = sorted((start, end) for _, start, end in self.ranges)
        if any(start < previous_end for (_, previous_end), (start, _) in pairwise(spans)):
            self.fail("has arguments that share memory")

    def __enter__(self) -> "Recording":
        launch.recorder.current = self
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        launch.recorder.current = None
        return super().__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            storage = out.untyped_storage()
            self.current[storage.data_ptr()] = len(self.buffers)
            now = len(self.launched)
            self.buffers.append(Buffer(storage.nbytes(), now, now))
        elif not func.is_view and func not in _HARMLESS:
            self.fail(f"calls {func}")
        return out

    def fail(self, reason: str) -> None:
        """Store the reason why the call cannot be repeated; only the first reason is kept."""
        self.failed = self.failed or reason

    def add(
        self,
        plan: launch.Plan,
        grid: launch.Grid,
        tensors: Iterable[torch.Tensor | None],
        sizes: tuple[int, ...],
        descriptors: Iterable[Any],
    ) -> None:
        """Record one launch."""
        described: list[tuple[_Origin, type, dict[str, Any]] | None] = []
        for descriptor in descriptors:
            if descriptor is None:
                described.append(None)
            else:
                origin = self.origin(descriptor.base)
                described.append((origin, type(descriptor), fields_of(descriptor)))
        origins = [self.origin(t) for t in tensors if t is not None]
        self.launched.append(_Launched(plan, (*grid,), described, origins, (*sizes,)))

    def origin(self, tensor: torch.Tensor) -> _Origin:
        """The origin of a tensor's address. A buffer counts as used by the next recorded launch."""
        address = tensor.data_ptr()
        storage = tensor.untyped_storage().data_ptr()
        buffer = self.current.get(storage)
        if buffer is not None:
            self.buffers[buffer].last = len(self.launched)
            return _Origin("buffer", buffer, address - storage)
        for index, start, end in self.ranges:
            if start <= address < end:
                return _Origin("argument", index, address - start)
        self.fail("reads a tensor that is neither an argument nor its own")
        return _Origin("argument", 0, 0)

    def recorded(self, results: Any) -> Recorded | None:
        """The call with these results, or None if `failed` says why it cannot be repeated."""
        values: list[Any] = []
        made: list[tuple[int, Made]] = []
        # {buffer: number of the result among those that are tensors}
        result_of: dict[int, int] = {}
        if not isinstance(results, tuple):
            self.fail("does not return a tuple")
            results = ()
        for index, result in enumerate(results):
            if not isinstance(result, torch.Tensor):
                values.append(result)
                continue
            values.append(None)
            origin = self.origin(result)
            if not self._is_whole(result, origin) or origin.index in result_of:
                self.fail("returns a tensor that is not new or not whole")
            result_of[origin.index] = len(result_of)
            made.append((index, Made((*result.shape,), result.stride(), result.dtype)))
        if not self.launched:
            self.fail("launches nothing")
        if self.failed:
            return None
        offsets, workspace = pack(self.buffers, result_of)
        used = sorted({o.index for o in self._origins() if o.kind == "argument"})
        slots = {("argument", index): slot for slot, index in enumerate(used)}
        slots |= {("buffer", b): len(used) + number for b, number in result_of.items()}
        slots |= {("buffer", b): len(used) + len(result_of) for b in offsets}

        def address(origin: _Origin) -> Text:
            offset = origin.offset
            if origin.kind == "buffer":
                offset += offsets.get(origin.index, 0)
            return address_of(slots[origin[:2]], offset)

        calls = [_call_of(launched, address) for launched in self.launched]
        kernels = [launched.plan.compiled for launched in self.launched]
        return Recorded(Launches(calls, kernels), used, values, made, workspace)

    def _origins(self) -> Iterable[_Origin]:
        """The origins of all tensors of the launches."""
        for launched in self.launched:
            yield from launched.tensors
            yield from (described[0] for described in launched.descriptors if described is not None)

    def _is_whole(self, tensor: torch.Tensor, origin: _Origin) -> bool:
        """Whether a tensor covers a whole buffer."""
        if origin.kind != "buffer" or origin.offset:
            return False
        return _span(tensor) == self.buffers[origin.index].nbytes


def _call_of(launched: _Launched, address: Callable[[_Origin], Text]) -> Call:
    """The call that makes a recorded launch again.

    Args:
        address: takes the origin of an address; returns the expression of the address.
    """
    compiled, run, _, template, constants = launched.plan
    # the metadata of the launch and its hooks are None
    kernel = compiled.function, compiled.packed_metadata, None, None, None
    descriptors: list[Call | None] = []
    for described in launched.descriptors:
        if described is None:
            descriptors.append(None)
        else:
            origin, kind, fields = described
            descriptors.append(Call(descriptor_at, (address(origin), kind, fields)))
    made = replaced(template, chain(map(address, launched.tensors), launched.sizes))
    return Call(run, (*launched.grid, STREAM, *kernel, *descriptors, *made, *constants))


def _span(tensor: torch.Tensor) -> int:
    """Number of bytes from the start of a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def pack(buffers: list[Buffer], result_of: dict[int, int]) -> tuple[dict[int, int], int]:
    """Place all buffers that are not results: ({buffer: byte offset}, bytes of the workspace).

    The largest buffer is placed first, and each at the lowest offset where it fits. Two buffers
    share bytes only if the last launch of one comes before the first launch of the other.
    """
    offsets: dict[int, int] = {}
    total = 0
    placed: list[tuple[int, int, Buffer]] = []
    inner = [i for i in range(len(buffers)) if i not in result_of]
    # among buffers of equal size, the one that was allocated last comes first
    for i in sorted(inner, key=lambda i: (buffers[i].nbytes, i), reverse=True):
        buffer = buffers[i]
        nbytes = ceil_div(buffer.nbytes, _ALIGNMENT) * _ALIGNMENT
        taken = sorted(
            (start, end)
            for start, end, other in placed
            if buffer.first <= other.last and other.first <= buffer.last
        )
        offset = 0
        for start, end in taken:
            if offset + nbytes <= start:
                break
            offset = max(offset, end)
        offsets[i] = offset
        total = max(total, offset + nbytes)
        placed.append((offset, offset + nbytes, buffer))
    return offsets, total
