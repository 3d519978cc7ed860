"""The tensors of an adapter in the checkpoint of a training with several processes.

    pytorch_model_fsdp_0/.metadata    torch.distributed.checkpoint, as accelerate saves it with
                                      SHARDED_STATE_DICT; the folder may have any name
    pytorch_model_fsdp.bin            accelerate with FULL_STATE_DICT
    latest, global_step*/             DeepSpeed

Only the adapter's tensors are loaded. torch.distributed.checkpoint stores what it holds as a
pickle; classes other than its own are refused there.
"""

import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..files.adapter_file import WEIGHTS_NAME
from ..files.folders import check_own_file
from ..files.tensor_file import AdapterError, FilePath, RefusedError, TensorInfo, not_finite
from ..files.text import shown
from .state_keys import adapter_keys

_METADATA = ".metadata"
_SHARDED = "pytorch_model_fsdp_0"
_FULL = "pytorch_model_fsdp.bin"
_OF_DEEPSPEED = ("latest", "global_step*")
# what the pickle of a checkpoint's metadata is made of
_OF_METADATA = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "pathlib",
)
_OF_TORCH = {("torch", "Size"), ("torch.serialization", "_get_layout")}


class ShardedTensors:
    """The tensors of an adapter in a checkpoint, each loaded when it is needed.

    Attributes:
        path: the checkpoint.
        tensors: key in an adapter file -> TensorInfo.
        metadata: none, for a checkpoint does not describe an adapter.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        read: Callable[[str], torch.Tensor],
    ) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self.metadata: dict[str, str] = {}
        self._read = read

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor.

        Raises:
            AdapterError: if it cannot be read, or if a value is NaN, infinite or too large for
                fp32.
        """
        tensor = self._read(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise AdapterError(not_finite(self.path, name))
        return tensor


def open_checkpoint(path: FilePath, adapter_name: str | None = None) -> ShardedTensors:
    """Find the adapter in a checkpoint; no tensor of it is loaded.

    Args:
        path: a folder that a training saved, or the folder of torch.distributed.checkpoint in it.
        adapter_name: the adapter; None if the checkpoint holds one only.
    Raises:
        AdapterError: if it is no checkpoint of a sharded training, or not whole.
        RefusedError: if it holds several adapters, or if DeepSpeed has to read it and is missing.
    """
    folder = Path(path)
    for place in (folder, folder / _SHARDED):
        if (place / _METADATA).is_file():
            return _open_distributed(place, adapter_name)
    if (folder / _SHARDED).is_dir():
        raise AdapterError(
            f"{folder / _SHARDED} holds no {_METADATA}, which is written last: saving was "
            "interrupted, or the file was not copied. Use an earlier checkpoint."
        )
    if (folder / _FULL).is_file():
        return _open_full(folder / _FULL, adapter_name)
    if any(found for name in _OF_DEEPSPEED for found in folder.glob(name)):
        return _open_deepspeed(folder, adapter_name)
    if (folder / WEIGHTS_NAME).is_file():
        raise AdapterError(
            f"{folder} holds an adapter that is whole already, {WEIGHTS_NAME}; load it as it is."
        )
    raise AdapterError(
        f"{folder} is no checkpoint of a sharded training: it holds none of {_SHARDED}/{_METADATA} "
        f"and {_FULL} (accelerate with FSDP), {_METADATA} (torch.distributed.checkpoint), and "
        f"{' and '.join(_OF_DEEPSPEED)} (DeepSpeed)."
    )


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


def _open_distributed(folder: Path, adapter_name: str | None) -> ShardedTensors:
    check_own_file(folder / _METADATA)
    reader = _Reader(folder)
    stored = {
        name: entry
        for name, entry in reader.metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    keys = adapter_keys(folder, stored, adapter_name)
    tensors = {
        key: TensorInfo(stored[name].properties.dtype, tuple(stored[name].size))
        for key, name in keys.items()
    }
    wanted = set(keys.values())
    for index, place in (reader.metadata.storage_data or {}).items():
        if index.fqn in wanted:
            _check_shard(folder, place.relative_path)

    def read(key: str) -> torch.Tensor:
        info = tensors[key]
        tensor = torch.empty(info.shape, dtype=info.dtype)
        if info.dtype.is_floating_point:
            # what no shard holds stays NaN, which is refused
            tensor.fill_(torch.nan)
        with _reported(folder), warnings.catch_warnings():
            # that there is one process
            warnings.simplefilter("ignore", UserWarning)
            dcp.load({keys[key]: tensor}, storage_reader=reader, no_dist=True)
        return tensor

    return ShardedTensors(folder, tensors, read)


def _check_shard(folder: Path, name: str) -> None:
    """Check that a file of shards is there, and in the folder."""
    file = folder / name
    if file.parent != folder or not file.is_file():
        raise AdapterError(
            f"{folder} misses {shown(name)}, which holds shards of the adapter; copy the files of "
            "every process into one folder."
        )
    check_own_file(file)


class _Reader(dcp.FileSystemReader):
    """Reads the metadata once, and no other classes than theirs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with _reported(folder), (folder / _METADATA).open("rb") as file:
            self.metadata: Metadata = _MetadataUnpickler(file).load()
        if not isinstance(self.metadata, Metadata):
            raise AdapterError(f"{folder / _METADATA} holds no metadata; copy or save it again.")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = None
        if module in _OF_METADATA or (module, name) in _OF_TORCH or module == "torch":
            found = super().find_class(module, name)
        is_known = (module, name) in _OF_TORCH or isinstance(found, torch.dtype)
        if is_known or (module in _OF_METADATA and isinstance(found, type)):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs")


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    """Name the checkpoint in errors of the programs that read it."""
    try:
        yield
    except (
        CheckpointException,
        pickle.UnpicklingError,
        EOFError,
        LookupError,
        AttributeError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, AdapterError):
            raise
        raise AdapterError(
            f"{folder} cannot be read ({shown(error)}); it was cut short or is damaged. Copy it "
            "again, or use an earlier checkpoint."
        ) from error


# ---- whole tensors -------------------------------------------------------------------------------


def _open_full(file: Path, adapter_name: str | None) -> ShardedTensors:
    check_own_file(file)
    with _reported(file):
        # the tensors stay in the file until they are used
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return _of_state(file, state, adapter_name)


def _open_deepspeed(folder: Path, adapter_name: str | None) -> ShardedTensors:
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise RefusedError(
            f"{folder} is a checkpoint of DeepSpeed, which reads it, but DeepSpeed cannot be "
            f"imported ({shown(error)}): pip install deepspeed."
        ) from error
    # DeepSpeed prints what it does, but results alone go to stdout
    with _reported(folder), redirect_stdout(sys.stderr):
        state = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), exclude_frozen_parameters=True
        )
    return _of_state(folder, state, adapter_name)


def _of_state(
    path: Path, state: Mapping[str, torch.Tensor], adapter_name: str | None
) -> ShardedTensors:
    if not isinstance(state, Mapping):
        raise AdapterError(f"{path} holds no state dict; copy or save it again.")
    stored = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    keys = adapter_keys(path, stored, adapter_name)
    tensors = {
        key: TensorInfo(stored[name].dtype, tuple(stored[name].shape)) for key, name in keys.items()
    }
    return ShardedTensors(path, tensors, lambda key: stored[keys[key]].contiguous())
