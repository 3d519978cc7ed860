"""PEFT before 0.19.1: in- and out-features of experts' A and B are swapped, under today's keys.

The shapes show whether a file is swapped. If both ways fit, the version of PEFT that wrote the file
decides.
"""

import re
from collections.abc import Mapping

from ...files.tensor_file import AdapterError, RefusedError
from ...files.text import quoted
from ..source import Slot, Source

# the name of this format, which can be read but not written
LEGACY_NAME = "peft_legacy"
# the first version that does not swap
_FIRST_RIGHT = (0, 19, 1)
# this version swaps some projections and not others, so one projection says nothing about another
_MIXED = (0, 19, 0)

_Sizes = dict[str, tuple[int, int]]  # projection -> (in, out)


def swapped_projections(source: Source, path: str, slots: Mapping[str, Slot]) -> dict[str, bool]:
    """Whether in and out of an experts module's projections are swapped in the file.

    Args:
        source: the adapter.
        path: path of the experts module.
        slots: projection -> its keys.
    Returns: projection -> whether it is swapped.
    Raises:
        AdapterError: if a projection's shapes fit neither way.
        RefusedError: if neither the shapes nor the version decide.
    """
    sizes = {name: _in_and_out(source, slot) for name, slot in slots.items()}
    fits = _fits(source, path, sizes)
    if not all(fits.values()):
        whose = " (name the base model to be sure: --base-config)"
        if source.base is not None:
            whose = f" of {source.base.name}"
        raise AdapterError(
            f"{source.file.path}: {path} has A and B of {sizes} (in, out), which fit no experts "
            f"projection{whose}; the adapter is for another model, or damaged."
        )
    certain = {name: next(iter(fit)) for name, fit in fits.items() if len(fit) == 1}
    if len(certain) == len(fits):
        return certain
    version = str(source.config.get("peft_version") or "")
    release = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    ways = set(certain.values())
    if release != _MIXED and len(ways) == 1:
        return dict.fromkeys(fits, ways.pop())
    if release and release != _MIXED and not certain:
        return dict.fromkeys(fits, release < _FIRST_RIGHT)
    raise RefusedError(
        f"{source.file.path}: neither the shapes of {path}, {sizes} (in, out), nor "
        f"peft_version={quoted(version or None)} show whether PEFT swapped in and out, as it "
        "did before 0.19.1; write the PEFT version that saved the "
        "adapter into peft_version of its adapter_config.json, or name the base model "
        "(--base-config)."
    )


def _in_and_out(source: Source, slot: Slot) -> tuple[int, int]:
    return source.info(slot.A).shape[-1], source.info(slot.B).shape[0]


def _fits(source: Source, path: str, sizes: _Sizes) -> dict[str, set[bool]]:
    """Projection -> the ways in which its sizes fit: False for not swapped, True for swapped."""
    if source.base is None or path not in source.base.experts:
        return _fits_by_themselves(sizes)
    layout = source.base.experts[path]
    fits = {}
    for name, size in sizes.items():
        projection = layout.projection(name)
        right = (projection.in_features, projection.out_features)
        fits[name] = _ways(size == right, size == right[::-1])
        if layout.transposed:
            # stacks stored [E, K, N] were never swapped
            fits[name].discard(True)
    return fits


def _fits_by_themselves(sizes: _Sizes) -> dict[str, set[bool]]:
    """As `_fits` without a base model: gate_up [H -> I or 2I] and down [I -> H] must match."""
    if len(sizes) < 2:
        return {name: {False, True} for name in sizes}
    K, N = sizes["gate_up"]
    width, H = sizes["down"]
    right = K == H and N in (width, 2 * width)
    swapped = N == width and K in (H, 2 * H)
    return {name: _ways(right, swapped) for name in sizes}


def _ways(right: bool, swapped: bool) -> set[bool]:
    ways = set()
    if right:
        ways.add(False)
    if swapped:
        ways.add(True)
    return ways
