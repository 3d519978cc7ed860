"""Write the golden adapters: one small update per family, in every format.

    python tests/golden/write.py NAME       add one format, NAME, to the families that are there
    python tests/golden/write.py            write all again, only if the families change

A format's files are not written again when the code changes: every release has to read what
earlier ones wrote. peft_moe_lora 0.1.0 saved `moe_lora`, PEFT 0.21.0 saved `peft`; `spelled_out`
has the other formats, from their definitions. `expected.safetensors` holds scaling * B[e] A[e] as
PEFT computes it, [E, N, K] for every projection.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from peft import LoraConfig, get_peft_model  # noqa: E402
from peft.tuners.lora.layer import ParamWrapper  # noqa: E402

from convert.adapters import PREFIX, save_ours  # noqa: E402 the path is made above
from helpers import tiny_model  # noqa: E402

E, R, ALPHA = 3, 2, 3
STACKS = ("gate_up_proj", "down_proj")
H, I = 8, 6  # noqa: E741 I is the glossary's letter
LINEAR = {
    "hidden_size": H,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "vocab_size": 8,
}
FAMILIES = {
    "qwen3_moe": {**LINEAR, "moe_intermediate_size": I, "num_experts": E},
    "mixtral": {**LINEAR, "intermediate_size": I, "num_local_experts": E},
    "gpt_oss": {
        **LINEAR,
        "intermediate_size": I,
        "num_local_experts": E,
        "layer_types": ["full_attention"],
    },
}


def write(family):
    """All formats of a family; what is there goes."""
    folder = HERE / family
    shutil.rmtree(folder, ignore_errors=True)
    base = tiny_model(family, **FAMILIES[family])
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(folder / "base")
    save_ours(
        base,
        folder / "moe_lora",
        r=R,
        lora_alpha=ALPHA,
        target_modules=["experts", "q_proj", "v_proj"],
    )
    path, A, B, linears = read_ours(folder)
    peft = write_pefts(base, folder, path, A, B, linears)
    write_expected(peft, folder, path)
    for name in spelled_out(family):
        add(family, name)
    for card in folder.glob("*/README.md"):
        card.unlink()


def add(family, name):
    """One more format of a family: the adapter that is there in the others."""
    if name == "mlx":
        save(HERE / family / name, *mlx(family), file="adapters.safetensors")
        return
    state, config = spelled_out(family)[name]
    config = {
        "peft_type": "LORA",
        "r": R,
        "lora_alpha": ALPHA,
        "bias": "none",
        "task_type": None,
    } | config
    save(HERE / family / name, state, config)


def read_ours(folder):
    """Our own file, by our layout: experts' path, A[e] and B[e] by projection, other tensors.

    A[e] is [r, K], B[e] is [N, r].
    """
    ours = load_file(folder / "moe_lora" / "adapter_model.safetensors")
    linears = {name: t for name, t in ours.items() if "self_attn" in name}
    (key,) = (name for name in ours if name.endswith(".lora_A.gate_up"))
    path = key.removeprefix(PREFIX).removesuffix(".lora_A.gate_up")
    A = {
        p: [ours[f"{PREFIX}{path}.lora_A.{p}"][e * R : (e + 1) * R] for e in range(E)]
        for p in ("gate_up", "down")
    }
    B = {
        p: [ours[f"{PREFIX}{path}.lora_B.{p}"][:, e * R : (e + 1) * R] for e in range(E)]
        for p in ("gate_up", "down")
    }
    return path, A, B, linears


def spelled_out(family):
    """{format: (tensors, what its adapter_config.json says besides rank and alpha)}."""
    path, A, B, linears = read_ours(HERE / family)
    theirs = load_file(HERE / family / "peft" / "adapter_model.safetensors")
    targets = {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    expert_major = dict(theirs)
    for name, t in theirs.items():
        if "experts" in name and "lora_B" in name:
            expert_major[name] = torch.cat([t[:, e::E] for e in range(E)], 1)
    marked = {"lora_B_layout": "expert_major", "auto_mapping": {"unsloth_fixed": True}}
    found = {
        "vllm_3d": (theirs, targets),
        "unsloth": (expert_major, {**targets, **marked}),
        "per_expert": ({**per_expert(family, path, A, B), **linears}, per_expert_targets(family)),
    }
    noted = {name: {"lora_B_layout": "grouped_by_expert", "num_experts": E} for name in STACKS}
    note = {"lora_A_layout": "grouped_by_expert", "parameters": noted}
    found["unsloth_noted"] = (expert_major, {**targets, "unsloth_fused_expert_lora": note})
    gate, up = (torch.stack(rows) for rows in zip(*map(halves(family), B["gate_up"]), strict=True))
    stacked = {
        "gate_up_proj": (torch.stack(A["gate_up"]), torch.cat([gate, up], 1)),
        "down_proj": (torch.stack(A["down"]), torch.stack(B["down"])),
    }
    apart = {
        "w1": (torch.stack(A["gate_up"]), gate),
        "w3": (torch.stack(A["gate_up"]), up),
        "w2": stacked["down_proj"],
    }
    found["sglang_3d"] = three_dimensional(path, stacked, linears)
    found["tinker"] = three_dimensional(path, apart, linears)
    # transposed stacks were never swapped
    if family != "gpt_oss":
        found["peft_legacy"] = (
            {**legacy(path, A, B), **linears},
            {**targets, "peft_version": "0.18.1"},
        )
    return found


def mlx(family):
    """(tensors, configuration) as mlx-lm writes them."""
    path, A, B, linears = read_ours(HERE / family)
    block = path.replace("mlp", "block_sparse_moe") if family == "mixtral" else path
    if family != "gpt_oss":
        block = block.replace("experts", "switch_mlp")
    gate, up = (torch.stack(rows) for rows in zip(*map(halves(family), B["gate_up"]), strict=True))
    pairs = {"gate_proj": ("gate_up", gate), "up_proj": ("gate_up", up)}
    pairs["down_proj"] = ("down", torch.stack(B["down"]))
    state = {}
    for name, (projection, side_B) in pairs.items():
        state[f"{block}.{name}.lora_a"] = torch.stack(A[projection])
        state[f"{block}.{name}.lora_b"] = side_B
    for name, t in linears.items():
        short = name.removeprefix(PREFIX).removesuffix(".weight")
        state[short.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = t.T
    keys = sorted({name.split(".", 3)[3].rpartition(".")[0] for name in state})
    parameters = {"rank": R, "scale": ALPHA / R, "dropout": 0.0, "keys": keys}
    return state, {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}


def halves(family):
    """A function that takes B [2I, r] of gate_up apart."""
    if family == "gpt_oss":
        return lambda B: (B[0::2], B[1::2])
    return lambda B: B.chunk(2)


def three_dimensional(path, pairs, linears):
    """(tensors, targets) of A [E, r, K] and B [E, N, r] by name."""
    state = {}
    for name, (A, B) in pairs.items():
        state[f"{PREFIX}{path}.{name}.lora_A.weight"] = A
        state[f"{PREFIX}{path}.{name}.lora_B.weight"] = B
    return {**state, **linears}, {"target_modules": [*pairs, "q_proj", "v_proj"]}


def write_pefts(base, folder, path, A, B, linears):
    config = LoraConfig(
        r=R,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = get_peft_model(copy.deepcopy(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.replace(".default", "") in linears:
                parameter.copy_(linears[name.replace(".default", "")])
        for projection, wrapper in wrappers(model, path).items():
            wrapper.lora_A["default"].weight.copy_(torch.cat(A[projection]))
            # rank-major: column j*E + e
            columns = [B[projection][e][:, j] for j in range(R) for e in range(E)]
            wrapper.lora_B["default"].weight.copy_(torch.stack(columns, 1))
    model.save_pretrained(folder / "peft")
    return model


def write_expected(model, folder, path):
    expected = {}
    for projection, wrapper in wrappers(model, path).items():
        update = wrapper.get_delta_weight("default").detach()
        transposed = getattr(wrapper.get_base_layer(), "is_transposed", False)
        expected[projection] = (update.mT if transposed else update).contiguous()
    save_file(expected, folder / "expected.safetensors")


def wrappers(model, path):
    module, found = model.get_submodule(PREFIX + path), {}
    while isinstance(module, ParamWrapper):
        found[module.parameter_name.removesuffix("_proj")] = module
        module = module.base_layer
    return found


def per_expert(family, path, A, B):
    gate, up, down = (
        ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    )
    hub = path.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else path
    state = {}
    for e in range(E):
        both = B["gate_up"][e]
        halves = (both[0::2], both[1::2]) if family == "gpt_oss" else (both[:I], both[I:])
        for leaf, a, b in ((gate, A["gate_up"][e], halves[0]), (up, A["gate_up"][e], halves[1]),
                           (down, A["down"][e], B["down"][e])):  # fmt: skip
            (
                state[f"{PREFIX}{hub}.{e}.{leaf}.lora_A.weight"],
                state[f"{PREFIX}{hub}.{e}.{leaf}.lora_B.weight"],
            ) = a, b
    return state


def per_expert_targets(family):
    names = ["w1", "w3", "w2"] if family == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    return {"target_modules": [*names, "q_proj", "v_proj"]}


def legacy(path, A, B):
    """PEFT 0.18 read a parameter [E, N, K] as [E, in, out]: A' over N and B' over K, transposed."""
    state = {}
    for projection, inner in (("gate_up", ".base_layer"), ("down", "")):
        columns = [A[projection][e][j] for j in range(R) for e in range(E)]
        state[f"{PREFIX}{path}{inner}.lora_A.weight"] = torch.cat([b.T for b in B[projection]])
        state[f"{PREFIX}{path}{inner}.lora_B.weight"] = torch.stack(columns, 1)
    return state


def save(folder, state, config, file="adapter_model.safetensors"):
    folder.mkdir()
    tensors = {n: t.detach().contiguous().clone() for n, t in state.items()}
    save_file(tensors, folder / file, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    for family in FAMILIES:
        if not sys.argv[1:]:
            write(family)
            continue
        (name,) = sys.argv[1:]
        # what was written once stays
        if name in (*spelled_out(family), "mlx") and not (HERE / family / name).exists():
            add(family, name)
