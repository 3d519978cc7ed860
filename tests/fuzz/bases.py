"""Tiny base models of six families, in fp64, and what their modules are.

In fp64 a difference between two ways to compute the same is a mistake, and no routing decision is
close enough to a tie to come out differently.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn

from families.off_interface import off_interface_model, paths_of
from helpers import experts_paths, tiny_model

# family -> what differs from the tiny model of the other tests
_CHANGES = {
    # two layers of experts after the dense one
    "deepseek_v3": {"num_hidden_layers": 3},
}
FAMILIES = ("qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "nemotron_h", "llama4")
ROUTER = {"gpt_oss": "router", "llama4": "router"}
# experts that no other program reads as an adapter
NO_EXPORT = {"llama4"}
# experts that vLLM finds under another name, or that have no gate
NOT_IN_VLLM_3D = {"mixtral", "nemotron_h"}
# family whose experts mlx-lm is known to name -> layers on which it has no LoRA
IN_MLX = {
    "qwen3_moe": set(),
    "gpt_oss": set(),
    "mixtral": set(),
    "deepseek_v3": {"gate", "kv_b_proj"},
}
# family -> names of linear layers whose LoRA PEFT drops, because it takes them for experts'
DROPPED_BY_PEFT = {"deepseek_v3": ("gate_proj", "up_proj", "down_proj")}
_STACKS = {"gate_up": ("gate_up_proj", "up_proj"), "down": ("down_proj",)}


class Stack(NamedTuple):
    """One projection of an experts module: the stacked parameter, [E, N, K] or [E, K, N]."""

    parameter: str
    transposed: bool
    num_experts: int


class Names(NamedTuple):
    """The modules of a base model.

    Attributes:
        experts: path -> projection -> Stack.
        routers: paths of the routers.
        linears: paths of the linear layers, without routers and head.
        all_linear: what PEFT's "all-linear" means.
        on_interface: whether the experts are on transformers' experts interface.
        head, embedding: paths.
        targets: paths of all of these.
        biases: path of an experts module -> whether it has biases.
        modules: all paths.
    """

    experts: dict[str, dict[str, Stack]]
    routers: list[str]
    linears: list[str]
    all_linear: list[str]
    on_interface: bool
    head: str
    embedding: str
    targets: frozenset[str]
    biases: dict[str, bool]
    modules: list[str]


@functools.cache
def model_of(family):
    """The base model: fp64, in eval mode, with the plain experts implementation."""
    if family == "llama4":
        model = off_interface_model(family)
    else:
        model = tiny_model(family, **_CHANGES.get(family, {}))
        # the only one that computes in fp64
        model.set_experts_implementation("eager")
    return model.double().requires_grad_(False)


@functools.cache
def names_of(family):
    model = model_of(family)
    modules = dict(model.named_modules())
    paths = paths_of(model) if family == "llama4" else experts_paths(model)
    experts = {path: _stacks(modules[path]) for path in paths}
    router = ROUTER.get(family, "gate")
    routers = [f"{path.rpartition('.')[0]}.{router}" for path in paths]
    all_linear = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.Linear) and path != "lm_head"
    ]
    (embedding,) = [path for path, m in modules.items() if isinstance(m, nn.Embedding)]
    return Names(
        experts=experts,
        routers=routers,
        linears=[path for path in all_linear if path not in routers],
        all_linear=all_linear,
        on_interface=family != "llama4",
        head="lm_head",
        embedding=embedding,
        targets=frozenset([*experts, *routers, *all_linear, "lm_head", embedding]),
        biases={path: hasattr(modules[path], "down_proj_bias") for path in paths},
        modules=[path for path in modules if path],
    )


def _stacks(module):
    transposed = getattr(module, "is_transposed", "Llama4" in type(module).__name__)
    found = {}
    for projection, names in _STACKS.items():
        (name,) = [name for name in names if hasattr(module, name)]
        found[projection] = Stack(name, transposed, getattr(module, name).shape[0])
    return found


class Base(NamedTuple):
    """A base model and the folder of its checkpoint, in fp32."""

    family: str
    model: nn.Module
    names: Names
    folder: object


class Bases:
    """family -> Base."""

    def __init__(self, folder):
        self.folder = folder
        self.made = {}

    def __getitem__(self, family):
        if family not in self.made:
            model = model_of(family)
            folder = self.folder / family
            model.config.architectures = [type(model).__name__]
            model.to(torch.float32).save_pretrained(folder)
            self.made[family] = Base(family, model.double(), names_of(family), folder)
        return self.made[family]
