"""Sums a value over the tokens of each expert, on the device, while a model runs.

    sum[e] += value of the row, for each row (token, slot) that is routed to expert e

A watch consists of forward hooks. It adds a few small kernel launches to each call of an experts
module and never waits for the device. Without a watch there is no cost. The rows are read from
top_k_index, because the offsets that the kernels compute do not show which tokens are padding.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from ..experts.layout import is_experts
from ..experts.stored import shape_of
from ..layers.layer import MoELoraLayer
from ..parallel.batches import every_process_runs, sum_over_batches

Batch = Mapping[str, Any] | torch.Tensor
# parts of a path that wrappers around the base model add
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "base_model.model.")


@dataclass
class _Call:
    """One call of the model, while it runs.

    Attributes:
        mask: attention_mask [batch, length], or None.
        size: (batch, length) of the input, None if it is not known.
        values: (T, top_k, device) -> [T * top_k], the value of each row without its routing weight.
    """

    mask: torch.Tensor | None
    size: tuple[int, int] | None
    values: dict[tuple[int, int, torch.device], torch.Tensor] = field(default_factory=dict)


class RoutingWatch:
    """Sums a value of the rows of every expert, in every experts module, while a model runs.

    Only forwards of the whole model are counted. A forward that gradient checkpointing recomputes
    during backward is not counted a second time.

    Args:
        model: the module that is called, with or without adapters.
        measure: the value of a row. With "rows" it is 1. With "tokens" it is 1 / (L * top_k), and
            with "gates" it is the row's top_k_weights / L, where L is the number of tokens in the
            sample (a line of the batch).
        when: called before each forward of the model; the forward is counted if it returns True.
    Raises:
        ValueError: if the model has no experts.
    """

    def __init__(
        self, model: nn.Module, measure: str = "rows", when: Callable[[], bool] = lambda: True
    ) -> None:
        self.measure = measure
        self.when = when
        self.modules = dict(_experts_modules(model))
        if not self.modules:
            raise ValueError(
                f"{type(model).__name__} holds no experts modules, so it has no expert loads; give "
                "a Mixture-of-Experts model."
            )
        # path -> [E + 2]; see `_hook`
        self._sums: dict[str, torch.Tensor] = {}
        self._call: _Call | None = None
        self._names = _argument_names(model)
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._end),
        ]
        for path, module in self.modules.items():
            hook = self._hook(path, _num_experts(module))
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def __enter__(self) -> "RoutingWatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the hooks; the sums stay."""
        for handle in self._handles:
            handle.remove()

    def take(
        self, reduce: Callable[[torch.Tensor], object] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the sums since the last call of `take`, and start again from zero.

        Args:
            reduce: called with all sums in one tensor on the device. It may add the sums of other
                processes in place.
        Returns: path -> [E] on the CPU, int64 for "rows", else float64; zeros for a module that did
            not run.
        """
        sizes = {path: _num_experts(module) for path, module in self.modules.items()}
        device = self._device()
        dtype = torch.float64
        if self.measure == "rows":
            dtype = torch.int64
        found = []
        for path, E in sizes.items():
            if path in self._sums:
                found.append(self._sums[path][1:-1].to(device))
            else:
                found.append(torch.zeros(E, dtype=dtype, device=device))
        total = torch.cat(found)
        for sums in self._sums.values():
            sums.zero_()
        if reduce is not None:
            reduce(total)
        split = total.cpu().split(list(sizes.values()))
        return dict(zip(sizes, split, strict=True))

    def _device(self) -> torch.device:
        """The device of the sums, or of the model's experts if nothing has run yet."""
        tensors = list(self._sums.values())
        for module in self.modules.values():
            tensors.extend(module.parameters())
        return next(tensor.device for tensor in tensors if not tensor.is_meta)

    # ---- hooks -----------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = None
        if not self.when():
            return
        given = dict(zip(self._names, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        if mask is not None:
            _check_mask(mask)
        first = given.get("input_ids")
        if first is None:
            first = given.get("inputs_embeds")
        size = None
        if first is not None and first.ndim >= 2:
            batch, length = first.shape[:2]
            size = (batch, length)
        self._call = _Call(mask, size)

    def _end(self, *_: object) -> None:
        self._call = None

    def _hook(self, path: str, num_experts: int) -> Callable[..., None]:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._call is None:
                return
            index, weights = _routed(module, args, kwargs)
            values = self._values(self._call, index)
            if self.measure == "gates":
                values = values * weights.detach().reshape(-1).double()
            if path not in self._sums:
                self._sums[path] = torch.zeros(
                    num_experts + 2, dtype=values.dtype, device=index.device
                )
            # ids outside 0..E-1 are sentinels, whose rows are skipped: they are added to the first
            # and the last entry, which `take` leaves out
            expert = index.reshape(-1).clamp(-1, num_experts) + 1
            self._sums[path].index_add_(0, expert, values)

        return add

    def _values(self, call: _Call, index: torch.Tensor) -> torch.Tensor:
        """The value of each row, [T * top_k], computed once for all layers of a call."""
        T, top_k = index.shape
        key = (T, top_k, index.device)
        if key not in call.values:
            kept = _kept(call, T, index.device)
            value = kept.long()
            if self.measure != "rows":
                value = kept.double() / kept.sum(1, keepdim=True).clamp(min=1)
            if self.measure == "tokens":
                value = value / top_k
            call.values[key] = value.reshape(-1, 1).expand(T, top_k).reshape(-1)
        return call.values[key]


def measured(model: nn.Module, batches: Iterable[Batch], measure: str) -> dict[str, torch.Tensor]:
    """The sums of a `RoutingWatch` over some batches, in eval mode; the model is left as it was.

    If the model is divided among processes, or wrapped for DDP, all processes must call this, and
    the sums are those of all of their batches.

    Args:
        model: a model with experts, with or without adapters.
        batches: dicts of the model's arguments, or [batch, length] input_ids.
        measure: as in `RoutingWatch`.
    Returns: path of an experts module in the base model -> [E] on the CPU.
    Raises:
        ValueError: if the model has no experts, or no token was counted.
    """
    modes = {module: module.training for module in model.modules()}
    reduce = None
    if every_process_runs(model):
        reduce = sum_over_batches(model)
    device = next(model.parameters()).device
    try:
        model.eval()
        with RoutingWatch(model, measure) as watch, torch.no_grad():
            for batch in batches:
                model(**_arguments(batch, device))
        found = watch.take(reduce)
    finally:
        for module, training in modes.items():
            module.training = training
    if not any(sums.any() for sums in found.values()):
        raise ValueError(
            "no token was routed: there was no batch, or by attention_mask all of it is padding. "
            "Give batches with tokens that are not padding."
        )
    return found


def _arguments(batch: Batch, device: torch.device) -> dict[str, Any]:
    """A batch as the model's arguments, on its device."""
    if isinstance(batch, torch.Tensor):
        batch = {"input_ids": batch}
    # accelerate moves the arguments of an offloaded model
    if device.type == "meta":
        return dict(batch)
    given = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            value = value.to(device)
        given[name] = value
    return given


def _argument_names(model: nn.Module) -> list[str]:
    """Names of the arguments of the base model's forward."""
    own = model
    if hasattr(model, "get_base_model"):
        own = cast(Callable[[], nn.Module], model.get_base_model)()
    return list(inspect.signature(type(own).forward).parameters)[1:]


def _check_mask(mask: object) -> None:
    got = type(mask).__name__
    if isinstance(mask, torch.Tensor):
        if mask.ndim == 2:
            return
        got = str(tuple(mask.shape))
    raise ValueError(
        "expert loads need a 2-D attention_mask [batch, length] of zeros and ones to leave padding "
        f"out; got {got}."
    )


def _kept(call: _Call, T: int, device: torch.device) -> torch.Tensor:
    """Which of an experts module's T tokens are not padding, [batch, length] bool."""
    if call.mask is None:
        size = (1, T)
        if call.size is not None and math.prod(call.size) == T:
            size = call.size
        return torch.ones(size, dtype=torch.bool, device=device)
    batch, length = call.mask.shape
    # with a cache, the mask also covers past tokens; the tokens of this call are the last ones
    running = None
    if batch and T % batch == 0:
        running = T // batch
    if running is None or running > length:
        raise ValueError(
            f"an experts module got {T} tokens, but attention_mask is {(batch, length)}, so it is "
            "not known which of the tokens are padding. Use batches without padding and without "
            "attention_mask."
        )
    return call.mask[:, length - running :].to(device) != 0


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path in the base model, module) of every experts module or adapted layer around one."""
    found: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, MoELoraLayer) and not is_experts(module):
            continue
        # the base layer of an adapted layer is an experts module too
        if any(name.startswith(prefix) for prefix in found):
            continue
        found.append(f"{name}.")
        path = name
        for wrapper in WRAPPERS:
            path = path.replace(wrapper, "")
        yield path.removeprefix("module."), module


def _num_experts(module: nn.Module) -> int:
    """E of an experts module, also of one that `read_layout` does not support."""
    if isinstance(module, MoELoraLayer):
        return module.layout.num_experts
    E = getattr(module, "num_experts", None)
    if getattr(module, "_is_expert_parallel", False):
        # transformers has set it to the number of this process's experts
        E = None
    # the attribute is read first, because reading a quantized weight would decode it
    if isinstance(E, int):
        return E
    down = getattr(module, "down_proj", None)
    if down is None:
        raise ValueError(
            f"{type(module).__name__} has neither num_experts nor down_proj, so the number of its "
            "experts is not known; set num_experts on the module."
        )
    return shape_of(down)[0]


def _routed(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """top_k_index [T, top_k] and top_k_weights of a call of an experts module.

    Raises:
        ValueError: if it is called with other arguments.
    """
    given = dict(zip(("hidden_states", "top_k_index", "top_k_weights"), args, strict=False))
    given |= kwargs
    index = given.get("top_k_index")
    weights = given.get("top_k_weights")
    if not isinstance(index, torch.Tensor) or index.ndim != 2 or index.is_floating_point():
        name = type(module).__name__
        if isinstance(module, MoELoraLayer):
            name = type(module.base_layer).__name__
        raise ValueError(
            f"{name} is not called as experts(hidden_states, top_k_index, top_k_weights), so the "
            "experts of its tokens are not known, and its loads cannot be counted."
        )
    return index, cast(torch.Tensor, weights)
