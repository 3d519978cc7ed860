"""A trained adapter minus its initial state, as one adapter of twice the rank.

    B' A' = [B, -B0] [A; A0] = B A - B0 A0

It is what `save_pretrained(path_initial_model_for_weight_conversion=)` writes. With experts the
ranks of one expert stay together, expert by expert. What has no A and B, such as modules that are
trained whole, is saved as it was trained.
"""

import copy
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..config import MoELoraConfig, Saving
from ..files.adapter_file import WEIGHTS_NAME, AdapterFile, Description
from ..files.scaling import tidy
from ..files.text import shown
from .saving import PEFT_PREFIX


def minus_initial(
    config: MoELoraConfig, folder: str | PathLike[str], trained: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors of B A - B0 A0; `config` gets their description for its next saving.

    Args:
        config: the configuration of the trained adapter; PEFT doubles its rank and lora_alpha.
        folder: the initial adapter, with the configuration of the trained one.
        trained: key in the file -> tensor, of the trained adapter.
    Returns: key in the file -> tensor. Of lora_A [r * S, K] and lora_B [N, r * S], expert-major,
        become [2r * S, K] and [N, 2r * S].
    Raises:
        ValueError: if the initial adapter is no file, or if it does not have the same A and B.
    """
    saved = MoELoraConfig.from_pretrained(folder)
    if saved._file is None:
        raise ValueError(
            f"path_initial_model_for_weight_conversion={str(folder)!r} holds no {WEIGHTS_NAME}; "
            "give the folder in which the adapter was saved before its training."
        )
    path = Path(saved._file.path)
    initial = load_file(path)
    tensors = {}
    for key, tensor in trained.items():
        module, is_adapted, rest = key.rpartition(".lora_")
        if not is_adapted:
            tensors[key] = tensor
            continue
        first = initial.get(key)
        if first is None or first.shape != tensor.shape:
            raise ValueError(
                f"{path} needs {shown(key)} of shape {tuple(tensor.shape)}, as the trained "
                "adapter has; give the folder in which this very adapter was saved before its "
                "training."
            )
        experts = _experts_in(saved._file, module)
        # the rest is "A.gate_up", "A.weight" or "embedding_A"
        is_A = rest.removeprefix("embedding_").startswith("A")
        join = _joined_A if is_A else _joined_B
        tensors[key] = join(tensor, first.to(tensor), experts)
    config._saving = _doubled(saved)
    return tensors


def _experts_in(file: AdapterFile, module: str) -> int:
    """The number of pairs that A and B of a module hold; 1 for a module that is no experts."""
    description = file.description.get("experts", {}).get(module.removeprefix(PEFT_PREFIX))
    if description is None:
        return 1
    return len(description.get("experts") or range(description["num_experts"]))


def _joined_A(A: torch.Tensor, A0: torch.Tensor, experts: int) -> torch.Tensor:
    pairs = [side.unflatten(0, (experts, -1)) for side in (A, A0)]
    # [S, r, K] twice -> [S, 2r, K] -> [S * 2r, K]
    return torch.cat(pairs, dim=1).flatten(0, 1)


def _joined_B(B: torch.Tensor, B0: torch.Tensor, experts: int) -> torch.Tensor:
    pairs = [side.unflatten(1, (experts, -1)) for side in (B, -B0)]
    # [N, S, r] twice -> [N, S, 2r] -> [N, S * 2r]
    return torch.cat(pairs, dim=2).flatten(1, 2)


def _doubled(saved: MoELoraConfig) -> Saving:
    """The description and the patterns of an adapter of twice the rank, with the same scaling."""
    assert saved._file is not None, "the caller has read it"
    factor = 2.0
    if saved.use_rslora:
        factor = 2**0.5
    patterns: dict[str, Any] = {
        "rank_pattern": {key: 2 * r for key, r in (saved.rank_pattern or {}).items()},
        "alpha_pattern": {
            key: tidy(factor * alpha) for key, alpha in (saved.alpha_pattern or {}).items()
        },
    }
    if saved.expert_indices is not None:
        patterns["expert_indices"] = saved.expert_indices
    if isinstance(saved.target_projections, dict):
        patterns["target_projections"] = saved.target_projections
    return Saving(_with_twice_the_rank(saved._file.description), patterns)


def _with_twice_the_rank(description: Description) -> Description:
    doubled = copy.deepcopy(description)
    for module in doubled.get("experts", {}).values():
        for projection in module.values():
            if isinstance(projection, dict):
                projection["r"] *= 2
    for layer in doubled.get("trained", {}).values():
        layer["r"] *= 2
    return doubled
