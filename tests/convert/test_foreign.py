"""Adapters as other programs write them: read exactly, or refused with what to do about them."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch

from convert.adapters import (
    INTERLEAVED,
    PREFIX,
    TOLERANCE,
    check_update,
    config_of,
    experts_count,
    load,
    rewrite,
    save_base,
    save_ours,
    save_pefts,
    swap_in_and_out,
    tensors,
    update_of_ours,
    write_theirs,
)
from helpers import assert_close, expert_major, experts_paths, outputs
from peft_moe_lora import convert_adapter, load_peft_adapter
from peft_moe_lora.files.tensor_file import AdapterError, RefusedError

R, ALPHA = 4, 12
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
    write_theirs(
        folder, state, **{"r": R, "lora_alpha": ALPHA, "target_modules": ["experts"]} | config
    )


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_gate_and_up_in_tensors_of_their_own(made, family, names, tmp_path):
    case = made(family)
    state, update = apart(case, names)
    write(tmp_path / "theirs", state)
    check_update(case, tmp_path / "theirs", update)
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
    check_update(qwen, tmp_path / "theirs", update)


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


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory):
    """An adapter on experts without a gate, as 3-D stacks, and what it means."""
    folder = tmp_path_factory.mktemp("nemotron_h")
    base = save_base("nemotron_h", folder / "base")
    save_ours(base, folder / "right")
    stacks = folder / "3d"
    convert_adapter(folder / "right", stacks, to="sglang_3d", base_config=folder / "base")
    update = update_of_ours(folder / "right", base)
    return SimpleNamespace(base=base, config=folder / "base", stacks=stacks, update=update)


def ungated(case, folder, first, second, **more):
    """The stacks of experts without a gate under other names, and further tensors."""
    shutil.copytree(case.stacks, folder)
    names = {"gate_up_proj": first, "down_proj": second}

    def renamed(state):
        for old, new in names.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
        return state | more

    rewrite(folder, renamed)


@pytest.mark.parametrize("names", [("w1", "w2"), ("up_proj", "down_proj")], ids=str)
def test_experts_without_a_gate(nemotron, names, tmp_path):
    ungated(nemotron, tmp_path / "theirs", *names)
    check_update(nemotron, tmp_path / "theirs", nemotron.update)


def empty(case, sides):
    (path, *_) = experts_paths(case.base)
    return {f"{PREFIX}{path}.w3.lora_{side}.weight": torch.empty(5, 4, 0) for side in sides}


def test_an_empty_w3_of_tinker_says_that_there_is_no_gate(nemotron, tmp_path):
    ungated(nemotron, tmp_path / "theirs", "w1", "w2", **empty(nemotron, "AB"))
    check_update(nemotron, tmp_path / "theirs", nemotron.update)


def test_half_an_empty_pair_is_refused(nemotron, tmp_path):
    ungated(nemotron, tmp_path / "theirs", "w1", "w2", **empty(nemotron, "A"))
    with pytest.raises(AdapterError, match="must not be empty"):
        convert_adapter(
            tmp_path / "theirs", tmp_path / "out", to="moe_lora", base_config=nemotron.config
        )


def test_an_empty_w3_of_experts_with_a_gate_is_refused(qwen, tmp_path):
    state, _ = apart(qwen, NAMES["Tinker"])
    write(tmp_path / "theirs", {n: t[..., :0] if ".w3." in n else t for n, t in state.items()})
    with pytest.raises(AdapterError, match="only one of gate and up"):
        convert_adapter(
            tmp_path / "theirs", tmp_path / "out", to="moe_lora", base_config=qwen.config
        )


# ---- one tensor of all experts beside tensors of each --------------------------------------------


def shared_outer(case, names, shared):
    """The shared tensors [1, ...] under <experts>.<part>, the others 2-D under <experts>.<e>."""
    state, update = apart(case, names, shared)
    found = {}
    for name, tensor in state.items():
        if len(tensor) == 1:
            found[name] = tensor
            continue
        for e, own in enumerate(tensor):
            found[name.replace("experts.", f"experts.{e}.")] = own.contiguous()
    return found, update


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("shared", [("gate.A", "up.A", "down.B"), ("gate.B", "up.B", "down.A")])
def test_the_shared_outer_layout_of_megatron_bridge(made, family, names, shared, tmp_path):
    case = made(family)
    state, update = shared_outer(case, names, shared)
    assert any(".experts.0." in name for name in state)
    write(tmp_path / "theirs", state)
    check_update(case, tmp_path / "theirs", update)


def test_a_tensor_of_all_experts_and_of_one_is_refused(qwen, tmp_path):
    state, _ = shared_outer(qwen, NAMES["published"], ("gate.A",))
    (name,) = (name for name in state if "layers.0" in name and ".experts.gate_proj" in name)
    state[name.replace("experts.", "experts.2.")] = state[name][0].clone()
    write(tmp_path / "theirs", state)
    with pytest.raises(AdapterError, match=r"of all experts and .*too"):
        convert_adapter(
            tmp_path / "theirs", tmp_path / "out", to="moe_lora", base_config=qwen.config
        )


def test_a_tensor_of_all_experts_that_is_2d_is_refused(qwen, tmp_path):
    state, _ = shared_outer(qwen, NAMES["published"], ("gate.A",))
    write(tmp_path / "theirs", {n: t[0, :1] if t.ndim == 3 else t for n, t in state.items()})
    with pytest.raises(AdapterError, match="the file is damaged or was filtered"):
        convert_adapter(
            tmp_path / "theirs", tmp_path / "out", to="moe_lora", base_config=qwen.config
        )


# ---- damage --------------------------------------------------------------------------------------


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
    check_update(oss, tmp_path / "3d", update_of_ours(oss.ours, oss.base))


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


def test_the_attention_of_gpt_oss_has_another_name_in_tinker(made, tmp_path):
    case = made("gpt_oss")
    model = save_ours(case.base, tmp_path / "theirs", target_modules=["experts", "q_proj"])
    rewrite(
        tmp_path / "theirs",
        lambda state: {name.replace(".self_attn.", ".attn."): t for name, t in state.items()},
        metadata={"format": "pt"},
    )
    assert any(".attn.q_proj" in name for name in tensors(tmp_path / "theirs"))
    loaded = load_peft_adapter(copy.deepcopy(case.base), tmp_path / "theirs").eval()
    assert_close(outputs(loaded), outputs(model), TOLERANCE, "logits")


# ---- programs that write PEFT's keys -------------------------------------------------------------


@pytest.mark.parametrize("with_base", [True, False])
def test_nemo_automodel_swaps_in_and_out_and_names_no_version(qwen, with_base, tmp_path):
    """Its Qwen3-MoE adapters are [in, out] under PEFT's keys; the configuration is its own."""
    theirs = save_pefts(qwen.base, tmp_path / "pefts")
    targets = {
        "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    state = {
        name: t.contiguous() for name, t in swap_in_and_out(tensors(tmp_path / "pefts")).items()
    }
    write_theirs(
        tmp_path / "theirs", state, r=4, lora_alpha=8, use_dora=False, bias="none", **targets
    )
    base_config = qwen.config if with_base else None
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora", base_config=base_config)
    assert_close(outputs(load(qwen.base, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")


@pytest.mark.parametrize("with_base", [True, False])
def test_prime_rl_writes_gpt_oss_as_vllm_reads_it(made, with_base, tmp_path):
    """PEFT's keys, B rank-major, and only "experts" in target_modules."""
    case = made("gpt_oss")
    theirs = save_pefts(case.base, tmp_path / "pefts")
    write_theirs(
        tmp_path / "theirs",
        tensors(tmp_path / "pefts"),
        r=4,
        lora_alpha=8,
        target_modules=["experts"],
    )
    base_config = case.config if with_base else None
    convert_adapter(tmp_path / "theirs", tmp_path / "ours", to="moe_lora", base_config=base_config)
    assert_close(outputs(load(case.base, tmp_path / "ours")), outputs(theirs), TOLERANCE, "logits")


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
