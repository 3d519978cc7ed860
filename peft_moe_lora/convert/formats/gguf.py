"""A GGUF adapter for llama.cpp: `blk.<layer>.ffn_gate_exps.weight.lora_a`, [E, r, K] and [E, N, r].

llama.cpp reads the scaling `adapter.lora.alpha` / r, one alpha for all. The names are those of the
package gguf. The lora_a of an embedding is [K, r]. Files of this format are written and not read.
"""

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from ...experts.families import GGUF_ARCHITECTURES, GGUF_NO_LORA, GGUF_PAIRED_ROWS
from ...files.card import CardText
from ...files.tensor_file import Block, Progress, RefusedError
from ..base import BaseModel, need_base
from ..model import Adapter, LinearPair, Pair
from ..serving import MERGE, in_its_words, refuses_other_than_lora
from ..source import Source
from ..targets import common_fields, short_names
from .format import Format, Read, Slots, stacked_parts

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?:embedding_)?(?P<side>[AB])(?:\.weight)?")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


class Gguf(Format):
    """A [E, r, K] and B [E, N, r] of gate, up and down under llama.cpp's names."""

    name = "gguf"
    weights_name = "adapter.gguf"
    card = CardText(
        layout="GGUF for llama.cpp: `blk.<layer>.ffn_gate_exps|ffn_up_exps|ffn_down_exps.weight"
        ".lora_a` `[E, r, K]` and `.lora_b` `[E, N, r]`.",
        loading=("`llama-cli --model BASE.gguf --lora ADAPTER/adapter.gguf`",),
        serving=("llama-server --model BASE.gguf --lora ADAPTER/adapter.gguf",),
    )
    one_rank = True

    def read(self, source: Source, slots: Slots) -> Read:
        raise RefusedError(f"{source.file.path}: files of the format {self.name} are not read.")

    def prepare(self, adapter: Adapter) -> Adapter:
        base = need_base(adapter.base, "llama.cpp has names of its own for the experts of a model")
        if base.model_type not in GGUF_ARCHITECTURES:
            raise RefusedError(
                f"llama.cpp was not tried with adapters on the experts of {base.model_type}, only "
                f"of {', '.join(sorted(GGUF_ARCHITECTURES))}; {MERGE}."
            )
        if importlib.util.find_spec("gguf") is None:
            raise RefusedError(
                "the package gguf writes this format and is not installed: "
                "pip install 'peft-moe-lora[gguf]'."
            )
        refusal = refuses_other_than_lora(adapter, "llama.cpp")
        if refusal is not None:
            raise RefusedError(f"{refusal}.")
        _check_have_lora(base, adapter.linears)
        for path, pairs in adapter.experts.items():
            if "gate_up" in pairs:
                base.gate_and_up(path)  # raises if the order is not known
        return adapter

    def block(self, adapter: Adapter, path: str, projection: str, pair: Pair) -> Block:
        base = _base_of(adapter)
        parts = {"down_proj": slice(None)}
        if projection == "gate_up":
            gate, up = base.gate_and_up(path)
            parts = {"gate_proj": gate, "up_proj": up}

        names = {_gguf_name(base, f"{path}.{part}"): rows for part, rows in parts.items()}
        return stacked_parts(pair, names)

    def stored_A(self, adapter: Adapter, pair: LinearPair, A: torch.Tensor) -> torch.Tensor:
        if pair.is_embedding:
            return A.T
        return A

    def stored_B(self, adapter: Adapter, pair: LinearPair, B: torch.Tensor) -> torch.Tensor:
        base = _base_of(adapter)
        name = pair.path.rpartition(".")[2]
        if name not in GGUF_PAIRED_ROWS.get(base.model_type, ()):
            return B
        heads, key_heads = base.heads
        if name == "k_proj":
            heads = key_heads
        return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def rename(self, adapter: Adapter, key: str) -> str:
        match = _FACTOR.fullmatch(key)
        assert match is not None, f"{key} is no LoRA tensor of a layer"
        return f"{_gguf_name(_base_of(adapter), match['path'])}.lora_{match['side'].lower()}"

    def config(self, adapter: Adapter) -> LoraConfig:
        return LoraConfig(
            **common_fields(adapter, adapter.linears),
            target_modules=["experts", *short_names(adapter, adapter.linears)],
        )

    def write(
        self,
        adapter: Adapter,
        folder: Path,
        blocks: Iterable[Block],
        progress: Progress | None = None,
    ) -> None:
        import gguf

        architecture = GGUF_ARCHITECTURES[_base_of(adapter).model_type]
        writer = gguf.GGUFWriter(folder / self.weights_name, architecture, use_temp_file=True)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.config["lora_alpha"]))
        every = list(blocks)
        for done, block in enumerate(every, 1):
            for name, tensor in zip(block.shapes, block.make(), strict=True):
                writer.add_tensor(name, _array(tensor))
            if progress is not None:
                progress(done, len(every))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _base_of(adapter: Adapter) -> BaseModel:
    """The base model of a prepared adapter; `Gguf.prepare` has checked that it is known."""
    assert adapter.base is not None, "the adapter was not prepared for llama.cpp"
    return adapter.base


def _check_have_lora(base: BaseModel, paths: Iterable[str]) -> None:
    """Refuse LoRA on layers that llama.cpp computes without it."""
    without = GGUF_NO_LORA.get(GGUF_ARCHITECTURES[base.model_type], {})
    computed = {}
    for path in paths:
        name = path.rpartition(".")[2]
        if name in without:
            computed[path] = without[name]
        elif path in base.embeddings[1:] and f"{path}.weight" in base.tied:
            raise RefusedError(
                f"llama.cpp stores no {path} of its own for a model that ties it to the "
                f"embeddings; {MERGE}."
            )
        else:
            _gguf_name(base, path)
    if computed:
        # one at which llama.cpp stops, before those that it ignores
        path = max(computed, key=lambda path: len(computed[path]))
        raise RefusedError(
            f"llama.cpp computes {path} of {base.model_type} without LoRA "
            f"{in_its_words(computed[path])}; {MERGE}."
        )


def _gguf_name(base: BaseModel, path: str) -> str:
    """The name of a layer's weight in llama.cpp.

    Raises:
        RefusedError: if it has none.
    """
    import gguf

    architecture = GGUF_ARCHITECTURES[base.model_type]
    (kind,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = [int(match[1]) for match in map(_LAYER.search, base.experts) if match]
    names = gguf.get_tensor_name_map(kind, max(layers) + 1)
    name = names.get_name(f"{path}.weight", (".weight",))
    if name is None:
        raise RefusedError(f"llama.cpp has no LoRA on {path} of {base.model_type}; {MERGE}.")
    return name


def _array(tensor: torch.Tensor) -> Any:
    """The tensor in NumPy, which has no bf16: such a tensor becomes fp32, exactly."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.contiguous().numpy()
