"""Adapters follow the dtype and the device of their model, and are read again in each call."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from helpers import (
    FUSED_FAMILIES,
    E,
    H,
    Holder,
    I,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    dense_deltas,
    experts_adapter,
    fill,
    fill_adapter,
    moe_lora,
    outputs,
    random_rows,
    tiny_model,
    wrap,
)
from peft_moe_lora import MoELoraConfig
from tuner.models import experts_layer, oracle_output, qwen_experts


def test_adapters_of_a_bf16_model_are_fp32_unless_told_otherwise():
    model = moe_lora(tiny_model(dtype=torch.bfloat16))
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert outputs(model).dtype == torch.bfloat16
    outputs(model).float().square().mean().backward()
    assert {p.grad.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    kept = get_peft_model(
        tiny_model(dtype=torch.bfloat16),
        MoELoraConfig(r=R, target_modules=["experts"]),
        autocast_adapter_dtype=False,
    )
    assert {p.dtype for p in adapter_parameters(kept).values()} == {torch.bfloat16}
    outputs(kept).float().square().mean().backward()
    assert {p.grad.dtype for p in adapter_parameters(kept).values()} == {torch.bfloat16}


def test_a_bf16_model_gives_the_fp32_models_numbers_to_bf16():
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base)).to(torch.float32)
    low = moe_lora(copy.deepcopy(base).to(torch.bfloat16))
    rows = random_rows()
    right = experts_layer(model)(*rows)
    rows_low = (rows[0].to(torch.bfloat16), rows[1], rows[2].to(torch.bfloat16))
    actual = experts_layer(low)(*rows_low)
    assert actual.dtype == torch.bfloat16
    # three products of bf16 values
    assert ((actual.double() - right.double()).norm() / right.double().norm()).item() < 2e-2


def test_autocast_runs_and_gives_fp32_gradients():
    model = moe_lora(tiny_model())
    right = outputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = outputs(model)
    out.float().square().mean().backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.abs().max() > 0
        for p in adapter_parameters(model).values()
    )
    assert ((out.double() - right.double()).norm() / right.double().norm()).item() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_float_types_work(dtype):
    plain = qwen_experts()
    model = wrap(copy.deepcopy(plain).to(dtype))
    rows = random_rows(dtype=dtype)
    out = model(*rows)
    assert out.dtype == dtype
    expected = oracle_output(plain, rows, dense_deltas(experts_adapter(model), E, 2.0))
    # float64 models keep fp32 adapters: the product is computed in the activations' dtype
    assert_close(out, expected, 5e-3 if dtype == torch.float16 else 1e-6)


def test_low_cpu_mem_usage_makes_meta_adapters():
    """Nothing is drawn or read: an adapter that is about to be loaded costs no memory first."""
    model = get_peft_model(
        tiny_model(),
        MoELoraConfig(r=R, target_modules=["experts", "q_proj"]),
        low_cpu_mem_usage=True,
    )
    assert all(p.is_meta for p in adapter_parameters(model).values())


def test_a_model_on_meta_can_be_wrapped():
    base = tiny_model().to("meta")
    model = get_peft_model(base, MoELoraConfig(r=R, target_modules=["experts"]))
    shapes = {tuple(p.shape) for p in adapter_parameters(model).values()}
    assert shapes == {(R * E, H), (2 * I, R * E), (R * E, I), (H, R * E)}


def test_moving_the_model_moves_and_casts_the_adapter():
    model = moe_lora(tiny_model()).to(torch.float64)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float64}
    assert outputs(model).dtype == torch.float64


def test_updating_a_parameter_in_place_is_seen_by_the_next_forward():
    """What is packed or cached from A and B follows them: optimizers and users write in place."""
    plain, rows = qwen_experts(), random_rows()
    model = wrap(copy.deepcopy(plain))
    model(*rows)
    fill_adapter(model, seed=21)
    assert_close(
        model(*rows), oracle_output(plain, rows, dense_deltas(experts_adapter(model), E, 2.0))
    )
    for pair in experts_adapter(model).values():
        for parameter in pair:
            # no version counter sees this one
            parameter.data = parameter.data * 0.7
    assert_close(
        model(*rows), oracle_output(plain, rows, dense_deltas(experts_adapter(model), E, 2.0))
    )


def test_writing_through_data_is_seen_by_the_next_forward():
    """`parameter.data.copy_()` changes no version counter; loaders and DeepSpeed write so."""
    plain, rows = qwen_experts(), random_rows()
    model = wrap(copy.deepcopy(plain))
    model(*rows)
    for pair in experts_adapter(model).values():
        for parameter in pair:
            parameter.data.mul_(0.7)
    assert_close(
        model(*rows), oracle_output(plain, rows, dense_deltas(experts_adapter(model), E, 2.0))
    )


def test_changing_the_base_weights_is_seen_by_the_next_forward():
    plain, rows = qwen_experts(), random_rows()
    model = wrap(copy.deepcopy(plain))
    model(*rows)
    fill(plain, seed=31)
    model.base_model.model.experts.get_base_layer().load_state_dict(plain.state_dict())
    assert_close(
        model(*rows), oracle_output(plain, rows, dense_deltas(experts_adapter(model), E, 2.0))
    )


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_backends_that_run_here_agree(backend):
    plain, rows = qwen_experts(), random_rows()
    model = wrap(copy.deepcopy(plain), backend=backend)
    assert_close(
        model(*rows), oracle_output(plain, rows, dense_deltas(experts_adapter(model), E, 2.0))
    )


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_recompute_changes_no_number(family):
    base = tiny_model(family)
    kept, recomputed = moe_lora(copy.deepcopy(base)), moe_lora(copy.deepcopy(base), recompute=True)
    assert_share_of_order_one(outputs(kept), outputs(base))
    for model in (kept, recomputed):
        outputs(model).square().mean().backward()
    assert torch.equal(outputs(kept), outputs(recomputed))
    for name, parameter in adapter_parameters(recomputed).items():
        assert_close(parameter.grad, dict(kept.named_parameters())[name].grad, 1e-6, name)


def test_two_models_do_not_share_an_adapter():
    """The implementation is chosen per module, not for the process."""
    rows = random_rows()
    plain = qwen_experts()
    before = plain(*rows)
    model = wrap(copy.deepcopy(plain))
    assert_share_of_order_one(model(*rows), before)
    assert torch.equal(plain(*rows), before)
    assert torch.equal(Holder(plain)(*rows), before)


def test_wrapping_a_peft_model_again_by_name_adds_an_adapter():
    model = moe_lora(tiny_model())
    assert isinstance(model, PeftModel)
    model.add_adapter("other", MoELoraConfig(r=1, target_modules=["experts"]))
    assert set(experts_layer(model).r) == {"default", "other"}
