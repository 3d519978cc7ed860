"""Safetensors one tensor at a time: a header, then bytes in the order of the header; nothing is held in memory.

Reads go through the file, not through a memory map, so that what was read once does not stay resident.
"""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[int, int], None]


class AdapterError(ValueError):
    """An adapter or checkpoint that cannot be used: damaged, unknown, or made for another model."""


class RefusedError(AdapterError):
    """A whole adapter that the reader it is meant for would refuse, or misread, or that can be read in two ways."""


class ExistsError(AdapterError):
    """The destination exists and may not be overwritten."""


@dataclass(frozen=True)
class TensorInfo:
    """dtype and shape of a tensor, and the offset of its first byte in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A checked safetensors file, opened for every read and closed again.

    Args:
        path: the file.
    Attributes:
        tensors: name -> TensorInfo, in the order of their bytes.
        metadata: the header's strings.
    Raises:
        AdapterError: if it is cut short, of another format, or holds a dtype that is not known.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            with safe_open(
                self.path, framework="pt"
            ):  # its checks: a whole header, sane and gapless offsets
                pass
            with self.path.open("rb") as f:
                start = 8 + (length := int.from_bytes(f.read(8), "little"))
                header = json.loads(f.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterError(
                f"{path} is not a whole safetensors file ({error}); it was cut short or is of another format. "
                "Copy or save it again."
            ) from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        unknown = [
            f"{name} is {h['dtype']}" for name, h in header.items() if h["dtype"] not in DTYPES
        ]
        if unknown:
            raise AdapterError(
                f"{path}: {unknown[0]}; known are {', '.join(DTYPES)}. Dequantize it first."
            )
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        self.tensors = {
            name: TensorInfo(DTYPES[h["dtype"]], tuple(h["shape"]), start + h["data_offsets"][0])
            for name, h in ordered
        }

    def load(
        self, name: str, row: int | None = None, check: bool = True, view: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """A tensor, or one row (index along its first dimension) of it; with `check`, only if it is finite.

        Args:
            name: of the tensor.
            row: which row; None for all.
            check: refuse what is not finite.
            view: another shape of as many elements to see it in; its own by default.
        Raises:
            AdapterError: if a value is NaN or infinite.
        """
        info = self.tensors[name]
        shape, offset = view or info.shape, info.offset
        if row is not None:
            shape = shape[1:]
            offset += row * math.prod(shape) * info.dtype.itemsize
        tensor = torch.empty(shape, dtype=info.dtype)
        if tensor.numel():
            with self.path.open("rb") as f:
                f.seek(offset)
                f.readinto(_bytes(tensor))
        if check and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{self.path}: tensor {name} holds NaN or infinity; the training run that wrote it diverged or the "
                "file is damaged. Take an earlier checkpoint."
            )
        return tensor


@dataclass(frozen=True)
class Block:
    """Tensors of one dtype that are made together when their turn comes.

    Attributes:
        shapes: name -> shape.
        dtype: of all of them.
        make: yields their values in the order of `shapes`; a large tensor may come in pieces, in order.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    make: Callable[[], Iterable[torch.Tensor]]


def write_tensors(
    path, blocks: Iterable[Block], metadata: dict[str, str], progress: Progress | None = None
) -> None:
    """Write a safetensors file block by block; only one block's tensors are in memory at a time.

    Args:
        path: the file, in a folder that is put in place afterwards (see `new_folder`).
        blocks: what to write.
        metadata: strings for the header.
        progress: called with (blocks written, blocks in all).
    """
    # widest dtype first, so that every tensor is aligned to its own size
    blocks = sorted(blocks, key=lambda block: -block.dtype.itemsize)
    header, offset = {"__metadata__": metadata}, 0
    for block in blocks:
        for name, shape in block.shapes.items():
            nbytes = TensorInfo(block.dtype, shape).nbytes
            assert name not in header, f"{name} would be written twice"
            header[name] = {
                "dtype": _NAMES[block.dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + nbytes],
            }
            offset += nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the first tensor to 8 bytes
    with open(path, "wb") as f:
        f.write(len(encoded).to_bytes(8, "little") + encoded)
        for done, block in enumerate(blocks, 1):
            end = f.tell() + sum(
                TensorInfo(block.dtype, shape).nbytes for shape in block.shapes.values()
            )
            for tensor in block.make():
                assert tensor.dtype == block.dtype, (
                    f"{block.shapes}: {tensor.dtype} instead of {block.dtype}"
                )
                if tensor.numel():
                    f.write(_bytes(tensor.contiguous()))
            assert f.tell() == end, (
                f"{list(block.shapes)[:2]}: another number of bytes than the header says"
            )
            if progress is not None:
                progress(done, len(blocks))


@contextmanager
def new_folder(dst, force: bool = False) -> Iterator[Path]:
    """A temporary folder beside `dst` that takes its place if all goes well, and vanishes if not.

    Raises:
        ExistsError: if `dst` exists and is not an empty folder, unless `force` is set.
    """
    dst = Path(dst)
    if dst.exists() and not (dst.is_dir() and not any(dst.iterdir())) and not force:
        raise ExistsError(
            f"{dst} exists; choose another destination, or overwrite it with force (--force)."
        )
    dst.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=dst.parent, prefix=f".{dst.name}-"))
    try:
        folder = work / "new"
        folder.mkdir()
        yield folder
        if dst.exists():
            os.replace(dst, work / "old")
        try:
            os.replace(folder, dst)
        except OSError:
            if (work / "old").exists():
                os.replace(work / "old", dst)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_json(path) -> dict:
    """A JSON object from a file.

    Raises:
        AdapterError: if there is no such file, or it holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{path} does not exist; is its folder an adapter's or a model's?"
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path} is no JSON file ({error}); copy or save it again.") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds no JSON object; copy or save it again.")
    return content


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
