"""An adapter for a base whose modules have other paths: PEFT's `key_mapping` renames the file."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from helpers import (
    FP32,
    assert_close,
    assert_share_of_order_one,
    assert_unchanged,
    moe_lora,
    snapshot,
    tiny_model,
    token_ids,
)

# `Qwen3MoeForCausalLM` has the paths model.layers..., `Qwen3MoeModel` has layers...
MOVED = {r"^model\.": ""}
EVERYWHERE = ["experts", "gate", "q_proj", "embed_tokens"]


def inner(**changes):
    """The model of `tiny_model` without its head."""
    whole = tiny_model(**changes)
    model = AutoModel.from_config(whole.config)
    model.load_state_dict(whole.model.state_dict())
    return model.eval()


def hidden(model):
    with torch.no_grad():
        return model(input_ids=token_ids(), use_cache=False).last_hidden_state


def saved(folder, **settings):
    model = moe_lora(tiny_model(), **{"target_modules": EVERYWHERE, **settings})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.mul_(1.5)
    model.save_pretrained(folder)
    return hidden(model.get_base_model().model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modules_to_save": ["norm"], "target_modules": ["experts"]},
        {"target_modules": ["experts"], "trainable_token_indices": [5, 9]},
        {"expert_indices": {"layers.1.mlp.experts": [1, 3], "layers.0.mlp.experts": [0]}},
        {"rank_pattern": {"layers.1.mlp.experts": 2}, "alpha_pattern": {"gate": 3}},
    ],
    ids=str,
)
def test_an_adapter_loads_into_a_moved_base(settings, tmp_path):
    expected = saved(tmp_path, **settings)
    loaded = PeftModel.from_pretrained(inner(), tmp_path, key_mapping=MOVED).eval()
    assert_share_of_order_one(hidden(loaded), hidden(inner()))
    assert_close(hidden(loaded), expected, FP32)
    # PEFT wants tokens of every adapter or of none
    tokens = settings.get("trainable_token_indices")
    second = moe_lora(inner(), trainable_token_indices=tokens)
    second.load_adapter(tmp_path, "second", key_mapping=MOVED)
    second.set_adapter("second")
    assert_close(hidden(second), expected, FP32)
    # saved again, its paths are those of the moved base
    loaded.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(inner(), tmp_path / "again").eval()
    assert_close(hidden(again), expected, FP32)


@pytest.mark.parametrize("key_mapping", [None, {r"^model\.layers": "blocks"}], ids=str)
def test_paths_that_do_not_fit_change_nothing(key_mapping, tmp_path):
    saved(tmp_path)
    for model, load in (
        (inner(), PeftModel.from_pretrained),
        (moe_lora(inner()), PeftModel.load_adapter),
    ):
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"misses.*layers\.0\.mlp\.experts"):
            load(model, tmp_path, adapter_name="second", key_mapping=key_mapping)
        assert_unchanged(model, before)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_no_longer_matches_is_named(field, tmp_path):
    saved(tmp_path, **{field: {"model.layers.1.mlp.experts": 2}})
    model = inner()
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{field} gives 2 to 'model\.layers\.1.*new paths"):
        PeftModel.from_pretrained(model, tmp_path, key_mapping=MOVED)
    assert_unchanged(model, before)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config[field] = {"layers.1.mlp.experts": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    PeftModel.from_pretrained(model, tmp_path, key_mapping=MOVED)


def test_keys_without_a_prefix_cannot_be_renamed(tmp_path):
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.removeprefix("base_model.model."): t for key, t in tensors.items()}, file)
    base = inner()
    before = snapshot(base)
    with pytest.raises(ValueError, match="key_mapping renames keys that begin with"):
        PeftModel.from_pretrained(base, tmp_path, key_mapping=MOVED)
    assert_unchanged(base, before)
