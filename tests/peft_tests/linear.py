"""A plugin of pytest: PEFT's tests of LoRA with the faster forward in its linear layers.

With `--pefts-forward` PEFT's forward runs everywhere, so that failures with another cause show.
"""

from peft import LoraModel
from peft.tuners import lora

from peft_moe_lora.layers import fast_linear
from peft_tests import stand_ins

_HUB = "it loads an adapter or a model of the hub that no stand-in is made for"

# a part of a test's name -> why it cannot run
LEFT_OUT = {
    "test_converting_transformers_model_works": _HUB,
    "test_converted_lora_approximates_original_adapter": _HUB,
    "test_model_without_peft_config": _HUB,
    "test_converted_lora_with_multiple_adapters": _HUB,
    "test_convert_float16_dtype": _HUB,
    "[LoRA-Bert]": _HUB,
    "[LoRA-Bart]": _HUB,
    "[LoRA-Roberta]": _HUB,
    "test_lora_incompatible_mamba_modules": _HUB,
    "test_nemotron_h_has_defaults_and_blocks_mamba_modules": _HUB,
    "test_modules_to_save_targets_lora_layer_raises": "it expects the path of PEFT's class in a "
    "message",
}

_counts = {"fast": 0, "PEFT": 0}


def _counted(kind, forward):
    def counting(layer, *args, **kwargs):
        _counts[kind] += 1
        return forward(layer, *args, **kwargs)

    return counting


def pytest_addoption(parser):
    parser.addoption("--pefts-forward", action="store_true")


def pytest_configure(config):
    fast = not config.getoption("--pefts-forward")
    stand_ins.install()
    create = LoraModel._create_and_replace

    def create_and_replace(model, config, adapter_name, target, target_name, parent, *args, **kw):
        create(model, config, adapter_name, target, target_name, parent, *args, **kw)
        fast_linear.choose_forward(getattr(parent, target_name), adapter_name, fast)

    LoraModel._create_and_replace = create_and_replace
    fast_linear.updated_linear = _counted("fast", fast_linear.updated_linear)
    lora.Linear.forward = _counted("PEFT", lora.Linear.forward)


def pytest_collection_modifyitems(items):
    stand_ins.skip(items, LEFT_OUT)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.line(f"computed by PEFT: {_counts['PEFT']}")
    terminalreporter.line(f"computed by peft_moe_lora: {_counts['fast']}")
