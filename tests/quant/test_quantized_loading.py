"""A checkpoint is loaded and its experts are quantized on the way.

The numbers are those of quantizing later, and the dense model never exists.
"""

import gc
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Mxfp4Config

from helpers import (
    STORED_FAMILIES,
    E,
    assert_close,
    fill_adapter,
    moe_lora,
    outputs,
    tiny_model,
    token_ids,
)
from peft_moe_lora import load_quantized, quantize_experts
from peft_moe_lora.experts.stored import stored_weight
from peft_moe_lora.ops.quantize import FORMATS
from peft_moe_lora.ops.quantized import QuantizedWeight


@pytest.fixture
def saved(tmp_path):
    """Save a tiny model in several shards, as it is published."""

    def save(family="qwen3_moe", **changes):
        model = tiny_model(family, **changes)
        model.save_pretrained(tmp_path / family, max_shard_size="20KB")
        assert len(list((tmp_path / family).glob("*.safetensors"))) > 1
        return tmp_path / family

    return save


@pytest.mark.parametrize("experts", FORMATS)
@pytest.mark.parametrize("family", STORED_FAMILIES)
def test_it_is_the_model_quantized_after_loading(saved, family, experts):
    path = saved(family)
    loaded = load_quantized(path, experts, double_quant=False)
    after = quantize_experts(
        AutoModelForCausalLM.from_pretrained(path), experts, double_quant=False
    )
    tensors = loaded.state_dict()
    assert tensors.keys() == after.state_dict().keys()
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensors[name], tensor), name
    assert_close(outputs(loaded.eval()), outputs(after.eval()), 1e-6)


def test_the_dense_model_is_never_there(saved, monkeypatch):
    from peft_moe_lora.quant import quantizer

    path = saved(num_hidden_layers=4)
    most, quantize = [], quantizer.quantize

    def is_stack(t):
        if type(t) not in (torch.Tensor, torch.nn.Parameter) or t.device.type != "cpu":
            return False
        return t.is_floating_point() and t.ndim == 3 and t.shape[0] == E

    def stacks():
        return {t.data_ptr(): t.numel() for t in gc.get_objects() if is_stack(t)}

    gc.collect()
    before = stacks()

    def watched(stack, *args, **kwargs):
        most.append(
            sum(n for pointer, n in stacks().items() if pointer not in before) / stack.numel()
        )
        return quantize(stack, *args, **kwargs)

    monkeypatch.setattr(quantizer, "quantize", watched)
    load_quantized(path)
    assert len(most) == 8
    assert max(most) <= 3, "stacks of other layers are alive"


def test_it_trains_with_linear_layers_in_four_bits(saved):
    pytest.importorskip("bitsandbytes", reason="the extra [bitsandbytes] is not installed")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = load_quantized(saved(), quantization_config=config, dtype=torch.float32)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert isinstance(
        stored_weight(model.model.layers[0].mlp.experts, "down_proj"), QuantizedWeight
    )
    # in eval mode bitsandbytes packs a layer again, which fails for rows shorter than a block
    model = moe_lora(model, target_modules=["experts", "q_proj", "v_proj"]).train()
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    for part in ("experts.lora_A", "q_proj.lora_B"):
        assert any(
            part in n and p.grad.abs().max() > 0
            for n, p in model.named_parameters()
            if p.grad is not None
        )


def test_it_trains_with_linear_layers_in_eight_bits(saved):
    pytest.importorskip("bitsandbytes", reason="the extra [bitsandbytes] is not installed")
    path = saved()
    linear = BitsAndBytesConfig(load_in_8bit=True)
    model = load_quantized(path, "int8", quantization_config=linear, dtype=torch.float32)
    alone = load_quantized(path, "int8", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    layer = model.model.layers[0]
    assert type(layer.self_attn.q_proj).__name__ == "Linear8bitLt"
    assert type(model.lm_head) is torch.nn.Linear
    for name in ("gate_up_proj", "down_proj"):
        found = stored_weight(layer.mlp.experts, name)
        expected = stored_weight(alone.model.layers[0].mlp.experts, name)
        assert torch.equal(found.dense(), expected.dense())
    # codes and the largest magnitude of each row
    weight = layer.self_attn.q_proj.weight
    decoded = weight.data * weight.SCB[:, None] / 127
    assert_close(decoded, dense.model.layers[0].self_attn.q_proj.weight, 1e-2)
    model = moe_lora(model, target_modules=["experts", "q_proj", "v_proj"]).train()
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    for part in ("experts.lora_A", "q_proj.lora_B"):
        assert any(
            part in n and p.grad.abs().max() > 0
            for n, p in model.named_parameters()
            if p.grad is not None
        )


def test_the_trainer_takes_it_and_the_adapter_is_saved(saved, tmp_path):
    from peft import PeftModel
    from transformers import Trainer, TrainingArguments

    model = moe_lora(load_quantized(saved()))
    data = [{"input_ids": row, "labels": row} for row in token_ids(batch=8)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, report_to="none", use_cpu=True, save_steps=2
    )
    Trainer(model, arguments, train_dataset=data).train()
    expected = outputs(model.eval()).detach()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_quantized(tmp_path / "qwen3_moe"), tmp_path / "adapter")
    assert_close(outputs(loaded.eval()), expected, 1e-6)
    with pytest.raises(ValueError, match="not serializable"):
        load_quantized(tmp_path / "qwen3_moe").save_pretrained(tmp_path / "base")


# ---- MXFP4 ---------------------------------------------------------------------------------------


@pytest.fixture
def gpt_oss(tmp_path):
    return published(tmp_path / "published")


def published(path, intermediate_size=64):
    """A checkpoint as gpt-oss is published: blocks and scales in the experts' place."""
    model = tiny_model("gpt_oss", intermediate_size=intermediate_size)
    model.save_pretrained(path)
    (file,) = path.glob("*.safetensors")
    tensors, generator = load_file(file), torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        count, K, N = tensors.pop(name).shape
        shape = (count, N, K // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).to(
            torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(122, 125, shape, generator=generator).to(
            torch.uint8
        )
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    return path


def dequantized(path):
    """transformers' own result; 5.17 dequantizes to bf16, whatever dtype is asked for."""
    config = Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float32
    ).float()


def test_gpt_oss_is_kept_in_its_packed_blocks(gpt_oss):
    packed, dense = (
        load_quantized(gpt_oss, "mxfp4", dtype=torch.float32).eval(),
        dequantized(gpt_oss).eval(),
    )
    experts, plain = packed.model.layers[1].mlp.experts, dense.model.layers[1].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        weight = stored_weight(experts, name)
        assert weight.format == "mxfp4"
        assert weight.nbytes < 0.6 * getattr(plain, name).numel()
        assert torch.equal(weight.dense(), getattr(plain, name))
    assert_close(outputs(packed), outputs(dense), 1e-6)


def test_adapters_on_packed_and_on_dequantized_gpt_oss_agree(gpt_oss):
    """`Mxfp4Config(dequantize=True)` gives plain experts, with the packed experts' numbers."""
    found = []
    for base in (load_quantized(gpt_oss, "mxfp4", dtype=torch.float32), dequantized(gpt_oss)):
        model = moe_lora(base, randomize=False)
        fill_adapter(model)
        ids = token_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            | {"out": outputs(model)}
        )
    assert found[0].keys() == found[1].keys()
    for name, expected in found[1].items():
        assert expected.abs().max() > 0
        assert_close(found[0][name], expected, 1e-4, name)


# ---- what is refused -----------------------------------------------------------------------------


def test_refusals_name_what_came_and_the_remedy(saved, gpt_oss):
    with pytest.raises(ValueError, match="experts must be one of"):
        load_quantized(gpt_oss, "int4")
    with pytest.raises(ValueError, match="blocksize must be one of"):
        load_quantized(gpt_oss, "nf4", blocksize=100)
    with pytest.raises(ValueError, match='pass experts="mxfp4"'):
        load_quantized(gpt_oss, "nf4")
    with pytest.raises(ValueError, match="the checkpoint is not quantized"):
        load_quantized(saved(), "mxfp4")
    (shard,) = [
        p for p in saved("olmoe").glob("*.safetensors") if "down_proj" in str(load_file(p).keys())
    ][:1]
    tensors = {n: t for n, t in load_file(shard).items() if "down_proj" not in n}
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ValueError, match="does not hold 1 of 4 parameters of the experts"):
        load_quantized(shard.parent)
    with pytest.raises(ValueError, match="tp_plan='auto': load_quantized quantizes whole stacks"):
        load_quantized(saved("mixtral"), tp_plan="auto")
    with pytest.raises(ValueError, match="load_in_4bit=True"):
        load_quantized(saved("mixtral"), quantization_config=BitsAndBytesConfig())


def damage_blocks(path, damage):
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["blocks", "scales"])
def test_packed_blocks_that_are_not_the_configurations_are_refused(gpt_oss, part):
    name = f"model.layers.1.mlp.experts.down_proj_{part}"
    (file,) = gpt_oss.glob("*.safetensors")
    whole = load_file(file)[name]
    shape = str(list(whole.shape)).replace("[", r"\[")
    wrong = {
        rf"needs {part} {shape}.*holds \[{E - 1}, ": whole[1:].clone(),
        rf"needs {part} {shape}": whole.transpose(1, 2).contiguous(),
        r"of torch\.uint8.*of torch\.int16": whole.to(torch.int16),
    }
    for said, tensor in wrong.items():
        damage_blocks(gpt_oss, lambda t, tensor=tensor: t.update({name: tensor}))
        with pytest.raises(ValueError, match=said) as caught:
            load_quantized(gpt_oss, "mxfp4")
        assert "model.layers.1.mlp.experts.down_proj" in str(caught.value)
    damage_blocks(gpt_oss, lambda t: t.pop(name))
    with pytest.raises(ValueError, match="is made of the tensors"):
        load_quantized(gpt_oss, "mxfp4")


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    path = published(tmp_path / "published", intermediate_size=70)
    said = r"down_proj has rows of 70 values .* MXFP4 needs a multiple of 32"
    with pytest.raises(ValueError, match=said):
        load_quantized(path, "mxfp4")


def test_packed_blocks_that_are_not_finite_are_refused(gpt_oss):
    def damage(tensors):
        tensors["model.layers.0.mlp.experts.gate_up_proj_scales"][3, 2, 0] = 255

    damage_blocks(gpt_oss, damage)
    with pytest.raises(ValueError, match=r"gate_up_proj .*scales of the experts \[3\] are NaN"):
        load_quantized(gpt_oss, "mxfp4")
