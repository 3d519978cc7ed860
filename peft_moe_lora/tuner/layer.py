"""An experts module with a low-rank pair for every expert: W[e] + scaling * B[e] A[e]."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..experts.activation import own_activation
from ..experts.decoding import decoders, requantized, store
from ..experts.layout import PROJECTIONS, ExpertsLayout, read_layout
from ..experts.stored import UnsupportedExperts
from ..functional import Projection, experts, per_expert, rows_linear
from ..ops import QuantizedWeight
from .config import MoELoraConfig
from .implementations import (
    IMPLEMENTATION,
    MATERIALIZE,
    check_gradients,
    check_implementation,
    run_implementation,
)

logger = logging.getLogger(__name__)


class MoELoraLayer(nn.Module, BaseTunerLayer):
    """Wraps an experts module; owns A and B of every adapter. The base module keeps its weights and its forward.

    Args:
        base_layer: the experts module, called as experts(hidden_states, top_k_index, top_k_weights), or as its row in
            `families` says.
        adapter_name: the first adapter.
        config: its configuration.
        r: rank of each expert's update.
        lora_alpha: numerator of the scaling.
        experts: ascending ids of the S experts that get a pair; None for all, S = E.
    Parameters, per adapter and projection (K in- and N out-features of the projection):
        lora_A: [r * S, K], expert-major: rows s*r up to (s + 1)*r are A of the s-th of these experts.
        lora_B: [N, r * S], expert-major: columns s*r up to (s + 1)*r are its B.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "experts")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoELoraConfig,
        r: int,
        lora_alpha: float,
        experts: tuple[int, ...] | None = None,
    ):
        super().__init__()
        self.base_layer = base_layer
        self.layout: ExpertsLayout = read_layout(base_layer)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        # modules, as in PEFT, for whoever switches a model's dropout off by looking for them
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.experts: dict[str, tuple[int, ...] | None] = {}
        self._disable_adapters, self.merged_adapters = False, []
        # of quantized projections: what was stored before merging, and requantizing's error over the update's norm
        self._unmerged: dict[str, QuantizedWeight] = {}
        self.merge_errors: dict[str, float] = {}
        self.backend, self.recompute = config.backend, config.recompute
        # running the module's own forward assumes nothing of it, and a family's row is known to hold
        known = self.layout.decorated or self.layout.family is not None
        self._contract_holds = known or self.backend == MATERIALIZE
        self._proven: set[str | None] = set()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha, experts)
        _attach(self, base_layer)

    @property
    def in_features(self) -> int:
        """K of the first projection: H, the width of hidden_states."""
        return self.layout.first.in_features

    @property
    def out_features(self) -> int:
        """N of the last projection: H again where the layer maps hidden states to hidden states."""
        return self.layout.last.out_features

    def update_layer(
        self,
        adapter_name: str,
        config: MoELoraConfig,
        r: int,
        lora_alpha: float,
        experts: tuple[int, ...] | None = None,
    ) -> None:
        """Add an adapter, or draw an existing one anew; it starts frozen unless it is active.

        Raises:
            ValueError: if it asks for what the backend of the adapters already here cannot do.
            RuntimeError: with backend="materialize", if the model's experts implementation cannot run here.
        """
        self._check_backend(config)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.experts[adapter_name] = experts
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)
        A, B = nn.ParameterDict(), nn.ParameterDict()
        for name in self.layout.targeted(config.target_projections):
            projection = self.layout.projection(name)
            ranks = r * len(self.experts_of(adapter_name))
            A[name] = nn.Parameter(torch.empty(ranks, projection.in_features))
            B[name] = nn.Parameter(torch.empty(projection.out_features, ranks))
        self.lora_A[adapter_name], self.lora_B[adapter_name] = A, B
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _check_backend(self, config: MoELoraConfig) -> None:
        if config.backend not in ("auto", self.backend) and MATERIALIZE in (
            config.backend,
            self.backend,
        ):
            raise ValueError(
                f"backend={config.backend!r}: the adapters on these experts run with backend={self.backend!r}, and a "
                "layer has one; give the new adapter the same."
            )
        if self.backend == MATERIALIZE:
            if config.lora_dropout:
                raise ValueError(
                    f"lora_dropout={config.lora_dropout!r}: the adapters on these experts run with "
                    f'backend="{MATERIALIZE}", which has no low-rank path whose input could be dropped; '
                    "set lora_dropout=0."
                )
            check_implementation(self._shared_implementation(), self.base_layer, self.layout)

    def _shared_config(self):
        """The model's own config as the base module was given it; None for a module that does not dispatch."""
        config = self.base_layer.config if self.layout.decorated else None
        return config._shared if isinstance(config, AdaptedExpertsConfig) else config

    def _shared_implementation(self) -> str | None:
        """The experts implementation the model is told to run with."""
        config = self._shared_config()
        return None if config is None else config._experts_implementation

    def experts_of(self, adapter_name: str) -> Sequence[int]:
        """Ascending ids of the experts that have a pair in an adapter."""
        chosen = self.experts[adapter_name]
        return range(self.layout.num_experts) if chosen is None else chosen

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """A as nn.Linear draws it (or normal), B zero, so that a new adapter changes nothing; False: both random."""
        for name, A in self.lora_A[adapter_name].items():
            B = self.lora_B[adapter_name][name]
            if init_lora_weights == "gaussian":
                nn.init.normal_(A, std=1 / self.r[adapter_name])
            else:
                # every expert has the same fan-in K, so one draw over the stacked A is exact
                nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            if init_lora_weights is False:
                # as PEFT leaves B, an nn.Linear of fan-in r
                nn.init.uniform_(
                    B, -1 / math.sqrt(self.r[adapter_name]), 1 / math.sqrt(self.r[adapter_name])
                )
            else:
                nn.init.zeros_(B)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """The module's own forward, which finds its way back to `compute` where an adapter is at work."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.layout.decorated or not self.is_at_work():
            try:
                return self.base_layer(*args, **kwargs)
            except Exception:
                _offload(self.base_layer)
                raise
        # a module off the interface dispatches nowhere, so offloading hooks are served here: its own and those of what
        # holds its weights
        hook = getattr(self.base_layer, "_hf_hook", None)
        within = [m for m in self.base_layer.modules() if m is not self.base_layer]
        if hook is not None:
            args, kwargs = hook.pre_forward(self.base_layer, *args, **kwargs)
        offloaded = _fetch(within)
        try:
            if hasattr(self.weight, "device_mesh"):
                raise UnsupportedExperts(
                    f"{type(self.base_layer).__name__} holds sharded weights (tensor or expert parallelism); off "
                    "transformers' experts interface an adapter needs whole ones. Load the model without a plan."
                )
            if not self._contract_holds:
                self._check_contract(*args, **kwargs)
            call = type(self).compute if self.layout.family is None else self.layout.family.call
            out = call(self, self.base_layer, *args, **kwargs)
        except Exception:
            _offload(self.base_layer)
            raise
        finally:
            _put_back(offloaded)
        return out if hook is None else hook.post_forward(self.base_layer, out)

    def is_at_work(self) -> bool:
        """Whether the output differs from the base module's: an active adapter, neither disabled nor merged."""
        return not (self.disable_adapters or self.merged) and any(
            name in self.lora_A for name in self.active_adapters
        )

    def compute(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The experts with the active adapters.

        Args:
            module: the experts module whose parameters are, at this moment, plain local tensors.
            hidden_states: [T, H] float.
            top_k_index: [T, top_k] integer expert ids; others than 0..E-1 are skipped.
            top_k_weights: [T, top_k] float.
        Returns: [T, H], dtype of hidden_states.
        """
        offloaded = _fetch([*self._active_pairs(), *decoders(module)])
        projections = self._projection(module, "gate_up"), self._projection(module, "down")
        for projection in projections:
            if isinstance(projection.weight, QuantizedWeight):
                projection.weight.check_device(hidden_states.device)
        if self.backend == MATERIALIZE:
            out = self._compute_materialized(
                module, *projections, hidden_states, top_k_index, top_k_weights
            )
        else:
            out = experts(
                hidden_states,
                top_k_index,
                top_k_weights,
                *projections,
                self.layout.activation or own_activation(module, self.layout.gated),
                post_norm=module.post_expert_norm
                if getattr(module, "has_post_expert_norm", False)
                else None,
                backend=self.backend,
                recompute=self.recompute,
            )
        _put_back(offloaded)
        return out

    @torch.compiler.disable
    def _compute_materialized(
        self, module, up: Projection, down: Projection, *rows: torch.Tensor
    ) -> torch.Tensor:
        """What the model's own experts implementation makes of the rows; a new one is checked before and after."""
        name = self._shared_implementation()
        if name not in self._proven:
            check_implementation(name, module, self.layout)
        out, weights = run_implementation(
            module, self.layout, self._shared_config(), up, down, *rows
        )
        if name not in self._proven and torch.is_grad_enabled():
            if check_gradients(out, weights, *rows, self.layout.num_experts):
                self._proven.add(name)
        return out

    def compute_rows(self, module: nn.Module, rows: torch.Tensor, expert_size) -> torch.Tensor:
        """A module that is one projection, with the active adapters.

        Args:
            module: as in `compute`.
            rows: [M, K] float in expert order.
            expert_size: E integers, the rows of each expert.
        Returns: [M, N], dtype of rows.
        """
        (name,) = self.layout.projections
        offloaded = _fetch(self._active_pairs())
        out = rows_linear(rows, expert_size, self._projection(module, name), backend=self.backend)
        _put_back(offloaded)
        return out

    def _active_pairs(self) -> list[nn.ParameterDict]:
        return [
            sides[a]
            for sides in (self.lora_A, self.lora_B)
            for a in self.active_adapters
            if a in sides
        ]

    @torch.no_grad()
    def _check_contract(self, hidden_states, top_k_index, top_k_weights) -> None:
        """Compare, once, a module off the interface with what is assumed of it, on the first tokens it is given.

        Raises:
            UnsupportedExperts: if its own forward says something else than act_fn(gate) * up between two projections.
        """
        # a module of one's own need not know sentinels
        known = (
            ((top_k_index >= 0) & (top_k_index < self.layout.num_experts)).all(1).nonzero()[:4, 0]
        )
        if not known.numel():
            return
        first = hidden_states[known], top_k_index[known], top_k_weights[known]
        base = (Projection(self.layout.weight(self.base_layer, n), self.layout.bias(self.base_layer, n))
                for n in PROJECTIONS)  # fmt: skip
        own = type(self.base_layer).forward(self.base_layer, *first)
        assumed = experts(
            *first,
            *base,
            self.layout.activation or own_activation(self.base_layer, self.layout.gated),
        )
        # 5 %: bf16 rounding stays below 2 %, another activation or a forgotten factor does not
        self._contract_holds = bool((own - assumed).norm() <= 0.05 * own.norm())
        if not self._contract_holds:
            raise UnsupportedExperts(
                f"{type(self.base_layer).__name__}.forward does not compute the sum of top_k_weights * "
                "down(act(gate_up(x))) with the activation read from its _apply_gate or act_fn; give it an "
                "_apply_gate(gate_up) that says what it does, or take it out of target_modules."
            )

    def _projection(self, module: nn.Module, name: str) -> Projection:
        weight, *up_weight = self.layout.parts(module, name)
        base = Projection(
            weight, self.layout.bias(module, name), up_weight=up_weight[0] if up_weight else None
        )
        active = [a for a in self.active_adapters if a in self.lora_A and name in self.lora_A[a]]
        if not active:
            return base
        dropouts = {self.lora_dropout[a].p for a in active} if self.training else {0.0}
        if len(dropouts) > 1:
            raise ValueError(
                f"adapters {active} are active together with different lora_dropout {sorted(dropouts)}; "
                "train them one at a time, or give them one value."
            )
        if len(active) == 1:
            A, B = self.lora_A[active[0]][name], self.lora_B[active[0]][name]
            scaling, experts = self.scaling[active[0]], self.experts[active[0]]
        else:
            # ranks add up: [B1 B2] [A1; A2] = B1 A1 + B2 A2, each scaling folded into its B
            some = [self.experts[a] for a in active]
            experts = None if None in some else tuple(sorted(set().union(*some)))
            pairs = [self._among(a, name, experts) for a in active]
            A = torch.cat([A for A, _ in pairs], dim=1).flatten(0, 1)
            B = torch.cat(
                [self.scaling[a] * B for a, (_, B) in zip(active, pairs, strict=True)], dim=2
            )
            B = B.transpose(0, 1).flatten(1)
            scaling = 1.0
        lora = {
            "lora_A": A,
            "lora_B": B,
            "scaling": scaling,
            "dropout_p": dropouts.pop(),
            "experts": experts,
        }
        return replace(base, **lora)

    def _per_expert(self, adapter_name: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A as [S, r, K] and B as [S, N, r], views of the expert-major parameters."""
        pairs = self.lora_A[adapter_name][name], self.lora_B[adapter_name][name]
        return per_expert(*pairs, len(self.experts_of(adapter_name)))

    def _among(self, adapter_name: str, name: str, experts: tuple[int, ...] | None):
        """A and B of an adapter as above, but of `experts` (None for all E): zeros for those it has none of."""
        pairs = self._per_expert(adapter_name, name)
        if experts == self.experts[adapter_name]:
            return pairs
        wanted = range(self.layout.num_experts) if experts is None else experts
        slots = {expert: s for s, expert in enumerate(self.experts_of(adapter_name))}
        spread = []
        for pair in pairs:
            nothing, held = torch.zeros_like(pair[0]), pair.unbind(0)
            spread.append(torch.stack([held[slots[e]] if e in slots else nothing for e in wanted]))
        return spread

    # ------------------------------------------------------------------------------------------------------- merging

    def get_delta_weight(self, adapter_name: str, projection: str, expert: int) -> torch.Tensor:
        """[N, K] update of one expert, in at least fp32: scaling * B[e] A[e].

        Args:
            adapter_name: an adapter of this layer.
            projection: "gate_up" or "down", targeted by the adapter.
            expert: index of the expert, 0..E-1; one without a pair gets zeros.
        """
        A, B = self._per_expert(adapter_name, projection)
        dtype = torch.promote_types(A.dtype, torch.float32)
        held = self.experts_of(adapter_name)
        if expert not in held:
            return A.new_zeros(B.shape[1], A.shape[2], dtype=dtype)
        s = held.index(expert)
        return self.scaling[adapter_name] * (B[s].to(dtype) @ A[s].to(dtype))

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base weights, expert by expert, in the dtype of the base weights.

        Args:
            safe_merge: check first that every merged weight is finite, and change nothing if one is not.
            adapter_names: the adapters to merge; the active ones by default.
        Raises:
            ValueError: with safe_merge, if a merged weight would not be finite; for a quantized format that is only
                read here.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.lora_A:
                continue
            if safe_merge:
                for name, weight, expert, rows in self._each_expert(adapter_name):
                    merged = weight + self.get_delta_weight(adapter_name, name, expert)[rows]
                    if not torch.isfinite(merged).all():
                        raise ValueError(
                            f"NaNs detected in the merged weights: adapter {adapter_name!r}, {name} of expert "
                            f"{expert} is not finite; nothing was merged into this layer."
                        )
            # all of them first: nothing is half merged
            quantized = {name: self._merged(adapter_name, name) for name in self.lora_A[adapter_name]
                         if self._quantized(name) is not None}  # fmt: skip
            for name, weight in quantized.items():
                self._unmerged.setdefault(name, self._quantized(name))
                self._store(name, weight)
            for name, weight, expert, rows in self._each_expert(adapter_name):
                if name not in quantized:
                    weight.copy_(weight + self.get_delta_weight(adapter_name, name, expert)[rows])
            self.merged_adapters.append(adapter_name)

    def _quantized(self, name: str) -> QuantizedWeight | None:
        """A projection's base weight [E, N, K] where it is quantized."""
        weight = self.layout.parts(self.base_layer, name)[0]
        return weight if isinstance(weight, QuantizedWeight) else None

    def _merged(self, adapter_name: str, name: str) -> QuantizedWeight:
        """A quantized projection with an adapter merged in, and those merged before: requantized once, from the first.

        Raises:
            ValueError: if nothing here writes its format.
        """
        original = self._unmerged.get(name, self._quantized(name))
        names = [
            a
            for a in (*self.merged_adapters, adapter_name)
            if a in self.lora_A and name in self.lora_A[a]
        ]
        merged, error = requantized(
            original, lambda expert: sum(self.get_delta_weight(a, name, expert) for a in names)
        )
        self.merge_errors[name] = error
        logger.warning(
            "merging %r into %s experts (%s): requantizing changes the merged weights by %.0f %% of the update's "
            "norm; dequantize_experts(model) before merging keeps the update.",
            adapter_name, original.format, name, 100 * error,
        )  # fmt: skip
        return merged

    def _store(self, name: str, weight: QuantizedWeight) -> None:
        layout = self.layout.projection(name)
        store(
            self.base_layer, layout.weight, weight.transpose(1, 2) if layout.transposed else weight
        )

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the merged adapters again; in bf16 and fp16 exact up to rounding, and exact where quantized."""
        for name, original in self._unmerged.items():
            self._store(name, original)
        quantized = set(self._unmerged)
        self._unmerged.clear()
        self.merge_errors.clear()
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            if adapter_name in self.lora_A:
                for name, weight, expert, rows in self._each_expert(adapter_name):
                    if name not in quantized:
                        weight.copy_(
                            weight - self.get_delta_weight(adapter_name, name, expert)[rows]
                        )

    def _each_expert(self, adapter_name: str):
        """(projection, [n, K] base weight, a view or decoded, expert, which rows of N) of all an adapter touches."""
        for name in self.lora_A[adapter_name]:
            start = 0
            for part in self.layout.parts(self.base_layer, name):
                rows = slice(start, start + part.shape[1])
                for expert in self.experts_of(adapter_name):
                    yield name, part.detach()[expert], expert, rows
                start = rows.stop

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may convert other methods' layers of this kind to LoRA: this one already is."""
        return False

    # ---------------------------------------------------------------------------------------------- the base module

    @property
    def weight(self) -> torch.Tensor | QuantizedWeight:
        """The stacked [E, ., .] weight into the experts: what PEFT reads a layer's device and dtype from."""
        return self.layout.stored(self.base_layer, self.layout.first.weight)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        weight = self.layout.stored(base_layer, self.layout.first.weight)
        return weight.device, weight.dtype

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        base_device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        device = base_device if device is None else device
        if device.type == "meta":
            device = _execution_device(self.base_layer)
            if device is None:
                return
        for pairs in (self.lora_A, self.lora_B):
            if adapter_name in pairs and not any(
                p.is_meta for p in pairs[adapter_name].parameters()
            ):
                pairs[adapter_name].to(device, dtype)

    def release(self) -> nn.Module:
        """Give the base module back as it was, and return it."""
        return _detach(self.base_layer)

    def extra_repr(self) -> str:
        sides = self.layout.projections.values()
        shapes = ", ".join(
            f"{' + '.join(p.weights)} {p.in_features}->{p.out_features}" for p in sides
        )
        return f"E={self.layout.num_experts}, {shapes}, r={self.r}"


class AdaptedExpertsConfig:
    """A model's config as one adapted experts module sees it: the same, but for the experts implementation.

    The implementation's name lives on the config all modules share; through this view one module dispatches to the
    adapter while it is at work, whatever the user sets on the shared config.
    """

    def __init__(self, config, layer: MoELoraLayer):
        object.__setattr__(self, "_shared", config)
        object.__setattr__(self, "_layer", layer)

    def __getattr__(self, name: str):
        # copying and unpickling look attributes up before there is anything to delegate to
        if name.startswith("__") or "_shared" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._shared, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._shared, name, value)

    @property
    def _experts_implementation(self) -> str | None:
        return IMPLEMENTATION if self._layer.is_at_work() else self._shared._experts_implementation

    def __reduce__(self):
        return _new_config_view, (), {"_shared": self._shared, "_layer": self._layer}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)


def _new_config_view() -> AdaptedExpertsConfig:
    return AdaptedExpertsConfig.__new__(AdaptedExpertsConfig)


def moe_lora_experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts implementation registered with transformers; `module` is the base module of a MoELoraLayer."""
    return module.config._layer.compute(module, hidden_states, top_k_index, top_k_weights)


def _offload(module: nn.Module) -> None:
    """Send an offloaded module's weights back, which accelerate does after a forward that returns.

    One under non-reentrant checkpointing does not: recomputation ends by an exception as soon as it has what backward
    needs, and layer after layer would stay on the device.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.post_forward(module, None)


def _execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate brings an offloaded module's weights to run it; None for a module without such a hook."""
    hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
    devices = (
        getattr(h, "execution_device", None)
        for hook in hooks
        for h in getattr(hook, "hooks", [hook])
    )
    return next((torch.device(d) for d in devices if d is not None), None)


def _fetch(modules: list[nn.Module]) -> list[nn.Module]:
    """Bring in what accelerate offloaded of modules whose forward, for which it waits, is not called."""
    offloaded = [m for m in modules if hasattr(m, "_hf_hook")]
    for m in offloaded:
        m._hf_hook.pre_forward(m)
    return offloaded


def _put_back(offloaded: list[nn.Module]) -> None:
    for m in offloaded:
        m._hf_hook.post_forward(m, None)


def _attach(layer: MoELoraLayer, base_layer: nn.Module) -> None:
    if layer.layout.decorated:
        base_layer.config = AdaptedExpertsConfig(base_layer.config, layer)


def _detach(base_layer: nn.Module) -> nn.Module:
    if isinstance(getattr(base_layer, "config", None), AdaptedExpertsConfig):
        base_layer.config = base_layer.config._shared
    return base_layer
