"""What an adapter holds besides LoRA is carried to every format that has it, merged, or refused.

Modules saved whole, biases, LoRA on embedding and head, rows of tokens: against PEFT, which loads
what was converted.
"""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from convert.adapters import PREFIX, config_of, rewrite, tensors
from helpers import assert_close, assert_share_of_order_one, outputs, tiny_model
from peft_moe_lora import (
    MoELoraConfig,
    convert_adapter,
    inspect_adapter,
    load_peft_adapter,
    merge_adapter,
    verify_adapter,
)
from peft_moe_lora.files.tensor_file import AdapterError, RefusedError

TOLERANCE = 1e-5
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# what is trained besides the experts
KINDS = {
    "tokens": {"trainable_token_indices": [9, 5, 23]},
    "tokens of two": {"trainable_token_indices": {"embed_tokens": [9, 5], "lm_head": [7, 4]}},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "every bias": {"target_modules": ["q_proj"], "bias": "all"},
    "adapted biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "embeddings whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms whole": {"modules_to_save": ["norm"]},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_writer = pytest.mark.parametrize("writer", ["ours", "pefts"])


def trained(base, folder, writer="ours", **config):
    """An adapter whose trainable parameters are all far from where they began, saved."""
    others = list(config.pop("target_modules", []))
    if writer == "ours":
        config = MoELoraConfig(r=4, target_modules=["experts", *others], **config)
    else:
        config = {"target_parameters": EXPERTS, **config}
        config = LoraConfig(r=4, target_modules=others, **config)
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    base = tiny_model(attention_bias=True)
    base.save_pretrained(folder)
    return SimpleNamespace(base=base, config=folder)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tied")
    base = tiny_model(tie_word_embeddings=True)
    base.save_pretrained(folder)
    return SimpleNamespace(base=base, config=folder)


def loaded(case, folder):
    return PeftModel.from_pretrained(copy.deepcopy(case.base), folder).eval()


@each_writer
@each_kind
def test_peft_loads_every_format(qwen, kind, writer, tmp_path):
    model = trained(qwen.base, tmp_path / "in", writer, **KINDS[kind])
    assert_share_of_order_one(outputs(model), outputs(qwen.base), low=0.05)
    for to in ("moe_lora", "peft", "per_expert"):
        convert_adapter(tmp_path / "in", tmp_path / to, to=to, base_config=qwen.config)
        assert_close(outputs(loaded(qwen, tmp_path / to)), outputs(model), TOLERANCE, to)
        assert verify_adapter(tmp_path / "in", qwen.config, tmp_path / to).max_error == 0
        convert_adapter(
            tmp_path / to, tmp_path / f"{to}-ours", to="moe_lora", base_config=qwen.config
        )
        back = outputs(loaded(qwen, tmp_path / f"{to}-ours"))
        assert_close(back, outputs(model), TOLERANCE, f"{to} and back")
    ours = load_peft_adapter(copy.deepcopy(qwen.base), tmp_path / "in").eval()
    assert_close(outputs(ours), outputs(model), TOLERANCE, "load_peft_adapter")


@each_kind
def test_nothing_is_lost_without_a_base(qwen, kind, tmp_path):
    model = trained(qwen.base, tmp_path / "in", "pefts", **KINDS[kind])
    convert_adapter(tmp_path / "in", tmp_path / "ours", to="moe_lora")
    assert_close(outputs(loaded(qwen, tmp_path / "ours")), outputs(model), TOLERANCE, "logits")


@each_kind
def test_the_merged_checkpoint_computes_the_same(qwen, kind, tmp_path):
    model = trained(qwen.base, tmp_path / "in", **KINDS[kind])
    merge_adapter(tmp_path / "in", qwen.config, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), outputs(model), TOLERANCE, "logits")


@each_kind
def test_servers_formats_refuse_by_name_what_they_do_not_load(qwen, kind, tmp_path):
    trained(qwen.base, tmp_path / "in", **KINDS[kind])
    held = inspect_adapter(tmp_path / "in", qwen.config).carried
    assert held
    for to in ("vllm_3d", "sglang_3d"):
        with pytest.raises(RefusedError) as caught:
            convert_adapter(tmp_path / "in", tmp_path / to, to=to, base_config=qwen.config)
        assert held[0] in str(caught.value)
        assert not (tmp_path / to).exists()


def test_the_bias_of_an_adapted_router(tmp_path):
    """For PEFT a router is a parameter, whose wrapper holds the bias too."""
    base = tiny_model("gpt_oss")
    base.save_pretrained(tmp_path / "base")
    case = SimpleNamespace(base=base)
    targets = [*EXPERTS, "router.weight"]
    model = trained(base, tmp_path / "in", "pefts", bias="all", target_parameters=targets)
    assert [name for name in tensors(tmp_path / "in") if name.endswith("router.base_layer.bias")]
    convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=tmp_path / "base")
    assert_close(outputs(loaded(case, tmp_path / "out")), outputs(model), TOLERANCE, "logits")
    merge_adapter(tmp_path / "in", tmp_path / "base", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), outputs(model), TOLERANCE, "merged")


def test_a_router_saved_whole_under_published_names(tmp_path):
    """Per-expert LoRA of Mixtral has published names; PEFT looks for the router under its own."""
    base = tiny_model("mixtral")
    base.save_pretrained(tmp_path / "base")
    case = SimpleNamespace(base=base)
    model = trained(base, tmp_path / "in", modules_to_save=["gate"])
    for to in ("per_expert", "peft"):
        convert_adapter(tmp_path / "in", tmp_path / to, to=to, base_config=tmp_path / "base")
        assert_close(outputs(loaded(case, tmp_path / to)), outputs(model), TOLERANCE, to)


# ---- a resized vocabulary ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": [5, 70]},
        {},
    ],
    ids=str,
)
def test_a_resized_vocabulary(qwen, config, tmp_path):
    """PEFT also saves what is inside its wrappers: originals, and the trained module twice."""
    resized = AutoModelForCausalLM.from_pretrained(qwen.config).eval()
    torch.manual_seed(0)
    resized.resize_token_embeddings(resized.config.vocab_size + 8)
    case = SimpleNamespace(base=resized)
    model = trained(resized, tmp_path / "in", **config)
    state = tensors(tmp_path / "in")
    assert [name for name in state if "embed_tokens" in name]
    for to in ("peft", "moe_lora"):
        convert_adapter(tmp_path / "in", tmp_path / to, to=to, base_config=qwen.config)
        assert_close(outputs(loaded(case, tmp_path / to)), outputs(model), TOLERANCE, to)
        assert verify_adapter(tmp_path / "in", qwen.config, tmp_path / to).max_error == 0
    with pytest.raises(RefusedError, match="resize_token_embeddings"):
        merge_adapter(tmp_path / "in", qwen.config, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    resized.save_pretrained(tmp_path / "resized")
    merge_adapter(tmp_path / "in", tmp_path / "resized", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), outputs(model), TOLERANCE, "merged")


def test_a_trained_module_that_a_file_holds_twice_is_one(qwen, tmp_path):
    trained(qwen.base, tmp_path / "in", modules_to_save=["lm_head"])
    again = f"{PREFIX}lm_head.modules_to_save.weight"
    rewrite(
        tmp_path / "in", lambda state: state | {again: state[f"{PREFIX}lm_head.weight"].clone()}
    )
    convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config)
    assert again not in tensors(tmp_path / "out")
    rewrite(tmp_path / "in", lambda state: state | {again: state[again] + 1})
    with pytest.raises(AdapterError, match="is not the same as"):
        convert_adapter(tmp_path / "in", tmp_path / "again", to="peft", base_config=qwen.config)


def test_one_of_the_names_that_peft_gives_the_head_of_a_task_is_enough(qwen, tmp_path):
    """PEFT adds both names for sequence classification; no base is there to ask."""
    trained(qwen.base, tmp_path / "in", modules_to_save=["lm_head"])

    def as_score(state):
        return {key.replace("lm_head", "score"): tensor for key, tensor in state.items()}

    rewrite(tmp_path / "in", as_score, modules_to_save=["classifier", "score"])
    convert_adapter(tmp_path / "in", tmp_path / "out", to="moe_lora")
    found = tensors(tmp_path / "out")[f"{PREFIX}score.weight"]
    assert torch.equal(found, tensors(tmp_path / "in")[f"{PREFIX}score.weight"])


# ---- tied embeddings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"trainable_token_indices": [9, 5]},
        {"trainable_token_indices": {"embed_tokens": [9, 5], "lm_head": [9, 5]}},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_tied_embeddings_change_together(tied, config, tmp_path):
    model = trained(tied.base, tmp_path / "in", **config)
    convert_adapter(tmp_path / "in", tmp_path / "peft", to="peft", base_config=tied.config)
    assert_close(outputs(loaded(tied, tmp_path / "peft")), outputs(model), TOLERANCE, "logits")
    merge_adapter(tmp_path / "in", tied.config, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), outputs(model), TOLERANCE, "merged")


@pytest.mark.parametrize(
    "config",
    [
        {"trainable_token_indices": {"lm_head": [9]}},
        {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["lm_head"]},
    ],
    ids=str,
)
def test_one_of_tied_embeddings_is_not_merged_alone(tied, config, tmp_path):
    trained(tied.base, tmp_path / "in", **config)
    with pytest.raises(RefusedError, match="tie_word_embeddings=False"):
        merge_adapter(tmp_path / "in", tied.config, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_verify_asks_for_ties_where_tied_embeddings_change(tied, tmp_path):
    """Elsewhere ensure_weight_tying says nothing."""
    for name, config, ties in (
        ("saved", {"modules_to_save": ["embed_tokens"]}, "change different embeddings"),
        ("experts", {}, None),
    ):
        trained(tied.base, tmp_path / name, **config)
        shutil.copytree(tmp_path / name, tmp_path / f"{name} tied")
        rewrite(tmp_path / f"{name} tied", ensure_weight_tying=True)
        folders = (tmp_path / name, tied.config, tmp_path / f"{name} tied")
        if ties is None:
            assert verify_adapter(*folders).max_error == 0
        else:
            with pytest.raises(AdapterError, match=ties):
                verify_adapter(*folders)


# ---- verify sees it ------------------------------------------------------------------------------


@each_kind
def test_verify_sees_a_difference_in_every_tensor(qwen, kind, tmp_path):
    trained(qwen.base, tmp_path / "in", **KINDS[kind])
    convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config)
    state = tensors(tmp_path / "out")
    for name in state:
        changed = {n: t.clone() for n, t in state.items()}
        changed[name].view(-1)[-1] += 0.5
        rewrite(tmp_path / "out", lambda _, changed=changed: changed)
        found = verify_adapter(tmp_path / "in", qwen.config, tmp_path / "out")
        assert not found.ok, name
        assert found.max_error > 0.01, name


def test_verify_says_what_it_compared(qwen, tmp_path):
    config = {**KINDS["tokens"], "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    trained(qwen.base, tmp_path / "in", **config)
    found = verify_adapter(tmp_path / "in", qwen.config, tmp_path / "in")
    said = " ".join(found.what)
    for words in ("every expert: 4", "ordinary layers: 2", "saved whole: 1", "rows of tokens: 3"):
        assert words in said
    assert "none was compared" in verify_adapter(tmp_path / "in", qwen.config).what[0]


@pytest.mark.parametrize("which", ["experts", "q_proj", "embed_tokens", "norm"])
def test_zeros_are_not_an_update(qwen, which, tmp_path):
    """Compared from both sides: a zero has no size that an error could be small beside."""
    config = {"target_modules": ["q_proj"], "modules_to_save": ["norm"], **KINDS["tokens"]}
    trained(qwen.base, tmp_path / "in", **config)
    convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config)
    rewrite(
        tmp_path / "out",
        lambda state: {n: torch.zeros_like(t) if which in n else t for n, t in state.items()},
    )
    for one, other in (("in", "out"), ("out", "in")):
        found = verify_adapter(tmp_path / one, qwen.config, tmp_path / other)
        assert not found.ok
        assert found.max_error == 1


def test_verify_compares_every_expert(qwen, tmp_path):
    trained(qwen.base, tmp_path / "in")
    convert_adapter(tmp_path / "in", tmp_path / "out", to="per_expert", base_config=qwen.config)
    state = tensors(tmp_path / "out")
    for name in [n for n in state if "layers.1.mlp.experts" in n and "down_proj.lora_B" in n]:
        rewrite(tmp_path / "out", lambda _, name=name: state | {name: state[name] + 1})
        found = verify_adapter(tmp_path / "in", qwen.config, tmp_path / "out")
        assert not found.ok, name
        assert found.where == "model.layers.1.mlp.experts, down"


def test_rows_in_another_order_are_the_same_rows(qwen, tmp_path):
    trained(qwen.base, tmp_path / "in", trainable_token_indices=[9, 5])
    convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config)
    rewrite(
        tmp_path / "out",
        lambda state: {n: t.flip(0) if "trainable_tokens" in n else t for n, t in state.items()},
        trainable_token_indices=[5, 9],
    )
    assert verify_adapter(tmp_path / "in", qwen.config, tmp_path / "out").max_error == 0
    rewrite(tmp_path / "out", trainable_token_indices=[9, 5])
    assert not verify_adapter(tmp_path / "in", qwen.config, tmp_path / "out").ok
    rewrite(tmp_path / "out", trainable_token_indices=[9, 6])
    with pytest.raises(AdapterError, match="row 5 of"):
        verify_adapter(tmp_path / "in", qwen.config, tmp_path / "out")


# ---- files that do not belong together -----------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        (None, "does not name them"),
        ([9], "needs 1 rows"),
        ([9, 9], "repeats an id"),
        ([9, 10**6], "ids up to 1000000"),
        ({"lm_head": [9, 5]}, "does not name them"),
        ({"embed_tokens": [9, 5], "lm_head": [1]}, "lm_head"),
    ],
    ids=str,
)
def test_rows_that_the_configuration_does_not_explain(qwen, indices, match, tmp_path):
    trained(qwen.base, tmp_path / "in", trainable_token_indices=[9, 5])
    rewrite(tmp_path / "in", trainable_token_indices=indices)
    with pytest.raises(AdapterError, match=match):
        convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config)
    assert not (tmp_path / "out").exists()


def test_rows_that_the_file_lacks(qwen, tmp_path):
    trained(qwen.base, tmp_path / "in")
    rewrite(tmp_path / "in", trainable_token_indices=[9, 5])
    with pytest.raises(AdapterError, match="does not hold them"):
        convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
        "lm_head.modules_to_save.default.weight",
        "model.norm.scale",
    ],
)
def test_a_tensor_that_nothing_asked_for(qwen, name, tmp_path):
    trained(qwen.base, tmp_path / "in", modules_to_save=["norm", "lm_head"])
    rewrite(tmp_path / "in", lambda state: state | {PREFIX + name: torch.ones(32)})
    with pytest.raises(AdapterError, match="neither a LoRA tensor nor saved whole"):
        convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("lost", ["lm_head", "layers.1.mlp.gate"])
def test_a_module_that_the_file_lacks(qwen, lost, with_base, tmp_path):
    trained(qwen.base, tmp_path / "in", modules_to_save=["lm_head", "mlp.gate"])
    if not with_base:
        lost = "gate" if "gate" in lost else lost
    rewrite(
        tmp_path / "in", lambda state: {n: t for n, t in state.items() if f"{lost}.weight" not in n}
    )
    base = qwen.config if with_base else None
    with pytest.raises(AdapterError, match=r"modules_to_save .* names '(lm_head|mlp\.gate)'"):
        convert_adapter(tmp_path / "in", tmp_path / "out", to="moe_lora", base_config=base)
    assert not (tmp_path / "out").exists()


def test_a_module_of_integers(qwen, tmp_path):
    trained(qwen.base, tmp_path / "in", modules_to_save=["lm_head"])
    rewrite(
        tmp_path / "in",
        lambda state: {n: t.int() if "lm_head" in n else t for n, t in state.items()},
    )
    for base in (qwen.config, None):
        with pytest.raises(AdapterError, match=r"lm_head\.weight is torch\.int32"):
            convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=base)


def test_a_module_of_another_size(qwen, tmp_path):
    trained(qwen.base, tmp_path / "in", modules_to_save=["norm"])
    rewrite(
        tmp_path / "in",
        lambda state: {n: t[:-1] if n.endswith(".norm.weight") else t for n, t in state.items()},
    )
    with pytest.raises(AdapterError, match=r"model\.norm\.weight"):
        convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=qwen.config)


def test_the_configuration_asks_for_what_is_there(qwen, tmp_path):
    """A bias that no layer has, and modules that the model lacks, are not asked of a reader."""
    base = tiny_model()
    trained(base, tmp_path / "in", bias="all")
    convert_adapter(tmp_path / "in", tmp_path / "out", to="peft", base_config=base.config)
    assert config_of(tmp_path / "out")["bias"] == "none"
    assert config_of(tmp_path / "out")["modules_to_save"] is None
