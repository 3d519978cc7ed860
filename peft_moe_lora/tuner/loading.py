"""Which adapter PEFT or transformers is loading at this moment, and from where.

They hand the tuner a configuration, then the tensors, but neither the folder nor the file. An
adapter is checked against its file before the model is changed, so the folder is read from the
frames of their functions.
"""

from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME
from torch import nn

from ..config import MoELoraConfig
from ..files.adapter_file import (
    WEIGHTS_NAME,
    AdapterFile,
    Trained,
    check_trained,
    find_adapter_file,
    read_adapter_file,
)
from ..files.field_rules import check_known
from ..files.scaling import is_same, scaling_of
from ..files.tensor_file import read_json
from ..files.text import shown
from ..layers.layer import MoELoraLayer
from .beside import Beside
from .frames import frames, local_of
from .saving import adapted

# the functions that load an adapter: module -> their names
_LOADERS = {
    "peft.peft_model": ("from_pretrained", "load_adapter"),
    "transformers.integrations.peft": ("load_adapter",),
}


class Load(NamedTuple):
    """An adapter that is being loaded.

    Attributes:
        source: a folder, or a name on the hub.
        hub_kwargs: arguments of `hf_hub_download`, among them the subfolder.
        key_mapping: the argument of PEFT.
        by_transformers: whether transformers loads it, not PEFT.
        knows_wrappers: whether it loads modules that are trained whole, and tokens.
    """

    source: Any
    hub_kwargs: dict[str, Any]
    key_mapping: Mapping[str, str]
    by_transformers: bool
    knows_wrappers: bool = True

    def path(self) -> str:
        """Path of the adapter's weights.

        Raises:
            ValueError: if there are none.
        """
        path = find_adapter_file(self.source, **self.hub_kwargs)
        if path is None:
            raise ValueError(
                f"{self.source} holds no {WEIGHTS_NAME}, so there is nothing to load. Name the "
                "folder of a saved adapter; for a new adapter call get_peft_model(model, config)."
            )
        return path

    def check_wrappers(self, beside: Beside) -> None:
        """Check that what an adapter trains beside its targets will be loaded.

        Raises:
            ValueError: if this release of transformers loads A and B alone.
        """
        wrapped = [*beside.saved, *beside.tokens]
        if wrapped and not self.knows_wrappers:
            raise ValueError(
                f"load_adapter of this release of transformers does not load {wrapped[0]}, which "
                "modules_to_save or trainable_token_indices trained; upgrade transformers, or call "
                "PeftModel.from_pretrained(model, folder)."
            )

    def check_is_written(self, model: nn.Module) -> None:
        """Check that transformers will write what it reads into the adapter of a model.

        Raises:
            ValueError: if modules are offloaded to disk. transformers takes A and B of such modules
                for weights that stay on disk, and leaves the adapter as it was drawn.
        """
        places = getattr(model, "hf_device_map", None) or {}
        on_disk = [path for path, place in places.items() if place == "disk"]
        if self.by_transformers and on_disk:
            raise ValueError(
                f"load_adapter of transformers loads nothing into {on_disk[0] or 'the model'}, "
                "which device_map offloads to disk. Load the base model without disk offload, or "
                "call get_peft_model(model, MoELoraConfig.from_pretrained(folder)) and then "
                "set_peft_model_state_dict(model, load_file(weights))."
            )

    def config(self) -> MoELoraConfig:
        """The configuration that was saved with the weights."""
        return MoELoraConfig.from_pretrained(self.source, **self.hub_kwargs)


def current_load() -> Load | None:
    """The adapter that is being loaded; None if a new one is being made, or a state dict loaded."""
    for frame in frames():
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name not in _LOADERS.get(module, ()):
            continue
        if module == "peft.peft_model":
            return _load_of_peft(frame)
        return _load_of_transformers(frame)
    return None


def _load_of_peft(frame: FrameType) -> Load:
    # `load_adapter` has taken the arguments of the download out of kwargs
    kwargs = frame.f_locals.get("hf_hub_download_kwargs")
    if kwargs is None:
        kwargs = local_of(frame, "kwargs")
    mapping = local_of(frame, "key_mapping") or {}
    return Load(local_of(frame, "model_id"), _hub_kwargs(kwargs), mapping, False)


def _load_of_transformers(frame: FrameType) -> Load | None:
    source = local_of(frame, "peft_model_id")
    if source is None or local_of(frame, "adapter_state_dict") is not None:
        return None
    kwargs = local_of(frame, "load_config").download_kwargs
    # releases of transformers that load them import the class in this function
    knows_wrappers = "AuxiliaryTrainingWrapper" in frame.f_code.co_varnames
    return Load(source, _hub_kwargs(kwargs), {}, True, knows_wrappers=knows_wrappers)


def _hub_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    hub_kwargs, *_ = MoELoraConfig._split_kwargs(dict(kwargs))
    return hub_kwargs


def read_with(config: MoELoraConfig, load: Load | None) -> AdapterFile | None:
    """The file of an adapter that is about to be added; None if it is a new adapter.

    Args:
        config: its configuration, which remembers the file.
        load: where it is loaded from.
    Raises:
        ValueError: if the file is missing or damaged.
    """
    if load is not None:
        path = load.path()
        if config._file is None or config._file.path != path:
            # PEFT and transformers read the configuration as a PeftConfig, which drops fields that
            # it does not know
            beside = Path(path).with_name(CONFIG_NAME)
            if beside.is_file():
                check_known(read_json(beside))
            config._file = read_adapter_file(path)
    return config._file


def check_unmerged(model: nn.Module, adapter_name: str) -> None:
    """Check that tensors loaded into an adapter reach the outputs: it must not be merged.

    Raises:
        ValueError: if it is merged into a layer.
    """
    for path, layer in adapted(model, adapter_name):
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"adapter {adapter_name!r} is merged into the weights of {path}, which would stay "
                "as they are, so nothing was loaded into it; call model.unmerge_adapter() first."
            )


def check_over_existing(model: nn.Module, config: MoELoraConfig, adapter_name: str) -> None:
    """Check that an adapter which is loaded over another one of its name has the same scalings.

    PEFT loads the tensors alone, and keeps rank, scaling and chosen experts of the old adapter.

    Args:
        model: a model with the old adapter.
        config: the old adapter's configuration.
        adapter_name: name of both.
    Raises:
        ValueError: if a layer has another rank, scaling or choice of experts in the new adapter.
    """
    load = current_load()
    if load is None:
        return
    if config._file is not None and config._file.path == load.path():
        # the adapter was added just now, and checked against this file
        config._file = None
        return
    new = load.config()
    for path, layer in adapted(model, adapter_name):
        chosen = None
        if isinstance(layer, MoELoraLayer):
            chosen = new.experts_of(path, layer.layout.num_experts)
        gets = _Numbers(new.rank_of(path), new.scaling_of(path), chosen)
        _check_trained(new, path, layer, adapter_name, gets)
        has = _numbers_of(layer, adapter_name)
        scalings = (has.scaling, float(layer.scaling[adapter_name]))
        same_scaling = any(is_same(gets.scaling, scaling) for scaling in scalings)
        if same_scaling and (gets.r, gets.experts) == (has.r, has.experts):
            continue
        raise ValueError(
            f"{load.source} gives {path} {gets.shown()}, but the adapter {adapter_name!r} of this "
            f"model has {has.shown()} there, and keeps it when tensors are loaded into it. Call "
            f"model.delete_adapter({adapter_name!r}) first, or load the adapter under another name."
        )


class _Numbers(NamedTuple):
    """What a layer does with A and B of an adapter; experts are None for all."""

    r: int
    scaling: float
    experts: tuple[int, ...] | None

    def shown(self) -> str:
        text = f"rank {self.r} and scaling {self.scaling:g}"
        if self.experts is not None:
            text += f" on the experts {shown(list(self.experts))}"
        return text


def _numbers_of(layer: LoraLayer, adapter_name: str) -> _Numbers:
    """The numbers with which an adapter was added; `set_scale` may have changed its scaling."""
    r = layer.r[adapter_name]
    use_rslora = layer.use_rslora.get(adapter_name, False)
    experts = None
    if isinstance(layer, MoELoraLayer):
        experts = layer.experts[adapter_name]
    return _Numbers(r, scaling_of(layer.lora_alpha[adapter_name], r, use_rslora), experts)


def _check_trained(
    config: MoELoraConfig, path: str, layer: LoraLayer, adapter_name: str, given: _Numbers
) -> None:
    """Compare a configuration with the metadata of the file beside it, for one layer."""
    assert config._file is not None, "the caller has found the file"
    trained = config._file.description.get("trained", {})
    keys = [path]
    if isinstance(layer, MoELoraLayer):
        keys = [f"{path}.{name}" for name in layer.adapted_projections(adapter_name)]
    for key in keys:
        numbers = Trained(given.r, given.scaling)
        check_trained(config._file.path, key, trained.get(key), numbers)
