"""Adapters on quantized experts on a CUDA device: bits, numbers, graphs, syncs, memory.

bitsandbytes is not needed.
"""

import copy
import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gpu.layers import ATOL, FAMILIES, E, H, I, R, adapted, inputs, no_wait_for_the_device, step
from helpers import QWEN3_MOE, Holder, build_experts
from peft_moe_lora import dequantize_experts, quantize_experts
from peft_moe_lora.ops import kernels
from peft_moe_lora.ops.kernels.launching import replay

pytestmark = pytest.mark.gpu
SETTINGS = [
    {"format": "nf4"},
    {"format": "nf4", "double_quant": False},
    {"format": "fp4"},
    {"format": "int8"},
]


def quantized(family, name, dtype, setting=SETTINGS[0], **config):
    """(model, layer) on quantized experts, and the same on the dense weights they stand for."""
    model, layer = adapted(family, name, dtype, **config)
    quantize_experts(model, **setting)
    dense = dequantize_experts(copy.deepcopy(model))
    return (model, layer), (dense, dense.base_model.model.experts)


def few_experts_a_part(monkeypatch, count):
    from peft_moe_lora.ops.kernels import parts

    monkeypatch.setattr(parts, "SCRATCH_BYTES", count * 2 * I * H * 2)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_layer_computes_what_the_dense_layer_does(monkeypatch, family, name, dtype, setting):
    few_experts_a_part(monkeypatch, 3)
    (model, layer), (dense, dense_layer) = quantized(family, name, dtype, setting, backend="triton")
    args = inputs(dtype)
    found, expected = step(model, layer, *args), step(dense, dense_layer, *args)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # the same tiles of the same numbers; only half a tile may be added in another order
        error = ((found[key].double() - value.double()).norm() / value.double().norm()).item()
        assert error <= ATOL[dtype], f"{key}: {error:.1e}"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_quantizing_on_the_device_gives_the_bits_of_the_cpu(setting):
    from peft_moe_lora.ops.quantize import quantize

    stack = torch.randn(4, 96, 160, dtype=torch.bfloat16)
    on_cpu, on_device = quantize(stack, **setting), quantize(stack.cuda(), **setting)
    # a mean of thousands of scales is added in another order
    torch.testing.assert_close(on_device.dense().cpu(), on_cpu.dense(), rtol=2e-2, atol=1e-4)
    if setting.get("double_quant") is False or setting["format"] == "int8":
        assert torch.equal(on_device.dense().cpu(), on_cpu.dense())


def refuse_to_decode(*args):
    raise AssertionError("experts were decoded into a scratch")


@pytest.mark.parametrize("setting", SETTINGS[:3], ids=lambda s: "-".join(map(str, s.values())))
@pytest.mark.parametrize("tokens", [1, 40])
# products of few rows in float16 have tests of their own: tests/ops/test_dequantize.py
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str
)
@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_few_tokens_need_no_scratch(monkeypatch, family, name, dtype, tokens, setting):
    """Tiles of 16 rows: their products decode the codes, forward and backward."""
    from peft_moe_lora.ops.kernels import parts

    (model, layer), (dense, dense_layer) = quantized(family, name, dtype, setting, backend="triton")
    monkeypatch.setattr(parts, "dequantize", refuse_to_decode)
    args = inputs(dtype, tokens)
    found, expected = step(model, layer, *args), step(dense, dense_layer, *args)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        # the same numbers, added in other steps
        error = ((found[key].double() - value.double()).norm() / value.double().norm()).item()
        assert error <= ATOL[dtype], f"{key}: {error:.1e}"


@pytest.mark.parametrize("tokens", [1, 300])
def test_nothing_waits_for_the_device(monkeypatch, tokens):
    few_experts_a_part(monkeypatch, 3)
    (model, layer), _ = quantized(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16, tokens)
    step(model, layer, *args)
    with no_wait_for_the_device():
        step(model, layer, *args)


@pytest.mark.parametrize("tokens", [1, 300])
def test_same_bits_every_time_and_under_a_captured_graph(monkeypatch, tokens):
    few_experts_a_part(monkeypatch, 3)
    (model, layer), _ = quantized(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16, tokens)
    first, second = step(model, layer, *args), step(model, layer, *args)
    assert all(torch.equal(first[key], second[key]) for key in first)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(*args)
        layer.lora_B["default"]["down"].data.mul_(-3)
        graph.replay()
        assert torch.equal(captured, model(*args))


def test_two_streams_do_not_share_a_scratch():
    (model, _), (dense, _) = quantized(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16)
    with torch.no_grad():
        expected = dense(*args)
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        outs = []
        for i in range(40):
            with torch.cuda.stream(streams[i % 2]):
                outs.append(model(*args))
        torch.cuda.synchronize()
    for out in outs:
        torch.testing.assert_close(
            out, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item()
        )
        assert torch.equal(out, outs[0])


def test_checkpointing_keeps_nothing_dense():
    (model, layer), _ = quantized(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16)
    kept = step(model, layer, *args)
    recomputed = step(lambda *a: checkpoint(model, *a, use_reentrant=False), layer, *args)
    assert all(torch.equal(kept[key], recomputed[key]) for key in kept)


def test_peak_is_that_of_dense_experts_and_the_scratch(monkeypatch):
    from peft_moe_lora.ops.kernels import parts

    bound = 8 * 2**20
    monkeypatch.setattr(parts, "SCRATCH_BYTES", bound)

    def peak(quantize):
        gc.collect()
        start = torch.cuda.memory_allocated()
        experts = build_experts(*QWEN3_MOE, 1024, 512, 32).to("cuda", torch.bfloat16)
        from peft import get_peft_model

        from peft_moe_lora import MoELoraConfig

        model = get_peft_model(Holder(experts), MoELoraConfig(r=R, target_modules=["experts"]))
        if quantize:
            quantize_experts(model)
        gc.collect()
        held = torch.cuda.memory_allocated() - start
        x = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        index = torch.rand(4096, 32, device="cuda").topk(2).indices
        weights = torch.rand(4096, 2, device="cuda")
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(x, index, weights).sum().backward()
        return torch.cuda.max_memory_allocated() - before, held

    (dense, dense_weights), (packed, packed_weights) = peak(False), peak(True)
    assert packed <= dense + bound + 2**20
    stack = 32 * 3 * 1024 * 512
    assert dense_weights - packed_weights > (2 - 0.6) * stack


@pytest.mark.parametrize("max_block_m", [0, 32], ids=["into a scratch", "in the product"])
def test_more_than_two_to_the_31_values(monkeypatch, max_block_m):

    monkeypatch.setattr("peft_moe_lora.ops.kernels.codes.product_4bit.MAX_BLOCK_M", max_block_m)
    from peft_moe_lora.ops.quantize import quantize

    count, N, K = 40, 8192, 8192
    one = quantize(
        torch.randn(1, N, K, device="cuda", dtype=torch.bfloat16), "nf4", double_quant=False
    )
    from dataclasses import replace

    weight = replace(
        one,
        stored_shape=(count, N, K),
        packed=one.packed.repeat(count),
        scales=one.scales.repeat(count),
    )
    weight.packed[: one.packed.numel()] = 0
    x = torch.randn(64, K, device="cuda", dtype=torch.bfloat16) * K**-0.5
    routing = kernels.route(torch.full((64, 1), count - 1, device="cuda"), count)
    y = kernels.expert_linear(x, weight, routing, gather=True)
    torch.testing.assert_close(y, x @ one.dense()[0].T, rtol=0.02, atol=0.02)


def test_experts_without_rows_cost_no_decoding():
    """A few tokens reach a few experts: the time of decoding follows those."""
    from peft_moe_lora.ops.quantize import quantize

    weight = quantize(torch.randn(64, 1024, 2048, device="cuda", dtype=torch.bfloat16), "nf4")
    out = torch.full((64, 1024, 2048), float("nan"), device="cuda", dtype=torch.bfloat16)
    routing = kernels.route(torch.tensor([[3, 40]], device="cuda"), 64)
    kernels.dequantize(weight, routing.expert_offsets, 0, out)
    decoded = ~out.isnan().flatten(1).any(1)
    assert decoded.nonzero().flatten().tolist() == [3, 40]


assert E >= 8, "parts of three experts leave a short one"


@pytest.mark.parametrize("setting", [*SETTINGS[:2], SETTINGS[3]], ids=["nested", "plain", "int8"])
@pytest.mark.parametrize("tokens", [40, 2048])
def test_a_replayed_step_has_the_bits_of_a_composed_one(monkeypatch, setting, tokens):
    model, layer = quantized(*QWEN3_MOE, torch.bfloat16, setting)[0]
    batches = [inputs(torch.bfloat16, tokens) for _ in range(5)]
    replay.forget()
    found = [step(model, layer, *batch) for batch in batches]
    assert [kind.__class__ for kind in replay._kinds.values()] == [replay._Replay] * 2
    monkeypatch.setattr(kernels, "replayed", lambda function, *arguments: function(*arguments))
    for actual, batch in zip(found, batches, strict=True):
        expected = step(model, layer, *batch)
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
