"""Models under `keep_experts`, switched on as users do, train as without it, to the bit."""

import json

import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import (
    ROUTED_FAMILIES,
    UNFUSED_FAMILIES,
    adapter_parameters,
    experts_paths,
    fill_adapter,
    moe_lora,
    tiny_model,
    token_ids,
    training_arguments,
)
from peft_moe_lora import MoELoraConfig, keep_experts, quantize_experts
from peft_moe_lora.functional import checkpointing, whole

KWARGS = {"use_reentrant": False, "context_fn": keep_experts}
ATTENTION = ["experts", "o_proj"]
STEPS = 2


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setattr(checkpointing, "_output_needed", set())


@pytest.fixture
def runs(monkeypatch):
    """One entry for each time that the experts of a layer run."""
    found = []
    forward = whole._forward

    def counted(*values):
        found.append(values[-1].keeps)
        return forward(*values)

    monkeypatch.setattr(whole, "_forward", counted)
    return found


def enable(model, kwargs):
    """Gradient checkpointing by the name that this version of transformers has for it."""
    name = "gradient_checkpointing_enable"
    if hasattr(model, "activation_checkpointing_enable"):
        name = "activation_checkpointing_enable"
    getattr(model, name)(kwargs)


def trained(model, kwargs):
    """The losses and the last gradients of some backwards; checkpointed if `kwargs` is not None."""
    model.train()
    model.enable_input_require_grads()
    if kwargs is not None:
        enable(model, kwargs)
    ids = token_ids()
    losses = []
    for step in range(STEPS):
        model.zero_grad()
        torch.manual_seed(step)
        out = model(input_ids=ids, use_cache=False)
        # a model with a head, or one that ends in a norm
        loss = getattr(out, "logits", out[0]).square().mean()
        loss.backward()
        losses.append(loss.detach())
    return losses, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same_training(build):
    """With `keep_experts` a model trains as without checkpointing, to the bit."""
    losses, expected = trained(build(), None)
    kept_losses, found = trained(build(), KWARGS)
    assert kept_losses == losses
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(found[name], gradient), name


@pytest.mark.parametrize("family", [*ROUTED_FAMILIES, *UNFUSED_FAMILIES])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_those_without_checkpointing(family, dropout):
    targets = ["experts"] if family in UNFUSED_FAMILIES else ATTENTION
    assert_same_training(
        lambda: moe_lora(tiny_model(family), target_modules=targets, lora_dropout=dropout)
    )


@pytest.mark.parametrize("family", ROUTED_FAMILIES)
def test_every_layer_runs_its_experts_once(family, runs):
    """deepseek_v3 runs shared experts behind them, and its first step finds that out."""
    model = moe_lora(tiny_model(family))
    layers = len(experts_paths(tiny_model(family)))
    trained(model, KWARGS)
    first_step = 2 * layers if family == "deepseek_v3" else layers
    assert len(runs) == first_step + (STEPS - 1) * layers


def with_a_router():
    return moe_lora(tiny_model("qwen3_moe"), target_modules=["experts", "gate", "o_proj"])


def with_two_adapters():
    model = moe_lora(tiny_model("qwen3_moe"), target_modules=ATTENTION)
    second = MoELoraConfig(r=2, target_modules=ATTENTION, expert_indices={"experts": [0, 3]})
    model.add_adapter("second", second)
    fill_adapter(model, "second", seed=5)
    model.base_model.set_adapter(["default", "second"])
    return model


def with_quantized_experts():
    model = moe_lora(tiny_model("qwen3_moe"), target_modules=ATTENTION)
    quantize_experts(model, "nf4")
    return model


def without_an_adapter_at_work():
    model = moe_lora(tiny_model("qwen3_moe"), target_modules=ATTENTION)
    for module in model.modules():
        if hasattr(module, "experts_here"):
            module.enable_adapters(False)
            # PEFT freezes what it disables, and a parameter that is not used has no gradient
            module.requires_grad_(False)
    return model


BUILT = [with_a_router, with_two_adapters, with_quantized_experts, without_an_adapter_at_work]


@pytest.mark.parametrize("build", BUILT, ids=lambda build: build.__name__)
def test_it_holds_for(build, runs):
    assert_same_training(build)
    # without checkpointing and with it
    assert len(runs) == 2 * STEPS * len(experts_paths(tiny_model("qwen3_moe")))


# ---- transformers' Trainer ----------------------------------------------------------------------


def checkpointing_fields(kwargs):
    """Fields of TrainingArguments, by the names that this version of transformers has for them."""
    name = "gradient_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
        name = "activation_checkpointing"
    return {name: True, f"{name}_kwargs": kwargs}


def adapters_after_training(folder, model, **fields):
    ids = token_ids(4, 8)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = training_arguments(folder, max_steps=2, **fields)
    Trainer(model, arguments, train_dataset=rows).train()
    return {name: p.detach() for name, p in adapter_parameters(model).items()}


def build():
    return moe_lora(tiny_model("qwen3_moe"), target_modules=ATTENTION, lora_dropout=0.2)


def test_a_trainer_is_told_by_its_arguments(tmp_path, runs):
    expected = adapters_after_training(tmp_path / "plain", build())
    count = len(runs)
    found = adapters_after_training(tmp_path / "kept", build(), **checkpointing_fields(KWARGS))
    assert len(runs) == 2 * count
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name


def test_a_model_is_told_before_a_trainer_has_it(tmp_path, runs):
    """For what writes the arguments as JSON, which holds no function."""
    expected = adapters_after_training(tmp_path / "plain", build())
    count = len(runs)
    model = build()
    enable(model, KWARGS)
    found = adapters_after_training(tmp_path / "kept", model)
    assert len(runs) == 2 * count
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
    arguments = training_arguments(tmp_path, **checkpointing_fields(KWARGS))
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps(arguments.to_dict())


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_it_keeps_experts_that_recompute(recompute, runs):
    def compiled():
        torch._dynamo.reset()
        model = moe_lora(tiny_model("qwen3_moe"), target_modules=ATTENTION, recompute=recompute)
        model.train().compile(backend="aot_eager")
        return model

    losses, expected = trained(compiled(), None)
    runs.clear()
    kept_losses, found = trained(compiled(), KWARGS)
    layers = len(experts_paths(tiny_model("qwen3_moe")))
    assert len(runs) == STEPS * layers * (1 if recompute else 2)
    assert kept_losses == losses
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
