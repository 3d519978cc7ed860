"""Repeat a call of several operations by repeating the kernel launches that it made before.

In such a call the host chooses the kernels, their grids and block sizes, and the address of each
buffer. These choices depend only on the arguments' dtypes, shapes and strides and on plain values;
a choice that depends on data is made on the device. So the host chooses once for each kind of call:

    first call: all its kernels are compiled in parallel, unless a call with about as many rows has
        compiled them; then the function runs
    second call: the function runs, and its allocations and launches are recorded
    later calls: results and a workspace are allocated, and the recorded launches are repeated.
        If the same addresses came before, one CUDA graph repeats them.

A repeated launch takes the host a few microseconds instead of twenty.

Legend:
    kind: the function, the device, and each argument's dtype, shape and strides, or its value
    buffer: memory that was allocated in the recorded call. If the call returns it, it is a result.
    workspace: one allocation that holds all other buffers. Buffers that are never used at the same
        time may share bytes.
    slot: index into the addresses of a replayed call: first those of the arguments, then of the
        results, then of the workspace
    place: (slot, byte offset from its address), or None for a tensor that is None
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel

from ...quantized import QuantizedWeight
from . import graphs, launch
from .table import ceil_div, dot_precision

logger = logging.getLogger(__name__)

# largest number of kinds; without a limit, batches of ever new sizes would add kinds forever
KINDS = 512
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
# {kind: the number of calls so far, or its _Replay, or None if it cannot be replayed}
_kinds: "dict[tuple, int | _Replay | None]" = {}
# the kinds, without exact numbers of rows, whose kernels were compiled ahead
_compiled: set[tuple] = set()


def replayed(function: Callable[..., tuple], *arguments: Any) -> tuple:
    """Return function(*arguments), computed on the current device, by a replay if possible.

    Args:
        function: calls operations of this package and computes nothing else. It returns a tuple of
            new tensors, and of values that depend only on the kind of its arguments. If its
            recording shows that it does more, it is never replayed but always called directly.
            Before a first call with about as many rows it is called one additional time, and its
            launches are skipped.
        arguments: first a tensor; then tensors, quantized weights, None or hashable values. If a
            value is not hashable, the function is called directly.
    """
    device = arguments[0].get_device()
    # before the recording, which would otherwise record what `bind` does
    launch.bind(device)
    key, tensors = _kind_and_tensors(function, device, arguments)
    try:
        plan = _kinds.get(key, 0)
    except TypeError:
        return function(*arguments)
    if isinstance(plan, _Replay):
        return plan(tensors) or function(*arguments)
    if plan is None:
        return function(*arguments)
    if len(_kinds) >= KINDS:
        forget()
    if plan == 0:
        _kinds[key] = 1
        about = _without_rows(key)
        # batches of ever new sizes need no new kernels, and asking for them takes the host as long
        # as the call itself
        if about not in _compiled:
            _compiled.add(about)
            launch.compile_ahead(function, *arguments)
        return function(*arguments)
    recording = _Recording(tensors)
    with recording:
        results = function(*arguments)
    _kinds[key] = recording.replay(results)
    return results


def _kind_and_tensors(
    function: Callable, device: int, arguments: Sequence[Any]
) -> tuple[tuple, list[torch.Tensor]]:
    """The kind of a call, and all tensors of its arguments."""
    kind: list[Any] = [function, device, dot_precision(arguments[0].dtype)]
    tensors = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            kind.append((argument.dtype, argument.shape, argument.stride()))
            tensors.append(argument)
        elif isinstance(argument, QuantizedWeight):
            parts = argument.tensors()
            kind.append(argument.facts())
            kind += [(t.dtype, t.shape, t.stride()) for t in parts]
            tensors += parts
        else:
            kind.append(argument)
    return tuple(kind), tensors


def _without_rows(kind: tuple) -> tuple:
    """A kind with the lengths of first dimensions as their numbers of bits."""
    return tuple(_without_rows_of(part) for part in kind)


def _without_rows_of(part: Any) -> Any:
    if not isinstance(part, tuple) or not part or not isinstance(part[0], torch.dtype):
        return part
    dtype, shape, _ = part
    return dtype, tuple(n.bit_length() for n in shape[:1]), shape[1:]


def forget() -> None:
    """Drop every recorded call."""
    _kinds.clear()
    graphs.forget()


class _Origin(NamedTuple):
    """Where an address lay in the recorded call: `offset` bytes into an argument or a buffer."""

    kind: Literal["argument", "buffer"]
    index: int
    offset: int


class _Launch(NamedTuple):
    """One launch. Its tensors are origins when it is recorded, and places when it is replayed.

    Attributes:
        run: the compiled kernel's method `run`.
        compiled: the kernel's handle and metadata, and the launch hooks, which are None.
        descriptors: for each, (origin or place of its tensor, its other fields), or None.
        tensors: for each, its origin or place, or None.
        rest: all arguments after the tensors.
    """

    grid: launch.Grid
    run: Callable
    compiled: tuple
    descriptors: list[tuple | None]
    tensors: list[tuple | None]
    rest: tuple


@dataclass
class _Buffer:
    """Memory that was allocated in the recorded call.

    Attributes:
        first: number of the first launch after its allocation.
        last: number of the last launch that uses it.
    """

    nbytes: int
    first: int
    last: int


class _Recording(TorchDispatchMode):
    """A context manager that records allocations and launches.

    Attributes:
        failed: why the call cannot be replayed, or None.
        ranges: (index, first address, end) of each argument that has elements.
        buffers: in the order of their allocation.
        current: {address: index of the buffer that lies there now}.
        launches: the recorded launches, with origins.
        kernels: the compiled kernels, which a replay must keep alive.
    """

    def __init__(self, arguments: list[torch.Tensor]) -> None:
        super().__init__()
        self.arguments = arguments
        self.failed: str | None = None
        self.ranges = [
            (i, a.data_ptr(), a.data_ptr() + _span(a)) for i, a in enumerate(arguments) if a.numel()
        ]
        self.buffers: list[_Buffer] = []
        self.current: dict[int, int] = {}
        self.launches: list[_Launch] = []
        self.kernels: list[CompiledKernel] = []
        spans = sorted((start, end) for _, start, end in self.ranges)
        if any(start < previous_end for (_, previous_end), (start, _) in pairwise(spans)):
            self.fail("has arguments that share memory")

    def __enter__(self) -> "_Recording":
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
            now = len(self.launches)
            self.buffers.append(_Buffer(storage.nbytes(), now, now))
        elif not func.is_view and func not in _HARMLESS:
            self.fail(f"calls {func}")
        return out

    def fail(self, reason: str) -> None:
        """Store the reason why the call cannot be replayed; only the first reason is kept."""
        self.failed = self.failed or reason

    def add(
        self,
        compiled: CompiledKernel,
        run: Callable,
        grid: launch.Grid,
        tensors: Iterable[torch.Tensor | None],
        sizes: tuple[int, ...],
        tail: tuple,
        descriptors: Iterable[Any],
    ) -> None:
        """Record one launch."""
        described: list[tuple | None] = []
        for descriptor in descriptors:
            if descriptor is None:
                described.append(None)
            else:
                described.append((self.origin(descriptor.base), _fields(descriptor)))
        self.kernels.append(compiled)
        self.launches.append(
            _Launch(
                grid=(*grid,),
                run=run,
                compiled=(compiled.function, compiled.packed_metadata, None, None, None),
                descriptors=described,
                tensors=[None if t is None else self.origin(t) for t in tensors],
                rest=(*sizes, *tail),
            )
        )

    def origin(self, tensor: torch.Tensor) -> _Origin:
        """The origin of a tensor's address. A buffer counts as used by the next recorded launch."""
        address = tensor.data_ptr()
        storage = tensor.untyped_storage().data_ptr()
        buffer = self.current.get(storage)
        if buffer is not None:
            self.buffers[buffer].last = len(self.launches)
            return _Origin("buffer", buffer, address - storage)
        for index, start, end in self.ranges:
            if start <= address < end:
                return _Origin("argument", index, address - start)
        self.fail("reads a tensor that is neither an argument nor its own")
        return _Origin("argument", 0, 0)

    def replay(self, results: Any) -> "_Replay | None":
        """The recorded call as a `_Replay`, or None if it cannot be replayed."""
        made: list[_Made | _Value] = []
        # {buffer: number of the result}
        result_of: dict[int, int] = {}
        if not isinstance(results, tuple):
            self.fail("does not return a tuple")
            results = ()
        for result in results:
            if not isinstance(result, torch.Tensor):
                made.append(_Value(result))
                continue
            origin = self.origin(result)
            if not self._is_whole(result, origin) or origin.index in result_of:
                self.fail("returns a tensor that is not new or not whole")
            result_of[origin.index] = len(result_of)
            made.append(_Made(result.shape, result.stride(), result.dtype))
        if not self.launches:
            self.fail("launches nothing")
        if self.failed:
            logger.debug("not replayed: the composition %s.", self.failed)
            return None
        offsets, workspace = _pack(self.buffers, result_of)
        num_arguments = len(self.arguments)
        launches = [
            _placed(recorded, num_arguments, result_of, offsets) for recorded in self.launches
        ]
        device = self.arguments[0].device
        return _Replay(
            num_arguments=num_arguments,
            used=_used_arguments(launches, num_arguments),
            made=made,
            workspace=workspace,
            device=device,
            launches=launches,
            kernels=self.kernels,
            graphs=graphs.Graphs(device),
        )

    def _is_whole(self, tensor: torch.Tensor, origin: _Origin) -> bool:
        """Whether a tensor covers a whole buffer."""
        if origin.kind != "buffer" or origin.offset:
            return False
        return _span(tensor) == self.buffers[origin.index].nbytes


class _Made(NamedTuple):
    """A result that is a tensor."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Value:
    """A result that is not a tensor."""

    value: object


@dataclass(frozen=True)
class _Replay:
    """A recorded call that can be replayed.

    Attributes:
        num_arguments: number of tensors among the arguments.
        used: slots of the arguments that kernels use.
        made: for each result, the tensor to allocate, or its value.
        workspace: size of the workspace in bytes.
        launches: the recorded launches, with places.
        kernels: the compiled kernels, kept alive because a launch holds only their handles.
        graphs: CUDA graphs of the launches, one for each set of addresses.
    """

    num_arguments: int
    used: list[int]
    made: list[_Made | _Value]
    workspace: int
    device: torch.device
    launches: list[_Launch]
    kernels: list[CompiledKernel]
    graphs: graphs.Graphs

    def __call__(self, arguments: Sequence[torch.Tensor]) -> tuple | None:
        """The results, or None if an argument's address is not a multiple of 16 bytes.

        The recorded kernels were compiled for such addresses.
        """
        addresses: list[int | None] = [None] * self.num_arguments
        union = 0
        for slot in self.used:
            address = arguments[slot].data_ptr()
            addresses[slot] = address
            union |= address
        if union & 15:
            return None
        results = []
        for made in self.made:
            if made.__class__ is _Value:
                results.append(made.value)
            else:
                shape, stride, dtype = made
                result = torch.empty_strided(shape, stride, dtype=dtype, device=self.device)
                results.append(result)
                addresses.append(result.data_ptr())
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=self.device)
        addresses.append(workspace.data_ptr())
        self.graphs(addresses, partial(self._launch, addresses))
        return tuple(results)

    def _launch(self, addresses: Sequence[int], stream: int | None) -> None:
        for grid, run, compiled, descriptors, tensors, rest in self.launches:
            run(
                *grid, stream, *compiled,
                *[d and _descriptor(*d[1], addresses[d[0][0]] + d[0][1]) for d in descriptors],
                *[place and addresses[place[0]] + place[1] for place in tensors],
                *rest,
            )  # fmt: skip


def _placed(
    recorded: _Launch, num_arguments: int, result_of: dict[int, int], offsets: dict[int, int]
) -> _Launch:
    """A recorded launch with places instead of origins.

    Args:
        result_of: {buffer: number of the result}.
        offsets: {other buffer: its byte offset in the workspace}.
    """

    def place(origin: _Origin | None) -> tuple[int, int] | None:
        if origin is None:
            return None
        if origin.kind == "argument":
            return origin.index, origin.offset
        if origin.index in result_of:
            return num_arguments + result_of[origin.index], origin.offset
        workspace = num_arguments + len(result_of)
        return workspace, offsets[origin.index] + origin.offset

    return recorded._replace(
        descriptors=[d and (place(d[0]), d[1]) for d in recorded.descriptors],
        tensors=[place(origin) for origin in recorded.tensors],
    )


def _used_arguments(launches: list[_Launch], num_arguments: int) -> list[int]:
    """The slots of the arguments that the launches use."""
    used = set()
    for launched in launches:
        places = [*launched.tensors, *(d and d[0] for d in launched.descriptors)]
        used |= {place[0] for place in places if place is not None}
    return sorted(slot for slot in used if slot < num_arguments)


class _Address:
    """Takes the place of a descriptor's tensor: it has nothing but an address."""

    __slots__ = ("address",)

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _fields(descriptor: Any) -> tuple[type, dict[str, Any]]:
    """A descriptor's class, Triton's or Gluon's, and all its fields except the tensor.

    The tensor is left out because the record must not keep it alive.
    """
    fields = {name: value for name, value in vars(descriptor).items() if name != "base"}
    return type(descriptor), fields


def _descriptor(kind: type, fields: dict[str, Any], address: int) -> Any:
    """A copy of a recorded descriptor at another address; its checks are not repeated."""
    descriptor = object.__new__(kind)
    descriptor.__dict__.update(fields)
    descriptor.base = _Address(address)
    return descriptor


def _span(tensor: torch.Tensor) -> int:
    """Number of bytes from the start of a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _pack(buffers: list[_Buffer], result_of: dict[int, int]) -> tuple[dict[int, int], int]:
    """Place all buffers that are not results: ({buffer: byte offset}, bytes of the workspace).

    The largest buffer is placed first, and each at the lowest offset where it fits. Two buffers
    share bytes only if the last launch of one comes before the first launch of the other.
    """
    offsets: dict[int, int] = {}
    total = 0
    placed: list[tuple[int, int, _Buffer]] = []
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
