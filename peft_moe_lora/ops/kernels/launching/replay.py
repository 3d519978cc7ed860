"""Call a composition of operations again by the launches it made before.

What the host decides on the way through such a call (grids, block sizes, which kernel, where each buffer lies)
follows from the arguments' shapes, strides and dtypes and from plain values; the device decides the rest. So it is
decided once: ahead of the first call of a kind what it will launch is compiled, that call runs as it is, the second is
recorded, later ones allocate and launch: a few microseconds a launch instead of twenty, and one CUDA graph of them all
where they come at the same addresses again.

Legend:
    argument: a tensor that the composition is called with; its kind is its dtype, shape and strides
    slot: where an address comes from: the arguments first, then the results, last the workspace
    place: (slot, bytes from its address), or None for an absent tensor
"""

import logging
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ...quantized import QuantizedWeight
from . import graphs, launch
from .table import dot_precision

logger = logging.getLogger(__name__)

# the kinds kept; batches of ever other sizes must not pile up
KINDS = 512
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
# works on dtypes alone
_HARMLESS = frozenset({torch.ops.aten.promote_types.default})
_kinds: dict = {}


def replayed(function, *arguments):
    """function(*arguments), on the current device.

    Args:
        function: composes operations of this package, and nothing else that computes; its results are a tuple of new
            tensors and of what follows from the kind of its arguments. A call that does anything else is found out
            when it is recorded, and its kind then always runs as it is. Called once more ahead of the first time, its
            launches left out.
        arguments: a tensor, then tensors, quantized weights, None, or hashable values; what is not hashable is not
            replayed.
    """
    kind, flat = [function, arguments[0].get_device(), dot_precision(arguments[0].dtype)], []
    # not while recording, which would take it for a part of the composition
    launch.bind(kind[1])
    for a in arguments:
        if isinstance(a, torch.Tensor):
            kind.append((a.dtype, a.shape, a.stride()))
            flat.append(a)
        elif isinstance(a, QuantizedWeight):
            kind.append(a.facts())
            kind += [(t.dtype, t.shape, t.stride()) for t in a.tensors()]
            flat += a.tensors()
        else:
            kind.append(a)
    try:
        plan = _kinds.get(key := tuple(kind), 0)
    except TypeError:
        return function(*arguments)
    if plan.__class__ is _Replay:
        return plan(flat) or function(*arguments)
    if plan is None:
        return function(*arguments)
    if len(_kinds) >= KINDS:
        forget()
    if plan == 0:
        _kinds[key] = 1
        launch.compile_ahead(function, *arguments)
        return function(*arguments)
    recording = _Recording(flat)
    with recording:
        results = function(*arguments)
    _kinds[key] = recording.replay(results)
    return results


def forget() -> None:
    """Drop every recorded call."""
    _kinds.clear()
    graphs.forget()


class _Recording(TorchDispatchMode):
    """While entered, takes down allocations and launches; `failed` says what cannot be replayed."""

    def __init__(self, arguments):
        super().__init__()
        self.arguments, self.failed = arguments, None
        # the arguments' ranges of addresses, in their order
        self.ranges = [
            (i, a.data_ptr(), a.data_ptr() + _span(a)) for i, a in enumerate(arguments) if a.numel()
        ]
        ends = sorted((start, end) for _, start, end in self.ranges)
        if any(start < previous_end for (_, previous_end), (start, _) in pairwise(ends)):
            self.failed = "arguments share memory"
        # [bytes, first launch, last launch] of each buffer; the one that lies at an address now
        self.buffers, self.current, self.launches, self.compiled = [], {}, [], []

    def __enter__(self):
        launch.recorder.current = self
        return super().__enter__()

    def __exit__(self, *exception):
        launch.recorder.current = None
        return super().__exit__(*exception)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            storage = out.untyped_storage()
            self.current[storage.data_ptr()] = len(self.buffers)
            self.buffers.append([storage.nbytes(), len(self.launches), len(self.launches)])
        elif not func.is_view and func not in _HARMLESS:
            self.failed = self.failed or f"calls {func}"
        return out

    def add(self, compiled, run, grid, tensors, sizes, tail, descriptors) -> None:
        """One launch."""
        self.compiled.append(compiled)
        self.launches.append(
            (
                (*grid,),
                run,
                (compiled.function, compiled.packed_metadata, None, None, None),
                [d if d is None else (self.place(d.base), _fields(d)) for d in descriptors],
                [None if t is None else self.place(t) for t in tensors],
                (*sizes, *tail),
            )
        )

    def fail(self, reason: str) -> None:
        self.failed = self.failed or reason

    def place(self, tensor: torch.Tensor) -> tuple:
        """("argument", index, offset) or ("buffer", index, offset)."""
        address = tensor.data_ptr()
        buffer = self.current.get(tensor.untyped_storage().data_ptr())
        if buffer is not None:
            self.buffers[buffer][2] = len(self.launches)
            return "buffer", buffer, address - tensor.untyped_storage().data_ptr()
        for index, start, end in self.ranges:
            if start <= address < end:
                return "argument", index, address - start
        self.fail("reads a tensor that is neither an argument nor its own")
        return "argument", 0, 0

    def replay(self, results):
        """The recorded call, or None where it cannot be replayed."""
        made, results_of = [], {}
        for result in results if isinstance(results, tuple) else ():
            if not isinstance(result, torch.Tensor):
                made.append(_Value(result))
                continue
            kind, index, offset = self.place(result)
            if (
                kind != "buffer"
                or offset
                or index in results_of
                or _span(result) != self.buffers[index][0]
            ):
                self.fail("a result is not a new tensor of its own")
            results_of[index] = len(results_of)
            made.append((result.shape, result.stride(), result.dtype))
        if self.failed or not self.launches or not isinstance(results, tuple):
            logger.debug(
                "not replayed: %s.", self.failed or "nothing is launched, or no tuple returned"
            )
            return None
        offsets, total = _pack(self.buffers, results_of)
        first = len(self.arguments)

        def resolved(place):
            if place is None:
                return None
            kind, index, offset = place
            if kind == "argument":
                return index, offset
            if index in results_of:
                return first + results_of[index], offset
            return first + len(results_of), offsets[index] + offset

        launches = [
            (
                grid,
                run,
                fixed,
                [d and (resolved(d[0]), d[1]) for d in ds],
                [resolved(p) for p in places],
                rest,
            )
            for grid, run, fixed, ds, places, rest in self.launches
        ]
        all_places = [
            p for _, _, _, ds, places, _ in launches for p in (*places, *(d and d[0] for d in ds))
        ]
        used = sorted({p[0] for p in all_places if p is not None and p[0] < first})
        device = self.arguments[0].device
        return _Replay(
            first, used, made, total, device, launches, self.compiled, graphs.Graphs(device)
        )


@dataclass(frozen=True)
class _Value:
    """A result that is no tensor."""

    value: object


@dataclass(frozen=True)
class _Replay:
    """A call that was recorded.

    Attributes:
        first: number of arguments.
        used: those whose memory kernels read.
        made: per result (shape, strides, dtype), or its _Value where it is no tensor.
        workspace: bytes of what lives within the call alone, buffers of different times one over another.
        launches: (grid, run, fixed, descriptors, places, rest) each.
        compiled: the kernels, held because a launch has but a handle of theirs.
        graphs: of the launches, by address.
    """

    first: int
    used: list
    made: list
    workspace: int
    device: torch.device
    launches: list
    compiled: list
    graphs: graphs.Graphs

    def __call__(self, arguments):
        """The results, or None for arguments off sixteen bytes, which the recorded kernels do not take."""
        addresses, union = [None] * self.first, 0
        for i in self.used:
            addresses[i] = address = arguments[i].data_ptr()
            union |= address
        if union & 15:
            return None
        results = []
        for m in self.made:
            if m.__class__ is _Value:
                results.append(m.value)
            else:
                shape, stride, dtype = m
                results.append(torch.empty_strided(shape, stride, dtype=dtype, device=self.device))
                addresses.append(results[-1].data_ptr())
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=self.device)
        addresses.append(workspace.data_ptr())
        self.graphs(addresses, partial(self._launch, addresses))
        return tuple(results)

    def _launch(self, addresses, stream):
        for grid, run, fixed, descriptors, places, rest in self.launches:
            run(
                *grid, stream, *fixed,
                *[d and _descriptor(*d[1], addresses[d[0][0]] + d[0][1]) for d in descriptors],
                *[p and addresses[p[0]] + p[1] for p in places],
                *rest,
            )  # fmt: skip


class _Address:
    """What a tensor descriptor asks its tensor for."""

    __slots__ = ("address",)

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


def _fields(descriptor) -> tuple[type, dict]:
    """What of a descriptor is not its tensor, which must not be kept alive: Triton's class or Gluon's, and fields."""
    return type(descriptor), {
        name: value for name, value in vars(descriptor).items() if name != "base"
    }


def _descriptor(kind: type, fields: dict, address: int):
    """A descriptor like the recorded one, at another address; its checks were made then."""
    descriptor = object.__new__(kind)
    descriptor.__dict__.update(fields)
    descriptor.base = _Address(address)
    return descriptor


def _span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    return (
        sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    ) * tensor.element_size()


def _pack(buffers: list, results_of: dict) -> tuple[dict, int]:
    """Bytes from the workspace's address for each buffer that is no result, and bytes of the workspace.

    First fit, the largest first: two buffers share bytes only where one's last launch comes before the other's first.
    """
    placed, offsets, total = [], {}, 0
    inner = [
        (nbytes, i, first, last)
        for i, (nbytes, first, last) in enumerate(buffers)
        if i not in results_of
    ]
    for nbytes, i, first, last in sorted(inner, reverse=True):
        nbytes = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        offset = 0
        taken = sorted(
            (s, e)
            for s, e, others_first, others_last in placed
            if first <= others_last and others_first <= last
        )
        for start, end in taken:
            if offset + nbytes <= start:
                break
            offset = max(offset, end)
        placed.append((offset, offset + nbytes, first, last))
        offsets[i], total = offset, max(total, offset + nbytes)
    return offsets, total
