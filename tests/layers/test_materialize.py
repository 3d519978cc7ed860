"""backend="materialize": the model's own experts implementation runs on W + scaling * B A."""

import copy
import logging

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from transformers.integrations.moe import ExpertsInterface

from helpers import (
    FP32,
    QWEN3_MOE,
    SAME,
    E,
    H,
    HandWrittenExperts,
    Holder,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    assert_unchanged,
    build_experts,
    build_step3p7,
    dense_deltas,
    experts_adapter,
    fill,
    fill_adapter,
    grads_of,
    in_double,
    interface_families,
    moe_lora,
    one_of_each_kind,
    oracle,
    outputs,
    random_rows,
    snapshot,
    tiny_families,
    tiny_model,
    wrap,
)
from peft_moe_lora import MoELoraConfig, quantize_experts
from peft_moe_lora.functional import Projection
from peft_moe_lora.layers import materialize as file
from peft_moe_lora.layers.implementations import _log_cost
from peft_moe_lora.layers.materialize import materialize

IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
# and one that is transposed without biases; in transformers 5.17 it is not on the interface
FAMILIES = one_of_each_kind() + [case for case in interface_families() if case[0] == "aria"]
implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def materialized(experts, implementation="grouped_mm", **config):
    model = wrap(experts, backend="materialize", **config)
    run_with(model, implementation)
    return model


def run_with(model, implementation):
    """What `set_experts_implementation` does to the config that all modules share."""
    model.base_model.model.experts.get_base_layer().config._experts_implementation = implementation


def rows_without_the_last_expert(T=13):
    """One expert has no rows: its dW is zero, and so must be its dA and dB."""
    hidden_states, top_k_index, top_k_weights = random_rows(T, num_experts=E - 1)
    return hidden_states.requires_grad_(), top_k_index, top_k_weights.requires_grad_()


def with_gradients(model, rows):
    """Output, then gradients of hidden_states, top_k_weights, and every A and B."""
    out, grads = grads_of(
        lambda: model(*rows), [rows[0], rows[2], *adapter_parameters(model).values()]
    )
    return out, *grads


def assert_same(actual, expected, tolerance=FP32):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, b, tolerance, f"value {i}")


# ---- numbers -------------------------------------------------------------------------------------


def _expected(plain, model, rows):
    """Like `with_gradients`, but by the oracle in fp64 on W + delta."""
    plain = in_double(plain)
    pairs = {
        p: tuple(t.detach().double().requires_grad_() for t in ab)
        for p, ab in experts_adapter(model).items()
    }
    x, w = (t.detach().double().requires_grad_() for t in (rows[0], rows[2]))
    out, grads = grads_of(
        lambda: oracle(plain, x, rows[1], w, dense_deltas(pairs, E, 2.0)),
        [x, w, *(pairs[p][0] for p in pairs), *(pairs[p][1] for p in pairs)],
    )
    assert_share_of_order_one(out, oracle(plain, x, rows[1], w))
    return out, *grads


@implementations
@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case[0])
def test_output_and_gradients_are_those_of_base_plus_delta(case, implementation):
    plain, rows = build_experts(*case), rows_without_the_last_expert()
    model = materialized(copy.deepcopy(plain), implementation)
    assert_same(with_gradients(model, rows), _expected(plain, model, rows))


@pytest.mark.parametrize("case", interface_families(), ids=lambda case: case[1])
def test_every_class_gives_what_our_own_products_give(case):
    plain, rows = build_experts(*case), rows_without_the_last_expert()
    expected = with_gradients(wrap(copy.deepcopy(plain), backend="torch"), rows)
    model = materialized(plain)
    for implementation in IMPLEMENTATIONS:
        run_with(model, implementation)
        assert_same(with_gradients(model, rows), expected)


@pytest.mark.parametrize(
    "build", [build_step3p7, lambda: fill(HandWrittenExperts())], ids=["step3p7", "hand_written"]
)
def test_a_module_off_the_interface_runs_its_own_forward(build):
    plain, rows = build(), rows_without_the_last_expert()
    model = wrap(copy.deepcopy(plain), backend="materialize")
    assert_same(with_gradients(model, rows), _expected(plain, model, rows))


@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_an_adapter_on_one_projection_leaves_the_other_alone(projection):
    plain, rows = build_experts(*QWEN3_MOE), rows_without_the_last_expert()
    model = materialized(copy.deepcopy(plain), target_projections=[projection])
    assert_same(with_gradients(model, rows), _expected(plain, model, rows))


def test_several_adapters_of_other_ranks_add_up():
    plain, rows = build_experts(*QWEN3_MOE), rows_without_the_last_expert()
    both = []
    for backend in ("torch", "materialize"):
        model = wrap(copy.deepcopy(plain), backend=backend)
        model.add_adapter(
            "other", MoELoraConfig(r=3, lora_alpha=6, target_modules=["experts"], backend=backend)
        )
        fill_adapter(model, "other", seed=7)
        model.base_model.set_adapter(["default", "other"])
        parameters = [
            rows[0],
            rows[2],
            *adapter_parameters(model).values(),
            *adapter_parameters(model, "other").values(),
        ]
        out, grads = grads_of(lambda model=model: model(*rows), parameters)
        both.append((out, *grads))
    assert_same(both[1], both[0])


def test_rank_pattern_and_rslora_reach_the_written_weights():
    settings = {"rank_pattern": {"layers.1.mlp.experts": 7}, "use_rslora": True}
    base = tiny_model()
    expected = outputs(moe_lora(copy.deepcopy(base), backend="torch", **settings))
    assert_share_of_order_one(expected, outputs(base))
    assert_close(outputs(moe_lora(base, backend="materialize", **settings)), expected)


# ---- the function itself -------------------------------------------------------------------------


def _projection(dtype=torch.float64, transposed=False, N=6, K=4, r=2, scaling=0.7):
    generator = torch.Generator().manual_seed(0)
    W, A, B = (
        torch.randn(*shape, generator=generator, dtype=dtype)
        for shape in ((E, N, K), (r * E, K), (N, r * E))
    )
    W = W.transpose(1, 2).contiguous().transpose(1, 2) if transposed else W
    return Projection(W, None, A.requires_grad_(), B.requires_grad_(), scaling)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("experts_per_chunk", [1, 2, E])
def test_gradients_in_chunks_are_those_of_the_formula(monkeypatch, transposed, experts_per_chunk):
    p = _projection(transposed=transposed)
    monkeypatch.setattr(file, "_CHUNK_BYTES", experts_per_chunk * p.weight[0].numel() * 8)
    out = materialize(p)
    assert out.stride() == p.weight.stride()
    delta = dense_deltas({"up": (p.lora_A, p.lora_B)}, E, p.scaling)["up"]
    assert_close(out, p.weight + delta, 1e-12)
    assert torch.autograd.gradcheck(
        lambda A, B: materialize(Projection(p.weight, None, A, B, p.scaling)),
        (p.lora_A, p.lora_B),
        check_undefined_grad=False,  # no gradient at all is an error here
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_once_and_gradients_summed_in_fp32(dtype):
    p = _projection(torch.float32, N=48, K=32)
    half = Projection(p.weight.to(dtype), None, p.lora_A, p.lora_B, p.scaling)
    out = materialize(half)
    assert out.dtype == dtype
    A, B = (t.detach().to(dtype).double() for t in (p.lora_A, p.lora_B))
    exact = half.weight.double() + dense_deltas({"up": (A, B)}, E, p.scaling)["up"]
    # half a unit in the last place of the largest of the sums
    assert (
        (out.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6
    ).all()
    dW = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dA, dB = torch.autograd.grad(out, (p.lora_A, p.lora_B), dW)
    assert dA.dtype == dB.dtype == torch.float32
    A, B = (t.detach().double().requires_grad_() for t in (p.lora_A, p.lora_B))
    wide = torch.autograd.grad(
        dense_deltas({"up": (A, B)}, E, p.scaling)["up"], (A, B), dW.double()
    )
    assert_close(dA, wide[0], 1e-6)
    assert_close(dB, wide[1], 1e-6)


def test_autocast_does_not_round_the_written_weights():
    p = _projection(torch.float32)
    expected = materialize(p)
    gradients = torch.autograd.grad(expected.square().sum(), (p.lora_A, p.lora_B))
    with torch.autocast("cpu", torch.bfloat16):
        out = materialize(p)
        again = torch.autograd.grad(out.square().sum(), (p.lora_A, p.lora_B))
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(again, gradients, strict=True))


def test_base_weights_that_ask_for_a_gradient_are_refused():
    p = _projection()
    with pytest.raises(ValueError, match="requires_grad"):
        materialize(Projection(p.weight.requires_grad_(), None, p.lora_A, p.lora_B))


# ---- other people's implementations --------------------------------------------------------------


class _KernelMatmul(torch.autograd.Function):
    """x @ W[e]^T row by row, with a backward of its own that gives W the gradient `how` says."""

    @staticmethod
    def forward(ctx, x, weight, experts, how):
        ctx.save_for_backward(x, weight, experts)
        ctx.how = how
        return torch.einsum("mk,mnk->mn", x, weight[experts])

    @staticmethod
    def backward(ctx, dy):
        x, weight, experts = ctx.saved_tensors
        dx = torch.einsum("mn,mnk->mk", dy, weight[experts])
        dW = torch.zeros_like(weight).index_add_(0, experts, torch.einsum("mn,mk->mnk", dy, x))
        return dx, dW if ctx.how == "right" else None, None, None


@pytest.fixture
def kernel(monkeypatch):
    """Register an experts implementation under a name; return the modules it is called with."""
    monkeypatch.setattr(ExpertsInterface, "_global_mapping", dict(ExpertsInterface._global_mapping))
    calls = []

    def register(name="elsewhere", how="right"):
        def forward(module, hidden_states, top_k_index, top_k_weights):
            calls.append(module)
            T, top_k = top_k_index.shape
            experts, x = top_k_index.reshape(-1), hidden_states.repeat_interleave(top_k, 0)
            up, down = module.gate_up_proj, module.down_proj
            # a packed copy kept for the next call, as inference kernels do
            module.packed = up.detach().clone()
            if how == "no backward":
                up, down = up.detach(), down.detach()
            act = module._apply_gate(_KernelMatmul.apply(x, up, experts, how))
            y = _KernelMatmul.apply(act, down, experts, how)
            return (y * top_k_weights.reshape(-1, 1)).view(T, top_k, -1).sum(1)

        ExpertsInterface.register(name, forward)
        return calls

    return register


def test_a_registered_kernel_runs_and_trains_the_adapter(kernel):
    calls, plain, rows = kernel(), build_experts(*QWEN3_MOE), rows_without_the_last_expert()
    model = materialized(copy.deepcopy(plain), "elsewhere")
    actual = with_gradients(model, rows)
    assert len(calls) == 1
    assert_same(actual, _expected(plain, model, rows))


def test_what_a_kernel_keeps_of_the_written_weights_does_not_outlive_the_call(kernel):
    calls = kernel()
    model = materialized(build_experts(*QWEN3_MOE), "elsewhere")
    layer = model.base_model.model.experts
    base, before = layer.get_base_layer(), snapshot(model)
    with_gradients(model, rows_without_the_last_expert())
    assert_unchanged(model, before)
    assert not hasattr(base, "packed")
    assert "gate_up_proj" not in base.__dict__
    assert isinstance(base.gate_up_proj, torch.nn.Parameter)
    # the kernel saw a module of the same class with all that the module has
    assert type(calls[0]) is type(base)
    assert calls[0].act_fn is base.act_fn


def test_a_kernel_that_fails_leaves_the_module_as_it_was(kernel):
    kernel()
    model = materialized(build_experts(*QWEN3_MOE))
    expected = model(*random_rows())
    before = snapshot(model)

    def fail(module, *rows):
        raise MemoryError("no room")

    ExpertsInterface.register("failing", fail)
    run_with(model, "failing")
    with pytest.raises(MemoryError):
        model(*random_rows())
    assert_unchanged(model, before)
    run_with(model, "grouped_mm")
    assert torch.equal(model(*random_rows()), expected)


def test_a_kernel_without_a_backward_is_an_error_in_training_only(kernel):
    kernel(how="no backward")
    plain, rows = build_experts(*QWEN3_MOE), random_rows()
    model = materialized(copy.deepcopy(plain), "elsewhere")
    with torch.no_grad():
        assert_close(model(*rows), wrap(copy.deepcopy(plain))(*rows))
    with pytest.raises(RuntimeError, match="no backward"):
        model(*rows)
    with pytest.raises(RuntimeError, match="no backward"):
        model(rows[0].requires_grad_(), rows[1], rows[2].requires_grad_())


def test_a_call_with_a_frozen_adapter_does_not_show_that_a_kernel_trains(kernel):
    kernel(how="no backward")
    model = materialized(build_experts(*QWEN3_MOE), "elsewhere")
    model.requires_grad_(False)
    rows = random_rows()
    # the router trains
    model(rows[0], rows[1], rows[2].requires_grad_())
    for parameter in adapter_parameters(model).values():
        parameter.requires_grad_(True)
    with pytest.raises(RuntimeError, match="no backward"):
        model(*rows)


def test_a_kernel_that_forms_no_dW_is_an_error(kernel):
    kernel(how="frozen weights only")
    model = materialized(build_experts(*QWEN3_MOE), "elsewhere")
    out = model(*random_rows())
    with pytest.raises(RuntimeError, match="gave its weights no gradient"):
        out.sum().backward()


@implementations
def test_no_tokens_are_no_false_alarm(implementation):
    model = materialized(build_experts(*QWEN3_MOE), implementation)
    assert model(*random_rows(T=0)).shape == (0, H)
    model(*random_rows()).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter_parameters(model).values())


def test_rows_for_other_ranks_only_are_no_false_alarm(monkeypatch):
    def skip_everything(module, hidden_states, top_k_index, top_k_weights):
        return torch.zeros_like(hidden_states)

    monkeypatch.setitem(ExpertsInterface._global_mapping, "skipping", skip_everything)
    model = materialized(build_experts(*QWEN3_MOE), "skipping")
    hidden_states, top_k_index, top_k_weights = random_rows()
    model(hidden_states, torch.full_like(top_k_index, E), top_k_weights)
    # with one row for this rank the output must depend on the weights again
    with pytest.raises(RuntimeError, match="no backward"):
        model(hidden_states, top_k_index, top_k_weights)


# ---- within a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_families())
def test_a_model_follows_the_implementation_it_is_told_to_run_with(family):
    base = tiny_model(family)
    plain = outputs(base)
    expected = outputs(moe_lora(copy.deepcopy(base), backend="torch"))
    assert_share_of_order_one(expected, plain)
    model = moe_lora(base, backend="materialize")
    for implementation in IMPLEMENTATIONS:
        model.set_experts_implementation(implementation)
        assert_close(outputs(model), expected, what=implementation)
        with model.disable_adapter():
            assert_close(outputs(model), plain, 1e-5)
    model.merge_adapter()
    assert_close(outputs(model), expected)
    model.unmerge_adapter()
    assert_close(outputs(model), expected)
    assert_close(outputs(model.unload()), plain, 1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model = moe_lora(tiny_model(), backend="materialize").train()
    outputs(model).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in adapter_parameters(model).items()}
    model.zero_grad()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    outputs(model).square().mean().backward()
    for name, parameter in adapter_parameters(model).items():
        assert expected[name].abs().max() > 0
        assert_close(parameter.grad, expected[name], SAME, name)


@pytest.mark.long
def test_a_compiled_model_gives_the_same_numbers():
    model = moe_lora(tiny_model(), backend="materialize")
    expected = outputs(model)
    assert_close(outputs(torch.compile(model, backend="eager")), expected, SAME)


def test_an_offloaded_model_trains():
    base = tiny_model()
    right = moe_lora(copy.deepcopy(base), backend="materialize")
    outputs(right).square().mean().backward()
    cpu_offload(base, execution_device=torch.device("cpu"))
    model = moe_lora(base, backend="materialize")
    outputs(model).square().mean().backward()
    for name, parameter in adapter_parameters(model).items():
        assert_close(parameter.grad, dict(right.named_parameters())[name].grad, SAME, name)


def test_a_saved_adapter_says_how_it_ran_and_runs_so_again(tmp_path):
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), backend="materialize")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert again.peft_config["default"].backend == "materialize"
    assert torch.equal(outputs(again), outputs(model))


def test_what_a_layer_costs_is_said_once_per_shape(caplog):
    _log_cost.cache_clear()
    model = moe_lora(tiny_model(), backend="materialize")
    with caplog.at_level(logging.WARNING, "peft_moe_lora"):
        for _ in range(2):
            outputs(model)
    (record,) = (r for r in caplog.records if r.name.startswith("peft_moe_lora"))
    # [5, 48, 32] and [5, 32, 24] in fp32
    assert f"{(5 * 48 * 32 + 5 * 32 * 24) * 4 / 2**20:.1f} MiB" in record.getMessage()
    assert "gate_up_proj [5, 48, 32], down_proj [5, 32, 24]" in record.getMessage()


# ---- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [("lora_dropout", 0.1), ("recompute", True)])
def test_options_without_a_meaning_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        MoELoraConfig(backend="materialize", **{field: value})


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ({"backend": "materialize"}, {"lora_dropout": 0.1}, "lora_dropout"),
        ({"backend": "materialize"}, {"backend": "torch"}, "backend"),
        ({}, {"backend": "materialize"}, "backend"),
    ],
)
def test_an_adapter_that_does_not_go_with_the_first_changes_nothing(first, second, match):
    model = moe_lora(tiny_model(), **first)
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match=match):
        model.add_adapter("other", MoELoraConfig(r=R, target_modules=["experts"], **second))
    assert_unchanged(model, before)
    assert torch.equal(outputs(model), expected)


LACKING = [
    ("qwen3_moe", "sonicmoe", "sonic-moe"),
    ("nemotron_h", "sonicmoe", "needs a gate"),
    ("muse_spark", "sonicmoe", "no norm after"),
    # clamped and shifted: sonicmoe would compute plain SwiGLU
    ("gpt_oss", "sonicmoe", r"silu\(gate\) \* up"),
    ("gemma4", "sonicmoe", r"silu\(gate\) \* up"),
    ("qwen3_moe", "deepgemm", "needs bf16 weights"),
    ("qwen3_moe", "moe_lora", "set_experts_implementation"),
]


@pytest.mark.parametrize(
    ("family", "implementation", "reason"), [case for case in LACKING if case[0] in tiny_families()]
)
def test_what_an_implementation_lacks_is_said_before_anything_changes(
    family, implementation, reason
):
    base = tiny_model(family)
    base.set_experts_implementation(implementation)
    before = snapshot(base)
    configs = [getattr(m, "config", None) for m in base.modules()]
    with pytest.raises((RuntimeError, ValueError), match=reason):
        get_peft_model(base, MoELoraConfig(r=R, target_modules=["experts"], backend="materialize"))
    assert_unchanged(base, before)
    assert all(
        getattr(m, "config", None) is c for m, c in zip(base.modules(), configs, strict=True)
    )


def test_sonicmoe_runs_no_activation_that_it_does_not_know():
    base = tiny_model(hidden_act="tanh")
    base.set_experts_implementation("sonicmoe")
    with pytest.raises(RuntimeError, match=r"it computes tanh\(gate\) \* up"):
        get_peft_model(base, MoELoraConfig(r=R, target_modules=["experts"], backend="materialize"))


def test_deepgemm_says_what_it_lacks_on_this_machine():
    base = tiny_model(dtype=torch.bfloat16)
    base.set_experts_implementation("deepgemm")
    with pytest.raises(RuntimeError, match=r'"deepgemm" cannot run here: .*DeepGEMM'):
        get_peft_model(base, MoELoraConfig(r=R, target_modules=["experts"], backend="materialize"))


def test_an_implementation_chosen_later_is_checked_at_the_first_call():
    model = moe_lora(tiny_model(), backend="materialize")
    expected = outputs(model)
    model.set_experts_implementation("sonicmoe")
    with pytest.raises(RuntimeError, match=r'"sonicmoe" cannot run here'):
        outputs(model)
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(outputs(model), expected)


def test_weights_that_are_no_plain_parameters_are_refused():
    experts = quantize_experts(Holder(build_experts(*QWEN3_MOE)))
    with pytest.raises(ValueError, match="gate_up_proj is not a plain parameter"):
        get_peft_model(
            experts, MoELoraConfig(r=R, target_modules=["experts"], backend="materialize")
        )


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case[0])
def test_grouped_mm_in_bf16_is_as_exact_as_our_own_products(case):
    """Errors against fp64, compared with those of backend="torch" in bf16 on the same numbers.

    One expert has no rows.
    """
    size, tokens = 64, 300
    plain = build_experts(*case, hidden=size, intermediate=size, dtype=torch.bfloat16).cuda()
    x, top_k_index, top_k_weights = (
        t.cuda() for t in random_rows(tokens, size, E - 1, dtype=torch.bfloat16)
    )
    rows = x.requires_grad_(), top_k_index, top_k_weights.requires_grad_()
    ours = with_gradients(wrap(copy.deepcopy(plain), backend="torch"), rows)
    actual = with_gradients(materialized(copy.deepcopy(plain), "grouped_mm"), rows)
    model = wrap(copy.deepcopy(plain), backend="torch").double()
    exact = with_gradients(model, (rows[0].detach().double().requires_grad_(), rows[1],
                                   rows[2].detach().double().requires_grad_()))  # fmt: skip
    for i, expected in enumerate(exact):
        error, own = (
            ((t[i].double() - expected).norm() / expected.norm()).item() for t in (actual, ours)
        )
        # W + scaling * B A is rounded to 8 bits of mantissa; our own products do not round it
        assert error <= 2 * own + 8e-3, f"value {i}: {error:.2e} against {own:.2e}"


@pytest.mark.gpu
def test_a_step_on_the_gpu_holds_the_written_weights_and_one_gradient():
    """Peak above the weights: W' of both projections and dW of one or both, nothing in fp32."""
    num_experts, size = 64, 1024
    plain = build_experts(
        *QWEN3_MOE, hidden=size, intermediate=size, num_experts=num_experts, dtype=torch.bfloat16
    )
    model = materialized(plain.cuda(), "grouped_mm")
    rows = tuple(t.cuda() for t in random_rows(64, size, num_experts, dtype=torch.bfloat16))
    model(*rows).sum().backward()
    model.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(*rows).sum().backward()
    written = num_experts * 3 * size * size * 2
    # a chunk in fp32, A's and B's gradients, the rows
    assert torch.cuda.max_memory_allocated() - before <= 2 * written + 64 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_the_written_weights_on_the_gpu(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    model = materialized(
        build_experts(*QWEN3_MOE, hidden=64, intermediate=64, dtype=torch.bfloat16).cuda()
    )
    rows = tuple(t.cuda() for t in random_rows(100, 64, dtype=torch.bfloat16))
    rows = rows[0].requires_grad_(), rows[1], rows[2].requires_grad_()
    kept, again = [], []
    for call, into in (
        (model, kept),
        (lambda *a: checkpoint(model, *a, use_reentrant=use_reentrant), again),
    ):
        model.zero_grad()
        out = call(*rows)
        out.float().square().sum().backward()
        into += [out.detach(), *(p.grad.clone() for p in adapter_parameters(model).values())]
    for a, b in zip(again, kept, strict=True):
        torch.testing.assert_close(a, b)
