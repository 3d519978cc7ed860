"""Families off the interface: an adapter does what the class's own forward does with W + delta.

llama4, longcat_flash, jetmoe and dbrx have weights or a call of their own. Whole models of these
and of step3p7 are tested too. The delta is scaling * B[e] @ A[e].
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from families.off_interface import (
    BUILD,
    CONFIGS,
    IDENTITY,
    PROJECTIONS,
    ROWS,
    Explicit,
    deltas_of,
    leaves,
    off_interface_model,
    paths_of,
    with_deltas,
)
from helpers import (
    BF16,
    FP32,
    SAME,
    E,
    H,
    Holder,
    I,
    R,
    assert_close,
    assert_share_of_order_one,
    dense_delta,
    experts_adapter,
    fill_adapter,
    grads_of,
    in_double,
    moe_lora,
    outputs,
    token_ids,
    wrap,
)
from peft_moe_lora import MoELoraConfig, convert_adapter, merge_adapter
from peft_moe_lora.convert.formats import FORMATS
from peft_moe_lora.files.tensor_file import RefusedError
from peft_moe_lora.layers.layer import MoELoraLayer

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# lora_alpha / r of every adapter here
SCALING = 2.0

every_family = pytest.mark.parametrize("family", BUILD)


def reference(family, plain, model, floats, call):
    """Output and gradients (leaves, then A and B) of the class's own forward in float64."""
    plain = in_double(plain).requires_grad_(False)
    floats = [t.detach().double().requires_grad_() for t in floats]
    adapters = {
        p: tuple(t.detach().double().requires_grad_() for t in pair)
        for p, pair in experts_adapter(model).items()
    }
    inputs = [*floats, *(t for pair in adapters.values() for t in pair)]
    return grads_of(
        lambda: call(Explicit(family, plain, deltas_of(adapters, E, SCALING)), *floats), inputs
    )


def ours(model, floats, call, through=lambda model, *args: model(*args)):
    floats = [t.detach().requires_grad_() for t in floats]
    inputs = [*floats, *(p for pair in experts_adapter(model).values() for p in pair)]
    return grads_of(lambda: call(partial(through, model), *floats), inputs)


def check(family, plain, model, floats, call, tolerance=FP32):
    expected, expected_grads = reference(family, plain, model, floats, call)
    assert_share_of_order_one(expected, call(in_double(plain), *(t.double() for t in floats)))
    out, grads = ours(model, floats, call)
    assert_close(out, expected, tolerance, "output")
    assert len(grads) == len(expected_grads)
    for i, (grad, right) in enumerate(zip(grads, expected_grads, strict=True)):
        assert right.abs().max() > 0, f"gradient {i} says nothing: it is zero in the oracle"
        assert_close(grad, right, tolerance, f"gradient {i}")


# ---- one module ----------------------------------------------------------------------------------


@every_family
def test_output_and_gradients_are_those_of_base_plus_delta(family):
    plain = BUILD[family]()
    model = wrap(copy.deepcopy(plain))
    assert list(experts_adapter(model)) == PROJECTIONS[family]
    check(family, plain, model, *leaves(family))


@pytest.mark.parametrize("projection", ["gate_up", "down"])
@pytest.mark.parametrize("family", [f for f in BUILD if f not in ROWS])
def test_an_adapter_on_one_projection_leaves_the_other_alone(family, projection):
    plain = BUILD[family]()
    model = wrap(copy.deepcopy(plain), target_projections=[projection])
    assert list(experts_adapter(model)) == [projection]
    check(family, plain, model, *leaves(family))


def test_a_module_that_is_one_projection_is_chosen_by_its_name_alone():
    model = wrap(BUILD["jetmoe"](), target_projections=["down"])
    assert list(experts_adapter(model)) == ["linear"]


@every_family
def test_one_token_is_enough(family):
    plain = BUILD[family]()
    floats, call = leaves(family, T=1, seed=4)
    check(family, plain, wrap(copy.deepcopy(plain)), floats, call)


@every_family
def test_no_tokens_is_no_error(family):
    model = wrap(BUILD[family]())
    out, grads = ours(model, *leaves(family, T=0))
    assert out.shape[0] == 0
    assert all((grad == 0).all() for grad in grads)


@every_family
def test_adapter_shapes_are_the_documented_ones(family):
    sizes = {"gate_up": (2 * I, H), "down": (H, I), "linear": (I, H)}
    for projection, (lora_A, lora_B) in experts_adapter(wrap(BUILD[family]())).items():
        N, K = sizes[projection]
        assert lora_A.shape == (R * E, K)
        assert lora_B.shape == (N, R * E)
        assert lora_A.dtype == lora_B.dtype == torch.float32


@every_family
def test_new_adapter_changes_nothing(family):
    plain = BUILD[family]()
    floats, call = leaves(family)
    assert_close(
        call(wrap(copy.deepcopy(plain), randomize=False), *floats), call(plain, *floats), 1e-6
    )


@every_family
def test_disabled_adapter_is_the_plain_module(family):
    plain = BUILD[family]()
    floats, call = leaves(family)
    expected = call(plain, *floats)
    model = wrap(copy.deepcopy(plain))
    with model.disable_adapter():
        assert torch.equal(call(model, *floats), expected)
    assert_share_of_order_one(call(model, *floats), expected)


@every_family
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_is_base_plus_delta_and_unmerge_takes_it_back(family, safe_merge):
    plain = BUILD[family]()
    floats, call = leaves(family)
    model = wrap(copy.deepcopy(plain))
    unmerged = call(model, *floats)
    right = with_deltas(family, plain, deltas_of(experts_adapter(model), E, SCALING))
    model.base_model.merge_adapter(safe_merge=safe_merge)
    base = dict(model.base_model.model.experts.get_base_layer().named_parameters())
    for name, parameter in plain.named_parameters():
        assert_close(base[name], right.get(name, parameter), 1e-6, f"merged {name}")
        assert not torch.equal(base[name], parameter)
    assert_close(call(model, *floats), unmerged)
    model.base_model.unmerge_adapter()
    for name, parameter in plain.named_parameters():
        assert_close(base[name], parameter, 1e-6, f"unmerged {name}")
    assert_close(call(model, *floats), unmerged)


@every_family
def test_merge_and_unload_gives_the_class_back(family):
    plain = BUILD[family]()
    floats, call = leaves(family)
    model = wrap(copy.deepcopy(plain))
    expected = call(model, *floats)
    merged = model.merge_and_unload()
    assert type(merged.experts) is type(plain)
    assert merged.experts.state_dict().keys() == plain.state_dict().keys()
    assert_close(call(merged, *floats), expected)


@every_family
def test_two_active_adapters_add_up(family):
    plain = BUILD[family]()
    floats, call = leaves(family)
    model = wrap(copy.deepcopy(plain))
    model.add_adapter("other", MoELoraConfig(r=3, lora_alpha=3, target_modules=["experts"]))
    fill_adapter(model, "other", seed=7)
    model.base_model.set_adapter(["default", "other"])
    first, second = experts_adapter(model), experts_adapter(model, adapter_name="other")
    double = [
        {p: tuple(t.detach().double() for t in pair) for p, pair in a.items()}
        for a in (first, second)
    ]
    both = {
        p: d + deltas_of(double[1], E, 1.0)[p] for p, d in deltas_of(double[0], E, SCALING).items()
    }
    expected = call(Explicit(family, in_double(plain), both), *(t.double() for t in floats))
    assert_close(call(model, *floats), expected)
    model.set_adapter("other")
    alone = call(
        Explicit(family, in_double(plain), deltas_of(double[1], E, 1.0)),
        *(t.double() for t in floats),
    )
    assert_close(call(model, *floats), alone)


@every_family
def test_some_experts_alone_may_have_an_adapter(family):
    plain = BUILD[family]()
    floats, call = leaves(family)
    model = wrap(copy.deepcopy(plain), expert_indices={"experts": [1, 3]})
    deltas = {}
    for projection, (lora_A, lora_B) in experts_adapter(model).items():
        assert lora_A.shape[0] == lora_B.shape[1] == 2 * R
        held = dense_delta(lora_A.detach().double(), lora_B.detach().double(), 2, SCALING)
        deltas[projection] = held.new_zeros(E, *held.shape[1:]).index_copy(
            0, torch.tensor([1, 3]), held
        )
    expected = call(Explicit(family, in_double(plain), deltas), *(t.double() for t in floats))
    assert_close(call(model, *floats), expected)
    model.base_model.merge_adapter()
    assert_close(call(model, *floats), expected)


@every_family
def test_bf16_is_as_near_as_bf16_gets(family):
    plain = BUILD[family]().to(torch.bfloat16)
    floats, call = leaves(family, dtype=torch.bfloat16)
    model = wrap(copy.deepcopy(plain))
    out, grads = ours(model, floats, call)
    assert out.dtype == torch.bfloat16
    expected, expected_grads = reference(family, plain, model, floats, call)
    for actual, right in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert ((actual.double() - right).norm() / right.norm()).item() < BF16


@every_family
def test_dropout_drops_before_A_and_repeats_itself_under_checkpointing(family):
    plain = BUILD[family]()
    model = wrap(copy.deepcopy(plain), lora_dropout=0.4)
    floats, call = leaves(family)
    evaluated = call(model.eval(), *floats)
    model.train()

    torch.manual_seed(3)
    out, grads = ours(model, floats, call)
    torch.manual_seed(3)
    again, repeated = ours(model, floats, call, through=partial(checkpoint, use_reentrant=False))
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(grads, repeated, strict=True))
    assert_share_of_order_one(out, evaluated, low=0.05)
    # the base's own share is not dropped: without B nothing is random
    for pair in experts_adapter(model).values():
        pair[1].data.zero_()
    assert_close(call(model, *floats), call(plain, *floats), 1e-6)


def test_gate_and_up_stored_apart_drop_the_same_elements():
    """Gate and up are one projection with one mask: equal weights and updates stay equal."""
    plain = BUILD["dbrx"]()
    plain.mlp.v1.data.copy_(plain.mlp.w1)
    model = wrap(plain, lora_dropout=0.5, target_projections=["gate_up"]).train()
    _, lora_B = experts_adapter(model)["gate_up"]
    lora_B.data[I:] = lora_B.data[:I]
    plain.mlp.activation_fn = _Recording(plain.mlp.activation_fn)
    floats, call = leaves("dbrx")
    call(model, *floats)
    (pre,) = plain.mlp.activation_fn.seen
    gate, up = pre.chunk(2, dim=-1)
    assert pre.shape[1] == 2 * I
    assert torch.equal(gate, up)


class _Recording(nn.Module):
    """An activation that keeps the pre-activation of which it is given the gate half."""

    def __init__(self, own):
        super().__init__()
        self.own, self.seen = own, []

    def forward(self, gate):
        self.seen.append(gate._base)
        return self.own(gate)


@every_family
def test_save_and_load_give_the_same_numbers(family, tmp_path):
    plain = BUILD[family]()
    floats, call = leaves(family)
    model = wrap(copy.deepcopy(plain))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
    prefix = "base_model.model.experts.lora_"
    assert keys == {f"{prefix}{side}.{p}" for side in "AB" for p in PROJECTIONS[family]}
    loaded = PeftModel.from_pretrained(Holder(copy.deepcopy(plain)), tmp_path)
    assert_share_of_order_one(call(loaded, *floats), call(plain, *floats))
    assert torch.equal(call(loaded, *floats), call(model, *floats))


@every_family
def test_copies_and_pickles_are_as_good(family):
    floats, call = leaves(family)
    model = wrap(BUILD[family]())
    expected = call(model, *floats)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(twin, *floats), expected)


@every_family
def test_frozen_weights_get_no_gradient(family):
    model = wrap(BUILD[family]())
    floats, call = leaves(family)
    call(model, *floats).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".lora_" in name), name
    next(iter(model.base_model.model.experts.base_layer.parameters())).requires_grad_()
    with pytest.raises(ValueError, match="frozen"):
        call(model, *floats)


@every_family
def test_the_oracle_tells_wrong_adapters_apart(family):
    """Somebody has shipped each of these mistakes; the output moves far more than FP32 allows."""
    plain = in_double(BUILD[family]())
    floats, call = leaves(family, dtype=torch.float64)
    adapters = experts_adapter(wrap(BUILD[family]()))
    adapters = {p: tuple(t.detach().double() for t in pair) for p, pair in adapters.items()}
    deltas = deltas_of(adapters, E, SCALING)
    right = call(Explicit(family, plain, deltas), *floats)
    rank_major_read = {
        p: (a, b.reshape(b.shape[0], R, E).transpose(1, 2).reshape(b.shape))
        for p, (a, b) in adapters.items()
    }
    mistakes = {
        "no adapter": {p: torch.zeros_like(d) for p, d in deltas.items()},
        "experts swapped": {p: d[[1, 0, *range(2, E)]] for p, d in deltas.items()},
        "rank-major for expert-major": deltas_of(rank_major_read, E, SCALING),
        "scaling left out": deltas_of(adapters, E, 1.0),
    }
    for name, wrong in mistakes.items():
        moved = call(Explicit(family, plain, wrong), *floats)
        assert ((moved - right).abs().max() / right.abs().max()).item() > 1000 * FP32, name


@every_family
def test_offloaded_weights_come_back_for_the_adapter(family):
    """Only the experts: whole models of these families do not run under accelerate's offload."""
    model = wrap(BUILD[family]())
    floats, call = leaves(family)
    expected = call(model, *floats)
    cpu_offload(model, execution_device=torch.device("cpu"))
    experts = model.base_model.model.experts.get_base_layer()
    for _ in range(2):
        assert all(p.is_meta for p in experts.parameters())
        assert torch.equal(call(model, *floats), expected)


@every_family
def test_compiles_into_one_graph_with_the_same_gradients(family):
    model = wrap(BUILD[family]())
    floats, call = leaves(family)
    out, grads = ours(model, floats, call)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model.experts, fullgraph=True, backend="aot_eager")
    again, compiled_grads = ours(model, floats, call, through=lambda _, *args: compiled(*args))
    for actual, expected in zip([again, *compiled_grads], [out, *grads], strict=True):
        assert_close(actual, expected, SAME)


# ---- what is special about each ------------------------------------------------------------------


def test_llama4_computes_no_row_that_nobody_routed(monkeypatch):
    seen = []
    own = MoELoraLayer.compute

    def compute(self, module, hidden_states, top_k_index, top_k_weights):
        seen.append((hidden_states, top_k_index))
        return own(self, module, hidden_states, top_k_index, top_k_weights)

    monkeypatch.setattr(MoELoraLayer, "compute", compute)
    floats, call = leaves("llama4")
    model = wrap(BUILD["llama4"]())
    call(model, *floats)
    ((_, index),) = seen
    chosen = (floats[1] > 0).T.flatten()
    assert 0 < chosen.sum() < len(chosen)
    assert ((index[:, 0] < E) == chosen).all()
    assert (index[chosen, 0] == torch.arange(E).repeat_interleave(13)[chosen]).all()


def test_llama4_rows_that_are_not_finite_are_not_taken_for_zeros():
    model = wrap(BUILD["llama4"]())
    rows = torch.zeros(E * 3, H)
    rows[4, 0], rows[7, 1] = float("nan"), float("inf")
    out = model(rows)
    assert out[4].isnan().all()
    assert not out[7].isfinite().all()
    assert (out[[0, 1, 2, 3, 5, 6, 8]] == 0).all()


def test_longcat_identity_experts_pass_the_row_and_others_are_skipped():
    model = wrap(BUILD["longcat_flash"]())
    x = torch.randn(4, H)
    index = torch.tensor(
        [[E, E + 1], [E, E + IDENTITY], [E + IDENTITY, E + IDENTITY + 5], [E + 1, -1]]
    )
    weights = torch.rand(4, 2)
    out = model(x, index, weights)
    known = (index >= E) & (index < E + IDENTITY)
    assert_close(out, x * (weights * known).sum(1, keepdim=True), SAME)
    assert (out[2] == 0).all()


@every_family
def test_an_implementation_of_the_interface_cannot_be_materialized_for(family):
    with pytest.raises(ValueError, match=r"materialize.* not on"):
        wrap(BUILD[family](), backend="materialize")


def test_another_class_of_a_known_name_raises():
    """Models outside of transformers have classes of these names that are called otherwise."""

    class DbrxExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = BUILD["dbrx"]().mlp
            self.num_experts = E

        def forward(self, x, weights, top_weights, top_experts):
            return x

    with pytest.raises(ValueError, match=r"DbrxExperts.forward takes .*top_experts"):
        wrap(DbrxExperts())


# ---- whole models --------------------------------------------------------------------------------

every_model = pytest.mark.parametrize("family", CONFIGS)


def explicit_parameters(family, base, model):
    """Parameter name of the whole base model -> base + delta in float64, for `model`'s adapter."""
    changed = {}
    for path in paths_of(base):
        adapters = {
            p: tuple(t.double() for t in pair) for p, pair in experts_adapter(model, path).items()
        }
        module = base.get_submodule(path)
        changed |= {
            f"{path}.{name}": t
            for name, t in with_deltas(family, module, deltas_of(adapters, E, SCALING)).items()
        }
    return changed


def logits(out):
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@every_model
def test_a_whole_model_is_base_plus_delta(family, tmp_path):
    """Forward, saving, loading and merging give what the plain model gives with base + delta."""
    base = off_interface_model(family)
    without = outputs(base)
    model = moe_lora(copy.deepcopy(base), target_modules=None)
    plain = in_double(base)
    right = logits(
        functional_call(
            plain, explicit_parameters(family, plain, model), kwargs={"input_ids": token_ids()}
        )
    )
    assert_share_of_order_one(right, without, low=0.2)
    assert_close(outputs(model), right, 1e-4)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    with loaded.disable_adapter():
        assert torch.equal(outputs(loaded), without)
    merged = loaded.merge_and_unload()
    assert_close(outputs(merged), right, 1e-4)
    assert merged.state_dict().keys() == base.state_dict().keys()


# jetmoe's model class has no gradient checkpointing
@pytest.mark.parametrize("family", [f for f in CONFIGS if f != "jetmoe"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(family, use_reentrant):
    model = moe_lora(off_interface_model(family), target_modules=None, lora_dropout=0.2).train()

    def gradients():
        torch.manual_seed(5)
        model.zero_grad()
        outputs(model).square().mean().backward()
        return [p.grad.clone() for n, p in model.named_parameters() if ".lora_" in n]

    kept = gradients()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    recomputed = gradients()
    assert all(g.abs().max() > 0 for g in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@every_model
def test_a_rank_by_name_holds_for_that_module(family):
    base = off_interface_model(family)
    path = paths_of(base)[-1]
    config = MoELoraConfig(r=R, rank_pattern={path: 2 * R}, target_modules=None)
    model = get_peft_model(base, config)
    ranks = {
        key: module.r["default"]
        for key, module in model.named_modules()
        if isinstance(module, MoELoraLayer)
    }
    assert ranks.pop(f"base_model.model.{path}") == 2 * R
    assert set(ranks.values()) <= {R}


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def saved(family, tmp_path):
    """(base, adapted model) of a family, with the folders base/ and adapter/ in tmp_path."""
    base = off_interface_model(family)
    base.save_pretrained(tmp_path / "base")
    model = moe_lora(copy.deepcopy(base), target_modules=None)
    model.save_pretrained(tmp_path / "adapter")
    return base, model


@every_family
@pytest.mark.parametrize("to", [f for f in FORMATS if f != "moe_lora"])
@pytest.mark.usefixtures("saved")
def test_other_formats_are_refused_with_the_reason(family, to, tmp_path):
    with pytest.raises(RefusedError, match=f"cannot be written as {to}: .*; merge it"):
        convert_adapter(tmp_path / "adapter", tmp_path / to, to=to, base_config=tmp_path / "base")
    assert not (tmp_path / to).exists()


@every_family
def test_our_own_format_goes_round(family, saved, tmp_path):
    _, model = saved
    convert_adapter(
        tmp_path / "adapter", tmp_path / "again", to="moe_lora", base_config=tmp_path / "base"
    )
    loaded = PeftModel.from_pretrained(off_interface_model(family), tmp_path / "again")
    assert torch.equal(outputs(loaded), outputs(model))


@every_family
def test_a_merged_checkpoint_is_merged_in_memory(family, saved, tmp_path):
    base, model = saved
    merge_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), outputs(model), 1e-4)
    right = model.merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        assert_close(weight, right[name], 1e-5, name)


# ---- on a GPU ------------------------------------------------------------------------------------

# what rounding leaves where the plain path happens to be exact, relative to the norm
ATOL = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ATOL, ids=str)
@every_family
def test_kernels_are_as_exact_as_plain_pytorch(family, dtype):
    plain = BUILD[family]().to("cuda", dtype)
    model = wrap(copy.deepcopy(plain), backend="triton")
    floats, call = leaves(family, T=200, dtype=dtype, device="cuda")
    out, grads = ours(model, floats, call)
    assert_share_of_order_one(out, call(plain, *floats))
    model.base_model.model.experts.backend = "torch"
    twin_out, twin_grads = ours(model, floats, call)
    right_out, right_grads = reference(family, plain, model, floats, call)
    for actual, twin, right in zip(
        [out, *grads], [twin_out, *twin_grads], [right_out, *right_grads], strict=True
    ):
        error, allowed = (
            ((t.double() - right).norm() / right.norm()).item() for t in (actual, twin)
        )
        assert error <= 2 * allowed + ATOL[dtype], (
            f"{error:.2e} against {allowed:.2e} in plain PyTorch"
        )


# jetmoe's router reads the sizes on the host, adapter or not
@pytest.mark.gpu
@pytest.mark.parametrize("family", [f for f in BUILD if f not in ROWS])
def test_nothing_waits_for_the_device(family):
    model = wrap(BUILD[family]().cuda())
    floats, call = leaves(family, T=200, device="cuda")
    ours(model, floats, call)  # kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(model, *(t.detach().requires_grad_() for t in floats)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
