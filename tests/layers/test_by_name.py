"""The experts implementation "moe_lora": experts without an adapter, computed by this package."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from families.off_interface import off_interface_model
from helpers import (
    FP32,
    GPT_OSS,
    QWEN3_MOE,
    TOP_K,
    E,
    H,
    assert_close,
    assert_share_of_order_one,
    base_weight,
    build_experts,
    causal_families,
    grads_of,
    in_double,
    interface_families,
    moe_lora,
    oracle,
    outputs,
    random_rows,
    tiny_model,
    token_ids,
    wrap,
)
from peft_moe_lora import MoELoraConfig, quantize_experts
from peft_moe_lora.experts.stored import UnsupportedExperts
from peft_moe_lora.layers import frozen
from peft_moe_lora.layers.layer import MoELoraLayer

NAME = "moe_lora"
every_class = pytest.mark.parametrize("case", interface_families(), ids=lambda case: case[1])


@pytest.fixture
def frozen_calls(monkeypatch):
    """The experts modules that were computed without an adapter, in order."""
    calls = []
    compute = frozen.own.compute

    def counted(module, layout, rows, up, down, **options):
        if up.lora_A is None and down.lora_A is None:
            calls.append(module)
        return compute(module, layout, rows, up, down, **options)

    monkeypatch.setattr(frozen.own, "compute", counted)
    return calls


def by_name(module):
    module.config._experts_implementation = NAME
    return module.requires_grad_(False)


def with_gradients(module, rows):
    """The output, and the gradients of hidden_states and top_k_weights."""
    x = rows[0].detach().requires_grad_()
    weights = rows[2].detach().requires_grad_()
    return grads_of(lambda: module(x, rows[1], weights), [x, weights])


def check_against_oracle(plain, module, rows):
    """Output and gradients against the written-out formula in fp64; the model knows no sentinels"""
    twin = in_double(plain)
    wide = (rows[0].double(), rows[1], rows[2].double())
    expected = with_gradients(lambda *rows: oracle(twin, *rows), wide)
    found = with_gradients(module, rows)
    assert_close(found[0], expected[0], FP32, "output")
    for what, grad, right in zip(
        ("hidden_states", "top_k_weights"), found[1], expected[1], strict=True
    ):
        assert right.abs().max() > 0
        assert_close(grad, right, FP32, f"d {what}")


# ---- one experts module --------------------------------------------------------------------------


@every_class
def test_every_class_computes_what_its_own_forward_computes(case, frozen_calls):
    plain = build_experts(*case)
    module = by_name(copy.deepcopy(plain))
    rows = random_rows()
    check_against_oracle(plain, module, rows)
    assert frozen_calls == [module]
    assert plain.config._experts_implementation == "eager"
    assert_close(module(*rows), plain(*rows))


@every_class
def test_sentinels_and_no_tokens(case):
    plain = build_experts(*case)
    module = by_name(copy.deepcopy(plain))
    x, index, weights = random_rows()
    index[0, 0] = index[5, 1] = E
    index[3, 0] = E + 7
    index[7, :] = E
    check_against_oracle(plain, module, (x, index, weights))
    assert not module(x, index, weights)[7].any()
    out, (dx, dw) = with_gradients(module, random_rows(T=0))
    assert (out.shape, dx.shape, dw.shape) == ((0, H), (0, H), (0, TOP_K))


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case[1])
def test_weights_changed_in_place_are_read_again(case):
    plain = build_experts(*case)
    module = by_name(copy.deepcopy(plain))
    rows = random_rows()
    before = module(*rows)
    for experts in (plain, module):
        experts.down_proj.data[1] *= -2
        experts.gate_up_proj.data += 0.1
    assert_close(module(*rows), plain(*rows))
    assert_share_of_order_one(module(*rows), before)


def test_fewer_and_more_experts_than_before():
    """Pruning replaces the parameters of a module."""
    plain = build_experts(*QWEN3_MOE)
    module = by_name(copy.deepcopy(plain))
    x, index, weights = random_rows()
    module(x, index, weights)
    larger = build_experts(*QWEN3_MOE, num_experts=2 * E)
    for experts in (plain, module):
        experts.gate_up_proj = nn.Parameter(larger.gate_up_proj.data, requires_grad=False)
        experts.down_proj = nn.Parameter(larger.down_proj.data, requires_grad=False)
        experts.num_experts = 2 * E
    index = index + E
    assert plain(x, index, weights).any()
    assert_close(module(x, index, weights), plain(x, index, weights))


def test_an_activation_that_was_replaced():
    plain = build_experts(*QWEN3_MOE)
    module = by_name(copy.deepcopy(plain))
    rows = random_rows()
    before = module(*rows)
    for experts in (plain, module):
        experts.act_fn = nn.Softplus()
    assert_close(module(*rows), plain(*rows))
    assert_share_of_order_one(module(*rows), before, low=0.1)


@pytest.mark.parametrize("case", [QWEN3_MOE, GPT_OSS], ids=lambda case: case[1])
def test_compiled_in_one_graph_after_an_eager_call(case):
    plain = build_experts(*case)
    module = by_name(copy.deepcopy(plain))
    module(*random_rows())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    check_against_oracle(plain, compiled, random_rows())


def test_the_first_compiled_call_reads_the_layout_outside_of_the_graph():
    plain = build_experts(*QWEN3_MOE)
    module = by_name(copy.deepcopy(plain))
    compiled = torch.compile(module, backend="aot_eager")
    check_against_oracle(plain, compiled, random_rows())
    for experts in (plain, module):
        experts.act_fn = nn.Softplus()
    check_against_oracle(plain, compiled, random_rows())


def test_experts_in_four_and_eight_bits():
    rows = random_rows()
    for quantized in ("nf4", "int8"):
        module = build_experts(*QWEN3_MOE)
        holder = nn.ModuleDict({"experts": module})
        quantize_experts(holder, quantized)
        plain = build_experts(*QWEN3_MOE)
        plain.gate_up_proj.data = module.gate_up_proj.detach()
        plain.down_proj.data = module.down_proj.detach()
        module.config._experts_implementation = NAME
        check_against_oracle(plain, module, rows)


def trained_alone(name):
    """The same experts twice, of which one parameter is trained; the second is by name."""
    frozen._warn.cache_clear()
    plain = build_experts(*GPT_OSS)
    module = by_name(copy.deepcopy(plain))
    for experts in (plain, module):
        experts.requires_grad_(False)
        getattr(experts, name).requires_grad_()
    plain.config._experts_implementation = "grouped_mm"
    return plain, module


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj", "gate_up_proj_bias"])
def test_experts_that_train_themselves_run_transformers_own_code(name, frozen_calls, caplog):
    plain, module = trained_alone(name)
    rows = random_rows()
    with caplog.at_level(logging.WARNING, "peft_moe_lora"):
        for _ in range(2):
            found = grads_of(lambda: module(*rows), [getattr(module, name)])
    expected = grads_of(lambda: plain(*rows), [getattr(plain, name)])
    assert_close(found[0], expected[0])
    assert expected[1][0].abs().max() > 0
    assert_close(found[1][0], expected[1][0])
    assert not frozen_calls
    assert len(caplog.records) == 1
    assert "GptOssExperts trains them" in caplog.text
    # where nothing is trained, the kernels run
    with torch.no_grad():
        assert_close(module.eval()(*rows), plain(*rows))
    assert frozen_calls == [module]


def test_experts_that_train_themselves_compile_in_one_graph(frozen_calls, caplog):
    plain, module = trained_alone("down_proj")
    rows = random_rows()
    with torch.no_grad():
        module.eval()(*rows)
    frozen_calls.clear()
    compiled = torch.compile(module.train(), fullgraph=True, backend="eager")
    for _ in range(2):
        out = compiled(*rows)
    assert out.requires_grad
    assert_close(out, plain(*rows))
    assert not frozen_calls
    assert caplog.text.count("GptOssExperts trains them") == 1


def test_reentrant_checkpointing_runs_one_implementation_in_both_passes(frozen_calls):
    module = by_name(build_experts(*QWEN3_MOE)).requires_grad_(True).train()
    x, index, weights = random_rows()
    x.requires_grad_()
    torch.utils.checkpoint.checkpoint(
        module, x, index, weights, use_reentrant=True
    ).sum().backward()
    assert module.down_proj.grad.abs().max() > 0
    assert not frozen_calls


def test_a_weight_that_is_not_here_is_refused(tmp_path):
    module = by_name(build_experts(*QWEN3_MOE))
    rows = random_rows()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        sharded = copy.deepcopy(module)
        weight = DTensor.from_local(module.down_proj, mesh)
        sharded.down_proj = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(UnsupportedExperts, match=r"down_proj as a plain tensor .* DTensor on"):
            sharded(*rows)
    finally:
        torch.distributed.destroy_process_group()
    offloaded = copy.deepcopy(module)
    offloaded.gate_up_proj = nn.Parameter(module.gate_up_proj.to("meta"), requires_grad=False)
    with pytest.raises(UnsupportedExperts, match=r"gate_up_proj .* cpu, .* Parameter on meta"):
        offloaded(*rows)


# ---- whole models --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", causal_families())
def test_a_model_runs_it_by_name(family, tmp_path, frozen_calls):
    model = tiny_model(family)
    expected = outputs(model).detach()
    model.requires_grad_(False).set_experts_implementation(NAME)
    assert_close(outputs(model), expected)
    called = len(frozen_calls)
    assert called > 0
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=NAME)
    assert loaded.config._experts_implementation == NAME
    with torch.no_grad():
        assert_close(outputs(loaded), expected)
        assert len(frozen_calls) == 2 * called
        loaded.generate(token_ids(1, 4), max_new_tokens=2, do_sample=False)
    assert len(frozen_calls) > 2 * called
    model.set_experts_implementation("eager")
    frozen_calls.clear()
    assert_close(outputs(model), expected)
    assert not frozen_calls


def test_attention_adapters_train_beside_frozen_experts(frozen_calls):
    """PEFT's own LoRA on attention: the gradient passes through the experts."""
    gradients = []
    for name in ("eager", NAME):
        base = tiny_model()
        base.set_experts_implementation(name)
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(base, config).train()
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        _, found = grads_of(lambda m=model: outputs(m), list(parameters.values()))
        gradients.append(dict(zip(parameters, found, strict=True)))
    assert len(frozen_calls) == 2
    for key, expected in gradients[0].items():
        assert expected.abs().max() > 0
        assert_close(gradients[1][key], expected, FP32, key)


def test_experts_in_modules_to_save_train_and_the_frozen_copy_runs_the_kernels(frozen_calls):
    base = tiny_model()
    base.set_experts_implementation(NAME)
    plain = outputs(base.requires_grad_(False)).detach()
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"])
    model = get_peft_model(base, config).train()
    frozen_calls.clear()
    outputs(model).square().sum().backward()
    assert not frozen_calls
    trained = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert all(p.grad.abs().max() > 0 for p in trained)
    with model.disable_adapter():
        assert_close(outputs(model), plain)
    assert len(frozen_calls) == 2


# ---- adapted models ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", causal_families())
def test_a_disabled_adapter_leaves_the_kernels_on_the_base(family, frozen_calls):
    base = tiny_model(family)
    plain = outputs(base).detach()
    model = moe_lora(base)
    with_adapter = outputs(model).detach()
    assert_share_of_order_one(with_adapter, plain)
    assert not frozen_calls
    with model.disable_adapter():
        assert_close(outputs(model), plain)
    called = len(frozen_calls)
    assert called > 0
    model.merge_adapter()
    assert_close(outputs(model), with_adapter)
    assert len(frozen_calls) == 2 * called
    model.unmerge_adapter()
    assert_close(outputs(model), with_adapter)
    assert len(frozen_calls) == 2 * called


def test_a_new_adapter_and_a_disabled_one_give_the_same_bits():
    """A policy and its reference model, which are one model, differ by nothing at the start."""
    model = moe_lora(tiny_model(), randomize=False)
    with model.disable_adapter():
        reference = outputs(model)
    assert torch.equal(outputs(model), reference)


def test_gradients_through_a_disabled_adapter():
    plain = build_experts(*QWEN3_MOE)
    model = wrap(copy.deepcopy(plain))
    with model.disable_adapter():
        check_against_oracle(plain, model, random_rows())


@pytest.mark.parametrize("options", [{"keep_implementation": True}, {"backend": "materialize"}])
def test_the_models_own_implementation_stays_where_it_is_asked_for(options, frozen_calls):
    base = tiny_model()
    plain = outputs(base)
    model = moe_lora(copy.deepcopy(base), **options)
    with model.disable_adapter():
        assert torch.equal(outputs(model), plain)
    merged = moe_lora(copy.deepcopy(base), **options)
    merged.merge_adapter()
    unloaded = moe_lora(copy.deepcopy(base), **options).merge_and_unload()
    assert torch.equal(outputs(merged), outputs(unloaded))
    assert not frozen_calls
    # named by the user, it is this package's after all
    if options.get("keep_implementation"):
        model.set_experts_implementation(NAME)
        with model.disable_adapter():
            assert_close(outputs(model), plain)
        assert len(frozen_calls) == 2


def test_one_adapter_that_keeps_the_implementation_is_enough():
    model = wrap(build_experts(*QWEN3_MOE))
    layer = model.base_model.model.experts
    assert not layer.keep_implementation
    model.add_adapter("other", MoELoraConfig(r=2, keep_implementation=True))
    assert layer.keep_implementation


def test_keeping_the_implementation_is_saved(tmp_path):
    model = moe_lora(tiny_model(), keep_implementation=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    layers = [m for m in loaded.modules() if isinstance(m, MoELoraLayer)]
    assert layers
    assert all(layer.keep_implementation for layer in layers)


def test_a_base_that_is_trained_runs_the_models_own_implementation(frozen_calls, caplog):
    frozen._warn.cache_clear()
    plain = build_experts(*QWEN3_MOE)
    model = wrap(copy.deepcopy(plain))
    experts = model.base_model.model.experts.base_layer
    experts.config._experts_implementation = "batched_mm"
    experts.down_proj.requires_grad_()
    rows = random_rows()
    with model.disable_adapter():
        found = grads_of(lambda: model(*rows), [experts.down_proj])
    expected = grads_of(lambda: plain(*rows), [plain.down_proj])
    assert_close(found[1][0], expected[1][0])
    assert not frozen_calls
    assert '"batched_mm" runs instead' in caplog.text


def test_layers_without_an_adapter_run_what_the_model_names(frozen_calls):
    base = tiny_model()
    expected = outputs(moe_lora(copy.deepcopy(base), layers_to_transform=[1])).detach()
    assert not frozen_calls
    base.set_experts_implementation(NAME)
    model = moe_lora(base, layers_to_transform=[1])
    assert_close(outputs(model), expected)
    assert frozen_calls == [base.model.layers[0].mlp.experts]
    unloaded = model.unload()
    frozen_calls.clear()
    outputs(unloaded.requires_grad_(False))
    assert len(frozen_calls) == 2
    assert base_weight(frozen_calls[0], "down").shape[0] == E


# ---- off the interface ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "experts"),
    [("llama4", "Llama4TextExperts"), ("longcat_flash", "LongcatFlashExperts")],
)
def test_off_the_interface_the_models_own_code_stays(family, experts, frozen_calls):
    """transformers leaves the name out of such a model's config, and the summary says it."""
    base = off_interface_model(family)
    plain = outputs(base).detach()
    base.set_experts_implementation(NAME)
    assert base.config._experts_implementation != NAME
    assert torch.equal(outputs(base), plain)
    model = moe_lora(base)
    assert (
        f"2 {experts} are not on transformers' experts interface: the model's own code computes "
        "them while adapters are disabled or merged"
    ) in model.summary()
    with model.disable_adapter():
        assert torch.equal(outputs(model), plain)
    assert not frozen_calls


def test_the_summary_of_a_model_on_the_interface_says_nothing_about_it():
    assert "interface" not in moe_lora(tiny_model()).summary()
