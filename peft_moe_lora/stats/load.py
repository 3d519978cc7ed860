"""Where a model's tokens go: rows per expert, added up on the device while the model runs and read when asked.

    load[e] = rows routed to expert e, tokens of padding left out
    max violation = (max load - mean load) / mean load

Off, it costs nothing: it is made of forward hooks. On, it adds a handful of small launches an experts module and waits
for nothing. The offsets that the kernels make know no padding, so the rows are counted from top_k_index instead.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..experts.layout import is_experts
from ..tuner.layer import MoELoraLayer

SCORES = ("tokens", "gates")


@dataclass(frozen=True)
class ExpertLoad:
    """Rows per expert.

    Attributes:
        counts: path of an experts module in the base model -> [E] int64 on the CPU, rows of each expert; a row is one
            (token, slot) pair of a token that is no padding.
    """

    counts: dict[str, torch.Tensor]

    @property
    def max_violation(self) -> dict[str, float]:
        """Path -> (max load - mean load) / mean load: 0 when even, E - 1 when one expert gets all; NaN without rows.

        Source: Wang et al. 2024, arXiv:2408.15664, eq. 4.
        """
        return {
            path: ((c.max() - c.double().mean()) / c.double().mean()).item()
            for path, c in self.counts.items()
        }

    @property
    def dead(self) -> dict[str, list[int]]:
        """Path -> experts that got no row."""
        return {path: (c == 0).nonzero()[:, 0].tolist() for path, c in self.counts.items()}

    def metrics(self) -> dict[str, float]:
        """Mean and largest max violation of the modules that got rows, and the number of dead experts in them."""
        ran = ExpertLoad({path: c for path, c in self.counts.items() if c.any()})
        violations = list(ran.max_violation.values())
        if not violations:
            return {}
        return {
            "max_violation": sum(violations) / len(violations),
            "largest_max_violation": max(violations),
            "dead_experts": sum(map(len, ran.dead.values())),
        }

    def __add__(self, other: "ExpertLoad") -> "ExpertLoad":
        paths = dict.fromkeys((*self.counts, *other.counts))
        return ExpertLoad(
            {p: sum(c.counts[p] for c in (self, other) if p in c.counts) for p in paths}
        )

    def __str__(self) -> str:
        dead, found = self.dead, self.max_violation
        lines = [f"{p}: {int(c.sum()):,} rows, max violation {found[p]:.2f}, {len(dead[p])} of {len(c)} experts dead"
                 for p, c in self.counts.items()]  # fmt: skip
        return "\n".join(lines)


class RoutingWatch:
    """Adds up, while a model runs, what each experts module's tokens are routed to.

    Counted is what runs between a call of the model and its return, so that what gradient checkpointing runs again in
    backward does not count twice.

    Args:
        model: with or without adapters; it is the module that gets called.
        measure: "rows": 1 for each row. For each sample (a line of the batch) of L tokens, "tokens": 1 / (L top_k) for
            each row, and "gates": its top_k_weights / L.
        when: asked at each call of the model whether it counts.
    Raises:
        ValueError: if the model holds no experts.
    """

    def __init__(
        self, model: nn.Module, measure: str = "rows", when: Callable[[], bool] = lambda: True
    ):
        self.measure, self.when = measure, when
        self.modules = dict(_experts_modules(model))
        if not self.modules:
            raise ValueError(
                f"{type(model).__name__} holds no experts modules, so there is no load to read."
            )
        self._sums: dict[str, torch.Tensor] = {}
        self._open, self._mask, self._batch, self._values = False, None, None, {}
        own = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._names = list(inspect.signature(type(own).forward).parameters)[1:]
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._end),
        ]
        for path, module in self.modules.items():
            hook = self._hook(path, _num_experts(module))
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def __enter__(self) -> "RoutingWatch":
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off; what was added up stays."""
        for handle in self._handles:
            handle.remove()

    def take(
        self, reduce: Callable[[torch.Tensor], object] | None = None
    ) -> dict[str, torch.Tensor]:
        """What was added up since the last time: path -> [E] on the CPU, zeros where a module did not run.

        Args:
            reduce: given all sums in one tensor on the device, to add up those of other processes in place.
        """
        sizes = {path: _num_experts(module) for path, module in self.modules.items()}
        parameters = (p for module in self.modules.values() for p in module.parameters())
        device = next(t.device for t in (*self._sums.values(), *parameters) if not t.is_meta)
        dtype = torch.int64 if self.measure == "rows" else torch.float64
        nothing = {path: torch.zeros(E, dtype=dtype, device=device) for path, E in sizes.items()}
        found = torch.cat(
            [
                self._sums[p][1:-1].to(device) if p in self._sums else zeros
                for p, zeros in nothing.items()
            ]
        )
        for sums in self._sums.values():
            sums.zero_()
        if reduce is not None:
            reduce(found)
        return dict(zip(sizes, found.cpu().split(list(sizes.values())), strict=True))

    # ------------------------------------------------------------------------------------------------------- hooks

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        self._open, self._values = self.when(), {}
        mask, first = given.get("attention_mask"), given.get("input_ids")
        first = given.get("inputs_embeds") if first is None else first
        self._mask, self._batch = mask, None if first is None or first.ndim < 2 else first.shape[:2]
        if (
            self._open
            and mask is not None
            and (not isinstance(mask, torch.Tensor) or mask.ndim != 2)
        ):
            raise ValueError(
                "expert loads leave padding out by a 2-D attention_mask [batch, length] of zeros and ones; got "
                f"{tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__}."
            )

    def _end(self, *_) -> None:
        self._open, self._mask, self._values = False, None, {}

    def _hook(self, path: str, num_experts: int):
        def add(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self._open:
                return
            index, weights = _routed(module, args, kwargs)
            values = self._value_of_rows(index)
            if self.measure == "gates":
                values = values * weights.detach().reshape(-1).double()
            if path not in self._sums:
                self._sums[path] = torch.zeros(
                    num_experts + 2, dtype=values.dtype, device=index.device
                )
            # the first and the last are for ids outside 0..E-1, sentinels that nobody computes
            self._sums[path].index_add_(0, index.reshape(-1).clamp(-1, num_experts) + 1, values)

        return add

    def _value_of_rows(self, index: torch.Tensor) -> torch.Tensor:
        """[T * top_k]: what a row counts, made once a call of the model and device."""
        (T, top_k), key = index.shape, (*index.shape, index.device)
        if key not in self._values:
            kept = self._kept(T, index.device)  # [batch, length] bool
            if self.measure == "rows":
                value = kept.long()
            else:
                value = kept.double() / kept.sum(1, keepdim=True).clamp(min=1)
                value = value / top_k if self.measure == "tokens" else value
            self._values[key] = value.reshape(-1, 1).expand(T, top_k).reshape(-1)
        return self._values[key]

    def _kept(self, T: int, device: torch.device) -> torch.Tensor:
        """[batch, length] bool: which of the tokens an experts module was given are no padding."""
        if self._mask is not None:
            batch, length = self._mask.shape
            # beside a cache the mask covers past tokens too, the last ones are those that run
            now = T // batch if batch and T % batch == 0 else length + 1
            if now > length:
                raise ValueError(
                    f"an experts module was given {T} tokens, attention_mask is {tuple(self._mask.shape)}: which of "
                    "them are padding cannot be told. Use batches without padding and without attention_mask."
                )
            return self._mask[:, length - now :].to(device) != 0
        batch = self._batch if self._batch is not None and math.prod(self._batch) == T else (1, T)
        return torch.ones(batch, dtype=torch.bool, device=device)


def expert_load(model: nn.Module, batches: Iterable) -> ExpertLoad:
    """Rows per expert and layer over some batches, in eval mode; the model is left as it was.

    Args:
        model: a model with experts, with or without adapters.
        batches: dicts of the model's arguments, or [batch, length] input_ids; moved to the model's device. Tokens
            with attention_mask 0 do not count.
    Returns: the loads of this process.
    Raises:
        ValueError: if the model has no experts, or no token was counted.
    """
    return ExpertLoad(_measured(model, batches, "rows"))


def select_experts(
    model: nn.Module,
    batches: Iterable,
    *,
    score: str = "tokens",
    threshold: float | None = None,
    top: int | None = None,
) -> dict[str, list[int]]:
    """The experts that matter for some data, as `expert_indices` of MoELoraConfig takes them.

    Each expert's score is its share of its layer's total. For N samples, of L_j tokens each,
        "tokens" (token selection ratio):  1/N sum_j 1/L_j sum over tokens of [expert is selected] / top_k
        "gates" (average gate score):      1/N sum_j 1/L_j sum over tokens of the expert's routing weight

    Args:
        model: the base model, or one with adapters; run in eval mode and left as it was.
        batches: as `expert_load`; a sample is one line of a batch. A few dozen samples of the task do.
        score: "tokens" or "gates".
        threshold: of each layer the fewest experts whose scores sum to at least this, in (0, 1].
        top: instead, of each layer this many experts of the highest score.
    Returns: path of each experts module -> ascending ids.
    Raises:
        ValueError: if an argument is out of range, or a layer got no token.
    Source: Wang et al. 2024, "Let the Expert Stick to His Last", arXiv:2407.01906: ESFT-Token and ESFT-Gate.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {SCORES}, got {score!r}.")
    if (threshold is None) == (top is None):
        raise ValueError(
            f"give either threshold or top, got threshold={threshold!r} and top={top!r}."
        )
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold!r}.")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ValueError(f"top must be an integer of at least 1, got {top!r}.")
    chosen = {}
    for path, sums in _measured(model, batches, score).items():
        if not sums.any():
            raise ValueError(
                f"{path} got no token from the batches, so its experts have no score; leave it out."
            )
        if top is not None and top > len(sums):
            raise ValueError(f"top={top} experts of {path}, which has {len(sums)}.")
        shares, order = (sums / sums.sum()).sort(descending=True, stable=True)
        # 1e-9: shares that should sum to the threshold may fall short of it by rounding
        n = top or int((shares.cumsum(0) < threshold - 1e-9).sum()) + 1
        chosen[path] = sorted(order[:n].tolist())
    return chosen


def _measured(model: nn.Module, batches: Iterable, measure: str) -> dict[str, torch.Tensor]:
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    try:
        model.eval()
        with RoutingWatch(model, measure) as watch, torch.no_grad():
            for batch in batches:
                given = batch if isinstance(batch, Mapping) else {"input_ids": batch}
                # an offloaded model moves what it is given
                move = {} if device.type == "meta" else {"device": device}
                model(
                    **{
                        k: v.to(**move) if isinstance(v, torch.Tensor) else v
                        for k, v in given.items()
                    }
                )
        found = watch.take()
    finally:
        for module, training in modes.items():
            module.training = training
    if not any(sums.any() for sums in found.values()):
        raise ValueError(
            "no token was routed: there was no batch, or attention_mask says that all of it is padding."
        )
    return found


def _experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path in the base model, module) of every experts module; an adapted one stands for its base."""
    found: list[str] = []
    for name, module in model.named_modules():
        if (isinstance(module, MoELoraLayer) or is_experts(module)) and not any(
            name.startswith(f) for f in found
        ):
            found.append(f"{name}.")
            for wrapper in ("_fsdp_wrapped_module.", "_orig_mod.", "base_model.model."):
                name = name.replace(wrapper, "")
            yield name.removeprefix("module."), module


def _num_experts(module: nn.Module) -> int:
    if isinstance(module, MoELoraLayer):
        return module.layout.num_experts
    # reading a quantized weight would dequantize it
    E = getattr(module, "num_experts", None)
    if isinstance(E, int):
        return E
    if not hasattr(module, "down_proj"):
        raise ValueError(
            f"{type(module).__name__} says nowhere how many experts it holds: no num_experts, no down_proj."
        )
    return module.down_proj.shape[0]


def _routed(
    module: nn.Module, args: tuple, kwargs: dict
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """top_k_index [T, top_k] and top_k_weights of a call."""
    index = args[1] if len(args) > 1 else kwargs.get("top_k_index")
    weights = args[2] if len(args) > 2 else kwargs.get("top_k_weights")
    if not isinstance(index, torch.Tensor) or index.ndim != 2 or index.is_floating_point():
        base = module.base_layer if isinstance(module, MoELoraLayer) else module
        raise ValueError(
            f"{type(base).__name__} is not called as experts(hidden_states, top_k_index, top_k_weights), so which "
            "experts its tokens go to cannot be read."
        )
    return index, weights
