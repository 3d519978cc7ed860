"""mlx-lm's format: `adapters.safetensors` with `<block>.switch_mlp.gate_proj.lora_a`, [E, r, K].

lora_b is [E, N, r]. The lora_a of an ordinary layer is [K, r] and its lora_b [r, N]. mlx-lm reads
one rank and one `scale`, which is our scaling, from lora_parameters of adapter_config.json. The
keys there name the layers that get LoRA; a layer without tensors has a lora_b of zeros.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from ...experts.families import MLX_BLOCKS, MLX_NO_LORA
from ...files.adapter_file import WEIGHTS_NAME
from ...files.card import CardText
from ...files.scaling import tidy
from ...files.tensor_file import AdapterError, Block, RefusedError, TensorFile, TensorInfo
from ...files.text import quoted
from ...files.writing import CONFIG_NAME
from ..base import BaseModel, need_base
from ..model import Adapter, LinearPair, Pair
from ..serving import MERGE, in_its_words, refuses_other_than_lora
from ..targets import common_fields, short_names
from .format import PREFIX, Opened, stacked_parts
from .sglang_3d import Sglang3d

_MLX_WEIGHTS = "adapters.safetensors"
_LAYER = re.compile(r"^.*?\blayers\.\d+\.")
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<side>[ab])")
# the modules of experts: most families call them switch_mlp
_EXPERTS = re.compile(r"\.(?:switch_mlp|experts)\.(?:gate_proj|up_proj|down_proj)$")


class Mlx(Sglang3d):
    """A [E, r, K] and B [E, N, r] of gate, up and down under mlx-lm's names."""

    name = "mlx"
    card = CardText(
        layout="mlx-lm's `adapters.safetensors`: `<block>.switch_mlp.gate_proj|up_proj|down_proj"
        ".lora_a` `[E, r, K]` and `lora_b` `[E, N, r]`; lora_a of other layers is `[K, r]`.",
        loading=(
            "```python",
            "from mlx_lm import load",
            "",
            'model, tokenizer = load({base}, adapter_path="ADAPTER")',
            "```",
        ),
        serving=("mlx_lm.server --model {base} --adapter-path ADAPTER",),
    )
    both_projections = False
    weights_name = _MLX_WEIGHTS

    def opened(self, folder: Path) -> Opened | None:
        if (folder / WEIGHTS_NAME).is_file() or not (folder / _MLX_WEIGHTS).is_file():
            return None
        return Opened(self.name, _MlxTensors(folder / _MLX_WEIGHTS), _as_pefts)

    def prepare(self, adapter: Adapter) -> Adapter:
        base = need_base(adapter.base, "mlx-lm has names of its own for the experts of a model")
        if base.model_type not in MLX_BLOCKS:
            raise RefusedError(
                f"how mlx-lm names the experts of {base.model_type} was not tried, only those of "
                f"{', '.join(sorted(MLX_BLOCKS))}; {MERGE}."
            )
        refusal = refuses_other_than_lora(adapter, "mlx-lm")
        if refusal is not None:
            raise RefusedError(f"{refusal}.")
        for path, layer in adapter.linears.items():
            name = path.rpartition(".")[2]
            words = MLX_NO_LORA.get(base.model_type, {}).get(name)
            if layer.is_embedding:
                raise RefusedError(f"mlx-lm has no LoRA that fits this one on {path}; {MERGE}.")
            if words is not None:
                raise RefusedError(
                    f"mlx-lm has no LoRA on {path} of {base.model_type} {in_its_words(words)}; "
                    f"{MERGE}."
                )
        for path, pairs in adapter.experts.items():
            if "gate_up" in pairs:
                base.gate_and_up(path)  # raises if the order is not known
        return adapter

    def block(self, adapter: Adapter, path: str, projection: str, pair: Pair) -> Block:
        parts = _parts(_base_of(adapter), path, projection)
        names = {_experts_path(adapter, path, part): rows for part, rows in parts.items()}
        return stacked_parts(pair, names)

    def stored_A(self, adapter: Adapter, pair: LinearPair, A: torch.Tensor) -> torch.Tensor:
        return A.T

    def stored_B(self, adapter: Adapter, pair: LinearPair, B: torch.Tensor) -> torch.Tensor:
        return B.T

    def rename(self, adapter: Adapter, key: str) -> str:
        name = _base_of(adapter).hub_names.to_hub(key).removesuffix(".weight")
        return name.replace(".lora_A", ".lora_a").replace(".lora_B", ".lora_b")

    def config(self, adapter: Adapter) -> LoraConfig:
        return LoraConfig(
            **common_fields(adapter, adapter.linears),
            target_modules=["switch_mlp", *short_names(adapter, adapter.linears)],
        )

    def save_config(self, adapter: Adapter, folder: Path) -> dict[str, Any]:
        config = super().save_config(adapter, folder)
        names = [
            _experts_path(adapter, path, part)
            for path, pairs in adapter.experts.items()
            for projection in pairs
            for part in _parts(_base_of(adapter), path, projection)
        ]
        names += [_base_of(adapter).hub_names.to_hub(path) for path in adapter.linears]
        file = folder / CONFIG_NAME
        written = json.loads(file.read_text(encoding="utf-8"))
        written["fine_tune_type"] = "lora"
        # all layers
        written["num_layers"] = -1
        written["lora_parameters"] = {
            "rank": config["r"],
            "scale": config["lora_alpha"] / config["r"],
            "dropout": 0.0,
            "keys": sorted({_LAYER.sub("", name) for name in names}),
        }
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return config


def _base_of(adapter: Adapter) -> BaseModel:
    """The base model of a prepared adapter; `Mlx.prepare` has checked that it is known."""
    assert adapter.base is not None, "the adapter was not prepared for mlx-lm"
    return adapter.base


def _parts(base: BaseModel, path: str, projection: str) -> dict[str, slice]:
    """Name of each part of a projection -> its rows in the projection."""
    if projection == "down":
        return {"down_proj": slice(None)}
    gate, up = base.gate_and_up(path)
    return {"gate_proj": gate, "up_proj": up}


def _experts_path(adapter: Adapter, path: str, part: str) -> str:
    """The path of a part of the experts in mlx-lm."""
    base = _base_of(adapter)
    block = base.hub_names.to_hub(path).removesuffix("experts")
    return f"{block}{MLX_BLOCKS[base.model_type]}.{part}"


class _MlxTensors:
    """The tensors of a file of mlx-lm under the names, and in the shapes, of `sglang_3d`."""

    def __init__(self, path: Path) -> None:
        self._file = TensorFile(path)
        self.path = path
        self.metadata: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        # new name -> (name in the file, whether it is stored transposed)
        self._stored: dict[str, tuple[str, bool]] = {}
        for name, info in self._file.tensors.items():
            new, transposed = _as_stacks(name)
            if new in self.tensors:
                raise AdapterError(
                    f"{path}: {name} and another tensor are {new}; keep one of them."
                )
            shape = info.shape
            if transposed:
                shape = shape[::-1]
            self.tensors[new] = replace(info, shape=shape)
            self._stored[new] = (name, transposed)

    def load(self, name: str) -> torch.Tensor:
        stored, transposed = self._stored[name]
        tensor = self._file.load(stored)
        if transposed:
            return tensor.T
        return tensor


def _as_stacks(name: str) -> tuple[str, bool]:
    """The name of a tensor in `sglang_3d`, and whether it is stored transposed."""
    match = _FACTOR.fullmatch(name)
    if match is None:
        return name, False
    path = match["path"]
    is_experts = _EXPERTS.search(path) is not None
    path = path.replace(".switch_mlp.", ".experts.")
    return f"{PREFIX}{path}.lora_{match['side'].upper()}.weight", not is_experts


def _as_pefts(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The fields of PEFT that mean what a configuration of mlx-lm says.

    Raises:
        AdapterError: if it does not give one rank and one scale.
        RefusedError: if it is not LoRA.
    """
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise RefusedError(
            f"{path}: fine_tune_type is {quoted(kind)}, but only lora can be converted; fuse it "
            "into its model with mlx_lm.fuse."
        )
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        parameters = {}
    rank: Any = parameters.get("rank")
    scale: Any = parameters.get("scale")
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not isinstance(rank, int) or isinstance(rank, bool) or not is_number:
        raise AdapterError(
            f"{path}: lora_parameters must give rank and scale as numbers, got "
            f"{quoted(config.get('lora_parameters'))}; save the adapter again with mlx-lm."
        )
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": tidy(scale * rank),
        "target_modules": list(parameters.get("keys") or ()),
        "base_model_name_or_path": config.get("base_model_name_or_path"),
    }
