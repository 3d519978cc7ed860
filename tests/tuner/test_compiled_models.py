"""Whole models under torch.compile, as users switch it on.

No break is ours, and a new length compiles what it compiles of the model without an adapter: one
graph for the first length, one for any length.
"""

import shutil
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Trainer

from helpers import (
    UNFUSED_FAMILIES,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    assert_unchanged,
    fill_adapter,
    moe_lora,
    outputs,
    snapshot,
    tiny_model,
    token_ids,
    training_arguments,
)
from helpers.graphs import Graphs, own_operators
from interop.models import lora_config, with_peft_lora
from peft_moe_lora import MoELoraConfig, apply_to_peft, quantize_experts

ATTENTION = ["q_proj", "v_proj"]
LENGTHS = (11, 17, 23)
# of a Trainer
STEPS = 3


def two_adapters(base):
    """One on some experts and one on all, both active."""
    model = moe_lora(base, expert_indices={"experts": [0, 2]})
    model.add_adapter("second", MoELoraConfig(r=2, target_modules=["experts", *ATTENTION]))
    fill_adapter(model, "second", seed=2)
    model.base_model.set_adapter(["default", "second"])
    return model


# name -> a function from a base model to one with adapters
KINDS = {
    "experts, attention, router": lambda base: moe_lora(
        base, target_modules=["experts", "gate", *ATTENTION]
    ),
    "dropout": lambda base: moe_lora(
        base, target_modules=["experts", *ATTENTION], lora_dropout=0.2
    ),
    "recompute": lambda base: moe_lora(base, recompute=True),
    "two adapters": two_adapters,
    "nf4": lambda base: moe_lora(quantize_experts(base)),
    "int8": lambda base: moe_lora(quantize_experts(base, format="int8")),
}
everything, *others = KINDS
kinds = pytest.mark.parametrize(
    "kind", [everything, *(pytest.param(kind, marks=pytest.mark.long) for kind in others)]
)


def one_layer(family="qwen3_moe"):
    return tiny_model(family, num_hidden_layers=1)


@kinds
def test_every_step_is_one_graph_and_lengths_share_it(kind, monkeypatch):
    model = KINDS[kind](one_layer()).train()
    graphs = Graphs()
    compiled = graphs.compile(model, fullgraph=True)
    for length in LENGTHS:
        outputs(compiled, token_ids(length=length)).square().mean().backward()
        # what is imported later changes nothing
        monkeypatch.setitem(sys.modules, f"imported_at_{length}", sys)
    assert_two_graphs_of_one_operator(graphs)


def assert_two_graphs_of_one_operator(graphs):
    """One operator in each direction: of the first length, and of any length."""
    assert not graphs.breaks()
    assert len(graphs.forward) == len(graphs.backward) == 2
    for graph in graphs.forward:
        assert own_operators(graph) == {"experts": 1}
    for graph in graphs.backward:
        assert own_operators(graph) == {"experts_backward": 1}


@pytest.mark.parametrize("format", [None, "nf4"])
def test_layers_that_are_compiled_one_by_one_share_their_graphs(format):
    base = tiny_model(num_hidden_layers=3)
    if format:
        quantize_experts(base, format)
    model = moe_lora(base, target_modules=["experts", *ATTENTION]).train()
    ids = token_ids(length=11)
    expected = outputs(model, ids)
    graphs = Graphs()
    backend = graphs.backend()
    for layer in model.get_base_model().model.layers:
        layer.compile(fullgraph=True, backend=backend)
    found = outputs(model, ids)
    found.square().mean().backward()
    # the input of the first layer needs no gradient
    assert len(graphs.forward) == len(graphs.backward) == 2
    assert_close(found, expected)


def two_of_peft(base):
    model = with_peft_lora(base)
    model.add_adapter("second", lora_config(base, r=2))
    fill_adapter(model, "second", seed=2)
    model.base_model.set_adapter(["default", "second"])
    return model


PEFTS_OWN = {
    "experts, attention": lambda base: with_peft_lora(base, target_modules=ATTENTION),
    "two adapters": two_of_peft,
    "nf4": lambda base: with_peft_lora(quantize_experts(base)),
}
one_of_peft, *others_of_peft = PEFTS_OWN


@pytest.mark.parametrize(
    "kind", [one_of_peft, *(pytest.param(kind, marks=pytest.mark.long) for kind in others_of_peft)]
)
def test_pefts_own_adapters_compile_as_ours_do(kind):
    model = PEFTS_OWN[kind](one_layer()).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = snapshot(model)
    graphs = Graphs()
    with apply_to_peft():
        compiled = graphs.compile(model, fullgraph=True)
        for length in LENGTHS:
            ids = token_ids(length=length)
            losses = [outputs(called, ids).square().mean() for called in (compiled, model)]
            found, expected = [torch.autograd.grad(loss, parameters) for loss in losses]
            for gradient, right in zip(found, expected, strict=True):
                assert right.abs().max() > 0
                assert_close(gradient, right)
    assert_two_graphs_of_one_operator(graphs)
    assert_unchanged(model, before)


@pytest.mark.long
def test_a_checkpointed_model_is_one_graph_without_pefts_hook_on_its_embeddings():
    """The hook calls requires_grad_ within the graph, where Dynamo breaks it."""
    model = moe_lora(one_layer(), target_modules=["experts", *ATTENTION]).train()
    parameters = list(adapter_parameters(model).values())
    expected = torch.autograd.grad(outputs(model).square().mean(), parameters)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
    graphs = Graphs()
    out = outputs(graphs.compile(model, fullgraph=True))
    for found, right in zip(
        torch.autograd.grad(out.square().mean(), parameters), expected, strict=True
    ):
        assert_close(found, right)
    assert own_operators(*graphs.forward) == {"experts": 1}
    # the second run, and backward
    assert own_operators(*graphs.backward) == {"experts": 1, "experts_backward": 1}


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "gemma4", *UNFUSED_FAMILIES])
def test_lengths_share_a_graph_in_other_families(family):
    model = moe_lora(tiny_model(family)).train()
    graphs = Graphs()
    compiled = graphs.compile(model, fullgraph=True)
    for length in LENGTHS:
        outputs(compiled, token_ids(length=length)).square().mean().backward()
    assert len(graphs.forward) == len(graphs.backward) == 2


@pytest.mark.long
def test_model_compile_in_place_gives_the_same_numbers_and_switches():
    """`model.compile()`: adapters off and on again, autocast, no gradients."""
    model = moe_lora(one_layer(), target_modules=["experts", *ATTENTION])
    ids = token_ids()
    expected = outputs(model, ids)
    with model.disable_adapter():
        plain = outputs(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = outputs(model, ids).float()
    torch.compiler.reset()
    model.compile(backend="aot_eager", fullgraph=True)
    assert_close(outputs(model, ids), expected)
    assert_share_of_order_one(expected, plain)
    with torch.no_grad():
        assert_close(outputs(model, ids), expected)
        with model.disable_adapter():
            assert_close(outputs(model, ids), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(outputs(model, ids).float(), in_autocast, 2e-2)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
@pytest.mark.parametrize("kind", ["experts, attention, router", "nf4"])
def test_inductors_code_gives_the_same_gradients(kind):
    model = KINDS[kind](one_layer()).train()
    parameters = list(adapter_parameters(model).values())
    expected = torch.autograd.grad(outputs(model).square().mean(), parameters)
    torch.compiler.reset()
    out = outputs(torch.compile(model, fullgraph=True))
    found = torch.autograd.grad(out.square().mean(), parameters)
    for gradient, right in zip(found, expected, strict=True):
        assert right.abs().max() > 0
        assert_close(gradient, right)


# ---- Trainer -------------------------------------------------------------------------------------


def trained(folder, layers=False, **settings):
    """The losses of a Trainer's first steps, what it saves, and its model.

    Args:
        layers: whether each decoder layer is compiled by itself.
    """
    model = moe_lora(one_layer(), target_modules=["experts", "q_proj"])
    if layers:
        for layer in model.get_base_model().model.layers:
            layer.compile(backend="aot_eager")
    samples = [{"input_ids": token_ids(1, seed=i)[0]} for i in range(STEPS)]
    samples = [sample | {"labels": sample["input_ids"]} for sample in samples]
    arguments = training_arguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=1,
        logging_steps=1,
        learning_rate=1e-2,
        **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=samples)
    trainer.train()
    trainer.save_model(folder)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, load_file(folder / "adapter_model.safetensors"), model


WHOLE = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.parametrize("compiled", [WHOLE, {"layers": True}], ids=["whole", "layers"])
def test_a_trainer_with_torch_compile_gives_the_losses_and_the_file_of_one_without(
    compiled, tmp_path
):
    torch.compiler.reset()
    losses, saved, model = trained(tmp_path / "compiled", **compiled)
    right, expected, _ = trained(tmp_path / "eager")
    assert len(losses) == len(right) == STEPS
    torch.testing.assert_close(losses, right, rtol=1e-4, atol=1e-4)
    assert saved.keys() == expected.keys()
    assert not any("_orig_mod" in name for name in saved)
    for name, tensor in expected.items():
        assert_close(saved[name], tensor, 1e-3)
    loaded = PeftModel.from_pretrained(one_layer(), tmp_path / "compiled")
    again = adapter_parameters(loaded)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(again[name], parameter), name
