"""Merging adds in fp32 and rounds once, and unmerging takes out everything that was merged."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from helpers import (
    FP32,
    GPT_OSS,
    QWEN3_MOE,
    E,
    HandWrittenExperts,
    Holder,
    R,
    assert_close,
    assert_share_of_order_one,
    build_experts,
    dense_deltas,
    experts_adapter,
    fill_adapter,
    random_rows,
    wrap,
)
from peft_moe_lora import MoELoraConfig, quantize_experts
from peft_moe_lora.experts.stored import stored_weight
from peft_moe_lora.layers import remainders

# rank 16: a sum of so many products in bf16 differs from one in fp32
RANK = 16
WEIGHTS = {"gate_up": "gate_up_proj", "down": "down_proj"}


def test_adapters_in_bf16_are_merged_by_a_sum_in_fp32():
    experts = build_experts(*QWEN3_MOE, dtype=torch.bfloat16)
    model = wrap(experts, r=RANK, lora_alpha=3 * RANK, randomize=False)
    model.to(torch.bfloat16)
    fill_adapter(model, gain=3.0)
    layer = model.base_model.model.experts
    before = {name: getattr(experts, name).detach().clone() for name in WEIGHTS.values()}
    pairs = experts_adapter(model)
    layer.merge()
    for projection, (A, B) in pairs.items():
        assert A.dtype == B.dtype == torch.bfloat16
        name = WEIGHTS[projection]
        for e, weight in enumerate(getattr(experts, name)):
            ranks = slice(e * RANK, (e + 1) * RANK)
            update = 3.0 * (B[:, ranks].float() @ A[ranks].float())
            assert torch.equal(weight, (before[name][e].float() + update).bfloat16())
            delta = layer.get_delta_weight("default", projection, e)
            assert delta.dtype == torch.float32
            assert torch.equal(delta, update)


def test_an_expert_without_an_adapter_has_an_update_of_zeros_in_fp32():
    chosen = [0, 2]
    model = wrap(build_experts(*QWEN3_MOE), expert_indices={"experts": chosen}).bfloat16()
    layer = model.base_model.model.experts
    for projection, name in WEIGHTS.items():
        for e, weight in enumerate(getattr(layer.base_layer, name)):
            delta = layer.get_delta_weight("default", projection, e)
            assert delta.dtype == torch.float32
            assert delta.shape == weight.shape
            assert delta.any() == (e in chosen)


def test_only_a_safe_merge_looks_for_what_is_not_finite():
    model = wrap(build_experts(*QWEN3_MOE))
    layer, (_, B) = model.base_model.model.experts, experts_adapter(model)["down"]
    with torch.no_grad():
        # the third expert's
        B[0, 2 * R] = float("inf")
    before = {name: getattr(layer.base_layer, name).clone() for name in WEIGHTS.values()}
    with pytest.raises(ValueError, match="'default', down of expert 2 is not finite"):
        layer.merge(safe_merge=True)
    for name, weight in before.items():
        assert torch.equal(getattr(layer.base_layer, name), weight)
    assert not layer.merged
    layer.merge()
    assert layer.merged_adapters == ["default"]
    assert not layer.base_layer.down_proj[2].isfinite().all()


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_merging_one_after_the_other_into_codes_and_unmerging_gives_the_first_codes(form):
    model = wrap(quantize_experts(Holder(build_experts(*QWEN3_MOE)), format=form).experts)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    fill_adapter(model, "second", seed=5)
    layer, rows = model.base_model.model.experts, random_rows()

    def codes():
        weights = [stored_weight(layer.base_layer, name) for name in WEIGHTS.values()]
        return [tensor.clone() for weight in weights for tensor in weight.tensors()]

    before = codes()
    layer.merge(adapter_names=["default"])
    once = codes()
    layer.merge(adapter_names=["second"])
    assert not all(torch.equal(a, b) for a, b in zip(once, codes(), strict=True))
    layer.unmerge()
    for actual, expected in zip(codes(), before, strict=True):
        assert torch.equal(actual, expected)
    # nothing is left of the first round: another round and back gives the same
    layer.merge(adapter_names=["second"])
    layer.unmerge()
    for actual, expected in zip(codes(), before, strict=True):
        assert torch.equal(actual, expected)
    assert not layer.unmerged_weights
    assert not layer.kept_of_merged
    assert model(*rows).isfinite().all()


# ---- weights divided among processes -------------------------------------------------------------


@pytest.fixture
def second_of_three():
    """A mesh of three processes, of which this one is the second and the others are made up."""
    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    yield init_device_mesh("cpu", (3,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dim", [0, 1, 2], ids=["experts", "rows", "columns"])
@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=["[E, N, K]", "[E, K, N]"])
def test_a_process_merges_into_the_block_that_it_stores(second_of_three, case, dim):
    plain = build_experts(*case)
    model = wrap(copy.deepcopy(plain))
    layer = model.base_model.model.experts
    deltas = dense_deltas(experts_adapter(model), E, layer.scaling["default"])
    blocks = {}
    for projection, name in WEIGHTS.items():
        weight = getattr(plain, name).detach()
        block = weight.chunk(3, dim)[1]
        sharded = DTensor.from_local(
            block.clone(), second_of_three, [Shard(dim)], shape=weight.shape, stride=weight.stride()
        )
        setattr(layer.base_layer, name, nn.Parameter(sharded, requires_grad=False))
        delta = deltas[projection]
        if layer.layout.transposed:
            delta = delta.mT
        blocks[name] = (block, delta.chunk(3, dim)[1])
    layer.merge(safe_merge=True)
    for name, (block, delta) in blocks.items():
        assert_close(getattr(layer.base_layer, name).to_local(), block + delta, FP32)
    layer.unmerge()
    for name, (block, _) in blocks.items():
        assert_close(getattr(layer.base_layer, name).to_local(), block, FP32)


# ---- routers -------------------------------------------------------------------------------------

SCALING = 2.0


class Router(nn.Module):
    """A router that a user wrote, as wide as it has experts: its weight fits either way round."""

    def __init__(self, width=16):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) * width**-0.5)

    def forward(self, hidden_states):
        logits = nn.functional.linear(hidden_states, self.weight)
        weights, index = logits.softmax(dim=-1).topk(2)
        return logits, weights, index


class Block(nn.Module):
    """A router beside experts, as in models."""

    def __init__(self):
        super().__init__()
        self.gate = Router()
        self.experts = HandWrittenExperts(16, 8, 16)

    def forward(self, hidden_states):
        return self.gate(hidden_states)


def adapted_router(**config):
    """A model with an adapter on its router, and the router's weight with the update written in."""
    from peft import get_peft_model

    block = Block()
    before = block.gate.weight.detach().clone()
    config = {"r": R, "lora_alpha": SCALING * R, "target_modules": ["gate"], **config}
    model = get_peft_model(block, MoELoraConfig(**config)).eval()
    fill_adapter(model)
    layer = model.base_model.model.gate
    A, B = layer.lora_A.default.weight.detach(), layer.lora_B.default.weight.detach()
    return model, before, before + SCALING * B @ A


def test_disabling_a_merged_router_takes_its_update_out():
    model, before, merged = adapted_router()
    layer, x = model.base_model.model.gate, torch.randn(9, 16)
    model.merge_adapter()
    assert_close(layer.base_layer.weight, merged)
    assert_share_of_order_one(x @ merged.T, x @ before.T)
    with model.disable_adapter():
        assert_close(model(x)[0], x @ before.T)
    assert_close(layer.base_layer.weight, before)
    assert not layer.merged
    assert_close(model(x)[0], x @ merged.T, FP32, "enabled again")


def test_a_replica_of_a_merged_router_does_not_unmerge():
    model, _, merged = adapted_router()
    layer = model.base_model.model.gate
    model.merge_adapter()
    layer._is_replica = True
    layer.enable_adapters(False)
    with pytest.raises(ValueError, match=r"replica .* cannot unmerge"):
        model(torch.randn(9, 16))
    assert_close(layer.base_layer.weight, merged)
    assert layer.merged_adapters == ["default"]


def test_a_routers_weight_is_never_taken_for_a_transposed_one():
    model, _, merged = adapted_router(fan_in_fan_out=True)
    x = torch.randn(9, 16)
    assert_close(model(x)[0], x @ merged.T)
    model.merge_adapter()
    assert_close(model.base_model.model.gate.base_layer.weight, merged)
    assert_close(model(x)[0], x @ merged.T)


# ---- bit for bit ---------------------------------------------------------------------------------


def bits(module):
    integers = {2: torch.int16, 4: torch.int32}
    return {
        name: p.detach().view(integers[p.element_size()]).clone()
        for name, p in module.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case[1])
def test_unmerging_restores_every_bit(case, dtype):
    """Also of experts that are stored transposed, and of two adapters as large as the weights."""
    experts = build_experts(*case).to(dtype)
    with torch.no_grad():
        experts.down_proj[0, 0, 0] = -0.0
    before = bits(experts)
    model = wrap(experts)
    model.add_adapter("second", model.peft_config["default"])
    fill_adapter(model, "second", seed=7)
    layer = model.base_model.model.experts
    for names in (["default"], ["default", "second"]):
        layer.merge(adapter_names=names)
        merged = bits(experts)
        assert all((merged[n] != before[n]).float().mean() > 0.5 for n in before if "bias" not in n)
        layer.unmerge()
        after = bits(experts)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert not layer.kept_of_merged


def test_what_is_kept_of_a_small_update_is_small():
    experts = build_experts(*QWEN3_MOE).to(torch.bfloat16)
    model = wrap(experts)
    layer = model.base_model.model.experts
    layer.scaling["default"] = 0.01
    layer.merge()
    kept = layer.kept_of_merged["default"].remainders.values()
    places = sum(remainder.values.numel() for remainder in kept)
    assert 0 < places < 0.05 * sum(p.numel() for p in experts.parameters())
    assert {remainder.values.device.type for remainder in kept} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_that_subtraction_restores_nowhere_is_kept_whole(dtype):
    before = torch.randn(6, 5).to(dtype)
    # a view with other strides, as the weight of a transposed family
    block = before.T.contiguous().T
    delta = 1e6 * torch.randn(6, 5)
    remainder = remainders.add(block, delta)
    assert remainder.places is None
    assert torch.equal(block, (before + delta).to(dtype))
    remainders.subtract(block, delta, remainder)
    assert torch.equal(block, before)
