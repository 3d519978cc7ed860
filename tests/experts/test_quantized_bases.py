"""Bases that other libraries quantized.

transformers' FP8 experts, gpt-oss' MXFP4 blocks, torchao's 8-bit floats.
"""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.integrations.finegrained_fp8 import (
    ALL_FP8_EXPERTS_FUNCTIONS,
    Fp8Dequantize,
    FP8Experts,
)
from transformers.integrations.moe import use_experts_implementation

from helpers import (
    NEMOTRON_H,
    QWEN3_MOE,
    E,
    H,
    Holder,
    I,
    assert_close,
    assert_share_of_order_one,
    build_experts,
    experts_adapter,
    grads_of,
    random_rows,
    tiny_config,
    wrap,
)
from peft_moe_lora import dequantize_experts, quantize_experts
from peft_moe_lora.experts import stored
from peft_moe_lora.experts.layout import read_layout
from peft_moe_lora.experts.stored import UnsupportedExperts, stored_weight

BLOCKS = [(16, 8), (16, 20), None]


def fp8_experts(
    block_size, scale_fmt="float", has_gate=True, family="qwen3_moe", dtype=torch.float32, **config
):
    """transformers' own class, as its quantizer makes it, with random codes and scales."""
    name = dict([QWEN3_MOE, NEMOTRON_H])[family]
    model_config = tiny_config(family, type(build_experts(family, name)))
    model_config.dtype = dtype
    if family == "nemotron_h":
        model_config.hidden_act = model_config.mlp_hidden_act
        model_config.num_local_experts = E
    for key, value in config.items():
        setattr(model_config, key, value)
    # a new class, because the decorator changes the class that it is given
    cls = use_experts_implementation(
        type("FP8Experts", (FP8Experts,), {}),
        experts_interface=ALL_FP8_EXPERTS_FUNCTIONS,
        has_gate=has_gate,
    )
    module = cls(model_config, block_size=block_size, scale_fmt=scale_fmt, has_gate=has_gate)
    for name, parameter in module.named_parameters():
        if not name.endswith("_scale_inv"):
            scales = getattr(module, f"{name}_scale_inv")
            weight = torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5
            if scale_fmt == "ue8m0":
                scales.data = (
                    torch.randint(118, 122, scales.shape).to(torch.uint8).view(torch.float8_e8m0fnu)
                )
            else:
                scales.data = 0.006 + 0.008 * torch.rand(scales.shape)
            parameter.data = (weight / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
            parameter.requires_grad_(False)
            scales.requires_grad_(False)
    return module


def dense_of(fp8, plain, dtype):
    """A plain experts module with transformers' own dequantization of an FP8 one."""
    for name, parameter in plain.named_parameters():
        weight, scales = getattr(fp8, name), getattr(fp8, f"{name}_scale_inv")
        own = [
            Fp8Dequantize(None)._dequantize_one(w, s, dtype)
            for w, s in zip(weight, scales.float(), strict=True)
        ]
        parameter.data = torch.stack(own)
    return plain


def agree(quantized, plain, rows):
    for model in (quantized, plain):
        assert experts_adapter(model)
    found = []
    for model in (quantized, plain):
        x = rows[0].clone().requires_grad_()
        adapter = [p for n, p in model.named_parameters() if "lora_" in n]
        found.append(grads_of(lambda x=x, model=model: model(x, *rows[1:]), [x, *adapter]))
    with plain.disable_adapter():
        assert_share_of_order_one(found[1][0], plain(*rows).detach())
    assert_close(found[0][0], found[1][0])
    for grad, expected in zip(found[0][1], found[1][1], strict=True):
        assert expected.abs().max() > 0
        assert_close(grad, expected)


# ---- FP8 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
@pytest.mark.parametrize("block_size", BLOCKS, ids=str)
def test_fp8_experts_compute_what_transformers_dequantizes(block_size, scale_fmt):
    fp8 = fp8_experts(block_size, scale_fmt)
    if block_size == (16, 20):
        # transformers' own dequantization does not take a short last tile: from the definition
        plain = build_experts(*QWEN3_MOE)
        for name, parameter in plain.named_parameters():
            scales = (
                getattr(fp8, f"{name}_scale_inv")
                .float()
                .repeat_interleave(16, 1)
                .repeat_interleave(20, 2)
            )
            weight = getattr(fp8, name).float()
            parameter.data = weight * scales[:, : weight.shape[1], : weight.shape[2]]
    else:
        plain = dense_of(fp8, build_experts(*QWEN3_MOE), torch.float32)
    agree(wrap(fp8), wrap(plain), random_rows())


def test_fp8_experts_compile_in_one_graph():
    model = wrap(fp8_experts((16, 8)))
    rows = random_rows()
    adapter = [p for n, p in model.named_parameters() if "lora_" in n]
    out, grads = grads_of(lambda: model(*rows), adapter)
    torch.compiler.reset()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    again, compiled_grads = grads_of(lambda: compiled(*rows), adapter)
    for actual, expected in zip([again, *compiled_grads], [out, *grads], strict=True):
        assert_close(actual, expected)


def test_fp8_experts_without_a_gate():
    fp8 = fp8_experts((8, 8), has_gate=False, family="nemotron_h")
    plain = dense_of(fp8, build_experts(*NEMOTRON_H), torch.float32)
    agree(wrap(fp8), wrap(plain), random_rows())


def test_fp8_experts_compute_in_the_dtype_of_their_config():
    assert (
        stored_weight(fp8_experts((16, 8), dtype=torch.bfloat16), "down_proj").dtype
        == torch.bfloat16
    )
    weight = stored_weight(fp8_experts((16, 8), dtype=torch.bfloat16), "down_proj")
    own = Fp8Dequantize(None)._dequantize_one(weight.codes[1], weight.scales[1], torch.bfloat16)
    assert torch.equal(weight[1], own)
    model = wrap(fp8_experts((16, 8), dtype=torch.bfloat16))
    rows = random_rows(dtype=torch.bfloat16)
    assert model(*rows).dtype == torch.bfloat16


def test_fp8_experts_dispatch_to_the_adapter_and_back():
    fp8 = fp8_experts((16, 8))
    model = wrap(fp8)
    assert fp8.config._experts_implementation == "moe_lora"
    model.unload()
    assert fp8.config._experts_implementation == "eager"


def fp4_in_fp8_experts():
    """FP8Experts in DeepSeek-V4's form, and their projections in fp32 by name.

    Two e2m1 codes in an int8, a power of two for each 32 of a row.
    """
    fp8 = fp8_experts((16, 8))
    expected = {}
    for name, (rows, columns) in {"gate_up_proj": (2 * I, H), "down_proj": (H, 32)}.items():
        codes = torch.randint(-128, 128, (E, rows, columns // 2)).to(torch.int8)
        scales = (
            torch.randint(123, 127, (E, rows, columns // 32))
            .to(torch.uint8)
            .view(torch.float8_e8m0fnu)
        )
        setattr(fp8, name, torch.nn.Parameter(codes, requires_grad=False))
        setattr(fp8, f"{name}_scale_inv", torch.nn.Parameter(scales, requires_grad=False))
        one = Fp8Dequantize(None)._dequantize_one
        expected[name] = torch.stack(
            [one(w, s, torch.float32) for w, s in zip(codes, scales.float(), strict=True)]
        )
    return fp8, expected


def test_fp4_codes_in_fp8_experts():
    fp8, expected = fp4_in_fp8_experts()
    for name, dense in expected.items():
        weight = stored_weight(fp8, name)
        assert weight.shape == dense.shape
        assert torch.equal(weight.dense(), dense)


def test_the_values_of_fp4_codes_are_made_once(monkeypatch):
    monkeypatch.setattr(stored, "_E2M1_CODES", {})
    fp8, _ = fp4_in_fp8_experts()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(stored_weight(fp8, "down_proj").code, FakeTensor)
    with torch.inference_mode():
        first = stored_weight(fp8, "down_proj")
    again = stored_weight(fp8, "down_proj")
    assert again.code is first.code
    # neither the one of the trace nor an inference tensor
    assert type(again.code) is torch.Tensor
    assert not again.code.is_inference()


def test_fp8_experts_are_not_written():
    fp8 = fp8_experts((16, 8))
    with pytest.raises(ValueError, match="stored in fp8 already"):
        quantize_experts(Holder(fp8))
    with pytest.raises(ValueError, match="made for fp8"):
        dequantize_experts(Holder(fp8))
    model = wrap(fp8)
    before = model(*random_rows()).detach()
    with pytest.raises(ValueError, match="merging into fp8 experts is not supported"):
        model.merge_adapter()
    assert torch.equal(model(*random_rows()), before)
    assert not model.base_model.model.experts.merged_adapters


def with_scales_of_no_block(fp8):
    fp8.gate_up_proj_scale_inv = torch.nn.Parameter(torch.ones(E, 5, 7))


def with_codes_e5m2(fp8):
    codes = fp8.gate_up_proj.to(torch.float8_e5m2)
    fp8.gate_up_proj = torch.nn.Parameter(codes, requires_grad=False)


def with_bytes(fp8):
    codes = torch.zeros(E, 2 * I, H, dtype=torch.int8)
    fp8.gate_up_proj = torch.nn.Parameter(codes, requires_grad=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_scales_of_no_block, "do not fit block_size"),
        (with_codes_e5m2, "float8_e5m2"),
        (with_bytes, "4-bit codes need scales"),
    ],
)
def test_fp8_experts_of_another_form_are_refused(change, said):
    fp8 = fp8_experts((16, 8))
    change(fp8)
    with pytest.raises(UnsupportedExperts, match=said):
        wrap(fp8)


# ---- torchao -------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
def test_torchao_float8_weights_are_read(granularity):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base = build_experts(*QWEN3_MOE)
    plain = copy.deepcopy(base)
    for name, parameter in list(base.named_parameters()):
        eight = quantization.Float8Tensor.from_hp(
            parameter.data, granularity=getattr(quantization, granularity)()
        )
        setattr(base, name, torch.nn.Parameter(eight, requires_grad=False))
        dense = eight.dequantize()
        getattr(plain, name).data = dense
        weight = stored_weight(base, name)
        assert weight.dtype == dense.dtype
        assert torch.equal(weight.dense(), dense)
    agree(wrap(base), wrap(plain), random_rows())


def test_other_torchao_weights_are_refused():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    base = build_experts(*QWEN3_MOE, hidden=128, intermediate=128, dtype=torch.bfloat16)
    eight = quantization.Int8Tensor.from_hp(base.down_proj.data, quantization.PerRow())
    base.down_proj = torch.nn.Parameter(eight, requires_grad=False)
    with pytest.raises(UnsupportedExperts, match="Int8Tensor"):
        read_layout(base)
