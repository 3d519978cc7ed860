"""The tuner: which kind of layer each target becomes, and what PEFT's methods do with it.

An experts module becomes a MoELoraLayer, a router becomes a MoELoraRouter, and any other target
becomes one of PEFT's own LoRA layers.
"""

import logging
from collections.abc import Callable, Collection
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from peft import LoraModel, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import MoELoraConfig, Saving
from ..experts.families import READ_NOT_CALLED
from ..experts.layout import is_experts
from ..functional import without_autocast_of
from ..layers.checked import still_unchecked
from ..layers.fast_linear import choose_forward
from ..layers.layer import MoELoraLayer
from ..layers.merging import check_shards_are_unmerged
from ..layers.offload import fetched
from ..layers.refusals import refuse_subtraction
from ..layers.router import MoELoraRouter
from ..parallel import divided, fsdp, sharding, zero
from ..parallel.replicated import cast_up, replicate
from . import checkpoint, restoring, saving, targets, weighted, words
from .combining import Combination
from .initial import minus_initial
from .kinds import layer_for
from .loading import check_over_existing, check_unmerged
from .peft_model import install_around
from .shards import reshard_to_merge
from .summary import Summary, summarize
from .ties import check_may_merge, untie
from .weighted import Mixture
from .whole import check_whole, is_written

logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])


def _without_autocast(method: Method) -> Method:
    """The method of a tuner, which computes in the dtypes of its tensors within autocast too."""

    @wraps(method)
    def exactly(self: "MoELoraModel", *args: Any, **kwargs: Any) -> Any:
        with without_autocast_of(self.model):
            return method(self, *args, **kwargs)

    return cast(Method, exactly)


class MoELoraModel(LoraModel):
    """Per-expert LoRA on a model's experts, and ordinary LoRA on its routers and other targets.

    Args:
        model: any model whose targets are experts modules, routers or layers that PEFT's LoRA
            supports; changed in place.
        config: MoELoraConfig, or a dict of adapter name -> MoELoraConfig.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter on the meta device; loading a checkpoint fills it.
    Raises:
        ValueError: if a target matches nothing, if an experts module is stored in an unsupported
            form, or if the adapter file that was read with the configuration does not fit the
            model. The model is left unchanged.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        install_around(self)

    # ---- targets -------------------------------------------------------------------------------

    def _prepare_adapter_config(
        self, peft_config: PeftConfig, model_config: dict[str, Any]
    ) -> MoELoraConfig:
        """Check all targets and the adapter file before PEFT changes the model."""
        config = _own(peft_config)
        words.resolve(self, config)
        targets.check(self, config)
        return config

    # ---- layers --------------------------------------------------------------------------------

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter as PEFT does; if a target cannot be adapted, restore the model."""
        modules = dict(model.named_modules())
        mesh = None
        if not divided.is_divided(model):
            mesh = fsdp.mesh_of(model)
        trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if mesh is not None:
                replicate(model, adapter_name, mesh)
        except BaseException:
            self._take_back(model, adapter_name, modules)
            for parameter, requires_grad in trainable.items():
                parameter.requires_grad = requires_grad
            if getattr(model, "peft_config", None) is self.peft_config:
                # with transformers' methods, the model has the configurations, not a PeftModel
                self.peft_config.pop(adapter_name, None)
            raise

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            cast_up(self.model, adapter_name)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _take_back(self, model: nn.Module, adapter_name: str, before: dict[str, nn.Module]) -> None:
        """Remove an adapter, and every layer that was added to the model for it.

        Args:
            model: the model.
            adapter_name: the adapter.
            before: path -> module, before the adapter was added.
        """
        for key, module in list(model.named_modules()):
            original = before.get(key)
            if original is None or not isinstance(module, BaseTunerLayer):
                continue
            if module is original:
                module.delete_adapter(adapter_name)
            else:
                path, _, name = key.rpartition(".")
                parent = model.get_submodule(path)
                self._replace_module(parent, name, original, getattr(parent, name))

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = _own(peft_config)
        if config.expert_indices is not None and targets.holds_experts(target):
            number = targets.layout_of(target).num_experts
            if config.experts_of(current_key, number) == ():
                return
        if isinstance(target, MoELoraLayer):
            target.update_layer(adapter_name, config, current_key)
            return
        if READ_NOT_CALLED.get(type(parent).__name__) == target_name:
            raise ValueError(
                f"{type(parent).__name__} reads the weight of its {target_name} but never calls "
                "that module, so a LoRA on it would have no effect. Train it whole with "
                f"modules_to_save=[{target_name!r}], or take it out of target_modules."
            )
        # PEFT puts A and B where the weight is, and an offloaded weight is on the meta device; of
        # experts, which are large, the layer knows where they belong
        away = [] if is_experts(target) else [targets.base_of(target)]
        with fetched(away):
            layer = layer_for(self.model, config, adapter_name, target, parent, current_key)
            if layer is None:
                super()._create_and_replace(
                    config,
                    adapter_name,
                    target,
                    target_name,
                    parent,
                    current_key,
                    parameter_name=parameter_name,
                )
                choose_forward(getattr(parent, target_name), adapter_name, config.fast_linear)
                return
            choose_forward(layer, adapter_name, config.fast_linear)
            if adapter_name not in self.active_adapters:
                # a second adapter is not trained until it is set active
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, MoELoraLayer):
            setattr(parent, child_name, child.release())
        elif isinstance(new_module, MoELoraLayer | MoELoraRouter):
            # PEFT would move the adapter to the device of the weight, and that is the meta device
            # if the weight is offloaded
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # ---- summary and use of several adapters ---------------------------------------------------

    def _post_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        logger.info("adapter %r: %s", adapter_name, self.summary(adapter_name))

    def summary(self, adapter_name: str | None = None) -> Summary:
        """Count what an adapter adapts: experts, routers, other layers, modules saved whole.

        The result is a string of one line. A notebook shows it as a table.

        Args:
            adapter_name: the adapter; by default the active ones.
        """
        names: Collection[str] = self.active_adapters
        if adapter_name is not None:
            names = [adapter_name]
        return summarize(self.model, names)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        mixed = kwargs.get("adapter_names") is not None
        if mixed and self._has(MoELoraLayer, MoELoraRouter):
            raise ValueError(
                "adapter_names: experts and routers cannot use several adapters within one batch, "
                "because their rows are tokens, not samples; run one batch per adapter with "
                "set_adapter."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    @_without_autocast
    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that combines others; the arguments are those of PEFT's method.

        Experts are combined one by one. The new adapter is frozen and not active, as in PEFT.

        Raises:
            ValueError: if the name is taken, if an argument is out of range, if the kind needs
                equal ranks and they differ, or if an adapter trains more than A and B. The model is
                left unchanged.
        """
        if adapter_name in self.peft_config:
            raise ValueError(
                f"there is an adapter {adapter_name!r} already; choose another adapter_name, or "
                "call delete_adapter first."
            )
        if sharding.is_divided(self.model) or zero.partitions(self.model):
            raise ValueError(
                "add_weighted_adapter: the model is divided among processes; save the adapters, "
                "and combine them in one process."
            )
        kind, rank, names = self._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        options = (density, majority_sign_method, svd_clamp, svd_full_matrices, svd_driver)
        mixture = Mixture.of(adapters, weights, Combination(kind, rank, *options))
        configs = {name: _own(self.peft_config[name]) for name in adapters}
        weighted.check_configs(configs)
        config = weighted.combined_config(self.model, mixture, list(configs.values()), names)
        combined = weighted.combine(self.model, mixture, config)
        before = dict(self.model.named_modules())
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
            # to fp32, as PEFT does for every adapter that it adds
            self._cast_adapter_dtype(adapter_name)
            weighted.write(self.model, adapter_name, combined)
        except BaseException:
            self._take_back(self.model, adapter_name, before)
            del self.peft_config[adapter_name]
            raise
        self.set_requires_grad(adapter_name, requires_grad=False)

    def _has(self, *layers: type[nn.Module]) -> bool:
        return any(isinstance(module, layers) for module in self.model.modules())

    # ---- merging -------------------------------------------------------------------------------

    @_without_autocast
    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into the base weights, as PEFT does.

        Every process must call this if the model is sharded.

        Raises:
            ValueError: if an adapter changes a weight that the embedding and the head share, or
                cannot be merged into shards.
        """
        names = adapter_names or self.active_adapters
        check_may_merge(self.model, names)
        reshard_to_merge(self.model, names)
        if zero.partitions(self.model):
            self._check_merge_allowed()
            self._to_gathered(lambda layer: layer.merge(safe_merge, adapter_names))
            return
        safe_merge = still_unchecked(self.model, safe_merge, adapter_names)
        restoring.keep(self.model)
        try:
            super().merge_adapter(adapter_names, safe_merge)
        finally:
            restoring.note_merged(self.model)

    @_without_autocast
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """Merge adapters and return the plain model, as PEFT does.

        A head that shares its weight with the embedding gets a weight of its own if the adapters
        change one of the two, or each in its own way. Under ZeRO-3 this is refused.
        """
        if zero.partitions(self.model):
            self.merge_adapter(adapter_names, safe_merge)
            return self.unload()
        names = adapter_names or self.active_adapters
        reshard_to_merge(self.model, names)
        safe_merge = still_unchecked(self.model, safe_merge, adapter_names)
        untie(self.model, names)
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    @_without_autocast
    def unmerge_adapter(self) -> None:
        """Subtract all merged adapters again; the weights are what they were, bit for bit.

        Of layers beside experts, quantized and sharded weights are restored up to rounding, as PEFT
        does it. Every process must call this if the model is sharded.
        """
        fsdp.reshard(self.model)
        if not zero.partitions(self.model):
            merged = restoring.merged_layers(self.model)
            super().unmerge_adapter()
            restoring.restore(merged)
            return
        self._to_gathered(lambda layer: layer.unmerge())

    def _to_gathered(self, change: Callable[[BaseTunerLayer], None]) -> None:
        """Change every adapted layer, one after the other, while its parameters are whole."""
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                # PEFT derives its layers from nn.Module and BaseTunerLayer
                with zero.gathered(cast(nn.Module, layer).parameters(), written=True):
                    change(layer)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        fsdp.reshard(self.model)
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters, as PEFT does, and unmerge them.

        PEFT's layers unmerge in their next forward, where an offloaded weight cannot be written.

        Raises:
            ValueError: if adapters are merged into weights that FSDP2 or ZeRO-3 has sharded.
        """
        check_shards_are_unmerged(self.model)
        layers = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
        if any(layer.merged for layer in layers):
            self.unmerge_adapter()
        super().disable_adapter_layers()

    # ---- checkpoints ---------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        # PEFT saves the configuration after the weights; `MoELoraConfig.save_pretrained` then
        # writes this description into the metadata of the weights' file
        own = _own(config)
        own._saving = Saving(
            saving.describe(model, adapter_name), saving.patterns(own, model, adapter_name)
        )
        # in this dict, because PEFT reads the trained tensors beside A and B from it
        saving.fill_with_whole(model, state_dict)
        saving.add_keys_of_wrapped(model, state_dict)
        keyed = saving.keyed_by_path(model, state_dict)
        found = super()._get_adapter_state_dict(
            model, config, adapter_name, keyed, unwanted_adapter_names
        )
        tensors = saving.gathered(found)
        saving.gather_beside(model, state_dict)
        saving.take_out_merged(model, state_dict)
        if is_written():
            check_whole(model, adapter_name, tensors)
        return tensors

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT leaves them in the keys of modules that are trained whole
        without_wrappers = key.replace(sharding.CHECKPOINT_WRAPPER, "")
        return super()._remove_adapter_name_from_key(without_wrappers, adapter_name)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: nn.Module,
        peft_config: PeftConfig,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, torch.Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        # PEFT would load the initial adapter into the model, and stack the ranks of all experts
        return minus_initial(
            _own(peft_config), path_initial_model_for_weight_conversion, output_state_dict
        )

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Subtract an initial adapter as PEFT does, in a model without adapted experts.

        Raises:
            ValueError: if experts are adapted.
        """
        if self._has(MoELoraLayer):
            refuse_subtraction()
        return super().subtract_mutated_init(*args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        check_unmerged(model, adapter_name)
        check_over_existing(model, _own(config), adapter_name)
        state_dict = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        keyed = checkpoint.keyed_by_adapter(model, adapter_name, state_dict)
        checkpoint.check_state_dict(model, adapter_name, keyed)
        return checkpoint.placed_as(keyed, model)


def _own(config: PeftConfig) -> MoELoraConfig:
    """The configuration with its own type; PEFT's signatures annotate it as PeftConfig."""
    assert isinstance(config, MoELoraConfig), "the tuner is registered for MoELoraConfig only"
    return config
