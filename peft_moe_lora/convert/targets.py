"""The fields of an adapter_config.json that say which layers are adapted, and by what rank and scaling."""

import math
import re
from collections import defaultdict

from .model import Adapter, LinearPair, Pair, need_base, tidy

PARAMETERS = {"gate_up": ("gate_up_proj", "up_proj"), "down": ("down_proj",)}


def parameter_name(
    base, config: dict, path: str, projection: str, pairs: dict[str, Pair] | None = None
) -> str:
    """The name of the base's parameter: from the base, else from target_parameters, else from the sizes."""
    if projection == "down":
        return "down_proj"
    if base is not None and path in base.experts:
        return base.experts[path].gate_up.weight
    targets = {target.split(".")[-1] for target in config.get("target_parameters") or ()}
    if len(targets & set(PARAMETERS["gate_up"])) == 1:
        return (targets & set(PARAMETERS["gate_up"])).pop()
    if pairs is not None and "down" in pairs:
        return {1: "up_proj", 2: "gate_up_proj"}[
            pairs["gate_up"].out_features // pairs["down"].in_features
        ]
    if pairs is not None:
        need_base(
            base, "whether the parameter is called gate_up_proj or up_proj is the base's to say"
        )
    return "gate_up_proj"


def common_fields(adapter: Adapter, layers: dict[str, Pair | LinearPair]) -> dict:
    """LoraConfig's fields but the targets; the keys of `layers` are what patterns know the layers by."""
    config = adapter.config
    root = math.sqrt if config["use_rslora"] else float
    ranks = {path: layer.r for path, layer in layers.items()}
    r = config["r"]
    if ranks and r not in ranks.values():
        r = max(ranks.values(), key=list(ranks.values()).count)
    alphas = {path: tidy(layer.scaling * root(layer.r)) for path, layer in layers.items()}
    alpha = tidy(config["lora_alpha"])
    if alphas and alpha not in alphas.values():
        alpha = max(alphas.values(), key=list(alphas.values()).count)
    saved = sorted({key.rpartition(".")[0].rpartition(".")[2] for key in adapter.carried})
    return {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": bool(config["use_rslora"]),
        "rank_pattern": patterns(ranks, r),
        "alpha_pattern": patterns(alphas, alpha),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "task_type": config.get("task_type"),
        "bias": config.get("bias") or "none",
        "modules_to_save": config.get("modules_to_save") or (saved or None),
        "inference_mode": True,
    }


def patterns(values: dict[str, float], default: float) -> dict[str, float]:
    """rank_pattern or alpha_pattern: last names where all modules of that name agree, whole paths elsewhere."""
    found: dict[str, float] = {}
    named: dict[str, set] = defaultdict(set)
    for path, value in values.items():
        named[_last(path)].add(value)
    for path, value in values.items():
        if value != default:
            found[_last(path) if len(named[_last(path)]) == 1 else path] = value
    return found


def short_names(adapter: Adapter, paths) -> list[str]:
    """Targets by their last names where these mean just `paths`, by whole paths elsewhere."""
    paths = list(paths)
    if adapter.base is None:
        config = adapter.config
        restricted = any(config.get(name) for name in ("layers_to_transform", "exclude_modules"))
        targets = [*(config.get("target_modules") or ()), *(config.get("target_parameters") or ())]
        numbered = isinstance(config.get("target_modules"), str) or any(
            re.search(r"\.\d+\.", t) for t in targets
        )
        return sorted(paths) if restricted or numbered else sorted({_last(path) for path in paths})
    every = [
        *adapter.base.modules,
        *(f"{path}.weight" for path in adapter.base.bare),
        *(
            f"{path}.{weight}"
            for path, layout in adapter.base.experts.items()
            for projection in layout.projections.values()
            for weight in projection.weights
        ),
    ]
    meant: dict[str, int] = defaultdict(int)
    for path in every:
        meant[_last(path)] += 1
    here: dict[str, int] = defaultdict(int)
    for path in paths:
        here[_last(path)] += 1
    return sorted(
        {_last(path) if here[_last(path)] == meant[_last(path)] else path for path in paths}
    )


def _last(path: str) -> str:
    """The last name of a path; for a parameter its module's too."""
    head, _, last = path.rpartition(".")
    of_experts = last in ("gate_up_proj", "up_proj", "down_proj") and head.endswith("experts")
    return f"{head.rpartition('.')[2]}.{last}" if of_experts or last == "weight" else last
