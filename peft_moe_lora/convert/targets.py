"""The fields of adapter_config.json: which layers are adapted, and their ranks and scalings."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..experts.families import STACKS
from ..files.patterns import by_layer
from ..files.scaling import alpha_of, tidy
from .base import BaseModel
from .model import Adapter, LinearPair, Pair

_Number = TypeVar("_Number", int, float)


def common_fields(adapter: Adapter, layers: Mapping[str, Pair | LinearPair]) -> dict[str, Any]:
    """LoraConfig's fields except for the targets.

    Args:
        adapter: the adapter to write.
        layers: name -> adapted layer; rank_pattern and alpha_pattern use these names.
    """
    config = adapter.config
    use_rslora = bool(config["use_rslora"])
    ranks = {path: layer.r for path, layer in layers.items()}
    alphas = {path: alpha_of(layer.scaling, layer.r, use_rslora) for path, layer in layers.items()}
    r = _default(config["r"], list(ranks.values()))
    alpha = _default(tidy(config["lora_alpha"]), list(alphas.values()))
    bias = "none"
    if any(name.endswith(".bias") for name in adapter.saved):
        bias = config.get("bias") or "none"
    modules_to_save = None
    if adapter.saved:
        modules_to_save = config.get("modules_to_save")
    return {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": use_rslora,
        "rank_pattern": by_layer(ranks, r, _last),
        "alpha_pattern": by_layer(alphas, alpha, _last),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "task_type": config.get("task_type"),
        "bias": bias,
        "modules_to_save": modules_to_save,
        "trainable_token_indices": config.get("trainable_token_indices"),
        "ensure_weight_tying": bool(config.get("ensure_weight_tying")),
        "inference_mode": True,
    }


def _default(configured: _Number, values: list[_Number]) -> _Number:
    """The configured value if some layer has it, else the most frequent value of the layers."""
    if configured in values or not values:
        return configured
    return max(values, key=values.count)


def short_names(adapter: Adapter, paths: Iterable[str]) -> list[str]:
    """Sorted targets that match `paths` only: last names if these are enough, else whole paths."""
    paths = list(paths)
    if adapter.base is None:
        if _names_all_of_a_kind(adapter.config):
            return sorted({_last(path) for path in paths})
        return sorted(paths)
    meant = Counter(_last(path) for path in _everything(adapter.base))
    here = Counter(_last(path) for path in paths)
    whole = {path for path in paths if here[_last(path)] != meant[_last(path)]}
    short = {_last(path) for path in paths if path not in whole}
    return sorted(whole | short)


def _names_all_of_a_kind(config: Mapping[str, Any]) -> bool:
    """Whether every target of a config is a name that all layers of this name share."""
    if config.get("layers_to_transform") or config.get("exclude_modules"):
        return False
    if isinstance(config.get("target_modules"), str):
        return False
    targets = [*(config.get("target_modules") or ()), *(config.get("target_parameters") or ())]
    return not any(re.search(r"\.\d+\.", target) for target in targets)


def _everything(base: BaseModel) -> list[str]:
    """All paths that a target can match: modules, routers' weights, the experts' parameters."""
    return [
        *base.modules,
        *(f"{path}.weight" for path in base.routers),
        *(
            f"{path}.{weight}"
            for path, layout in base.experts.items()
            for projection in layout.projections.values()
            for weight in projection.weights
        ),
    ]


def _last(path: str) -> str:
    """The last name of a path; the last two names if it is the path of a parameter."""
    head, _, last = path.rpartition(".")
    if last == "weight" or (last in STACKS and f".{head}".endswith(".experts")):
        return f"{head.rpartition('.')[2]}.{last}"
    return last
