"""What an adapter's checkpoint must hold for a model, and what it says about itself."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from .adapter_file import FORMAT_VERSION, LAYOUT, AdapterFile
from .config import MoELoraConfig
from .layer import MoELoraLayer
from .layout import ExpertsLayout

PEFT_PREFIX = "base_model.model."


def describe(model: nn.Module, adapter_name: str) -> dict:
    """The metadata of an adapter file: format version, layout, and E, r, K, N of every adapted projection."""
    modules = {}
    for key, layer in adapted_experts(model):
        if adapter_name in layer.lora_A:
            r = layer.r[adapter_name]
            modules[key] = {"num_experts": layer.layout.num_experts} | {
                name: {"r": r, "in_features": A.shape[1], "out_features": layer.lora_B[adapter_name][name].shape[0]}
                for name, A in layer.lora_A[adapter_name].items()
            }
    return {"format_version": FORMAT_VERSION, "layout": LAYOUT, "experts": modules}


def adapted_experts(model: nn.Module) -> Iterable[tuple[str, MoELoraLayer]]:
    """(module path without wrappers' prefixes, layer) of every adapted experts module."""
    for key, module in model.named_modules():
        if isinstance(module, MoELoraLayer):
            yield key.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "").removeprefix(PEFT_PREFIX), module


def expected_shapes(layout: ExpertsLayout, key: str, r: int, config: MoELoraConfig) -> dict[str, tuple[int, ...]]:
    """File key -> shape of one experts module's adapter; `key` is the module's path in the base model."""
    shapes = {}
    for name in config.target_projections:
        projection = layout.projection(name)
        shapes[f"{PEFT_PREFIX}{key}.lora_A.{name}"] = (r * layout.num_experts, projection.in_features)
        shapes[f"{PEFT_PREFIX}{key}.lora_B.{name}"] = (projection.out_features, r * layout.num_experts)
    return shapes


def check_file(file: AdapterFile, layouts: Mapping[str, tuple[ExpertsLayout, int]], others: Iterable[str],
               config: MoELoraConfig) -> None:  # fmt: skip
    """Hold an adapter file against a model, before the model is touched.

    Args:
        file: the adapter file read beside the configuration.
        layouts: path of each targeted experts module -> its layout and rank.
        others: paths of the other targeted modules.
        config: the adapter's configuration.
    Raises:
        ValueError: if a tensor is missing, unknown or wrongly shaped, or the adapter is for another number of experts.
    """
    for key, described in file.description.get("experts", {}).items():
        if key in layouts and described.get("num_experts") != layouts[key][0].num_experts:
            raise ValueError(
                f"{file.path} holds an adapter for {described.get('num_experts')} experts in {key}, the model has "
                f"{layouts[key][0].num_experts} there; load the base model the adapter was trained on."
            )
    expected = {}
    for key, (layout, r) in layouts.items():
        expected |= expected_shapes(layout, key, r, config)
    carried = tuple(f"{PEFT_PREFIX}{key}." for key in others)
    extra = config.modules_to_save or config.trainable_token_indices or config.bias != "none"
    unknown = [k for k in file.shapes if k not in expected and not k.startswith(carried) and not extra]
    found = {k: shape for k, shape in file.shapes.items() if k in expected}
    present = {key for key in others for k in file.shapes if k.startswith(f"{PEFT_PREFIX}{key}.lora_")}
    missing = sorted(set(expected) - set(found)) + [f"{PEFT_PREFIX}{k}.lora_*" for k in others if k not in present]
    _raise_unless_whole(file.path, missing, unknown, found, expected)


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Hold a state dict (model keys, adapter name in place) against the adapted experts, before it is loaded.

    Raises:
        ValueError: if a tensor is missing, unknown, wrongly shaped or not finite.
    """
    expected, owned = {}, []
    for key, module in model.named_modules():
        if isinstance(module, MoELoraLayer):
            owned += [f"{key}.lora_A.", f"{key}.lora_B."]
            for side, pairs in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
                if adapter_name in pairs:
                    named = pairs[adapter_name].items()
                    expected |= {f"{key}.{side}.{adapter_name}.{name}": tuple(p.shape) for name, p in named}
    found = {k: tuple(t.shape) for k, t in state_dict.items() if k in expected}
    unknown = [k for k in state_dict if k not in expected and k.startswith(tuple(owned))]
    _raise_unless_whole("the adapter's state dict", sorted(set(expected) - set(found)), unknown, found, expected)
    for key in found:
        if not torch.isfinite(state_dict[key]).all():
            raise ValueError(
                f"the adapter's state dict: tensor {key} holds NaN or infinity; load an earlier checkpoint."
            )


def _raise_unless_whole(where: str, missing: list[str], unknown: list[str], found: Mapping, expected: Mapping) -> None:
    wrong = [f"{k} is {found[k]}, not {expected[k]}" for k in found if found[k] != expected[k]]
    faults = (("misses", missing), ("holds unknown tensors", unknown), ("holds tensors of another shape", wrong))
    told = [f"{what}: {', '.join(some[:3])}{f' and {len(some) - 3} more' if some[3:] else ''}" for what, some in faults
            if some]  # fmt: skip
    if told:
        raise ValueError(
            f"{where} {'; '.join(told)}. It belongs to another model, rank or choice of targets, or is damaged; "
            "load the base model and configuration it was trained with."
        )
