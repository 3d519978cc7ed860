"""What a projection of an experts module is stored as: a dense tensor, or codes and scales, read from the module.

Nothing here is decoded: a quantized projection is described, and its experts are decoded where they are computed.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..ops.quantize import FORMATS, code_of, quantize_like
from ..ops.quantized import Codes4bit, Codes8bit, QuantizedWeight

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FP8 = torch.float8_e4m3fn


class UnsupportedExperts(ValueError):
    """A module that holds routed experts, but not in a form an adapter can ride on."""


class Decoding(nn.Module):
    """The parametrization that stands before a quantized projection: whoever reads it gets the dense stack.

    Adapted layers never read it so; they decode the experts they need from `weight`.

    Args:
        weight: what is stored. Its first tensor is the module's parameter, the others are buffers here, so that they
            move and are saved with the module.
    """

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        _, *others = weight.tensors()
        self.count = len(others)
        for i, tensor in enumerate(others):
            self.register_buffer(f"part{i}", tensor)
        self.facts = weight.with_tensors([torch.empty(0)] * (self.count + 1))

    def _apply(self, fn, recurse: bool = True):
        """Scales move, and stay what they are: a cast of the module changes the dtype that is decoded into."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            cast = self._buffers[name].dtype
            if cast != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
                self.facts = replace(self.facts, dtype=cast)
        return self

    def weight(self, codes: torch.Tensor) -> QuantizedWeight:
        """What is stored, with the module's parameter `codes`."""
        return self.facts.with_tensors(
            [codes, *(getattr(self, f"part{i}") for i in range(self.count))]
        )

    @torch.no_grad()
    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """The dense stack in the parameter's own order, decoded anew."""
        return self.weight(codes).dense()


def store(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Put a quantized weight in the place of a dense parameter, or of a quantized one of the same format."""
    codes = weight.tensors()[0]
    if parametrize.is_parametrized(module, name):
        listed = module.parametrizations[name]
        if isinstance(listed[0], Decoding):
            listed[0] = Decoding(weight).train(module.training)
        else:
            _into_bitsandbytes(listed[0].quant_state, weight)
        listed.original.data = codes.view(listed.original.shape)
        return
    module.register_parameter(name, nn.Parameter(codes, requires_grad=False))
    parametrize.register_parametrization(module, name, Decoding(weight), unsafe=True)


def unstore(module: nn.Module, name: str, dense: torch.Tensor) -> None:
    """Put a dense parameter in the place of a quantized one that is parametrized."""
    cls = type(module)
    # copies of a module share the class torch made for it, and torch takes the name from the class
    module.__class__ = type(
        cls.__name__, cls.__bases__, {k: v for k, v in vars(cls).items() if k != "__dict__"}
    )
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    module.register_parameter(name, nn.Parameter(dense, requires_grad=False))


def decoders(module: nn.Module) -> list[nn.Module]:
    """The modules that hold what a module's quantized projections are stored as."""
    return list(module.parametrizations.modules()) if parametrize.is_parametrized(module) else []


def is_stacked(module: nn.Module, name: str) -> bool:
    """Whether the module has a projection of that name with an expert in each row, dense or quantized."""
    if parametrize.is_parametrized(module, name):
        return True
    weight = getattr(module, name, None)
    return isinstance(weight, torch.Tensor) and weight.ndim == 3


def stored_weight(module: nn.Module, name: str) -> torch.Tensor | QuantizedWeight:
    """A projection as it is stored: [E, R, C], dense or quantized.

    Args:
        module: an experts module.
        name: of the projection's parameter.
    Raises:
        UnsupportedExperts: naming what is missing, if it is stored in a way that is not known.
    """
    if parametrize.is_parametrized(module, name):
        return _parametrized(module, name)
    weight = getattr(module, name)
    # what torch.compile sees of plain weights ends here
    if type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype in FLOATS:
        return weight
    if hasattr(module, f"{name}_scale_inv") and weight.dtype not in FLOATS:
        return _block_scaled(module, name, weight)
    if type(weight).__module__.startswith("torchao."):
        return _torchao(module, name, weight)
    if weight.dtype not in FLOATS:
        raise UnsupportedExperts(
            f"{type(module).__name__}.{name} is stored as {weight.dtype} without scales that are known; adapters need "
            "fp32, bf16 or fp16 experts, or ones quantized as the README lists: load the model dequantized, then "
            "quantize_experts(model)."
        )
    return weight


def _parametrized(module: nn.Module, name: str) -> torch.Tensor | QuantizedWeight:
    listed = module.parametrizations[name]
    first = listed[0]
    if len(listed) == 1 and isinstance(first, Decoding):
        return first.weight(listed.original.detach())
    # by name: bitsandbytes need not be installed
    if len(listed) == 1 and type(first).__name__ == "Bnb4bitParametrization":
        return _bitsandbytes(module, name, listed.original, first.quant_state)
    raise UnsupportedExperts(
        f"{type(module).__name__}.{name} is parametrized by {[type(p).__name__ for p in listed]}, which is not known "
        "here: remove the parametrization, or take the experts out of target_modules."
    )


def _bitsandbytes(module, name, packed: torch.Tensor, state) -> Codes4bit:
    if len(state.shape) != 3:
        raise UnsupportedExperts(
            f"{type(module).__name__}.{name} was quantized as {list(state.shape)}, not 3-D."
        )
    if state.absmax.device != packed.device:
        # bitsandbytes leaves them behind when a module moves
        state.to(packed.device)
    nested = {}
    if state.nested:
        nested = {
            "nested_code": state.state2.code,
            "nested_scales": state.state2.absmax,
            "nested_blocksize": state.state2.blocksize,
            "offset": state.offset,
        }
    packed = packed.detach().view(torch.uint8).view(-1)
    return Codes4bit(
        format=state.quant_type, stored_shape=tuple(state.shape), dtype=state.dtype, packed=packed, code=state.code,
        scales=state.absmax, blocksize=state.blocksize, **nested,
    )  # fmt: skip


def _into_bitsandbytes(state, weight: Codes4bit) -> None:
    state.absmax, state.offset = weight.scales, weight.offset
    if state.nested:
        state.state2.absmax, state.state2.code = weight.nested_scales, weight.nested_code


def _compute_dtype(module: nn.Module) -> torch.dtype:
    """What a module computes in whose weights do not say: its config's dtype, else bf16."""
    dtype = getattr(getattr(module, "config", None), "dtype", None)
    return dtype if dtype in FLOATS else torch.bfloat16


def _block_scaled(module: nn.Module, name: str, weight: torch.Tensor) -> QuantizedWeight:
    """transformers' FP8Experts: e4m3 with a scale per tile, or e2m1 packed in int8 with a scale per 32 of a row."""
    scales = getattr(module, f"{name}_scale_inv").detach()
    where = f"{type(module).__name__}.{name}"
    # the bits of a power of two are its exponent
    scales = scales.view(torch.uint8) if scales.dtype == torch.float8_e8m0fnu else scales
    if scales.dtype not in (torch.float32, torch.uint8):
        scales = scales.float()
    E, R, C = weight.shape
    common = {"dtype": _compute_dtype(module)}
    if weight.dtype == torch.int8:
        C = 2 * C
        if scales.shape != (E, R, C // 32):
            raise UnsupportedExperts(
                f"{where}: 4-bit codes need scales [E, R, C / 32], got {list(scales.shape)}."
            )
        return Codes4bit(
            format="mxfp4", stored_shape=(E, R, C), packed=weight.detach().view(torch.uint8).view(-1),
            code=code_of("mxfp4", weight.device), scales=scales.reshape(-1), blocksize=32, low_first=True, **common,
        )  # fmt: skip
    if weight.dtype != _FP8:
        raise UnsupportedExperts(
            f"{where} is stored as {weight.dtype}; 8-bit floats are read as {_FP8}."
        )
    tile = _tile((R, C), tuple(scales.shape[1:]), getattr(module, "block_size", None))
    if tile is None:
        raise UnsupportedExperts(
            f"{where} [{E}, {R}, {C}] has scales {list(scales.shape)}, which no block size of "
            f"{getattr(module, 'block_size', None)} explains; load the model dequantized."
        )
    return Codes8bit(
        format="fp8",
        stored_shape=(E, R, C),
        codes=weight.detach(),
        scales=scales.contiguous(),
        tile=tile,
        **common,
    )


def _tile(size: tuple[int, int], tiles: tuple[int, int], block_size) -> tuple[int, int] | None:
    """(rows, columns) that share a scale; None where the counts do not come out."""
    found = []
    for n, count, block in zip(size, tiles, block_size or (None, None), strict=True):
        if block is not None and -(-n // block) == count:
            found.append(block)
        elif n % count == 0:
            # a whole tensor's scale, or one for each half where gate and up were stacked
            found.append(n // count)
        else:
            return None
    return tuple(found)


def _torchao(module: nn.Module, name: str, weight: torch.Tensor) -> Codes8bit:
    where = f"{type(module).__name__}.{name}"
    codes, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    if type(weight).__name__ != "Float8Tensor" or codes.dtype != _FP8 or scale is None:
        raise UnsupportedExperts(
            f"{where} is torchao's {type(weight).__name__}; of torchao's formats only Float8Tensor of {_FP8} is read: "
            "load the model unquantized and quantize_experts(model)."
        )
    size = tuple(codes.shape)
    scale = scale.detach().float()
    tile = _tile(size[1:], tuple(scale.shape[1:]), None) if scale.ndim == 3 else None
    if tile is None or scale.shape[0] not in (1, size[0]):
        raise UnsupportedExperts(
            f"{where} {list(size)} has scales {list(scale.shape)}, which do not tile it."
        )
    return Codes8bit(
        format="fp8", stored_shape=size, dtype=weight.dtype, codes=codes.detach(),
        scales=scale.expand(size[0], -1, -1).contiguous(), tile=tile,
    )  # fmt: skip


def requantized(
    weight: QuantizedWeight, delta: Callable[[int], torch.Tensor]
) -> tuple[QuantizedWeight, float]:
    """W + delta in the format of W.

    Args:
        weight: [E, N, K], quantized.
        delta: expert -> [N, K] update, at least fp32.
    Returns: the sum, quantized, and by how much that differs from the exact sum: norm over the updates' norm.
    Raises:
        ValueError: if the format is only read here, or a sum is not finite.
    """
    if weight.format not in FORMATS:
        raise ValueError(
            f"merging into {weight.format} experts is not supported, as nothing here writes that format; load the "
            "base model unquantized, or merge into its unquantized checkpoint with merge_adapter."
        )
    dense, update, error = weight.dense(), 0.0, 0.0
    for e in range(dense.shape[0]):
        change = delta(e)
        dense[e] += change
        update += torch.linalg.vector_norm(change).item() ** 2
    merged = quantize_like(weight, dense)
    del dense
    for e in range(weight.shape[0]):
        error += torch.linalg.vector_norm(merged[e] - (weight[e] + delta(e))).item() ** 2
    return merged, (error / update) ** 0.5 if update else 0.0
