"""What an adapter has to compute, in plain PyTorch, without a formula of the package.

The layout of A and B is written here a second time, from its definition in `helpers.adapters`.
Legend: E experts, K in-features, N out-features of one projection, r rank, T tokens.
"""

import copy

import torch
from torch import nn

from helpers.adapters import adapter_parameters
from helpers.sizes import TOP_K, E, H


def dense_delta(lora_A, lora_B, num_experts, scaling):
    """[E, N, K] float: scaling * B[e] @ A[e] for every expert."""
    r = lora_A.shape[0] // num_experts
    deltas = []
    for e in range(num_experts):
        own = slice(e * r, (e + 1) * r)
        deltas.append(scaling * lora_B[:, own] @ lora_A[own])
    return torch.stack(deltas)


def dense_deltas(adapters, num_experts, scaling):
    """{projection: [E, N, K]} of {projection: (A, B)}."""
    return {
        projection: dense_delta(a, b, num_experts, scaling)
        for projection, (a, b) in adapters.items()
    }


def base_weight(experts, projection):
    """[E, N, K]: the base's weight of one projection, however it is stored."""
    name = {"gate_up": "gate_up_proj", "down": "down_proj"}[projection]
    weight = getattr(experts, name, None)
    if weight is None:
        weight = experts.up_proj
    if getattr(experts, "is_transposed", False):
        weight = weight.transpose(1, 2)
    return weight


def base_bias(experts, projection):
    """[E, N], or None without biases."""
    name = {"gate_up": "gate_up_proj_bias", "down": "down_proj_bias"}[projection]
    return getattr(experts, name, None)


def default_gate(experts, gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return experts.act_fn(gate) * up


def _activation(experts, row):
    if not getattr(experts, "has_gate", True):
        return experts.act_fn(row)
    own = getattr(experts, "_apply_gate", None)
    return default_gate(experts, row) if own is None else own(row)


def _project(experts, projection, e, row, weights, deltas):
    """row [M, K] of expert e through one projection, with its delta and its bias: [M, N]."""
    weight = weights[projection][e]
    if projection in deltas:
        weight = weight + deltas[projection][e]
    row = row @ weight.T
    bias = base_bias(experts, projection)
    return row if bias is None else row + bias[e]


def oracle(experts, hidden_states, top_k_index, top_k_weights, deltas=None):
    """out[t] = sum over slots of weight * down(act(gate_up(x[t]))), with W + delta, by expert.

    Args:
        experts: the plain experts module; its weights, gate, biases and norm are used, not its
            forward.
        hidden_states: [T, H]; top_k_weights: [T, top_k].
        top_k_index: [T, top_k] int64; an id of E or more belongs to no expert.
        deltas: {projection: [E, N, K]} added to the base's weights.
    Returns: [T, H], dtype of hidden_states.
    """
    deltas = deltas or {}
    out = torch.zeros_like(hidden_states)
    weights = {p: base_weight(experts, p) for p in ("gate_up", "down")}
    for e in range(weights["down"].shape[0]):
        token, slot = torch.where(top_k_index == e)
        row = _project(experts, "gate_up", e, hidden_states[token], weights, deltas)
        row = _activation(experts, row)
        row = _project(experts, "down", e, row, weights, deltas)
        if getattr(experts, "has_post_expert_norm", False):
            row = experts.post_expert_norm(row)
        out = out.index_add(0, token, (row * top_k_weights[token, slot, None]).to(out.dtype))
    return out


def random_rows(
    T=13, hidden=H, num_experts=E, top_k=TOP_K, dtype=torch.float32, weights_dtype=None, seed=2
):
    """hidden_states [T, H], top_k_index [T, top_k] without repeats, top_k_weights [T, top_k]."""
    generator = torch.Generator().manual_seed(seed)
    hidden_states = torch.randn(T, hidden, generator=generator).to(dtype)
    order = torch.rand(T, num_experts, generator=generator).argsort(dim=-1)
    top_k_index = order[:, :top_k].contiguous()
    top_k_weights = (0.2 + torch.rand(T, top_k, generator=generator)).to(weights_dtype or dtype)
    return hidden_states, top_k_index, top_k_weights


class DenseTwin(nn.Module):
    """What a model with an adapter computes, in plain PyTorch: the base on W + scaling * B A.

    Attributes:
        leaves: {name in the adapted model: parameter}, copies of the adapter's A and B to take
            gradients of.
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
        named = dict(self.plain.named_parameters())
        found = {}
        for name, A in self.leaves.items():
            if ".lora_A." not in name:
                continue
            B = self.leaves[name.replace("lora_A", "lora_B")]
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_A.")
            projection = rest.partition(".")[2]
            if projection == "weight":
                key = f"{path}.weight"
                delta = self.scaling * B @ A
            else:
                key, delta = self._experts_delta(path, projection, A, B)
            found[key] = (named[key] + delta).to(named[key].dtype)
        return found

    def _experts_delta(self, path, projection, A, B):
        """The parameter of one projection, and its delta in the parameter's own layout."""
        experts = self.plain.get_submodule(path)
        weight = base_weight(experts, projection)
        delta = dense_delta(A, B, weight.shape[0], self.scaling)
        (key,) = (n for n, p in experts.named_parameters() if p.data_ptr() == weight.data_ptr())
        return f"{path}.{key}", delta.mT if experts.is_transposed else delta

    def forward(self, *args, **kwargs):
        return torch.func.functional_call(self.plain, self.weights(), args, kwargs)

    def gradients(self, loss):
        """{name in the adapted model: gradient of the loss}."""
        gradients = torch.autograd.grad(loss, list(self.leaves.values()))
        return dict(zip(self.leaves, gradients, strict=True))
