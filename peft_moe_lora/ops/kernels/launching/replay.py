"""Repeat a call of several operations by repeating the kernel launches that it made before.

In such a call the host chooses the kernels, their grids and block sizes, and the address of each
buffer. These choices depend only on the arguments' dtypes, shapes and strides and on plain values;
a choice that depends on data is made on the device. So the host chooses once for each kind of call:

    first call: all its kernels are compiled in parallel, unless a call with about as many rows has
        compiled them; then the function runs
    second call: the function runs, and its allocations and launches are recorded
    later calls: results and a workspace are allocated, and the recorded launches are repeated.
        If the same addresses came before, one CUDA graph repeats them.

A repeated launch takes the host a few microseconds instead of twenty. To build and look up a kind
would take a quarter of the host's time for a repeated call. So a recorded call is first looked for
by a quick test, which needs no kind.

Legend:
    kind: the function, the device, and each argument's dtype, shape and strides, or its value
    pattern: the function, the device, and each argument's value; of a tensor only that it is one
    buffer, workspace: as in `recording`
"""

import logging
from collections.abc import Callable, Sequence
from enum import Enum
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch._C._dynamo.guards import _empty_strided_cpu, _empty_strided_cuda

from ...operations import BatchShape
from ...quantized import QuantizedWeight
from . import alike, launch
from .graphs import Graphs
from .graphs import forget as forget_graphs
from .recent import Recent
from .recording import Recorded, Recording
from .table import dot_precision

logger = logging.getLogger(__name__)

# host memory for recorded calls; without a limit, batches of ever new sizes would add kinds forever
KINDS_BYTES = 128 * 2**20
# host memory of a kind, and of each launch that is recorded for it
KIND_BYTES = 4096
LAUNCH_BYTES = 2048
# {type of device: torch.empty_strided(shape, strides, dtype) on the current device}. These are the
# functions that inductor's code calls; they take the host half as long
_EMPTY = {"cpu": _empty_strided_cpu, "cuda": _empty_strided_cuda}
# recorded calls of a pattern that are found by a test, the newest ones: layers of several widths,
# and batches of ever new sizes, have one pattern
TESTED = 16
# classes of tensors whose values are in their memory
_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})
# takes the place of a tensor in a pattern
_TENSOR = object()


class _State(Enum):
    """A kind without a recorded call."""

    CALLED_ONCE = 1
    NOT_REPLAYED = 2


class _Replay:
    """A recorded call that can be replayed.

    Args:
        recorded: the recorded call.
        device: where it runs; the current device in each call.
    """

    def __init__(self, recorded: Recorded, device: torch.device) -> None:
        self.recorded = recorded
        self.device = device
        self.empty = _EMPTY[device.type]
        self.graphs = Graphs(device, recorded.launches, len(recorded.launches))

    def __call__(self, arguments: Sequence[torch.Tensor]) -> tuple | None:
        """The results, or None if an argument's address is not a multiple of 16 bytes.

        The recorded kernels were compiled for such addresses.
        """
        _, used, values, made, nbytes = self.recorded
        addresses = [arguments[index].data_ptr() for index in used]
        if reduce(or_, addresses, 0) & 15:
            return None
        empty = self.empty
        results = values.copy()
        new = None
        for index, (shape, stride, dtype) in made:
            new = results[index] = empty(shape, stride, dtype)
            addresses.append(new.data_ptr())
        if nbytes:
            new = empty((nbytes,), (1,), torch.uint8)
            addresses.append(new.data_ptr())
        on_device = new is None or new.device == self.device
        assert on_device, "a replay of launches on another current device"
        self.graphs(addresses)
        return tuple(results)

    def forget(self) -> None:
        """Drop its graphs."""
        self.graphs.forget()


def _forget_graphs(kind: _Replay | _State) -> None:
    if isinstance(kind, _Replay):
        kind.forget()


_kinds: Recent[_Replay | _State] = Recent(KINDS_BYTES, _forget_graphs)
# {pattern: tests and what to replay where one is passed}. Once `_kinds` is half full, every new
# kind empties it. So a kind that is dropped is not found here, and one that is in use is looked up
# in `_kinds` again, where it counts as used, long before it could be dropped
_tested: dict[tuple, list[tuple[alike.Test, _Replay]]] = {}
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
    pattern: list[Any] = [function, device, dot_precision(arguments[0].dtype)]
    tensors: list[torch.Tensor] = []
    for argument in arguments:
        if type(argument) in _PLAIN:
            tensors.append(argument)
            pattern.append(_TENSOR)
        elif isinstance(argument, QuantizedWeight):
            tensors += argument.tensors()
            pattern.append(argument.facts())
        else:
            pattern.append(argument)
    key = tuple(pattern)
    try:
        known = _tested.get(key, ())
    except TypeError:
        # a value without a hash
        return function(*arguments)
    for passes, replay in known:
        if passes(*tensors):
            # a replay may encode tensor descriptors
            launch.bind(device)
            return replay(tensors) or function(*arguments)
    return _looked_up(key, function, *arguments)


def _looked_up(pattern: tuple, function: Callable[..., tuple], *arguments: Any) -> tuple:
    """The same for a call that passes no test."""
    device = arguments[0].get_device()
    # before the recording, which would otherwise record what `bind` does
    launch.bind(device)
    kind, tensors = _kind_and_tensors(function, device, arguments)
    found = _kinds.get(kind)
    if isinstance(found, _Replay):
        _add_test(pattern, tensors, found)
        return found(tensors) or function(*arguments)
    if found is _State.NOT_REPLAYED:
        return function(*arguments)
    if found is None:
        _store(kind, _State.CALLED_ONCE, KIND_BYTES)
        about = _without_rows(kind)
        # batches of ever new sizes need no new kernels, and asking for them takes the host as long
        # as the call itself
        if about not in _compiled:
            _compiled.add(about)
            launch.compile_ahead(function, *arguments)
        return function(*arguments)
    recording = Recording(tensors)
    with recording:
        results = function(*arguments)
    recorded = recording.recorded(results)
    if recorded is None:
        logger.debug("not replayed: the composition %s.", recording.failed)
        _store(kind, _State.NOT_REPLAYED, KIND_BYTES)
    else:
        nbytes = KIND_BYTES + LAUNCH_BYTES * len(recorded.launches)
        _store(kind, _Replay(recorded, arguments[0].device), nbytes)
    return results


def _store(kind: tuple, value: _Replay | _State, nbytes: int) -> None:
    _kinds.put(kind, value, nbytes)
    if 2 * _kinds.size > _kinds.limit:
        _tested.clear()


def _add_test(pattern: tuple, tensors: list[torch.Tensor], replay: _Replay) -> None:
    """Let calls like this one be found by a test."""
    # a tensor of another class would be a value of the pattern, and be kept alive by it
    if any(isinstance(part, torch.Tensor) for part in pattern):
        return
    test = alike.test_of(tensors)
    if test is not None:
        # a new list, because another thread may read the old one
        _tested[pattern] = [(test, replay), *_tested.get(pattern, ())][:TESTED]


def _kind_and_tensors(
    function: Callable, device: int, arguments: Sequence[Any]
) -> tuple[tuple, list[torch.Tensor]]:
    """The kind of a call, and all tensors of its arguments."""
    kind: list[Any] = [function, device, dot_precision(arguments[0].dtype)]
    tensors = []
    for argument in arguments:
        if argument is None:
            kind.append(None)
        elif isinstance(argument, torch.Tensor):
            # not `kind += ...`, which takes the host half as long again
            kind.append(argument.dtype)
            kind.append(argument.shape)
            kind.append(argument.stride())
            tensors.append(argument)
        elif isinstance(argument, QuantizedWeight):
            parts = argument.tensors()
            kind.append(argument.facts())
            for part in parts:
                kind += (part.dtype, part.shape, part.stride())
            tensors += parts
        else:
            kind.append(argument)
    return tuple(kind), tensors


def _without_rows(kind: tuple) -> tuple:
    """A kind without strides and shapes of results, and with the lengths of first dimensions as
    their numbers of bits.
    """
    parts: list[Any] = []
    rest = iter(kind)
    for part in rest:
        parts.append(part)
        if isinstance(part, torch.Size):
            parts[-1] = tuple(n.bit_length() for n in part[:1]), part[1:]
            next(rest)
        elif isinstance(part, BatchShape):
            parts[-1] = None
    return tuple(parts)


def forget() -> None:
    """Drop every recorded call."""
    _kinds.clear()
    _tested.clear()
    _compiled.clear()
    forget_graphs()
