"""What an adapter wraps, how it starts, and what the settings of its configuration do."""

import copy
import logging
import pickle
import re

import pytest
import torch
from peft import get_layer_status, get_model_status, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.modules.module import _global_module_registration_hooks

import peft_moe_lora
from helpers import (
    E,
    H,
    I,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    dense_deltas,
    experts_adapter,
    experts_paths,
    fill_adapter,
    moe_lora,
    outputs,
    random_rows,
    tiny_families,
    tiny_model,
    wrap,
)
from peft_moe_lora import MoELoraConfig, MoELoraModel
from peft_moe_lora.layers.layer import MoELoraLayer
from tuner.models import FIRST, SECOND, experts_layer, qwen_experts

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
