"""Which modules get an adapter: experts modules become MoELoraLayer, everything else PEFT's own LoRA layers."""

import logging

from peft import LoraModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import nn

from . import checkpoint
from .config import MoELoraConfig
from .layer import MoELoraLayer
from .layout import ExpertsLayout, is_experts, read_layout

logger = logging.getLogger(__name__)


class MoELoraModel(LoraModel):
    """Per-expert LoRA on a model's experts, ordinary LoRA on its other targets.

    Args:
        model: any model whose targets are experts modules or layers PEFT's LoRA knows; changed in place.
        config: MoELoraConfig, or adapter name -> MoELoraConfig.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by loading.
    Raises:
        ValueError: before anything is changed, if a target matches nothing, an experts module is of an unsupported
            form, or the adapter file read beside the configuration does not fit the model.
    """

    tuner_layer_cls = (LoraLayer, MoELoraLayer)

    def _prepare_adapter_config(self, peft_config: MoELoraConfig, model_config: dict) -> MoELoraConfig:
        """The last step before PEFT changes the model: all that can be wrong with targets and files is found here."""
        names = [key for key, _ in self.model.named_modules()]
        if peft_config.target_modules is None:
            peft_config.target_modules = self._every_experts_module(names)
        targets = self._targets(peft_config)
        layouts = {
            key: (_layout(module), self._rank(peft_config, key))
            for key, module in targets.items()
            if isinstance(module, MoELoraLayer) or is_experts(module)
        }
        if peft_config._file is not None:
            others = [key for key in targets if key not in layouts]
            checkpoint.check_file(peft_config._file, layouts, others, peft_config)
        return peft_config

    def _every_experts_module(self, names: list[str]) -> set[str]:
        experts = [key for key, module in self._base_modules() if is_experts(module)]
        if not experts:
            raise ValueError(
                "target_modules=None targets every experts module, but the model has none; name the modules to adapt "
                "in target_modules."
            )
        # the bare name ("experts") where it means just these modules: it fits any number of layers
        short = {key.rpartition(".")[2] for key in experts}
        matched = [key for key in names if key.rpartition(".")[2] in short]
        return short if sorted(matched) == sorted(experts) else set(experts)

    def _base_modules(self):
        """(path, module) of the model without what adapters added; an adapted module stands for its base."""
        adapted: list[str] = []
        for key, module in self.model.named_modules():
            if not any(key.startswith(prefix) for prefix in adapted):
                if isinstance(module, BaseTunerLayer):
                    adapted.append(f"{key}.")
                yield key, module.get_base_layer() if isinstance(module, MoELoraLayer) else module

    def _targets(self, config: MoELoraConfig) -> dict[str, nn.Module]:
        """Path -> module of all that the configuration targets.

        Raises:
            ValueError: naming an entry of target_modules, rank_pattern or alpha_pattern that matches no module.
        """
        modules = {key: module for key, module in self._base_modules() if key}
        adapted = dict(self.model.named_modules())
        if config.target_modules == "all-linear":
            return {}
        targets = {key: adapted[key] for key in modules if _matched(check_target_module_exists(config, key))}
        if isinstance(config.target_modules, str):
            return targets
        for entry in sorted(config.target_modules):
            if not any(key == entry or key.endswith(f".{entry}") for key in modules):
                raise ValueError(
                    f"target_modules: {entry!r} matches no module of the model; the experts modules are called "
                    f"{sorted({k.rpartition('.')[2] for k, m in modules.items() if is_experts(m)}) or 'nothing here'}."
                )
        return targets

    @staticmethod
    def _rank(config: MoELoraConfig, key: str) -> int:
        return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), key), config.r)

    @staticmethod
    def _alpha(config: MoELoraConfig, key: str) -> float:
        return config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), key), config.lora_alpha)

    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, *, parameter_name=None
    ) -> None:
        r, alpha = self._rank(lora_config, current_key), self._alpha(lora_config, current_key)
        if isinstance(target, MoELoraLayer):
            target.update_layer(adapter_name, lora_config, r, alpha)
        elif is_experts(target):
            layer = MoELoraLayer(target, adapter_name, lora_config, r, alpha)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)  # adding a further adapter: it is not trained until it is set active
            self._replace_module(parent, target_name, layer, target)
        else:
            super()._create_and_replace(
                lora_config, adapter_name, target, target_name, parent, current_key, parameter_name=parameter_name
            )

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        if isinstance(child, MoELoraLayer):
            setattr(parent, child_name, child.release())
        elif isinstance(new_module, MoELoraLayer):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _post_injection_hook(self, model: nn.Module, config: MoELoraConfig, adapter_name: str) -> None:
        logger.info("adapter %r: %s", adapter_name, self.summary(adapter_name))

    def summary(self, adapter_name: str | None = None) -> str:
        """How many experts modules, experts and projections an adapter (the active one by default) rides on."""
        names = self.active_adapters if adapter_name is None else [adapter_name]
        layers = [m for m in self.model.modules() if isinstance(m, MoELoraLayer) and any(n in m.lora_A for n in names)]
        experts = sum(layer.layout.num_experts for layer in layers)
        projections = sum(
            layer.layout.num_experts * len({p for n in names if n in layer.lora_A for p in layer.lora_A[n]})
            for layer in layers
        )
        return f"{len(layers)} experts modules, {experts:,} experts, {projections:,} projections adapted"

    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None and self._has_experts():
            raise ValueError(
                "adapter_names: experts do not mix adapters within one batch, as their rows are no longer in batch "
                "order; run one batch per adapter with set_adapter."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        """PEFT's, where no experts are adapted.

        Raises:
            ValueError: if experts are adapted; several adapters can be active at once instead.
        """
        if self._has_experts():
            raise ValueError(
                "add_weighted_adapter does not combine experts' adapters; activate several with set_adapter([...]), "
                "or merge them one after the other."
            )
        super().add_weighted_adapter(*args, **kwargs)

    def _has_experts(self) -> bool:
        return any(isinstance(module, MoELoraLayer) for module in self.model.modules())

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        # the configuration is saved after the weights and completes their file with this
        config._description = checkpoint.describe(model, adapter_name)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        checkpoint.check_state_dict(model, adapter_name, state_dict)
        return state_dict


def _layout(module: nn.Module) -> ExpertsLayout:
    return module.layout if isinstance(module, MoELoraLayer) else read_layout(module)


def _matched(result) -> bool:
    """PEFT answers with a bool, a match, None, or an object that says the module is excluded."""
    return bool(result) and not isinstance(result, _ExcludedModule)
