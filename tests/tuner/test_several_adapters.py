"""Several adapters on the same experts: chosen, added up, merged, disabled and deleted."""

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from helpers import (
    FP32,
    E,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    base_weight,
    dense_deltas,
    experts_adapter,
    fill_adapter,
    in_double,
    moe_lora,
    oracle,
    outputs,
    random_rows,
    tiny_families,
    tiny_model,
    token_ids,
    wrap,
)
from peft_moe_lora import MoELoraConfig
from tuner.models import experts_layer, oracle_output, qwen_experts


def two_adapters(plain):
    model = wrap(copy.deepcopy(plain))
    model.add_adapter(
        "second",
        MoELoraConfig(r=2, lora_alpha=3, target_modules=["experts"], target_projections=["down"]),
    )
    fill_adapter(model, "second", seed=11, gain=1.5)
    return (
        model,
        dense_deltas(experts_adapter(model), E, 2.0),
        dense_deltas(experts_adapter(model, adapter_name="second"), E, 1.5),
    )


def test_set_adapter_picks_one():
    plain, rows = qwen_experts(), random_rows()
    model, first, second = two_adapters(plain)
    assert_close(model(*rows), oracle_output(plain, rows, first))
    model.set_adapter("second")
    assert_close(model(*rows), oracle_output(plain, rows, second))
    assert_share_of_order_one(oracle_output(plain, rows, second), plain(*rows))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(
        adapter_parameters(model, "second")
    )
    model.set_adapter("default")
    assert_close(model(*rows), oracle_output(plain, rows, first))


def test_several_active_adapters_add_up():
    plain, rows = qwen_experts(), random_rows()
    model, first, second = two_adapters(plain)
    model.base_model.set_adapter(["default", "second"])
    expected = oracle_output(plain, rows, first, second)
    assert_share_of_order_one(expected, oracle_output(plain, rows, first))
    assert_share_of_order_one(expected, oracle_output(plain, rows, second))
    assert_close(model(*rows), expected)


def test_gradients_reach_every_active_adapter():
    plain, rows = in_double(qwen_experts()), random_rows(dtype=torch.float64)
    model, *_ = two_adapters(qwen_experts())
    model.base_model.set_adapter(["default", "second"])
    model = model.double()
    (model(*rows) ** 2).sum().backward()
    pairs = {}
    for name in ("default", "second"):
        adapters = experts_adapter(model, adapter_name=name)
        pairs[name] = {
            p: [t.detach().clone().requires_grad_() for t in pair] for p, pair in adapters.items()
        }
    first, second = dense_deltas(pairs["default"], E, 2.0), dense_deltas(pairs["second"], E, 1.5)
    total = {p: first[p] + second[p] if p in second else first[p] for p in first}
    (oracle(plain, *rows, total) ** 2).sum().backward()
    for name, adapters in pairs.items():
        for projection, right in adapters.items():
            mine = experts_adapter(model, adapter_name=name)[projection]
            for actual, expected in zip(mine, right, strict=True):
                assert_close(actual.grad, expected.grad, FP32, f"{name}.{projection}")


def test_adapters_may_sit_on_different_layers():
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), layers_to_transform=[0])
    config = {
        "r": R,
        "lora_alpha": 2 * R,
        "target_modules": ["experts"],
        "layers_to_transform": [1],
    }
    model.add_adapter("second", MoELoraConfig(**config))
    fill_adapter(model, "second", seed=5)
    alone = moe_lora(copy.deepcopy(base), **config)
    fill_adapter(alone, seed=5)
    model.set_adapter("second")
    assert_close(outputs(model), outputs(alone), 1e-5)
    model.delete_adapter("default")
    assert_close(outputs(model), outputs(alone), 1e-5)
    with model.disable_adapter():
        assert_close(outputs(model), outputs(base), 1e-5)


def test_merging_in_bf16_rounds_once():
    plain = qwen_experts().to(torch.bfloat16)
    model = wrap(copy.deepcopy(plain))
    deltas = dense_deltas(experts_adapter(model), E, 2.0)
    model.merge_adapter()
    merged = experts_layer(model, "experts").get_base_layer()
    for projection, delta in deltas.items():
        right = (base_weight(plain, projection).float() + delta).to(torch.bfloat16)
        # two fp32 sums may fall on either side of a rounding boundary
        assert (base_weight(merged, projection) == right).float().mean() > 0.999


def test_one_batch_with_several_adapters_is_refused():
    model = moe_lora(tiny_model())
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=token_ids(), adapter_names=["default", "__base__"])


def test_injecting_without_a_peft_model():
    base = tiny_model()
    expected = outputs(moe_lora(copy.deepcopy(base)))
    model = inject_adapter_in_model(
        MoELoraConfig(r=R, lora_alpha=2 * R, target_modules=["experts"]), base
    )
    fill_adapter(model)
    assert torch.equal(outputs(model), expected)


def test_merging_several_is_their_sum_and_unmerging_takes_all_back():
    plain, rows = qwen_experts(), random_rows()
    model, first, second = two_adapters(plain)
    model.merge_adapter(["default", "second"])
    assert experts_layer(model, "experts").merged_adapters == ["default", "second"]
    assert_close(model(*rows), oracle_output(plain, rows, first, second))
    model.unmerge_adapter()
    assert experts_layer(model, "experts").merged_adapters == []
    assert_close(model(*rows), oracle_output(plain, rows, first))


def test_merging_one_of_two_by_name():
    plain, rows = qwen_experts(), random_rows()
    model, _, second = two_adapters(plain)
    merged = model.merge_and_unload(adapter_names=["second"])
    assert_close(merged(*rows), oracle_output(plain, rows, second))


def test_merging_twice_merges_once():
    plain, rows = qwen_experts(), random_rows()
    model, first, _ = two_adapters(plain)
    model.merge_adapter()
    with pytest.warns(UserWarning, match=r"merge"):
        model.merge_adapter()
    assert_close(model(*rows), oracle_output(plain, rows, first))


def test_disabling_a_merged_adapter_takes_it_out():
    plain, rows = qwen_experts(), random_rows()
    model = wrap(copy.deepcopy(plain))
    expected = model(*rows)
    model.merge_adapter()
    with model.disable_adapter():
        # the update was added and subtracted in fp32
        assert_close(model(*rows), plain(*rows), 1e-5)
    assert_close(model(*rows), expected)


def test_delete_adapter_leaves_the_other():
    plain, rows = qwen_experts(), random_rows()
    model, _, second = two_adapters(plain)
    model.set_adapter("second")
    model.delete_adapter("default")
    assert not adapter_parameters(model)
    assert list(model.peft_config) == ["second"]
    assert_close(model(*rows), oracle_output(plain, rows, second))
    assert experts_layer(model, "experts").r == {"second": 2}


def test_deleting_the_last_adapter_leaves_the_plain_module():
    plain, rows = qwen_experts(), random_rows()
    model = wrap(copy.deepcopy(plain))
    model.delete_adapter("default")
    # PEFT's own forward still asks for the config of the deleted adapter
    assert_close(model.base_model.model(*rows), plain(*rows), 1e-6)


def test_unload_gives_the_plain_model_back():
    base = tiny_model()
    plain = outputs(base)
    keys = list(base.state_dict())
    model = moe_lora(base)
    assert_share_of_order_one(outputs(model), plain)
    unloaded = model.unload()
    assert list(unloaded.state_dict()) == keys
    assert torch.equal(outputs(unloaded), plain)
    # and it takes a new adapter as a plain model does
    assert_share_of_order_one(outputs(moe_lora(unloaded)), plain)


@pytest.mark.parametrize("family", tiny_families())
def test_merge_and_unload_gives_a_plain_model_with_the_adapters_numbers(family):
    base = tiny_model(family)
    plain, keys, config = outputs(base), list(base.state_dict()), base.config.to_dict()
    model = moe_lora(base)
    expected = outputs(model)
    assert_share_of_order_one(expected, plain)
    merged = model.merge_and_unload(safe_merge=True)
    assert list(merged.state_dict()) == keys
    assert merged.config.to_dict() == config
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    assert_close(outputs(merged), expected)


def test_disable_adapter_is_the_models_own_implementation_where_that_is_kept():
    base = tiny_model()
    plain = outputs(base)
    model = moe_lora(copy.deepcopy(base), keep_implementation=True)
    with model.disable_adapter():
        assert torch.equal(outputs(model), plain)
    assert_share_of_order_one(outputs(model), plain)
    model.base_model.disable_adapter_layers()
    assert torch.equal(outputs(model), plain)
    model.base_model.enable_adapter_layers()
    assert_share_of_order_one(outputs(model), plain)


@pytest.fixture
def counted(monkeypatch):
    """An experts implementation "counted" for models to run with, and the list of its calls."""
    calls = []

    def counting(module, *args):
        calls.append(module)
        return grouped_mm_experts_forward(module, *args)

    monkeypatch.setitem(ExpertsInterface._global_mapping, "counted", counting)
    return calls


def test_the_models_own_implementation_runs_without_an_active_adapter(counted):
    """Disabled, merged or unloaded, the base runs the implementation that it was told to run.

    That takes keep_implementation=True, except for the unloaded model.
    """
    base = tiny_model()
    base.config._experts_implementation = "counted"
    plain = outputs(base)
    assert len(counted) == 2
    model = moe_lora(base, keep_implementation=True)
    expected = outputs(model)
    counted.clear()
    with model.disable_adapter():
        assert torch.equal(outputs(model), plain)
    assert len(counted) == 2
    model.merge_adapter()
    assert_close(outputs(model), expected)
    assert len(counted) == 4
    model.unmerge_adapter()
    assert_close(outputs(model.unload()), plain, 1e-5)
    assert len(counted) == 6


def test_set_requires_grad_freezes_an_adapter():
    model = moe_lora(tiny_model())
    model.set_requires_grad("default", requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_changed_scaling_reaches_the_output():
    """`set_scale` writes `layer.scaling[adapter]`; others weigh adapters with it at inference."""
    plain, rows = qwen_experts(), random_rows()
    model = wrap(copy.deepcopy(plain))
    layer = experts_layer(model, "experts")
    for factor in (0.5, 2.0):
        layer.scaling["default"] = factor
        expected = oracle_output(plain, rows, dense_deltas(experts_adapter(model), E, factor))
        assert_close(model(*rows), expected)


@pytest.mark.parametrize("experts", [None, {"experts": [0, 3]}], ids=["all", "some"])
def test_a_scaling_that_is_trained_gets_its_gradient(experts):
    """As linear layers of PEFT do it, where the scaling is a parameter."""
    model, rows = wrap(qwen_experts(), expert_indices=experts), random_rows()
    layer = model.base_model.model.experts
    scaling = torch.nn.Parameter(torch.tensor(layer.scaling["default"]))

    def loss(value):
        layer.scaling["default"] = value
        return model(*rows).square().sum()

    right = loss(scaling.item())
    gradients = torch.autograd.grad(right, list(adapter_parameters(model).values()))
    found = loss(scaling)
    assert_close(found, right)
    slope, *others = torch.autograd.grad(found, [scaling, *adapter_parameters(model).values()])
    for gradient, expected in zip(others, gradients, strict=True):
        assert_close(gradient, expected)
    with torch.no_grad():
        step = loss(scaling.item() + 1e-2) - loss(scaling.item() - 1e-2)
    assert slope.item() == pytest.approx(step.item() / 2e-2, rel=1e-2)
