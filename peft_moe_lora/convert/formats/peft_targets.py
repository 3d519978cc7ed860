"""Linear layers whose LoRA PEFT drops on loading, because it takes their names for experts'.

In families whose checkpoints on the hub hold one tensor for each expert, PEFT replaces the targets
gate_proj, up_proj and down_proj by the experts' parameters. Dense layers and shared experts have
these names too. Their LoRA is then in the file, but PEFT adds no layer for it.
"""

from collections.abc import Iterable, Mapping

from ..base import BaseModel, need_base
from ..model import Adapter

_Names = Mapping[str, Mapping[str, str]]

# the part of a card on loading, for a file of which PEFT drops something
NOT_WITH_PEFT = (
    "PEFT does not load all of this file, as said above; `peft-moe-lora convert ADAPTER OUT "
    "--to moe_lora` makes one that PEFT loads with this package.",
)


def drops(adapter: Adapter) -> str | None:
    """What PEFT drops of an adapter, as the beginning of a sentence; None if it is nothing.

    Raises:
        RefusedError: if that depends on the base model, which is not known.
    """
    layers = [path for path, layer in adapter.linears.items() if not layer.is_router]
    dropped = _dropped_by_peft(adapter.base, layers)
    if dropped is None:
        return None
    return (
        f"PEFT takes the name of {dropped} for a projection of the experts and drops its LoRA "
        "without a word"
    )


def _dropped_by_peft(base: BaseModel | None, paths: Iterable[str]) -> str | None:
    """The first linear layer whose LoRA PEFT drops; None if it loads all of them.

    Args:
        base: the base model.
        paths: paths of the linear layers with LoRA, without routers.
    Raises:
        RefusedError: if that depends on the base model, which is not known.
    """
    families, replaced = _replaced_names()
    for path in paths:
        name = path.rpartition(".")[2]
        if not any(name in names for names in replaced.values()):
            continue
        known = need_base(
            base, f"PEFT takes {name} for a name of experts in some families, and drops {path}"
        )
        if name in replaced.get(families.get(known.model_type, ""), ()):
            return path
    return None


def _replaced_names() -> tuple[Mapping[str, str], _Names]:
    """PEFT's tables: model_type -> kind of family, and kind -> the names that it replaces."""
    try:
        from peft.utils.transformers_weight_conversion import (
            _MODEL_TO_CONVERSION_PATTERN,
            _MOE_TARGET_MODULE_MAPPING,
        )
    except ImportError:
        # releases of PEFT without these tables replace no names
        return {}, {}
    return _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
