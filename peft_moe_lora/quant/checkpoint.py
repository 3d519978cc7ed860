"""Checks the headers of a checkpoint before a tensor is read: is every expert there, exactly once?

The loader stacks whatever tensors it finds, in the order of their numbers. Without this check a
missing expert shifts all later ones, and a missing bias is initialized at random.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
)
from transformers.modeling_utils import load_state_dict
from transformers.quantizers.quantizers_utils import get_module_from_name

from ..experts.families import FAMILIES, STACKS
from ..experts.layout import is_experts
from ..experts.stored import FLOATS

REMEDY = "Download or save the checkpoint again, with its config."
# how the loader writes an expert's number in its patterns
_NUMBER = "*."


class Found(dict[str | None, list[tuple[str, torch.Tensor]]]):
    """The tensors of a checkpoint that become one parameter of the model.

    Keys are the loader's patterns, None for a tensor that is only renamed. Values are pairs: the
    tensor's name, as the patterns see it, and the tensor on the meta device.
    """


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module holds experts as stacks that can be quantized."""
    return is_experts(module) and type(module).__name__ not in FAMILIES


def is_stack(model: nn.Module, name: str) -> bool:
    """Whether a model's parameter is a stack of experts that can be quantized."""
    module, last = get_module_from_name(model, name)
    return last in STACKS and is_quantizable(module)


def check_stack(name: str, parameter: torch.Tensor, stack: torch.Tensor) -> None:
    """Raise if a stack is not what the configuration says, or if a value is not finite.

    Args:
        name: the parameter's full name.
        parameter: the parameter that the configuration gives, maybe on the meta device.
        stack: the tensor that takes its place.
    Raises:
        ValueError: if it has another shape, or if an expert holds NaN or infinity.
    """
    if stack.shape != parameter.shape:
        raise ValueError(
            f"{name} must be {list(parameter.shape)} by the configuration, but the checkpoint "
            f"holds {list(stack.shape)}. {REMEDY}"
        )
    bad = experts_not_finite(stack)
    if bad:
        raise ValueError(
            f"{name} {list(stack.shape)} must be finite, but the experts {first_of(bad)} hold NaN "
            f"or infinity in {stack.dtype}. {REMEDY} If the file's values are larger than this "
            "dtype holds, load it in bfloat16 or float32."
        )


def experts_not_finite(stack: torch.Tensor) -> list[int]:
    """The experts of a stack [E, R, C] that hold NaN or infinity."""
    # one expert after the other, so that no mask as large as the stack is allocated
    finite = torch.stack([torch.isfinite(expert).all() for expert in stack])
    return torch.nonzero(~finite).flatten().tolist()


def check_checkpoint(
    model: PreTrainedModel, files: Sequence[str], conversions: Sequence[WeightTransform]
) -> None:
    """Raise if a checkpoint does not hold every expert of a model exactly once.

    Args:
        model: the model on the meta device, built from the configuration.
        files: the checkpoint's files; only names, dtypes and shapes are read.
        conversions: the loader's conversions from names in the files to parameters.
    Raises:
        ValueError: if a parameter of an experts module is missing or there twice, if an expert is
            missing, there twice or not in the configuration, if its shape differs from that of
            the others, or if its dtype is not a floating one.
    """
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    expected = {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if is_quantizable(module)
        for name, parameter in module.named_parameters(recurse=False)
    }
    reached: set[str] = set()
    for name, found in _found(model, files, conversions).items():
        # several patterns may name the same parameters, and their order is kept
        names = {name: None}
        for pattern in found:
            if pattern is not None:
                targets = of_pattern[pattern].target_patterns
                names |= {name.replace(targets[0], target): None for target in targets}
        reached.update(names)
        stacks = [expected[n] for n in names if n in expected]
        if stacks:
            _check_found(name, stacks, found, of_pattern)
    missing = sorted(expected.keys() - reached)
    if missing:
        shapes = ", ".join(f"{name} {list(expected[name].shape)}" for name in missing[:4])
        if len(missing) > 4:
            shapes += f" and {len(missing) - 4} more"
        raise ValueError(
            f"the checkpoint does not hold {len(missing)} of {len(expected)} parameters of the "
            f"experts: {shapes}. {REMEDY}"
        )


def _found(
    model: PreTrainedModel, files: Sequence[str], conversions: Sequence[WeightTransform]
) -> dict[str, Found]:
    """Parameter name -> the tensors that become it; the names are chosen as the loader does."""
    parameters = model.state_dict()
    prefix = model.base_model_prefix
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    found: dict[str, Found] = defaultdict(Found)
    for file in files:
        for key, tensor in load_state_dict(file, map_location="meta").items():
            name, pattern = rename_source_key(key, renamings, converters, prefix, parameters)
            if name not in parameters and key in parameters:
                name, pattern = rename_source_key(key, [], [], prefix, parameters)
            if name not in parameters:
                continue
            seen = key
            if pattern is not None:
                # the name as it is before the pattern replaces a part of it
                seen, _ = rename_source_key(key, renamings, [])
            found[name].setdefault(pattern, []).append((seen, tensor))
    return found


def _check_found(
    name: str, stacks: list[nn.Parameter], found: Found, of_pattern: dict[str, WeightConverter]
) -> None:
    """Raise if the tensors `found` do not make up the parameter `name`.

    Args:
        stacks: the parameters made from these tensors, `name` first.
        of_pattern: a pattern -> its conversion.
    """
    where = f"{name} {list(stacks[0].shape)}"
    # the loader merges all patterns of the first conversion it meets
    needed: set[str | None] = {None}
    for pattern in found:
        if pattern is not None:
            needed = set(of_pattern[pattern].source_patterns)
            break
    if found.keys() != needed:
        raise ValueError(
            f"{where} is made of the tensors {_patterns(needed, name)}, but the checkpoint holds "
            f"{_patterns(found.keys(), name)}. {REMEDY}"
        )
    for pattern, tensors in found.items():
        if pattern is None or _NUMBER not in pattern:
            if len(tensors) > 1:
                raise ValueError(
                    f"{where} must be in the checkpoint once, but it is there {len(tensors)} "
                    f"times: {[seen for seen, _ in tensors]}. {REMEDY}"
                )
        else:
            _check_numbers(where, pattern, sum(stack.shape[0] for stack in stacks), tensors)
            if len(stacks) == 1:
                _check_shapes(where, tensors)
        for seen, tensor in tensors:
            # packed blocks have operations of their own, and are checked there
            if tensor.dtype not in FLOATS and not seen.endswith(("_blocks", "_scales")):
                raise ValueError(
                    f"{where} needs tensors of a dtype of {[str(d) for d in FLOATS]}, but {seen} "
                    f"is {tensor.dtype}. {REMEDY}"
                )


def _patterns(patterns: Iterable[str | None], name: str) -> list[str]:
    """The patterns in messages; None is the parameter itself, as one tensor."""
    return sorted(pattern or name for pattern in patterns)


def _check_numbers(
    where: str, pattern: str, E: int, tensors: list[tuple[str, torch.Tensor]]
) -> None:
    """Raise if the tensors of one pattern are not those of the experts 0 to E - 1."""
    # the loader's own expression, with the expert's number in a group
    number = re.compile(pattern.replace(_NUMBER, r"(\d+)\."))
    numbers: Counter[int] = Counter()
    for seen, _ in tensors:
        match = number.search(seen)
        if match is None:
            raise ValueError(f"{where}: {seen} names no expert by its number. {REMEDY}")
        numbers[int(match[1])] += 1
    wrong = {
        "it lacks": [e for e in range(E) if not numbers[e]],
        "twice there are": [e for e, count in sorted(numbers.items()) if count > 1],
        "the configuration has no": [e for e in sorted(numbers) if e >= E],
    }
    said = [f"{what} {first_of(experts)}" for what, experts in wrong.items() if experts]
    if said:
        raise ValueError(
            f"{where} needs {pattern} of the experts 0 to {E - 1}, each exactly once, but the "
            f"checkpoint has {len(tensors)}: {'; '.join(said)}. {REMEDY}"
        )


def _check_shapes(where: str, tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Raise if the tensors of one pattern do not all have the same shape."""
    shapes = Counter(tuple(tensor.shape) for _, tensor in tensors)
    ((usual, _),) = shapes.most_common(1)
    for seen, tensor in tensors:
        if tuple(tensor.shape) != usual:
            raise ValueError(
                f"{where}: {seen} is {list(tensor.shape)}, but the tensors of the other experts "
                f"are {list(usual)}. {REMEDY}"
            )


def first_of(experts: list[int]) -> str:
    """The first numbers of a list."""
    more = ""
    if len(experts) > 8:
        more = f" and {len(experts) - 8} more"
    return f"{experts[:8]}{more}"
