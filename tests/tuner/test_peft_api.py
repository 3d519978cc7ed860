"""Every verb of a PEFT model works on experts as it does on linear layers."""

import copy
import logging
import pickle
import re

import pytest
import torch
from peft import (
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.modules.module import _global_module_registration_hooks
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

import peft_moe_lora
from helpers import (
    FP32,
    FUSED_FAMILIES,
    QWEN3_MOE,
    E,
    H,
    Holder,
    I,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    base_weight,
    build_experts,
    dense_deltas,
    experts_adapter,
    experts_paths,
    fill,
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
from peft_moe_lora import MoELoraConfig, MoELoraModel
from peft_moe_lora.layers.layer import MoELoraLayer

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


def experts_layer(model, path=SECOND):
    return model.get_submodule(f"base_model.model.{path}")


def qwen_experts():
    return build_experts(*QWEN3_MOE)


def oracle_output(plain, rows, *deltas):
    """The oracle's output with the sum of several adapters' deltas."""
    total = {}
    for one in deltas:
        for projection, delta in one.items():
            total[projection] = total.get(projection, 0) + delta.detach().double()
    return oracle(in_double(plain), rows[0].double(), rows[1], rows[2].double(), total)


# ---- what is wrapped -----------------------------------------------------------------------------


def test_the_doors_are_as_documented():
    assert set(peft_moe_lora.__all__) >= {"MoELoraConfig", "MoELoraModel"}
    assert all(hasattr(peft_moe_lora, name) for name in peft_moe_lora.__all__)
    assert isinstance(peft_moe_lora.__version__, str)
    assert issubclass(MoELoraLayer, BaseTunerLayer)


@pytest.mark.parametrize("family", tiny_families())
def test_no_target_means_every_routed_experts_module(family):
    base = tiny_model(family)
    paths = experts_paths(base)
    model = get_peft_model(base, MoELoraConfig(r=R))
    assert isinstance(model.base_model, MoELoraModel)
    wrapped = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    assert wrapped == [f"base_model.model.{path}" for path in paths]
    assert all(isinstance(model.get_submodule(name), MoELoraLayer) for name in wrapped)


def test_layer_attributes_are_those_of_a_tuner_layer():
    layer = experts_layer(moe_lora(tiny_model(), lora_alpha=6))
    assert type(layer.get_base_layer()).__name__ == "Qwen3MoeExperts"
    assert layer.r == {"default": R}
    assert layer.lora_alpha == {"default": 6}
    assert layer.scaling == {"default": 6 / R}
    assert layer.active_adapters == ["default"]
    assert layer.merged_adapters == []
    assert not layer.merged
    assert not layer.disable_adapters


def test_counts_of_trainable_parameters_are_right(capsys):
    model = moe_lora(tiny_model())
    trainable = 2 * R * E * (H + 2 * I + I + H)
    total = trainable + sum(p.numel() for p in tiny_model().parameters())
    assert model.get_nb_trainable_parameters() == (trainable, total)
    model.print_trainable_parameters()
    printed = capsys.readouterr().out
    assert f"{trainable:,}" in printed
    assert f"{total:,}" in printed
    assert f"2 experts modules, {2 * E} experts, {4 * E} projections" in printed


def test_copies_print_their_own_counts(capsys):
    model = moe_lora(tiny_model())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.delete_adapter("default")
    for twin in copies:
        twin.print_trainable_parameters()
        assert f"2 experts modules, {2 * E} experts" in capsys.readouterr().out


def test_a_base_adapted_again_prints_its_counts(capsys):
    """transformers leaves the configuration of the first adapter on the base."""
    base = tiny_model()
    base.add_adapter(MoELoraConfig(target_modules=["experts"]), "first")
    again = moe_lora(base, adapter_name="second")
    again.print_trainable_parameters()
    assert f"2 experts modules, {2 * E} experts" in capsys.readouterr().out


def test_more_adapters_leave_no_hooks_behind():
    model = moe_lora(tiny_model())
    before = len(_global_module_registration_hooks)
    model.add_adapter("second", MoELoraConfig(target_modules=["experts"]))
    assert len(_global_module_registration_hooks) == before


def test_attaching_says_what_got_an_adapter(caplog):
    """2 experts modules of E experts, both projections of each: logged, and kept for later."""
    counts = f"2 experts modules, {2 * E} experts, {4 * E} projections"
    with caplog.at_level(logging.INFO, logger="peft_moe_lora"):
        model = moe_lora(tiny_model(), target_modules=["experts", "q_proj"])
    assert counts in caplog.text
    assert counts in model.base_model.summary()


def test_a_notebook_shows_the_summary_as_a_table(capsys):
    model = moe_lora(tiny_model(), target_modules=["experts", "q_proj"])
    table = model.base_model.summary()._repr_html_()
    rows = re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", table)
    assert rows == [
        ("2 experts modules", f"{2 * E} experts, {4 * E} projections adapted"),
        ("2 other layers", "2 self_attn.q_proj"),
    ]
    model.print_trainable_parameters()
    assert capsys.readouterr().out.count("experts modules") == 1


def test_status_functions_of_peft_work():
    model = moe_lora(tiny_model(), target_modules=["experts", "q_proj"])
    status = {layer.name: layer for layer in get_layer_status(model)}
    adapted = {f"layers.{i}.{name}" for i in (0, 1) for name in ("mlp.experts", "self_attn.q_proj")}
    assert {name[name.index("layers.") :] for name in status} == adapted
    experts = next(layer for name, layer in status.items() if name.endswith("layers.1.mlp.experts"))
    assert experts.enabled
    assert experts.active_adapters == ["default"]
    assert experts.requires_grad == {"default": True}
    assert experts.available_adapters == ["default"]
    assert experts.devices == {"default": ["cpu"]}
    summary = get_model_status(model)
    assert summary.adapter_model_type == "MoELoraModel"
    assert summary.peft_types == {"default": "MOE_LORA"}
    assert summary.num_adapter_layers == 4
    assert summary.trainable_params == sum(p.numel() for p in adapter_parameters(model).values())
    assert summary.enabled is True
    assert summary.merged_adapters == []


def test_repr_shows_the_adapter():
    assert "lora_A" in repr(experts_layer(moe_lora(tiny_model())))


# ---- initialisation ------------------------------------------------------------------------------


def test_a_is_drawn_as_a_linear_layer_draws_it_and_b_is_zero():
    for lora_A, lora_B in experts_adapter(wrap(qwen_experts(), randomize=False, r=64)).values():
        bound = lora_A.shape[1] ** -0.5
        assert (lora_B == 0).all()
        assert lora_A.abs().max() <= bound
        assert lora_A.abs().max() > 0.99 * bound
        # a uniform draw's standard deviation; 10,000 values put it within 2 %
        assert lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_gaussian_initialisation_is_as_in_peft():
    for lora_A, lora_B in experts_adapter(
        wrap(qwen_experts(), randomize=False, r=64, init_lora_weights="gaussian")
    ).values():
        assert (lora_B == 0).all()
        assert lora_A.std().item() == pytest.approx(1 / 64, rel=0.03)
        assert lora_A.abs().max() > 3 / 64


def test_initialisation_switched_off_leaves_b_random():
    for lora_A, lora_B in experts_adapter(
        wrap(qwen_experts(), randomize=False, r=16, init_lora_weights=False)
    ).values():
        assert (lora_A != 0).float().mean() > 0.99
        # as a linear layer of fan-in r draws its weight
        bound = 16**-0.5
        assert lora_B.abs().max() <= bound
        assert lora_B.min() < -0.98 * bound
        assert lora_B.max() > 0.98 * bound
        assert lora_B.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


def test_every_expert_starts_from_its_own_draw():
    (lora_A, _), *_ = experts_adapter(wrap(qwen_experts(), randomize=False)).values()
    experts = lora_A.view(E, R, -1)
    assert all(not torch.equal(experts[0], experts[e]) for e in range(1, E))


@pytest.mark.parametrize("family", tiny_families())
def test_new_adapter_changes_nothing(family):
    base = tiny_model(family)
    plain = outputs(base)
    # several layers deep, added in another order than the model's own
    assert_close(outputs(moe_lora(base, randomize=False)), plain, 1e-5)


def test_new_adapter_changes_no_bit_of_our_own_path():
    """With only `gate_up` targeted, `down` takes the path without an adapter, and vice versa."""
    for present, absent in (("gate_up", "down"), ("down", "gate_up")):
        plain, rows = qwen_experts(), random_rows()
        alone = wrap(copy.deepcopy(plain), target_projections=[present])
        both = wrap(copy.deepcopy(plain), randomize=False)
        with torch.no_grad():
            for mine, his in zip(
                experts_adapter(both)[present], experts_adapter(alone)[present], strict=True
            ):
                mine.copy_(his)
        assert (experts_adapter(both)[absent][1] == 0).all()
        assert_share_of_order_one(alone(*rows), plain(*rows), low=0.2)
        assert torch.equal(alone(*rows), both(*rows))


# ---- settings per layer --------------------------------------------------------------------------


def check_against_deltas(model, base, scalings, ranks):
    """The whole model's output is that of a plain model whose experts hold base + delta."""
    expected = copy.deepcopy(base)
    for path in experts_paths(base):
        adapters = experts_adapter(model, path)
        assert {a.shape[0] // E for a, _ in adapters.values()} <= {ranks[path]}
        for projection, delta in dense_deltas(adapters, E, scalings[path]).items():
            weight = {"gate_up": "gate_up_proj", "down": "down_proj"}[projection]
            with torch.no_grad():
                getattr(expected.get_submodule(path), weight).add_(delta)
    assert_share_of_order_one(outputs(expected), outputs(base))
    assert_close(outputs(model), outputs(expected))


def test_rank_and_alpha_patterns_hold_per_layer():
    base = tiny_model()
    model = moe_lora(
        copy.deepcopy(base),
        lora_alpha=8,
        rank_pattern={"layers.1.mlp.experts": 2},
        alpha_pattern={"layers.0.mlp.experts": 12},
    )
    assert experts_layer(model).r == {"default": 2}
    check_against_deltas(model, base, {FIRST: 12 / R, SECOND: 8 / 2}, {FIRST: R, SECOND: 2})


def test_rslora_divides_by_the_root_of_the_rank():
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), use_rslora=True, lora_alpha=5)
    check_against_deltas(
        model, base, dict.fromkeys((FIRST, SECOND), 5 / 2), dict.fromkeys((FIRST, SECOND), R)
    )


def test_layers_to_transform_picks_layers():
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), layers_to_transform=[1])
    assert not experts_adapter(model, FIRST)
    fill_adapter(model, gain=1.3)
    check_against_deltas(model, base, {FIRST: 0, SECOND: 2}, {FIRST: 0, SECOND: R})


def test_exclude_modules_leaves_modules_out():
    model = moe_lora(tiny_model(), exclude_modules=["model.layers.0.mlp.experts"])
    assert not experts_adapter(model, FIRST)
    assert set(experts_adapter(model, SECOND)) == {"gate_up", "down"}


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [(r".*\.experts", [FIRST, SECOND]), (r".*layers\.1\.mlp\.experts", [SECOND])],
)
def test_a_string_is_a_pattern_for_the_whole_path(pattern, paths):
    model = moe_lora(tiny_model(), target_modules=pattern)
    wrapped = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    assert wrapped == [f"base_model.model.{path}" for path in paths]


def test_all_linear_is_every_linear_layer_but_the_head_and_the_experts():
    model = moe_lora(tiny_model(), target_modules="all-linear")
    wrapped = {
        n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }
    assert wrapped == {"q_proj", "k_proj", "v_proj", "o_proj", "experts"}


def test_target_projections_may_be_one_word():
    assert set(experts_adapter(wrap(qwen_experts(), target_projections="down"))) == {"down"}
    assert set(experts_adapter(wrap(qwen_experts(), target_projections=("down",)))) == {"down"}


def test_experts_and_linear_layers_share_an_adapter():
    base = tiny_model()
    plain = outputs(base)
    model = moe_lora(copy.deepcopy(base), target_modules=["experts", "q_proj"])
    names = adapter_parameters(model)
    assert sum("q_proj" in name for name in names) == 4
    assert sum("experts" in name for name in names) == 8
    assert_share_of_order_one(outputs(model), plain)
    outputs(model).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in names.values())
    expected = outputs(model)
    assert_close(outputs(model.merge_and_unload()), expected)


def test_modules_to_save_are_trained_beside():
    model = moe_lora(tiny_model(), modules_to_save=["lm_head"])
    outputs(model).square().mean().backward()
    head = model.base_model.model.lm_head
    assert head.modules_to_save["default"].weight.grad.abs().max() > 0
    assert head.original_module.weight.grad is None


# ---- several adapters ----------------------------------------------------------------------------


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


# ---- dtype and device ----------------------------------------------------------------------------


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
