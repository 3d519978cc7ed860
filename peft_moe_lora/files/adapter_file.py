"""The adapter file: safetensors whose metadata says the layout, the format version and each module's shapes.

Nothing here loads a model. A file is read whole before it is used and replaced whole when it is written.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

# the newest version read; 2 may hold some experts of a module only and is written where it does, else 1
FORMAT_VERSION = 2
CHOSEN_EXPERTS_VERSION = 2
LAYOUT = "expert_major"
METADATA_KEY = "peft_moe_lora"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


@dataclass(frozen=True)
class AdapterFile:
    """What a checked adapter file holds.

    Attributes:
        path: where it lies.
        shapes: tensor name -> shape.
        description: the metadata under METADATA_KEY, {} in a file written without.
    """

    path: str
    shapes: dict[str, tuple[int, ...]]
    description: dict


def find_adapter_file(model_id, subfolder: str | None = None, **hub_kwargs) -> str | None:
    """Path of the weights of a local or hub adapter; None where a configuration stands alone.

    Raises:
        ValueError: if the weights are a pickle.
    """
    folder = Path(model_id, subfolder or "")
    if folder.is_dir():
        if (folder / WEIGHTS_NAME).is_file():
            return str(folder / WEIGHTS_NAME)
        if (folder / PICKLE_NAME).is_file():
            raise ValueError(_pickle_message(folder / PICKLE_NAME))
        return None
    hub_kwargs.pop("use_auth_token", None)
    try:
        return hf_hub_download(str(model_id), WEIGHTS_NAME, subfolder=subfolder, **hub_kwargs)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


def read_adapter_file(path: str) -> AdapterFile:
    """Read the header and every value of an adapter file, tensor by tensor.

    Raises:
        ValueError: if it is truncated or no safetensors file, of an unknown layout or version, or not finite.
    """
    try:
        with safe_open(path, framework="pt") as f:
            description = read_description(path, f.metadata() or {})
            shapes = {}
            for name in f.keys():
                tensor = f.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"{path}: tensor {name} holds NaN or infinity; the training run that wrote it diverged or the "
                        "file is damaged. Load an earlier checkpoint."
                    )
                shapes[name] = tuple(tensor.shape)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it was cut short or is of another format. "
            "Copy or save it again."
        ) from error
    return AdapterFile(path, shapes, description)


def complete_adapter_file(folder, description: dict) -> None:
    """Write the description into the metadata of the adapter file just saved in a folder.

    Raises:
        ValueError: if a pickle was saved instead, which is removed.
    """
    weights, pickle = Path(folder, WEIGHTS_NAME), Path(folder, PICKLE_NAME)
    if pickle.is_file() and (
        not weights.is_file() or pickle.stat().st_mtime_ns > weights.stat().st_mtime_ns
    ):
        pickle.unlink()
        raise ValueError(
            "safe_serialization=False: adapters are saved as safetensors only, which carry their layout; "
            "leave safe_serialization unset."
        )
    if weights.is_file():
        _replace_metadata(
            weights, {"format": "pt", METADATA_KEY: json.dumps(description, sort_keys=True)}
        )


def described_module(num_experts: int, experts: Sequence[int] | None) -> dict:
    """What the metadata says of one experts module beside its projections: E, and the experts it holds if not all."""
    return {"num_experts": num_experts} | ({} if experts is None else {"experts": list(experts)})


def described(modules: dict[str, dict], routers: list[str]) -> dict:
    """The metadata of a whole file: of its experts modules, and paths of its routers; the oldest version that fits."""
    some = any("experts" in module for module in modules.values())
    version = CHOSEN_EXPERTS_VERSION if some else 1
    return {"format_version": version, "layout": LAYOUT, "experts": modules, "routers": routers}


def read_description(path: str, metadata: dict[str, str]) -> dict:
    """What a file's metadata says under METADATA_KEY; {} where it says nothing.

    Raises:
        ValueError: if it is no JSON object, or of an unknown layout or version.
    """
    try:
        description = json.loads(metadata.get(METADATA_KEY, "{}"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: its metadata under {METADATA_KEY!r} is no JSON ({error}); save it again."
        ) from error
    if not isinstance(description, dict):
        raise ValueError(
            f"{path}: its metadata under {METADATA_KEY!r} is no JSON object; save it again."
        )
    layout, version = (
        description.get("layout", LAYOUT),
        description.get("format_version", FORMAT_VERSION),
    )
    if layout != LAYOUT:
        raise ValueError(
            f"{path}: layout {layout!r} is not known, this version reads {LAYOUT!r}; convert the adapter."
        )
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {version!r} is not known, this version reads 1 to {FORMAT_VERSION}; "
            "upgrade peft_moe_lora."
        )
    return description


def _replace_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Give a safetensors file another `__metadata__`; the tensors' bytes are copied as they are, the file replaced."""
    with path.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(length))
        header["__metadata__"] = metadata
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format aligns the first tensor to 8 bytes
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as target:
                target.write(len(encoded).to_bytes(8, "little") + encoded)
                shutil.copyfileobj(source, target)
            shutil.copymode(path, temporary)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _pickle_message(path: Path) -> str:
    return f"{path}: pickled weights are not loaded; save the adapter again as safetensors ({WEIGHTS_NAME})."
