"""The same A and B give the same model in PEFT's own route and in ours.

PEFT's route is `LoraConfig(target_parameters=...)`. Its `ParamWrapper` keeps A [r*E, K]
expert-major, as we do, and B [N, r*E] rank-major: column j*E + e.
"""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch.nn import functional as F

from helpers import (
    STORED_FAMILIES,
    E,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    expert_major,
    experts_adapter,
    experts_paths,
    fill_adapter,
    moe_lora,
    outputs,
    rank_major,
    relative_error,
    tiny_families,
    tiny_model,
    token_ids,
)

# fp32, two layers, two orders of summation: 1e-5 is promised, measured differences are below 3e-6
TOLERANCE = 1e-5
PROJECTION = {"gate_up_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}


@pytest.fixture(params=STORED_FAMILIES)
def family(request):
    return request.param


def peft_wrappers(model, path):
    """{projection: ParamWrapper} of one experts module; PEFT nests the wrappers of one module."""
    module, found = model.get_submodule(f"base_model.model.{path}"), {}
    while isinstance(module, ParamWrapper):
        found[PROJECTION[module.parameter_name]] = module
        module = module.base_layer
    return found


def the_same_in_peft(base, ours, **config):
    """`base` with PEFT's own LoRA on the experts' parameters, carrying the A and B of `ours`."""
    paths = experts_paths(base)
    names = [n for n, _ in base.get_submodule(paths[0]).named_parameters() if n in PROJECTION]
    config = {"r": R, "lora_alpha": 2 * R, **config}
    targets = {"target_modules": [], "target_parameters": [f"experts.{name}" for name in names]}
    theirs = get_peft_model(base, LoraConfig(**targets, **config))
    for path in paths:
        wrappers = peft_wrappers(theirs, path)
        assert wrappers.keys() == {"gate_up", "down"}
        for projection, (lora_A, lora_B) in experts_adapter(ours, path).items():
            wrapper = wrappers[projection]
            # `copy_` broadcasts silently where a shape is wrong
            assert wrapper.lora_A["default"].weight.shape == lora_A.shape
            assert wrapper.lora_B["default"].weight.shape == lora_B.shape
            with torch.no_grad():
                wrapper.lora_A["default"].weight.copy_(lora_A)
                wrapper.lora_B["default"].weight.copy_(rank_major(lora_B, wrapper.num_experts))
    return theirs


def loss(model):
    """The cross-entropy of the next token, for gradients like those of training."""
    logits = outputs(model)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids()[:, 1:].flatten())


def test_logits_and_adapter_gradients_are_equal(family):
    base = tiny_model(family)
    plain = outputs(base).detach()
    ours = moe_lora(copy.deepcopy(base))
    theirs = the_same_in_peft(copy.deepcopy(base), ours)
    assert_share_of_order_one(outputs(ours), plain)
    assert_close(outputs(ours), outputs(theirs), TOLERANCE, "logits")
    loss(ours).backward()
    loss(theirs).backward()
    for path in experts_paths(base):
        for projection, (lora_A, lora_B) in experts_adapter(ours, path).items():
            wrapper = peft_wrappers(theirs, path)[projection]
            right_A = wrapper.lora_A["default"].weight.grad
            right_B = expert_major(wrapper.lora_B["default"].weight.grad, E)
            assert right_A.abs().max() > 0
            assert right_B.abs().max() > 0
            assert_close(lora_A.grad, right_A, TOLERANCE, f"d lora_A of {path}.{projection}")
            assert_close(lora_B.grad, right_B, TOLERANCE, f"d lora_B of {path}.{projection}")


def test_merged_weights_are_equal(family):
    base = tiny_model(family)
    ours = moe_lora(copy.deepcopy(base))
    theirs = the_same_in_peft(copy.deepcopy(base), ours)
    ours, theirs = ours.merge_and_unload(), theirs.merge_and_unload()
    assert ours.state_dict().keys() == theirs.state_dict().keys() == base.state_dict().keys()
    for name, weight in ours.state_dict().items():
        assert_close(weight, theirs.state_dict()[name], TOLERANCE, name)
    for path in experts_paths(base):
        assert_share_of_order_one(
            ours.get_submodule(path).down_proj, base.get_submodule(path).down_proj
        )


def test_rslora_scales_as_in_peft(family):
    base = tiny_model(family)
    ours = moe_lora(copy.deepcopy(base), use_rslora=True, lora_alpha=3)
    theirs = the_same_in_peft(copy.deepcopy(base), ours, use_rslora=True, lora_alpha=3)
    assert_share_of_order_one(outputs(ours), outputs(base))
    assert_close(outputs(ours), outputs(theirs), TOLERANCE, "logits")


def test_attention_in_the_same_adapter_is_pefts_own_lora():
    base = tiny_model()
    ours = moe_lora(copy.deepcopy(base), target_modules=["experts", "q_proj", "v_proj"])
    theirs = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(
            r=R,
            lora_alpha=2 * R,
            target_modules=["q_proj", "v_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    )
    linear = {n: p for n, p in adapter_parameters(ours).items() if n.endswith(".weight")}
    # 2 layers x (q_proj, v_proj) x (A, B), under PEFT's own names
    assert len(linear) == 8
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, parameter in linear.items():
            named[name].copy_(parameter)
        for path in experts_paths(base):
            for projection, (lora_A, lora_B) in experts_adapter(ours, path).items():
                wrapper = peft_wrappers(theirs, path)[projection]
                wrapper.lora_A["default"].weight.copy_(lora_A)
                wrapper.lora_B["default"].weight.copy_(rank_major(lora_B, E))
    assert_close(outputs(ours), outputs(theirs), TOLERANCE, "logits")
    loss(ours).backward()
    loss(theirs).backward()
    for name, parameter in linear.items():
        assert_close(parameter.grad, named[name].grad, TOLERANCE, f"d {name}")


def test_a_mix_up_of_the_two_orders_or_of_two_experts_is_caught(family):
    """Both mistakes keep every shape, so only the numbers show them."""
    base = tiny_model(family)
    ours = moe_lora(copy.deepcopy(base))
    theirs = outputs(the_same_in_peft(copy.deepcopy(base), ours)).detach()
    swap = [1, 0, *range(2, E)]
    mistakes = {
        "B read rank-major": lambda a, b: (a, rank_major(b, E)),
        "A's experts swapped": lambda a, b: (a.view(E, R, -1)[swap].reshape(a.shape), b),
        "B's experts swapped": lambda a, b: (a, b.view(-1, E, R)[:, swap].reshape(b.shape)),
        "both swapped": lambda a, b: (
            a.view(E, R, -1)[swap].reshape(a.shape),
            b.view(-1, E, R)[:, swap].reshape(b.shape),
        ),
    }
    for name, mistake in mistakes.items():
        wrong = copy.deepcopy(ours)
        with torch.no_grad():
            for path in experts_paths(base):
                for pair in experts_adapter(wrong, path).values():
                    for parameter, value in zip(
                        pair, mistake(*(p.detach().clone() for p in pair)), strict=True
                    ):
                        parameter.copy_(value)
        assert relative_error(outputs(wrong), theirs) > 1000 * TOLERANCE, name


def test_order_conversions_undo_each_other():
    lora_B = torch.randn(6, R * E)
    assert torch.equal(expert_major(rank_major(lora_B, E), E), lora_B)
    assert not torch.equal(rank_major(lora_B, E), lora_B)


@pytest.mark.parametrize("family", [f for f in tiny_families() if f not in STORED_FAMILIES])
def test_whole_models_of_other_families_agree_too(family):
    base = tiny_model(family)
    ours = moe_lora(copy.deepcopy(base))
    theirs = the_same_in_peft(copy.deepcopy(base), ours)
    assert_share_of_order_one(outputs(ours), outputs(base))
    assert_close(outputs(ours), outputs(theirs), TOLERANCE, "logits")


def test_fill_adapter_leaves_nothing_zero():
    """The comparisons above rely on this: B is not left at its initial zero."""
    ours = moe_lora(tiny_model(), randomize=False)
    fill_adapter(ours)
    assert all((p != 0).float().mean() > 0.99 for p in adapter_parameters(ours).values())
