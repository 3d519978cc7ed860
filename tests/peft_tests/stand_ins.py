"""What PEFT's tests load from the hub by name, as tiny models of the same classes made here."""

import functools
import importlib.machinery
import importlib.util
import sys
import tempfile
import types

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

# what the tests feed: ids up to 100, and texts of no tokenizer
_SIZES = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# some tests ask for rank 20, which no side of a layer may be below
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LLAMA4 = {**_LLAMA, **_EXPERTS, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1}
_GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
_OPT = {
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

# a part of a name on the hub -> config class and its settings; the first that fits is taken
MODELS = {
    "Llama4ForCausalLM": ("Llama4TextConfig", _LLAMA4),
    "GptOssForCausalLM": ("GptOssConfig", {**_LLAMA, **_EXPERTS}),
    "OPTForCausalLM": ("OPTConfig", _OPT),
    "opt-125m": ("OPTConfig", _OPT),
    "GPT2LMHeadModel": ("GPT2Config", _GPT),
    "gpt2": ("GPT2Config", _GPT),
    "GPTJForCausalLM": ("GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "LlamaForCausalLM": ("LlamaConfig", _LLAMA),
    "MistralForCausalLM": ("MistralConfig", _LLAMA),
    "qwen2": ("Qwen2Config", _LLAMA),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", _LLAMA),
}
_AUTO = (AutoModel, AutoModelForCausalLM)


def install():
    """Let transformers load the tiny models, and let the tests import what they do not need."""
    _stand_in_for_diffusers()
    for auto in _AUTO:
        auto.from_pretrained = functools.partial(_from_pretrained, auto.from_pretrained, auto)


def skip(items, reasons):
    """Skip the tests that cannot run.

    Args:
        items: the collected tests.
        reasons: a part of a test's name -> why it cannot run.
    """
    for item in items:
        for part, reason in reasons.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


def _model_of(name):
    """Config class and settings that stand for a name on the hub; None if they are not known."""
    for part, found in MODELS.items():
        # a name with "lora" is of an adapter
        if part in str(name) and "lora" not in str(name).lower():
            return found
    return None


@functools.cache
def _folder_of(name, auto):
    """A folder with the tiny model that stands for one of the hub."""
    cls, settings = _model_of(name)
    config = getattr(transformers, cls)(**{**_SIZES, **settings})
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    auto.from_config(config).save_pretrained(folder)
    return folder


def _from_pretrained(own, auto, name, *args, **kwargs):
    if _model_of(name) is None:
        return own(name, *args, **kwargs)
    kwargs.pop("revision", None)
    model = own(_folder_of(name, auto), *args, **kwargs)
    # PEFT writes this name into the adapter's config, and tests load the model by it
    model.config._name_or_path = name
    model.name_or_path = name
    return model


def _stand_in_for_diffusers():
    """PEFT's tests import one name of diffusers for tests of images, which do not run here."""
    if importlib.util.find_spec("diffusers") is not None:
        return
    module = types.ModuleType("diffusers")
    module.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = module
