"""A LoRA on every router class of transformers, against the same router with W + scaling * B A.

A router's forward goes from hidden states to experts, and a LoRA can only be added to its product.
So all that the router returns is compared, and every gradient through the routing weights.
"""

import copy
import functools
import importlib
import inspect
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedConfig

from helpers import BF16, FP32, MODELS, HandWrittenExperts, R, assert_close, modeling_module
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.experts.layout import is_experts
from peft_moe_lora.layers.router import MoELoraRouter, UnsupportedRouter

T, WIDTH, EXPERTS, TOP = 9, 16, 6, 2
SCALING = 2.0
# their models keep these routers' weights in fp32, whatever the dtype of the rest
KEPT_IN_FP32 = {"Inkling2TopKRouter", "Inkling2LoopTopKRouter"}


@functools.cache
def router_classes():
    """(family, class) of every router with an [E, H] weight, or linear with a forward."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(
            r"^class (\w*Router)\((nn\.\w+)\):.*?(?=^class |^def |^@|\Z)", text, re.M | re.S
        ):
            bare = re.search(
                r"self\.weight = nn\.Parameter\(torch\.\w+\([^,()]+, [^()]+\)\)", match[0]
            )
            if (bare and match[2] == "nn.Module") or match[2] == "nn.Linear":
                found.append((path.parent.name, match[1]))
    return found


def router_config(family, cls):
    """The family's own config with small sizes: the first class with all that the router reads."""
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    source = inspect.getsource(cls)
    read = set(re.findall(r"config\.(\w+)", source))
    small = {
        "hidden_size": WIDTH,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "n_routed_experts": EXPERTS,
        "moe_num_experts": EXPERTS,
        "num_experts_per_tok": TOP,
        "moe_topk": TOP,
        "moe_k": TOP,
        "top_k_experts": TOP,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 2,
        "vocab_size": 32,
    }
    # the class that the constructor asks for comes first
    asked = inspect.signature(cls.__init__).parameters["config"].annotation
    for candidate in sorted(vars(module).values(), key=lambda c: c is not asked):
        if inspect.isclass(candidate) and issubclass(candidate, PreTrainedConfig):
            config = candidate()
            # a model hands each layer's router the configuration of its layer
            config.allow_global_per_layer_attribute_access = True
            if all(hasattr(config, name) for name in read):
                for name in read & small.keys():
                    setattr(
                        config,
                        name,
                        [small[name]] * 2
                        if isinstance(getattr(config, name), list)
                        else small[name],
                    )
                return config
    raise AssertionError(f"no config class of {family} has all of {sorted(read)}")


class Block(nn.Module):
    """A router beside experts, as in models."""

    def __init__(self, router):
        super().__init__()
        self.gate, self.experts = router, HandWrittenExperts(WIDTH, 8, EXPERTS)

    def forward(self, *args, **kwargs):
        return self.gate(*args, **kwargs)


def build(family, name):
    cls = getattr(modeling_module(family), name)
    extra = {}
    parameters = list(inspect.signature(cls.__init__).parameters)[1:]
    if parameters != ["config"]:
        sizes = {
            "num_experts": EXPERTS,
            "hidden_dim": WIDTH,
            "hidden_size": WIDTH,
            "top_k": TOP,
            "layer_idx": 0,
        }
        extra = {p: sizes[p] for p in parameters[1:] if p in sizes}
    torch.manual_seed(0)
    router = cls(router_config(family, cls), **extra)
    with torch.no_grad():
        for tensor in (
            *router.parameters(),
            *(b for b in router.buffers() if b.is_floating_point()),
        ):
            tensor.copy_(torch.randn(tensor.shape) * (WIDTH**-0.5 if tensor.dim() > 1 else 0.1))
        for buffer in (b for b in router.buffers() if not b.is_floating_point()):
            buffer.copy_(torch.arange(buffer.numel()).view(buffer.shape) % EXPERTS)
    # eval mode draws no noise
    return router.eval()


def inputs(router, dtype=torch.float32):
    """Hidden states, and the other arguments of the router's forward."""
    bias = torch.linspace(-0.1, 0.1, EXPERTS)
    extra = {"e_score_correction_bias": bias, "expert_bias": bias, "input_ids": torch.arange(T)}
    asked = inspect.signature(type(router).forward).parameters
    x = (
        torch.randn(1, T, WIDTH)
        if "seq" in inspect.getsource(type(router).forward)
        else torch.randn(T, WIDTH)
    )
    return x.to(dtype).requires_grad_(), {name: extra[name] for name in asked if name in extra}


def adapted(router, **config):
    config = {"r": R, "lora_alpha": SCALING * R, "target_modules": ["gate"], **config}
    model = get_peft_model(Block(router), MoELoraConfig(**config))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter, std=WIDTH**-0.5 if "lora_A" in name else R**-0.5)
    return model.eval()


def factors(model, adapter_name="default"):
    layer = model.base_model.model.gate
    assert isinstance(layer, MoELoraRouter)
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


def grads(outputs, wanted):
    """Gradients of a fixed random weighting of all outputs that have a gradient."""
    generator = torch.Generator().manual_seed(5)
    loss = sum(
        (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
        for out in outputs
        if isinstance(out, torch.Tensor) and out.requires_grad
    )
    return torch.autograd.grad(loss, wanted)


def test_the_walk_finds_the_routers():
    found = set(router_classes())
    assert len(found) >= 50
    assert found >= {
        ("qwen3_moe", "Qwen3MoeTopKRouter"),
        ("gpt_oss", "GptOssTopKRouter"),
        ("phimoe", "PhimoeTopKRouter"),
        ("deepseek_v4", "DeepseekV4HashRouter"),
        ("llama4", "Llama4Router"),
    }


@pytest.mark.parametrize(("family", "name"), router_classes(), ids=lambda value: value)
class TestEveryRouter:
    def test_it_routes_as_the_weight_plus_the_update(self, family, name):
        router = build(family, name)
        x, extra = inputs(router)
        with torch.no_grad():
            before = router(x, **extra)
        model = adapted(copy.deepcopy(router))
        A, B = factors(model)
        actual = model(x, **extra)
        right = functional_call(router, {"weight": router.weight + SCALING * B @ A}, (x,), extra)
        assert not torch.allclose(right[0], before[0], atol=0.1), "the adapter does not matter"
        assert len(actual) == len(right)
        for i, (got, wanted) in enumerate(zip(actual, right, strict=True)):
            assert got.dtype == wanted.dtype
            if wanted.is_floating_point():
                finite = torch.isfinite(wanted)
                assert torch.equal(finite, torch.isfinite(got))
                assert_close(got[finite], wanted[finite], FP32, f"output {i}")
            else:
                assert torch.equal(got, wanted)
        for what, got, wanted in zip(
            "xAB", grads(actual, (x, A, B)), grads(right, (x, A, B)), strict=True
        ):
            assert wanted.abs().max() > 0
            assert_close(got, wanted, FP32, f"gradient of {what}")

    def test_bf16_activations_meet_fp32_adapters(self, family, name):
        router = build(family, name)
        x, extra = inputs(router, torch.bfloat16)
        if name not in KEPT_IN_FP32:
            router = router.bfloat16()
        model = adapted(copy.deepcopy(router))
        A, B = factors(model)
        assert A.dtype == B.dtype == torch.float32
        plain, actual = router(x, **extra), model(x, **extra)
        assert [out.dtype for out in actual] == [out.dtype for out in plain]
        for grad in grads(actual, (A, B)):
            assert grad.dtype == torch.float32
            assert grad.abs().max() > 0


# ---- what a router's forward may look like -------------------------------------------------------


class Handwritten(nn.Module):
    """A router that a user wrote; `product` says how it multiplies by its weight."""

    def __init__(self, product, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH).mul(WIDTH**-0.5).to(dtype))
        self.product = product

    def forward(self, hidden_states):
        logits = self.product(hidden_states, self.weight)
        weights, index = logits.softmax(dim=-1, dtype=torch.float32).topk(TOP)
        return logits, weights.to(logits.dtype), index


def linear(x, weight):
    return F.linear(x, weight)


def fp32_linear(x, weight):
    return F.linear(x.type(torch.float32), weight.type(torch.float32))


def linear_by_keyword(x, weight):
    return F.linear(x.float(), weight=weight.float())


def matrix_product(x, weight):
    return torch.mm(x, weight.t())


def operator(x, weight):
    return x @ weight.T


def no_product(x, weight):
    return -(x[:, None] - weight).square().sum(-1)


def normalized(x, weight):
    return F.linear(x, F.normalize(weight, dim=-1))


def two_products(x, weight):
    return F.linear(x, weight) + F.linear(x.flip(0), weight)


@pytest.mark.parametrize(
    "product", [linear, fp32_linear, linear_by_keyword, matrix_product, operator]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_product_is_in_the_dtype_of_the_first(product, dtype):
    model = adapted(Handwritten(product, dtype))
    (A, B), router, x = (
        factors(model),
        model.base_model.model.gate.base_layer,
        torch.randn(T, WIDTH).to(dtype),
    )
    first = product(x, router.weight)
    second = F.linear(F.linear(x.to(first.dtype), A.to(first.dtype)), B.to(first.dtype)) * SCALING
    assert second.dtype == first.dtype
    assert torch.equal(model(x)[0], first + second)


@pytest.mark.parametrize(
    ("product", "times"), [(no_product, 0), (normalized, 0), (two_products, 2)]
)
def test_a_router_without_one_product_is_an_error(product, times):
    model = adapted(Handwritten(product))
    with pytest.raises(
        UnsupportedRouter, match=f"Handwritten.forward multiplies by its weight {times} times"
    ):
        model(torch.randn(T, WIDTH))
    with model.disable_adapter():
        model(torch.randn(T, WIDTH))


def test_other_products_are_left_alone():
    """A second weight of the same shape, as in noisy routers, is cast and transposed too."""

    class Noisy(Handwritten):
        def __init__(self):
            super().__init__(linear)
            self.noise = nn.Parameter(torch.randn(EXPERTS, WIDTH))

        def forward(self, hidden_states):
            return F.linear(hidden_states, self.weight) + F.softplus(
                hidden_states @ self.noise.float().T
            )

    model, x = adapted(Noisy()), torch.randn(T, WIDTH)
    (A, B), router = factors(model), model.base_model.model.gate.base_layer
    right = F.linear(x, router.weight + SCALING * B @ A) + F.softplus(F.linear(x, router.noise))
    assert_close(model(x), right)


def test_a_linear_layer_that_is_only_read_is_an_error():
    """longcat_flash uses its classifier's weight without calling it: PEFT's LoRA does nothing."""
    cls = modeling_module("longcat_flash").LongcatFlashTopkRouter
    router = cls(router_config("longcat_flash", cls))
    for buffer in router.buffers():
        nn.init.zeros_(buffer)
    with pytest.raises(
        ValueError,
        match=r"LongcatFlashTopkRouter reads the weight of its classifier.*modules_to_save",
    ):
        get_peft_model(Block(copy.deepcopy(router)), MoELoraConfig(target_modules=["classifier"]))
    config = MoELoraConfig(target_modules=["experts"], modules_to_save=["classifier"])
    model = get_peft_model(Block(router), config)
    model(torch.randn(T, WIDTH))[0].square().mean().backward()
    assert (
        model.base_model.model.gate.classifier.modules_to_save.default.weight.grad.abs().max() > 0
    )


def test_shared_experts_in_stacks_are_no_routed_ones():
    """inkling stacks its shared experts too; these take no expert ids."""
    cls = modeling_module("inkling").InklingSharedExperts
    config = router_config("inkling", cls)
    config.moe_intermediate_size = 8
    assert not is_experts(cls(config))
    assert is_experts(HandWrittenExperts())


# ---- all that PEFT does with a layer -------------------------------------------------------------


@pytest.fixture
def model():
    return adapted(Handwritten(fp32_linear))


def merged_weight(model, *adapter_names):
    weight = model.base_model.model.gate.base_layer.weight.detach().clone()
    for name in adapter_names:
        A, B = factors(model, name)
        weight += model.base_model.model.gate.scaling[name] * B.detach() @ A.detach()
    return weight


def test_a_new_adapter_changes_nothing_and_starts_as_pefts_linear_does():
    router, x = Handwritten(linear), torch.randn(T, WIDTH)
    model = get_peft_model(
        Block(copy.deepcopy(router)), MoELoraConfig(r=R, target_modules=["gate"])
    )
    assert all(torch.equal(a, b) for a, b in zip(model(x), router(x), strict=True))
    A, B = factors(model)
    assert (A.shape, B.shape) == ((R, WIDTH), (EXPERTS, R))
    assert not B.any()
    assert A.abs().max() <= WIDTH**-0.5
    assert A.std() > 0.3 * WIDTH**-0.5
    for init, check in (("gaussian", lambda B: not B.any()), (False, lambda B: B.all())):
        config = MoELoraConfig(r=R, target_modules=["gate"], init_lora_weights=init)
        assert check(factors(get_peft_model(Block(copy.deepcopy(router)), config))[1])


def test_an_adapter_that_is_not_widened_has_the_routers_dtype():
    base = Block(Handwritten(linear)).bfloat16()
    config = MoELoraConfig(r=R, target_modules=["gate"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    assert {factor.dtype for factor in factors(model)} == {torch.bfloat16}


def test_merging_adds_the_update_and_unmerging_takes_it_back(model):
    x, layer = torch.randn(T, WIDTH), model.base_model.model.gate
    expected, before = model(x), layer.base_layer.weight.detach().clone()
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        assert_close(
            layer.base_layer.weight,
            before + SCALING * layer.lora_B.default.weight @ layer.lora_A.default.weight,
        )
        assert_close(model(x)[0], expected[0])
        model.unmerge_adapter()
        assert_close(layer.base_layer.weight, before)
    whole = model.merge_and_unload()
    assert type(whole.gate) is Handwritten
    assert_close(whole(x)[1], expected[1])


def test_several_adapters_with_ranks_of_their_own(model):
    config = MoELoraConfig(
        r=7, lora_alpha=3, target_modules=["gate"], rank_pattern={"gate": 2}, use_rslora=True
    )
    model.add_adapter("second", config)
    A, B = factors(model, "second")
    assert not A.requires_grad
    nn.init.normal_(B)
    assert A.shape == (2, WIDTH)
    assert model.base_model.model.gate.scaling["second"] == pytest.approx(3 / 2**0.5)
    x = torch.randn(T, WIDTH)
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        assert_close(model(x)[0], F.linear(x, merged_weight(model, *active)), what=str(active))
    model.delete_adapter("default")
    model.set_adapter("second")
    assert_close(model(x)[0], F.linear(x, merged_weight(model, "second")))


def test_dropout_is_on_what_goes_into_a(model):
    model = adapted(Handwritten(linear), lora_dropout=0.5)
    x, layer = torch.randn(400, WIDTH), model.base_model.model.gate
    right = model(x)[0]
    model.train()
    torch.manual_seed(1)
    first = model(x)[0]
    torch.manual_seed(1)
    A, B = factors(model)
    dropped = F.dropout(x, 0.5)
    assert_close(first, F.linear(x, layer.base_layer.weight) + SCALING * dropped @ A.T @ B.T)
    assert not torch.allclose(first, right, atol=0.1)


def test_a_router_comes_back_from_its_file(model, tmp_path):
    model.save_pretrained(tmp_path)
    router = copy.deepcopy(model.base_model.model.gate.base_layer)
    loaded = type(model).from_pretrained(Block(router), tmp_path)
    x = torch.randn(T, WIDTH)
    assert torch.equal(loaded(x)[0], model(x)[0])


def test_copies_and_pickles_are_whole(model):
    x = torch.randn(T, WIDTH)
    expected = model(x)[0]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x)[0], expected)
        nn.init.zeros_(factors(model)[1])
        assert torch.equal(twin(x)[0], expected)
        nn.init.ones_(factors(model)[1])


def test_autocast_casts_both_products():
    model, x = adapted(Handwritten(linear)), torch.randn(T, WIDTH)
    exact = model(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)[0]
    assert logits.dtype == torch.bfloat16
    assert_close(logits, exact, BF16)


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_in_autocast_gives_the_same_gradients(compiled):
    """A router that leaves autocast by itself, as many do, keeps its low-rank term in fp32."""

    def exact_linear(x, weight):
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight.float())

    model = adapted(Handwritten(exact_linear))
    call = model.base_model.model
    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    x = torch.randn(T, WIDTH)
    found = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = call(x)
            assert outputs[0].dtype == torch.float32
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                found.append(grads(outputs, factors(model)))
    for outside, inside in zip(*found, strict=True):
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("product", [linear, fp32_linear, matrix_product])
def test_it_compiles_without_a_graph_break(product):
    torch.compiler.reset()
    model, x = adapted(Handwritten(product)), torch.randn(T, WIDTH)
    expected = model(x)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    actual = compiled(x)
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted)
    for got, wanted in zip(
        grads(actual, factors(model)), grads(expected, factors(model)), strict=True
    ):
        assert_close(got, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not (MODELS / "kolibri1").exists(), reason="this transformers has no kolibri1")
def test_a_product_with_a_dtype_of_its_own_is_seen():
    """kolibri1, on a GPU and without gradients: torch.mm of bf16 with fp32 out."""
    router = build("kolibri1", "Kolibri1TopKRouter")
    model = adapted(copy.deepcopy(router)).cuda()
    router = model.base_model.model.gate.base_layer.bfloat16()
    x = torch.randn(T, WIDTH, device="cuda", dtype=torch.bfloat16)
    A, B = factors(model)
    with torch.no_grad():
        plain, logits = router(x)[0], model(x)[0]
        assert plain.dtype == logits.dtype == torch.float32
        assert_close(logits, plain + SCALING * x.float() @ A.T @ B.T, FP32)
