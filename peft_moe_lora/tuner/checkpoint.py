"""What an adapter's checkpoint must hold for a model, and what it says about itself."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..experts.layout import ExpertsLayout
from ..experts.routers import linear_features
from ..files.adapter_file import AdapterFile, described, described_module
from .config import MoELoraConfig
from .layer import MoELoraLayer
from .router import MoELoraRouter

PEFT_PREFIX = "base_model.model."


def describe(model: nn.Module, adapter_name: str) -> dict:
    """The metadata of an adapter file: format version, layout, E, r, K, N of every adapted projection, and routers."""
    modules, routers = {}, []
    for key, layer in adapted(model):
        if adapter_name in layer.lora_A and isinstance(layer, MoELoraRouter):
            routers.append(key)
        elif adapter_name in layer.lora_A:
            r = layer.r[adapter_name]
            modules[key] = described_module(
                layer.layout.num_experts, layer.experts[adapter_name]
            ) | {
                name: {
                    "r": r,
                    "in_features": A.shape[1],
                    "out_features": layer.lora_B[adapter_name][name].shape[0],
                }
                for name, A in layer.lora_A[adapter_name].items()
            }
    return described(modules, routers)


def adapted(model: nn.Module) -> Iterable[tuple[str, MoELoraLayer | MoELoraRouter]]:
    """(module path without wrappers' prefixes, layer) of every adapted experts module and router."""
    for key, module in model.named_modules():
        if isinstance(module, MoELoraLayer | MoELoraRouter):
            yield (
                key.replace("_fsdp_wrapped_module.", "")
                .replace("_orig_mod.", "")
                .removeprefix(PEFT_PREFIX),
                module,
            )


@dataclass(frozen=True)
class Targets:
    """What a configuration means for a model, by module path in the base model.

    Attributes:
        experts: experts modules -> their layout, rank, and the experts that have a pair (None: all).
        others: other targeted modules -> the base module and rank.
        saved: modules saved whole (modules_to_save) -> the base module.
        carried: modules whose weights a file may hold besides, as PEFT does for embeddings and biases.
    """

    experts: Mapping[str, tuple[ExpertsLayout, int, tuple[int, ...] | None]]
    others: Mapping[str, tuple[nn.Module, int]]
    saved: Mapping[str, nn.Module]
    carried: tuple[str, ...]

    def expected_shapes(self, config: MoELoraConfig) -> dict[str, tuple[int, ...]]:
        """File key -> shape, of all tensors whose shapes are known."""
        shapes = {}
        for key, (layout, r, chosen) in self.experts.items():
            ranks = r * (layout.num_experts if chosen is None else len(chosen))
            for name in config.projections_of(layout):
                projection = layout.projection(name)
                shapes[f"{key}.lora_A.{name}"] = (ranks, projection.in_features)
                shapes[f"{key}.lora_B.{name}"] = (projection.out_features, ranks)
        for key, (module, r) in self.others.items():
            if isinstance(module, nn.Embedding):
                shapes[f"{key}.lora_embedding_A"] = (r, module.num_embeddings)
                shapes[f"{key}.lora_embedding_B"] = (module.embedding_dim, r)
            elif (k_n := linear_features(module)) is not None:
                shapes[f"{key}.lora_A.weight"] = (r, k_n[0])
                shapes[f"{key}.lora_B.weight"] = (k_n[1], r)
        for key, module in self.saved.items():
            shapes |= {f"{key}.{name}": tuple(t.shape) for name, t in module.state_dict().items()}
        return {PEFT_PREFIX + key: shape for key, shape in shapes.items()}


def check_file(file: AdapterFile, targets: Targets, config: MoELoraConfig) -> None:
    """Hold an adapter file against a model, before the model is touched.

    Raises:
        ValueError: if a tensor is missing, unknown or wrongly shaped, or the adapter is for another number of experts
            or other ones.
    """
    for key, said in file.description.get("experts", {}).items():
        if key not in targets.experts:
            continue
        layout, _, chosen = targets.experts[key]
        if said.get("num_experts") != layout.num_experts:
            raise ValueError(
                f"{file.path} holds an adapter for {said.get('num_experts')} experts in {key}, the model has "
                f"{layout.num_experts} there; load the base model the adapter was trained on."
            )
        if said.get("experts") != (None if chosen is None else list(chosen)):
            raise ValueError(
                f"{file.path} holds {_listed(said.get('experts'))} in {key}, expert_indices says {_listed(chosen)}; "
                "the two files do not belong together: load it with the adapter_config.json it was saved with."
            )
    expected = targets.expected_shapes(config)
    # transformers may save without PEFT's prefix
    shapes = {
        PEFT_PREFIX + key.removeprefix(PEFT_PREFIX): shape for key, shape in file.shapes.items()
    }
    # layers PEFT wraps in ways of its own are left to PEFT
    known = {key.rpartition(".lora_")[0].removeprefix(PEFT_PREFIX) for key in expected}
    free = tuple(
        f"{PEFT_PREFIX}{key}." for key in (*targets.carried, *(set(targets.others) - known))
    )
    unknown = [key for key in shapes if key not in expected and not key.startswith(free)]
    found = {key: shape for key, shape in shapes.items() if key in expected}
    _raise_unless_whole(file.path, sorted(set(expected) - set(found)), unknown, found, expected)


def check_state_dict(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Hold a state dict (model keys, adapter name in place) against the adapted experts, before it is loaded.

    Raises:
        ValueError: if a tensor is missing, unknown, wrongly shaped or not finite.
    """
    expected, tensors = {}, {}
    for key, module in model.named_modules():
        if isinstance(module, MoELoraLayer):
            for side, pairs in (("lora_A", module.lora_A), ("lora_B", module.lora_B)):
                owned, named = f"{key}.{side}.{adapter_name}.", f"{key}.{side}."
                if adapter_name in pairs:
                    expected |= {
                        named + name: tuple(p.shape) for name, p in pairs[adapter_name].items()
                    }
                tensors |= {
                    named + k.removeprefix(owned): t
                    for k, t in state_dict.items()
                    if k.startswith(owned)
                }
    found = {k: tuple(t.shape) for k, t in tensors.items() if k in expected}
    unknown = sorted(set(tensors) - set(expected))
    _raise_unless_whole(
        "the adapter's state dict", sorted(set(expected) - set(found)), unknown, found, expected
    )
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"the adapter's state dict: tensor {key} holds NaN or infinity; load an earlier checkpoint."
            )


def _listed(experts) -> str:
    return "every expert" if experts is None else f"experts {list(experts)}"


def _raise_unless_whole(
    where: str, missing: list[str], unknown: list[str], found: Mapping, expected: Mapping
) -> None:
    wrong = [f"{k} is {found[k]}, not {expected[k]}" for k in found if found[k] != expected[k]]
    faults = (
        ("misses", missing),
        ("holds unknown tensors", unknown),
        ("holds tensors of another shape", wrong),
    )
    told = [f"{what}: {', '.join(some[:3])}{f' and {len(some) - 3} more' if some[3:] else ''}" for what, some in faults
            if some]  # fmt: skip
    if told:
        raise ValueError(
            f"{where} {'; '.join(told)}. It belongs to another model, rank or choice of targets, or is damaged; "
            "load the base model and configuration it was trained with."
        )
