"""Which modules get an adapter: experts a MoELoraLayer, routers a MoELoraRouter, the rest PEFT's own LoRA layers."""

import logging
import weakref
from collections import Counter

from peft import LoraModel, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..experts.families import READ_NOT_CALLED
from ..experts.layout import ExpertsLayout, is_experts, read_layout
from ..experts.routers import is_router
from . import checkpoint
from .config import MoELoraConfig
from .layer import MoELoraLayer
from .router import MoELoraRouter

logger = logging.getLogger(__name__)


class MoELoraModel(LoraModel):
    """Per-expert LoRA on a model's experts, ordinary LoRA on its other targets, routers among them.

    Args:
        model: any model whose targets are experts modules, routers or layers PEFT's LoRA knows; changed in place.
        config: MoELoraConfig, or adapter name -> MoELoraConfig.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by loading.
    Raises:
        ValueError: before anything is changed, if a target matches nothing, an experts module is of an unsupported
            form, or the adapter file read beside the configuration does not fit the model.
    """

    tuner_layer_cls = (LoraLayer, MoELoraLayer)

    def _prepare_adapter_config(
        self, peft_config: MoELoraConfig, model_config: dict
    ) -> MoELoraConfig:
        """The last step before PEFT changes the model: all that can be wrong with targets and files is found here."""
        names = [key for key, _ in self.model.named_modules()]
        if peft_config.target_modules is None:
            peft_config.target_modules = self._every_experts_module(names)
        targets = self._targets(peft_config)
        experts = {
            key: _layout(module) for key, module in targets.items() if _holds_experts(module)
        }
        chosen = {
            key: peft_config.experts_of(key, layout.num_experts) for key, layout in experts.items()
        }
        peft_config.check_every_entry_matches(experts)
        if peft_config._file is not None:
            ranked = {key: self._rank(peft_config, key) for key in targets}
            checkpoint.check_file(
                peft_config._file,
                checkpoint.Targets(
                    {
                        key: (layout, ranked[key], chosen[key])
                        for key, layout in experts.items()
                        if chosen[key] != ()
                    },
                    {
                        key: (_base(module), ranked[key])
                        for key, module in targets.items()
                        if key not in experts
                    },
                    *self._saved_and_carried(peft_config),
                ),
                peft_config,
            )
        return peft_config

    def _saved_and_carried(
        self, config: MoELoraConfig
    ) -> tuple[dict[str, nn.Module], tuple[str, ...]]:
        """Modules a file holds whole, and paths of those whose weights PEFT adds to a file by rules of its own."""
        saved, carried = {}, []
        for key, module in self._base_modules():
            last = key.rpartition(".")[2]
            # as PEFT matches them: the name may be the end of a longer one
            if key.endswith(tuple(config.modules_to_save or ())):
                saved[key] = getattr(module, "original_module", module)
            elif last in EMBEDDING_LAYER_NAMES or config.bias != "none":
                carried.append(key)
        return saved, tuple(carried)

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
        targets = {
            key: adapted[key]
            for key in modules
            if _matched(check_target_module_exists(config, key))
        }
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
        return config.alpha_pattern.get(
            get_pattern_key(config.alpha_pattern.keys(), key), config.lora_alpha
        )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """PEFT's, and all or nothing: a target that turns out not to be adaptable leaves the model as it was."""
        modules = dict(model.named_modules())
        trainable = {p: p.requires_grad for p in model.parameters()}
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for key, module in list(model.named_modules()):
                if not isinstance(module, BaseTunerLayer):
                    continue
                if modules.get(key) is module:
                    module.delete_adapter(adapter_name)
                elif key in modules:
                    self._replace_module(model.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2],
                                         modules[key], module)  # fmt: skip
            for parameter, requires_grad in trainable.items():
                parameter.requires_grad = requires_grad
            raise

    def _create_and_replace(
        self,
        lora_config,
        adapter_name,
        target,
        target_name,
        parent,
        current_key,
        *,
        parameter_name=None,
    ) -> None:
        r, alpha, chosen = (
            self._rank(lora_config, current_key),
            self._alpha(lora_config, current_key),
            None,
        )
        if lora_config.expert_indices is not None and _holds_experts(target):
            chosen = lora_config.experts_of(current_key, _layout(target).num_experts)
        if chosen == ():
            return
        if isinstance(target, MoELoraLayer):
            target.update_layer(adapter_name, lora_config, r, alpha, chosen)
        elif is_experts(target):
            layer = MoELoraLayer(target, adapter_name, lora_config, r, alpha, chosen)
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(
                    False
                )  # adding a further adapter: it is not trained until it is set active
            self._replace_module(parent, target_name, layer, target)
        elif is_router(target, parent):
            router = MoELoraRouter(target, adapter_name, config=lora_config, r=r, lora_alpha=alpha)
            if adapter_name not in self.active_adapters:
                router.requires_grad_(False)
            self._replace_module(parent, target_name, router, target)
        elif READ_NOT_CALLED.get(type(parent).__name__) == target_name:
            raise ValueError(
                f"{type(parent).__name__} reads the weight of its {target_name} and never calls it: a LoRA there "
                f"would do nothing. Train it whole, modules_to_save=[{target_name!r}], or leave it out."
            )
        else:
            super()._create_and_replace(
                lora_config,
                adapter_name,
                target,
                target_name,
                parent,
                current_key,
                parameter_name=parameter_name,
            )

    def _replace_module(self, parent, child_name, new_module, child) -> None:
        if isinstance(child, MoELoraLayer):
            setattr(parent, child_name, child.release())
        elif isinstance(new_module, MoELoraLayer | MoELoraRouter):
            # PEFT would move the adapter to where the weight lies, and an offloaded one lies nowhere
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _post_injection_hook(
        self, model: nn.Module, config: MoELoraConfig, adapter_name: str
    ) -> None:
        logger.info("adapter %r: %s", adapter_name, self.summary(adapter_name))
        _PrintWithSummary.install_around(self)

    def summary(self, adapter_name: str | None = None) -> str:
        """What an adapter (the active one by default) is on: experts, routers, other layers, modules saved whole."""
        names = self.active_adapters if adapter_name is None else [adapter_name]
        experts, others = (
            [],
            {"routers": Counter(), "other layers": Counter(), "modules saved whole": Counter()},
        )
        for key, module in self.model.named_modules():
            if not _names_of_adapters(module).isdisjoint(names):
                kind = ("modules saved whole" if isinstance(module, ModulesToSaveWrapper) else
                        "routers" if isinstance(module, MoELoraRouter) else "other layers")  # fmt: skip
                if isinstance(module, MoELoraLayer):
                    experts.append(module)
                else:
                    others[kind][
                        ".".join([part for part in key.split(".") if not part.isdigit()][-2:])
                    ] += 1
        adapted = [
            {
                (p, e)
                for n in names
                if n in layer.lora_A
                for p in layer.lora_A[n]
                for e in layer.experts_of(n)
            }
            for layer in experts
        ]
        number, projections = (
            sum(len({e for _, e in pairs}) for pairs in adapted),
            sum(map(len, adapted)),
        )
        held = sum(layer.layout.num_experts for layer in experts)
        of_all = "" if held == number else f" of {held:,}"
        told = [
            f"{len(experts)} experts modules, {number:,}{of_all} experts, {projections:,} projections adapted"
        ]
        for kind, counts in others.items():
            if counts:
                listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
                told.append(f"{counts.total()} {kind}: {listed}")
        return "; ".join(told)

    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None and self._has(MoELoraLayer, MoELoraRouter):
            raise ValueError(
                "adapter_names: experts and routers do not mix adapters within one batch, as their rows are tokens, "
                "not samples; run one batch per adapter with set_adapter."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def add_weighted_adapter(self, *args, **kwargs) -> None:
        """PEFT's, where no experts are adapted.

        Raises:
            ValueError: if experts are adapted; several adapters can be active at once instead.
        """
        if self._has(MoELoraLayer):
            raise ValueError(
                "add_weighted_adapter does not combine experts' adapters; activate several with set_adapter([...]), "
                "or merge them one after the other."
            )
        super().add_weighted_adapter(*args, **kwargs)

    def _has(self, *layers: type) -> bool:
        return any(isinstance(module, layers) for module in self.model.modules())

    @classmethod
    def _get_adapter_state_dict(
        cls, model, config, adapter_name, state_dict, unwanted_adapter_names
    ):
        # the configuration is saved after the weights and completes their file with this
        config._description = checkpoint.describe(model, adapter_name)
        return super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        checkpoint.check_state_dict(model, adapter_name, state_dict)
        return state_dict


class _PrintWithSummary:
    """`print_trainable_parameters` of one PeftModel, with a second line that says what of the experts is adapted."""

    def __init__(self, peft_model: PeftModel):
        self.peft_model = peft_model

    def __call__(self) -> None:
        type(self.peft_model).print_trainable_parameters(self.peft_model)
        print(self.peft_model.base_model.summary())

    @classmethod
    def install_around(cls, tuner: MoELoraModel) -> None:
        """Wait for the PeftModel that is about to take the tuner in; PEFT gives a tuner no other way to know it."""
        waiting = weakref.ref(tuner)

        def on_registration(parent: nn.Module, name: str, child: nn.Module) -> None:
            if isinstance(parent, PeftModel) and child is waiting():
                parent.print_trainable_parameters = cls(parent)
                handle.remove()

        handle = register_module_module_registration_hook(on_registration)
        # inject_adapter_in_model keeps the model and drops the tuner: nobody takes it in
        weakref.finalize(tuner, handle.remove)


def _holds_experts(module: nn.Module) -> bool:
    return isinstance(module, MoELoraLayer) or is_experts(module)


def _layout(module: nn.Module) -> ExpertsLayout:
    return module.layout if isinstance(module, MoELoraLayer) else read_layout(module)


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _names_of_adapters(module: nn.Module) -> set[str]:
    """The adapters that have a part of their own in this module."""
    if not isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
        return set()
    return {name for part in module.adapter_layer_names for name in getattr(module, part, ())}


def _matched(result) -> bool:
    """PEFT answers with a bool, a match, None, or an object that says the module is excluded."""
    return bool(result) and not isinstance(result, _ExcludedModule)
