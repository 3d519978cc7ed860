"""A plugin that runs PEFT's own tests of LoRA with the faster forward in its linear layers.

The models of the hub, which these tests load by name, are tiny ones with the same classes:

    pip download --no-deps --no-binary :all: peft==0.21.0 && tar xzf peft-0.21.0.tar.gz
    touch peft-0.21.0/tests/__init__.py
    cd peft-0.21.0/tests
    PYTHONPATH=<this repository>/tests python -m pytest -c /dev/null -p layers.peft_sdist \
        -k "lora or LoRA" test_custom_models.py test_lora_variants.py test_decoder_models.py

It ends with the number of calls that the faster forward computed, and that PEFT's computed. With
`--pefts-forward` PEFT's forward runs everywhere, so that failures with another cause show.

2026-11-30, peft 0.21: of LoRA's tests in test_custom_models, test_lora_variants, test_lorafa,
test_loraplus, test_lora_conversion, test_low_level_api, test_helpers, test_mixed,
test_trainable_tokens, test_lora_intruders, test_initialization and test_decoder_models (Llama and
OPT) 2993 pass and 16 fail. Of these, 15 fail with PEFT's forward too:

- test_lora_conversion (6) and test_low_level_api (3, Bert, Bart and Roberta) load trained or other
  models of the hub;
- test_initialization (2) load models with Mamba layers;
- test_weighted_combination_of_adapters (4) needs layers wider than those of the stand-in.

`test_modules_to_save_targets_lora_layer_raises` expects the path of PEFT's class in a message.
Not run: test_tuners_utils (needs diffusers), test_gpu_examples and test_common_gpu (need a GPU).
"""

import functools
import tempfile

import torch
import transformers
from peft import LoraModel
from peft.tuners import lora
from transformers import AutoModel, AutoModelForCausalLM

from interop.peft_sdist import stand_in_for_diffusers
from peft_moe_lora.layers import fast_linear

# what the tests feed: ids up to 100, and texts of no tokenizer
_SIZES = {"vocab_size": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
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

AUTO = (AutoModel, AutoModelForCausalLM)

_counts = {"fast": 0, "PEFT": 0}


def model_of(name):
    """A tiny model of the classes of one on the hub; None if they are not known."""
    for part, (cls, settings) in MODELS.items():
        if part in str(name) and "lora" not in str(name).lower():
            return cls, settings
    return None


@functools.cache
def folder_of(name, auto):
    """A folder with the tiny model that stands for one of the hub."""
    cls, settings = model_of(name)
    config = getattr(transformers, cls)(**{**_SIZES, **settings})
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    auto.from_config(config).save_pretrained(folder)
    return folder


def _from_pretrained(own, auto, name, *args, **kwargs):
    if model_of(name) is None:
        return own(name, *args, **kwargs)
    kwargs.pop("revision", None)
    model = own(folder_of(name, auto), *args, **kwargs)
    # PEFT writes this name into the adapter's config, and tests load the model by it
    model.config._name_or_path = name
    model.name_or_path = name
    return model


def _counted(kind, forward):
    def counting(layer, *args, **kwargs):
        _counts[kind] += 1
        return forward(layer, *args, **kwargs)

    return counting


def pytest_addoption(parser):
    parser.addoption("--pefts-forward", action="store_true")


def pytest_configure(config):
    fast = not config.getoption("--pefts-forward")
    stand_in_for_diffusers()
    for auto in AUTO:
        auto.from_pretrained = functools.partial(_from_pretrained, auto.from_pretrained, auto)
    create = LoraModel._create_and_replace

    def create_and_replace(model, config, adapter_name, target, target_name, parent, *args, **kw):
        create(model, config, adapter_name, target, target_name, parent, *args, **kw)
        fast_linear.choose_forward(getattr(parent, target_name), adapter_name, fast)

    LoraModel._create_and_replace = create_and_replace
    fast_linear.updated_linear = _counted("fast", fast_linear.updated_linear)
    lora.Linear.forward = _counted("PEFT", lora.Linear.forward)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.line(f"calls of linear layers: {_counts}")
