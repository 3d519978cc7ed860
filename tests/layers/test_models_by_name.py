"""Models whose experts run "moe_lora" by name: whole, adapted, and off transformers' interface."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from families.off_interface import off_interface_model
from helpers import (
    FP32,
    QWEN3_MOE,
    E,
    assert_close,
    assert_share_of_order_one,
    base_weight,
    build_experts,
    causal_families,
    grads_of,
    moe_lora,
    outputs,
    random_rows,
    relative_error,
    tiny_model,
    token_ids,
    train,
    wrap,
)
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.layers import frozen
from peft_moe_lora.layers.layer import MoELoraLayer

NAME = "moe_lora"


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


def test_a_fully_trained_model_has_the_losses_of_transformers_own_code(frozen_calls):
    base = tiny_model().train()
    named = copy.deepcopy(base)
    named.set_experts_implementation(NAME)
    losses = train(base, token_ids(), steps=4)
    assert train(named, token_ids(), steps=4) == losses
    assert losses[-1] < 0.7 * losses[0]
    assert not frozen_calls


def test_a_layer_that_is_trained_leaves_the_kernels_to_the_others(frozen_calls):
    gradients = []
    for name in ("grouped_mm", NAME):
        model = tiny_model().requires_grad_(False).train()
        model.set_experts_implementation(name)
        trained = model.model.layers[0].mlp.experts.down_proj.requires_grad_()
        outputs(model).square().sum().backward()
        gradients.append(trained.grad)
    assert frozen_calls == [model.model.layers[1].mlp.experts]
    assert gradients[0].abs().max() > 0
    assert_close(gradients[1], gradients[0])


def test_copies_and_pickles_run_it_too(frozen_calls):
    model = tiny_model().requires_grad_(False)
    expected = outputs(model)
    model.set_experts_implementation(NAME)
    assert_close(outputs(model), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        frozen_calls.clear()
        assert_close(outputs(copied), expected)
        assert len(frozen_calls) == 2
        # and a change of the copy is its own
        copied.model.layers[0].mlp.experts.act_fn = nn.Softplus()
        assert relative_error(outputs(copied), expected) > 0.01
    assert_close(outputs(model), expected)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_generation_gives_the_same_tokens(settings, frozen_calls):
    model = tiny_model().requires_grad_(False).eval()
    ids = token_ids(2, 4)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, **settings)
    model.set_experts_implementation(NAME)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, **settings), expected)
    assert len(frozen_calls) >= 12


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["peft_moe_lora"] = None
from transformers import AutoModelForCausalLM

print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).config._experts_implementation)
AutoModelForCausalLM.from_pretrained(sys.argv[1], experts_implementation="moe_lora")
"""


@pytest.mark.long
def test_where_the_package_is_not_imported_a_saved_model_loads_and_the_name_is_refused(tmp_path):
    model = tiny_model()
    model.set_experts_implementation(NAME)
    model.save_pretrained(tmp_path)
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "grouped_mm\n"
    assert 'ValueError: Specified `experts_implementation="moe_lora"` is not supp' in done.stderr


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
