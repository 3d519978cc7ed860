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
from peft import LoraModel
from safetensors.torch import save_file

from convert.adapters import (
    FAMILIES,
    MISREAD,
    PREFIX,
    READ_BY_PEFT,
    TOLERANCE,
    UPDATE_READERS,
    assert_same_update,
    config_of,
    experts_count,
    load,
    rewrite,
    save_ours,
    save_pefts,
    tensors,
    update_of_ours,
    write_theirs,
)
from helpers import E, R, assert_close, assert_share_of_order_one, experts_paths, outputs
from peft_moe_lora import convert_adapter, inspect_adapter, verify_adapter
from peft_moe_lora.convert.formats import FORMATS
from peft_moe_lora.files.tensor_file import RefusedError

every_format = pytest.mark.parametrize("to", UPDATE_READERS)


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
    assert_close(outputs(load(case.base, tmp_path / "back")), case.logits, 0, "logits")


@every_format
def test_the_readers_find_our_update(case, to, tmp_path):
    if (case.family, to) in MISREAD:
        return
    convert_adapter(case.ours, tmp_path / to, to=to, base_config=case.config)
    found = UPDATE_READERS[to](tmp_path / to, case)
    right = update_of_ours(case.ours, case.base)
    assert found.keys() == right.keys() == set(experts_paths(case.base))
    assert_same_update(found, right)


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
        ours = load(case.base, tmp_path / name)
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
    again = load(case.base, tmp_path / "again")
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
    assert_close(outputs(load(qwen.base, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")
    convert_adapter(tmp_path / "ours", tmp_path / "again", to="peft", base_config=qwen.config)
    assert_close(outputs(load(qwen.base, tmp_path / "again")), outputs(theirs), TOLERANCE, "logits")


def test_a_single_projection_that_nothing_names_is_refused(qwen, tmp_path):
    save_pefts(qwen.base, tmp_path / "theirs", target_parameters=["experts.down_proj"])
    rewrite(tmp_path / "theirs", target_parameters=None)
    with pytest.raises(RefusedError, match="target_parameters"):
        convert_adapter(tmp_path / "theirs", tmp_path / "out", to="moe_lora")
    convert_adapter(tmp_path / "theirs", tmp_path / "out", to="moe_lora", base_config=qwen.config)
    assert inspect_adapter(tmp_path / "out").projections == ("down",)


@every_format
def test_one_projection_is_served_with_the_other_at_zero(qwen, tmp_path, to):
    model = save_ours(qwen.base, tmp_path / "ours", target_projections=["down"])
    done = convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=qwen.config)
    if to == "peft":
        assert config_of(tmp_path / to)["target_parameters"] == ["experts.down_proj"]
    elif FORMATS[to].both_projections:
        assert "written as zeros" in " ".join(done.notes)
    if to in READ_BY_PEFT:
        assert_close(outputs(load(qwen.base, tmp_path / to)), outputs(model), TOLERANCE, "logits")
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
    targets = {"target_modules": list(leaves), "bias": "none"}
    write_theirs(folder, state, r=r, lora_alpha=alpha, **targets)
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
    assert_same_update(found, right)
    # PEFT puts them together in its own way: the same model
    assert_close(
        outputs(load(case.base, tmp_path / "ours")),
        outputs(load(case.base, tmp_path / "theirs")),
        TOLERANCE,
        "logits",
    )


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
