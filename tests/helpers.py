"""What the tests share: every experts class of the installed transformers, tiny models, an oracle in plain PyTorch.

Nothing here imports a formula from the package: the layout is written out a second time, from its definition.

Legend: E experts, K in-features, N out-features of one projection, r rank, T tokens, H width of the experts' input,
I their intermediate width. `lora_A` [r*E, K]: rows e*r up to (e + 1)*r are A[e]. `lora_B` [N, r*E]: columns e*r up to
(e + 1)*r are B[e].
"""

import copy
import functools
import importlib
import inspect
import re
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

MODELS = Path(transformers.__file__).parent / "models"

# fp32 sums of at most a few hundred products, in another order: measured differences are below 5e-6, a missing row or
# a wrong expert gives 1e-2 and more
FP32 = 2e-5
# the same products of the same numbers: memory of another alignment may pick another kernel, which sums otherwise
SAME = 1e-6
# 8 bits of mantissa, a handful of roundings on the way
BF16 = 4e-2

# distinct sizes, so that no transpose can hide: H, I, 2I, E, r and top_k all differ
H, I, E, TOP_K, R = 32, 24, 5, 2, 4  # noqa: E741 I is the glossary's letter


def relative_error(actual, expected):
    """max |actual - expected| / max |expected|, float; 0 for two empty tensors."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.isfinite(expected).all(), "the expected values are not finite"
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def assert_close(actual, expected, tolerance=FP32, what="values"):
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} is above {tolerance:.0e}"


def assert_share_of_order_one(with_adapter, without, low=0.3, high=3.0):
    """The adapter moves the output by about as much as the output itself: then a wrong adapter cannot pass."""
    share = ((with_adapter - without).double().norm() / without.double().norm()).item()
    assert low <= share <= high, (
        f"the adapter's share of the output is {share:.3f}, not of order one"
    )


# ---- every experts class -------------------------------------------------------------------------------------------


@functools.cache
def interface_families():
    """(family, class name) of every class under `@use_experts_implementation`, read from the sources."""
    found = []
    decorated = re.compile(
        r"^@use_experts_implementation(?:\([^)]*\))?\s*\nclass (\w+)", re.MULTILINE
    )
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        found += [
            (path.parent.name, name) for name in decorated.findall(path.read_text(encoding="utf-8"))
        ]
    return found


def one_of_each_kind():
    """(family, class name) of one class for each way that experts run, of those the installed transformers has."""
    kinds = [
        # the plain case
        ("qwen3_moe", "Qwen3MoeExperts"),
        # interleaved, transposed, biased and clamped
        ("gpt_oss", "GptOssExperts"),
        # no gate
        ("nemotron_h", "NemotronHExperts"),
        # the model's own code between the products, and a norm after them; transformers 5.17 lacks it
        ("muse_spark", "MuseSparkExperts"),
    ]
    return [case for case in kinds if case in interface_families()]


def modeling_module(family):
    (path,) = (p for p in (MODELS / family).glob("modeling_*.py") if p.stem == f"modeling_{family}")
    return importlib.import_module(f"transformers.models.{family}.{path.stem}")


def experts_class(family, name):
    return getattr(modeling_module(family), name)


def is_on_the_interface(cls):
    """Whether `forward` is the dispatching one that the decorator puts in place."""
    forward = inspect.getattr_static(cls, "forward", None)
    return inspect.isfunction(forward) and forward.__code__.co_filename.endswith(
        "integrations/moe.py"
    )


def tiny_config(family, cls, hidden=H, intermediate=I, num_experts=E):
    """The family's own config with small sizes: the first of its config classes that `cls` can be built from."""
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    candidates = [
        c
        for c in vars(module).values()
        if inspect.isclass(c)
        and issubclass(c, PreTrainedConfig)
        and c.__module__ == module.__name__
    ]
    annotation = inspect.signature(cls.__init__).parameters["config"].annotation
    # the class that the constructor asks for comes first, text configs before composite ones
    candidates.sort(key=lambda c: (c is not annotation, "Text" not in c.__name__))
    small = {
        "num_experts": num_experts,
        "num_local_experts": num_experts,
        "n_routed_experts": num_experts,
        "moe_num_experts": num_experts,
        "hidden_size": hidden,
        "moe_hidden_size": hidden,
        "moe_latent_size": None,
        "intermediate_size": intermediate,
        "moe_intermediate_size": intermediate,
        # low enough to clamp a few of the values, as a trained model does
        "swiglu_limit": 2.0,
    }
    # inspect.getsource(cls) parses the whole module, a second each; the text between two classes will do
    text = Path(inspect.getfile(cls.__init__.__wrapped__)).read_text(encoding="utf-8")
    source = re.search(
        rf"^class {cls.__name__}\b.*?(?=^class |^def |^@|\Z)", text, re.MULTILINE | re.DOTALL
    )[0]
    read = set(re.findall(r"config\.(\w+)", source))
    for candidate in candidates:
        config = candidate()
        if not all(hasattr(config, name) for name in read):
            continue
        for name in read & small.keys():
            # ernie4_5_vl_moe keeps one size per modality
            several = name == "moe_intermediate_size" and isinstance(getattr(config, name), list)
            setattr(config, name, [small[name]] * 2 if several else small[name])
        config._experts_implementation = "eager"
        return config
    raise AssertionError(
        f"no config class of {family} has all of {sorted(read)}: {[c.__name__ for c in candidates]}"
    )


def fill(module, seed=0):
    """Random weights of the size that keeps activations of order one, so that gates and clamps are really used."""
    generator = torch.Generator().manual_seed(seed)
    transposed = getattr(module, "is_transposed", False)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = 1 if parameter.dim() < 3 else parameter.shape[1 if transposed else 2]
            std = 0.5 if parameter.dim() < 3 else fan_in**-0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def build_experts(family, name, hidden=H, intermediate=I, num_experts=E, dtype=torch.float32):
    """One experts module of a family, tiny and random."""
    cls = experts_class(family, name)
    # where the size is an argument, the config holds one per modality
    extra = (
        {"intermediate_size": intermediate}
        if "intermediate_size" in inspect.signature(cls).parameters
        else {}
    )
    experts = cls(tiny_config(family, cls, hidden, intermediate, num_experts), **extra)
    return fill(experts).to(dtype)


def build_step3p7(hidden=H, intermediate=I, num_experts=E):
    """Step-3.7's experts: the contract of the interface without its decorator."""
    from transformers.models.step3p7 import modeling_step3p7

    config = PreTrainedConfig()
    config.num_local_experts, config.hidden_size, config.moe_intermediate_size = (
        num_experts,
        hidden,
        intermediate,
    )
    config.hidden_act = "silu"
    return fill(modeling_step3p7.Step3p7Experts(config, swiglu_limit=2.0))


class HandWrittenExperts(nn.Module):
    """An experts module as a user writes one: stacked weights and an activation, nothing from transformers."""

    def __init__(self, hidden=H, intermediate=I, num_experts=E):
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, intermediate))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, slot = torch.where(top_k_index == e)
            gate, up = (hidden_states[token] @ self.gate_up_proj[e].T).chunk(2, dim=-1)
            y = (self.act_fn(gate) * up) @ self.down_proj[e].T
            out = out.index_add(0, token, (y * top_k_weights[token, slot, None]).to(out.dtype))
        return out


class Holder(nn.Module):
    """The smallest model with experts in it: PEFT needs a module to replace them in."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


# ---- adapters ------------------------------------------------------------------------------------------------------


def wrap(experts, randomize=True, adapter_name="default", **config):
    """`experts` in a `Holder`, with an adapter of random A and B on it."""
    from peft import get_peft_model

    from peft_moe_lora import MoELoraConfig

    config = {"r": R, "lora_alpha": 2 * R, "target_modules": ["experts"], **config}
    model = get_peft_model(Holder(experts), MoELoraConfig(**config), adapter_name=adapter_name)
    if randomize:
        fill_adapter(model, adapter_name)
    return model


def adapter_parameters(model, adapter_name="default"):
    """{name: parameter} of one adapter's A and B, on experts and on linear layers."""
    return {n: p for n, p in model.named_parameters() if ".lora_" in n and f".{adapter_name}" in n}


def fill_adapter(model, adapter_name="default", seed=1, gain=1.0):
    """Random A and B, none of them zero, of the size that moves every expert's output by about its own size."""
    generator = torch.Generator().manual_seed(seed)
    parameters = adapter_parameters(model, adapter_name)
    assert parameters, (
        f"no parameter of adapter {adapter_name!r} in {[n for n, _ in model.named_parameters()]}"
    )
    with torch.no_grad():
        for name, parameter in parameters.items():
            # [r*E, K] and [N, r*E]: R stands for the fan-in of B, which the shape alone does not tell
            std = gain * 0.5 * (parameter.shape[1] ** -0.5 if ".lora_A." in name else R**-0.5)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def experts_adapter(model, path="experts", adapter_name="default", prefix="base_model.model."):
    """{projection: (A, B)} of the experts module at `path`, found by the promised parameter names."""
    named = dict(model.named_parameters())
    start = f"{prefix}{path}.lora_A.{adapter_name}."
    projections = [name.removeprefix(start) for name in named if name.startswith(start)]
    return {
        p: (named[start + p], named[start.replace("lora_A", "lora_B") + p]) for p in projections
    }


def dense_delta(lora_A, lora_B, num_experts, scaling):
    """[E, N, K] float: scaling * B[e] @ A[e] for every expert, from the definition of the layout."""
    r = lora_A.shape[0] // num_experts
    return torch.stack(
        [
            scaling * lora_B[:, e * r : (e + 1) * r] @ lora_A[e * r : (e + 1) * r]
            for e in range(num_experts)
        ]
    )


def dense_deltas(adapters, num_experts, scaling):
    return {
        projection: dense_delta(a, b, num_experts, scaling)
        for projection, (a, b) in adapters.items()
    }


# ---- the oracle ----------------------------------------------------------------------------------------------------


def base_weight(experts, projection):
    """[E, N, K]: the base's weight of one projection, however it is stored."""
    name = {"gate_up": "gate_up_proj", "down": "down_proj"}[projection]
    weight = getattr(experts, name, None)
    weight = experts.up_proj if weight is None else weight
    return weight.transpose(1, 2) if getattr(experts, "is_transposed", False) else weight


def base_bias(experts, projection):
    name = {"gate_up": "gate_up_proj_bias", "down": "down_proj_bias"}[projection]
    return getattr(experts, name, None)


def default_gate(experts, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def oracle(experts, hidden_states, top_k_index, top_k_weights, deltas=None):
    """out[t] = sum over the token's slots of weight * down(act(gate_up(x[t]))), with W + delta, one expert at a time.

    Args:
        experts: the plain experts module; its weights, gate, biases and norm are used, its forward is not.
        hidden_states: [T, H]; top_k_weights: [T, top_k].
        top_k_index: [T, top_k] int64; an id of E or more is nobody's.
        deltas: {projection: [E, N, K]} added to the base's weights.
    Returns: [T, H], dtype of hidden_states.
    """
    deltas = deltas or {}
    out = torch.zeros_like(hidden_states)
    weights = {p: base_weight(experts, p) for p in ("gate_up", "down")}
    for e in range(weights["down"].shape[0]):
        token, slot = torch.where(top_k_index == e)
        row = hidden_states[token]
        for projection in ("gate_up", "down"):
            weight = weights[projection][e]
            if projection in deltas:
                weight = weight + deltas[projection][e]
            row = row @ weight.T
            bias = base_bias(experts, projection)
            if bias is not None:
                row = row + bias[e]
            if projection == "gate_up":
                if getattr(experts, "has_gate", True):
                    own = getattr(experts, "_apply_gate", None)
                    row = own(row) if own is not None else default_gate(experts, row)
                else:
                    row = experts.act_fn(row)
        if getattr(experts, "has_post_expert_norm", False):
            row = experts.post_expert_norm(row)
        out = out.index_add(0, token, (row * top_k_weights[token, slot, None]).to(out.dtype))
    return out


def random_rows(
    T=13, hidden=H, num_experts=E, top_k=TOP_K, dtype=torch.float32, weights_dtype=None, seed=2
):
    """hidden_states [T, H], top_k_index [T, top_k] without repeats, top_k_weights [T, top_k] in (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(T, hidden, generator=generator).to(dtype)
    top_k_index = (
        torch.rand(T, num_experts, generator=generator).argsort(dim=-1)[:, :top_k].contiguous()
    )
    top_k_weights = (0.2 + torch.rand(T, top_k, generator=generator)).to(weights_dtype or dtype)
    return hidden_states, top_k_index, top_k_weights


def grads_of(call, inputs, seed=3):
    """The output of `call()` and the gradients of a fixed random weighting of it with respect to `inputs`."""
    out = call()
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(out.shape, generator=generator).to(out)
    return out.detach(), torch.autograd.grad(out, inputs, direction)


def in_double(module):
    """A copy of a plain module in float64: then the only rounding in a comparison is the code's under test."""
    return copy.deepcopy(module).double()


# ---- whole tiny models ---------------------------------------------------------------------------------------------

VOCAB = 64
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # about H**-0.5: every layer has a say in the output
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# family -> (config class, what differs from _COMMON); why each is here stands beside it
_TINY = {
    # the plain case: gated, concatenated, [E, 2I, H]
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": I,
                                     "num_experts": E, "num_experts_per_tok": TOP_K}),
    # interleaved, transposed, biased, its own gate
    "gpt_oss": ("GptOssConfig", {"head_dim": 8, "intermediate_size": I, "num_local_experts": E,
                                 "num_experts_per_tok": TOP_K, "sliding_window": 8,
                                 "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    # PEFT and transformers rewrite its adapter targets on loading (w1, w2, w3 of transformers 4)
    "mixtral": ("MixtralConfig", {"intermediate_size": I, "num_local_experts": E, "num_experts_per_tok": TOP_K}),
    # no gate, relu2, the experts' width is neither the model's nor an attribute of the module
    "nemotron_h": ("NemotronHConfig", {"num_hidden_layers": None, "layers_block_type": ["attention", "moe", "moe"],
                                       "head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": I,
                                       "moe_shared_expert_intermediate_size": 40, "moe_latent_size": 20,
                                       "n_routed_experts": E, "num_experts_per_tok": TOP_K}),
    # routing weights not normalised
    "olmoe": ("OlmoeConfig", {"intermediate_size": I, "num_experts": E, "num_experts_per_tok": TOP_K}),
    # fp32 routing weights, a shared expert beside the routed ones, a dense layer first
    "deepseek_v3": ("DeepseekV3Config", {"num_key_value_heads": 4, "intermediate_size": 40, "moe_intermediate_size": I,
                                         "n_routed_experts": 6, "num_experts_per_tok": TOP_K, "n_group": 2,
                                         "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16,
                                         "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                                         "first_k_dense_replace": 1, "n_shared_experts": 1}),
    # a norm between down_proj and the routing weight; no causal-LM class of its own
    "muse_spark": ("MuseSparkTextConfig", {"head_dim": 8, "intermediate_size": 40, "moe_hidden_size": 20,
                                           "moe_intermediate_size": I, "num_local_experts": E,
                                           "num_experts_per_tok": TOP_K, "mlp_layer_types": ["sparse", "sparse"],
                                           "sliding_window": 8}),
    # tanh-approximated gelu, experts directly under the decoder layer
    "gemma4": ("Gemma4TextConfig", {"head_dim": 8, "global_head_dim": 8, "intermediate_size": 40,
                                    "enable_moe_block": True, "moe_intermediate_size": I, "num_experts": E,
                                    "top_k_experts": TOP_K, "sliding_window": 8, "hidden_size_per_layer_input": 0,
                                    "layer_types": ["sliding_attention", "full_attention"],
                                    "vocab_size_per_layer_input": VOCAB}),
    # transposed without biases
    "aria": ("AriaTextConfig", {"intermediate_size": I, "moe_num_experts": E, "moe_topk": TOP_K,
                                "moe_num_shared_experts": 1}),
}  # fmt: skip

# families that are here for what they have beside their experts
_BESIDE = {
    # a sigmoid gate [1, H] on the shared expert: its name ends on "gate" too
    "qwen2_moe": ("Qwen2MoeConfig", {"intermediate_size": 40, "moe_intermediate_size": I, "num_experts": E,
                                     "num_experts_per_tok": TOP_K, "shared_expert_intermediate_size": 40}),
    # the same, and linear attention in one of two layers
    "qwen3_next": ("Qwen3NextConfig", {"head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": I,
                                       "num_experts": E, "num_experts_per_tok": TOP_K,
                                       "shared_expert_intermediate_size": 40, "linear_num_key_heads": 2,
                                       "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                                       "linear_value_head_dim": 8,
                                       "layer_types": ["linear_attention", "full_attention"]}),
    # its projections of linear attention have other names
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", {"head_dim": 8, "moe_intermediate_size": I, "num_experts": E,
                                             "num_experts_per_tok": TOP_K, "shared_expert_intermediate_size": 40,
                                             "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                                             "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                                             "layer_types": ["linear_attention", "full_attention"]}),
    # grouped sigmoid routing with plain attention; a dense layer first
    "glm4_moe": ("Glm4MoeConfig", {"head_dim": 8, "intermediate_size": 40, "moe_intermediate_size": I,
                                   "n_routed_experts": 6, "num_experts_per_tok": TOP_K, "n_group": 2, "topk_group": 1,
                                   "first_k_dense_replace": 1, "n_shared_experts": 1}),
    # the router is a linear layer with a forward of its own
    "phimoe": ("PhimoeConfig", {"intermediate_size": I, "num_local_experts": E, "num_experts_per_tok": TOP_K,
                                # how far a score may lie from the best one and still count in its softmax
                                "router_jitter_noise": 4.0}),
}  # fmt: skip


def tiny_families():
    """The families above whose experts are on the interface in the installed transformers."""
    installed = {family for family, _ in interface_families()}
    return [family for family in _TINY if family in installed]


def tiny_model(family="qwen3_moe", dtype=torch.float32, seed=0, **changes):
    """A whole random model of a family, in eval mode, whose experts carry a good share of its output."""
    name, settings = {**_TINY, **_BESIDE}[family]
    settings = {**_COMMON, **settings, **changes}
    config = getattr(modeling_module(family), name)(
        **{k: v for k, v in settings.items() if v is not None}
    )
    torch.manual_seed(seed)
    if family == "muse_spark":
        model = modeling_module(family).MuseSparkTextModel(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    for i, path in enumerate(experts_paths(model)):
        experts = model.get_submodule(path)
        fill(experts, seed=seed + i)
    return model.to(dtype).eval()


def experts_paths(model):
    """Dotted paths of the routed experts modules of a plain model."""
    return [name for name, module in model.named_modules() if is_on_the_interface(type(module))]


def token_ids(batch=2, length=11, seed=4):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def outputs(model, ids=None):
    """[batch, length, VOCAB] logits, or the last hidden state where there is no head."""
    out = model(input_ids=token_ids() if ids is None else ids, use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def moe_lora(model, randomize=True, adapter_name="default", **config):
    """`model` with an adapter of random A and B on its experts."""
    from peft import get_peft_model

    from peft_moe_lora import MoELoraConfig

    config = {"r": R, "lora_alpha": 2 * R, "target_modules": ["experts"], **config}
    model = get_peft_model(model, MoELoraConfig(**config), adapter_name=adapter_name)
    if randomize:
        fill_adapter(model, adapter_name)
    return model


class DenseTwin(nn.Module):
    """What a model with an adapter computes, in plain PyTorch: the base model on W + scaling * B A, written out.

    Attributes:
        leaves: {name in the adapted model: parameter}, copies of the adapter's A and B to take gradients of.
    """

    def __init__(self, model, adapter_name="default"):
        super().__init__()
        self.leaves = {
            n: p.detach().clone().requires_grad_()
            for n, p in adapter_parameters(model, adapter_name).items()
        }
        config = model.peft_config[adapter_name]
        self.scaling = config.lora_alpha / config.r
        self.plain = copy.deepcopy(model).unload().requires_grad_(False)
        self.plain.set_experts_implementation("eager")

    def weights(self):
        """{parameter of the plain model: W + scaling * B A}."""
        named, found = dict(self.plain.named_parameters()), {}
        for name, A in self.leaves.items():
            if ".lora_A." not in name:
                continue
            B = self.leaves[name.replace("lora_A", "lora_B")]
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_A.")
            projection = rest.partition(".")[2]
            if projection == "weight":
                found[f"{path}.weight"] = named[f"{path}.weight"] + self.scaling * B @ A
                continue
            experts = self.plain.get_submodule(path)
            weight = base_weight(experts, projection)
            delta = dense_delta(A, B, weight.shape[0], self.scaling)
            (key,) = (n for n, p in experts.named_parameters() if p.data_ptr() == weight.data_ptr())
            found[f"{path}.{key}"] = named[f"{path}.{key}"] + (
                delta.mT if experts.is_transposed else delta
            )
        return {name: weight.to(named[name].dtype) for name, weight in found.items()}

    def forward(self, *args, **kwargs):
        return torch.func.functional_call(self.plain, self.weights(), args, kwargs)

    def gradients(self, loss):
        """{name in the adapted model: gradient of the loss}."""
        return dict(
            zip(self.leaves, torch.autograd.grad(loss, list(self.leaves.values())), strict=True)
        )


def snapshot(model):
    """All that a failed call must leave as it was: modules, state and what is trainable."""
    return {
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "state": {
            name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()
        },
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after["modules"] == before["modules"], "modules were replaced or added"
    assert after["requires_grad"] == before["requires_grad"], "requires_grad changed"
    assert after["state"].keys() == before["state"].keys(), "the state dict has other keys"
    for name, (_, tensor) in before["state"].items():
        assert torch.equal(after["state"][name][1], tensor), f"{name} changed"


# ---- PEFT's own layout ---------------------------------------------------------------------------------------------


def rank_major(lora_B, num_experts):
    """Our B [N, r*E], column e*r + j, in the order of PEFT's ParamWrapper: column j*E + e."""
    r = lora_B.shape[1] // num_experts
    out = torch.empty_like(lora_B)
    for e in range(num_experts):
        for j in range(r):
            out[:, j * num_experts + e] = lora_B[:, e * r + j]
    return out


def expert_major(peft_B, num_experts):
    """The way back: PEFT's column j*E + e to our column e*r + j."""
    N, columns = peft_B.shape
    r = columns // num_experts
    return peft_B.reshape(N, r, num_experts).transpose(1, 2).reshape(N, columns)
