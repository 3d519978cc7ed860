"""Adapters that are added after FSDP2 has sharded the model: every process holds them whole.

FSDP2 manages the parameters that it finds when it is called. A parameter that comes later becomes a
DTensor, `Replicate()` on the mesh of the base weights. While its layer runs, a plain tensor takes
its place. The gradient of this tensor is the mean over all processes, as FSDP2 gives it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from .gradients import Sum, local
from .sharding import is_sharded, whole


class Slot(NamedTuple):
    """The place of a parameter in a model: `owner` holds it under `name`."""

    owner: nn.Module
    name: str

    @property
    def value(self) -> torch.Tensor:
        """The parameter, or the plain tensor in its place."""
        return self.owner._parameters[self.name]  # type: ignore[return-value]  # never None

    def put(self, value: torch.Tensor) -> None:
        """Put a parameter, or a plain tensor, into this place."""
        # as torch.func.functional_call does, because a module refuses a tensor that is no parameter
        self.owner._parameters[self.name] = value  # type: ignore[assignment]


def replicate(model: nn.Module, adapter_name: str, mesh: Any) -> None:
    """Make an adapter's parameters the same in all processes, with the values of the first one.

    Every process must call this.

    Args:
        model: the model with the adapter.
        adapter_name: the adapter.
        mesh: of the processes that train it, each on batches of its own.
    Raises:
        ValueError: if PEFT has taken a shard of a linear layer for the whole.
    """
    _check_features(model)
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [Replicate()] * mesh.ndim
    # a parameter that two modules share stays one parameter
    replicas: dict[torch.Tensor, nn.Parameter] = {}
    for layer in _adapted(model):
        slots = list(_slots(layer, adapter_name))
        for slot in slots:
            old = slot.value
            if _is_replicated(old):
                continue
            if old not in replicas:
                placed = distribute_tensor(whole(old.detach()), mesh, placements)
                replicas[old] = nn.Parameter(placed, old.requires_grad)
            slot.put(replicas[old])
        if slots and _enter not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_enter)
            layer.register_forward_hook(_leave, always_call=True)


def _check_features(model: nn.Module) -> None:
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear):
            continue
        if (layer.in_features, layer.out_features) != (base.in_features, base.out_features):
            raise ValueError(
                f"PEFT takes a shard of {path} for the whole layer, because FSDP2 has sharded it "
                "over a mesh with names; call fully_shard without a mesh, or add the adapter first "
                "and then shard the model with fully_shard."
            )


def _adapted(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that hold parameters of adapters."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            yield module


def _slots(layer: Any, adapter_name: str | None = None) -> Iterator[Slot]:
    """The places of the parameters that a layer holds for an adapter; by default for all."""
    for part in layer.adapter_layer_names:
        held = getattr(layer, part, None)
        if held is None:
            continue
        if adapter_name is None:
            names = list(held.keys())
        else:
            names = [adapter_name] if adapter_name in held else []
        for name in names:
            if isinstance(held, nn.ParameterDict):
                yield Slot(held, name)
                continue
            for owner in held[name].modules():
                for key, parameter in owner._parameters.items():
                    if parameter is not None:
                        yield Slot(owner, key)


def _is_replicated(tensor: Any) -> bool:
    return is_sharded(tensor) and all(placement.is_replicate() for placement in tensor.placements)


def _enter(layer: nn.Module, args: Any) -> None:
    """Put plain tensors in place of a layer's parameters."""
    replaced = [(slot, slot.value) for slot in _slots(layer) if _is_replicated(slot.value)]
    dtypes = _dtypes_of_originals(layer)
    for slot, parameter in replaced:
        tensor = local(parameter, _mean(parameter))
        slot.put(tensor.to(dtypes.get(slot, tensor.dtype)))
    # a layer may be called within its own call
    layer.__dict__.setdefault("_replaced", []).append(replaced)


def _leave(layer: nn.Module, args: Any, out: Any) -> None:
    """Put the parameters back."""
    for slot, parameter in layer.__dict__["_replaced"].pop():
        slot.put(parameter)


def _dtypes_of_originals(layer: nn.Module) -> dict[Slot, torch.dtype]:
    """For copies of modules that are trained whole: the dtypes of the weights that they replace.

    During a forward, a MixedPrecisionPolicy of FSDP2 has cast these.
    """
    dtypes: dict[Slot, torch.dtype] = {}
    if not isinstance(layer, ModulesToSaveWrapper):
        return dtypes
    for copy in layer.modules_to_save.values():
        for module, original in zip(copy.modules(), layer.original_module.modules(), strict=True):
            for name, parameter in original.named_parameters(recurse=False):
                dtypes[Slot(module, name)] = parameter.dtype
    return dtypes


def _mean(parameter: Any) -> Sum:
    """How the gradient of a parameter becomes its mean over all processes that hold it."""
    mesh = parameter.device_mesh
    axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    return Sum(tuple(mesh.get_group(axis) for axis in axes), mesh.size())


def cast_up(model: nn.Module, adapter_name: str) -> None:
    """Cast DTensors of an adapter from dtypes of 16 bits or less to fp32.

    PEFT assigns to `.data`, which changes the dtype of a DTensor, but not of the tensor within.
    """
    for layer in _adapted(model):
        for slot in _slots(layer, adapter_name):
            old = slot.value
            if is_sharded(old) and old.is_floating_point() and old.itemsize < 4:
                slot.put(nn.Parameter(old.detach().float(), old.requires_grad))
