"""Replay a sequence of kernel launches as one CUDA graph: one host call instead of a dozen.

In a training loop the allocator hands out the same addresses step after step. A CUDA graph holds
the addresses it was captured with, so each set of addresses has a graph of its own. Kernels are
launched one by one at new addresses, and while other code captures the current stream.

A graph takes device memory, and a capture takes the host as long as many launches. So:

    The graphs of a device take at most `SHARE` of its memory.
    Addresses are captured when they come for the third time, if there is room for the graph.
    Without room, they are captured only if they came `PATIENCE` times while none of the graphs
    that would be dropped for them was used. So graphs in use stay, graphs of the past make room one
    by one, and such a capture comes at most once in `PATIENCE` calls.

Legend:
    sighting: a call at addresses that have no graph
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from triton.runtime import driver

from .recent import Recent

logger = logging.getLogger(__name__)

# the share of a device's memory that graphs may take, read at the first call on the device: 800 MiB
# of an H200
SHARE = 1 / 180
# device memory of a graph of n kernels: GRAPH_BYTES + n * NODE_BYTES. 2838 graphs of about a dozen
# kernels took 440 MiB (NVIDIA H200, 2026-11-30; only the sum is measured, not its two parts)
GRAPH_BYTES = 23 * 1024
NODE_BYTES = 14 * 1024
# calls at the same addresses before a graph is captured; the next such call captures it
SIGHTINGS = 2
# sightings before addresses may take the place of graphs
PATIENCE = 16
# largest number of addresses whose sightings are counted, of all devices; each takes the host about
# 300 bytes
COUNTED = 2**16


class _Sightings:
    """Sightings of one set of addresses.

    Attributes:
        count: their number.
        since: number of the look-up of graphs before the first of them.
    """

    __slots__ = ("count", "since")

    def __init__(self, since: int) -> None:
        self.count = 0
        self.since = since


class _Captured(NamedTuple):
    """A graph, and whose it is."""

    owner: "Graphs"
    graph: torch.cuda.CUDAGraph


_sightings: Recent[_Sightings] = Recent(COUNTED)


@cache
def kept(device: torch.device) -> Recent[_Captured]:
    """The graphs of a device; the size of each is its device memory in bytes."""
    memory = torch.cuda.get_device_properties(device).total_memory
    return Recent(int(SHARE * memory))


def forget() -> None:
    """Drop every graph."""
    # entries may still be in use in other threads, so the dicts stay
    kept.cache_clear()
    _sightings.clear()


class Graphs:
    """The graphs of one recorded call, one for each set of addresses.

    Args:
        device: where the kernels run.
        launch: called as launch(addresses, handle of a stream). Calls with equal addresses must
            make the same launches.
        num_launches: how many launches it makes.
    Attributes:
        refused: whether kernels are always launched one by one, because the device is not CUDA or
            because a capture failed.
    """

    def __init__(
        self,
        device: torch.device,
        launch: Callable[[Sequence[int], int | None], None],
        num_launches: int,
    ) -> None:
        self.device = device
        self.launch = launch
        self.nbytes = GRAPH_BYTES + num_launches * NODE_BYTES
        self.refused = device.type != "cuda"

    def __call__(self, addresses: Sequence[int]) -> None:
        """Make the launches on the current stream, one by one or as a graph."""
        if self.refused or torch.cuda.is_current_stream_capturing():
            self._launch(addresses)
            return
        graphs = kept(self.device)
        key = self, tuple(addresses)
        found = graphs.get(key)
        if found is None and self._is_wanted(graphs, key):
            # after the graph is dropped, sightings are counted anew
            _sightings.drop(hash(key))
            found = self._captured(addresses)
            if found is None:
                # those at other addresses would hold memory and never be replayed again
                self.forget()
                self.refused = True
            else:
                graphs.put(key, found, self.nbytes)
        if found is None:
            self._launch(addresses)
        else:
            found.graph.replay()

    def forget(self) -> None:
        """Drop the graphs of this call."""
        if not self.refused:
            kept(self.device).remove(lambda captured: captured.owner is self)

    def _launch(self, addresses: Sequence[int]) -> None:
        self.launch(addresses, driver.active.get_current_stream(self.device.index))

    def _is_wanted(self, graphs: Recent[_Captured], key: Hashable) -> bool:
        """Count a sighting; return whether the addresses shall be captured now."""
        # a number instead of the addresses: where two hashes are equal, only the count is wrong
        number = hash(key)
        seen = _sightings.get(number)
        if seen is None:
            seen = _Sightings(graphs.lookups - 1)
            _sightings.put(number, seen)
        seen.count += 1
        if seen.count <= SIGHTINGS or self.nbytes > graphs.limit:
            return False
        in_the_way = graphs.newest_in_the_way(self.nbytes)
        if in_the_way is None:
            return True
        if seen.count <= PATIENCE:
            return False
        if in_the_way <= seen.since:
            return True
        # a graph in the way was used meanwhile; what comes next shows whether it is used again
        seen.count = 0
        seen.since = graphs.lookups
        return False

    def _captured(self, addresses: Sequence[int]) -> _Captured | None:
        """Capture the launches as a graph; return None if CUDA cannot capture them."""
        try:
            graph = torch.cuda.CUDAGraph()
            side_stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(side_stream):
                # other threads may allocate memory during the capture
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self.launch(addresses, side_stream.cuda_stream)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            logger.warning(
                "kernels are launched one by one, because CUDA could not capture a graph of them: "
                "%s.",
                error,
            )
            return None
        return _Captured(self, graph)
