"""W[e] = codes * scales: a frozen projection stored in 4 or 8 bits, and its dense experts, one or all at a time.

A quantized weight stands where a dense [E, N, K] tensor stands: it has its shape, dtype and device, is transposed by a
flag and gives the dense [N, K] of expert e as weight[e]. It holds no dense copy and makes none that it keeps.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F

# 1 / 127, as bitsandbytes rounds it
INT8_UNIT = 7.874015718698502e-3


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """What all formats share.

    Attributes:
        format: "nf4", "fp4", "mxfp4", "int8" or "fp8".
        stored_shape: (E, R, C) of the stack in the order of its bytes.
        dtype: of the dense weight, in which it is computed with.
        transposed: whether an expert is the transpose of what is stored, so that [N, K] is [C, R].
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
        return (E, C, R) if self.transposed else (E, R, C)

    @property
    def device(self) -> torch.device:
        return self.tensors()[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        return sum(t.nbytes for t in self.tensors())

    def stride(self) -> tuple[int, int, int]:
        """Of the dense [E, N, K] that is not there."""
        _, R, C = self.stored_shape
        return (R * C, 1, C) if self.transposed else (R * C, C, 1)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors in field order: what autograd and devices know of."""
        return [
            value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)
        ]

    def facts(self) -> tuple:
        """Everything that is not a tensor, hashable: with the tensors' dtypes and shapes, the kind of this weight."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return self.__class__, *(v for v in values if not isinstance(v[1], torch.Tensor))

    def with_tensors(self, tensors) -> "QuantizedWeight":
        """The same with other tensors, in the order of `tensors`."""
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)]
        return replace(self, **dict(zip(names, tensors, strict=True)))

    def check_device(self, device: torch.device) -> None:
        """Codes on another device would be read as numbers they are not.

        Raises:
            ValueError: if part of what is stored is not on `device`.
        """
        places = {t.device for t in self.tensors()}
        if places != {device}:
            raise ValueError(
                f"hidden_states are on {device} and {self.format} weights on {sorted(map(str, places))}; "
                "move the model to one device."
            )

    def transpose(self, dim0: int, dim1: int) -> "QuantizedWeight":
        """[E, K, N]: nothing moves."""
        assert {dim0 % 3, dim1 % 3} == {1, 2}, "experts are transposed one by one"
        return replace(self, transposed=not self.transposed)

    def detach(self) -> "QuantizedWeight":
        """Itself: it asks for no gradient."""
        return self

    def oriented(self, decoded: torch.Tensor) -> torch.Tensor:
        """[E', N, K] view of experts decoded as they are stored, [E', R, C]."""
        return decoded.transpose(1, 2) if self.transposed else decoded

    def __getitem__(self, expert: int) -> torch.Tensor:
        """[N, K] dense, a new tensor."""
        return self.oriented(self.decode(expert, 1))[0]

    def dense(self) -> torch.Tensor:
        """[E, N, K] dense, a new tensor (a view where transposed); decoded expert by expert."""
        out = torch.empty(self.stored_shape, dtype=self.dtype, device=self.device)
        for e in range(self.stored_shape[0]):
            out[e] = self.decode(e, 1)[0]
        return self.oriented(out)

    def decode(self, first: int, count: int) -> torch.Tensor:
        """[count, R, C] dense experts first up to first + count, in plain PyTorch."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Codes4bit(QuantizedWeight):
    """value = code[q] * scale of its block; blocks run over the flat stack and may cross experts.

    Attributes:
        packed: [E * R * C / 2, rounded up] uint8, two codes a byte.
        code: [16] fp32.
        scales: [blocks] fp32; uint8 exponents e for 2**(e - 127) (mxfp4); uint8 codes of their own where nested.
        blocksize: values of a block, a power of two.
        low_first: whether the low half of a byte comes first.
        nested_code: [256] fp32; with it scale = nested_code[scales] * nested_scales of its block + offset.
        nested_scales: [blocks / nested_blocksize, rounded up] fp32.
        offset: [] fp32.
        nested_blocksize: scales of a block of scales.
    Source: bitsandbytes' 4-bit format (Dettmers et al. 2023, arXiv:2305.14314); OCP Microscaling Formats 1.0.
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
        """Values that share a block wherever an expert begins: the greatest common divisor of block and expert."""
        _, R, C = self.stored_shape
        return math.gcd(self.blocksize, R * C)

    def decode(self, first: int, count: int) -> torch.Tensor:
        _, R, C = self.stored_shape
        start, n = first * R * C, count * R * C
        # both values of a byte at once
        both = torch.arange(256, device=self.code.device)
        halves = (both & 15, both >> 4) if self.low_first else (both >> 4, both & 15)
        pairs = torch.stack([self.code[half] for half in halves], -1)
        values = F.embedding(self.packed[start // 2 : (start + n + 1) // 2].int(), pairs)
        values = values.view(-1)[start % 2 : start % 2 + n]
        blocks = torch.arange(start, start + n, self.group, device=values.device) // self.blocksize
        values = values.reshape(-1, self.group) * self._scales(blocks)[:, None]
        return values.to(self.dtype).view(count, R, C)

    def _scales(self, blocks: torch.Tensor) -> torch.Tensor:
        """fp32 scales of blocks."""
        stored = self.scales[blocks]
        if self.nested_code is not None:
            return (
                self.nested_code[stored.int()] * self.nested_scales[blocks // self.nested_blocksize]
                + self.offset
            )
        if stored.dtype == torch.uint8:
            # the exponent in an fp32's place; 2**-127 has no exponent there
            return (stored.int() << 23).clamp(min=1 << 22).view(torch.float32)
        return stored


@dataclass(frozen=True, kw_only=True)
class Codes8bit(QuantizedWeight):
    """value = code * scale of its tile (* unit).

    Attributes:
        codes: [E, R, C] int8, or float8 of e4m3.
        scales: [E, tiles of R, tiles of C] fp32, or uint8 exponents e for 2**(e - 127).
        tile: (rows, columns) that share a scale.
        unit: what an int8 code of scale 1 is worth; 1 for floats.
    Source: bitsandbytes' row-wise int8 (Dettmers et al. 2022, arXiv:2208.07339); block scales of DeepSeek-V3,
        arXiv:2412.19437, section 3.3.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tile: tuple[int, int]
    unit: float = 1.0

    def decode(self, first: int, count: int) -> torch.Tensor:
        _, R, C = self.stored_shape
        scales = self.scales[first : first + count]
        if scales.dtype == torch.uint8:
            scales = (scales.int() << 23).clamp(min=1 << 22).view(torch.float32)
        scales = scales.repeat_interleave(min(self.tile[0], R), 1)[:, :R]
        scales = scales.repeat_interleave(min(self.tile[1], C), 2)[:, :, :C]
        values = self.codes[first : first + count].float() * scales
        if self.unit != 1.0:
            values *= self.unit
        return values.to(self.dtype)
