"""Adapters on experts in 4 and 8 bits give the numbers of the decoded weights.

No decoded weight is kept.
"""

import copy
import functools

import pytest
import torch
from torch.nn.utils import parametrize

from helpers import (
    GPT_OSS,
    QWEN3_MOE,
    H,
    Holder,
    I,
    R,
    assert_close,
    assert_share_of_order_one,
    build_experts,
    fill_adapter,
    grads_of,
    moe_lora,
    one_of_each_kind,
    outputs,
    random_rows,
    tiny_model,
    token_ids,
    train,
    wrap,
)
from peft_moe_lora import dequantize_experts, quantize_experts
from peft_moe_lora.experts.layout import read_layout
from peft_moe_lora.experts.stored import UnsupportedExperts, stored_weight
from peft_moe_lora.ops import reference
from peft_moe_lora.ops.quantize import BLOCKSIZES, quantize, quantize_like
from peft_moe_lora.ops.quantized import QuantizedWeight, _power_of_2

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="the extra [bitsandbytes] is not installed"
)
bnb = bitsandbytes.functional

SETTINGS = [
    {"format": "nf4"},
    {"format": "nf4", "double_quant": False},
    {"format": "fp4", "blocksize": 128},
    {"format": "int8"},
]
ids = lambda s: "-".join(map(str, s.values())) if isinstance(s, dict) else str(s)  # noqa: E731
settings = pytest.mark.parametrize("setting", SETTINGS, ids=ids)
FAMILIES = one_of_each_kind()


def bnb_dequantized(packed, state, shape):
    """bitsandbytes' plain decoding.

    Its code for AVX-512 misreads rows whose length is not a multiple of the block.
    """
    from bitsandbytes.backends.default import ops

    plain = ops._dequantize_4bit_compute.__wrapped__
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return plain(packed.view(-1), scales, state.code, state.blocksize, shape, state.dtype)


def bnb_parametrized(shape, dtype, **options):
    """A module with one parameter that bitsandbytes quantized, and the original parameter."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    module = torch.nn.Module()
    module.weight = torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype))
    before = module.weight.detach().clone()
    replace_parameter_4bit(module, "weight", **options)
    return module, before


# ---- the formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
# rows and experts that are multiples of the block, or not; an odd number of weights
@pytest.mark.parametrize("shape", [(2, 64, 128), (3, 50, 30), (5, 7, 9), (3, 64, 96)], ids=str)
def test_decoding_is_bitsandbytes_own_bit_for_bit(shape, format, nested, dtype):
    for blocksize in BLOCKSIZES:
        module, _ = bnb_parametrized(
            shape, dtype, quant_type=format, blocksize=blocksize, compress_statistics=nested
        )
        weight = stored_weight(module, "weight")
        state = module.parametrizations.weight[0].quant_state
        expected = bnb_dequantized(module.parametrizations.weight.original, state, shape)
        assert weight.shape == shape
        assert weight.dtype == dtype
        assert torch.equal(weight.dense(), expected)
        assert torch.equal(weight[1], expected[1])
        if shape[-1] % blocksize == 0:
            assert torch.equal(module.weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(2, 64, 128), (3, 50, 30), (5, 7, 9)], ids=str)
def test_quantizing_is_bitsandbytes_own_bit_for_bit(shape, format, dtype):
    for blocksize in BLOCKSIZES:
        stack = (torch.randn(shape) * 0.02).to(dtype)
        packed, state = bnb.quantize_4bit(stack, blocksize=blocksize, quant_type=format)
        ours = quantize(stack, format, blocksize=blocksize, double_quant=False)
        assert torch.equal(ours.packed, packed.view(-1))
        assert torch.equal(ours.scales, state.absmax)
        assert torch.equal(ours.code, state.code)
        _, state = bnb.quantize_4bit(
            stack, blocksize=blocksize, quant_type=format, compress_statistics=True
        )
        nested = quantize(stack, format, blocksize=blocksize)
        assert torch.equal(nested.packed, ours.packed)
        # a single block equals the mean of its kind: 0, or the smallest number there is
        torch.testing.assert_close(nested.nested_scales, state.state2.absmax, rtol=1e-9, atol=1e-37)
        assert torch.equal(nested.nested_code, state.state2.code)
        assert torch.equal(nested.offset, state.offset)
        if len(state.absmax) == 1:
            continue
        # its code for CPUs searches a table; once in a thousand it takes the second nearest value
        assert (nested.scales.int() - state.absmax.int()).abs().max() <= 1
        assert (nested.scales != state.absmax).float().mean() <= max(0.02, 1 / len(nested.scales))


def test_a_stack_larger_than_a_slice_is_quantized_as_one(monkeypatch):
    stack = torch.randn(5, 48, 30)
    whole = quantize(stack, "nf4", blocksize=64)
    monkeypatch.setattr("peft_moe_lora.ops.quantize.SLICE", 1024)
    sliced = quantize(stack, "nf4", blocksize=64)
    assert all(torch.equal(a, b) for a, b in zip(whole.tensors(), sliced.tensors(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_int8_is_bitsandbytes_own_bit_for_bit(dtype):
    stack = (torch.randn(3, 10, 30) * 0.02).to(dtype)
    codes, scales, _ = bnb.int8_vectorwise_quant(stack.view(-1, 30))
    ours = quantize(stack, "int8")
    assert torch.equal(ours.codes, codes.view(3, 10, 30))
    assert torch.equal(ours.scales.view(-1), scales)
    assert torch.equal(
        ours.dense(), bnb.int8_vectorwise_dequant(codes, scales).to(dtype).view(3, 10, 30)
    )
    stack[1, 2] = 0
    assert not quantize(stack, "int8").dense()[1, 2].any(), "a row of zeros is zeros"


@settings
def test_requantizing_what_was_decoded_changes_nothing(setting):
    weight = quantize(torch.randn(4, 16, 64), **setting).transpose(1, 2)
    again = quantize_like(weight, weight.dense())
    assert again.shape == weight.shape == (4, 64, 16)
    assert_close(again.dense(), weight.dense(), 1e-2)
    assert again.nbytes == weight.nbytes


def test_a_scale_of_8_bits_is_a_power_of_2():
    """The smallest, 2**-127, is no normal number of fp32; 255 is no number."""
    exponents = torch.arange(255, dtype=torch.uint8)
    expected = torch.full((255,), 2.0, dtype=torch.float64) ** (exponents.double() - 127)
    assert torch.equal(_power_of_2(exponents).double(), expected)


def test_four_bits_are_four_bits():
    stack = torch.randn(4, 256, 256, dtype=torch.bfloat16)
    assert quantize(stack, "nf4").nbytes / stack.numel() * 8 == pytest.approx(4.127, abs=0.05)
    assert quantize(stack, "nf4", double_quant=False).nbytes / stack.numel() * 8 == pytest.approx(
        4.5, abs=0.01
    )
    assert quantize(stack, "int8").nbytes / stack.numel() * 8 == pytest.approx(8.13, abs=0.01)


@pytest.mark.parametrize(("stack", "options", "said"), [
    (torch.randn(2, 4, 4), {"format": "int4"}, "format must be one of"),
    (torch.randn(2, 4, 4), {"format": "nf4", "blocksize": 48}, "blocksize must be one of"),
    (torch.full((2, 4, 4), float("nan")), {"format": "nf4"}, "NaN or infinity"),
    (torch.full((2, 4, 4), float("inf")), {"format": "int8"}, "NaN or infinity"),
])  # fmt: skip
def test_what_cannot_be_quantized_is_said(stack, options, said):
    with pytest.raises(ValueError, match=said):
        quantize(stack, **options)


def test_the_twin_decodes_the_experts_that_have_rows_and_no_others():
    weight = quantize(torch.randn(6, 8, 64), "nf4")
    # experts 1 and 4 have no rows
    offsets = torch.tensor([0, 2, 2, 5, 6, 6, 9], dtype=torch.int32)
    out = torch.full((3, 8, 64), float("nan"))
    assert reference.dequantize(weight, offsets, 2, out) is out
    assert torch.equal(out[0], weight[2])
    assert torch.equal(out[1], weight[3])
    assert out[2].isnan().all()


# ---- adapters ------------------------------------------------------------------------------------


def pair(family, name, setting, dtype=torch.float32, **config):
    """The same adapter on quantized experts and on the dense weights they stand for."""
    quantized = quantize_experts(
        Holder(build_experts(family, name, dtype=dtype)), **setting
    ).experts
    dense = dequantize_experts(Holder(copy.deepcopy(quantized))).experts
    assert isinstance(dense.down_proj, torch.nn.Parameter)
    return wrap(quantized, **config), wrap(dense, **config)


def gradients(model, rows, compiled=None):
    x, index, weights = rows
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    adapter = [p for n, p in model.named_parameters() if "lora_" in n]
    call = model if compiled is None else compiled
    return grads_of(lambda: call(x, index, weights), [x, weights, *adapter])


@settings
@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_layer_computes_what_it_does_on_the_dense_weights(family, name, setting):
    quantized, dense = pair(family, name, setting, r=R)
    rows = random_rows()
    out, grads = gradients(quantized, rows)
    expected, expected_grads = gradients(dense, rows)
    with quantized.disable_adapter():
        assert_share_of_order_one(out, quantized(*rows).detach())
    assert_close(out, expected)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert other.abs().max() > 0
        assert_close(grad, other)


@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_an_adapter_on_one_projection(projection):
    quantized, dense = pair(*QWEN3_MOE, SETTINGS[0], target_projections=[projection])
    rows = random_rows()
    (out, grads), (expected, expected_grads) = gradients(quantized, rows), gradients(dense, rows)
    for a, b in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert_close(a, b)


def test_several_adapters_active_at_once():
    quantized, dense = pair(*GPT_OSS, SETTINGS[0])
    for model in (quantized, dense):
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        fill_adapter(model, "second", seed=5)
        model.base_model.set_adapter(["default", "second"])
    rows = random_rows()
    with torch.no_grad():
        assert_close(quantized(*rows), dense(*rows))


def test_recompute_and_dropout_decode_anew():
    quantized, dense = pair(*QWEN3_MOE, SETTINGS[0], recompute=True, lora_dropout=0.3)
    rows, found = random_rows(), []
    for model in (quantized, dense):
        torch.manual_seed(1)
        found.append(gradients(model.train(), rows))
    for a, b in zip((found[0][0], *found[0][1]), (found[1][0], *found[1][1]), strict=True):
        assert_close(a, b)


def test_only_experts_with_rows_are_decoded_and_none_is_kept(monkeypatch):
    decoded, alive = [], []
    decode = QuantizedWeight.__subclasses__()[0].decode

    @functools.wraps(decode)
    def watched(self, first, count):
        out = decode(self, first, count)
        decoded.append(first)
        assert count == 1
        assert sum(ref() is not None for ref in alive) <= 1, "decoded experts pile up"
        alive.append(__import__("weakref").ref(out))
        return out

    monkeypatch.setattr(QuantizedWeight.__subclasses__()[0], "decode", watched)
    model, _ = pair(*QWEN3_MOE, SETTINGS[0])
    decoded.clear(), alive.clear()
    x, index, weights = random_rows()
    x.requires_grad_()
    out = model(x, torch.where(index == 2, 3, index).clamp(max=3) % 4, weights)
    assert set(decoded) == {0, 1, 3}
    assert not any(ref() is not None for ref in alive), "forward keeps a dense expert"
    out.sum().backward()
    assert decoded.count(2) == 0
    assert decoded.count(3) == 4, "two projections, forward and backward"


def test_no_tokens_and_sentinels():
    model, dense = pair(*QWEN3_MOE, SETTINGS[3])
    x, index, weights = random_rows()
    assert model(x[:0], index[:0], weights[:0]).shape == (0, H)
    index[3, 0], index[5, 1] = 5, 99
    with torch.no_grad():
        assert_close(model(x, index, weights), dense(x, index, weights))


def test_bf16_experts_stay_bf16():
    model, dense = pair(*QWEN3_MOE, SETTINGS[0], dtype=torch.bfloat16)
    rows = random_rows(dtype=torch.bfloat16)
    (out, grads), (expected, _) = gradients(model, rows), gradients(dense, rows)
    assert out.dtype == grads[0].dtype == torch.bfloat16
    assert_close(out, expected, 4e-2)


def test_a_module_moved_and_cast_keeps_its_scales():
    experts = quantize_experts(Holder(build_experts(*QWEN3_MOE))).experts
    before = stored_weight(experts, "gate_up_proj")
    after = stored_weight(experts.to(torch.bfloat16), "gate_up_proj")
    assert all(
        torch.equal(a, b) and a.dtype == b.dtype
        for a, b in zip(before.tensors(), after.tensors(), strict=True)
    )
    assert after.dtype == torch.bfloat16
    assert experts.gate_up_proj.dtype == torch.bfloat16
    assert torch.equal(after.dense(), before.dense().bfloat16())
    assert stored_weight(experts.to("meta"), "down_proj").device.type == "meta"


# of 4 bits the short set has the one with the most tensors
@pytest.mark.parametrize(
    "setting",
    [
        SETTINGS[0],
        SETTINGS[3],
        *(pytest.param(setting, marks=pytest.mark.long) for setting in SETTINGS[1:3]),
    ],
    ids=ids,
)
def test_compiled_in_one_graph_with_the_same_gradients(setting):
    model, dense = pair(*QWEN3_MOE, setting)
    torch.compiler.reset()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    rows = random_rows()
    out, grads = gradients(model, rows, compiled)
    expected, expected_grads = gradients(dense, rows)
    assert_close(out, expected)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert_close(grad, other)


@pytest.mark.parametrize("nested", [pytest.param(False, marks=pytest.mark.long), True])
def test_what_bitsandbytes_quantized_compiles_in_one_graph(nested):
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    experts = build_experts(*QWEN3_MOE)
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(experts, name, quant_type="nf4", compress_statistics=nested)
    model = wrap(experts)
    rows = random_rows()
    expected = gradients(model, rows)
    torch.compiler.reset()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    found = gradients(model, rows, compiled)
    assert_close(found[0], expected[0])
    for grad, other in zip(found[1], expected[1], strict=True):
        assert other.abs().max() > 0
        assert_close(grad, other)


def test_checkpointing_and_a_whole_model_train():
    ids = token_ids()
    model = moe_lora(quantize_experts(tiny_model()), target_modules=["experts", "q_proj", "v_proj"])
    plain = moe_lora(
        dequantize_experts(quantize_experts(tiny_model())),
        target_modules=["experts", "q_proj", "v_proj"],
    )
    assert_close(outputs(model), outputs(plain))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    losses = train(model.train(), ids)
    assert losses[-1] < 0.8 * losses[0]


def test_an_adapter_is_saved_and_loaded(tmp_path):
    from peft import PeftModel

    model = moe_lora(quantize_experts(tiny_model("gpt_oss")))
    expected = outputs(model).detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantize_experts(tiny_model("gpt_oss")), tmp_path)
    assert_close(outputs(loaded), expected, 1e-6)


@pytest.mark.parametrize("first", ["adapter", "offload"])
def test_experts_that_accelerate_offloads(first):
    from accelerate import cpu_offload

    right = moe_lora(quantize_experts(tiny_model()))
    outputs(right).square().mean().backward()
    model = quantize_experts(tiny_model())
    if first == "offload":
        cpu_offload(model, execution_device=torch.device("cpu"))
    model = moe_lora(model)
    if first == "adapter":
        cpu_offload(model, execution_device=torch.device("cpu"))
    experts = model.base_model.model.model.layers[0].mlp.experts.base_layer
    assert stored_weight(experts, "down_proj").device.type == "meta", (
        "nothing is offloaded: the test proves nothing"
    )
    assert_close(outputs(model), outputs(right), 1e-6)
    with model.disable_adapter():
        plain = outputs(model)
    assert_share_of_order_one(outputs(right), plain)
    if first == "offload":
        outputs(model).square().mean().backward()
        for name, parameter in right.named_parameters():
            if parameter.grad is not None:
                assert_close(dict(model.named_parameters())[name].grad, parameter.grad, 1e-6, name)


def test_weights_left_on_another_device_are_refused():
    model, _ = pair(*QWEN3_MOE, SETTINGS[0])
    stored = model.base_model.model.experts.base_layer.parametrizations.down_proj
    stored.original = torch.nn.Parameter(stored.original.to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"on cpu and nf4 weights on \['cpu', 'meta'\]"):
        model(*random_rows())


def test_an_adapter_on_some_experts():
    chosen = {"experts": [0, 3]}
    quantized, dense = pair(*QWEN3_MOE, SETTINGS[0], expert_indices=chosen)
    rows = random_rows()
    (out, grads), (expected, expected_grads) = gradients(quantized, rows), gradients(dense, rows)
    for a, b in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert_close(a, b)
    layer = quantized.base_model.model.experts
    before = stored_weight(layer.base_layer, "down_proj").dense()
    layer.merge()
    changed = (stored_weight(layer.base_layer, "down_proj").dense() - before).flatten(1).norm(dim=1)
    assert changed[[0, 3]].min() > 5 * changed[[1, 2, 4]].max()


def test_quantizing_under_an_adapter_is_quantizing_before_it():
    under = quantize_experts(moe_lora(tiny_model()))
    before = moe_lora(quantize_experts(tiny_model()))
    assert_close(outputs(under), outputs(before), 1e-6)


def test_experts_that_bitsandbytes_quantized():
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    base = build_experts(*QWEN3_MOE, hidden=64, intermediate=64)
    dense = copy.deepcopy(base)
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(base, name, compress_statistics=True, quant_type="nf4", blocksize=64)
        getattr(dense, name).data.copy_(getattr(base, name))
    quantized, plain = wrap(base), wrap(dense)
    rows = random_rows(hidden=64)
    (out, grads), (expected, expected_grads) = gradients(quantized, rows), gradients(plain, rows)
    for a, b in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert_close(a, b)
    with quantized.disable_adapter():
        assert_share_of_order_one(out, quantized(*rows).detach())


def flattened(experts):
    """bitsandbytes' parameters of experts, with the shape [E * R, C] instead of [E, R, C]."""
    for name in ("gate_up_proj", "down_proj"):
        state = experts.parametrizations[name][0].quant_state
        state.shape = torch.Size((state.shape[0] * state.shape[1], state.shape[2]))
    return experts


def test_experts_that_were_flattened_before_bitsandbytes_quantized_them():
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    base = build_experts(*QWEN3_MOE, hidden=64, intermediate=32)
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(base, name, compress_statistics=True, quant_type="nf4", blocksize=64)
    stacks = wrap(copy.deepcopy(base))
    rows = random_rows(hidden=64)
    expected, expected_grads = gradients(stacks, rows)
    found, grads = gradients(wrap(flattened(base)), rows)
    for a, b in zip((found, *grads), (expected, *expected_grads), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("num_experts", [None, 0, 7])
def test_a_flattened_stack_needs_the_number_of_experts(num_experts):
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    base = build_experts(*QWEN3_MOE, hidden=64, intermediate=64)
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(base, name, quant_type="nf4", blocksize=64)
    base.num_experts = num_experts
    with pytest.raises(UnsupportedExperts, match="adapters need a 3-D stack"):
        wrap(flattened(base))


def test_linear_layers_in_four_bits_beside_them():
    model = tiny_model()
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            linear = getattr(layer.self_attn, name)
            four = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, bias=False, quant_type="nf4"
            )
            four.weight = bitsandbytes.nn.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4"
            )
            setattr(layer.self_attn, name, four.to("cpu"))
    model.is_loaded_in_4bit = True
    model = moe_lora(quantize_experts(model), target_modules=["experts", "q_proj", "v_proj"])
    assert type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = [
        n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    ]
    assert any("experts.lora_A" in n for n in trained)
    assert any("q_proj.lora_A" in n for n in trained)


# ---- merging -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), [QWEN3_MOE, GPT_OSS])
@settings
def test_merging_requantizes_and_says_what_that_cost(family, name, setting, caplog):
    model, dense = pair(family, name, setting)
    layer, other, rows = (
        model.base_model.model.experts,
        dense.base_model.model.experts,
        random_rows(),
    )
    packed = [t.clone() for t in stored_weight(layer.base_layer, "down_proj").tensors()]
    before = model(*rows).detach()
    layer.merge()
    before_merging = {
        name: getattr(other.base_layer, name).clone() for name in ("gate_up_proj", "down_proj")
    }
    other.merge()
    assert "requantizing changes" in caplog.text
    for projection, attribute in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
        weight, exact = (getattr(each.base_layer, attribute) for each in (layer, other))
        update = exact - before_merging[attribute]
        error = ((weight - exact).norm() / update.norm()).item()
        assert layer.merge_errors[projection] == pytest.approx(error, rel=1e-3)
        assert 0 < error < (0.05 if setting["format"] == "int8" else 0.6)
    assert_close(model(*rows), dense(*rows), 0.05 if setting["format"] == "int8" else 0.6)
    layer.unmerge()
    after = stored_weight(layer.base_layer, "down_proj").tensors()
    assert all(torch.equal(a, b) for a, b in zip(packed, after, strict=True)), "unmerging is exact"
    assert torch.equal(model(*rows), before)
    assert not layer.merge_errors


def test_merging_into_dense_experts_keeps_the_update():
    model, _ = pair(*QWEN3_MOE, SETTINGS[0])
    rows = random_rows()
    expected = model(*rows).detach()
    dequantize_experts(model)
    merged = model.merge_and_unload()
    assert_close(merged(*rows), expected)
    assert not parametrize.is_parametrized(merged.experts)


def test_merging_two_adapters_one_after_the_other_requantizes_from_the_first_weights():
    model, dense = pair(*QWEN3_MOE, SETTINGS[3])
    layer = model.base_model.model.experts
    for each in (model, dense):
        each.add_adapter("second", copy.deepcopy(each.peft_config["default"]))
        fill_adapter(each, "second", seed=5)
        each.base_model.model.experts.merge(adapter_names=["default"])
        each.base_model.model.experts.merge(adapter_names=["second"])
    original = layer.unmerged_weights["down"]
    exact = dense.base_model.model.experts.base_layer.down_proj.detach()
    assert torch.equal(
        stored_weight(layer.base_layer, "down_proj").codes, quantize_like(original, exact).codes
    )
    layer.unmerge()
    assert not layer.merged_adapters


# ---- what is refused -----------------------------------------------------------------------------


def test_refusals_say_why_and_change_nothing():
    with pytest.raises(ValueError, match="no routed experts"):
        quantize_experts(torch.nn.Linear(2, 2))
    model = quantize_experts(tiny_model())
    with pytest.raises(ValueError, match="stored in nf4 already"):
        quantize_experts(model)
    with torch.device("meta"):
        empty = Holder(build_experts_on_meta())
    with pytest.raises(ValueError, match="meta device"):
        quantize_experts(empty)
    merged = moe_lora(tiny_model())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged in"):
        quantize_experts(merged)


def build_experts_on_meta():
    from helpers import HandWrittenExperts

    return HandWrittenExperts()


def test_an_unknown_parametrization_is_refused():
    experts = build_experts(*QWEN3_MOE)
    parametrize.register_parametrization(experts, "down_proj", torch.nn.Identity())
    with pytest.raises(UnsupportedExperts, match="parametrized by"):
        read_layout(experts)


def test_codes_without_scales_are_refused():
    experts = build_experts(*QWEN3_MOE)
    experts.down_proj = torch.nn.Parameter(
        torch.zeros(5, H, I, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(UnsupportedExperts, match=r"stored as torch\.uint8 without scales"):
        read_layout(experts)


def test_modules_of_one_class_share_it_and_one_of_them_is_dequantized_alone():
    first, second, third = (build_experts(*QWEN3_MOE) for _ in range(3))
    dense = type(first)
    for module in (first, second):
        quantize_experts(Holder(module))
    assert type(first) is type(second)
    assert type(first) is not dense
    assert type(third) is dense
    before = {name: getattr(second, name).clone() for name in ("gate_up_proj", "down_proj")}
    dequantize_experts(Holder(first))
    for name, expected in before.items():
        assert type(first._parameters[name]) is torch.nn.Parameter
        assert not parametrize.is_parametrized(first, name)
        assert torch.equal(getattr(second, name), expected)
    # again, and in another format, beside modules that stay as they are
    quantize_experts(Holder(first), "int8")
    quantize_experts(Holder(third))
    assert type(first) is type(second) is type(third)
    for name, expected in before.items():
        assert stored_weight(first, name).format == "int8"
        assert torch.equal(getattr(second, name), expected)
