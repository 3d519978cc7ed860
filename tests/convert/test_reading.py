"""What readers decide: scalings of single experts, shared A, swapped sizes, names of others.

What a reader does not take is an error.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.adapters import (
    PREFIX,
    TOLERANCE,
    assert_same_update,
    load,
    rewrite,
    save_base,
    save_ours,
    save_pefts,
    tensors,
    update_of_ours,
)
from helpers import E, assert_close, experts_paths, outputs, tiny_model
from peft_moe_lora import convert_adapter, merge_adapter
from peft_moe_lora.files.tensor_file import AdapterError, RefusedError


def to_ours(folder, case):
    convert_adapter(folder / "in", folder / "out", to="moe_lora", base_config=case.config)
    return update_of_ours(folder / "out", case.base)


# ---- per expert ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_the_alpha_of_a_projection_is_read_under_the_files_own_names(made, family, tmp_path):
    case = made(family)
    convert_adapter(case.ours, tmp_path / "in", to="per_expert", base_config=case.config)
    down = {"qwen3_moe": "down_proj", "mixtral": r"block_sparse_moe.experts.\d+.w2"}[family]
    rewrite(tmp_path / "in", alpha_pattern={down: 24})  # 3 times the alpha of the others
    found, right = to_ours(tmp_path, case), update_of_ours(case.ours, case.base)
    for path, updates in right.items():
        assert_close(found[path]["gate_up"], updates["gate_up"], TOLERANCE, path)
        assert_close(found[path]["down"], 3 * updates["down"], TOLERANCE, path)


@pytest.mark.parametrize("name", ["experts.3.down_proj", "experts.3.gate_proj", "up_proj"])
def test_the_alpha_of_a_part_is_not_ignored(qwen, name, tmp_path):
    convert_adapter(qwen.ours, tmp_path / "in", to="per_expert", base_config=qwen.config)
    rewrite(tmp_path / "in", alpha_pattern={name: 24})
    with pytest.raises(RefusedError, match=rf"{name.split('.')[-1]} of expert \d has another sca"):
        to_ours(tmp_path, qwen)


def test_the_pattern_of_a_path_that_the_base_calls_otherwise(qwen, tmp_path):
    """The file names a text model within a larger one, and its pattern does too."""
    inner = "model.language_model.layers"
    convert_adapter(qwen.ours, tmp_path / "in", to="peft", base_config=qwen.config)
    rewrite(
        tmp_path / "in",
        lambda state: {n.replace("model.layers", inner): t for n, t in state.items()},
        alpha_pattern={f"{inner}.1.mlp.experts.down_proj": 24},
    )
    found, right = to_ours(tmp_path, qwen), update_of_ours(qwen.ours, qwen.base)
    first, second = experts_paths(qwen.base)
    assert_close(found[first]["down"], right[first]["down"], TOLERANCE, first)
    assert_close(found[second]["down"], 3 * right[second]["down"], TOLERANCE, second)


def test_gate_and_up_share_A_only_if_every_expert_does(qwen, tmp_path):
    convert_adapter(qwen.ours, tmp_path / "in", to="per_expert", base_config=qwen.config)
    path = experts_paths(qwen.base)[1]
    name = f"{PREFIX}{path}.3.up_proj.lora_"
    rewrite(tmp_path / "in", lambda state: state | {f"{name}A.weight": -state[f"{name}A.weight"]})
    found, right = to_ours(tmp_path, qwen), update_of_ours(qwen.ours, qwen.base)
    gate, up = right[path]["gate_up"][3].chunk(2)
    right[path]["gate_up"][3] = torch.cat([gate, -up])
    for module, updates in right.items():
        assert_close(found[module]["gate_up"], updates["gate_up"], TOLERANCE, module)


# ---- experts without a gate ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nemotron_h")
    base = save_base("nemotron_h", folder / "base")
    save_ours(base, folder / "ours")
    convert_adapter(folder / "ours", folder / "each", to="per_expert", base_config=folder / "base")
    return SimpleNamespace(
        base=base, config=folder / "base", ours=folder / "ours", each=tensors(folder / "each")
    )


def renamed(state, **names):
    for old, new in names.items():
        state = {n.replace(f".{old}.", f".{new}."): t for n, t in state.items()}
    return state


def written_again(case, folder, state):
    convert_adapter(case.ours, folder / "in", to="per_expert", base_config=case.config)
    rewrite(folder / "in", lambda _: state)


def test_w1_is_the_first_product_of_experts_without_a_gate(nemotron, tmp_path):
    state = renamed(nemotron.each, up_proj="w1", down_proj="w2")
    assert [name for name in state if ".w1." in name]
    written_again(nemotron, tmp_path, state)
    found, right = to_ours(tmp_path, nemotron), update_of_ours(nemotron.ours, nemotron.base)
    assert_same_update(found, right)


@pytest.mark.parametrize("parameter", ["up_proj", "down_proj"])
def test_a_named_projection_of_experts_without_a_gate_is_that_one(nemotron, parameter, tmp_path):
    """By its shapes it could be either: one is the other with in and out swapped."""
    theirs = save_pefts(nemotron.base, tmp_path / "in", target_parameters=[f"experts.{parameter}"])
    to_ours(tmp_path, nemotron)
    loaded = load(nemotron.base, tmp_path / "out")
    assert_close(outputs(loaded), outputs(theirs), TOLERANCE, "logits")


@pytest.mark.parametrize("names", [{"up_proj": "w3"}, {"up_proj": "gate_proj"}], ids=str)
def test_a_part_that_the_experts_do_not_have_is_refused(nemotron, names, tmp_path):
    written_again(nemotron, tmp_path, renamed(nemotron.each, **names))
    with pytest.raises(AdapterError, match="not to a projection that these experts have"):
        to_ours(tmp_path, nemotron)
    assert not (tmp_path / "out").exists()


def test_one_part_under_two_names_is_refused(nemotron, tmp_path):
    twice = nemotron.each | renamed(nemotron.each, up_proj="w1")
    written_again(nemotron, tmp_path, twice)
    with pytest.raises(AdapterError, match="not to a projection that these experts have"):
        to_ours(tmp_path, nemotron)


def test_one_stack_under_two_names_is_refused(qwen, tmp_path):
    convert_adapter(qwen.ours, tmp_path / "in", to="sglang_3d", base_config=qwen.config)
    rewrite(tmp_path / "in", lambda state: state | renamed(state, gate_up_proj="up_proj"))
    with pytest.raises(AdapterError, match="not to a projection that these experts have"):
        to_ours(tmp_path, qwen)


# ---- sizes ---------------------------------------------------------------------------------------


def test_the_first_version_that_does_not_swap(tmp_path):
    """2I = H, so the shapes of gate_up fit both ways."""
    base = tiny_model(moe_intermediate_size=16)
    base.config.save_pretrained(tmp_path / "base")
    theirs = save_pefts(base, tmp_path / "in", target_parameters=["experts.gate_up_proj"])
    rewrite(tmp_path / "in", peft_version="0.19.1")
    convert_adapter(tmp_path / "in", tmp_path / "out", to="moe_lora", base_config=tmp_path / "base")
    ours = load(base, tmp_path / "out")
    assert_close(outputs(ours), outputs(theirs), TOLERANCE, "logits")


def test_a_transposed_base_was_never_swapped(tmp_path):
    """I = H, so the shapes of down fit both ways, and the version is one that swapped others."""
    base = tiny_model("gpt_oss", intermediate_size=32)
    base.config.save_pretrained(tmp_path / "base")
    theirs = save_pefts(base, tmp_path / "in", target_parameters=["experts.down_proj"])
    rewrite(tmp_path / "in", peft_version="0.18.0")
    convert_adapter(tmp_path / "in", tmp_path / "out", to="moe_lora", base_config=tmp_path / "base")
    ours = load(base, tmp_path / "out")
    assert_close(outputs(ours), outputs(theirs), TOLERANCE, "logits")


@pytest.mark.parametrize("side", ["A", "B"])
def test_A_and_B_have_as_many_ranks(qwen, side, tmp_path):
    save_ours(qwen.base, tmp_path / "in")

    def one_expert_less(state):
        name = f"{PREFIX}{experts_paths(qwen.base)[0]}.lora_{side}.down"
        r = state[name].shape[int(side == "B")] // E
        kept = state[name][:-r] if side == "A" else state[name][:, :-r]
        return state | {name: kept}

    rewrite(tmp_path / "in", one_expert_less)
    for to in ("moe_lora", "peft"):
        with pytest.raises(AdapterError, match=r"must be A \[E\*r, K\] and B \[N, E\*r\]"):
            convert_adapter(tmp_path / "in", tmp_path / "out", to=to)


# ---- merging -------------------------------------------------------------------------------------


def test_a_sum_of_bf16_is_rounded_once(qwen, tmp_path):
    """Adapter and base in bf16: B A is not rounded before it is added, and the loss is said."""
    half = copy.deepcopy(qwen.base).bfloat16()
    half.save_pretrained(tmp_path / "base")
    save_ours(qwen.base, tmp_path / "in")
    rewrite(tmp_path / "in", lambda state: {n: t.bfloat16() for n, t in state.items()})
    done = merge_adapter(tmp_path / "in", tmp_path / "base", tmp_path / "merged")
    merged = type(half).from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    right = update_of_ours(tmp_path / "in", qwen.base)
    wide = {name: t.double() for name, t in half.state_dict().items()}
    state = {name: t.double() for name, t in tensors(tmp_path / "in").items()}
    for path in right:
        A, B = (state[f"{PREFIX}{path}.lora_{side}.down"] for side in "AB")
        r = A.shape[0] // E
        for e in range(E):
            rows = slice(e * r, (e + 1) * r)
            exact = wide[f"{path}.down_proj"][e] + 2.0 * B[:, rows] @ A[rows]
            wrong = merged[f"{path}.down_proj"][e] != exact.bfloat16()
            # one value in 10^3 may lie so near the middle that fp32 decides otherwise than fp64
            assert wrong.double().mean() < 1e-2, f"{path}, expert {e}"
    assert done.rounding.share > 1e-4


def stacked(case, folder, transposed):
    """A checkpoint that stores the experts as stacks; the named ones as [E, K, N]."""
    case.base.config.save_pretrained(folder)
    state = {
        name: (t.mT if name.endswith(transposed) else t).contiguous().clone()
        for name, t in case.base.state_dict().items()
    }
    save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("one", ["experts.gate_up_proj", "experts.down_proj"])
def test_one_stack_transposed_and_the_other_not(qwen, one, tmp_path):
    stacked(qwen, tmp_path / "base", (one,))
    with pytest.raises(AdapterError, match="only one of the two stacks"):
        merge_adapter(qwen.ours, tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_experts_beyond_those_of_the_config_stay(qwen, tmp_path):
    """As the identity experts of some families: the adapter has none for them."""
    qwen.base.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    more = {n.replace(f".{E - 1}.", f".{E}."): t for n, t in state.items() if f"ts.{E - 1}." in n}
    assert len(more) == 2 * 3
    save_file(state | {n: t.clone() for n, t in more.items()}, file, {"format": "pt"})
    done = merge_adapter(qwen.ours, tmp_path / "base", tmp_path / "merged")
    assert done.merged == 2 * 3 * E
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(merged[name], tensor) for name, tensor in more.items())
    assert not any(torch.equal(merged[n], t) for n, t in state.items() if ".experts." in n)
