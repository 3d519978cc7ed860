"""How time and memory are measured."""

import gc
import os
import time
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import torch

from cases import MIB


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def nothing() -> None:
    """A call that does nothing."""


class Series(NamedTuple):
    """ms of each call, and ms in which the host issued each call (empty on a CPU)."""

    times: list[float]
    host: list[float]


class Timer:
    """Times calls one by one, by device events on a GPU and by the wall clock on a CPU.

    The L2 cache is flushed before each call. triton.testing.do_bench cannot take its place, because
    it can neither renew A and B before a step nor time the host.

    Attributes:
        rest: seconds in which the device is left idle before each series of calls.
    """

    def __init__(self, device: torch.device, rest: float = 0.0) -> None:
        self.device = device
        self.rest = rest
        nbytes = 64 * MIB
        if device.type == "cuda":
            nbytes = 256 * MIB
        self.flush = torch.empty(nbytes, dtype=torch.int8, device=device)

    def __call__(
        self, call: Callable[[], object], repeat: int, before: Callable[[], object] = nothing
    ) -> Series:
        """Time `repeat` calls after one to warm up; `before` runs ahead of every call, untimed."""
        if self.rest:
            synchronize(self.device)
            time.sleep(self.rest)
        before()
        call()
        if self.device.type == "cuda":
            return self._by_events(call, repeat, before)
        return self._by_the_clock(call, repeat, before)

    def _by_the_clock(
        self, call: Callable[[], object], repeat: int, before: Callable[[], object]
    ) -> Series:
        times = []
        for _ in range(repeat):
            before()
            self.flush.zero_()
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return Series(times, [])

    def _by_events(
        self, call: Callable[[], object], repeat: int, before: Callable[[], object]
    ) -> Series:
        """The calls follow each other without a wait, so the host may run ahead of the device."""
        events = []
        host = []
        for _ in range(repeat):
            before()
            self.flush.zero_()
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            start = time.perf_counter()
            call()
            host.append(1e3 * (time.perf_counter() - start))
            end.record()
            events.append((begin, end))
        synchronize(self.device)
        return Series([begin.elapsed_time(end) for begin, end in events], host)


def seconds_per_call(call: Callable[[], object], device: torch.device, repeat: int) -> float:
    """The mean of `repeat` calls in a row. The host may run ahead of them, as in training."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeat


def host_seconds_per_call(call: Callable[[], object], device: torch.device, repeat: int) -> float:
    """The mean time in which the host issues a call, of `repeat` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    seconds = time.perf_counter() - start
    synchronize(device)
    return seconds / repeat


def held_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes allocated by a call and not yet free when it returns, its result among them."""
    gc.collect()
    if device.type != "cuda":
        return sum(cpu_allocations(call))
    synchronize(device)
    start = torch.cuda.memory_allocated(device)
    result = call()
    held = torch.cuda.memory_allocated(device) - start
    del result
    return held


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes allocated at any time during a call, above those allocated before it."""
    gc.collect()
    if device.type != "cuda":
        return max(accumulate(cpu_allocations(call)), default=0)
    synchronize(device)
    start = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def cpu_allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of CPU memory taken (> 0) and given back (< 0) during a call, in order.

    The result of the call stays alive until then.
    """
    # the profiler writes two lines to stderr each time it starts, unless told not to
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
