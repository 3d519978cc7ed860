"""A release of PEFT or transformers whose variables have other names is an error, not a skip."""

import pytest

from peft_moe_lora.tuner.loading import current_load
from peft_moe_lora.tuner.whole import is_written

FUNCTION = "def {name}(call, {arguments}): return call()"


def within(module, name, arguments, call, *values):
    """What `call` returns within a function of this name and these arguments in a module."""
    namespace = {"__name__": module}
    exec(FUNCTION.format(name=name, arguments=arguments), namespace)
    return namespace[name](call, *values)


def of_peft(arguments, *values):
    return within("peft.peft_model", "load_adapter", arguments, current_load, *values)


def test_a_loader_of_peft_is_read():
    load = of_peft("model_id, key_mapping, **kwargs", "folder", {"a": "b"})
    assert (load.source, load.key_mapping, load.by_transformers) == ("folder", {"a": "b"}, False)


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ("name, key_mapping, kwargs", "model_id"),
        ("model_id, mapping, kwargs", "key_mapping"),
        ("model_id, key_mapping, options", "kwargs"),
    ],
)
def test_a_loader_of_peft_with_other_names_is_an_error(arguments, missing):
    with pytest.raises(RuntimeError, match=f"load_adapter .* has no variable {missing}"):
        of_peft(arguments, "folder", {}, {})


@pytest.mark.parametrize("missing", ["peft_model_id", "adapter_state_dict", "load_config"])
def test_a_loader_of_transformers_with_other_names_is_an_error(missing):
    arguments = "peft_model_id, adapter_state_dict, load_config".replace(missing, "other")
    with pytest.raises(RuntimeError, match=f"has no variable {missing}"):
        within(
            "transformers.integrations.peft",
            "load_adapter",
            arguments,
            current_load,
            *("folder", None, None),
        )


def test_other_functions_of_these_modules_load_nothing():
    assert within("peft.peft_model", "helper", "model_id", current_load, "folder") is None
    assert within("elsewhere", "load_adapter", "model_id", current_load, "folder") is None


@pytest.mark.parametrize("module", ["peft.peft_model", "transformers.modeling_utils"])
def test_a_saver_is_read_or_an_error(module):
    def saver(arguments, is_main_process):
        return within(module, "save_pretrained", arguments, is_written, is_main_process)

    assert saver("is_main_process", True)
    assert not saver("is_main_process", False)
    with pytest.raises(RuntimeError, match="has no variable is_main_process"):
        saver("main", True)
    assert not is_written()
