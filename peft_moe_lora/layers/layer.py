"""An experts module with a low-rank update for every expert: W[e] + scaling * B[e] A[e].

A pair is lora_A and lora_B of one projection in one adapter.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Self, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..config import MATERIALIZE, MoELoraConfig
from ..experts.activation import activation_facts
from ..experts.decoding import decoders
from ..experts.layout import ExpertsLayout, read_layout
from ..experts.stored import UnsupportedExperts
from ..functional import Projection, draw_seeds, per_expert, rows_linear
from ..ops import QuantizedWeight
from ..parallel import zero
from ..parallel.sharding import is_sharded
from ..parallel.share import Share, drawn_whole
from . import merging, own
from .dispatch import attach, check_contract, detach, shared_config
from .frozen import compute_frozen
from .implementations import check_gradients, check_implementation, run_implementation
from .offload import execution_device, fetched, sent_back_after_exception
from .parts import active_adapters
from .projections import projection_of
from .refusals import refuse_hotswap_of_state_dict, watch
from .replaced import (
    call_base,
    call_in_place_of,
    follow_activation,
    note_computed,
    take_back_forward,
)


class MoELoraLayer(nn.Module, LoraLayer):
    """Wraps an experts module and owns A and B of every adapter.

    The base module keeps its weights and its forward. The layer is one of PEFT's LoRA layers, so
    that `set_scale`, `scale_layer`, `unscale_layer` and PEFT's helpers, which look for LoRA layers,
    act on experts too.

    Args:
        base_layer: the experts module. It is called as experts(hidden_states, top_k_index,
            top_k_weights), or with the arguments that its row in `FAMILIES` lists.
        adapter_name: name of the first adapter.
        config: configuration of the first adapter.
        path: path of the experts module in the model, by which the configuration gives it a rank,
            a lora_alpha, the S experts that get an adapter (S = E for all), and projections.
        share: the part of the experts that this process holds; None if it holds all of them.
    Parameters, per adapter and projection (K in- and N out-features of the projection):
        lora_A: [r * S, K], expert-major: rows s*r up to (s + 1)*r are A of the s-th of the S
            experts.
        lora_B: [N, r * S], expert-major: columns s*r up to (s + 1)*r are B of the s-th expert.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout", "use_rslora", "experts")

    # nn.DataParallel sets it on its replicas
    _is_replica = False
    # adapter -> nn.ParameterDict of projection -> parameter
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    # adapter -> nn.Dropout; as in PEFT, so that code which searches for dropout modules finds them
    lora_dropout: nn.ModuleDict
    # the thread whose `call_base` waits for `compute` to run
    awaited_by: int | None = None

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: MoELoraConfig,
        path: str,
        share: Share | None = None,
    ) -> None:
        # `LoraLayer.__init__` is not called: it accepts only base layers with one 2-D weight
        super().__init__()
        self.base_layer = base_layer
        self.layout: ExpertsLayout = read_layout(base_layer)
        # what its activation was read from
        self.activation_facts = activation_facts(base_layer)
        self.share = share
        # K of the first projection: H, the width of hidden_states
        self.in_features = self.layout.first.in_features
        # N of the last projection: H, unless the module is a single projection
        self.out_features = self.layout.last.out_features
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        # empty; PEFT reads them of every LoRA layer
        self.lora_embedding_A = nn.ParameterDict()
        self.lora_embedding_B = nn.ParameterDict()
        self.lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.use_rslora: dict[str, bool] = {}
        self.lora_variant = {}
        # has no effect: A and B are cast to the dtype of the input, not the other way round
        self.cast_input_dtype_enabled = True
        self.experts: dict[str, tuple[int, ...] | None] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        # merged adapter -> what was merged
        self.kept_of_merged: dict[str, merging.Merged] = {}
        # projection -> its quantized weight before anything was merged into it
        self.unmerged_weights: dict[str, QuantizedWeight] = {}
        # projection -> error of quantizing the merged weight again, divided by the update's norm
        self.merge_errors: dict[str, float] = {}
        self.backend = config.backend
        self.recompute = config.recompute
        # "materialize" runs the model's own implementation with an adapter, and so it does without
        self.keep_implementation = self.backend == MATERIALIZE
        self.forget_checks()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, path)
        attach(self, base_layer)
        watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # copies and unpickled layers are made without `__init__`
        super().__setstate__(state)
        watch(self)

    def forget_checks(self) -> None:
        """Check, when it is needed next, whether this layer computes what its module does."""
        # no check is needed if transformers' interface or `FAMILIES` defines what the module
        # computes, or if the module's own forward runs
        self._contract_holds = (
            self.layout.decorated or self.layout.family is not None or self.backend == MATERIALIZE
        )
        # names of experts implementations that were found to compute gradients of the weights
        self._differentiable: set[str | None] = set()

    # ---- adapters ------------------------------------------------------------------------------

    def update_layer(  # type: ignore[override]  # `_create_and_replace` alone calls it
        self,
        adapter_name: str,
        config: MoELoraConfig,
        path: str,
    ) -> None:
        """Add an adapter, or initialise an existing one again; it is frozen unless it is active.

        Raises:
            ValueError: if the backend of this layer's other adapters does not support it.
            RuntimeError: with backend="materialize", if the model's experts implementation cannot
                run here.
        """
        self._check_backend(config)
        self.keep_implementation |= config.keep_implementation
        r = config.rank_of(path)
        experts = config.experts_of(path, self.layout.num_experts)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = config.lora_alpha_of(path)
        self.experts[adapter_name] = experts
        self.use_rslora[adapter_name] = config.use_rslora
        # the initial scaling, lora_alpha / r or lora_alpha / sqrt(r)
        self.scaling[adapter_name] = 1.0
        self.set_scale(adapter_name, 1.0)
        # a new module is in training, but the layer may not be
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout).train(self.training)
        ranks = r * len(self.experts_of(adapter_name))
        A = nn.ParameterDict()
        B = nn.ParameterDict()
        for name in config.projections_of(path, self.layout):
            projection = self.layout.projection(name)
            A[name] = self._parameter(torch.empty(ranks, projection.in_features), experts, 0)
            B[name] = self._parameter(torch.empty(projection.out_features, ranks), experts, 1)
        self.lora_A[adapter_name] = A
        self.lora_B[adapter_name] = B
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _parameter(
        self, values: torch.Tensor, experts: tuple[int, ...] | None, dim: int
    ) -> nn.Parameter:
        """A parameter with these values, expert-major along `dim`, placed as the experts are."""
        if self.share is None:
            return nn.Parameter(values)
        return self.share.parameter(values, dim, experts)

    def _check_backend(self, config: MoELoraConfig) -> None:
        another = config.backend not in ("auto", self.backend)
        if another and MATERIALIZE in (config.backend, self.backend):
            raise ValueError(
                f"backend={config.backend!r}: the other adapters on these experts run with "
                f"backend={self.backend!r}, and a layer has one backend; give the new adapter the "
                "same backend."
            )
        if self.backend != MATERIALIZE:
            return
        if config.lora_dropout:
            raise ValueError(
                f"lora_dropout={config.lora_dropout!r}: the adapters on these experts run with "
                f'backend="{MATERIALIZE}", which adds B A to the weights, so A has no input of its '
                "own that could be dropped; set lora_dropout=0."
            )
        check_implementation(self._shared_implementation(), self.base_layer, self.layout)

    def _shared_implementation(self) -> str | None:
        """The experts implementation that the model's own config names."""
        config = shared_config(self.base_layer, self.layout)
        if config is None:
            return None
        return config._experts_implementation

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Initialise A and B of an adapter.

        Args:
            adapter_name: an adapter of this layer.
            init_lora_weights: True draws A as nn.Linear draws its weight; "gaussian" draws A from a
                normal distribution of standard deviation 1 / r. Both set B to zero, so that a new
                adapter changes nothing. False draws A and B as nn.Linear draws its weight.
        """
        r = self.r[adapter_name]
        for name in self.adapted_projections(adapter_name):
            A, B = self.pair(adapter_name, name)
            with drawn_whole(A, self.share) as values:
                if init_lora_weights == "gaussian":
                    nn.init.normal_(values, std=1 / r)
                else:
                    # every expert has the same fan-in K, so one draw over the stacked A is exact
                    nn.init.kaiming_uniform_(values, a=math.sqrt(5))
            with drawn_whole(B, self.share) as values:
                if init_lora_weights is False:
                    # as in PEFT, where B[e] is the weight of an nn.Linear of fan-in r
                    nn.init.uniform_(values, -1 / math.sqrt(r), 1 / math.sqrt(r))
                else:
                    nn.init.zeros_(values)

    @property
    def experts_here(self) -> Sequence[int]:
        """Ids of the experts whose weights this process holds in a forward."""
        if self.share is None:
            return range(self.layout.num_experts)
        return self.share.ids

    def experts_of(self, adapter_name: str) -> Sequence[int]:
        """Ascending ids of the experts that an adapter adapts."""
        chosen = self.experts[adapter_name]
        if chosen is None:
            return range(self.layout.num_experts)
        return chosen

    def adapted_projections(self, adapter_name: str) -> list[str]:
        """The projections that have a pair in an adapter; none if the layer lacks the adapter."""
        if adapter_name not in self.lora_A:
            return []
        return list(cast(nn.ParameterDict, self.lora_A[adapter_name]).keys())

    def pair(self, adapter_name: str, projection: str) -> tuple[nn.Parameter, nn.Parameter]:
        """lora_A [r * S, K] and lora_B [N, r * S] of one adapter, both expert-major."""
        found = self.find_pair(adapter_name, projection)
        assert found is not None, f"no {projection!r} in adapter {adapter_name!r} on these experts"
        return found

    def find_pair(
        self, adapter_name: str, projection: str
    ) -> tuple[nn.Parameter, nn.Parameter] | None:
        """The same; None if the adapter is not on this layer, or does not adapt the projection."""
        # not self.lora_A: every look-up of nn.Module takes a microsecond, in every forward
        As: Any = self._modules["lora_A"]
        Bs: Any = self._modules["lora_B"]
        A = As._modules.get(adapter_name)
        if A is None or projection not in A:
            return None
        return _entry(A, projection), _entry(Bs._modules[adapter_name], projection)

    def dropout_of(self, adapter_name: str) -> float:
        """The probability with which an adapter of this layer drops now.

        Its dropout module says so, as in PEFT: others may set its `p`, or switch it alone.
        """
        # not self.lora_dropout[adapter_name]: two look-ups of nn.Module, in every forward
        dropouts: Any = self._modules["lora_dropout"]
        dropout = dropouts._modules[adapter_name]
        if not dropout.training:
            return 0.0
        return dropout.p

    def pair_per_expert(
        self, adapter_name: str, projection: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A as [S, r, K] and B as [S, N, r], views of the expert-major parameters."""
        A, B = self.pair(adapter_name, projection)
        return per_expert(A, B, len(self.experts_of(adapter_name)))

    # ---- forward -------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Compute the experts' output with the active adapters.

        It takes the base module's arguments. If the base module is on transformers' experts
        interface, its own forward runs, and calls `compute` through the experts implementation that
        this package registers with transformers. If it is not on the interface, its forward does
        not run, and the layer computes the output.

        Returns: the same as the base module's forward.
        """
        follow_activation(self)
        # here and below not PEFT's properties, nor self.base_layer, which nn.Module looks up: they
        # take the host microseconds, in every forward
        if self._disable_adapters and self.merged_adapters:
            merging.check_may_unmerge(self)
            self.unmerge()
        if self.layout.decorated or not self.is_at_work():
            base_layer: Any = self._modules["base_layer"]
            if self._is_replica:
                # nn.DataParallel copies the base module with the config that names the original
                attach(self, base_layer)
            with sent_back_after_exception(base_layer):
                return call_base(self, base_layer, *args, **kwargs)
        return call_in_place_of(self.base_layer, self._forward_off_interface, *args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """As in torch; a forward that liger-kernel has bound to this layer is taken back."""
        take_back_forward(self)
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> Self:
        # a replica has copies of its base module's parts, and cannot tell whether one is another
        follow_activation(self)
        return super()._replicate_for_data_parallel()

    def _forward_off_interface(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if is_sharded(self.weight):
            raise UnsupportedExperts(
                f"{type(self.base_layer).__name__} holds sharded weights (tensor or expert "
                "parallelism), but it is not on transformers' experts interface, so its adapter "
                "needs whole weights. Load the model without a parallelism plan."
            )
        if not self._contract_holds:
            self._contract_holds = check_contract(self.base_layer, self.layout, *args, **kwargs)
        family = self.layout.family
        if family is None:
            return self.compute(self.base_layer, *args, **kwargs)
        return family.call(self, self.base_layer, *args, **kwargs)

    def adapters_at_work(self) -> list[str]:
        """The active adapters of this layer; none while they are disabled or merged."""
        if self._disable_adapters or self.merged_adapters:
            return []
        adapters: Any = self._modules["lora_A"]
        known = adapters._modules
        return [name for name in active_adapters(self) if name in known]

    def is_at_work(self) -> bool:
        """Whether this layer has an active adapter that is neither disabled nor merged."""
        return bool(self.adapters_at_work())

    def replaces_own(self) -> bool:
        """Whether this layer computes its module, and not the model's own implementation."""
        return self.is_at_work() or not self.keep_implementation

    def compute(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the experts' output with the adapters that are at work, if any.

        Args:
            module: the experts module, whose parameters are plain local tensors during this call.
            hidden_states: [T, H] float.
            top_k_index: [T, top_k] integer expert ids; ids outside 0..E-1 are skipped.
            top_k_weights: [T, top_k] float.
        Returns: [T, H], dtype of hidden_states.
        """
        note_computed(self)
        rows = (hidden_states, top_k_index, top_k_weights)
        adapters = self.adapters_at_work()
        if not adapters:
            return self._compute_frozen(module, rows)
        sides = self._sides_of(adapters)
        with fetched([*sides, *decoders(module)]):
            zero.check_gradients_arrive(_parameters_of(sides), hidden_states)
            up = projection_of(self, module, "gate_up", adapters)
            down = projection_of(self, module, "down", adapters)
            for projection in (up, down):
                if isinstance(projection.weight, QuantizedWeight):
                    projection.weight.check_device(hidden_states.device)
            if self.backend == MATERIALIZE:
                return self._compute_materialized(module, up, down, *rows)
            return own.compute(
                module,
                self.layout,
                rows,
                up,
                down,
                backend=self.backend,
                recompute=self.recompute,
                seeds=self._seeds(hidden_states.device, up, down),
            )

    def _compute_frozen(
        self, module: nn.Module, rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The output of the module without an adapter."""
        backend = self.backend
        if backend == MATERIALIZE:
            backend = "auto"
        named = self._shared_implementation()
        return compute_frozen(module, rows, layout=self.layout, named=named, backend=backend)

    def _seeds(self, device: torch.device, *projections: Projection) -> torch.Tensor | None:
        """The seeds of the masks of dropout, where several processes share the experts."""
        if self.share is None:
            return None
        drawn = draw_seeds(device, *projections)
        if drawn is None:
            return None
        return self.share.seeds(drawn)

    @torch.compiler.disable
    def _compute_materialized(
        self,
        module: nn.Module,
        up: Projection,
        down: Projection,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The output of the model's own experts implementation.

        An implementation is checked before its first call. Its gradients are checked after each
        call with gradients enabled, until one call has shown that it computes them.
        """
        name = self._shared_implementation()
        known = name in self._differentiable
        if not known:
            check_implementation(name, module, self.layout)
        config = shared_config(self.base_layer, self.layout)
        rows = (hidden_states, top_k_index, top_k_weights)
        out, weights = run_implementation(module, self.layout, config, up, down, *rows)
        if not known and torch.is_grad_enabled():
            if check_gradients(out, weights, *rows, self.layout.num_experts):
                self._differentiable.add(name)
        return out

    def compute_rows(
        self, module: nn.Module, rows: torch.Tensor, expert_size: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """Compute the output of a module that is a single projection, with the active adapters.

        Args:
            module: as in `compute`.
            rows: [M, K] float in expert order.
            expert_size: E integers, the number of rows of each expert.
        Returns: [M, N], dtype of rows.
        """
        (name,) = self.layout.projections
        adapters = self.adapters_at_work()
        sides = self._sides_of(adapters)
        with fetched(sides):
            zero.check_gradients_arrive(_parameters_of(sides), rows)
            projection = projection_of(self, module, name, adapters)
            return rows_linear(rows, expert_size, projection, backend=self.backend)

    def _sides_of(self, adapters: list[str]) -> list[nn.ParameterDict]:
        """lora_A and lora_B of adapters of this layer."""
        As: Any = self._modules["lora_A"]
        Bs: Any = self._modules["lora_B"]
        return [side._modules[name] for side in (As, Bs) for name in adapters]

    # ---- merging -------------------------------------------------------------------------------

    def get_delta_weight(self, adapter_name: str, projection: str, expert: int) -> torch.Tensor:
        """[N, K] update of one expert, in at least fp32: scaling * B[e] A[e].

        Args:
            adapter_name: an adapter of this layer.
            projection: "gate_up" or "down", targeted by the adapter.
            expert: index of the expert, 0..E-1. The update is zero if the adapter does not adapt
                this expert. Of a merged adapter it is what was merged.
        """
        return merging.delta_weight(self, adapter_name, projection, expert)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weights, expert by expert, in the dtype of the base weights.

        Args:
            safe_merge: first check that every merged weight is finite; if one is not, the adapter
                is not merged into this layer.
            adapter_names: the adapters to merge; the active ones by default.
        Raises:
            ValueError: with safe_merge, if a merged weight would not be finite; if the base weights
                are in a quantized format that this package can only read.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name in self.lora_A:
                merging.merge(self, adapter_name, safe_merge)

    def unmerge(self) -> None:
        """Subtract the merged adapters again; the weights are what they were, bit for bit.

        Merging keeps A and B in host memory, so an adapter may be loaded, cast or rescaled in
        between. It also keeps what a subtraction would not restore: a few percent of the size of
        the weights, at most as much as these.
        """
        merging.unmerge(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT converts layers of other methods to LoRA, and this one is LoRA already."""
        return False

    # ---- the base module -----------------------------------------------------------------------

    @property
    def weight(self) -> torch.Tensor | QuantizedWeight:  # type: ignore[override]  # PEFT: dense
        """The stacked [E, ., .] weight of the first projection.

        PEFT reads a layer's device and dtype from it.
        """
        return self.layout.stored(self.base_layer, self.layout.first.weight)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device, torch.dtype]:
        weight = self.layout.stored(base_layer, self.layout.first.weight)
        return weight.device, weight.dtype

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        base_device, dtype = self._get_base_layer_device_and_dtype(self.base_layer)
        if device is None:
            device = base_device
        if device.type == "meta":
            # accelerate moves offloaded weights to this device for every forward
            device = execution_device(self.base_layer)
        if device is None:
            return
        for side in (self.lora_A, self.lora_B):
            if adapter_name not in side:
                continue
            parameters = side[adapter_name]
            if not any(parameter.is_meta for parameter in parameters.parameters()):
                parameters.to(device, dtype)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in nn.Module.

        Raises:
            ValueError: if PEFT asks for it to hotswap an adapter.
        """
        refuse_hotswap_of_state_dict()
        return super().state_dict(*args, **kwargs)

    def release(self) -> nn.Module:
        """Give the base module its own config back, and return the module."""
        return detach(self.base_layer)

    def extra_repr(self) -> str:
        parts = [f"E={self.layout.num_experts}"]
        for projection in self.layout.projections.values():
            weights = " + ".join(projection.weights)
            parts.append(f"{weights} {projection.in_features}->{projection.out_features}")
        return ", ".join([*parts, f"r={self.r}"])


def _parameters_of(modules: list[nn.ParameterDict]) -> Iterator[nn.Parameter]:
    for module in modules:
        yield from module.parameters()


def _entry(side: nn.ParameterDict, projection: str) -> nn.Parameter:
    """side[projection]; nn.ParameterDict's own look-up takes microseconds, in every forward."""
    registered: dict[str, Any] = side._parameters
    # FSDP1 and nn.DataParallel put tensors beside the registered parameters
    if projection not in registered:
        return side[projection]
    # not `get`: under ZeRO-3 this look-up gathers the parameter
    return registered[projection]
