"""What PEFT and PyTorch do around adapters of experts has PEFT's numbers with `apply_to_peft` too.

Adapters are exchanged, loaded, deleted; models are copied, cast, compiled, called by threads.
"""

import io
import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

from helpers import (
    assert_close,
    experts_paths,
    fill_adapter,
    grads_of,
    outputs,
    relative_error,
    tiny_model,
    token_ids,
)
from interop.models import lora_config, pairs, peft_model, wrapped
from peft_moe_lora import apply_to_peft
from peft_moe_lora.layers import frozen

# fp32, two layers, two orders of summation
TOLERANCE = 1e-5


def another_adapter(folder):
    """A saved adapter with other A and B than `peft_model` has."""
    other = peft_model()
    fill_adapter(other, seed=11)
    other.save_pretrained(folder / "other")
    return folder / "other"


def exchanged_in_place(folder):
    model = peft_model()
    before = outputs(model)
    hotswap_adapter(model, another_adapter(folder), "default")
    assert relative_error(outputs(model), before) > 0.1
    return outputs(model)


def loaded_on_the_meta_device(folder):
    model = peft_model()
    before = outputs(model)
    model.load_adapter(another_adapter(folder), "other", low_cpu_mem_usage=True)
    model.set_adapter("other")
    assert relative_error(outputs(model), before) > 0.1
    return outputs(model)


def a_model_loaded_on_the_meta_device(folder):
    path = another_adapter(folder)
    return outputs(PeftModel.from_pretrained(tiny_model(), path, low_cpu_mem_usage=True))


def one_of_two_deleted(folder):
    model = peft_model()
    model.load_adapter(another_adapter(folder), "other")
    model.set_adapter("other")
    outputs(model)
    model.delete_adapter("default")
    return outputs(model)


def parameters_outside_of_experts(folder):
    names = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight", "o_proj.weight"]
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=names)
    model = get_peft_model(tiny_model(), config)
    fill_adapter(model)
    return outputs(model)


def for_inference(folder):
    with torch.inference_mode():
        return outputs(peft_model(inference_mode=True)).clone()


def trained_after_inference(folder):
    model = peft_model()
    with torch.inference_mode():
        outputs(model)
    out, gradients = grads_of(lambda: outputs(model), pairs(model))
    return torch.cat([out.flatten(), *(g.flatten() for g in gradients)])


def pickled(folder):
    model = peft_model()
    outputs(model)
    file = io.BytesIO()
    torch.save(model, file)
    # a file is read without this package
    assert b"peft_moe_lora" not in file.getvalue()
    file.seek(0)
    return outputs(torch.load(file, weights_only=False))


def in_float16_and_back(folder):
    model = peft_model()
    outputs(model)
    model.half()
    assert outputs(model).dtype == torch.float16
    return outputs(model.float())


def generated(folder):
    model = peft_model().eval()
    return model.generate(token_ids(1, 4), max_new_tokens=5, do_sample=False).float()


def several_models_in_turn(folder):
    models = [peft_model(), peft_model("gpt_oss"), peft_model("mixtral")]
    return torch.cat([outputs(model).flatten() for model in models + models])


def by_data_parallel(folder):
    return torch.nn.DataParallel(peft_model())(input_ids=token_ids()).logits


def with_other_values_of_a_and_b(folder):
    model = peft_model()
    scaled = {n: 1.5 * p for n, p in model.named_parameters() if ".lora_" in n}
    out = torch.func.functional_call(model, scaled, (), {"input_ids": token_ids()}).logits
    assert relative_error(out, outputs(model)) > 0.1
    return out


def after_an_exception_in_a_hook(folder):
    model = peft_model()
    experts = model.get_submodule(experts_paths(model)[0])

    def fails(module, rows):
        raise ZeroDivisionError

    handle = experts.register_forward_pre_hook(fails)
    with pytest.raises(ZeroDivisionError):
        outputs(model)
    handle.remove()
    return outputs(model)


def with_another_activation(folder):
    model = peft_model()
    before = outputs(model)
    for wrapper in wrapped(model).values():
        wrapper.get_base_layer().act_fn = torch.nn.Softplus()
    assert relative_error(outputs(model), before) > 0.1
    return outputs(model)


SCENARIOS = [
    exchanged_in_place,
    loaded_on_the_meta_device,
    a_model_loaded_on_the_meta_device,
    one_of_two_deleted,
    parameters_outside_of_experts,
    for_inference,
    trained_after_inference,
    pickled,
    in_float16_and_back,
    generated,
    several_models_in_turn,
    by_data_parallel,
    with_other_values_of_a_and_b,
    after_an_exception_in_a_hook,
    with_another_activation,
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_it_gives_pefts_numbers(scenario, computed, tmp_path):
    right = scenario(tmp_path).detach()
    assert not computed
    with apply_to_peft():
        found = scenario(tmp_path).detach()
    assert len(computed) >= 2
    # float16 is only on the way
    assert_close(found, right, TOLERANCE)


def test_a_scaling_that_is_trained_gets_its_gradient(computed):
    """PEFT's own code raises a TypeError for it."""
    model = peft_model()
    scaling = torch.nn.Parameter(torch.tensor(1.5))

    def loss(value):
        for wrapper in wrapped(model).values():
            wrapper.scaling["default"] = value
        return outputs(model).square().mean()

    with apply_to_peft():
        (slope,) = torch.autograd.grad(loss(scaling), [scaling])
        with torch.no_grad():
            step = loss(1.51) - loss(1.49)
    assert len(computed) == 6
    assert slope.item() == pytest.approx(step.item() / 2e-2, rel=1e-2)


def test_weighted_adapters_are_refused_as_by_peft():
    model = peft_model()
    model.add_adapter("second", lora_config(model.base_model.model))
    with apply_to_peft(), pytest.raises(ValueError, match=r"not support targeting nn\.Parameter"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


def test_a_model_that_ran_here_runs_pefts_code_after_removal(computed):
    model = peft_model()
    right = outputs(model)
    with apply_to_peft():
        outputs(model)
    computed.clear()
    assert torch.equal(outputs(model), right)
    assert not computed


def test_two_threads_that_meet_in_one_experts_module(computed):
    """The second begins a call while the first is between the wrapper and the experts' forward."""
    model = peft_model()
    ids = [token_ids(), token_ids().flip(0)]
    right = [model(input_ids=rows).logits for rows in ids]
    experts = model.get_submodule(experts_paths(model)[0])
    entered, second_is_done = threading.Event(), threading.Event()
    found = {}

    def wait_in_the_first(module, rows):
        if not entered.is_set():
            entered.set()
            # with a lock the second waits too, and this wait ends by its limit
            second_is_done.wait(0.5)

    def call(number):
        found[number] = model(input_ids=ids[number]).logits

    with apply_to_peft():
        experts.register_forward_pre_hook(wait_in_the_first)
        first = threading.Thread(target=call, args=(0,))
        first.start()
        assert entered.wait(60)
        call(1)
        second_is_done.set()
        first.join()
    assert len(computed) == 4
    for number in (0, 1):
        assert_close(found[number], right[number], TOLERANCE)


def test_experts_whose_implementation_is_named_too(computed, caplog):
    """`set_experts_implementation("moe_lora")` alone would read weights without PEFT's updates."""
    frozen._warn.cache_clear()
    model = peft_model()
    right, gradients = grads_of(lambda: outputs(model), pairs(model))
    model.base_model.model.set_experts_implementation("moe_lora")
    for _ in range(2):
        found = grads_of(lambda: outputs(model), pairs(model))
    assert_close(found[0], right, TOLERANCE)
    for gradient, expected in zip(found[1], gradients, strict=True):
        assert_close(gradient, expected, TOLERANCE)
    assert not computed
    (line,) = (r for r in caplog.records if r.name == "peft_moe_lora.layers.frozen")
    assert "Call peft_moe_lora.apply_to_peft()" in line.getMessage()
    with apply_to_peft():
        assert_close(outputs(model), right, TOLERANCE)
    assert len(computed) == 2
    with model.disable_adapter():
        assert_close(outputs(model), outputs(tiny_model()), TOLERANCE)
