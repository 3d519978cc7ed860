"""The LoRA of an adapter's ordinary layers: attention, routers, embeddings and others."""

import re
from collections.abc import Iterable

from ..files.tensor_file import AdapterError
from .model import LinearPair
from .source import Slot, Source

_LORA = re.compile(r"(?P<path>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?")


def read_linears(
    source: Source, keys: Iterable[str]
) -> tuple[dict[str, LinearPair], tuple[str, ...]]:
    """The LoRA of ordinary layers by path, and the keys of tensors that are not LoRA.

    Args:
        source: the adapter.
        keys: keys of the tensors that do not belong to experts.
    Raises:
        AdapterError: if a LoRA tensor does not fit the configuration or the base model.
    """
    found: dict[tuple[str, bool], dict[str, str]] = {}
    others = []
    for key in keys:
        match = _LORA.fullmatch(key)
        if match is None:
            others.append(key)
            continue
        sides = found.setdefault((match["path"], match["kind"] is not None), {})
        if match["side"] in sides:
            raise AdapterError(
                f"{source.file.path}: {source.names[key]} and {source.names[sides[match['side']]]} "
                "are the same tensor under two names; keep one of them."
            )
        sides[match["side"]] = key
    linears: dict[str, LinearPair] = {}
    for path, is_embedding in sorted(found, key=lambda name: natural(name[0])):
        if path in linears:
            raise AdapterError(
                f"{source.file.path} has lora_A of {path} and lora_embedding_A too; keep one of "
                "them."
            )
        linears[path] = _linear(source, path, found[path, is_embedding], is_embedding)
    return linears, tuple(others)


def natural(path: str) -> list[int | str]:
    """A key to sort paths with: layers.2 comes before layers.10."""
    parts: list[int | str] = []
    for part in re.split(r"(\d+)", path):
        if part.isdigit():
            parts.append(int(part))
        else:
            parts.append(part)
    return parts


def _linear(source: Source, path: str, sides: dict[str, str], is_embedding: bool) -> LinearPair:
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
    _check_shapes(source, path, slot, r, is_embedding)
    if source.base is None:
        # without a base model: a router was targeted as a parameter, or our own file lists it
        is_router = by_parameter or path in source.description.get("routers", ())
    else:
        is_router = path in source.base.routers
    return LinearPair(
        path, slot.A, slot.B, r, scaling, is_router=is_router, is_embedding=is_embedding
    )


def _is_targeted(source: Source, parameter: str) -> bool:
    """Whether target_parameters names a parameter, by its path or the end of it."""
    targets = source.config.get("target_parameters") or ()
    return any(f".{parameter}".endswith(f".{target}") for target in targets)


def _sizes(source: Source, path: str, is_embedding: bool) -> tuple[int, ...] | None:
    """(in, out) of a layer, from its weight in the file if that is there, or from the base model.

    The file holds the weight of an embedding whose vocabulary may have been resized.
    """
    whole = f"{path}.base_layer.weight"
    shape: tuple[int, ...] = ()
    if whole in source.names:
        shape = source.info(whole).shape
    if len(shape) == 2 and is_embedding:
        return shape
    if len(shape) == 2:
        return shape[::-1]
    if source.base is None:
        return None
    return source.base.linears.get(path)


def _check_shapes(source: Source, path: str, slot: Slot, r: int, is_embedding: bool) -> None:
    A = source.info(slot.A).shape
    B = source.info(slot.B).shape
    sizes = _sizes(source, path, is_embedding)
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
