"""A plugin that runs PEFT's own tests of `target_parameters` with `apply_to_peft` in force.

The models of the hub, which these tests load by name, are tiny ones with the same classes:

    pip download --no-deps --no-binary :all: peft==0.21.0 && tar xzf peft-0.21.0.tar.gz
    touch peft-0.21.0/tests/__init__.py
    PYTHONPATH=tests python -m pytest -c /dev/null -p interop.peft_sdist \
        peft-0.21.0/tests/test_target_parameters.py

One test is left out: `test_target_parameter_result_caching_works` counts the weights that PEFT's
own code writes, and here no such weight is written.
"""

import functools
import importlib.machinery
import importlib.util
import sys
import tempfile
import types

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from peft_moe_lora import apply_to_peft
from peft_moe_lora.interop import wrappers

# what the tests feed: ids up to 100, and texts of no tokenizer
_COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# name on the hub -> config class and what it differs in
MODELS = {
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4TextConfig",
        {**_EXPERTS, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 1},
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssConfig", _EXPERTS),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaConfig", {}),
}

WRITES_PEFTS_WEIGHTS = "test_target_parameter_result_caching_works"

_computed = []


@functools.cache
def folder_of(name):
    """A folder with the tiny model that stands for one of the hub."""
    cls, settings = MODELS[name]
    config = getattr(transformers, cls)(**{**_COMMON, **settings})
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def _from_pretrained(own, name, *args, **kwargs):
    if name not in MODELS:
        return own(name, *args, **kwargs)
    model = own(folder_of(name), *args, **kwargs)
    # PEFT writes this name into the adapter's config, and tests load the model by it
    model.config._name_or_path = name
    model.name_or_path = name
    return model


def stand_in_for_diffusers():
    """PEFT's tests import one name of diffusers for tests of images, which do not run here."""
    if importlib.util.find_spec("diffusers") is not None:
        return
    module = types.ModuleType("diffusers")
    module.__spec__ = importlib.machinery.ModuleSpec("diffusers", None)
    module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules["diffusers"] = module


def pytest_configure():
    stand_in_for_diffusers()
    own = AutoModelForCausalLM.from_pretrained
    AutoModelForCausalLM.from_pretrained = functools.partial(_from_pretrained, own)
    compute = wrappers.ExpertsCall.compute

    def counted(call, module, *rows):
        _computed.append(type(module).__name__)
        return compute(call, module, *rows)

    wrappers.ExpertsCall.compute = counted
    apply_to_peft()


def pytest_collection_modifyitems(items):
    reason = "it counts the weights that PEFT's own code writes"
    for item in items:
        if item.name.startswith(WRITES_PEFTS_WEIGHTS):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.line(f"computed by peft_moe_lora: {len(_computed)} calls of experts modules")
