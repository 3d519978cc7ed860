"""Makes an adapter of the checkpoint of a sharded training, in one process without a GPU.

The checkpoint holds the tensors, an adapter_config.json says what they are. Both are checked as the
two files of an adapter are, before the adapter takes its place.
"""

from pathlib import Path
from typing import Any

from ..config import MoELoraConfig
from ..files.folders import check_own_file, new_folder
from ..files.tensor_file import AdapterError, FilePath, Progress
from ..files.text import shown
from ..files.writing import CONFIG_NAME
from ..tuner.targets import is_target
from .base import BaseConfig, BaseModel
from .convert import Conversion, prepare, write_adapter
from .formats import OURS
from .model import Adapter
from .reading import read_adapter, read_paths
from .sharded import open_checkpoint


def consolidate_checkpoint(
    checkpoint: FilePath,
    dst: FilePath,
    *,
    config: FilePath | None = None,
    base_config: BaseConfig | None = None,
    adapter_name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the adapter of a sharded checkpoint as an adapter folder.

    Args:
        checkpoint: a folder that accelerate (FSDP), torch.distributed.checkpoint or DeepSpeed saved
            in a training.
        dst: folder to write. It appears only after everything is written.
        config: an adapter_config.json, or a folder that holds one; by default that of the
            checkpoint.
        base_config: the base model, as in `convert_adapter`. If it is known, the adapter's modules
            and shapes are compared with it.
        adapter_name: which adapter, if the checkpoint holds several.
        force: replace `dst` if it is an earlier output, and holds nothing that is read.
        progress: called with (blocks written, total blocks).
    Returns: what was done, with notes.
    Raises:
        AdapterError: if the checkpoint is damaged or unknown, or if its tensors are not those of
            the configuration.
        RefusedError: if the checkpoint holds several adapters and none is named, or if DeepSpeed
            has to read it and is not installed.
        ExistsError: if `dst` exists and may not be replaced.
    """
    config_path = _find_config(Path(checkpoint), config)
    tensors = open_checkpoint(checkpoint, adapter_name)
    adapter = read_adapter(tensors, config_path, base_config)
    if adapter.format != OURS.name:
        raise AdapterError(
            f"{checkpoint} holds an adapter in the format {adapter.format}, which this package "
            "did not train; save it with the program that did."
        )
    if adapter.base is None:
        adapter = adapter.noted(
            "the base model is not known, so the adapter was not compared with it (--base-config)"
        )
    else:
        _check_targets(adapter, adapter.base)
    adapter = prepare(adapter, OURS)
    with new_folder(dst, force, [*read_paths(checkpoint, adapter), config_path]) as folder:
        write_adapter(adapter, OURS, folder, progress=progress)
    return Conversion(
        source="checkpoint",
        to=OURS.name,
        path=Path(dst),
        modules=len(adapter.experts),
        experts=adapter.adapted_experts(),
        notes=adapter.notes,
    )


def _find_config(checkpoint: Path, config: FilePath | None) -> Path:
    """The adapter_config.json that a user named, or that of the checkpoint.

    Raises:
        AdapterError: if there is none.
    """
    places = [checkpoint, checkpoint.parent]
    if config is not None:
        places = [Path(config)]
        if places[0].is_file():
            return places[0]
    for place in places:
        file = place / CONFIG_NAME
        if file.is_file():
            check_own_file(file)
            return file
    raise AdapterError(
        f"{places[0]} holds no {CONFIG_NAME}; name one (config, --config). "
        'model.peft_config["default"].save_pretrained(folder) of the model that is trained writes '
        "it."
    )


def _check_targets(adapter: Adapter, base: BaseModel) -> None:
    """Check that every module which the configuration targets has its tensors.

    Raises:
        AdapterError: if one has none, or not those of each projection.
    """
    config: Any = MoELoraConfig.from_peft_type(**adapter.config)
    for path, layout in base.experts.items():
        if config.target_modules is not None and not is_target(config, path):
            continue
        if config.experts_of(path, layout.num_experts) == ():
            continue
        needed = set(config.projections_of(path, layout))
        found = set(adapter.experts.get(path, ()))
        if needed - found:
            _raise_missing(adapter, f"{path}, {sorted(needed - found)[0]}")
    if config.target_modules is None:
        return
    for path in base.linears:
        if is_target(config, path) and path not in adapter.linears:
            _raise_missing(adapter, path)


def _raise_missing(adapter: Adapter, what: str) -> None:
    raise AdapterError(
        f"{adapter.file.path} holds no A and B of {shown(what)}, which adapter_config.json "
        "targets; the two do not belong together, or the checkpoint is not whole."
    )
