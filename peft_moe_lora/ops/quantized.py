"""W[e] = codes * scales: a frozen projection stored in 4 or 8 bits.

A quantized weight replaces a dense [E, N, K] tensor. It has the shape, dtype and device of that
tensor, `transpose` only sets a flag, and weight[e] is the dense [N, K] of expert e. It keeps no
dense copy. A code is the integer or 8-bit float that is stored for one value.

There is one class for each way of storing codes: `Codes4bit` (nf4, fp4, mxfp4) and `Codes8bit`
(int8, fp8). Each decodes itself in plain PyTorch; `kernels/dequantize.py` lists the Triton kernels.
`quantize` makes quantized weights.
"""

import ast
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Self

import torch
import torch.nn.functional as F

# 1 / 127, as bitsandbytes rounds it
INT8_UNIT = 7.874015718698502e-3


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """What all quantized weights share.

    Attributes:
        format: "nf4", "fp4", "mxfp4", "int8" or "fp8".
        stored_shape: (E, R, C), the shape in the order of the bytes.
        dtype: dtype of the decoded weight.
        transposed: False if an expert's [N, K] is the stored [R, C]; True if it is the transpose of
            the stored [R, C].
    """

    format: str
    stored_shape: tuple[int, int, int]
    dtype: torch.dtype
    transposed: bool = False

    requires_grad = False
    ndim = 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, N, K)."""
        E, R, C = self.stored_shape
        if self.transposed:
            return E, C, R
        return E, R, C

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.nbytes for t in self.tensors())

    def stride(self) -> tuple[int, int, int]:
        """The strides that the dense [E, N, K] would have."""
        _, R, C = self.stored_shape
        if self.transposed:
            return R * C, 1, C
        return R * C, C, 1

    def tensors(self) -> list[torch.Tensor]:
        """All tensors in field order; autograd saves them, and they move between devices."""
        values = [getattr(self, f.name) for f in fields(self)]
        return [value for value in values if isinstance(value, torch.Tensor)]

    def facts(self) -> tuple:
        """The class, and (name, value) of every field that is not a tensor; hashable.

        Two weights with equal facts, and with tensors of equal dtypes and shapes, run the same
        kernels.
        """
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return self.__class__, *(v for v in values if not isinstance(v[1], torch.Tensor))

    def with_tensors(self, tensors: Iterable[torch.Tensor]) -> Self:
        """A copy with other tensors, in the order of `tensors()`."""
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)]
        changes: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return replace(self, **changes)

    def settings(self) -> dict[str, Any]:
        """The arguments, except `format`, with which `quantize` stores a weight in the same way."""
        return {}

    def check_device(self, device: torch.device) -> None:
        """Check that all tensors are on a device; a kernel would read unrelated memory otherwise.

        Raises:
            ValueError: if a tensor of this weight is not on `device`.
        """
        places = {t.device for t in self.tensors()}
        if places != {device}:
            raise ValueError(
                f"hidden_states are on {device} and {self.format} weights on "
                f"{sorted(map(str, places))}; move the model to one device."
            )

    def transpose(self, dim0: int, dim1: int) -> Self:
        """The transposed weight [E, K, N], which shares the tensors."""
        assert {dim0 % 3, dim1 % 3} == {1, 2}, "only the last two dimensions can be swapped"
        return replace(self, transposed=not self.transposed)

    def detach(self) -> Self:
        """Itself: a quantized weight never requires a gradient."""
        return self

    def oriented(self, decoded: torch.Tensor) -> torch.Tensor:
        """View experts that were decoded in stored order, [count, R, C], as [count, N, K]."""
        if self.transposed:
            return decoded.transpose(1, 2)
        return decoded

    def __getitem__(self, expert: int) -> torch.Tensor:
        """Decode one expert to a new dense tensor [N, K]."""
        return self.oriented(self.decode(expert, 1))[0]

    def dense(self) -> torch.Tensor:
        """Decode all experts, one at a time, to a new dense tensor [E, N, K]."""
        out = torch.empty(self.stored_shape, dtype=self.dtype, device=self.device)
        for e in range(self.stored_shape[0]):
            out[e] = self.decode(e, 1)[0]
        return self.oriented(out)

    def decode(self, first: int, count: int) -> torch.Tensor:
        """Decode experts first up to first + count in plain PyTorch: [count, R, C] in `dtype`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Codes4bit(QuantizedWeight):
    """value = code[q] * scale of its block; blocks run over the flat stack and may cross experts.

    Scales are stored in one of three ways:
        as fp32;
        as uint8 exponents e, where scale = 2**(e - 127) (mxfp4);
        nested, as uint8 codes s, where scale = nested_code[s] * n + offset. n is the entry of
            nested_scales for the block of `nested_blocksize` scales.

    Attributes:
        packed: [E * R * C / 2, rounded up] uint8, two codes q per byte.
        code: [16] fp32, the value of each code.
        scales: [blocks] fp32 or uint8.
        blocksize: number of values in a block, a power of two.
        low_first: whether the low half of a byte is the first of its two codes.
        nested_code: [256] fp32; None if scales are not nested.
        nested_scales: [blocks / nested_blocksize, rounded up] fp32.
        offset: [] fp32.
        nested_blocksize: number of scales that share a nested scale.
    Source: bitsandbytes' 4-bit format (Dettmers et al. 2023, arXiv:2305.14314); OCP Microscaling
        Formats 1.0.
    """

    packed: torch.Tensor
    code: torch.Tensor
    scales: torch.Tensor
    blocksize: int
    low_first: bool = False
    nested_code: torch.Tensor | None = None
    nested_scales: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    nested_blocksize: int = 256

    @property
    def group(self) -> int:
        """Number of aligned values of one expert that share a scale: gcd(block, expert size)."""
        _, R, C = self.stored_shape
        return math.gcd(self.blocksize, R * C)

    def settings(self) -> dict[str, Any]:
        return {"blocksize": self.blocksize, "double_quant": self.nested_code is not None}

    def decode(self, first: int, count: int) -> torch.Tensor:
        _, R, C = self.stored_shape
        start = first * R * C
        n = count * R * C
        # a table [256, 2] with the two values of every byte
        byte = torch.arange(256, device=self.code.device)
        high = self.code[byte >> 4]
        low = self.code[byte & 15]
        pairs = torch.stack((high, low), -1)
        if self.low_first:
            pairs = pairs.flip(-1)
        values = F.embedding(self.packed[start // 2 : (start + n + 1) // 2].int(), pairs)
        values = values.view(-1)[start % 2 : start % 2 + n]
        blocks = torch.arange(start, start + n, self.group, device=values.device) // self.blocksize
        values = values.reshape(-1, self.group) * self._scales(blocks)[:, None]
        return values.to(self.dtype).view(count, R, C)

    def _scales(self, blocks: torch.Tensor) -> torch.Tensor:
        """The scales of these blocks in fp32."""
        stored = self.scales[blocks]
        if self.nested_code is not None:
            assert self.nested_scales is not None, "nested scales have scales of their own"
            assert self.offset is not None, "nested scales have an offset"
            nested = self.nested_scales[blocks // self.nested_blocksize]
            return self.nested_code[stored.int()] * nested + self.offset
        if stored.dtype == torch.uint8:
            return _power_of_2(stored)
        return stored


@dataclass(frozen=True, kw_only=True)
class Codes8bit(QuantizedWeight):
    """value = code * scale of its tile * unit.

    Attributes:
        codes: [E, R, C] int8 or float8_e4m3fn.
        scales: [E, tiles along R, tiles along C] fp32, or uint8 exponents e of 2**(e - 127).
        tile: (rows, columns) of the values that share a scale.
        unit: a constant factor; 1 / 127 for int8, 1 for float8.
    Source: bitsandbytes' row-wise int8 (Dettmers et al. 2022, arXiv:2208.07339); block scales of
        DeepSeek-V3, arXiv:2412.19437, section 3.3.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tile: tuple[int, int]
    unit: float = 1.0

    def decode(self, first: int, count: int) -> torch.Tensor:
        _, R, C = self.stored_shape
        scales = self.scales[first : first + count]
        if scales.dtype == torch.uint8:
            scales = _power_of_2(scales)
        scales = scales.repeat_interleave(min(self.tile[0], R), 1)[:, :R]
        scales = scales.repeat_interleave(min(self.tile[1], C), 2)[:, :, :C]
        values = self.codes[first : first + count].float() * scales
        if self.unit != 1.0:
            values *= self.unit
        return values.to(self.dtype)


_KINDS: dict[str, type[QuantizedWeight]] = {kind.__name__: kind for kind in (Codes4bit, Codes8bit)}
# stands for a tensor in a description
_TENSOR = "tensor"


def described(weight: QuantizedWeight) -> str:
    """The class and the fields of a weight as text, where each tensor is its name alone.

    An operator of torch.compile takes tensors, numbers and text.
    """
    words = [type(weight).__name__]
    for field in fields(weight):
        value = getattr(weight, field.name)
        if isinstance(value, torch.Tensor):
            value = _TENSOR
        if value is not None:
            words.append(f"{field.name}={value}")
    return ";".join(words)


def from_description(text: str, tensors: Sequence[torch.Tensor]) -> QuantizedWeight:
    """The weight that `described` has described, made of its tensors in field order."""
    kind, settings, names = _parsed(text)
    return kind(**settings | dict(zip(names, tensors, strict=True)))


@cache
def _parsed(text: str) -> tuple[type[QuantizedWeight], dict[str, Any], list[str]]:
    """The class of a description, its values that are no tensors, and the names of its tensors."""
    kind, *words = text.split(";")
    settings: dict[str, Any] = {}
    names = []
    for word in words:
        name, _, value = word.partition("=")
        if value == _TENSOR:
            names.append(name)
        elif name == "format":
            settings[name] = value
        elif name == "dtype":
            settings[name] = getattr(torch, value.removeprefix("torch."))
        else:
            settings[name] = ast.literal_eval(value)
    return _KINDS[kind], settings, names


def _power_of_2(exponents: torch.Tensor) -> torch.Tensor:
    """2**(e - 127) in fp32: the uint8 exponents e become the exponent bits of the result."""
    # e = 0 is 2**-127, the denormal with bits 1 << 22
    return (exponents.int() << 23).clamp(min=1 << 22).view(torch.float32)
