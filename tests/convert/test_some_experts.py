"""Adapters on some experts in every format.

Where a reader wants all experts, the others are zeros; nothing is lost.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from convert.adapters import (
    MISREAD,
    UPDATE_READERS,
    config_of,
    rewrite,
    save_base,
    save_ours,
    tensors,
    update_vllm_3d,
)
from helpers import E, R, assert_close, experts_paths, outputs
from peft_moe_lora import convert_adapter, inspect_adapter, merge_adapter, verify_adapter
from peft_moe_lora.files.tensor_file import AdapterError

TOLERANCE = 1e-5
CHOSEN = {"model.layers.0.mlp.experts": [1, 3], "model.layers.1.mlp.experts": [0]}


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss"])
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = save_base(request.param, folder / "base")
    base.save_pretrained(folder / "base")
    model = save_ours(base, folder / "ours", expert_indices=CHOSEN)
    return SimpleNamespace(
        family=request.param, base=base, config=folder / "base", ours=folder / "ours", model=model
    )


def updates(case):
    """{path: {projection: [E, N, K]}}, from the definition of the layout; one rank, one scaling."""
    state, found = tensors(case.ours), {}
    for path, chosen in CHOSEN.items():
        for projection in ("gate_up", "down"):
            A, B = (state[f"base_model.model.{path}.lora_{side}.{projection}"] for side in "AB")
            dense = torch.zeros(E, B.shape[0], A.shape[1])
            for s, e in enumerate(chosen):
                dense[e] = 2.0 * B[:, s * R : (s + 1) * R] @ A[s * R : (s + 1) * R]
            found.setdefault(path, {})[projection] = dense
    return found


@pytest.mark.parametrize("to", UPDATE_READERS)
def test_the_readers_find_zeros_for_the_others(case, to, tmp_path):
    if (case.family, to) in MISREAD:
        return
    done = convert_adapter(case.ours, tmp_path / to, to=to, base_config=case.config)
    assert done.experts == 3
    assert any("written as zeros" in note for note in done.notes)
    found = UPDATE_READERS[to](tmp_path / to, case)
    for path, right in updates(case).items():
        for projection, update in right.items():
            assert_close(found[path][projection], update, TOLERANCE, f"{path}, {projection}")
    assert "expert_indices" not in config_of(tmp_path / to)
    assert verify_adapter(case.ours, case.config, tmp_path / to).ok
    back = PeftModel.from_pretrained(copy.deepcopy(case.base), _back(tmp_path, to, case))
    assert_close(outputs(back.eval()), outputs(case.model), TOLERANCE, "logits")


def _back(folder, to, case):
    convert_adapter(folder / to, folder / "back", to="moe_lora", base_config=case.config)
    return folder / "back"


@pytest.mark.parametrize("known", [True, False])
def test_ours_into_ours_keeps_the_choice(case, known, tmp_path):
    convert_adapter(
        case.ours, tmp_path / "again", to="moe_lora", base_config=case.config if known else None
    )
    before, after = tensors(case.ours), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert config_of(tmp_path / "again")["expert_indices"] == CHOSEN
    assert config_of(tmp_path / "again")["format_version"] == 2
    documents = []
    for folder in (case.ours, tmp_path / "again"):
        with safe_open(folder / "adapter_model.safetensors", "pt") as f:
            documents.append(json.loads(f.metadata()["peft_moe_lora"]))
    assert documents[0] == documents[1]


def test_a_file_without_metadata_needs_its_base(case, tmp_path):
    case.model.save_pretrained(tmp_path / "bare")
    rewrite(tmp_path / "bare", state=lambda state: state)
    with pytest.raises(ValueError, match="is not known; name the base model"):
        inspect_adapter(tmp_path / "bare")
    assert inspect_adapter(tmp_path / "bare", case.config).num_experts == (E,)
    convert_adapter(tmp_path / "bare", tmp_path / "again", to="moe_lora", base_config=case.config)
    assert config_of(tmp_path / "again")["expert_indices"] == CHOSEN


def test_one_projection_is_filled_in_for_the_same_experts(case, tmp_path):
    save_ours(case.base, tmp_path / "down", expert_indices=CHOSEN, target_projections=["down"])
    convert_adapter(tmp_path / "down", tmp_path / "vllm", to="vllm_3d", base_config=case.config)
    found = update_vllm_3d(tmp_path / "vllm", case.base)
    for path, chosen in CHOSEN.items():
        assert not found[path]["gate_up"].any()
        assert [e for e in range(E) if found[path]["down"][e].any()] == chosen


def test_merging_files_is_merging_in_memory(case, tmp_path):
    merge_adapter(case.ours, case.config, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), outputs(case.model), TOLERANCE, "logits")
    state, right = merged.state_dict(), copy.deepcopy(case.model).merge_and_unload().state_dict()
    base = case.base.state_dict()
    for path in experts_paths(case.base):
        others = [e for e in range(E) if e not in CHOSEN[path]]
        for name in ("gate_up_proj", "down_proj"):
            assert_close(state[f"{path}.{name}"], right[f"{path}.{name}"], TOLERANCE, name)
            assert torch.equal(state[f"{path}.{name}"][others], base[f"{path}.{name}"][others])


def test_inspection_counts_the_chosen(case):
    found = inspect_adapter(case.ours, case.config)
    assert (found.modules, found.num_experts, found.adapted) == (2, (E,), 3)
    assert found.parameters == sum(t.numel() for t in tensors(case.ours).values())
    assert found.readers["moe_lora"] == "ok"
    assert "written as zeros" in found.readers["peft"]


def test_two_choices_are_told_apart(case, tmp_path):
    save_ours(
        case.base, tmp_path / "other", expert_indices=CHOSEN | {"model.layers.1.mlp.experts": [2]}
    )
    assert not verify_adapter(case.ours, case.config, tmp_path / "other").ok


@pytest.mark.parametrize(
    "indices",
    [
        {"experts": [1]},
        {"experts": [1, 2]},
        {"experts": "all"},
        None,
        {"layers.0.mlp.experts": [1, 3]},
    ],
    ids=str,
)
def test_files_that_do_not_belong_together_are_refused(case, indices, tmp_path):
    case.model.save_pretrained(tmp_path / "ours")
    rewrite(tmp_path / "ours", expert_indices=indices)
    for base in (None, case.config):
        with pytest.raises(AdapterError):
            convert_adapter(tmp_path / "ours", tmp_path / "out", to="peft", base_config=base)
        assert not (tmp_path / "out").exists()
