"""Safetensors files, read and written one tensor at a time.

A file holds the length of its header (8 bytes), the header (JSON) and the bytes of the tensors.
Tensors are read with ordinary file reads, not through a memory map, so that a tensor which was
freed does not stay in memory.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open

from .text import LONGEST_NAME, is_plain, quoted, shown

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
# the metadata of every file that a conversion or a merge wrote; training does not write it
_OUTPUT = {"peft_moe_lora_output": "1"}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# the index of a checkpoint, the largest such file, has up to 20 MB
_LARGEST_JSON = 2**26

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}

Progress = Callable[[int, int], None]
FilePath = str | os.PathLike[str]


class AdapterError(ValueError):
    """An adapter or checkpoint cannot be used: it is damaged, unknown or made for another model."""


class RefusedError(AdapterError):
    """An undamaged adapter is refused.

    The program that reads the result would refuse or misread it, or the adapter can be read in two
    ways.
    """


class RepeatedError(AdapterError):
    """An object in a JSON text says a name twice."""


class ExistsError(AdapterError):
    """The destination exists and may not be overwritten."""


@dataclass(frozen=True)
class TensorInfo:
    """The entry of a tensor in the header.

    Attributes:
        dtype: the tensor's dtype.
        shape: the tensor's shape.
        offset: position of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors(Protocol):
    """Named tensors on disk, of which one after the other is loaded; see TensorFile."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def load(self, name: str) -> torch.Tensor: ...


class TensorFile:
    """A checked safetensors file; each read opens it and closes it again.

    Args:
        path: the file.
    Attributes:
        path: the file.
        tensors: name -> TensorInfo, in the order of their bytes.
        metadata: the strings under "__metadata__" of the header.
    Raises:
        AdapterError: if it is cut short, in another format, or has a tensor of an unknown dtype or
            with a name that cannot be printed.
    """

    def __init__(self, path: FilePath) -> None:
        self.path = Path(path)
        check_file(self.path)
        try:
            # safetensors checks that the header is complete and that the offsets leave no gaps
            with safe_open(self.path, framework="pt"):
                pass
            with self.path.open("rb") as file:
                header = read_header(file)
                start = file.tell()
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise AdapterError(not_whole(path, error)) from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        check_names(path, header)
        self.tensors: dict[str, TensorInfo] = {}
        for name, described in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
            dtype = DTYPES.get(described["dtype"])
            if dtype is None:
                raise AdapterError(
                    f"{path}: {name} is {described['dtype']}; the known dtypes are "
                    f"{', '.join(DTYPES)}. Dequantize it first."
                )
            first, _ = described["data_offsets"]
            self.tensors[name] = TensorInfo(dtype, tuple(described["shape"]), start + first)

    def load(
        self, name: str, row: int | None = None, check: bool = True, view: tuple[int, ...] = ()
    ) -> torch.Tensor:
        """Read a tensor, or one row of it.

        Args:
            name: the tensor's name.
            row: index along its first dimension; None reads the whole tensor.
            check: whether to raise if the tensor holds NaN or infinity, in fp32 too.
            view: read the tensor in this shape, which must have as many elements; by default in its
                own shape.
        Raises:
            AdapterError: if a value is NaN or infinite, or too large for fp32.
        """
        info = self.tensors[name]
        shape = view or info.shape
        offset = info.offset
        if row is not None:
            shape = shape[1:]
            offset += row * math.prod(shape) * info.dtype.itemsize
        tensor = torch.empty(shape, dtype=info.dtype)
        if tensor.numel():
            with self.path.open("rb") as file:
                file.seek(offset)
                file.readinto(_bytes(tensor))
        if check and tensor.is_floating_point():
            narrow = tensor
            if tensor.dtype == torch.float64:
                # it is cast when the adapter is loaded
                narrow = tensor.float()
            if not torch.isfinite(narrow).all():
                raise AdapterError(not_finite(self.path, name))
        return tensor


@dataclass(frozen=True)
class Block:
    """Tensors of one dtype that are computed together, just before they are written.

    Attributes:
        shapes: name -> shape.
        dtype: the dtype of all tensors.
        make: yields the tensors in the order of `shapes`. A large tensor may be yielded in several
            pieces, in the order of its bytes.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    make: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(TensorInfo(self.dtype, shape).nbytes for shape in self.shapes.values())


def write_tensors(
    path: FilePath,
    blocks: Iterable[Block],
    metadata: dict[str, str],
    progress: Progress | None = None,
) -> None:
    """Write a safetensors file block by block, with one block's tensors in memory at a time.

    Args:
        path: the file. It is written in place, so it should be in a `new_folder`.
        blocks: the tensors to write.
        metadata: strings for the header, which also gets the mark that `is_output` finds.
        progress: called with (blocks written, total blocks).
    """
    # the widest dtype first, so that every tensor is aligned to the size of its elements
    ordered = sorted(blocks, key=lambda block: -block.dtype.itemsize)
    with open(path, "wb") as file:
        file.write(encoded_header(_header(ordered, {**metadata, **_OUTPUT})))
        for done, block in enumerate(ordered, 1):
            end = file.tell() + block.nbytes
            for tensor in block.make():
                assert tensor.dtype == block.dtype, (
                    f"{block.shapes}: {tensor.dtype} instead of {block.dtype}"
                )
                if tensor.numel():
                    file.write(_bytes(tensor.contiguous()))
            assert file.tell() == end, (
                f"{list(block.shapes)[:2]}: the number of bytes differs from the header"
            )
            if progress is not None:
                progress(done, len(ordered))


def read_header(file: BinaryIO) -> dict[str, Any]:
    """Read the header of an open safetensors file, up to the first byte of the tensors.

    Raises:
        ValueError: if it is not JSON.
    """
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length))


def encoded_header(header: dict[str, Any]) -> bytes:
    """The bytes of a header in a safetensors file: its length, then the header itself."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # the format aligns the first tensor to 8 bytes
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def is_output(file: TensorFile) -> bool:
    """Whether `write_tensors` wrote a file."""
    return _OUTPUT.items() <= file.metadata.items()


def check_file(path: FilePath) -> None:
    """Check that a path is a file or does not exist; opening anything else could wait for ever.

    Raises:
        AdapterError: if it is a folder, a link that leads nowhere, a named pipe or a device, or if
            this user may not read it.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise AdapterError(
            f"{path} is a link that leads to no file ({error.strerror}); put the file itself in "
            "its place."
        ) from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a device")
        raise AdapterError(f"{path} is {kind}, not a file; put the file itself in its place.")
    if not os.access(path, os.R_OK):
        raise AdapterError(f"{path} may not be read by this user; change its permissions.")


def read_json(path: FilePath) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        AdapterError: if it does not exist, is not a file, or does not hold a JSON object.
    """
    check_file(path)
    try:
        _check_size(Path(path))
        content = parsed(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{path} does not exist; name the folder of an adapter or of a model."
        ) from error
    except RecursionError as error:
        raise AdapterError(f"{path} is nested too deeply; copy or save it again.") from error
    except RepeatedError as error:
        raise AdapterError(f"{path}: {error}.") from error
    except OSError as error:
        raise AdapterError(f"{path} cannot be read ({shown(error)}); copy it again.") from error
    except ValueError as error:
        # not UTF-8, not JSON, or an integer of thousands of digits
        raise AdapterError(
            f"{path} is not JSON ({shown(error)}); copy or save it again."
        ) from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path} is not a JSON object; copy or save it again.")
    return content


def parsed(text: str) -> Any:
    """What a JSON text says.

    Raises:
        RepeatedError: if an object says a name twice; readers differ in which value they take.
        ValueError, RecursionError: as `json.loads`.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedError(f"it says {quoted(twice)} twice; keep the value that is right")
    return found


def _check_size(path: Path) -> None:
    """Check that a JSON file is no larger than such files are; a hole may claim any size.

    Raises:
        ValueError: if it is larger.
        FileNotFoundError: if it does not exist.
    """
    size = path.stat().st_size
    if size > _LARGEST_JSON:
        raise ValueError(f"it has {size} bytes, of at most {_LARGEST_JSON}")


def check_names(path: FilePath, names: Iterable[str]) -> None:
    """Check that the names of tensors or modules in a file can be names of a model's.

    Raises:
        AdapterError: if one cannot be printed, or is longer than names of modules are.
    """
    for name in names:
        if not is_plain(name):
            raise AdapterError(
                f"{path}: names must be printable and of at most {LONGEST_NAME} characters, got "
                f"{shown(name)}; save the adapter again."
            )


def not_whole(path: FilePath, error: Exception) -> str:
    """The message for a file that cannot be read."""
    return (
        f"{path} is not a whole safetensors file ({shown(error)}); it was cut short or is in "
        "another format. Copy or save it again."
    )


def not_finite(path: FilePath, name: str) -> str:
    """The message for a tensor with NaN or infinity."""
    return (
        f"{path}: tensor {name} holds NaN or infinity, or values too large for fp32; the training "
        "run that wrote it diverged or the file is damaged. Use an earlier checkpoint."
    )


def _header(blocks: list[Block], metadata: dict[str, str]) -> dict[str, Any]:
    """The header of a file that holds the blocks' tensors in this order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for block in blocks:
        for name, shape in block.shapes.items():
            assert name not in header, f"{name} would be written twice"
            end = offset + TensorInfo(block.dtype, shape).nbytes
            header[name] = {
                "dtype": _NAMES[block.dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
    return header


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor; writing to them writes to the tensor."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
