"""Modules that share a weight: an update of one does not reach the other through a merge."""

import pytest

from helpers import assert_close, assert_unchanged, moe_lora, outputs, snapshot, tiny_model

SHARED = {
    "experts": ("mlp.experts", "down_proj"),
    "q_proj": ("self_attn.q_proj", "weight"),
}


def sharing(target):
    model = tiny_model()
    path, name = SHARED[target]
    first, second = (layer.get_submodule(path) for layer in model.model.layers)
    setattr(second, name, getattr(first, name))
    return model


@pytest.mark.parametrize("layers", [None, [1]], ids=["both adapted", "one adapted"])
@pytest.mark.parametrize("target", SHARED)
def test_a_shared_weight_is_not_merged_into(target, layers):
    model = moe_lora(sharing(target), target_modules=[target], layers_to_transform=layers)
    expected, before = outputs(model), snapshot(model)
    with pytest.raises(ValueError, match="with another module, which would change too"):
        model.merge_adapter()
    assert_unchanged(model, before)
    assert_close(outputs(model.merge_and_unload()), expected)


def test_weights_that_are_not_shared_are_merged():
    model = moe_lora(sharing("q_proj"), target_modules=["experts", "k_proj"])
    expected = outputs(model)
    model.merge_adapter()
    assert_close(outputs(model), expected)
