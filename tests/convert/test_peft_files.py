"""Files under PEFT's keys: those of old releases, and those with B in another order."""

import pytest

from convert.adapters import (
    TOLERANCE,
    experts_count,
    load,
    rewrite,
    save_pefts,
    swap_experts,
    swap_in_and_out,
    update_of_ours,
    update_vllm_2d,
    update_vllm_3d,
)
from helpers import E, assert_close, expert_major, experts_paths, outputs, tiny_model
from peft_moe_lora import convert_adapter, inspect_adapter, verify_adapter
from peft_moe_lora.files.tensor_file import AdapterError, RefusedError

# ---- PEFT before 0.19.1 --------------------------------------------------------------------------


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
    assert_close(outputs(load(qwen.base, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")


@pytest.mark.parametrize("swap", [swap_in_and_out, None], ids=["swapped", "not swapped"])
def test_the_shapes_tell_where_nothing_else_does(qwen, swap, tmp_path):
    theirs = save_pefts(qwen.base, tmp_path / "theirs")
    rewrite(tmp_path / "theirs", swap, peft_version=None)
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora")
    assert_close(outputs(load(qwen.base, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")


def test_peft_0_19_0_swapped_one_and_not_the_other(qwen, tmp_path):
    theirs = save_pefts(qwen.base, tmp_path / "theirs")

    def swap_gate_up(state):
        return state | {n: t for n, t in swap_in_and_out(state).items() if "base_layer" in n}

    rewrite(tmp_path / "theirs", swap_gate_up, peft_version="0.19.0")
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora", base_config=qwen.config)
    assert_close(outputs(load(qwen.base, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")
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
        return outputs(load(base, tmp_path / name))

    assert_close(converted("new"), right, TOLERANCE, "logits")
    rewrite(tmp_path / "theirs", swap_in_and_out, peft_version="0.18.0")
    assert_close(converted("old"), right, TOLERANCE, "logits")
    for version in ("0.19.0", None):
        rewrite(tmp_path / "theirs", peft_version=version)
        with pytest.raises(RefusedError, match="peft_version"):
            converted("unknown")
        assert not (tmp_path / "unknown").exists()


def test_a_single_projection_of_an_old_peft_is_found_by_its_shapes(qwen, tmp_path):
    theirs = save_pefts(qwen.base, tmp_path / "theirs", target_parameters=["experts.down_proj"])
    rewrite(tmp_path / "theirs", swap_in_and_out, target_parameters=None, peft_version="0.18.1")
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora", base_config=qwen.config)
    assert inspect_adapter(tmp_path / "ours").projections == ("down",)
    assert_close(outputs(load(qwen.base, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")


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
    assert_close(outputs(load(qwen.base, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")
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
