"""With `apply_to_peft`, PEFT's adapters on experts give PEFT's numbers, through our kernels."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers.trainer_utils import set_seed

from helpers import (
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    experts_paths,
    fill_adapter,
    grads_of,
    outputs,
    relative_error,
    tiny_families,
    tiny_model,
    token_ids,
    train,
)
from interop.models import (
    FAMILIES,
    copy_pairs,
    lora_config,
    pairs,
    peft_model,
    stacks_of,
    with_peft_lora,
    wrapped,
)
from peft_moe_lora import apply_to_peft, dequantize_experts, quantize_experts
from peft_moe_lora.experts.stored import stored_weight
from peft_moe_lora.interop.wrappers import rank_to_expert_major

# fp32, two layers, two orders of summation
TOLERANCE = 1e-5

every_family = pytest.mark.parametrize("family", FAMILIES)


def assert_same_numbers(model, computed):
    """Outputs and all gradients are PEFT's own, and this package computed every experts module."""
    inputs = list(adapter_parameters(model).values())
    own, own_gradients = grads_of(lambda: outputs(model), inputs)
    assert not computed
    with model.disable_adapter():
        assert_share_of_order_one(own, outputs(model).detach())
    with apply_to_peft():
        ours, gradients = grads_of(lambda: outputs(model), inputs)
    assert len(computed) == len(experts_paths(model))
    assert_close(ours, own, TOLERANCE, "logits")
    for name, right, found in zip(adapter_parameters(model), own_gradients, gradients, strict=True):
        assert right.abs().max() > 0, name
        assert_close(found, right, TOLERANCE, f"d {name}")


@pytest.mark.parametrize("family", tiny_families())
def test_outputs_and_gradients_are_pefts(family, computed):
    assert_same_numbers(peft_model(family), computed)


@every_family
@pytest.mark.parametrize("which", [0, 1], ids=["up", "down"])
def test_one_projection_alone(family, which, computed):
    base = tiny_model(family)
    only = [stacks_of(base)[which]]
    assert_same_numbers(with_peft_lora(base, only), computed)


def test_the_gradient_of_what_lies_before_the_experts_is_pefts(computed):
    base = tiny_model()
    model = with_peft_lora(base, target_modules=["q_proj", "gate"])
    assert_same_numbers(model, computed)


def test_rslora(computed):
    assert_same_numbers(peft_model(use_rslora=True, lora_alpha=3), computed)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
def test_ranks_and_alphas_by_pattern(computed):
    model = peft_model(
        rank_pattern={"layers.0.*down_proj": 2}, alpha_pattern={"layers.0.*gate_up_proj": 5}
    )
    found = wrapped(model).values()
    assert {wrapper.r["default"] for wrapper in found} == {2, R}
    assert len({wrapper.scaling["default"] for wrapper in found}) > 1
    assert_same_numbers(model, computed)


def test_several_active_adapters_add_up(computed):
    model = peft_model()
    model.add_adapter("second", lora_config(model.base_model.model, r=2, lora_alpha=7))
    fill_adapter(model, "second", seed=9)
    model.base_model.set_adapter(["default", "second"])
    both = {**adapter_parameters(model), **adapter_parameters(model, "second")}
    inputs = list(both.values())
    own, own_gradients = grads_of(lambda: outputs(model), inputs)
    with apply_to_peft():
        ours, gradients = grads_of(lambda: outputs(model), inputs)
    assert len(computed) == 2
    assert_close(ours, own, TOLERANCE, "logits")
    for name, right, found in zip(both, own_gradients, gradients, strict=True):
        assert_close(found, right, TOLERANCE, f"d {name}")


def test_the_adapter_that_is_active_is_the_one_computed(computed):
    model = peft_model()
    model.add_adapter("second", lora_config(model.base_model.model, r=2))
    fill_adapter(model, "second", seed=9)
    first = outputs(model)
    model.set_adapter("second")
    second = outputs(model)
    assert relative_error(first, second) > 0.1
    apply_to_peft()
    assert_close(outputs(model), second, TOLERANCE)
    model.set_adapter("default")
    assert_close(outputs(model), first, TOLERANCE)
    assert len(computed) == 4


@every_family
def test_three_steps_of_training_are_pefts(family, computed):
    # fp64, because AdamW divides gradients by their own size, rounding errors too
    base = tiny_model(family, torch.float64)
    base.set_experts_implementation("eager")
    own = with_peft_lora(base)
    ours = copy.deepcopy(own)
    losses = steps(own)
    assert not computed
    with apply_to_peft():
        found = steps(ours)
    assert len(computed) == 3 * len(experts_paths(base))
    assert_close(torch.tensor(found), torch.tensor(losses), TOLERANCE, "losses")
    assert losses[0] - losses[-1] > 1e-3
    after = adapter_parameters(own)
    for name, parameter in adapter_parameters(ours).items():
        assert_close(parameter, after[name], TOLERANCE, name)


@pytest.mark.parametrize("family", [*FAMILIES, "olmoe"])
def test_ten_steps_from_a_new_adapter_have_pefts_losses_and_files(family, computed, tmp_path):
    losses = train_and_save(family, tmp_path / "own")
    assert not computed
    with apply_to_peft():
        found = train_and_save(family, tmp_path / "ours")
    assert computed
    assert losses[-1] < 0.7 * losses[0]
    assert_close(torch.tensor(found), torch.tensor(losses), 1e-6, "losses")
    for stage in ("new", "trained"):
        assert_same_bytes(tmp_path, f"{stage}/adapter_config.json")
    weights = "adapter_model.safetensors"
    assert_same_bytes(tmp_path, f"new/{weights}")
    right = load_file(tmp_path / "own" / "trained" / weights)
    trained = load_file(tmp_path / "ours" / "trained" / weights)
    assert trained.keys() == right.keys()
    for name, tensor in right.items():
        # not by the largest element: AdamW divides by the gradient's own size, so an element whose
        # gradient is near zero moves by its rounding error
        error = (trained[name] - tensor).norm() / tensor.norm()
        assert error < TOLERANCE, f"{name}: {error:.1e}"


def train_and_save(family, folder):
    """The losses of ten steps of AdamW; the adapter is saved before and after them."""
    set_seed(3)
    model = with_peft_lora(tiny_model(family), randomize=False).train()
    model.save_pretrained(folder / "new")
    losses = train(model, token_ids(), steps=10)
    model.save_pretrained(folder / "trained")
    return losses


def assert_same_bytes(folder, path):
    assert (folder / "own" / path).read_bytes() == (folder / "ours" / path).read_bytes(), path


def steps(model):
    """The losses of three steps of AdamW."""
    model.train()
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, computed):
    model = peft_model().train()
    inputs = list(adapter_parameters(model).values())
    _, own = grads_of(lambda: outputs(model), inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with apply_to_peft():
        outputs(model)
        direction = torch.randn(outputs(model).shape, generator=torch.Generator().manual_seed(3))
        computed.clear()
        outputs(model).backward(direction)
    # forward, and forward again in backward
    assert len(computed) == 4
    for parameter, right in zip(inputs, own, strict=True):
        assert_close(parameter.grad, right, TOLERANCE)


@every_family
def test_files_are_pefts_byte_for_byte(family, tmp_path, computed):
    def saved(folder):
        set_seed(3)
        base = tiny_model(family)
        model = with_peft_lora(base, randomize=False)
        outputs(model)
        model.save_pretrained(tmp_path / folder / "initial")
        fill_adapter(model)
        model.save_pretrained(tmp_path / folder / "filled")
        return outputs(model).detach()

    right = saved("own")
    with apply_to_peft():
        found = saved("ours")
        loaded = PeftModel.from_pretrained(tiny_model(family), tmp_path / "own" / "filled")
        again = outputs(loaded).detach()
    assert computed
    assert_close(found, right, TOLERANCE)
    assert_close(again, right, TOLERANCE)
    files = sorted(p.relative_to(tmp_path / "own") for p in (tmp_path / "own").rglob("*.*"))
    names = [path.name for path in files]
    assert names.count("adapter_model.safetensors") == names.count("adapter_config.json") == 2
    for path in files:
        assert (tmp_path / "own" / path).read_bytes() == (tmp_path / "ours" / path).read_bytes()


@every_family
def test_merging_and_disabling_are_pefts(family, computed):
    model = peft_model(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def numbers():
        found = []
        with torch.no_grad(), model.disable_adapter():
            found.append(outputs(model))
        model.merge_adapter()
        found += [outputs(model).detach(), *model.state_dict().values()]
        found = [tensor.clone() for tensor in found]
        model.unmerge_adapter()
        for name, tensor in model.state_dict().items():
            found.append(tensor.clone())
            tensor.copy_(state[name])
        return found

    own = numbers()
    with apply_to_peft():
        ours = numbers()
        assert not computed
        outputs(model)
        assert computed
    assert all(torch.equal(a, b) for a, b in zip(ours, own, strict=True))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_quantized_experts(family, computed, caplog):
    base = tiny_model(family)
    quantize_experts(base, format="int8")
    decoded = copy.deepcopy(base)
    dequantize_experts(decoded)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = with_peft_lora(base)
    # PEFT's own code loses updates of quantized weights, so the decoded ones are compared
    own = with_peft_lora(decoded)
    # PEFT nests the wrappers of quantized weights in another order
    copy_pairs(own, model)

    def numbers(model):
        return grads_of(lambda: outputs(model), pairs(model))

    logits, gradients = numbers(own)
    with apply_to_peft():
        ours, our_gradients = numbers(model)
        numbers(model)
    assert len(computed) == 2 * len(experts_paths(base))
    assert not caplog.records
    assert_close(ours, logits, TOLERANCE)
    for found, right in zip(our_gradients, gradients, strict=True):
        assert_close(found, right, TOLERANCE)
    with model.disable_adapter():
        assert_share_of_order_one(ours, outputs(model).detach())
    after = {key.replace(".base_layer", ""): t for key, t in model.state_dict().items()}
    for name, tensor in before.items():
        assert torch.equal(after[f"base_model.model.{name}"], tensor)


def test_experts_that_bitsandbytes_quantized(computed):
    quantization = pytest.importorskip(
        "bitsandbytes.nn.parametrize", reason="the extra [bitsandbytes] is not installed"
    )
    base = tiny_model(num_hidden_layers=1)
    decoded = copy.deepcopy(base)
    (path,) = experts_paths(base)
    experts = base.get_submodule(path)
    for name in stacks_of(decoded):
        quantization.replace_parameter_4bit(experts, name, quant_type="nf4")
        weight = stored_weight(experts, name).dense()
        decoded.get_submodule(path).get_parameter(name).data.copy_(weight)
    model = with_peft_lora(base)
    own = with_peft_lora(decoded)
    copy_pairs(own, model)
    right, gradients = grads_of(lambda: outputs(own), pairs(own))
    with apply_to_peft():
        ours, our_gradients = grads_of(lambda: outputs(model), pairs(model))
    assert len(computed) == 1
    assert_close(ours, right, TOLERANCE)
    for found, expected in zip(our_gradients, gradients, strict=True):
        assert_close(found, expected, TOLERANCE)


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization")
def test_what_peft_left_in_quantized_weights_is_said(computed, caplog):
    base = tiny_model()
    quantize_experts(base, format="int8")
    model = with_peft_lora(base)
    with torch.no_grad():
        outputs(model)
        with apply_to_peft():
            outputs(model)
            outputs(model)
    assert not computed
    (line,) = caplog.records
    assert "left its update in the quantized" in line.getMessage()


def test_hooks_of_the_experts_module_run(computed):
    model = peft_model()
    seen = []
    experts = model.base_model.model.get_submodule("model.layers.0.mlp.experts").get_base_layer()
    experts.register_forward_hook(lambda module, args, out: seen.append((module, out.shape)))
    with apply_to_peft():
        outputs(model)
    assert computed
    assert [module for module, _ in seen] == [experts]


def test_bf16_is_no_further_from_fp32_than_pefts(computed):
    exact = outputs(peft_model())
    model = with_peft_lora(tiny_model(dtype=torch.bfloat16))
    own = outputs(model)
    with apply_to_peft():
        ours = outputs(model)
    assert computed
    assert ours.dtype == own.dtype
    assert relative_error(ours, exact) < 1.2 * relative_error(own, exact)


def test_autocast(computed):
    model = peft_model()
    right = outputs(model)
    with apply_to_peft(), torch.autocast("cpu", torch.bfloat16):
        ours = outputs(model)
    assert computed
    assert_close(ours, right, 0.05)


def test_the_order_of_b():
    # N=1, r=2, E=3: entry 10 * e + j is column j of expert e
    rank_major = torch.tensor([[0.0, 10, 20, 1, 11, 21]])
    assert rank_to_expert_major(rank_major, 3).flatten(1).tolist() == [[0, 1, 10, 11, 20, 21]]


def test_copies_made_meanwhile_are_pefts(computed):
    model = peft_model()
    right = outputs(model)
    with apply_to_peft():
        outputs(model)
        copied = copy.deepcopy(model)
        assert_close(outputs(copied), right, TOLERANCE)
    computed.clear()
    assert_close(outputs(copied), right, TOLERANCE)
    assert not computed
    assert get_peft_model(tiny_model(), lora_config(tiny_model()))
