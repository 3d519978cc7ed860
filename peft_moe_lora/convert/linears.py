"""What an adapter holds besides its experts: LoRA of ordinary layers, and tensors saved whole."""

import re
from collections.abc import Iterable

from ..files.tensor_file import AdapterError
from .model import LinearPair
from .source import Slot, Source

_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?")
# PEFT also saves these whole if the vocabulary was resized
_SAVED_UNASKED = ("embed_tokens", "lm_head")


def read_linears(
    source: Source, keys: Iterable[str]
) -> tuple[dict[str, LinearPair], tuple[str, ...]]:
    """The LoRA of ordinary layers by path, and the keys of tensors that are saved whole.

    Args:
        source: the adapter.
        keys: keys of the tensors that do not belong to experts.
    Raises:
        AdapterError: if a tensor is neither of the two, or if it does not fit the configuration or
            the base model.
    """
    found: dict[str, dict[str, str]] = {}
    carried = []
    for key in keys:
        match = _LORA.fullmatch(key)
        if match is not None:
            found.setdefault(match["path"], {})[match["side"]] = key
        elif _is_saved_whole(source, key):
            carried.append(key)
        else:
            raise AdapterError(
                f"{source.file.path}: {source.names[key]} is neither a LoRA tensor nor saved whole "
                "by modules_to_save; such tensors cannot be converted. Remove it from the file."
            )
    linears = {path: _linear(source, path, found[path]) for path in sorted(found, key=natural)}
    return linears, tuple(carried)


def natural(path: str) -> list[int | str]:
    """A key to sort paths with: layers.2 comes before layers.10."""
    parts: list[int | str] = []
    for part in re.split(r"(\d+)", path):
        if part.isdigit():
            parts.append(int(part))
        else:
            parts.append(part)
    return parts


def _is_saved_whole(source: Source, key: str) -> bool:
    if ".lora_" in key:
        return False
    saved = (*(source.config.get("modules_to_save") or ()), *_SAVED_UNASKED)
    # as in PEFT, a name also matches longer names that end with it
    return key.endswith(".bias") or any(f"{name}." in key for name in saved)


def _linear(source: Source, path: str, sides: dict[str, str]) -> LinearPair:
    by_parameter = _is_targeted(source, f"{path}.weight")
    name = path
    if by_parameter:
        name = f"{path}.weight"
    r = source.rank(name)
    scaling = source.scaling(name)
    if len(sides) < 2:
        (key,) = sides.values()
        raise AdapterError(
            f"{source.file.path} has {key}, but lora_A and lora_B are both needed; the file is "
            "damaged or was filtered."
        )
    slot = Slot(sides["A"], sides["B"])
    _check_shapes(source, path, slot, r)
    if source.base is None:
        # without a base model: a router was targeted as a parameter, or our own file lists it
        is_router = by_parameter or path in source.description.get("routers", ())
    else:
        is_router = path in source.base.routers
    return LinearPair(path, slot.A, slot.B, r, scaling, is_router=is_router)


def _is_targeted(source: Source, parameter: str) -> bool:
    """Whether target_parameters names a parameter, by its path or the end of it."""
    targets = source.config.get("target_parameters") or ()
    return any(f".{parameter}".endswith(f".{target}") for target in targets)


def _check_shapes(source: Source, path: str, slot: Slot, r: int) -> None:
    A = source.info(slot.A).shape
    B = source.info(slot.B).shape
    sizes = None
    if source.base is not None:
        sizes = source.base.linears.get(path)
    K, N = sizes or ("K", "N")
    fits = len(A) == 2 and len(B) == 2 and A[0] == r and B[1] == r
    if not fits or (sizes is not None and (A[1], B[0]) != sizes):
        raise AdapterError(
            f"{source.file.path}: {path} has A {list(A)} and B {list(B)} instead of [{r}, {K}] "
            f"and [{N}, {r}]; the adapter is for another model, or its files do not belong "
            "together."
        )
    if source.base is not None and path not in source.base.modules:
        raise AdapterError(
            f"{source.file.path} adapts {path}, but {source.base.name} has no such module; name "
            "the base model that the adapter was trained on."
        )
