"""Every experts class of the installed transformers, and one tiny random module of each."""

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

from helpers.sizes import E, H, I

MODELS = Path(transformers.__file__).parent / "models"
_DECORATED = re.compile(r"^@use_experts_implementation(?:\([^)]*\))?\s*\nclass (\w+)", re.MULTILINE)


@functools.cache
def interface_families():
    """(family, class name) of every class under `@use_experts_implementation`, from the sources."""
    found = []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for name in _DECORATED.findall(path.read_text(encoding="utf-8")):
            found.append((path.parent.name, name))
    return found


def modeling_module(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def experts_class(family, name):
    return getattr(modeling_module(family), name)


def is_on_the_interface(cls):
    """Whether `forward` is the one that the decorator puts in place, which dispatches."""
    forward = inspect.getattr_static(cls, "forward", None)
    if not inspect.isfunction(forward):
        return False
    return forward.__code__.co_filename.endswith("integrations/moe.py")


def experts_paths(model):
    """Dotted paths of the routed experts modules of a plain model."""
    return [name for name, module in model.named_modules() if is_on_the_interface(type(module))]


def _config_classes(family, cls):
    """The family's config classes: first the one that `cls` asks for, text before composite."""
    module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    candidates = [
        candidate
        for candidate in vars(module).values()
        if inspect.isclass(candidate)
        and issubclass(candidate, PreTrainedConfig)
        and candidate.__module__ == module.__name__
    ]
    annotation = inspect.signature(cls.__init__).parameters["config"].annotation
    return sorted(candidates, key=lambda c: (c is not annotation, "Text" not in c.__name__))


def _read_from_config(cls):
    """The names that the source of `cls` reads from its config."""
    # inspect.getsource(cls) parses the whole module, which takes a second; we cut out the class
    text = Path(inspect.getfile(cls.__init__.__wrapped__)).read_text(encoding="utf-8")
    source = re.search(
        rf"^class {cls.__name__}\b.*?(?=^class |^def |^@|\Z)", text, re.MULTILINE | re.DOTALL
    )[0]
    return set(re.findall(r"config\.(\w+)", source))


def tiny_config(family, cls, hidden=H, intermediate=I, num_experts=E):
    """The family's own config with small sizes: the first config class that `cls` can use."""
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
        # low enough to clamp a few of the values, as in a trained model
        "swiglu_limit": 2.0,
    }
    candidates = _config_classes(family, cls)
    read = _read_from_config(cls)
    for candidate in candidates:
        config = candidate()
        if not all(hasattr(config, name) for name in read):
            continue
        for name in read & small.keys():
            value = small[name]
            # ernie4_5_vl_moe has one size per modality
            if name == "moe_intermediate_size" and isinstance(getattr(config, name), list):
                value = [value] * 2
            setattr(config, name, value)
        config._experts_implementation = "eager"
        return config
    names = [candidate.__name__ for candidate in candidates]
    raise AssertionError(f"no config class of {family} has all of {sorted(read)}: {names}")


def fill(module, seed=0):
    """Random weights that keep activations of order one, so that gates and clamps are used."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 1 if getattr(module, "is_transposed", False) else 2
    with torch.no_grad():
        for parameter in module.parameters():
            std = 0.5 if parameter.dim() < 3 else parameter.shape[inputs] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module


def build_experts(family, name, hidden=H, intermediate=I, num_experts=E, dtype=torch.float32):
    """One experts module of a family, tiny and random."""
    cls = experts_class(family, name)
    extra = {}
    # the size is an argument where the config has one per modality
    if "intermediate_size" in inspect.signature(cls).parameters:
        extra["intermediate_size"] = intermediate
    experts = cls(tiny_config(family, cls, hidden, intermediate, num_experts), **extra)
    return fill(experts).to(dtype)


def build_step3p7(hidden=H, intermediate=I, num_experts=E):
    """Step-3.7's experts: they keep the interface's contract, without its decorator."""
    from transformers.models.step3p7 import modeling_step3p7

    config = PreTrainedConfig()
    config.num_local_experts = num_experts
    config.hidden_size = hidden
    config.moe_intermediate_size = intermediate
    config.hidden_act = "silu"
    return fill(modeling_step3p7.Step3p7Experts(config, swiglu_limit=2.0))


class HandWrittenExperts(nn.Module):
    """An experts module that a user wrote: stacked weights, an activation, no transformers."""

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
    """The smallest model with experts in it: PEFT needs a parent to replace them in."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, *args):
        return self.experts(*args)


def in_double(module):
    """A copy of a plain module in float64, so that only the code under test rounds."""
    return copy.deepcopy(module).double()
