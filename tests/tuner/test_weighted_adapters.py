"""`add_weighted_adapter` on experts is PEFT's own on one linear layer for each expert.

The reference is a model of nn.Linear layers, one for each projection and expert, that hold the same
A and B, and PEFT's own `LoraConfig`. Where a kind is exact, the sum of the deltas is written out.
"""

import copy

import pytest
import torch
from peft import LoraConfig, LoraModel, get_peft_model
from torch import nn

from helpers import (
    FP32,
    QWEN3_MOE,
    E,
    H,
    I,
    R,
    assert_close,
    assert_share_of_order_one,
    build_experts,
    experts_adapter,
    fill_adapter,
    fold_scaling,
    in_double,
    oracle,
    random_rows,
    wrap,
)
from peft_moe_lora import MoELoraConfig

SHAPES = {"gate_up": (2 * I, H), "down": (H, I)}
NEW = "mixed"
DENSE_KINDS = ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
FACTOR_KINDS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
KINDS = ["cat", *DENSE_KINDS, *FACTOR_KINDS]
SEED = 5


def pruning(kind):
    """The arguments that a kind needs."""
    options = {}
    if "ties" in kind or "dare" in kind or "magnitude" in kind:
        options["density"] = 0.6
    if "ties" in kind:
        options["majority_sign_method"] = "frequency"
    return options


# adapter -> its configuration, for two experts modules of which only ours knows expert_indices
EQUAL = {
    "first": {"r": R, "lora_alpha": 2 * R},
    "second": {"r": R, "lora_alpha": R, "use_rslora": True, "expert_indices": {"experts": [1, 3]}},
    "third": {"r": R, "lora_alpha": 3 * R, "target_projections": ["down"]},
}
DIFFERENT = {
    "first": {"r": 3, "lora_alpha": 6, "expert_indices": {"experts": [0, 3]}},
    "second": {"r": 5, "lora_alpha": 5, "use_rslora": True, "expert_indices": {"experts": [1, 3]}},
}
SHARES = {"first": 0.7, "second": -0.9, "third": 0.4}


def with_adapters(configs):
    """Our model with filled adapters; the last one's scaling is changed after the fact."""
    names = list(configs)
    model = wrap(build_experts(*QWEN3_MOE), False, names[0], **configs[names[0]])
    for seed, name in enumerate(names, start=1):
        if name != names[0]:
            model.add_adapter(name, MoELoraConfig(target_modules=["experts"], **configs[name]))
        fill_adapter(model, name, seed=seed)
    model.base_model.model.experts.set_scale(names[-1], 1.5)
    return model


def chosen(config):
    return config.get("expert_indices", {"experts": range(E)})["experts"]


def matrices(model, config, name):
    """{(projection, expert): (A, B)} of one adapter of ours."""
    found = {}
    for projection, (A, B) in experts_adapter(model, adapter_name=name).items():
        As = A.chunk(len(chosen(config)), dim=0)
        Bs = B.chunk(len(chosen(config)), dim=1)
        for expert, one_A, one_B in zip(chosen(config), As, Bs, strict=True):
            found[projection, expert] = (one_A.detach(), one_B.detach())
    return found


def scaling_of(model, name):
    return model.base_model.model.experts.scaling[name]


def linears(model, configs):
    """PEFT's model with one linear layer for each expert and projection, and the same adapters."""
    modules = {
        f"{projection}_{expert}": nn.Linear(K, N, bias=False)
        for projection, (N, K) in SHAPES.items()
        for expert in range(E)
    }
    theirs = nn.ModuleDict(modules)
    for name, config in configs.items():
        held = matrices(model, config, name)
        targets = [f"{projection}_{expert}" for projection, expert in held]
        own = {"r": config["r"], "lora_alpha": config["lora_alpha"], "target_modules": targets}
        if isinstance(theirs, nn.ModuleDict):
            theirs = get_peft_model(theirs, LoraConfig(**own), adapter_name=name)
        else:
            theirs.add_adapter(name, LoraConfig(**own))
        for (projection, expert), (A, B) in held.items():
            layer = theirs.base_model.model[f"{projection}_{expert}"]
            layer.lora_A[name].weight.data.copy_(A)
            layer.lora_B[name].weight.data.copy_(B)
            layer.scaling[name] = scaling_of(model, name)
    return theirs


def reseeded(inject):
    """PEFT initialises the new adapter before it draws what dare prunes; ours draws first."""

    def inject_and_seed(*args, **kwargs):
        inject(*args, **kwargs)
        torch.manual_seed(SEED)

    return inject_and_seed


def mixed_deltas(model, config):
    """{(projection, expert): B A} of the new adapter, whose scaling has to be 1."""
    assert scaling_of(model, NEW) == 1
    return {key: B @ A for key, (A, B) in matrices(model, config, NEW).items()}


def union(configs):
    if all("expert_indices" not in config for config in configs.values()):
        return {}
    ids = sorted(set().union(*(chosen(config) for config in configs.values())))
    return {"expert_indices": {"experts": ids}}


def assert_as_peft(configs, kind, monkeypatch, **options):
    model = with_adapters(configs)
    weights = [SHARES[name] for name in configs]
    theirs = linears(model, configs)
    if kind.endswith("svd"):
        # PEFT 0.20 counts the scaling twice
        fold_scaling(theirs)
    torch.manual_seed(SEED)
    model.add_weighted_adapter(list(configs), weights, NEW, kind, **options)
    monkeypatch.setattr(LoraModel, "inject_adapter", reseeded(LoraModel.inject_adapter))
    theirs.add_weighted_adapter(list(configs), weights, NEW, kind, **options)
    found = mixed_deltas(model, union(configs))
    rank = model.peft_config[NEW].r
    assert rank == theirs.peft_config[NEW].r
    for (projection, expert), delta in found.items():
        layer = theirs.base_model.model[f"{projection}_{expert}"]
        if NEW not in layer.lora_A:
            assert not delta.any()
            continue
        A, B = layer.lora_A[NEW].weight, layer.lora_B[NEW].weight
        assert A.shape[0] == rank
        assert_close(delta, B @ A, FP32, f"{projection} of expert {expert}")
        assert delta.abs().max() > 0.01
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_peft_s_own_for_each_expert(kind, monkeypatch):
    model = assert_as_peft(EQUAL, kind, monkeypatch, **pruning(kind))
    assert model.peft_config[NEW].r == (3 * R if kind == "cat" else R)


@pytest.mark.parametrize("kind", ["cat", *DENSE_KINDS])
def test_ranks_and_experts_may_differ(kind, monkeypatch):
    model = assert_as_peft(DIFFERENT, kind, monkeypatch, **pruning(kind))
    config = model.peft_config[NEW]
    assert config.r == (8 if kind == "cat" else 5)
    assert config.expert_indices == {"experts": [0, 1, 3]}


@pytest.mark.parametrize(
    "options",
    [
        {"svd_rank": 2},
        {"svd_rank": 7},
        {"svd_full_matrices": False},
        {"svd_clamp": 0.8},
        {"svd_clamp": 0.8, "svd_rank": 2, "svd_full_matrices": False},
    ],
    ids=str,
)
def test_the_options_of_svd_are_honoured(options, monkeypatch):
    assert_as_peft(DIFFERENT, "svd", monkeypatch, **options)


def test_a_driver_of_svd_is_passed_on():
    model = with_adapters(DIFFERENT)
    for kind in ("svd", "ties_svd"):
        with pytest.raises(RuntimeError, match="driver"):
            model.add_weighted_adapter(
                ["first", "second"], [1, 1], NEW, kind, svd_driver="gesvd", density=0.5
            )
        assert NEW not in model.peft_config


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_density_and_the_majority_are_honoured(density, method, monkeypatch):
    options = {"density": density, "majority_sign_method": method}
    for kind in ("ties", "ties_svd"):
        with monkeypatch.context() as patches:
            assert_as_peft(EQUAL, kind, patches, **options)


def sum_of_deltas(model, configs):
    """{projection: [E, N, K]}, the sum of share * scaling * B A written out."""
    total = {p: torch.zeros(E, *shape, dtype=torch.double) for p, shape in SHAPES.items()}
    for name, config in configs.items():
        share = SHARES[name] * scaling_of(model, name)
        for (projection, expert), (A, B) in matrices(model, config, name).items():
            total[projection][expert] += share * B.double() @ A.double()
    return total


@pytest.mark.parametrize("configs", [EQUAL, DIFFERENT], ids=["equal ranks", "different ranks"])
@pytest.mark.parametrize(("kind", "options"), [("cat", {}), ("svd", {"svd_rank": 3 * R})])
def test_the_output_is_that_of_the_weighted_sum(configs, kind, options):
    model = with_adapters(configs)
    plain = build_experts(*QWEN3_MOE)
    rows = random_rows(T=40)
    deltas = sum_of_deltas(model, configs)
    weights = [SHARES[name] for name in configs]
    model.add_weighted_adapter(list(configs), weights, NEW, kind, **options)
    model.set_adapter(NEW)
    exact = (rows[0].double(), rows[1], rows[2].double())
    expected = oracle(in_double(plain), *exact, deltas)
    assert_share_of_order_one(expected, plain(*rows))
    assert_close(model(*rows), expected, FP32, "output")
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(merged(*rows), expected, FP32, "merged output")


def test_one_adapter_is_scaled_whatever_the_kind():
    for kind in ("linear", "svd", "cat"):
        model = with_adapters(DIFFERENT)
        model.add_weighted_adapter(["second"], [-2.0], NEW, kind)
        found = mixed_deltas(model, DIFFERENT["second"])
        scaling = scaling_of(model, "second")
        for key, (A, B) in matrices(model, DIFFERENT["second"], "second").items():
            assert_close(found[key], -2 * scaling * B @ A, FP32, str(key))


@pytest.mark.parametrize("kind", ["svd", *FACTOR_KINDS, *DENSE_KINDS])
def test_what_cancels_or_is_pruned_whole_is_zero(kind):
    model = with_adapters({"first": EQUAL["first"]})
    options = {"density": 0} if pruning(kind) else {}
    model.add_weighted_adapter(["first", "first"], [1.0, -1.0], NEW, kind, **options)
    for delta in mixed_deltas(model, EQUAL["first"]).values():
        assert (delta == 0).all()
