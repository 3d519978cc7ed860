"""PEFT's helpers act on experts and routers as on linear layers, or are refused by name."""

import copy
import sys

import pytest
import torch
import torch.nn.parallel.replicate
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from peft.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

from families.off_interface import BUILD as OFF_INTERFACE
from families.off_interface import leaves
from helpers import (
    BF16,
    FP32,
    R,
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
    wrap,
)
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.layers import replaced
from peft_moe_lora.layers.layer import MoELoraLayer

EVERYWHERE = ["experts", "gate", "q_proj"]
# gated; transposed, with biases; with routers that group the experts
FAMILIES = ["qwen3_moe", "gpt_oss", "deepseek_v3"]


def adapted(family="qwen3_moe", **settings):
    """A model with random A and B on experts, routers and attention."""
    targets = ["experts", "router" if family == "gpt_oss" else "gate", "q_proj"]
    if family == "deepseek_v3":
        targets[-1] = "o_proj"
    return moe_lora(tiny_model(family), **{"target_modules": targets, **settings})


def tuner_layers(model):
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def with_alpha(factor, family="qwen3_moe", **settings):
    """The model of `adapted` with `factor` times its lora_alpha."""
    return adapted(family, lora_alpha=factor * 2 * R, **settings)


# ---- scaling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_rescaled_adapter_is_one_of_another_alpha(family, use_rslora):
    model = adapted(family, use_rslora=use_rslora)
    before = outputs(model)
    with rescale_adapter_scale(model, 0.25):
        expected = outputs(with_alpha(0.25, family, use_rslora=use_rslora))
        assert_close(outputs(model), expected, FP32)
        assert_share_of_order_one(before, expected)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("targets", [["experts"], ["gate"], EVERYWHERE], ids=str)
def test_a_multiplier_of_zero_is_the_base_model(targets):
    model = moe_lora(tiny_model(), target_modules=targets)
    with rescale_adapter_scale(model, 0.0):
        assert_close(outputs(model), outputs(tiny_model()), FP32)


def test_the_scaling_comes_back_after_an_exception():
    model = adapted()
    before = outputs(model)
    with pytest.raises(RuntimeError, match="within"), rescale_adapter_scale(model, 0.5):
        raise RuntimeError("within")
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_a_layer_is_as_on_linear_layers(use_rslora):
    model = adapted(use_rslora=use_rslora)
    before = outputs(model)
    layers = tuner_layers(model)

    def assert_factor(factor):
        expected = outputs(with_alpha(factor, use_rslora=use_rslora))
        assert_close(outputs(model), expected, FP32)

    for layer in layers:
        layer.set_scale("default", 0.5)
        layer.set_scale("another", 7.0)
    assert_factor(0.5)
    for layer in layers:
        # relative to the configuration, not to the current scaling
        layer.set_scale("default", 3.0)
    assert_factor(3.0)
    for layer in layers:
        layer.scale_layer(0.5)
    assert_factor(1.5)
    for layer in layers:
        layer.unscale_layer(3.0)
    assert_factor(0.5)
    for layer in layers:
        layer.unscale_layer()
    assert torch.equal(outputs(model), before)
    assert {tuple(layer.scaling) for layer in layers} == {("default",)}


def test_scaling_touches_active_adapters_alone():
    model = adapted()
    model.add_adapter("second", copy.copy(model.peft_config["default"]))
    for layer in tuner_layers(model):
        initial = layer.scaling["second"]
        layer.scale_layer(0.5)
        assert layer.scaling["default"] == initial / 2
        assert layer.scaling["second"] == initial
    model.delete_adapter("second")
    assert all(list(layer.use_rslora) == ["default"] for layer in tuner_layers(model))


def test_a_merged_adapter_carries_its_scale():
    model = adapted()
    for layer in tuner_layers(model):
        layer.set_scale("default", 0.5)
    assert_close(outputs(model.merge_and_unload()), outputs(with_alpha(0.5)), FP32)


def test_unmerging_takes_out_what_was_merged_whatever_the_scale_is_now():
    model = moe_lora(tiny_model())
    model.merge_adapter()
    for layer in tuner_layers(model):
        layer.set_scale("default", 0.5)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_close(outputs(model), outputs(tiny_model()), FP32)
    expected = moe_lora(tiny_model(), lora_alpha=R)
    assert_close(outputs(model), outputs(expected), FP32)
    model.merge_adapter()
    assert_close(outputs(model), outputs(expected), FP32)
    with rescale_adapter_scale(model, 0.0):
        model.unmerge_adapter()
    assert_close(outputs(model), outputs(expected), FP32)


def test_scalings_that_became_tensors_give_the_same_numbers():
    """Before it compiles a model, PEFT can make tensors of all scalings."""
    model = adapted()
    before = outputs(model)
    prepare_model_for_compiled_hotswap(model)
    assert all(isinstance(layer.scaling["default"], torch.Tensor) for layer in tuner_layers(model))
    assert_close(outputs(model), before, FP32)


def test_experts_are_lora_layers_for_peft():
    layers = tuner_layers(adapted())
    assert len(layers) == 6
    assert all(isinstance(layer, LoraLayer) for layer in layers)


def test_input_casting_is_switched_off_and_on_again():
    """Experts and routers never cast their input, so the switch changes none of their numbers."""
    model = moe_lora(tiny_model(), target_modules=["experts", "gate"])
    before = outputs(model)
    with disable_input_dtype_casting(model):
        assert not any(layer.cast_input_dtype_enabled for layer in tuner_layers(model))
        assert torch.equal(outputs(model), before)
    assert all(layer.cast_input_dtype_enabled for layer in tuner_layers(model))
    half = moe_lora(tiny_model(dtype=torch.bfloat16), target_modules=["experts", "gate"])
    before = outputs(half)
    with disable_input_dtype_casting(half):
        assert_close(outputs(half), before, BF16)


# ---- optimizers that take A and B for one matrix -------------------------------------------------


def lora_fa(model):
    return create_lorafa_optimizer(model, r=R, lora_alpha=2 * R, lr=1e-3)


def riemannian(model):
    return create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)


def backward(model):
    model.train()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()


@pytest.mark.parametrize("create", [lora_fa, riemannian])
@pytest.mark.parametrize("projections", [["gate_up", "down"], ["down"]], ids=str)
@pytest.mark.parametrize("copied", [False, True])
def test_an_optimizer_of_one_matrix_makes_no_step(create, projections, copied):
    model = adapted(target_projections=projections)
    if copied:
        model = copy.deepcopy(model)
    optimizer = create(model)
    backward(model)
    before = snapshot(model)
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with pytest.raises(ValueError, match=r"experts, which stack .* torch\.optim\.AdamW"):
        optimizer.step()
    assert_unchanged(model, before)
    for name, gradient in gradients.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)
    # what the message advises
    model.set_adapter("default")
    assert all(p.requires_grad for p in adapter_parameters(model).values())


@pytest.mark.parametrize("create", [lora_fa, riemannian])
def test_they_still_step_on_linear_layers(create):
    experts_beside = adapted()
    model = get_peft_model(tiny_model(), LoraConfig(r=R, target_modules=["q_proj"]))
    fill_adapter(model)
    optimizer = create(model)
    backward(model)
    before = snapshot(model)["state"]
    optimizer.step()
    assert any(not torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert experts_beside is not model, "a model with adapted experts is alive all the time"


def test_lora_plus_gives_every_b_its_own_rate():
    """It tells A from B by name and treats every number alone, which is right for experts."""
    model = adapted()
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=4)
    backward(model)
    expected = {}
    for name, p in adapter_parameters(model).items():
        rate = 2.0 if "lora_B" in name else 0.5
        expected[name] = p.detach() - rate * p.grad
    optimizer.step()
    for name, p in adapter_parameters(model).items():
        assert_close(p, expected[name], FP32, name)


# ---- hotswapping ---------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [R, R - 1, R + 1])
def test_hotswapping_is_refused_with_a_way_that_works(r, tmp_path):
    other = adapted(r=r, lora_alpha=7)
    other.save_pretrained(tmp_path)
    model = adapted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"delete_adapter.*load_adapter.*set_adapter"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert_unchanged(model, before)
    # what the message advises
    model.delete_adapter("default")
    model.load_adapter(str(tmp_path), adapter_name="default")
    model.set_adapter("default")
    assert_close(outputs(model), outputs(other), FP32)


@pytest.mark.parametrize("r", [R, R - 1])
def test_hotswapping_from_a_state_dict_is_refused(r):
    """PEFT would copy a smaller adapter into the first rows of A, the first experts' ones."""
    model = adapted(target_modules=EVERYWHERE)
    other = adapted(target_modules=EVERYWHERE, r=r)
    state = {key: p.detach() for key, p in adapter_parameters(other).items()}
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"Call model.delete_adapter\(name\), model.load_adapter"):
        hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    assert_unchanged(model, before)


def test_hotswapping_linear_layers_still_works(tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        settings = {"r": R, "target_modules": ["q_proj"], "init_lora_weights": False}
        get_peft_model(tiny_model(), LoraConfig(**settings)).save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "one")
    hotswap_adapter(model, str(tmp_path / "two"), "default", torch_device="cpu")
    assert PeftConfig.from_pretrained(tmp_path / "two").peft_type == "LORA"
    expected = PeftModel.from_pretrained(tiny_model(), tmp_path / "two")
    assert_close(outputs(model), outputs(expected), FP32)


# ---- replicas of nn.DataParallel -----------------------------------------------------------------


@pytest.fixture
def replicas(monkeypatch):
    """What nn.DataParallel makes of a model for two devices, here with copies on the CPU."""
    module = sys.modules["torch.nn.parallel.replicate"]

    def copies(tensors, devices, detach=False):
        return [[t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    return lambda model: module.replicate(model, [0, 1])


def zero_b(replica):
    """Set the replica's own copies of B to zero; those are attributes, not parameters."""
    found = 0
    for name, module in replica.named_modules():
        if ".lora_B" in name:
            for value in vars(module).values():
                if torch.is_tensor(value):
                    value.detach().zero_()
                    found += 1
    assert found


@pytest.mark.engine("nn.DataParallel", "train", "works")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replica_runs_on_its_own_a_and_b(family, replicas):
    model = adapted(family)
    expected = outputs(model)
    first, second = replicas(model)
    with torch.no_grad():
        zero_b(second)
    assert_close(outputs(second), outputs(tiny_model(family)), FP32)
    assert_close(outputs(first), expected, FP32)
    assert_close(outputs(model), expected, FP32)


def test_replicas_have_the_activation_that_the_original_has_now(replicas, monkeypatch):
    model = adapted()
    reads = []
    read = replaced.with_activation
    monkeypatch.setattr(replaced, "with_activation", lambda *of: reads.append(of) or read(*of))
    for layer in (m for m in model.modules() if isinstance(m, MoELoraLayer)):
        layer.base_layer.act_fn = torch.nn.Softplus()
    expected = outputs(copy.deepcopy(model).merge_and_unload())
    for _ in range(2):
        for replica in replicas(model):
            assert_close(outputs(replica), expected, FP32)
    assert len(reads) == 2, "each of two layers reads once, and no replica does"


def test_gradients_of_replicas_add_up_in_the_original(replicas):
    model = adapted()
    ids = token_ids(batch=2)
    (2 * model(input_ids=ids, labels=ids).loss).backward()
    expected = {name: p.grad for name, p in adapter_parameters(model).items()}
    model.zero_grad()
    for i, replica in enumerate(replicas(model)):
        replica(input_ids=ids[i : i + 1], labels=ids[i : i + 1]).loss.backward()
    for name, p in adapter_parameters(model).items():
        assert_close(p.grad, expected[name], FP32, name)


@pytest.mark.parametrize("targets", [["experts"], ["gate"]], ids=str)
def test_a_replica_does_not_unmerge(targets, replicas):
    model = moe_lora(tiny_model(), target_modules=targets)
    model.merge_adapter()
    # as transformers' disable_adapters does, which does not call the tuner
    for layer in tuner_layers(model):
        layer.enable_adapters(False)
    _, second = replicas(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        outputs(second)
    with model.disable_adapter():
        _, second = replicas(model)
        assert_close(outputs(second), outputs(tiny_model()), FP32)


@pytest.mark.parametrize("family", OFF_INTERFACE)
def test_a_replica_off_the_interface_runs_on_its_own_a_and_b(family, replicas):
    plain = OFF_INTERFACE[family]()
    model = wrap(copy.deepcopy(plain))
    floats, call = leaves(family)
    expected = call(model, *floats)
    first, second = replicas(model)
    with torch.no_grad():
        zero_b(second)
    assert_close(call(second, *floats), call(plain, *floats), FP32)
    assert_close(call(first, *floats), expected, FP32)


# ---- several adapters in one batch ---------------------------------------------------------------


REFUSAL = r"adapter_names: experts and routers .* set_adapter"


def never_called(*args, **kwargs):
    raise AssertionError("a layer was called")


@pytest.mark.parametrize("names", [["default", "__base__"], ["__base__"] * 2, ["missing"] * 2])
@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("targets", [["experts"], ["gate"], EVERYWHERE], ids=str)
def test_several_adapters_in_one_batch_are_refused_at_once(call, targets, names):
    model = moe_lora(tiny_model(), target_modules=targets)
    for module in model.model.modules():
        module.forward = never_called
    run = {"forward": model, "generate": model.generate}[call]
    with pytest.raises(ValueError, match=REFUSAL):
        run(input_ids=token_ids(), adapter_names=names)
    model.train()
    with pytest.raises(ValueError, match=REFUSAL):
        run(input_ids=token_ids(), adapter_names=names)


def test_several_adapters_of_which_one_has_experts_are_refused_too():
    """The batch names the other one alone, but the experts would compute with their own."""
    model = moe_lora(tiny_model())
    model.add_adapter("linear", MoELoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=REFUSAL):
        model(input_ids=token_ids(), adapter_names=["linear", "__base__"])


def test_several_adapters_without_experts_are_as_in_peft():
    settings = {"r": R, "target_modules": ["q_proj", "v_proj"]}
    ours = get_peft_model(tiny_model(), MoELoraConfig(**settings)).eval()
    theirs = get_peft_model(tiny_model(), LoraConfig(**settings)).eval()
    for model in (ours, theirs):
        fill_adapter(model)
    names = {"adapter_names": ["default", "__base__"]}
    expected = theirs(input_ids=token_ids(), **names).logits
    assert_close(ours(input_ids=token_ids(), **names).logits, expected, FP32)


def test_converting_to_lora_is_refused_because_it_is_lora_already():
    model = moe_lora(tiny_model())
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*MoELoraLayer"):
        convert_to_lora(model, rank=2)
    assert_unchanged(model, before)
