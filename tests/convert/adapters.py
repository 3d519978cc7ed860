"""What the conversion tests share: saved adapters, and a reader of each format.

The readers are written a second time here, from what each format promises.
Legend: E experts, r rank, K in- and N out-features of one projection.
An update is {path: {projection: [E, N, K]}}.
"""

import copy
import json
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import E, assert_close, expert_major, experts_paths, moe_lora, tiny_model
from peft_moe_lora import convert_adapter

# fp32: what the promise of equal logits says; measured differences are below 1e-6
TOLERANCE = 1e-5
FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3"]
# gate and up rows alternate in these, [gate; up] in the others
INTERLEAVED = {"gpt_oss"}
# (family, format) -> what the refusal says: a server would misread the format
MISREAD = {
    ("mixtral", "vllm_3d"): "block_sparse_moe.experts",
    ("nemotron_h", "vllm_3d"): "have no gate",
}
PREFIX = "base_model.model."
# names of one expert's projections in published checkpoints
DEFAULT_LEAVES = ("gate_proj", "up_proj", "down_proj")
LEAVES = {"mixtral": ("w1", "w3", "w2")}


def save_base(family, folder, **settings):
    """A tiny base model, and its config alone in a folder, as a conversion is told of it."""
    base = tiny_model(family, **settings)
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder)
    return base


def save_ours(base, folder, **config):
    """Save our adapter of random A and B on a copy of the base; return the adapted model."""
    model = moe_lora(copy.deepcopy(base), **config)
    model.save_pretrained(folder)
    return model


def save_pefts(base, folder, seed=5, **config):
    """An adapter of PEFT's own route to experts, saved by PEFT."""
    path = experts_paths(base)[0]
    names = [n for n, p in base.get_submodule(path).named_parameters() if p.ndim == 3]
    config = {"r": 4, "lora_alpha": 8, "target_modules": [], **config}
    config.setdefault("target_parameters", [f"experts.{name}" for name in names])
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.copy_(
                    torch.randn(p.shape, generator=generator)
                    * 0.4
                    * p.shape[1] ** -0.5
                    * (3 if "_B" in name else 1)
                )
    model.save_pretrained(folder)
    return model


def load(base, folder):
    """The base with an adapter, as PEFT loads it."""
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def write_theirs(folder, state, **config):
    """Write an adapter as another program does: tensors, and the least configuration."""
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))


def swap_in_and_out(state, count=E):
    """PEFT 0.18's tensors of the same update, from those of a later release.

    There the delta of a parameter [E, d1, d2] is (B A)^T, with A over d1.
    """
    legacy = {}
    for name in [n for n in state if ".lora_A." in n]:
        A, B = state[name], expert_major(state[name.replace("lora_A", "lora_B")], count)
        r = A.shape[0] // count
        # A'[e] = B[e]^T [r, N] and B'[e] = A[e]^T [K, r], B' rank-major
        legacy[name] = torch.cat([B[:, e * r : (e + 1) * r].T for e in range(count)])
        stacked = torch.stack([A[e * r : (e + 1) * r].T for e in range(count)], dim=2)  # [K, r, E]
        legacy[name.replace("lora_A", "lora_B")] = stacked.flatten(1)
    return legacy


def tensors(folder):
    return load_file(Path(folder, "adapter_model.safetensors"))


def config_of(folder):
    return json.loads(Path(folder, "adapter_config.json").read_text())


def rewrite(folder, state=None, metadata=None, **config):
    """Change an adapter on disk: its tensors by a function, its configuration by entries."""
    file = Path(folder, "adapter_model.safetensors")
    if state is not None:
        changed = {name: t.contiguous().clone() for name, t in state(tensors(folder)).items()}
        save_file(changed, file, metadata or {"format": "pt"})
    Path(folder, "adapter_config.json").write_text(json.dumps(config_of(folder) | config))


def experts_count(base, path):
    return base.get_submodule(path).down_proj.shape[0]


# ---- readers, from the promises ------------------------------------------------------------------


def update_of_ours(folder, base):
    """Ours: both tensors are expert-major, with one rank and one scaling.

    Rows e*r up to (e + 1)*r of A, and the same columns of B, belong to expert e.
    """
    state, config = tensors(folder), config_of(folder)
    scaling = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    found = {}
    for path in experts_paths(base):
        E = experts_count(base, path)
        for projection in ("gate_up", "down"):
            A = state.get(f"{PREFIX}{path}.lora_A.{projection}")
            if A is not None:
                B, r = state[f"{PREFIX}{path}.lora_B.{projection}"], A.shape[0] // E
                found.setdefault(path, {})[projection] = torch.stack(
                    [scaling * B[:, e * r : (e + 1) * r] @ A[e * r : (e + 1) * r] for e in range(E)]
                )
    return found


def assert_same_update(found, right, tolerance=TOLERANCE):
    """Two updates, as the functions below return them, are the same."""
    assert found.keys() == right.keys()
    for path, updates in right.items():
        assert found[path].keys() == updates.keys()
        for projection, update in updates.items():
            assert_close(found[path][projection], update, tolerance, f"{path}, {projection}")


def check_update(case, folder, right):
    """An adapter in any format holds an update, by way of ours, which is written beside it."""
    convert_adapter(folder, folder.parent / "ours", to="moe_lora", base_config=case.config)
    assert_same_update(update_of_ours(folder.parent / "ours", case.base), right, 1e-6)


def update_vllm_2d(folder, base, interleaved, leaves=DEFAULT_LEAVES):
    """vLLM's 2-D reader: three projections of every expert, hub names, scaling lora_alpha / r."""
    state, config = tensors(folder), config_of(folder)
    assert config["peft_type"] == "LORA"
    assert not config.get("modules_to_save")
    scaling, found = config["lora_alpha"] / config["r"], {}
    for path in experts_paths(base):
        hub = path.replace(".mlp.", ".block_sparse_moe.") if leaves[0] == "w1" else path
        parts = {leaf: [] for leaf in leaves}
        for e in range(experts_count(base, path)):
            for leaf in leaves:
                # a KeyError here is what a server answers to a missing expert
                A, B = (state.pop(f"{PREFIX}{hub}.{e}.{leaf}.lora_{side}.weight") for side in "AB")
                assert A.shape[0] == B.shape[1] == config["r"]
                parts[leaf].append(scaling * B @ A)
        gate, up, down = (torch.stack(parts[leaf]) for leaf in leaves)
        gate_up = (
            torch.stack((gate, up), 2).flatten(1, 2) if interleaved else torch.cat((gate, up), 1)
        )
        found[path] = {"gate_up": gate_up, "down": down}
    assert not [name for name in state if ".experts." in name], (
        "a server would not know what these are"
    )
    return found


def update_vllm_3d(folder, base):
    """vLLM's 3-D reader: PEFT's keys, A viewed [E, r, K], B viewed [N, r, E].

    Gate and up are in the model's own order.
    """
    state, config = tensors(folder), config_of(folder)
    assert config["peft_type"] == "LORA"
    assert "target_modules" in config
    scaling, found = config["lora_alpha"] / config["r"], {}
    for path in experts_paths(base):
        E, r = experts_count(base, path), config["r"]
        for projection, inner in (("gate_up", ".base_layer"), ("down", "")):
            A = state[f"{PREFIX}{path}{inner}.lora_A.weight"]
            B = state[f"{PREFIX}{path}{inner}.lora_B.weight"]
            A, B = A.reshape(E, r, -1), B.reshape(B.shape[0], r, E)
            found.setdefault(path, {})[projection] = scaling * torch.einsum("nre,erk->enk", B, A)
    return found


def update_sglang(folder, base, interleaved):
    """SGLang's 3-D reader: [E, r, K] and [E, N, r] by stacked names, scaling lora_alpha / r.

    The rows of gate_up are [gate; up] in every file.
    """
    state, config = tensors(folder), config_of(folder)
    assert config["peft_type"] == "LORA"
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    found = {}
    for path in experts_paths(base):
        for projection in ("gate_up", "down"):
            A, B = (state[f"{PREFIX}{path}.{projection}_proj.lora_{side}.weight"] for side in "AB")
            assert A.shape[1] == B.shape[2] == config["r"]
            if projection == "gate_up" and interleaved:
                B = torch.stack(B.chunk(2, 1), 2).flatten(1, 2)
            found.setdefault(path, {})[projection] = config["lora_alpha"] / config["r"] * B @ A
    return found


def update_mlx(folder, base, interleaved, leaves):
    """mlx-lm's reader: lora_a [E, r, K] and lora_b [E, N, r] of gate, up and down, times scale."""
    state = load_file(Path(folder, "adapters.safetensors"))
    config = config_of(folder)
    assert (config["fine_tune_type"], config["num_layers"]) == ("lora", -1)
    parameters, found = config["lora_parameters"], {}
    for path in experts_paths(base):
        block = path.removesuffix("experts")
        if leaves[0] == "w1":
            block = block.replace(".mlp.", ".block_sparse_moe.")
        deltas = []
        for part in DEFAULT_LEAVES:
            name = f"{block}{'experts' if interleaved else 'switch_mlp'}.{part}"
            assert re.sub(r"model\.layers\.\d+\.", "", name) in parameters["keys"]
            A, B = state[f"{name}.lora_a"], state[f"{name}.lora_b"]
            assert A.shape[1] == parameters["rank"]
            deltas.append(parameters["scale"] * B @ A)
        gate, up, down = deltas
        gate_up = (
            torch.stack((gate, up), 2).flatten(1, 2) if interleaved else torch.cat((gate, up), 1)
        )
        found[path] = {"gate_up": gate_up, "down": down}
    return found


# format -> its reader: (folder, case) -> update; every format but ours has one
UPDATE_READERS = {
    "peft": lambda folder, case: update_vllm_3d(folder, case.base),
    "per_expert": lambda folder, case: update_vllm_2d(
        folder, case.base, case.family in INTERLEAVED, LEAVES.get(case.family, DEFAULT_LEAVES)
    ),
    "vllm_3d": lambda folder, case: update_vllm_3d(folder, case.base),
    "mlx": lambda folder, case: update_mlx(
        folder, case.base, case.family in INTERLEAVED, LEAVES.get(case.family, DEFAULT_LEAVES)
    ),
    "sglang_3d": lambda folder, case: update_sglang(folder, case.base, case.family in INTERLEAVED),
}
# formats that PEFT loads as its own
READ_BY_PEFT = {"peft", "per_expert", "vllm_3d"}


def swap_experts(state, pattern, first=0, second=1):
    """Per-expert tensors of two experts exchanged: every name and shape stays."""
    swapped = {}
    for name, tensor in state.items():
        match = re.search(pattern, name)
        e = int(match[1]) if match else -1
        other = {first: second, second: first}.get(e, e)
        swapped[name if e < 0 else name[: match.start(1)] + str(other) + name[match.end(1) :]] = (
            tensor
        )
    return swapped
