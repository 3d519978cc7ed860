"""Where the time of a training step goes: by part of the model, and launches.

A step is recorded by PyTorch's profiler while the forward of every module of a part runs in a range
of the part's name. An operation belongs to the innermost range around it. A node of backward
belongs to the part whose forward made it, which has the same sequence number. So the second forward
of a checkpointed layer counts for its parts too. Times are those of the device; on a CPU, those of
the host.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from models import ATTENTION, ModelRoute

# in the order of the picture; what has no range of its own is "rest": residuals, embeddings, hooks
PARTS = ("experts", "router", "attention", "linear layers", "norms", "loss", "optimizer", "rest")
_RANGE = "part: "
_NODE = "autograd::engine::evaluate_function: "
# what the host calls once for each piece of work of the device
_LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
    "cudaMemcpyAsync",
    "cudaMemsetAsync",
)


class Profile(NamedTuple):
    """One step.

    Attributes:
        parts: ms by part.
        launches: how many times the host gave the device something to do; None on a CPU.
    """

    parts: dict[str, float]
    launches: int | None


def part_of(name: str, module: nn.Module) -> str | None:
    """The part that a module is, by its name in a Qwen3-MoE model; None if it is within another.

    A linear layer of attention counts with its adapter, because one operation computes both.
    """
    last = name.rpartition(".")[2]
    if last in ATTENTION and isinstance(module, nn.Linear | LoraLayer):
        return "linear layers"
    if last == "self_attn":
        return "attention"
    if last == "experts" and "base_layer" not in name:
        return "experts"
    if last == "gate":
        return "router"
    if type(module).__name__.endswith("RMSNorm"):
        return "norms"
    if type(module).__name__ == "Qwen3MoeModel":
        return "rest"
    # its head and loss; what it calls has ranges of its own
    if type(module).__name__ == "Qwen3MoeForCausalLM":
        return "loss"
    return None


@contextmanager
def ranges(model: nn.Module) -> Iterator[None]:
    """Within it, every module that is a part runs in a range of the part's name."""
    found = [(part_of(name, module), module) for name, module in model.named_modules()]
    parts = [(part, module) for part, module in found if part is not None]
    before = [vars(module).get("forward") for _, module in parts]
    for part, module in parts:
        module.forward = _in_range(part, module.forward)
    try:
        yield
    finally:
        for (_, module), forward in zip(parts, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _in_range(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def in_range(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(_RANGE + part):
            return function(*args, **kwargs)

    return in_range


def profile_step(route: ModelRoute, ids: torch.Tensor, with_parts: bool = True) -> Profile:
    """Record a step.

    Args:
        with_parts: False for a compiled model, whose kernels belong to no module.
    """
    # the profiler writes two lines to stderr each time it starts, unless told not to
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_gpu = ids.is_cuda
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        if with_parts:
            _step_in_ranges(route, ids)
        else:
            route.step(ids)
        if on_gpu:
            torch.cuda.synchronize(ids.device)
    events = list(profile.events())
    launches = None
    if on_gpu:
        launches = sum(event.name in _LAUNCHES for event in events)
    if not with_parts:
        return Profile({}, launches)
    return Profile(by_part(events, on_gpu), launches)


def _step_in_ranges(route: ModelRoute, ids: torch.Tensor) -> None:
    optimizer = route.optimizer
    if optimizer is None:
        with ranges(route.model):
            route.step(ids)
        return
    step = optimizer.step
    optimizer.step = _in_range("optimizer", step)
    try:
        with ranges(route.model):
            route.step(ids)
    finally:
        optimizer.step = step


def by_part(events: list[Any], on_gpu: bool) -> dict[str, float]:
    """ms by part of recorded events; kernels that the profiler links to no operation are left out.

    Args:
        events: of one step, recorded within `ranges`.
        on_gpu: whether times of kernels are counted, or those of the host.
    """
    # the device's own events are counted where the host launched them
    events = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    made_by: dict[int, str] = {}
    (forward_thread,) = {e.thread for e in events if e.name == _RANGE + "loss"}
    for event in events:
        if event.thread == forward_thread and event.sequence_nr >= 0:
            part = _innermost(event, {})
            if part is not None:
                made_by[event.sequence_nr] = part
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        spent = event.self_cpu_time_total
        if on_gpu:
            spent = sum(kernel.duration for kernel in event.kernels)
        if spent:
            found[_innermost(event, made_by) or "rest"] += 1e-3 * spent
    return found


def _innermost(event: Any, made_by: dict[int, str]) -> str | None:
    """The part of the innermost range or node of backward around an event."""
    while event is not None:
        if event.name.startswith(_RANGE):
            return event.name.removeprefix(_RANGE)
        if event.name.startswith(_NODE) and event.sequence_nr in made_by:
            return made_by[event.sequence_nr]
        event = event.cpu_parent
    return None
