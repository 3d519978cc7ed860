"""Launches at addresses they had before, as one CUDA graph: one call of the host instead of a dozen.

In a loop of training the allocator hands out the same addresses step after step. A graph holds them as they were, so
each set of addresses has its own; at others, and while somebody else captures, launches go out one by one.
"""

import logging

import torch
from triton.runtime import driver

logger = logging.getLogger(__name__)

# graphs of one kind of call: of every layer of a model, several; the oldest goes first
GRAPHS = 512
# calls at the same addresses ahead of the one that is captured
SIGHTINGS = 2


class Graphs:
    """The graphs of one recorded call, by its addresses.

    Attributes:
        found: {addresses: graph, or calls so far}; None where capturing failed.
    """

    def __init__(self, device: torch.device):
        self.device, self.found = device, {} if device.type == "cuda" else None

    def __call__(self, addresses: list[int | None], launch) -> None:
        """launch(handle of the current stream), or the same by a graph.

        Args:
            addresses: all that `launch` depends on.
        """
        stream = driver.active.get_current_stream(self.device.index)
        if self.found is None or torch.cuda.is_current_stream_capturing():
            launch(stream)
            return
        key = tuple(addresses)
        found = self.found.get(key, 0)
        if found == SIGHTINGS:
            found = self._captured(launch)
            if found is None:
                self.found = None
                launch(stream)
                return
            self.found[key] = found
        if found.__class__ is not int:
            found.replay()
            return
        if not found and len(self.found) >= GRAPHS:
            del self.found[next(iter(self.found))]
        self.found[key] = found + 1
        launch(stream)

    def _captured(self, launch) -> torch.cuda.CUDAGraph | None:
        """launch as a graph, or None where CUDA refuses."""
        try:
            graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream(self.device)
            with torch.cuda.stream(aside):
                # other threads are free to allocate meanwhile
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    launch(aside.cuda_stream)
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            logger.warning("kernels are launched one by one, without a CUDA graph of them: %s.", error)
            return None
        return graph
