"""Every experts class of transformers with an adapter computes base + scaling * B[e] @ A[e].

The classes are found by walking the installed package.
"""

import copy
import pkgutil
import re

import pytest
import torch
import transformers.models
from peft import PeftModel

from helpers import (
    BF16,
    FP32,
    MODELS,
    TOP_K,
    UNFUSED_KINDS,
    E,
    H,
    HandWrittenExperts,
    Holder,
    I,
    R,
    assert_close,
    assert_share_of_order_one,
    base_weight,
    build_experts,
    build_step3p7,
    dense_delta,
    dense_deltas,
    experts_adapter,
    fill,
    fill_adapter,
    grads_of,
    in_double,
    interface_families,
    is_on_the_interface,
    modeling_module,
    one_of_each_kind,
    oracle,
    random_rows,
    wrap,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# lora_alpha / r of every adapter here
SCALING = 2.0

UNDECORATED = {
    "step3p7": build_step3p7,
    "hand written": lambda **sizes: fill(HandWrittenExperts(**sizes)),
}
CASES = [*interface_families(), *((name, None) for name in UNDECORATED)]
every_class = pytest.mark.parametrize("case", CASES, ids=[name or family for family, name in CASES])
every_kind = pytest.mark.parametrize("case", one_of_each_kind(), ids=lambda c: c[0])


def build(case, **sizes):
    family, name = case
    return UNDECORATED[family](**sizes) if name is None else build_experts(family, name, **sizes)


def reference(plain, model, rows):
    """Output and gradients (x, weights, A, B, ...) of the oracle in float64, on `model`'s A, B."""
    plain = in_double(plain)
    hidden_states, top_k_index, top_k_weights = rows
    x, weights = (
        hidden_states.detach().double().requires_grad_(),
        top_k_weights.detach().double().requires_grad_(),
    )
    adapters = {
        projection: tuple(p.detach().double().requires_grad_() for p in pair)
        for projection, pair in experts_adapter(model).items()
    }
    inputs = [x, weights, *(p for pair in adapters.values() for p in pair)]

    def call():
        deltas = dense_deltas(adapters, plain.down_proj.shape[0], SCALING)
        return oracle(plain, x, top_k_index, weights, deltas)

    return grads_of(call, inputs)


def ours(model, rows):
    """Output and gradients of the wrapped module, in the order of `reference`."""
    x, top_k_index, weights = (
        rows[0].detach().requires_grad_(),
        rows[1],
        rows[2].detach().requires_grad_(),
    )
    inputs = [x, weights, *(p for pair in experts_adapter(model).values() for p in pair)]
    return grads_of(lambda: model(x, top_k_index, weights), inputs)


def check_against_oracle(plain, model, rows):
    expected, expected_grads = reference(plain, model, rows)
    assert_share_of_order_one(
        expected, oracle(in_double(plain), rows[0].double(), rows[1], rows[2].double())
    )
    out, grads = ours(model, rows)
    assert_close(out, expected, FP32, "output")
    names = ["d hidden_states", "d top_k_weights"]
    names += [f"d {m}.{p}" for p in experts_adapter(model) for m in ("lora_A", "lora_B")]
    for name, grad, expected_grad in zip(names, grads, expected_grads, strict=True):
        assert expected_grad.abs().max() > 0, f"{name} says nothing: it is zero in the oracle"
        assert_close(grad, expected_grad, FP32, name)


# ---- the walk ------------------------------------------------------------------------------------


def test_no_class_is_left_out():
    uses = [
        line
        for path in MODELS.glob("*/modeling_*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.match(r"@use_experts_implementation\b", line)
    ]
    assert len(interface_families()) == len(uses)
    # 55 in transformers 5.17, 65 in 5.23
    assert len(uses) >= 55


def test_the_sources_say_what_the_classes_are():
    """A second walk: every class with the dispatching forward is in the list."""
    families = {family for family, _ in interface_families()}
    assert families <= {
        module.name for module in pkgutil.iter_modules(transformers.models.__path__)
    }
    for family in families:
        module = modeling_module(family)
        defined = {
            name
            for name, value in vars(module).items()
            if isinstance(value, type)
            and value.__module__ == module.__name__
            and is_on_the_interface(value)
        }
        assert defined == {name for other, name in interface_families() if other == family}


@every_class
def test_the_oracle_is_the_plain_module(case):
    """Without an adapter the oracle computes what the class computes, so it may judge the rest."""
    plain, rows = build(case), random_rows()
    assert_close(
        plain(*rows), oracle(in_double(plain), rows[0].double(), rows[1], rows[2].double())
    )


# ---- forward and backward ------------------------------------------------------------------------


@every_class
def test_output_and_gradients_are_those_of_base_plus_delta(case):
    plain = build(case)
    model = wrap(copy.deepcopy(plain))
    assert set(experts_adapter(model)) == {"gate_up", "down"}
    check_against_oracle(plain, model, random_rows())


@every_class
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_an_adapter_on_one_projection_leaves_the_other_alone(case, projection):
    plain = build(case)
    model = wrap(copy.deepcopy(plain), target_projections=[projection])
    assert set(experts_adapter(model)) == {projection}
    check_against_oracle(plain, model, random_rows())


@every_class
def test_adapter_shapes_are_the_documented_ones(case):
    plain = build(case)
    for projection, (lora_A, lora_B) in experts_adapter(wrap(copy.deepcopy(plain))).items():
        num_experts, N, K = base_weight(plain, projection).shape
        assert lora_A.shape == (R * num_experts, K)
        assert lora_B.shape == (N, R * num_experts)
        assert lora_A.dtype == lora_B.dtype == torch.float32


@every_class
def test_new_adapter_changes_nothing(case):
    plain, rows = build(case), random_rows()
    model = wrap(copy.deepcopy(plain), randomize=False)
    # the same products in another order, without an adapter
    assert_close(model(*rows), plain(*rows), 1e-6)


@every_class
def test_disabled_adapter_is_the_plain_module(case):
    plain, rows = build(case), random_rows()
    if hasattr(plain, "config"):
        plain.config._experts_implementation = "grouped_mm"
    expected = plain(*rows)
    model = wrap(copy.deepcopy(plain), keep_implementation=True)
    assert_share_of_order_one(model(*rows), expected)
    with model.disable_adapter():
        assert torch.equal(model(*rows), expected)
    assert_share_of_order_one(model(*rows), expected)


@every_class
def test_sentinel_ids_are_skipped(case):
    """An id of num_experts or more belongs to another rank: it has no output and no gradient."""
    plain = build(case)
    model = wrap(copy.deepcopy(plain))
    hidden_states, top_k_index, top_k_weights = random_rows()
    top_k_index[0, 0] = top_k_index[5, 1] = E
    top_k_index[3, 0] = E + 7
    # a token that belongs to no expert here
    top_k_index[7, :] = E
    rows = (hidden_states, top_k_index, top_k_weights)
    check_against_oracle(plain, model, rows)
    out, (dx, dw, *_) = ours(model, rows)
    assert (out[7] == 0).all()
    assert (dx[7] == 0).all()
    assert (dw[top_k_index >= E] == 0).all()


@pytest.mark.parametrize("case", UNFUSED_KINDS, ids=lambda c: c[0])
def test_sentinels_add_nothing_to_the_gradient_of_the_models_own_norm(case):
    """The norm reads every row, and the gradient of its weight is a sum over them."""
    plain = build(case)
    model = wrap(copy.deepcopy(plain))
    hidden_states, top_k_index, top_k_weights = random_rows()
    top_k_index[0, 0] = top_k_index[5, 1] = E
    top_k_index[7, :] = E + 7
    norm = model.base_model.model.experts.base_layer.post_expert_norm.weight.requires_grad_()
    _, found = grads_of(lambda: model(hidden_states, top_k_index, top_k_weights), [norm])

    twin = in_double(plain)
    adapters = {p: tuple(t.double() for t in pair) for p, pair in experts_adapter(model).items()}
    deltas = dense_deltas(adapters, E, SCALING)
    rows = (hidden_states.double(), top_k_index, top_k_weights.double())
    _, expected = grads_of(lambda: oracle(twin, *rows, deltas), [twin.post_expert_norm.weight])
    assert_close(found[0], expected[0])


@every_class
def test_no_tokens_is_no_error(case):
    model = wrap(build(case))
    rows = random_rows(T=0)
    out, (dx, dw, *grads) = ours(model, rows)
    assert out.shape == (0, H)
    assert dx.shape == (0, H)
    assert dw.shape == (0, TOP_K)
    assert all((grad == 0).all() for grad in grads)


@every_class
def test_fp32_routing_weights_go_with_bf16_activations(case):
    plain = build(case).to(torch.bfloat16)
    # a value that bf16 rounds across a clamp's corner rightly has another gradient
    plain.limit = plain.swiglu_limit = 50.0
    model = wrap(copy.deepcopy(plain))
    rows = random_rows(dtype=torch.bfloat16, weights_dtype=torch.float32)
    out, grads = ours(model, rows)
    assert out.dtype == torch.bfloat16
    assert [grad.dtype for grad in grads] == [torch.bfloat16, *[torch.float32] * (len(grads) - 1)]
    expected, expected_grads = reference(plain, model, rows)
    for actual, right in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert ((actual.double() - right).norm() / right.norm()).item() < BF16


# ---- merge, save, load ---------------------------------------------------------------------------


@every_class
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_is_base_plus_delta_and_unmerge_takes_it_back(case, safe_merge):
    plain, rows = build(case), random_rows()
    model = wrap(copy.deepcopy(plain))
    expected, unmerged = reference(plain, model, rows)[0], model(*rows)
    adapters = experts_adapter(model)
    model.base_model.merge_adapter(safe_merge=safe_merge)
    base = model.base_model.model.experts.get_base_layer()
    for projection, (lora_A, lora_B) in adapters.items():
        delta = dense_delta(lora_A, lora_B, E, SCALING)
        assert delta.abs().max() > 0.1
        right = base_weight(plain, projection) + delta
        assert_close(base_weight(base, projection), right, 1e-6, f"merged {projection}")
    assert_close(model(*rows), expected)
    model.base_model.unmerge_adapter()
    for projection in adapters:
        assert_close(
            base_weight(base, projection),
            base_weight(plain, projection),
            1e-6,
            f"unmerged {projection}",
        )
    assert_close(model(*rows), unmerged)


@every_class
def test_merge_and_unload_gives_the_class_back(case):
    plain, rows = build(case), random_rows()
    model = wrap(copy.deepcopy(plain))
    expected = reference(plain, model, rows)[0]
    merged = model.merge_and_unload()
    assert type(merged.experts) is type(plain)
    assert merged.experts.state_dict().keys() == plain.state_dict().keys()
    assert (
        getattr(merged.experts, "config", None).__class__
        is getattr(plain, "config", None).__class__
    )
    assert_close(merged(*rows), expected)


@every_class
def test_save_and_load_give_the_same_numbers(case, tmp_path):
    plain, rows = build(case), random_rows()
    model = wrap(copy.deepcopy(plain))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Holder(copy.deepcopy(plain)), tmp_path)
    assert_share_of_order_one(loaded(*rows), plain(*rows))
    assert torch.equal(loaded(*rows), model(*rows))


@every_class
def test_frozen_weights_get_no_gradient(case):
    model = wrap(build(case))
    model(*random_rows()).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (".lora_" in name), name
        assert (parameter.grad is not None) == (".lora_" in name), name


# ---- sizes that break kernels --------------------------------------------------------------------

SHAPES = {
    "odd sizes, that no vector load or grouped_mm stride divides": {
        "hidden": 21,
        "intermediate": 19,
        "r": 3,
    },
    "rank one": {"r": 1},
    "a rank above the width": {"r": 40},
    "one expert": {"num_experts": 1, "top_k": 1},
    "one token": {"T": 1},
    "one slot per token": {"top_k": 1},
    "every expert for every token": {"top_k": E},
    "most experts without a row": {"T": 1, "top_k": 1, "num_experts": 9},
    "more rows than any tile": {"T": 300},
}


@pytest.mark.parametrize("why", SHAPES)
@every_kind
def test_any_size_is_right(case, why):
    sizes = {
        "hidden": H,
        "intermediate": I,
        "num_experts": E,
        "top_k": TOP_K,
        "T": 13,
        "r": R,
        **SHAPES[why],
    }
    plain = build(case, **{k: sizes[k] for k in ("hidden", "intermediate", "num_experts")})
    model = wrap(copy.deepcopy(plain), r=sizes["r"], lora_alpha=SCALING * sizes["r"])
    # a sum of r products: the adapter's share stays of order one at every rank
    fill_adapter(model, gain=(R / sizes["r"]) ** 0.25)
    rows = random_rows(**{k: sizes[k] for k in ("T", "hidden", "num_experts", "top_k")})
    check_against_oracle(plain, model, rows)


@every_kind
def test_one_expert_may_get_every_token(case):
    plain = build(case)
    model = wrap(copy.deepcopy(plain))
    hidden_states, top_k_index, top_k_weights = random_rows(T=64, top_k=1)
    top_k_index.fill_(E - 1)
    check_against_oracle(plain, model, (hidden_states, top_k_index, top_k_weights))


@every_kind
def test_two_slots_of_a_token_may_name_the_same_expert(case):
    plain = build(case)
    model = wrap(copy.deepcopy(plain))
    hidden_states, top_k_index, top_k_weights = random_rows()
    top_k_index[:, 1] = top_k_index[:, 0]
    check_against_oracle(plain, model, (hidden_states, top_k_index, top_k_weights))


@every_kind
def test_strides_of_the_inputs_do_not_matter(case):
    plain = build(case)
    model = wrap(copy.deepcopy(plain))
    hidden_states, top_k_index, top_k_weights = random_rows()
    rows = (
        hidden_states.T.contiguous().T,
        torch.stack([top_k_index, top_k_index], dim=-1)[..., 0],
        top_k_weights.T.contiguous().T,
    )
    assert not any(t.is_contiguous() for t in rows)
    check_against_oracle(plain, model, rows)


# ---- the comparison bites ------------------------------------------------------------------------


@every_kind
def test_the_oracle_tells_wrong_adapters_apart(case):
    """Somebody has shipped each of these mistakes; the output moves far more than FP32 allows."""
    plain, rows = in_double(build(case)), random_rows(dtype=torch.float64)
    adapters = {
        p: tuple(t.detach().double() for t in pair)
        for p, pair in experts_adapter(wrap(build(case))).items()
    }
    deltas = dense_deltas(adapters, E, SCALING)
    right = oracle(plain, *rows, deltas)

    swapped = {p: delta[[1, 0, *range(2, E)]] for p, delta in deltas.items()}
    rank_major_read = {
        p: (a, b.reshape(b.shape[0], R, E).transpose(1, 2).reshape(b.shape))
        for p, (a, b) in adapters.items()
    }
    last_row_skipped = right.clone()
    last_row_skipped[-1] = 0
    mistakes = {
        "no adapter": oracle(plain, *rows),
        "experts swapped": oracle(plain, *rows, swapped),
        "rank-major for expert-major": oracle(
            plain, *rows, dense_deltas(rank_major_read, E, SCALING)
        ),
        "scaling left out": oracle(plain, *rows, dense_deltas(adapters, E, 1.0)),
        "last row skipped": last_row_skipped,
    }
    for name, wrong in mistakes.items():
        assert ((wrong - right).abs().max() / right.abs().max()).item() > 1000 * FP32, name
