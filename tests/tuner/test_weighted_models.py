"""`add_weighted_adapter` in whole models: beside experts, saved, merged, refused."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from helpers import (
    FP32,
    QWEN3_MOE,
    E,
    Holder,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    assert_unchanged,
    build_experts,
    dense_delta,
    experts_adapter,
    experts_paths,
    fill_adapter,
    fold_scaling,
    moe_lora,
    outputs,
    snapshot,
    tiny_model,
)
from peft_moe_lora import MoELoraConfig, convert_adapter, quantize_experts

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
GATE = "base_model.model.model.layers.1.mlp.gate"
NEW = "mixed"
BOTH = ["first", "second"]
WEIGHTS = [0.6, -0.8]


def two_adapters(base, first=None, second=None):
    """A base with two filled adapters, by default on experts."""
    model = moe_lora(base, adapter_name="first", **(first or {}))
    settings = {"r": R, "lora_alpha": 2 * R, "target_modules": ["experts"], **(second or {})}
    model.add_adapter("second", MoELoraConfig(**settings))
    fill_adapter(model, "second", seed=9)
    return model


def mix(model, kind="cat", **options):
    model.add_weighted_adapter(BOTH, WEIGHTS, NEW, kind, **options)
    return model.peft_config[NEW]


def product(layer, name):
    """scaling * B A of a layer without experts."""
    if name in layer.lora_A:
        return layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
    return layer.scaling[name] * layer.lora_embedding_B[name] @ layer.lora_embedding_A[name]


def experts_delta(model, path, name):
    """{projection: [E, N, K]} of an adapter on all experts."""
    scaling = model.get_submodule(f"base_model.model.{path}").scaling[name]
    pairs = experts_adapter(model, path, name)
    return {p: dense_delta(A, B, E, scaling).detach() for p, (A, B) in pairs.items()}


def assert_weighted_sum(model, path):
    """The new adapter's delta on a layer of experts is the weighted sum of the two others'."""
    first, second = (experts_delta(model, path, name) for name in BOTH)
    mixed = experts_delta(model, path, NEW)
    assert mixed.keys() == first.keys() | second.keys()
    for projection, delta in mixed.items():
        expected = 0
        for weight, deltas in zip(WEIGHTS, (first, second), strict=True):
            expected = expected + weight * deltas.get(projection, torch.zeros_like(delta))
        assert expected.abs().max() > 0.01
        assert_close(delta, expected, FP32, f"{path} {projection}")


# ---- beside experts ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties", "magnitude_prune_svd"])
def test_linear_layers_and_embeddings_are_combined_as_in_peft(kind):
    targets = {"first": ["q_proj", "embed_tokens"], "second": ["q_proj", "o_proj"]}
    ours = two_adapters(
        tiny_model(),
        {"target_modules": ["experts", *targets["first"]]},
        {"target_modules": ["experts", *targets["second"]], "lora_alpha": 3},
    )
    theirs = get_peft_model(
        tiny_model(), LoraConfig(r=R, lora_alpha=2 * R, target_modules=targets["first"]), "first"
    )
    theirs.add_adapter("second", LoraConfig(r=R, lora_alpha=3, target_modules=targets["second"]))
    named = dict(ours.named_parameters())
    for name in BOTH:
        for key, parameter in adapter_parameters(theirs, name).items():
            parameter.data.copy_(named[key])
    if kind.endswith("svd"):
        # PEFT 0.20 counts the scaling twice
        fold_scaling(theirs)
    mix(ours, kind, density=0.7)
    theirs.add_weighted_adapter(BOTH, WEIGHTS, NEW, kind, density=0.7)
    assert ours.peft_config[NEW].target_modules == {
        "experts",
        *targets["first"],
        *targets["second"],
    }
    layers = [name.partition(".lora_")[0] for name in adapter_parameters(theirs, NEW)]
    assert len(set(layers)) == 5
    for path in set(layers):
        right = product(theirs.get_submodule(path), NEW)
        assert right.abs().max() > 0.001
        assert_close(product(ours.get_submodule(path), NEW), right, FP32, path)


class WithConvolutions(Holder):
    def __init__(self):
        super().__init__(build_experts(*QWEN3_MOE))
        self.wide = nn.Conv2d(8, 12, 3)
        self.narrow = nn.Conv2d(8, 12, 1)
        self.grouped = nn.Conv1d(8, 8, 3, groups=4)


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "dare_ties_svd"])
def test_convolutions_are_combined_as_in_peft(kind, monkeypatch):
    settings = {"r": R, "lora_alpha": 3, "target_modules": ["wide", "narrow"]}
    ours = two_adapters(WithConvolutions(), settings, settings)
    theirs = get_peft_model(WithConvolutions(), LoraConfig(**settings), "first")
    theirs.add_adapter("second", LoraConfig(**settings))
    named = dict(ours.named_parameters())
    for name in BOTH:
        for key, parameter in adapter_parameters(theirs, name).items():
            parameter.data.copy_(named[key])
    if kind.endswith("svd"):
        # PEFT 0.20 counts the scaling twice
        fold_scaling(theirs)
    # the layers are initialised between two draws of PEFT's, before the draws of ours
    monkeypatch.setattr(torch, "bernoulli", lambda density: (density.cumsum(0) % 1 > 0.5).float())
    for model in (ours, theirs):
        mix(model, kind, density=0.3)
    for path in ("wide", "narrow"):
        deltas = [
            model.base_model.model.get_submodule(path).get_delta_weight(NEW)
            for model in (ours, theirs)
        ]
        assert deltas[1].abs().max() > 0.001
        assert_close(*deltas, FP32, path)


def test_convolutions_with_groups_are_refused():
    settings = {"target_modules": ["experts", "grouped"]}
    model = two_adapters(WithConvolutions(), settings, settings)
    before = snapshot(model)
    with pytest.raises(ValueError, match="grouped is a convolution with groups"):
        mix(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_routers_take_ranks_above_their_number_of_experts(kind):
    settings = {"target_modules": ["experts", "gate"], "r": 2 * E, "use_rslora": True}
    model = two_adapters(tiny_model(), settings, {**settings, "lora_alpha": 7})
    mix(model, kind)
    gate = model.get_submodule(GATE)
    expected = WEIGHTS[0] * product(gate, "first") + WEIGHTS[1] * product(gate, "second")
    assert expected.abs().max() > 0.01
    assert_close(product(gate, NEW), expected, FP32, "router")
    model.set_adapter(NEW)
    assert torch.isfinite(outputs(model)).all()


def test_layers_chosen_otherwise_in_each_adapter_are_all_combined():
    model = two_adapters(
        tiny_model(),
        {"target_modules": ["experts", "q_proj"], "layers_to_transform": [0]},
        {"target_modules": ["experts", "v_proj"], "exclude_modules": ["layers.0.mlp.experts"]},
    )
    config = mix(model)
    layers = {name.partition(".lora_")[0] for name in adapter_parameters(model, NEW)}
    assert {path.removeprefix("base_model.model.model.") for path in layers} == {
        "layers.0.mlp.experts",
        "layers.1.mlp.experts",
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.v_proj",
        "layers.1.self_attn.v_proj",
    }
    assert config.layers_to_transform is None
    assert config.exclude_modules is None
    for path, name, weight in ((FIRST, "first", 0.6), (SECOND, "second", -0.8)):
        mixed = experts_delta(model, path, NEW)
        for projection, delta in experts_delta(model, path, name).items():
            assert_close(mixed[projection], weight * delta, FP32, path)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_ranks_of_patterns_are_filled_up_to_the_rank_of_the_new_adapter(kind, tmp_path):
    ranks = {"rank_pattern": {"layers.0.mlp.experts": 2, "layers.0.self_attn.q_proj": 3}}
    settings = {"target_modules": ["experts", "q_proj"], **ranks}
    model = two_adapters(tiny_model(), settings, settings)
    assert mix(model, kind).rank_pattern == {}
    if kind != "linear":
        assert_weighted_sum(model, FIRST)
    model.set_adapter(NEW)
    assert_loads_as(model, tmp_path)


def test_experts_that_one_adapter_names_by_layer():
    model = two_adapters(
        tiny_model(),
        {"expert_indices": {"layers.0.mlp.experts": [1]}},
        {"target_projections": None},
    )
    config = mix(model)
    assert config.expert_indices == {FIRST: list(range(E)), SECOND: list(range(E))}
    second = experts_delta(model, SECOND, "second")
    for projection, delta in experts_delta(model, SECOND, NEW).items():
        assert_close(delta, WEIGHTS[1] * second[projection], FP32, projection)


def test_projections_of_both_adapters_are_kept():
    model = two_adapters(
        tiny_model(), {"target_projections": ["down"]}, {"target_projections": ["gate_up"]}
    )
    assert mix(model).target_projections == ["gate_up", "down"]
    assert_weighted_sum(model, SECOND)


@pytest.mark.parametrize("family", ["gpt_oss", "nemotron_h", "mixtral"])
def test_other_families(family):
    model = two_adapters(tiny_model(family))
    mix(model, "svd", svd_rank=2 * R)
    for path in experts_paths(tiny_model(family)):
        assert_weighted_sum(model, path)


# ---- the new adapter's life ----------------------------------------------------------------------


def assert_loads_as(model, folder):
    """The active adapter, saved and loaded, gives the same outputs."""
    expected = outputs(model)
    model.save_pretrained(folder, selected_adapters=[NEW])
    loaded = PeftModel.from_pretrained(tiny_model(), folder / NEW)
    assert_share_of_order_one(expected, outputs(tiny_model()))
    assert_close(outputs(loaded), expected, FP32, "loaded")
    return loaded


def test_it_is_saved_loaded_converted_and_merged(tmp_path):
    settings = {"target_modules": ["experts", "q_proj", "gate"]}
    model = two_adapters(
        tiny_model(),
        {**settings, "expert_indices": {"experts": [0, 2]}, "use_rslora": True},
        {**settings, "r": 3, "expert_indices": {"experts": [2, 3]}},
    )
    mix(model)
    model.set_adapter(NEW)
    expected = outputs(model).detach()
    loaded = assert_loads_as(model, tmp_path)
    assert loaded.peft_config["default"].expert_indices == {FIRST: [0, 2, 3], SECOND: [0, 2, 3]}
    merged = loaded.merge_and_unload()
    assert_close(outputs(merged), expected, FP32, "merged")
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    convert_adapter(tmp_path / NEW, tmp_path / "there", to="per_expert", base_config=base)
    convert_adapter(tmp_path / "there", tmp_path / "back", to="moe_lora", base_config=base)
    back = PeftModel.from_pretrained(tiny_model(), tmp_path / "back")
    assert_close(outputs(back), expected, FP32, "converted")


def test_it_is_frozen_not_active_and_leaves_the_others_alone():
    model = two_adapters(tiny_model())
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    # the name is a part of every other adapter's parameter names
    model.add_weighted_adapter(BOTH, WEIGHTS, "irst", "cat")
    assert model.active_adapters == ["first"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    model.set_adapter("irst")
    assert all(p.requires_grad for p in adapter_parameters(model, "irst").values())


def test_merged_adapters_are_combined_with_their_scaling_now():
    model = two_adapters(tiny_model())
    model.merge_adapter(["first"])
    for layer in (model.get_submodule(f"base_model.model.{path}") for path in (FIRST, SECOND)):
        layer.set_scale("first", 3.0)
    mix(model)
    assert_weighted_sum(model, FIRST)


def test_adapters_in_half_precision_are_combined_in_fp32():
    model = two_adapters(tiny_model(dtype=torch.bfloat16))
    for parameter in adapter_parameters(model, "first").values():
        parameter.data = parameter.data.bfloat16()
    mix(model, "svd", svd_rank=2 * R)
    second = experts_delta(model, FIRST, "second")
    for projection, delta in experts_delta(model, FIRST, NEW).items():
        A, B = experts_adapter(model, FIRST, "first")[projection]
        exact = dense_delta(A.float(), B.float(), E, 2.0)
        expected = WEIGHTS[0] * exact + WEIGHTS[1] * second[projection]
        assert_close(delta, expected, FP32, projection)


@pytest.mark.parametrize("kind", ["svd", "ties_svd", "linear"])
def test_autocast_does_not_round_what_is_combined(kind):
    density = 0.5 if kind == "ties_svd" else None
    expected, model = (two_adapters(tiny_model()) for _ in range(2))
    mix(expected, kind, density=density)
    with torch.autocast("cpu", torch.bfloat16):
        mix(model, kind, density=density)
    wanted = adapter_parameters(expected, NEW)
    for name, parameter in adapter_parameters(model, NEW).items():
        assert torch.equal(parameter, wanted[name]), name


def test_quantized_and_offloaded_experts():
    quantized = two_adapters(quantize_experts(tiny_model()))
    mix(quantized)
    assert_weighted_sum(quantized, SECOND)
    targets = {"target_modules": ["experts", "q_proj"]}
    model = two_adapters(tiny_model(), targets, targets)
    right = copy.deepcopy(model)
    mix(right)
    cpu_offload(model, execution_device=torch.device("cpu"))
    layer = model.get_submodule(f"base_model.model.{SECOND}")
    mix(model)
    away = ["first", "second"]
    assert all(p.is_meta for name in away for p in layer.lora_A[name].parameters())
    for projection, (A, B) in experts_adapter(right, SECOND, NEW).items():
        found = experts_adapter(model, SECOND, NEW)[projection]
        assert torch.equal(found[0], A)
        assert torch.equal(found[1], B)
    model.set_adapter(NEW)
    right.set_adapter(NEW)
    assert_close(outputs(model), outputs(right), FP32, "offloaded")


# ---- refusals ------------------------------------------------------------------------------------

OTHER_RANK = {"r": 3}
NAMED = {"target_modules": r".*\.experts"}


@pytest.mark.parametrize(
    ("second", "arguments", "said"),
    [
        (OTHER_RANK, {"combination_type": "linear"}, "same r value"),
        (OTHER_RANK, {"combination_type": "ties", "density": 0.5}, "same r value"),
        (
            {"rank_pattern": {"layers.0.mlp.experts": 2}},
            {"combination_type": "linear"},
            r"same r value .* model.layers.0.mlp.experts their ranks are \[4, 2\]",
        ),
        (NAMED, {}, "target modules type"),
        ({}, {"combination_type": "mean"}, "Invalid combination_type"),
        ({}, {"combination_type": "mean_svd"}, "Invalid combination_type"),
        ({}, {"adapters": ["first", "third"]}, "third does not exist"),
        ({}, {"adapters": []}, ""),
        ({}, {"weights": [1.0]}, "one finite number for each of the 2 adapters"),
        ({}, {"weights": [1.0, float("nan")]}, "one finite number for each"),
        ({}, {"adapter_name": "second"}, "adapter 'second' already"),
        ({}, {"combination_type": "ties"}, "density"),
        ({}, {"combination_type": "dare_linear_svd", "density": -0.1}, "density"),
        ({}, {"combination_type": "ties", "density": float("nan")}, "density"),
        (
            {},
            {"combination_type": "ties", "density": 0.5, "majority_sign_method": "all"},
            "majority_sign_method",
        ),
        ({}, {"svd_clamp": 1.5}, "svd_clamp"),
        ({}, {"svd_rank": -1}, "r must be"),
        ({"bias": "all"}, {}, "'second' has bias='all'"),
        ({"modules_to_save": ["lm_head"]}, {}, "'second' has modules_to_save"),
    ],
    ids=str,
)
def test_what_cannot_be_combined_is_refused_before_anything_changes(second, arguments, said):
    model = two_adapters(tiny_model(), second=second)
    before = snapshot(model)
    arguments = {"adapters": BOTH, "weights": WEIGHTS, "adapter_name": NEW} | arguments
    with pytest.raises(ValueError, match=said):
        model.add_weighted_adapter(**arguments)
    assert_unchanged(model, before)
    assert list(model.peft_config) == BOTH


def test_tokens_are_refused_before_anything_changes():
    tokens = {"target_modules": ["experts"], "trainable_token_indices": [1]}
    model = two_adapters(tiny_model(), tokens, tokens)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'first' has trainable_token_indices"):
        mix(model)
    assert_unchanged(model, before)


def test_a_name_that_no_module_may_have_leaves_the_model_unchanged():
    model = two_adapters(tiny_model())
    before = snapshot(model)
    with pytest.raises(KeyError):
        model.add_weighted_adapter(BOTH, WEIGHTS, "a.b", "cat")
    assert_unchanged(model, before)
    assert list(model.peft_config) == BOTH


def test_an_adapter_without_its_whole_parameters_is_refused():
    model = two_adapters(tiny_model(), {"target_modules": ["experts", "q_proj"]})
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["first"].weight.data = torch.empty(0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj whole in this process"):
        mix(model)
    assert_unchanged(model, before)


CHANGES = [
    ({"target_modules": {"layers.1.mlp.experts"}}, r"layers.0.mlp.experts .* do not say"),
    ({"r": 2}, r"needs rank 8, but their configurations say 4"),
]


@pytest.mark.parametrize(("changes", "said"), CHANGES, ids=["targets", "rank"])
def test_a_configuration_that_was_changed_since_is_noticed(changes, said):
    model = two_adapters(tiny_model())
    for name in BOTH:
        vars(model.peft_config[name]).update(changes)
    before = snapshot(model)
    with pytest.raises(ValueError, match=said):
        mix(model)
    assert_unchanged(model, before)
    assert list(model.peft_config) == BOTH
