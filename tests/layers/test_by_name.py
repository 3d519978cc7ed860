"""The experts implementation "moe_lora": experts without an adapter, computed by this package."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from helpers import (
    FP32,
    GPT_OSS,
    QWEN3_MOE,
    TOP_K,
    E,
    H,
    assert_close,
    assert_share_of_order_one,
    build_experts,
    grads_of,
    in_double,
    interface_families,
    oracle,
    random_rows,
    wrap,
)
from peft_moe_lora import quantize_experts
from peft_moe_lora.experts.stored import UnsupportedExperts
from peft_moe_lora.layers import frozen

NAME = "moe_lora"
every_class = pytest.mark.parametrize("case", interface_families(), ids=lambda case: case[1])


def by_name(module):
    module.config._experts_implementation = NAME
    return module.requires_grad_(False)


def with_gradients(module, rows):
    """The output, and the gradients of hidden_states and top_k_weights."""
    x = rows[0].detach().requires_grad_()
    weights = rows[2].detach().requires_grad_()
    return grads_of(lambda: module(x, rows[1], weights), [x, weights])


def check_against_oracle(plain, module, rows):
    """Output and gradients against the written-out formula in fp64; the model knows no sentinels"""
    twin = in_double(plain)
    wide = (rows[0].double(), rows[1], rows[2].double())
    expected = with_gradients(lambda *rows: oracle(twin, *rows), wide)
    found = with_gradients(module, rows)
    assert_close(found[0], expected[0], FP32, "output")
    for what, grad, right in zip(
        ("hidden_states", "top_k_weights"), found[1], expected[1], strict=True
    ):
        assert right.abs().max() > 0
        assert_close(grad, right, FP32, f"d {what}")


# ---- one experts module --------------------------------------------------------------------------


@every_class
def test_every_class_computes_what_its_own_forward_computes(case, frozen_calls):
    plain = build_experts(*case)
    module = by_name(copy.deepcopy(plain))
    rows = random_rows()
    check_against_oracle(plain, module, rows)
    assert frozen_calls == [module]
    assert plain.config._experts_implementation == "eager"
    assert_close(module(*rows), plain(*rows))


@every_class
def test_sentinels_and_no_tokens(case):
    plain = build_experts(*case)
    module = by_name(copy.deepcopy(plain))
    x, index, weights = random_rows()
    index[0, 0] = index[5, 1] = E
    index[3, 0] = E + 7
    index[7, :] = E
    check_against_oracle(plain, module, (x, index, weights))
    assert not module(x, index, weights)[7].any()
    out, (dx, dw) = with_gradients(module, random_rows(T=0))
    assert (out.shape, dx.shape, dw.shape) == ((0, H), (0, H), (0, TOP_K))


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case[1])
def test_weights_changed_in_place_are_read_again(case):
    plain = build_experts(*case)
    module = by_name(copy.deepcopy(plain))
    rows = random_rows()
    before = module(*rows)
    for experts in (plain, module):
        experts.down_proj.data[1] *= -2
        experts.gate_up_proj.data += 0.1
    assert_close(module(*rows), plain(*rows))
    assert_share_of_order_one(module(*rows), before)


def test_fewer_and_more_experts_than_before():
    """Pruning replaces the parameters of a module."""
    plain = build_experts(*QWEN3_MOE)
    module = by_name(copy.deepcopy(plain))
    x, index, weights = random_rows()
    module(x, index, weights)
    larger = build_experts(*QWEN3_MOE, num_experts=2 * E)
    for experts in (plain, module):
        experts.gate_up_proj = nn.Parameter(larger.gate_up_proj.data, requires_grad=False)
        experts.down_proj = nn.Parameter(larger.down_proj.data, requires_grad=False)
        experts.num_experts = 2 * E
    index = index + E
    assert plain(x, index, weights).any()
    assert_close(module(x, index, weights), plain(x, index, weights))


def test_an_activation_that_was_replaced():
    plain = build_experts(*QWEN3_MOE)
    module = by_name(copy.deepcopy(plain))
    rows = random_rows()
    before = module(*rows)
    for experts in (plain, module):
        experts.act_fn = nn.Softplus()
    assert_close(module(*rows), plain(*rows))
    assert_share_of_order_one(module(*rows), before, low=0.1)


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case[1])
def test_compiled_in_one_graph_after_an_eager_call(case):
    plain = build_experts(*case)
    module = by_name(copy.deepcopy(plain))
    module(*random_rows())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    check_against_oracle(plain, compiled, random_rows())


def test_the_first_compiled_call_reads_the_layout_outside_of_the_graph():
    plain = build_experts(*QWEN3_MOE)
    module = by_name(copy.deepcopy(plain))
    compiled = torch.compile(module, backend="aot_eager")
    check_against_oracle(plain, compiled, random_rows())
    for experts in (plain, module):
        experts.act_fn = nn.Softplus()
    check_against_oracle(plain, compiled, random_rows())


def test_experts_in_four_and_eight_bits():
    rows = random_rows()
    for quantized in ("nf4", "int8"):
        module = build_experts(*QWEN3_MOE)
        holder = nn.ModuleDict({"experts": module})
        quantize_experts(holder, quantized)
        plain = build_experts(*QWEN3_MOE)
        plain.gate_up_proj.data = module.gate_up_proj.detach()
        plain.down_proj.data = module.down_proj.detach()
        module.config._experts_implementation = NAME
        check_against_oracle(plain, module, rows)


def trained_alone(name):
    """The same experts twice, of which one parameter is trained; the second is by name."""
    frozen._warn.cache_clear()
    plain = build_experts(*GPT_OSS)
    module = by_name(copy.deepcopy(plain))
    for experts in (plain, module):
        experts.requires_grad_(False)
        getattr(experts, name).requires_grad_()
    plain.config._experts_implementation = "grouped_mm"
    return plain, module


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj", "gate_up_proj_bias"])
def test_experts_that_train_themselves_run_transformers_own_code(name, frozen_calls, caplog):
    plain, module = trained_alone(name)
    rows = random_rows()
    with caplog.at_level(logging.WARNING, "peft_moe_lora"):
        for _ in range(2):
            found = grads_of(lambda: module(*rows), [getattr(module, name)])
    expected = grads_of(lambda: plain(*rows), [getattr(plain, name)])
    assert_close(found[0], expected[0])
    assert expected[1][0].abs().max() > 0
    assert_close(found[1][0], expected[1][0])
    assert not frozen_calls
    assert len(caplog.records) == 1
    assert "GptOssExperts trains them" in caplog.text
    # where nothing is trained, the kernels run
    with torch.no_grad():
        assert_close(module.eval()(*rows), plain(*rows))
    assert frozen_calls == [module]


def test_experts_that_train_themselves_compile_in_one_graph(frozen_calls, caplog):
    plain, module = trained_alone("down_proj")
    rows = random_rows()
    with torch.no_grad():
        module.eval()(*rows)
    frozen_calls.clear()
    compiled = torch.compile(module.train(), fullgraph=True, backend="eager")
    for _ in range(2):
        out = compiled(*rows)
    assert out.requires_grad
    assert_close(out, plain(*rows))
    assert not frozen_calls
    assert caplog.text.count("GptOssExperts trains them") == 1


def test_reentrant_checkpointing_runs_one_implementation_in_both_passes(frozen_calls):
    module = by_name(build_experts(*QWEN3_MOE)).requires_grad_(True).train()
    x, index, weights = random_rows()
    x.requires_grad_()
    torch.utils.checkpoint.checkpoint(
        module, x, index, weights, use_reentrant=True
    ).sum().backward()
    assert module.down_proj.grad.abs().max() > 0
    assert not frozen_calls


def test_a_weight_that_is_not_here_is_refused(tmp_path):
    module = by_name(build_experts(*QWEN3_MOE))
    rows = random_rows()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = copy.deepcopy(module)
        weight = DTensor.from_local(module.down_proj, mesh)
        sharded.down_proj = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(UnsupportedExperts, match=r"down_proj as a plain tensor .* DTensor on"):
            sharded(*rows)
    finally:
        torch.distributed.destroy_process_group()
    offloaded = copy.deepcopy(module)
    offloaded.gate_up_proj = nn.Parameter(module.gate_up_proj.to("meta"), requires_grad=False)
    with pytest.raises(UnsupportedExperts, match=r"gate_up_proj .* cpu, .* Parameter on meta"):
        offloaded(*rows)


def test_gradients_through_a_disabled_adapter():
    plain = build_experts(*QWEN3_MOE)
    model = wrap(copy.deepcopy(plain))
    with model.disable_adapter():
        check_against_oracle(plain, model, random_rows())
