"""The view of a model's config that an adapted experts module reads."""

import copy
import pickle

import pytest

from helpers import QWEN3_MOE, build_experts, wrap
from peft_moe_lora.layers.dispatch import AdaptedExpertsConfig


def adapted():
    experts = build_experts(*QWEN3_MOE)
    shared = experts.config
    return wrap(experts).base_model.model.experts, experts, shared


def test_a_view_without_a_config_has_no_attributes():
    """As between making a copy and filling it."""
    view = AdaptedExpertsConfig.__new__(AdaptedExpertsConfig)
    for name in ("hidden_size", "_shared", "__deepcopy__"):
        with pytest.raises(AttributeError, match=name):
            getattr(view, name)


def test_a_copy_of_a_view_is_a_view_however_the_config_copies_itself(monkeypatch):
    layer, experts, shared = adapted()
    monkeypatch.setattr(type(shared), "__deepcopy__", lambda self, memo: self, raising=False)
    twin = copy.deepcopy(layer)
    assert isinstance(twin.base_layer.config, AdaptedExpertsConfig)
    assert twin.base_layer.config._layer is twin
    assert experts.config._layer is layer
    assert twin.base_layer.config._shared is shared


def test_a_view_reads_from_the_config_and_writes_to_it():
    layer, experts, shared = adapted()
    assert experts.config.hidden_size == shared.hidden_size
    experts.config.hidden_size = 77
    assert shared.hidden_size == 77
    experts.config._experts_implementation_of_another = "eager"
    assert shared._experts_implementation_of_another == "eager"
    again = pickle.loads(pickle.dumps(layer))
    assert again.base_layer.config.hidden_size == 77
    assert again.base_layer.config._layer is again
