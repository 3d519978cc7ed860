"""The adapters that every reader is given: families, and what is adapted beside their experts."""

import copy
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import nn

from convert.adapters import rewrite
from helpers import R, experts_paths, fill, moe_lora, tiny_model
from helpers.models import config_settings
from peft_moe_lora import convert_adapter, verify_adapter
from peft_moe_lora.convert.base import read_base
from peft_moe_lora.convert.convert import write_adapter
from peft_moe_lora.convert.fit import fill_in, make_uniform
from peft_moe_lora.convert.formats import WRITABLE
from peft_moe_lora.convert.reading import open_adapter
from peft_moe_lora.experts.layout import PROJECTIONS
from peft_moe_lora.files.tensor_file import RefusedError
from readers.deltas import Deltas, our_deltas

# of the images that a model with images reads; no adapter is on them
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "patch_size": 4,
    "spatial_merge_size": 2,
}
# published configs have this: vLLM reads `factor` of gpt_oss, and SGLang has no other rotary
# embedding for DeepSeek on a CPU
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 10000.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
_DEEPSEEK = {
    "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
_MROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}


def _qwen3_5_moe_with_images() -> nn.Module:
    config = transformers.Qwen3_5MoeConfig(
        text_config=config_settings("qwen3_5_moe", full_attention_interval=2),
        vision_config=_VISION,
        tie_word_embeddings=False,
    )
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


def _qwen3_vl_moe() -> nn.Module:
    text = {**config_settings("qwen3_moe"), "norm_topk_prob": True, "rope_parameters": _MROPE}
    config = transformers.Qwen3VLMoeConfig(
        text_config=text,
        vision_config={**_VISION, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=False,
    )
    return transformers.Qwen3VLMoeForConditionalGeneration(config)


def _with_images(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build()
    for seed, path in enumerate(experts_paths(model)):
        fill(model.get_submodule(path), seed=seed)
    return model.eval()


# architecture -> its tiny model; full_attention_interval and norm_topk_prob are in published
# configs, and the readers ask for them
BASES: dict[str, Callable[[], nn.Module]] = {
    "Qwen3MoeForCausalLM": lambda: tiny_model("qwen3_moe"),
    "Qwen3_5MoeForCausalLM": lambda: tiny_model("qwen3_5_moe", full_attention_interval=2),
    "Qwen3_5MoeForConditionalGeneration": lambda: _with_images(_qwen3_5_moe_with_images),
    "Qwen3VLMoeForConditionalGeneration": lambda: _with_images(_qwen3_vl_moe),
    "Qwen2MoeForCausalLM": lambda: tiny_model("qwen2_moe"),
    "MixtralForCausalLM": lambda: tiny_model("mixtral"),
    "OlmoeForCausalLM": lambda: tiny_model("olmoe"),
    "DeepseekV2ForCausalLM": lambda: tiny_model("deepseek_v2"),
    "DeepseekV3ForCausalLM": lambda: tiny_model("deepseek_v3", **_DEEPSEEK),
    "Glm4MoeForCausalLM": lambda: tiny_model("glm4_moe"),
    "GptOssForCausalLM": lambda: tiny_model("gpt_oss", rope_parameters=_YARN),
    "NemotronHForCausalLM": lambda: tiny_model("nemotron_h"),
}

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LATENT_ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
ATTENTION = {
    "DeepseekV2ForCausalLM": _LATENT_ATTENTION,
    "DeepseekV3ForCausalLM": _LATENT_ATTENTION,
}
ROUTER = {"GptOssForCausalLM": "router"}
# what an adapter is on beside the experts
KINDS = ("experts", "attention", "router")


# defects that the comparison must see: two experts exchanged, gate and up exchanged
SWAPS = ("experts swapped", "gate and up swapped")


def swapped_names(kind: str) -> list[tuple[int, str]]:
    """The deltas that a defect changes, in a model of two layers whose experts have a gate."""
    projections = {"experts swapped": PROJECTIONS, "gate and up swapped": ("gate_up",)}[kind]
    return sorted((layer, name) for layer in range(2) for name in projections)


def targets(architecture: str, kind: str) -> list[str]:
    """The target_modules of a kind of adapter."""
    more = {
        "experts": (),
        "attention": ATTENTION.get(architecture, _ATTENTION),
        "router": (ROUTER.get(architecture, "gate"),),
    }
    return ["experts", *more[kind]]


class Case:
    """One architecture: its base, and an adapter of each kind in each format.

    A and B are random, and every update is about as large as the layer's own output.

    Attributes:
        model: the base.
        base: folder with the base's config.json.
        base_model: what conversions know of the base.
    """

    def __init__(self, architecture: str, folder: Path, model: nn.Module | None = None) -> None:
        self.architecture = architecture
        self.model = model or BASES[architecture]()
        self.base = folder / "base"
        self._folder = folder
        self.model.config.architectures = [architecture]
        self.model.config.save_pretrained(self.base)
        if architecture == "NemotronHForCausalLM":
            _use_published_words(self.base / "config.json")
        self.base_model = read_base(self.base)

    def ours(self, kind: str) -> Path:
        """The folder of an adapter of one of `KINDS` or `SWAPS`, in our own format."""
        folder = self._folder / kind
        if not folder.exists() and kind in SWAPS:
            swapped_copy(self.ours("experts"), folder, kind)
        elif not folder.exists():
            self.save(folder, targets(self.architecture, kind))
        return folder

    def save(self, folder: Path, target_modules: list[str], **saving: object) -> None:
        """Write an adapter in our own format; `saving` goes to PEFT's save_pretrained."""
        adapted = moe_lora(copy.deepcopy(self.model), target_modules=target_modules)
        adapted.save_pretrained(folder, **saving)

    def right(self, kind: str) -> Deltas:
        """Our deltas of an adapter."""
        return our_deltas(self.ours(kind), self.base)

    def written(self, kind: str, to: str) -> Path:
        """The folder of an adapter in a format."""
        out = self._folder / f"{kind}-{to}"
        if not out.exists():
            try:
                convert_adapter(self.ours(kind), out, to=to, base_config=self.base)
            except RefusedError:
                write_unchecked(self.ours(kind), self.base, to, out)
        return out

    def verified(self, kind: str, to: str) -> float:
        """The error that `verify` finds between the adapter on experts, or of `kind`, and its copy.

        A copy with a defect of `SWAPS` is compared with the right adapter.
        """
        ours = self.ours("experts" if kind in SWAPS else kind)
        return verify_adapter(ours, self.base_model, self.written(kind, to)).max_error


def _use_published_words(config: Path) -> None:
    """transformers 5.23 writes "full_attention" where published configs say "attention"."""
    config.write_text(config.read_text().replace('"full_attention"', '"attention"'))


def command_of_card(adapter: Path, program: str) -> list[str]:
    """The arguments with which an adapter's model card starts a server."""
    lines = (adapter / "README.md").read_text().splitlines()
    (command,) = (line for line in lines if line.startswith(program))
    return shlex.split(command.removeprefix(program))


def swapped_copy(ours: Path, folder: Path, kind: str) -> None:
    """Write a copy of an adapter in our own format with a defect of `SWAPS`."""
    shutil.copytree(ours, folder)
    rewrite(folder, lambda state: _swapped(state, kind))


def _swapped(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The tensors of our format with a defect of `SWAPS`."""
    changed = dict(state)
    for name, tensor in state.items():
        if kind == "gate and up swapped" and name.endswith("lora_B.gate_up"):
            changed[name] = torch.cat(tensor.chunk(2)[::-1])
        elif kind == "experts swapped" and ".experts.lora_A." in name:
            changed[name] = torch.cat([tensor[R : 2 * R], tensor[:R], tensor[2 * R :]])
        elif kind == "experts swapped" and ".experts.lora_B." in name:
            columns = [tensor[:, R : 2 * R], tensor[:, :R], tensor[:, 2 * R :]]
            changed[name] = torch.cat(columns, 1)
    return changed


def write_unchecked(ours: Path, base: Path, to: str, out: Path) -> None:
    """Write an adapter in a format also where a conversion refuses it.

    So a reader itself shows what it does with such a file.
    """
    form = WRITABLE[to]
    adapter = make_uniform(fill_in(open_adapter(ours, base), PROJECTIONS, to), to)
    out.mkdir()
    write_adapter(adapter, form, out)
