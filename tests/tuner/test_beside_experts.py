"""Whole models with LoRA on everything: experts, routers, attention, shared experts, latents.

The oracle is the same model in plain PyTorch, run by transformers' own eager experts, with
W + scaling * B A for the weight of every target, experts and routers included.
"""

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from torch import nn
from torch.func import functional_call

from helpers import (
    BF16,
    FP32,
    ROUTED_FAMILIES,
    SAME,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    base_weight,
    dense_deltas,
    experts_adapter,
    experts_paths,
    fill_adapter,
    interface_families,
    moe_lora,
    outputs,
    tiny_model,
    token_ids,
)
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.layers.layer import MoELoraLayer
from peft_moe_lora.layers.router import MoELoraRouter

# routers with softmax and sigmoid, with groups, with a bias, and a linear layer with its own
# forward; shared experts, gates on them, latent projections, linear attention, MLA
WANTED = [
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "nemotron_h",
    "glm4_moe",
    "qwen2_moe",
    "qwen3_next",
    "qwen3_5_moe",
    "phimoe",
    "muse_spark",
    "aria",
]
INSTALLED = {family for family, _ in interface_families()}
FAMILIES = [family for family in WANTED if family in INSTALLED]
every_family = pytest.mark.parametrize("family", FAMILIES)
SCALING = 2.0

# gradients pass two layers of attention and experts: sums of sums of FP32's
GRADIENTS = 1e-4


def router_paths(model):
    """Modules beside experts that hold a [E, H] weight."""
    found = []
    for path in experts_paths(model):
        parent = path.rpartition(".")[0]
        for name, child in model.get_submodule(parent).named_children():
            weight = getattr(child, "weight", None)
            if weight is not None and weight.ndim == 2 and "outer" in type(child).__name__:
                found.append(f"{parent}.{name}")
    return found


def linear_paths(model):
    return [name for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"]


def last(paths):
    return sorted({path.rpartition(".")[2] for path in paths})


def everything(base):
    """target_modules: the names of the experts, the routers and every linear layer but the head."""
    return [*last(experts_paths(base)), *last(router_paths(base)), *last(linear_paths(base))]


def with_everything(base, **config):
    return moe_lora(
        base, target_modules=everything(base), **{"r": R, "lora_alpha": SCALING * R, **config}
    )


def pair(model, path):
    """A and B of a linear layer or a router, by the documented parameter names."""
    named = dict(model.named_parameters())
    return tuple(named[f"base_model.model.{path}.lora_{side}.default.weight"] for side in "AB")


def updated_experts(base, model):
    """Parameter name -> W + scaling * B A of every expert, differentiable in `model`'s A and B."""
    weights = {}
    for path in experts_paths(base):
        experts = base.get_submodule(path)
        deltas = dense_deltas(experts_adapter(model, path), experts.down_proj.shape[0], SCALING)
        names = {
            "gate_up": "gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj",
            "down": "down_proj",
        }
        for projection, delta in deltas.items():
            weight = base_weight(experts, projection) + delta
            transposed = getattr(experts, "is_transposed", False)
            weights[f"{path}.{names[projection]}"] = weight.mT if transposed else weight
    return weights


def updated_layers(base, model):
    """The same for every router and linear layer."""
    weights = {}
    for path in (*router_paths(base), *linear_paths(base)):
        A, B = pair(model, path)
        weights[f"{path}.weight"] = base.get_submodule(path).weight + SCALING * B @ A
    return weights


def plain_outputs(base, weights):
    base.set_experts_implementation("eager")
    out = functional_call(base, weights, kwargs={"input_ids": token_ids(), "use_cache": False})
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def gradients(out, parameters):
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out)
    return dict(
        zip(parameters, torch.autograd.grad(out, list(parameters.values()), direction), strict=True)
    )


@every_family
def test_everything_adapted_is_every_weight_plus_its_update(family):
    base = tiny_model(family)
    model = with_everything(copy.deepcopy(base))
    assert router_paths(base), "the family is here for its router"
    parameters = adapter_parameters(model)
    number = 2 * (len(linear_paths(base)) + len(router_paths(base)) + 2 * len(experts_paths(base)))
    assert len(parameters) == number
    actual, right = (
        outputs(model),
        plain_outputs(base, updated_experts(base, model) | updated_layers(base, model)),
    )
    assert_share_of_order_one(actual, outputs(base))
    assert_close(actual, right, FP32)
    expected = gradients(right, parameters)
    for name, grad in gradients(actual, parameters).items():
        assert expected[name].abs().max() > 0, f"{name} does not matter"
        assert_close(grad, expected[name], GRADIENTS, name)


@every_family
def test_bf16_activations_meet_fp32_adapters_everywhere(family):
    base = tiny_model(family, torch.bfloat16)
    # transformers' grouped products in bf16 need widths that are multiples of eight
    base.set_experts_implementation("eager")
    dtype = outputs(base).dtype
    model = with_everything(base)
    parameters = adapter_parameters(model)
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    out = outputs(model)
    assert out.dtype == dtype
    for name, grad in gradients(out, parameters).items():
        assert grad.dtype == torch.float32
        assert torch.isfinite(grad).all(), name
        assert grad.abs().max() > 0, name


@every_family
def test_everything_is_saved_loaded_and_merged(family, tmp_path):
    base = tiny_model(family)
    model = with_everything(copy.deepcopy(base))
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(outputs(loaded), expected)
    model.merge_adapter()
    assert_close(outputs(model), expected)
    model.unmerge_adapter()
    assert_close(outputs(model), expected)
    whole = model.merge_and_unload()
    assert_close(outputs(whole), expected)
    assert {n: type(m) for n, m in whole.named_modules()} == {
        n: type(m) for n, m in base.named_modules()
    }
    assert torch.equal(outputs(loaded.unload()), outputs(base))


# ---- the router's gradient -----------------------------------------------------------------------


@every_family
def test_a_routers_gradient_through_the_routing_weights(family):
    """A router trains beside adapted experts: its gradient is that with merged experts."""
    base = tiny_model(family)
    model = moe_lora(
        copy.deepcopy(base), target_modules=last(experts_paths(base)), lora_alpha=SCALING * R
    )
    names = [f"{path}.weight" for path in router_paths(base)]
    routers = {
        n: p.requires_grad_() for n, p in model.base_model.model.named_parameters() if n in names
    }
    leaves = {n: base.get_parameter(n).detach().clone().requires_grad_() for n in names}
    expected = gradients(plain_outputs(base, updated_experts(base, model) | leaves), leaves)
    for name, grad in gradients(outputs(model), routers).items():
        assert expected[name].abs().max() > 0
        assert_close(grad, expected[name], GRADIENTS, name)


def test_the_load_balancing_loss_reaches_the_routers_adapter():
    """The router logits that transformers returns contain the low-rank term."""
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), target_modules=["experts", "gate"])
    out = model(input_ids=token_ids(), output_router_logits=True, use_cache=False)
    merged = copy.deepcopy(model).merge_and_unload()
    right = merged(input_ids=token_ids(), output_router_logits=True, use_cache=False)
    for got, wanted in zip(out.router_logits, right.router_logits, strict=True):
        assert_close(got, wanted)
    assert_close(out.aux_loss, right.aux_loss)
    routers = {n: p for n, p in adapter_parameters(model).items() if ".gate." in n}
    for grad in torch.autograd.grad(out.aux_loss, list(routers.values())):
        assert grad.abs().max() > 0


# ---- how models are trained ----------------------------------------------------------------------

ROUTED = {
    "qwen3_moe": ["experts", "gate", "q_proj", "o_proj"],
    "deepseek_v3": ["experts", "gate", "down_proj"],
    "gpt_oss": ["experts", "router", "v_proj"],
}
routed_families = pytest.mark.parametrize("family", ROUTED)


def loss_and_grads(model, **autocast):
    model.zero_grad()
    ids = token_ids()
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in adapter_parameters(model).items()}


@routed_families
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_routes_the_same_again(family, reentrant):
    """The routing computed again must be the one that was used, dropout before A included."""
    model = moe_lora(tiny_model(family), target_modules=ROUTED[family], lora_dropout=0.2).train()
    torch.manual_seed(3)
    loss, expected = loss_and_grads(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(3)
    again, actual = loss_and_grads(model)
    assert_close(again, loss, SAME)
    for name, grad in actual.items():
        assert_close(grad, expected[name], FP32, name)


@routed_families
def test_autocast_trains_everything(family):
    model = moe_lora(tiny_model(family), target_modules=ROUTED[family]).train()
    exact, _ = loss_and_grads(model)
    loss, grads = loss_and_grads(model, autocast=True)
    assert_close(loss, exact, BF16)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert grad.abs().max() > 0, name


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_compiling_breaks_no_more_graphs_than_without(family):
    base = tiny_model(family)
    model = moe_lora(copy.deepcopy(base), target_modules=ROUTED[family])

    def graph_breaks(model):
        torch.compiler.reset()
        return torch._dynamo.explain(model)(
            input_ids=token_ids(), use_cache=False
        ).graph_break_count

    assert graph_breaks(model.base_model.model) <= graph_breaks(base)


@routed_families
@pytest.mark.parametrize("first", ["offloaded", "adapted"])
def test_cpu_offload_of_routers(family, first, tmp_path):
    base = tiny_model(family)
    targets = ["experts", *last(router_paths(base))]
    model = moe_lora(copy.deepcopy(base), target_modules=targets)
    expected, expected_grads = loss_and_grads(model)
    plain = outputs(base)
    if first == "adapted":
        offloaded = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
        router = offloaded.get_submodule(f"base_model.model.{router_paths(base)[0]}")
        assert router.base_layer.weight.is_meta, "nothing is offloaded: the test proves nothing"
    else:
        offloaded = moe_lora(cpu_offload(base, torch.device("cpu")), target_modules=targets)
        loss, grads = loss_and_grads(offloaded)
        assert_close(loss, expected, SAME)
        for name, grad in grads.items():
            assert_close(grad, expected_grads[name], FP32, name)
    assert_close(outputs(offloaded), outputs(model), SAME)
    with offloaded.disable_adapter():
        assert_close(outputs(offloaded), plain, SAME)


# ---- whole routers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "router"), [("qwen3_moe", "gate"), ("gpt_oss", "router"), ("deepseek_v3", "gate")]
)
def test_whole_routers_train_are_saved_loaded_and_merged(family, router, tmp_path):
    base = tiny_model(family)
    model = moe_lora(copy.deepcopy(base), modules_to_save=[router], lora_alpha=SCALING * R)
    saved = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
    assert len(saved) == sum(
        len(list(base.get_submodule(path).parameters())) for path in router_paths(base)
    )
    plain = {
        n.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): p
        for n, p in saved.items()
    }
    expected = gradients(plain_outputs(base, updated_experts(base, model) | plain), plain)
    before = outputs(model)
    for (name, grad), wanted in zip(
        gradients(before, saved).items(), expected.values(), strict=True
    ):
        assert wanted.abs().max() > 0
        assert_close(grad, wanted, GRADIENTS, name)
        with torch.no_grad():
            saved[name].sub_(grad / grad.abs().max())
    trained = outputs(model)
    assert_share_of_order_one(trained, before, low=0.05)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(outputs(loaded), trained)
    with loaded.disable_adapter():
        assert_close(outputs(loaded), outputs(base))
    assert f"{len(router_paths(base))} modules saved whole" in loaded.base_model.summary()
    assert_close(outputs(loaded.merge_and_unload()), trained)


# ---- what a name means ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "targets", "said"),
    [
        (
            "qwen3_moe",
            ["experts", "gate"],
            "2 experts modules, 10 experts, 20 projections adapted; 2 routers: 2 mlp.gate",
        ),
        # a name matches whole names only, not the gate on the shared expert
        ("qwen2_moe", ["gate"], "0 projections adapted; 2 routers: 2 mlp.gate"),
        (
            "qwen2_moe",
            ["shared_expert_gate"],
            "0 projections adapted; 2 other layers: 2 mlp.shared_expert_gate",
        ),
        # dense layers and shared experts, never the experts' own parameters
        (
            "deepseek_v3",
            ["down_proj"],
            "2 other layers: 1 mlp.down_proj, 1 shared_experts.down_proj",
        ),
        (
            "nemotron_h",
            ["fc1_latent_proj", "experts"],
            "20 projections adapted; 2 other layers: 2 mixer.fc1_latent_proj",
        ),
        ("gemma4", ["experts", "proj"], "2 other layers: 2 router.proj"),
        (
            "phimoe",
            ["router", "q_proj"],
            "2 routers: 2 mlp.router; 2 other layers: 2 self_attn.q_proj",
        ),
    ],
)
def test_the_summary_says_what_a_name_meant(family, targets, said):
    model = moe_lora(tiny_model(family), target_modules=targets)
    assert model.base_model.summary().endswith(said)
    layers = [m for m in model.modules() if isinstance(m, MoELoraLayer)]
    assert bool(layers) == ("experts" in targets)


@pytest.mark.parametrize(
    ("settings", "adapted"),
    [
        ({"target_modules": ["experts", "gate"], "layers_to_transform": [1]}, [False, True]),
        (
            {
                "target_modules": r".*\.mlp\.(experts|gate)",
                "exclude_modules": ["layers.1.mlp.gate"],
            },
            [True, False],
        ),
    ],
)
def test_layers_and_exclusions_reach_routers(settings, adapted):
    layers = moe_lora(tiny_model(), **settings).base_model.model.model.layers
    assert [isinstance(layer.mlp.gate, MoELoraRouter) for layer in layers] == adapted


def test_projections_of_stacked_experts_are_no_modules():
    """If all layers have experts, no layer is called gate_proj: an error, not an empty adapter."""
    with pytest.raises(ValueError, match="gate_proj"):
        get_peft_model(tiny_model(), MoELoraConfig(target_modules=["experts", "gate_proj"]))


def test_one_batch_has_one_adapter():
    model = moe_lora(tiny_model(), target_modules=["gate"])
    fill_adapter(model)
    with pytest.raises(ValueError, match="adapter_names"):
        model(input_ids=token_ids(), adapter_names=["default"] * 2)


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_family
def test_everything_adapted_on_a_gpu(family):
    """The kernels between routers and attention: fp32 as on the CPU, bf16 without a dtype error."""
    model = with_everything(tiny_model(family))
    expected, parameters = outputs(model), adapter_parameters(model)
    expected_grads = gradients(expected, parameters)
    model.cuda()
    on_gpu = outputs(model, token_ids().cuda())
    # the same sums in another order, through two layers
    assert_close(on_gpu.cpu(), expected, GRADIENTS)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7)).cuda()
    parameters = adapter_parameters(model)
    for name, grad in zip(
        parameters, torch.autograd.grad(on_gpu, list(parameters.values()), direction), strict=True
    ):
        assert_close(grad.cpu(), expected_grads[name], 1e-3, name)
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    model.base_model.model.set_experts_implementation("eager")
    outputs(model, token_ids().cuda()).float().square().mean().backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.gpu
@pytest.mark.parametrize("family", ROUTED_FAMILIES)
def test_everything_compiles_on_a_gpu(family):
    model = with_everything(tiny_model(family)).cuda()
    ids, parameters = token_ids().cuda(), adapter_parameters(model)
    expected = outputs(model, ids)
    grads = torch.autograd.grad(expected.square().mean(), list(parameters.values()))
    torch.compiler.reset()
    compiled = outputs(torch.compile(model), ids)
    assert_close(compiled, expected, 1e-3)
    for name, grad, wanted in zip(
        parameters,
        torch.autograd.grad(compiled.square().mean(), list(parameters.values())),
        grads,
        strict=True,
    ):
        assert_close(grad, wanted, 1e-2, name)
