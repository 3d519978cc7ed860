"""Our format becomes every other one and comes back bit for bit.

PEFT loads our adapters and we load PEFT's, with equal logits.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraModel, PeftModel
from safetensors.torch import save_file

from convert.adapters import (
    FAMILIES,
    MISREAD,
    PREFIX,
    READ_BY_PEFT,
    UPDATE_READERS,
    config_of,
    experts_count,
    rewrite,
    save_base,
    save_ours,
    save_pefts,
    swap_experts,
    tensors,
    update_of_ours,
    update_vllm_2d,
    update_vllm_3d,
)
from helpers import (
    E,
    R,
    assert_close,
    assert_share_of_order_one,
    expert_major,
    experts_paths,
    outputs,
    tiny_model,
)
from peft_moe_lora import convert_adapter, inspect_adapter, verify_adapter
from peft_moe_lora.convert.formats import FORMATS
from peft_moe_lora.experts.families import HUB_NAMES
from peft_moe_lora.files.tensor_file import AdapterError, RefusedError

# fp32: what the promise of equal logits says; measured differences are below 1e-6
TOLERANCE = 1e-5
every_format = pytest.mark.parametrize("to", UPDATE_READERS)


def load(case, folder):
    return PeftModel.from_pretrained(copy.deepcopy(case.base), folder).eval()


@every_format
def test_there_and_back_is_bit_for_bit(case, to, tmp_path):
    if (case.family, to) in MISREAD:
        with pytest.raises(RefusedError, match=MISREAD[case.family, to]):
            convert_adapter(case.ours, tmp_path / to, to=to, base_config=case.config)
        assert not list(tmp_path.iterdir())
        return
    convert_adapter(case.ours, tmp_path / to, to=to, base_config=case.config)
    assert config_of(tmp_path / to)["peft_type"] == "LORA"
    back = convert_adapter(tmp_path / to, tmp_path / "back", to="moe_lora", base_config=case.config)
    assert back.source == ("peft" if to == "vllm_3d" else to)
    before, after = tensors(case.ours), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert_close(outputs(load(case, tmp_path / "back")), case.logits, 0, "logits")


@every_format
def test_the_readers_find_our_update(case, to, tmp_path):
    if (case.family, to) in MISREAD:
        return
    convert_adapter(case.ours, tmp_path / to, to=to, base_config=case.config)
    found = UPDATE_READERS[to](tmp_path / to, case)
    right = update_of_ours(case.ours, case.base)
    assert found.keys() == right.keys() == set(experts_paths(case.base))
    for path, updates in right.items():
        for projection, update in updates.items():
            assert_close(found[path][projection], update, TOLERANCE, f"{path}, {projection}")


def test_peft_loads_ours_without_knowing_of_us(made, tmp_path):
    """In a process of its own, in which the package is not imported."""
    todo = []
    for family in FAMILIES:
        case = made(family)
        for to in ("peft", "per_expert", "vllm_3d"):
            if (family, to) == ("gpt_oss", "per_expert") or (family, to) in MISREAD:
                continue  # PEFT has no per-expert form of gpt_oss
            folder = tmp_path / family / to
            convert_adapter(case.ours, folder, to=to, base_config=case.config)
            todo.append([family, str(folder)])
        save_file({"logits": case.logits}, tmp_path / f"{family}.safetensors")
    script = f"""
import json, sys, copy, functools
from helpers import tiny_model, outputs, relative_error
from peft import PeftModel, LoraModel
from safetensors.torch import load_file
base = functools.cache(tiny_model)
for family, folder in json.loads(sys.argv[1]):
    model = PeftModel.from_pretrained(copy.deepcopy(base(family)), folder).eval()
    right = load_file({str(tmp_path)!r} + f"/{{family}}.safetensors")["logits"]
    error = relative_error(outputs(model), right)
    assert type(model.base_model) is LoraModel and error < {TOLERANCE}, (family, folder, error)
assert "peft_moe_lora" not in sys.modules
"""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script, json.dumps(todo)]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_we_load_pefts(case, tmp_path):
    theirs = save_pefts(case.base, tmp_path / "theirs")
    assert_share_of_order_one(outputs(theirs), outputs(case.base), low=0.05)
    for base_config in (case.config, None):
        name = f"ours-{base_config is None}"
        convert_adapter(
            tmp_path / "theirs", tmp_path / name, to="moe_lora", base_config=base_config
        )
        ours = load(case, tmp_path / name)
        assert_close(outputs(ours), outputs(theirs), TOLERANCE, "logits")
    merged = copy.deepcopy(ours).merge_and_unload().state_dict()
    for name, weight in theirs.merge_and_unload().state_dict().items():
        assert_close(merged[name], weight, TOLERANCE, name)


def test_pefts_to_ours_to_peft(case, tmp_path):
    """The other order: what PEFT wrote, through ours, is what PEFT reads."""
    theirs = save_pefts(case.base, tmp_path / "theirs")
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora", base_config=case.config)
    convert_adapter(tmp_path / "ours", tmp_path / "again", to="peft", base_config=case.config)
    before, after = tensors(tmp_path / "theirs"), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = load(case, tmp_path / "again")
    assert type(again.base_model) is LoraModel
    assert_close(outputs(again), outputs(theirs), TOLERANCE, "logits")


@pytest.mark.parametrize(
    ("parameter", "projection"), [("gate_up_proj", "gate_up"), ("down_proj", "down")]
)
def test_one_target_of_pefts_has_the_outer_key(qwen, tmp_path, parameter, projection):
    theirs = save_pefts(qwen.base, tmp_path / "theirs", target_parameters=[f"experts.{parameter}"])
    assert not [name for name in tensors(tmp_path / "theirs") if "base_layer" in name]
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora")
    assert inspect_adapter(tmp_path / "ours").projections == (projection,)
    assert_close(outputs(load(qwen, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")
    convert_adapter(tmp_path / "ours", tmp_path / "again", to="peft", base_config=qwen.config)
    assert_close(outputs(load(qwen, tmp_path / "again")), outputs(theirs), TOLERANCE, "logits")


def test_a_single_projection_that_nothing_names_is_refused(qwen, tmp_path):
    save_pefts(qwen.base, tmp_path / "theirs", target_parameters=["experts.down_proj"])
    rewrite(tmp_path / "theirs", target_parameters=None)
    with pytest.raises(RefusedError, match="target_parameters"):
        convert_adapter(tmp_path / "theirs", tmp_path / "out", to="moe_lora")
    convert_adapter(tmp_path / "theirs", tmp_path / "out", to="moe_lora", base_config=qwen.config)
    assert inspect_adapter(tmp_path / "out").projections == ("down",)


def test_a_single_projection_of_an_old_peft_is_found_by_its_shapes(qwen, tmp_path):
    theirs = save_pefts(qwen.base, tmp_path / "theirs", target_parameters=["experts.down_proj"])
    rewrite(tmp_path / "theirs", swap_in_and_out, target_parameters=None, peft_version="0.18.1")
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora", base_config=qwen.config)
    assert inspect_adapter(tmp_path / "ours").projections == ("down",)
    assert_close(outputs(load(qwen, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")


@every_format
def test_one_projection_is_served_with_the_other_at_zero(qwen, tmp_path, to):
    model = save_ours(qwen.base, tmp_path / "ours", target_projections=["down"])
    done = convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=qwen.config)
    if to == "peft":
        assert config_of(tmp_path / to)["target_parameters"] == ["experts.down_proj"]
    elif FORMATS[to].both_projections:
        assert "written as zeros" in " ".join(done.notes)
    if to in READ_BY_PEFT:
        assert_close(outputs(load(qwen, tmp_path / to)), outputs(model), TOLERANCE, "logits")
    assert verify_adapter(tmp_path / "ours", qwen.config, tmp_path / to).ok


# ---- gate and up with A's of their own -----------------------------------------------------------


def per_expert_adapter(
    case, folder, leaves=("gate_proj", "up_proj", "down_proj"), r=4, alpha=12, shared=False
):
    """A per-expert adapter as a program without us writes it, and its update, expert by expert."""
    generator = torch.Generator().manual_seed(6)
    state, update = {}, {}
    for path in experts_paths(case.base):
        module = case.base.get_submodule(path)
        width, hidden = module.down_proj.shape[2], module.down_proj.shape[1]
        hub = path.replace(".mlp.", ".block_sparse_moe.") if leaves[0] == "w1" else path
        deltas = {leaf: [] for leaf in leaves}
        for e in range(experts_count(case.base, path)):
            for i, leaf in enumerate(leaves):
                K, N = (width, hidden) if i == 2 else (hidden, width)
                A = torch.randn(r, K, generator=generator) * 0.3
                if shared and i == 1:
                    A = state[f"{PREFIX}{hub}.{e}.{leaves[0]}.lora_A.weight"].clone()
                B = torch.randn(N, r, generator=generator) * 0.3
                (
                    state[f"{PREFIX}{hub}.{e}.{leaf}.lora_A.weight"],
                    state[f"{PREFIX}{hub}.{e}.{leaf}.lora_B.weight"],
                ) = (
                    A,
                    B,
                )
                deltas[leaf].append(alpha / r * B @ A)
        gate, up, down = (torch.stack(deltas[leaf]) for leaf in leaves)
        update[path] = {"gate_up": torch.cat((gate, up), 1), "down": down}
    folder.mkdir(parents=True)
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(leaves),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return update


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_per_expert_adapter_of_others(made, family, shared, tmp_path):
    """Different A's of gate and up become one A of twice the rank, and B gets blocks of zeros.

    Nothing is rounded.
    """
    case = made(family)
    leaves = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    right = per_expert_adapter(case, tmp_path / "theirs", leaves, shared=shared)
    done = convert_adapter(
        tmp_path / "theirs", tmp_path / "ours", to="moe_lora", base_config=case.config
    )
    assert any("twice the rank" in note for note in done.notes) is not shared
    assert any("padded with zeros" in note for note in done.notes) is not shared
    assert config_of(tmp_path / "ours")["r"] == (4 if shared else 8)
    found = update_of_ours(tmp_path / "ours", case.base)
    for path, updates in right.items():
        for projection, update in updates.items():
            assert_close(found[path][projection], update, TOLERANCE, f"{path}, {projection}")
    # PEFT puts them together in its own way: the same model
    assert_close(
        outputs(load(case, tmp_path / "ours")),
        outputs(load(case, tmp_path / "theirs")),
        TOLERANCE,
        "logits",
    )


# ---- PEFT before 0.19.1 --------------------------------------------------------------------------


def swap_in_and_out(state, count=E):
    """PEFT 0.18's tensors of the same update.

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


@pytest.mark.parametrize("with_base", [True, False])
def test_peft_0_18_swapped_in_and_out(qwen, tmp_path, with_base):
    theirs = save_pefts(qwen.base, tmp_path / "theirs")
    rewrite(tmp_path / "theirs", swap_in_and_out, peft_version="0.18.1")
    done = convert_adapter(
        tmp_path / "theirs",
        tmp_path / "ours",
        to="moe_lora",
        base_config=qwen.config if with_base else None,
    )
    assert done.source == "peft_legacy"
    assert "swapped" in " ".join(done.notes)
    assert_close(outputs(load(qwen, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")


@pytest.mark.parametrize("swap", [swap_in_and_out, None], ids=["swapped", "not swapped"])
def test_the_shapes_tell_where_nothing_else_does(qwen, swap, tmp_path):
    theirs = save_pefts(qwen.base, tmp_path / "theirs")
    rewrite(tmp_path / "theirs", swap, peft_version=None)
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora")
    assert_close(outputs(load(qwen, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")


def test_peft_0_19_0_swapped_one_and_not_the_other(qwen, tmp_path):
    theirs = save_pefts(qwen.base, tmp_path / "theirs")

    def swap_gate_up(state):
        return state | {n: t for n, t in swap_in_and_out(state).items() if "base_layer" in n}

    rewrite(tmp_path / "theirs", swap_gate_up, peft_version="0.19.0")
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora", base_config=qwen.config)
    assert_close(outputs(load(qwen, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")
    with pytest.raises(AdapterError, match="no experts projection"):
        convert_adapter(tmp_path / "theirs", tmp_path / "without", to="moe_lora")


def test_swapped_where_the_shapes_coincide(tmp_path):
    """With 2I = H gate_up alone has the same shape in both orders: the version has to tell.

    0.19.0 does not tell.
    """
    base = tiny_model(moe_intermediate_size=16)  # H = 32
    base.config.save_pretrained(tmp_path / "base")
    theirs = save_pefts(base, tmp_path / "theirs", target_parameters=["experts.gate_up_proj"])
    right = outputs(theirs)

    def converted(name):
        convert_adapter(
            tmp_path / "theirs", tmp_path / name, to="moe_lora", base_config=tmp_path / "base"
        )
        return outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name).eval())

    assert_close(converted("new"), right, TOLERANCE, "logits")
    rewrite(tmp_path / "theirs", swap_in_and_out, peft_version="0.18.0")
    assert_close(converted("old"), right, TOLERANCE, "logits")
    for version in ("0.19.0", None):
        rewrite(tmp_path / "theirs", peft_version=version)
        with pytest.raises(RefusedError, match="peft_version"):
            converted("unknown")
        assert not (tmp_path / "unknown").exists()


# ---- the order of B ------------------------------------------------------------------------------


def reorder_B(state, count=E):
    return {n: expert_major(t, count) if ".lora_B." in n else t for n, t in state.items()}


def test_unsloth_has_to_say_its_order(qwen, tmp_path):
    theirs = save_pefts(qwen.base, tmp_path / "theirs")
    rewrite(tmp_path / "theirs", reorder_B, auto_mapping={"unsloth_fixed": True})
    with pytest.raises(RefusedError, match="--b-layout"):
        convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora")
    assert not (tmp_path / "ours").exists()
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora", b_layout="expert_major")
    assert_close(outputs(load(qwen, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")
    rewrite(tmp_path / "theirs", lora_B_layout="expert_major")  # a marker is believed
    convert_adapter(tmp_path / "theirs", tmp_path / "marked", to="moe_lora")
    assert verify_adapter(tmp_path / "ours", qwen.config, tmp_path / "marked").max_error == 0
    rewrite(tmp_path / "theirs", lora_B_layout="zigzag")
    with pytest.raises(RefusedError, match="zigzag"):
        convert_adapter(tmp_path / "theirs", tmp_path / "again", to="moe_lora")


def test_the_name_of_the_base_gives_unsloth_away(qwen, tmp_path):
    save_pefts(qwen.base, tmp_path / "theirs")
    rewrite(tmp_path / "theirs", base_model_name_or_path="unsloth/Qwen3-30B-A3B")
    with pytest.raises(RefusedError, match="--b-layout"):
        convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora")
    assert not (tmp_path / "ours").exists()


def test_verify_catches_a_mix_up_of_orders_and_of_experts(case, tmp_path):
    """Both keep every name and shape; a conversion that did this would look fine."""
    for to in ("peft", "per_expert"):
        convert_adapter(case.ours, tmp_path / to, to=to, base_config=case.config)
        assert verify_adapter(case.ours, case.config, tmp_path / to).max_error == 0
    count = experts_count(case.base, experts_paths(case.base)[0])
    rewrite(tmp_path / "peft", lambda state: reorder_B(state, count))
    rewrite(tmp_path / "per_expert", lambda state: swap_experts(state, r"experts\.(\d+)\."))
    for wrong in ("peft", "per_expert"):
        found = verify_adapter(case.ours, case.config, tmp_path / wrong)
        assert found.max_error > 0.3, wrong


def test_the_readers_catch_the_same_mistakes(qwen, tmp_path):
    """That the oracles above can fail: B in our order under PEFT's keys, two experts swapped."""
    right = update_of_ours(qwen.ours, qwen.base)
    convert_adapter(qwen.ours, tmp_path / "v", to="vllm_3d", base_config=qwen.config)
    rewrite(tmp_path / "v", reorder_B)
    convert_adapter(qwen.ours, tmp_path / "p", to="per_expert", base_config=qwen.config)
    rewrite(tmp_path / "p", lambda state: swap_experts(state, r"experts\.(\d+)\."))
    for found in (
        update_vllm_3d(tmp_path / "v", qwen.base),
        update_vllm_2d(tmp_path / "p", qwen.base, False),
    ):
        path = next(iter(right))
        assert (found[path]["down"] - right[path]["down"]).abs().max() > 0.3 * right[path][
            "down"
        ].abs().max()


# ---- scalings, ranks, what travels along ---------------------------------------------------------


@every_format
def test_every_scaling_and_rank_arrives(qwen, tmp_path, to):
    """rsLoRA, ranks and alphas by pattern, and attention at once: every reader agrees."""
    model = save_ours(
        qwen.base,
        tmp_path / "ours",
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["experts", "q_proj", "v_proj"],
        rank_pattern={"layers.1.mlp.experts": 2, "q_proj": 3},
        alpha_pattern={"layers.0.mlp.experts": 5},
    )
    done = convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=qwen.config)
    config, notes = config_of(tmp_path / to), " ".join(done.notes)
    if FORMATS[to].one_rank:
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        assert not config["use_rslora"]
        assert "padded with zeros to 4" in notes
        assert "folded into B" in notes
    if to in READ_BY_PEFT:
        assert_close(outputs(load(qwen, tmp_path / to)), outputs(model), TOLERANCE, "logits")
    assert verify_adapter(tmp_path / "ours", qwen.config, tmp_path / to).ok
    convert_adapter(tmp_path / to, tmp_path / "back", to="moe_lora", base_config=qwen.config)
    assert_close(outputs(load(qwen, tmp_path / "back")), outputs(model), TOLERANCE, "logits")


def test_attention_router_and_saved_modules_travel(qwen, tmp_path):
    model = save_ours(qwen.base, tmp_path / "ours", target_modules=["experts", "q_proj", "v_proj"],
                      modules_to_save=["lm_head"])  # fmt: skip
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head").modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "ours")
    for to in ("peft", "per_expert"):
        done = convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=qwen.config)
        assert_close(outputs(load(qwen, tmp_path / to)), outputs(model), TOLERANCE, "logits")
    assert any("LoRA alone" in note for note in done.notes)
    for to in ("vllm_3d", "sglang_3d"):
        with pytest.raises(RefusedError, match="loads LoRA alone"):
            convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=qwen.config)


@pytest.mark.parametrize("with_base", [True, False])
def test_a_router_of_pefts_travels(qwen, tmp_path, with_base):
    targets = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    theirs = save_pefts(
        qwen.base, tmp_path / "theirs", target_parameters=targets, rank_pattern={"gate.weight": 2}
    )
    base_config = qwen.config if with_base else None
    assert [n for n in tensors(tmp_path / "theirs") if "mlp.gate.lora_A" in n]
    for to in ("moe_lora", "peft", *(["vllm_3d", "per_expert"] if with_base else [])):
        convert_adapter(tmp_path / "theirs", tmp_path / to, to=to, base_config=base_config)
        assert_close(outputs(load(qwen, tmp_path / to)), outputs(theirs), TOLERANCE, to)
    assert config_of(tmp_path / "moe_lora")["rank_pattern"] == {"gate": 2}


@pytest.mark.parametrize("with_base", [True, False])
def test_a_router_of_ours_travels_and_comes_back(qwen, tmp_path, with_base):
    """For PEFT a router is a parameter, for us and for servers a module.

    Without the base model the file itself has to say which.
    """
    targets = ["experts", "gate", "q_proj", "v_proj"]
    ours = save_ours(qwen.base, tmp_path / "ours", target_modules=targets, rank_pattern={"gate": 2})
    base_config = qwen.config if with_base else None
    for to in ("moe_lora", "peft", *(["vllm_3d", "per_expert"] if with_base else [])):
        convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=base_config)
        assert_close(outputs(load(qwen, tmp_path / to)), outputs(ours), TOLERANCE, to)
        convert_adapter(
            tmp_path / to, tmp_path / "back", to="moe_lora", base_config=base_config, force=True
        )
        assert_close(
            outputs(load(qwen, tmp_path / "back")), outputs(ours), TOLERANCE, f"{to} and back"
        )
    assert "gate.weight" in config_of(tmp_path / "peft")["target_parameters"]
    assert config_of(tmp_path / "peft")["rank_pattern"] == {"gate.weight": 2}
    if with_base:
        assert verify_adapter(tmp_path / "ours", qwen.config, tmp_path / "per_expert").ok


def test_a_router_that_is_a_linear_layer_with_a_forward_of_its_own_travels(tmp_path):
    """phimoe's router is a linear layer that returns a tuple, so for PEFT it is a parameter too."""
    base = save_base("phimoe", tmp_path / "base")
    model = save_ours(base, tmp_path / "ours", target_modules=["experts", "router"])
    for to in ("peft", "moe_lora"):
        convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=tmp_path / "base")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / to).eval()
        assert_close(outputs(loaded), outputs(model), TOLERANCE, to)
    assert "router.weight" in config_of(tmp_path / "peft")["target_parameters"]
    convert_adapter(
        tmp_path / "peft", tmp_path / "back", to="moe_lora", base_config=tmp_path / "base"
    )
    assert tensors(tmp_path / "back").keys() == tensors(tmp_path / "ours").keys()


def test_routers_saved_whole_travel_with_what_ends_on_their_name(tmp_path):
    """PEFT matches modules_to_save by the ends of names: "gate" matches shared_expert_gate too."""
    base = save_base("qwen2_moe", tmp_path / "base")
    model = save_ours(base, tmp_path / "ours", modules_to_save=["gate"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    saved = {
        name.split(".")[-2] for name in tensors(tmp_path / "ours") if name.endswith("gate.weight")
    }
    assert saved == {"gate", "shared_expert_gate"}
    model.save_pretrained(tmp_path / "ours")
    for to in ("peft", "moe_lora"):
        convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=tmp_path / "base")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / to)
        assert_close(outputs(loaded), outputs(model), TOLERANCE, to)


def test_what_some_reader_would_refuse_is_said(qwen, tmp_path):
    save_ours(qwen.base, tmp_path / "q", target_modules=["experts", "q_proj"])
    with pytest.raises(RefusedError, match=r"q_proj and v_proj together only.*has q_proj"):
        convert_adapter(tmp_path / "q", tmp_path / "out", to="sglang_3d", base_config=qwen.config)
    done = convert_adapter(
        tmp_path / "q", tmp_path / "out", to="per_expert", base_config=qwen.config
    )
    assert any("q_proj and v_proj together only" in note for note in done.notes)
    save_ours(qwen.base, tmp_path / "r", r=600, randomize=False)
    with pytest.raises(RefusedError, match="ranks up to 512"):
        convert_adapter(tmp_path / "r", tmp_path / "r-out", to="vllm_3d", base_config=qwen.config)
    with pytest.raises(RefusedError, match="--base-config"):
        convert_adapter(qwen.ours, tmp_path / "no-base", to="per_expert")


def test_adapted_layers_are_named_where_not_all_are(qwen, tmp_path):
    model = save_ours(qwen.base, tmp_path / "ours", layers_to_transform=[1])
    for base_config in (qwen.config, None):
        convert_adapter(
            tmp_path / "ours", tmp_path / "peft", to="peft", base_config=base_config, force=True
        )
        targets = config_of(tmp_path / "peft")["target_parameters"]
        assert targets == [f"model.layers.1.mlp.experts.{n}" for n in ("down_proj", "gate_up_proj")]
        assert_close(outputs(load(qwen, tmp_path / "peft")), outputs(model), TOLERANCE, "logits")


def test_bf16_stays_bf16(qwen, tmp_path):
    save_ours(qwen.base, tmp_path / "ours", target_modules=["experts", "q_proj"])
    rewrite(
        tmp_path / "ours",
        lambda state: {n: t.bfloat16() if "experts" in n else t for n, t in state.items()},
    )
    convert_adapter(tmp_path / "ours", tmp_path / "p", to="per_expert", base_config=qwen.config)
    dtypes = {("experts" in n): t.dtype for n, t in tensors(tmp_path / "p").items()}
    assert dtypes == {True: torch.bfloat16, False: torch.float32}
    assert verify_adapter(tmp_path / "ours", qwen.config, tmp_path / "p").max_error == 0


def test_names_of_a_text_model_and_of_one_within_a_larger(qwen, tmp_path):
    """model.layers meets model.language_model.layers: the base says which it is."""

    def inner(state):
        return {
            n.replace("model.model.layers", "model.model.language_model.layers"): t
            for n, t in state.items()
        }

    convert_adapter(qwen.ours, tmp_path / "p", to="per_expert", base_config=qwen.config)
    rewrite(tmp_path / "p", inner)
    convert_adapter(tmp_path / "p", tmp_path / "ours", to="moe_lora", base_config=qwen.config)
    assert tensors(tmp_path / "ours").keys() == tensors(qwen.ours).keys()


def test_hub_names_are_transformers_own():
    """The table of old names against the mapping transformers loads checkpoints with."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for model_type, names in HUB_NAMES.items():
        mapping = get_checkpoint_conversion_mapping(model_type)
        if mapping is None:
            continue  # a family that this transformers does not have yet
        sources = [p.replace("\\", "") for c in mapping for p in c.source_patterns]
        of_experts = [s.rpartition(".weight")[0] for s in sources if ".experts.*" in s]
        leaves = {s.rpartition(".")[2] for s in of_experts}
        assert leaves == {names.gate, names.up, names.down}
        assert any("block_sparse_moe" in s for s in sources) == (names.block != "mlp")
        key = f"model.layers.0.mlp.experts.3.{names.up}.lora_A"
        assert names.from_hub(names.to_hub(key)) == key
    assert HUB_NAMES["phimoe"].to_hub("layers.0.mlp.router") == "layers.0.block_sparse_moe.gate"
    assert HUB_NAMES["kimi_linear"].to_hub("layers.0.mlp.gate_proj") == "layers.0.mlp.gate_proj"


def test_no_family_with_names_of_its_own_is_forgotten():
    """Every model type of the installed transformers whose published experts are w1, w2, w3."""
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for model_type in CONFIG_MAPPING:
        sources = [
            p
            for c in get_checkpoint_conversion_mapping(model_type) or ()
            for p in c.source_patterns
        ]
        if any("experts.*.w1" in s.replace("\\", "") for s in sources):
            assert model_type in HUB_NAMES


def test_inspect_says_what_an_adapter_is(qwen):
    found = inspect_adapter(qwen.ours, qwen.config)
    assert (found.format, found.modules, found.num_experts, found.ranks) == (
        "moe_lora",
        2,
        (E,),
        {R: 4},
    )
    assert found.projections == ("gate_up", "down")
    assert found.scalings == {2.0: 4}
    assert all(answer.startswith("ok") for answer in found.readers.values())
    assert "--base-config" in inspect_adapter(qwen.ours).readers["per_expert"]
    assert found.parameters == sum(t.numel() for t in tensors(qwen.ours).values())
