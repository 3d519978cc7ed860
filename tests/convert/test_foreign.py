"""Adapters as other programs write them: read exactly, or refused with what to do about them."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from convert.adapters import (
    INTERLEAVED,
    PREFIX,
    config_of,
    experts_count,
    rewrite,
    save_base,
    save_ours,
    save_pefts,
    tensors,
    update_of_ours,
)
from helpers import assert_close, expert_major, experts_paths, outputs
from peft_moe_lora import convert_adapter, inspect_adapter, load_peft_adapter
from peft_moe_lora.files.tensor_file import AdapterError, RefusedError

R, ALPHA = 4, 12
TOLERANCE = 1e-6
# gate, up and down
NAMES = {"Tinker": ("w1", "w3", "w2"), "published": ("gate_proj", "up_proj", "down_proj")}


def random(generator, *shape):
    return torch.randn(shape, generator=generator) * 0.3


def apart(case, names, shared=()):
    """3-D tensors of gate, up and down, and the update that they mean.

    Args:
        shared: the tensors that all experts share, such as "gate.A".
    """
    generator = torch.Generator().manual_seed(3)
    state, update = {}, {}
    for path in experts_paths(case.base):
        E = experts_count(case.base, path)
        H, width = 32, 24
        deltas = {}
        for part, name, K, N in zip(
            ("gate", "up", "down"), names, (H, H, width), (width, width, H), strict=True
        ):
            A = random(generator, 1 if f"{part}.A" in shared else E, R, K)
            B = random(generator, 1 if f"{part}.B" in shared else E, N, R)
            state[f"{PREFIX}{path}.{name}.lora_A.weight"] = A
            state[f"{PREFIX}{path}.{name}.lora_B.weight"] = B
            deltas[part] = torch.stack(
                [ALPHA / R * B[e % len(B)] @ A[e % len(A)] for e in range(E)]
            )
        gate_up = torch.cat([deltas["gate"], deltas["up"]], 1)
        if case.family in INTERLEAVED:
            gate_up = torch.stack([deltas["gate"], deltas["up"]], 2).flatten(1, 2)
        update[path] = {"gate_up": gate_up, "down": deltas["down"]}
    return state, update


def write(folder, state, **config):
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text("{}")
    rewrite(folder, peft_type="LORA", r=R, lora_alpha=ALPHA, target_modules=["experts"], **config)


def check(case, folder, update):
    convert_adapter(folder, folder.parent / "ours", to="moe_lora", base_config=case.config)
    found = update_of_ours(folder.parent / "ours", case.base)
    assert found.keys() == update.keys()
    for path, right in update.items():
        for projection, delta in right.items():
            assert_close(found[path][projection], delta, TOLERANCE, f"{path}, {projection}")


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_gate_and_up_in_tensors_of_their_own(made, family, names, tmp_path):
    case = made(family)
    state, update = apart(case, names)
    write(tmp_path / "theirs", state)
    check(case, tmp_path / "theirs", update)
    assert config_of(tmp_path / "ours")["r"] == 2 * R


@pytest.mark.parametrize(
    "shared",
    [
        # Tinker and SGLang's shared-outer layout
        ("gate.A", "up.A", "down.B"),
        ("gate.B", "down.A"),
        ("gate.A", "gate.B", "up.A", "up.B", "down.A", "down.B"),
    ],
    ids=", ".join,
)
def test_what_all_experts_share_is_written_for_each(qwen, shared, tmp_path):
    state, update = apart(qwen, NAMES["Tinker"], shared)
    write(tmp_path / "theirs", state)
    check(qwen, tmp_path / "theirs", update)


def test_a_gate_and_an_up_with_the_same_A_keep_the_rank(qwen, tmp_path):
    state, _ = apart(qwen, NAMES["Tinker"])
    same = {
        name: state[name.replace(".w3.lora_A", ".w1.lora_A")].clone()
        for name in state
        if ".w3.lora_A" in name
    }
    write(tmp_path / "theirs", state | same)
    done = convert_adapter(
        tmp_path / "theirs", tmp_path / "ours", to="moe_lora", base_config=qwen.config
    )
    assert not any("twice the rank" in note for note in done.notes)
    assert config_of(tmp_path / "ours")["r"] == R


@pytest.mark.parametrize("names", [("w1", "w2"), ("up_proj", "down_proj")], ids=str)
def test_experts_without_a_gate(names, tmp_path):
    base = save_base("nemotron_h", tmp_path / "base")
    save_ours(base, tmp_path / "right")
    case = SimpleNamespace(base=base, config=tmp_path / "base")
    update = update_of_ours(tmp_path / "right", base)
    convert_adapter(tmp_path / "right", tmp_path / "3d", to="sglang_3d", base_config=case.config)
    renamed = {
        name.replace("gate_up_proj", names[0]).replace("down_proj", names[1]): tensor
        for name, tensor in tensors(tmp_path / "3d").items()
    }
    rewrite(tmp_path / "3d", lambda state: renamed)
    check(case, tmp_path / "3d", update)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: {n: t for n, t in s.items() if ".w3." not in n}, "only one of gate and up"),
        (lambda s: {n: t[:, :12] if ".w3.lora_B" in n else t for n, t in s.items()}, "sizes"),
        (lambda s: {n: t[:3] if ".w1.lora_A" in n else t for n, t in s.items()}, "E=5, or 1"),
        (lambda s: {n: t[0] if ".w2." in n else t for n, t in s.items()}, r"A \[E, r, K\]"),
    ],
    ids=["a half missing", "another width", "some experts", "2-D"],
)
def test_a_damaged_file_is_refused(qwen, change, match, tmp_path):
    state, _ = apart(qwen, NAMES["Tinker"])
    write(tmp_path / "theirs", {n: t.contiguous() for n, t in change(state).items()})
    with pytest.raises(AdapterError, match=match):
        convert_adapter(
            tmp_path / "theirs", tmp_path / "out", to="moe_lora", base_config=qwen.config
        )
    assert not (tmp_path / "out").exists()


def test_halves_with_scalings_of_their_own_are_refused(qwen, tmp_path):
    state, _ = apart(qwen, NAMES["Tinker"])
    write(tmp_path / "theirs", state, alpha_pattern={"w1": 2 * ALPHA})
    with pytest.raises(RefusedError, match="different scalings"):
        convert_adapter(
            tmp_path / "theirs", tmp_path / "out", to="moe_lora", base_config=qwen.config
        )


def test_without_the_base_model_halves_are_refused(qwen, tmp_path):
    state, _ = apart(qwen, NAMES["Tinker"])
    write(tmp_path / "theirs", state)
    with pytest.raises(RefusedError, match="--base-config"):
        convert_adapter(tmp_path / "theirs", tmp_path / "out", to="moe_lora")


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "GPT_OSS-tiny"])
def test_gpt_oss_stacks_of_sglang_need_the_base_model(made, name, tmp_path):
    """Their rows are [gate; up], and the base's alternate."""
    oss = made("gpt_oss")
    convert_adapter(oss.ours, tmp_path / "3d", to="sglang_3d", base_config=oss.config)
    rewrite(tmp_path / "3d", base_model_name_or_path=name)
    with pytest.raises(RefusedError, match="--base-config"):
        convert_adapter(tmp_path / "3d", tmp_path / "out", to="moe_lora")
    check(oss, tmp_path / "3d", update_of_ours(oss.ours, oss.base))


def test_the_head_of_tinker(qwen, tmp_path):
    model = save_ours(qwen.base, tmp_path / "right", target_modules=["experts", "lm_head"])
    shutil.copytree(tmp_path / "right", tmp_path / "theirs")
    rewrite(
        tmp_path / "theirs",
        lambda state: {
            name.replace("model.lm_head", "model.model.unembed_tokens"): tensor
            for name, tensor in state.items()
        },
        target_modules=["experts", "unembed_tokens"],
    )
    assert any("unembed_tokens" in name for name in tensors(tmp_path / "theirs"))
    loaded = load_peft_adapter(copy.deepcopy(qwen.base), tmp_path / "theirs").eval()
    assert_close(outputs(loaded), outputs(model), TOLERANCE, "logits")


# ---- Unsloth's orders of B -----------------------------------------------------------------------


def regrouped(state):
    return {n: expert_major(t, 5) if ".lora_B." in n else t for n, t in state.items()}


def grouped_down_only(state):
    grouped = regrouped(state)
    return {n: t if "base_layer" in n else grouped[n] for n, t in state.items()}


def note(**words):
    parameters = {name: {"lora_B_layout": word, "num_experts": 5} for name, word in words.items()}
    return {"lora_A_layout": "grouped_by_expert", "parameters": parameters}


GROUPED, RANKED = "grouped_by_expert", "rank_major"
BOTH = note(gate_up_proj=GROUPED, down_proj=GROUPED)
ONE = note(gate_up_proj=RANKED, down_proj=GROUPED)


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (regrouped, {"lora_B_layout": GROUPED}),
        (regrouped, {"unsloth_fused_expert_lora": BOTH}),
        (regrouped, {"unsloth_fused_expert_lora": BOTH, "lora_B_layout": GROUPED}),
        (grouped_down_only, {"unsloth_fused_expert_lora": ONE}),
        (regrouped, {"auto_mapping": {"lora_B_layout": GROUPED, "unsloth_fixed": True}}),
        (None, {"lora_B_layout": RANKED, "auto_mapping": {"unsloth_fixed": True}}),
    ],
    ids=["whole file", "noted", "both", "mixed file", "in auto_mapping", "rank-major"],
)
def test_the_order_that_unsloth_notes(qwen, change, config, tmp_path):
    theirs = save_pefts(qwen.base, tmp_path / "theirs")
    rewrite(tmp_path / "theirs", change, **config)
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora", base_config=qwen.config)
    ours = load_peft_adapter(copy.deepcopy(qwen.base), tmp_path / "ours").eval()
    assert_close(outputs(ours), outputs(theirs), 1e-5, "logits")


@pytest.mark.parametrize(
    ("noted", "match"),
    [
        (note(gate_up_proj=GROUPED, down_proj="mixed"), "mixed"),
        (note(gate_up_proj=GROUPED), r"no order of lora_B for \S+down_proj"),
        (note(gate_up_proj=GROUPED, down_proj=["rank_major"]), "not known"),
    ],
    ids=["mixed", "a parameter missing", "no word"],
)
def test_an_order_that_is_not_noted_is_asked_for(qwen, noted, match, tmp_path):
    save_pefts(qwen.base, tmp_path / "theirs")
    rewrite(tmp_path / "theirs", unsloth_fused_expert_lora=noted)
    with pytest.raises(RefusedError, match=match) as caught:
        convert_adapter(tmp_path / "theirs", tmp_path / "out", to="moe_lora")
    assert "--b-layout" in str(caught.value)


# ---- other programs' own checkpoints -------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "program", "remedy"),
    [
        (
            "decoder.layers.0.mlp.experts.linear_fc1.adapter.linear_in.weight",
            "Megatron-Bridge",
            "export_adapter_ckpt",
        ),
        ("model.layers.0.mlp.experts.lora_gate_and_up_A", "NeMo Automodel", "each expert"),
        ("model.layers.0.mlp.experts.w1_lora_A.0", "prime-rl", "save_adapter_separately"),
    ],
)
def test_a_programs_own_checkpoint_is_told_from_an_adapter(qwen, name, program, remedy, tmp_path):
    write(tmp_path / "theirs", {name: torch.ones(4, 8)})
    with pytest.raises(AdapterError, match=f"looks like a checkpoint of {program}.*{remedy}"):
        convert_adapter(
            tmp_path / "theirs", tmp_path / "out", to="moe_lora", base_config=qwen.config
        )


def test_a_file_of_nobody_is_not_attributed(qwen, tmp_path):
    write(tmp_path / "theirs", {"somebodys.tensor": torch.ones(4, 8)})
    with pytest.raises(AdapterError, match=r"nothing to convert\.$"):
        convert_adapter(
            tmp_path / "theirs", tmp_path / "out", to="moe_lora", base_config=qwen.config
        )


# ---- mlx-lm's own configuration ------------------------------------------------------------------


@pytest.fixture
def of_mlx(qwen, tmp_path):
    """An adapter with the configuration that mlx-lm writes, which has no field of PEFT."""
    convert_adapter(qwen.ours, tmp_path / "theirs", to="mlx", base_config=qwen.config)
    own = ("fine_tune_type", "lora_parameters", "num_layers")
    config = config_of(tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps({name: config[name] for name in own}))
    return tmp_path / "theirs"


def test_an_adapter_of_mlx_lm(qwen, of_mlx):
    assert inspect_adapter(of_mlx, qwen.config).format == "mlx"
    check(qwen, of_mlx, update_of_ours(qwen.ours, qwen.base))


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ({"fine_tune_type": "dora"}, RefusedError, "only lora can be converted"),
        ({"fine_tune_type": "full"}, RefusedError, "mlx_lm.fuse"),
        ({"lora_parameters": None}, AdapterError, "rank and scale"),
        ({"lora_parameters": {"rank": 4, "scale": "2"}}, AdapterError, "rank and scale"),
        ({"lora_parameters": {"rank": True, "scale": 2.0}}, AdapterError, "rank and scale"),
        ({"lora_parameters": {"rank": 3, "scale": 2.0}}, AdapterError, "r=3"),
        ({"lora_parameters": {"rank": 4, "scale": 1e400}}, AdapterError, "finite|numbers"),
    ],
    ids=str,
)
def test_a_configuration_of_mlx_lm_that_does_not_fit(qwen, of_mlx, config, error, match, tmp_path):
    rewrite_config(of_mlx, **config)
    with pytest.raises(error, match=match):
        convert_adapter(of_mlx, tmp_path / "out", to="moe_lora", base_config=qwen.config)
    assert not (tmp_path / "out").exists()


def test_mlx_lm_is_told_of_families_that_were_not_tried(tmp_path):
    base = save_base("nemotron_h", tmp_path / "base")
    save_ours(base, tmp_path / "ours")
    with pytest.raises(RefusedError, match=r"nemotron_h was not tried.*peft-moe-lora merge"):
        convert_adapter(
            tmp_path / "ours", tmp_path / "out", to="mlx", base_config=tmp_path / "base"
        )


@pytest.mark.parametrize("names", [["kv_b_proj"], ["gate"], ["embed_tokens"]], ids=str)
def test_mlx_lm_is_told_of_layers_without_lora(made, names, tmp_path):
    case = made("deepseek_v3")
    save_ours(case.base, tmp_path / "ours", target_modules=["experts", *names])
    with pytest.raises(RefusedError, match=r"mlx-lm (has no LoRA|loads LoRA alone)"):
        convert_adapter(tmp_path / "ours", tmp_path / "out", to="mlx", base_config=case.config)


def rewrite_config(folder, **config):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def test_an_output_of_ours_for_mlx_lm_is_replaced(qwen, tmp_path):
    for _ in range(2):
        convert_adapter(qwen.ours, tmp_path / "out", to="mlx", base_config=qwen.config, force=True)
    check(qwen, tmp_path / "out", update_of_ours(qwen.ours, qwen.base))
