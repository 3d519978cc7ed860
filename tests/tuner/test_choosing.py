"""Adapters on some experts only: A and B hold the chosen ones in ascending order.

The other experts compute what the base computes.
"""

import copy
import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import (
    FP32,
    E,
    H,
    I,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    assert_unchanged,
    base_weight,
    build_experts,
    dense_delta,
    experts_adapter,
    experts_paths,
    fill_adapter,
    grads_of,
    in_double,
    moe_lora,
    one_of_each_kind,
    oracle,
    outputs,
    random_rows,
    relative_error,
    snapshot,
    tiny_model,
    token_ids,
    train,
    wrap,
)
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.functional import Projection, experts
from peft_moe_lora.layers.layer import MoELoraLayer
from peft_moe_lora.ops import Activation

CHOSEN = [1, 4]
FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
FAMILIES = one_of_each_kind()


def some(family="qwen3_moe", name="Qwen3MoeExperts"):
    return build_experts(family, name)


def deltas_of_some(model, chosen, scaling=2.0, adapter_name="default"):
    """{projection: [E, N, K]} in double: the chosen experts' updates, by definition; else zeros."""
    found = {}
    for projection, (A, B) in experts_adapter(model, adapter_name=adapter_name).items():
        held = dense_delta(A.double(), B.double(), len(chosen), scaling)
        found[projection] = torch.zeros(E, *held.shape[1:], dtype=held.dtype).index_copy(
            0, torch.tensor(chosen), held
        )
    return found


def base_of(model):
    return in_double(model.base_model.model.experts.get_base_layer())


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"backend": "materialize"}], ids=str)
@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_output_and_gradients_are_the_oracles(family, name, options):
    model = wrap(some(family, name), expert_indices={"experts": [4, 1]}, **options)
    x, index, weights = random_rows(T=23)
    inputs = [x.requires_grad_(), weights.requires_grad_(), *adapter_parameters(model).values()]
    out, gradients = grads_of(lambda: model(x, index, weights), inputs)

    plain = base_of(model)
    expected, exact = grads_of(
        lambda: oracle(plain, x.double(), index, weights.double(), deltas_of_some(model, CHOSEN)),
        inputs,
    )
    assert_close(out, expected, FP32, "output")
    for (what, p), gradient, right in zip(
        [("x", x), ("top_k_weights", weights), *adapter_parameters(model).items()],
        gradients,
        exact,
        strict=True,
    ):
        assert gradient.shape == p.shape
        assert_close(gradient, right, FP32, what)
    # rows of chosen experts change by about their own size, rows of others do not change
    without = oracle(plain, x.double(), index, weights.double())
    touched = torch.isin(index, torch.tensor(CHOSEN)).any(1)
    assert 0 < touched.sum() < len(x)
    assert_share_of_order_one(out[touched], without[touched])
    assert_close(out[~touched], without[~touched], FP32)


def test_adapter_and_optimizer_hold_the_chosen_alone():
    model = wrap(some(), expert_indices={"experts": CHOSEN})
    shapes = {
        n.removeprefix("base_model.model.experts."): tuple(p.shape)
        for n, p in adapter_parameters(model).items()
    }
    S = len(CHOSEN)
    assert shapes == {
        "lora_A.default.gate_up": (R * S, H),
        "lora_B.default.gate_up": (2 * I, R * S),
        "lora_A.default.down": (R * S, I),
        "lora_B.default.down": (H, R * S),
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(*random_rows()).square().sum().backward()
    optimizer.step()
    state = [
        t.numel()
        for entry in optimizer.state.values()
        for name, t in entry.items()
        if name != "step"
    ]
    assert sum(state) == 2 * R * S * (H + 2 * I + I + H)
    assert (
        model.base_model.summary()
        == f"1 experts modules, {S} of {E} experts, {2 * S} projections adapted"
    )


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_all_experts_chosen_is_no_choice(dropout):
    every = wrap(some(), lora_dropout=dropout).train()
    chosen = wrap(some(), lora_dropout=dropout, expert_indices={"experts": range(E)}).train()
    rows = random_rows()
    results = []
    for model in (every, chosen):
        torch.manual_seed(3)
        results.append(
            grads_of(lambda model=model: model(*rows), list(adapter_parameters(model).values()))
        )
    (out, gradients), (same, equal) = results
    assert torch.equal(out, same)
    assert all(torch.equal(a, b) for a, b in zip(gradients, equal, strict=True))


def test_dropout_draws_as_without_a_choice():
    """Dropout masks belong to rows, so a chosen expert's rows see the same masks.

    The adapter on all experts has a B of zeros for the unchosen ones.
    """
    every = wrap(some(), lora_dropout=0.5).train()
    model = wrap(some(), lora_dropout=0.5, expert_indices={"experts": CHOSEN}).train()
    columns = torch.cat([torch.arange(e * R, (e + 1) * R) for e in CHOSEN])
    for projection, (A, B) in experts_adapter(model).items():
        whole_A, whole_B = experts_adapter(every)[projection]
        with torch.no_grad():
            A.copy_(whole_A[columns])
            B.copy_(whole_B[:, columns])
            whole_B.copy_(torch.zeros_like(whole_B).index_copy(1, columns, B))
    rows = random_rows()
    torch.manual_seed(3)
    expected = every(*rows)
    torch.manual_seed(3)
    assert_close(model(*rows), expected, FP32)
    assert relative_error(model(*rows), expected) > 1e-2


def test_fp64_gradients_are_those_of_finite_differences():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    T, num_experts, width, inner, r = 5, 4, 4, 3, 2
    up, down = draw(num_experts, 2 * inner, width), draw(num_experts, width, inner)
    index = torch.randint(num_experts + 1, (T, 2), generator=generator)
    leaves = [
        draw(T, width),
        draw(T, 2),
        draw(r * 2, width),
        draw(2 * inner, r * 2),
        draw(r, inner),
        draw(width, r),
    ]

    def run(x, w, A1, B1, A2, B2):
        pairs = (
            Projection(up, None, A1, B1, 0.7, experts=(0, 3)),
            Projection(down, None, A2, B2, 1.3, experts=(2,)),
        )
        return experts(x, index, w, *pairs, Activation())

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize(("family", "name"), FAMILIES[::3])
def test_compiled_layer_is_one_graph_with_the_same_gradients(family, name):
    model = wrap(some(family, name), expert_indices={"experts": CHOSEN})
    layer, rows = model.base_model.model.experts, random_rows()
    parameters = list(adapter_parameters(model).values())
    out, gradients = grads_of(lambda: layer(*rows), parameters)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same, equal = grads_of(lambda: compiled(*rows), parameters)
    assert_close(same, out)
    for a, b in zip(equal, gradients, strict=True):
        assert_close(a, b)


def test_no_tokens_and_no_rows_for_the_chosen():
    model = wrap(some(), expert_indices={"experts": CHOSEN})
    parameters = list(adapter_parameters(model).values())
    for rows in (
        random_rows(T=0),
        (torch.randn(3, H), torch.tensor([[0, 2]] * 3), torch.rand(3, 2)),
    ):
        out, gradients = grads_of(lambda rows=rows: model(*rows), parameters)
        assert_close(out, oracle(base_of(model).float(), *rows))
        assert all(g is not None and not g.any() for g in gradients)


def test_a_model_that_first_ran_in_inference_mode_trains():
    model = wrap(some(), expert_indices={"experts": [0, 2, 3]})
    with torch.inference_mode():
        model(*random_rows())
    model(*random_rows()).sum().backward()
    assert all(p.grad.any() for p in adapter_parameters(model).values())


# ---- merging, several adapters -------------------------------------------------------------------


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_touches_the_chosen_experts_alone(safe_merge):
    model = wrap(some("gpt_oss", "GptOssExperts"), expert_indices={"experts": CHOSEN})
    rows, layer = random_rows(), model.base_model.model.experts
    before = {p: base_weight(layer.base_layer, p).clone() for p in ("gate_up", "down")}
    out, deltas = model(*rows), deltas_of_some(model, CHOSEN)
    model.base_model.merge_adapter(safe_merge=safe_merge)
    assert_close(model(*rows), out)
    for projection, weight in before.items():
        after = base_weight(layer.base_layer, projection)
        assert_close(after, weight.double() + deltas[projection])
        others = [e for e in range(E) if e not in CHOSEN]
        assert torch.equal(after[others], weight[others])
        for e in range(E):
            assert_close(layer.get_delta_weight("default", projection, e), deltas[projection][e])
    model.base_model.unmerge_adapter()
    assert_close(model(*rows), out)


def test_adapters_with_other_choices_add_up():
    model = wrap(some(), expert_indices={"experts": CHOSEN})
    choices = {"default": CHOSEN, "second": [0, 1], "every": list(range(E))}
    for name, r, indices in (("second", 3, {"experts": [1, 0]}), ("every", 2, None)):
        config = MoELoraConfig(
            r=r,
            lora_alpha=2 * r,
            target_modules=["experts"],
            expert_indices=indices,
            target_projections=["down"] if name == "every" else None,
        )
        model.add_adapter(name, config)
        fill_adapter(model, name, seed=r)
    plain, rows = base_of(model), random_rows(T=23)
    exact = rows[0].double(), rows[1], rows[2].double()
    for active in (
        ["default", "second"],
        ["second", "every"],
        ["default", "second", "every"],
        ["default"],
    ):
        model.base_model.set_adapter(active)
        parameters = {n: p for a in active for n, p in adapter_parameters(model, a).items()}

        def summed(active=active):
            total = {}
            for name in active:
                for projection, delta in deltas_of_some(
                    model, choices[name], adapter_name=name
                ).items():
                    total[projection] = total.get(projection, 0) + delta
            return oracle(plain, *exact, total)

        out, gradients = grads_of(lambda: model(*rows), list(parameters.values()))
        expected, right = grads_of(summed, list(parameters.values()))
        assert_close(out, expected, FP32, str(active))
        for name, a, b in zip(parameters, gradients, right, strict=True):
            assert_close(a, b, FP32, name)
    assert (
        model.base_model.summary("second")
        == f"1 experts modules, 2 of {E} experts, 4 projections adapted"
    )
    model.base_model.set_adapter(["default", "second"])
    assert (
        model.base_model.summary() == f"1 experts modules, 3 of {E} experts, 6 projections adapted"
    )


def test_adapters_on_other_layers_stand_side_by_side():
    model = moe_lora(tiny_model(), expert_indices={FIRST: CHOSEN})
    alone = outputs(model)
    model.add_adapter("second", MoELoraConfig(r=R, lora_alpha=2 * R, expert_indices={SECOND: [0]}))
    fill_adapter(model, "second", seed=5)
    assert isinstance(model.get_submodule(f"base_model.model.{SECOND}"), MoELoraLayer)
    # the second module now runs these kernels too, with no adapter of its own
    assert_close(outputs(model), alone)
    model.set_adapter("second")
    second = outputs(model)
    assert relative_error(second, alone) > 1e-2
    model.delete_adapter("second")
    model.set_adapter("default")
    assert_close(outputs(model), alone)


# ---- which layers --------------------------------------------------------------------------------


def held(model):
    return {
        name.removeprefix("base_model.model."): list(layer.experts_of("default"))
        for name, layer in model.named_modules()
        if isinstance(layer, MoELoraLayer)
    }


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ({"experts": [3, 0]}, {FIRST: [0, 3], SECOND: [0, 3]}),
        ({SECOND: [2]}, {SECOND: [2]}),
        ({"layers.0.mlp.experts": [2], "experts": [1]}, {FIRST: [2], SECOND: [1]}),
        ({r"model\.layers\.[01]\..*": [4]}, {FIRST: [4], SECOND: [4]}),
        ({"layers.0.mlp.experts": [], "experts": [1]}, {SECOND: [1]}),
        ({"experts": torch.tensor([2, 1])}, {FIRST: [1, 2], SECOND: [1, 2]}),
        (None, {FIRST: list(range(E)), SECOND: list(range(E))}),
    ],
    ids=str,
)
def test_the_first_entry_that_matches_a_layer_counts(indices, expected):
    assert held(moe_lora(tiny_model(), expert_indices=indices, target_modules=None)) == expected


def test_other_targets_are_not_touched_by_a_choice():
    model = moe_lora(
        tiny_model(),
        target_modules=["experts", "q_proj"],
        expert_indices={FIRST: [1]},
        rank_pattern={"q_proj": 3, FIRST: 2},
    )
    shapes = {
        n.removeprefix("base_model.model.model."): tuple(p.shape)
        for n, p in adapter_parameters(model).items()
    }
    assert shapes["layers.0.mlp.experts.lora_A.default.gate_up"] == (2, H)
    assert shapes["layers.1.self_attn.q_proj.lora_A.default.weight"] == (3, H)
    assert not any("layers.1.mlp" in name for name in shapes)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({}, "chooses no expert"),
        ({"experts": []}, "chooses no expert"),
        ([1, 2], "must be a dict"),
        ({"experts": 3}, "must be a list"),
        ({"experts": "12"}, "must be a list"),
        ({"experts": [1.0]}, "must be a list"),
        ({"experts": [True]}, "must be a list"),
        ({"experts": [1, 1]}, "each once"),
        ({"experts": [-1]}, "from 0 up"),
        ({"experts(": [1]}, "regular expression"),
        ({3: [1]}, "regular expression"),
    ],
    ids=str,
)
def test_a_choice_that_means_nothing_is_refused(indices, message):
    with pytest.raises(ValueError, match=f"expert_indices.*{message}"):
        MoELoraConfig(expert_indices=indices)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({FIRST: [E]}, rf"names expert {E}, but {FIRST} has {E} experts"),
        (
            {"layers.7.mlp.experts": [1]},
            "'layers.7.mlp.experts' matches no targeted experts module",
        ),
        ({"q_proj": [1], FIRST: [0]}, "'q_proj' matches no targeted"),
        ({"experts": [1], FIRST: [0]}, "an earlier entry"),
    ],
    ids=str,
)
def test_a_choice_that_does_not_fit_changes_nothing(indices, message):
    base = tiny_model()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, MoELoraConfig(expert_indices=indices))
    assert_unchanged(base, before)


# ---- files ---------------------------------------------------------------------------------------


def described(folder):
    with safe_open(folder / "adapter_model.safetensors", "pt") as f:
        return json.loads(f.metadata()["peft_moe_lora"])


def test_saved_adapters_come_back(tmp_path):
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), expert_indices={FIRST: [4, 1], SECOND: [0]})
    model.save_pretrained(tmp_path)
    document, config = (
        described(tmp_path),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    assert document["format_version"] == config["format_version"] == 2
    assert {path: module["experts"] for path, module in document["experts"].items()} == {
        FIRST: [1, 4],
        SECOND: [0],
    }
    assert all(module["num_experts"] == E for module in document["experts"].values())
    assert config["expert_indices"] == {FIRST: [1, 4], SECOND: [0]}
    assert "expert_indices" in (tmp_path / "README.md").read_text()
    shapes = {
        n.rpartition("layers.")[2]: tuple(t.shape)
        for n, t in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    assert shapes["0.mlp.experts.lora_A.gate_up"] == (2 * R, H)
    assert shapes["1.mlp.experts.lora_B.down"] == (H, R)

    for low_cpu_mem_usage in (False, True):
        again = PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert held(again) == {FIRST: [1, 4], SECOND: [0]}
        assert_close(outputs(again.eval()), outputs(model), 0)
    own = copy.deepcopy(base)
    own.load_adapter(str(tmp_path))
    assert_close(outputs(own), outputs(model), 0)


def test_every_expert_is_still_version_one(tmp_path):
    moe_lora(tiny_model()).save_pretrained(tmp_path)
    assert described(tmp_path)["format_version"] == 1
    assert not any("experts" in module for module in described(tmp_path)["experts"].values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FIRST: [1, 3]}, r"holds experts \[1, 4\].*chooses experts \[1, 3\]"),
        (None, r"holds experts \[1, 4\].*chooses every expert"),
        ({FIRST: [1, 4, 0]}, r"holds experts \[1, 4\]"),
        ({SECOND: [1, 4]}, "unknown tensors"),
        ({FIRST: [1, 9]}, "names expert 9"),
        ({FIRST: "all"}, "must be a list"),
    ],
    ids=str,
)
def test_files_that_do_not_belong_together_are_refused(change, message, tmp_path):
    moe_lora(tiny_model(), expert_indices={FIRST: CHOSEN}).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"expert_indices": change}))
    base = tiny_model()
    before = snapshot(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_a_choice_for_a_larger_model_is_refused(tmp_path):
    moe_lora(tiny_model(num_experts=E + 1), expert_indices={FIRST: CHOSEN}).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=f"adapter for {E + 1} experts"):
        PeftModel.from_pretrained(tiny_model(), tmp_path)


def test_a_model_trains_on_its_choice():
    model = moe_lora(
        tiny_model(), randomize=False, expert_indices={FIRST: CHOSEN, SECOND: [0, 2]}
    ).train()
    losses = train(model, token_ids(4))
    assert losses[-1] < losses[0] - 0.05
    assert set(held(model)) == set(experts_paths(tiny_model()))
