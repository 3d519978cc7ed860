"""A merge that is refused leaves the whole model as it was, also the layers before the bad one."""

import pytest
import torch
from accelerate import cpu_offload

from helpers import assert_unchanged, moe_lora, outputs, snapshot, tiny_model
from peft_moe_lora.layers.layer import MoELoraLayer

TARGETS = ["experts", "gate", "q_proj", "embed_tokens"]
MERGES = ["merge_adapter", "merge_and_unload"]


def adapted():
    return moe_lora(tiny_model(), target_modules=TARGETS)


def experts_of(model):
    return [layer for layer in model.modules() if isinstance(layer, MoELoraLayer)]


@pytest.mark.parametrize("merge", MERGES)
def test_experts_that_can_only_be_read(merge, monkeypatch):
    """Attention is merged before the experts, and its adapter would be gone."""
    from peft_moe_lora import quantize_experts
    from peft_moe_lora.experts import decoding

    model = adapted()
    quantize_experts(model, "int8")
    # as MXFP4 and FP8 are
    monkeypatch.setattr(decoding, "FORMATS", ("nf4",))
    before = snapshot(model)
    with pytest.raises(ValueError, match="merging into int8 experts is not supported"):
        getattr(model, merge)()
    assert_unchanged(model, before)
    assert not any(layer.merged for layer in experts_of(model))


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("last", ["experts.lora_B.default.down", "q_proj.lora_B.default.weight"])
def test_an_adapter_that_is_not_finite_in_its_last_layer(merge, last):
    model = adapted()
    named = dict(model.named_parameters())
    with torch.no_grad():
        named[[name for name in named if name.endswith(last)][-1]][0, 0] = float("nan")
    before = snapshot(model)
    state = {name: tensor.nan_to_num() for name, tensor in before["state"].items()}
    with pytest.raises(ValueError, match="NaNs detected"):
        getattr(model, merge)(safe_merge=True)
    after = snapshot(model)
    assert after["modules"] == before["modules"]
    for name, tensor in after["state"].items():
        assert torch.equal(tensor.nan_to_num(), state[name]), name


@pytest.mark.parametrize("merge", MERGES)
def test_what_is_finite_is_merged_safely_also_where_it_is_offloaded(merge):
    for model in (adapted(), moe_lora(cpu_offload(tiny_model(), torch.device("cpu")))):
        expected = outputs(model)
        merged = getattr(model, merge)(safe_merge=True) or model
        assert torch.allclose(outputs(merged), expected, atol=1e-4)
