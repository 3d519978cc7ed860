"""What PEFT trains and saves beside A and B: whole modules, rows of tokens, biases, embeddings.

Each is trained, saved, and loaded into the base again. The numbers are those of the plain base with
every weight written out, experts included.
"""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from helpers import (
    FP32,
    KNOWS_WRAPPERS,
    VOCAB,
    R,
    assert_close,
    assert_share_of_order_one,
    assert_unchanged,
    base_weight,
    dense_deltas,
    experts_adapter,
    experts_paths,
    moe_lora,
    outputs,
    snapshot,
    tiny_model,
)
from peft_moe_lora import MoELoraConfig

FILE = "adapter_model.safetensors"
SCALING = 2.0
RESIZED = VOCAB + 6
NEW = [VOCAB, RESIZED - 1]
# the new tokens are in the batch, and so are some old ones
IDS = torch.tensor([[3, VOCAB, 5, 9, 7, 11], [9, 4, RESIZED - 1, 6, 5, VOCAB]])
BOTH = ["embed_tokens", "lm_head"]
ATTENTION = ["q_proj", "k_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases on disk: only there can PEFT see that a vocabulary was resized."""
    made = {}

    def load(family="qwen3_moe", resized=True, **changes):
        name = f"{family}-{'-'.join(map(str, sorted(changes)))}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            model = tiny_model(family, **changes)
            with torch.no_grad():
                for parameter, value in model.named_parameters():
                    if parameter.endswith("proj.bias"):
                        value.normal_(0, 0.3)
            model.save_pretrained(made[name])
        model = AutoModelForCausalLM.from_pretrained(made[name]).eval()
        if resized:
            torch.manual_seed(5)
            model.resize_token_embeddings(RESIZED)
        return model

    return load


def trained(base, config=MoELoraConfig, seed=1, **settings):
    """An adapter whose every trained number differs from what it started with."""
    settings = {"target_modules": ["experts"], "r": R, "lora_alpha": SCALING * R, **settings}
    # PEFT changes lists of a configuration
    return trained_further(get_peft_model(base, config(**copy.deepcopy(settings))), seed)


def trained_further(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def run(model):
    with torch.no_grad():
        return outputs(model, IDS % model.get_input_embeddings().weight.shape[0])


def written_out(base, model, adapter_name="default"):
    """Parameter of the base -> what the adapter makes of it."""
    weights = dict(base.named_parameters(remove_duplicate=False))
    trained_tensors = {
        name.removeprefix("base_model.model."): value
        for name, value in model.named_parameters(remove_duplicate=False)
    }
    for path in experts_paths(base):
        experts = base.get_submodule(path)
        deltas = dense_deltas(
            experts_adapter(model, path, adapter_name), experts.down_proj.shape[0], SCALING
        )
        for projection, delta in deltas.items():
            weight = base_weight(experts, projection)
            (key,) = (n for n, p in experts.named_parameters() if p.data_ptr() == weight.data_ptr())
            transposed = getattr(experts, "is_transposed", False)
            updated = weight + delta
            weights[f"{path}.{key}"] = updated.mT if transposed else updated
    for name, value in trained_tensors.items():
        path, _, rest = name.partition(f".modules_to_save.{adapter_name}.")
        if rest:
            weights[f"{path}.{rest}"] = value
        path, _, rest = name.partition(f".lora_A.{adapter_name}.weight")
        if path != name:
            B = trained_tensors[name.replace("lora_A", "lora_B")]
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + SCALING * B @ value
        path, _, rest = name.partition(f".lora_embedding_A.{adapter_name}")
        if path != name:
            B = trained_tensors[name.replace("embedding_A", "embedding_B")]
            weights[f"{path}.weight"] = weights[f"{path}.weight"] + SCALING * (B @ value).T
        path, _, rest = name.partition(f".token_adapter.trainable_tokens_delta.{adapter_name}")
        if path != name:
            wrapper = model.get_submodule(f"base_model.model.{path}")
            rows = weights[f"{path}.weight"].clone()
            tied = wrapper.token_adapter.tied_adapter
            if tied is not None:
                value = tied.trainable_tokens_delta[adapter_name]
            rows[wrapper.token_adapter.token_indices[adapter_name]] = value
            weights[f"{path}.weight"] = rows
        if name.endswith(".bias"):
            weights[name.replace(".base_layer", "")] = value
    return weights


def plain(base, weights):
    base.set_experts_implementation("eager")
    ids = IDS % base.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        out = functional_call(
            base, weights, kwargs={"input_ids": ids, "use_cache": False}, tie_weights=False
        )
    return out.logits


WHOLE = "modules_to_save"
TOKENS = "trainable_token_indices"
TARGETS = "target_modules"
TIED = {"tie_word_embeddings": True}
BIASED = {"attention_bias": True}
NEMOTRON = {"family": "nemotron_h"}
# what is trained beside the experts: (settings of the adapter, of the base)
# fmt: off
CASES = {
    "head": ({WHOLE: ["lm_head"]}, {}),
    "embedding": ({WHOLE: ["embed_tokens"]}, {}),
    "both": ({WHOLE: BOTH}, {}),
    "both of a tied base": ({WHOLE: BOTH}, TIED),
    "both, tied": ({WHOLE: BOTH, "ensure_weight_tying": True}, TIED),
    "tokens": ({TOKENS: NEW}, {}),
    "tokens and a head": ({TOKENS: NEW, WHOLE: ["lm_head"]}, {}),
    "tokens of both": ({TOKENS: {"embed_tokens": NEW, "lm_head": [5]}}, {}),
    "tokens of a tied base": ({TOKENS: NEW}, TIED),
    "tokens of both of a tied base": ({TOKENS: {"embed_tokens": NEW, "lm_head": NEW}}, TIED),
    "other tokens of a tied head": ({TOKENS: {"embed_tokens": NEW, "lm_head": [5]}}, TIED),
    "every bias": ({"bias": "all"}, BIASED),
    "every bias and both": ({"bias": "all", WHOLE: BOTH}, BIASED),
    "biases of targets": ({"bias": "lora_only", TARGETS: ["experts", *ATTENTION]}, BIASED),
    "LoRA on both": ({TARGETS: ["experts", *BOTH]}, {}),
    "LoRA on the head": ({TARGETS: ["experts", "lm_head"]}, {}),
    "LoRA on both of a tied base": ({TARGETS: ["experts", *BOTH]}, TIED),
    "LoRA on a tied embedding": ({TARGETS: ["experts", "embed_tokens"]}, TIED),
    "both, as they were": ({WHOLE: BOTH}, {"resized": False}),
    "tokens, as they were": ({TOKENS: [5, 9]}, {"resized": False}),
    "tokens of both of a tied base, as they were": (
        {TOKENS: {"embed_tokens": [5, 9], "lm_head": [5, 9]}}, {**TIED, "resized": False}
    ),
    "LoRA on both, as they were": ({TARGETS: ["experts", *BOTH]}, {"resized": False}),
    "embeddings of other names": ({WHOLE: ["embeddings", "lm_head"]}, NEMOTRON),
    "tokens of other names": ({TOKENS: NEW}, NEMOTRON),
    "nothing beside, other names": ({}, NEMOTRON),
    "LoRA everywhere": ({TARGETS: ["experts", "gate", *ATTENTION, *BOTH], "bias": "all"}, BIASED),
}
# fmt: on
every_case = pytest.mark.parametrize("case", CASES)


@every_case
def test_trained_saved_and_loaded(case, bases, tmp_path):
    settings, changes = CASES[case]

    def base():
        return bases(**changes)

    model = trained(base(), **settings)
    expected = run(model)
    assert_share_of_order_one(expected, run(base()))
    assert_close(expected, plain(base(), written_out(base(), model)), FP32)
    model.save_pretrained(tmp_path)
    assert_close(run(PeftModel.from_pretrained(base(), tmp_path)), expected, FP32)
    # a model of transformers, and an adapter beside another one
    loaded = base()
    if KNOWS_WRAPPERS or not (WHOLE in settings or TOKENS in settings):
        loaded.load_adapter(str(tmp_path))
        assert_close(run(loaded), expected, FP32)
    else:
        before = snapshot(loaded)
        with pytest.raises(ValueError, match="upgrade transformers"):
            loaded.load_adapter(str(tmp_path))
        assert_unchanged(loaded, before)
    if TOKENS in settings:
        return
    second = moe_lora(base(), target_modules=["experts"])
    second.load_adapter(tmp_path, "second")
    second.set_adapter("second")
    assert_close(run(second), expected, FP32)


# ---- files that do not fit -----------------------------------------------------------------------

ON_TOKENS = {TOKENS: {"embed_tokens": NEW, "lm_head": [5]}}
ON_BIASES = {"bias": "all", TARGETS: ["experts", "q_proj"]}
ON_BOTH = {TARGETS: ["experts", *BOTH]}
WHOLE_BOTH = {WHOLE: BOTH}
P = "base_model.model."
DELTA = "token_adapter.trainable_tokens_delta"
# what happens to a file: (settings of the adapter, a tensor, what becomes of it)
# fmt: off
FAULTS = {
    "no rows of the embedding": (ON_TOKENS, f"{P}model.embed_tokens.{DELTA}", None),
    "no rows of the head": (ON_TOKENS, f"{P}lm_head.{DELTA}", None),
    "a row too many": (ON_TOKENS, f"{P}lm_head.{DELTA}", lambda t: t.repeat(2, 1)),
    "no bias of a target": (ON_BIASES, f"{P}model.layers.0.self_attn.q_proj.base_layer.bias", None),
    "no bias beside": (ON_BIASES, f"{P}model.layers.1.self_attn.v_proj.bias", None),
    "a longer bias": (ON_BIASES, f"{P}model.layers.1.self_attn.v_proj.bias", lambda t: t.repeat(2)),
    "no A of the embedding": (ON_BOTH, f"{P}model.embed_tokens.lora_embedding_A", None),
    "no B of the head": (ON_BOTH, f"{P}lm_head.lora_B.weight", None),
    "no head": (WHOLE_BOTH, f"{P}lm_head.weight", None),
}
# fmt: on


def save_with(folder, changes):
    """Write the adapter file of a folder again; `changes` maps names to tensors, or to None."""
    tensors = {**load_file(folder / FILE), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_lacks_a_tensor_changes_nothing(fault, bases, tmp_path):
    settings, name, change = FAULTS[fault]
    trained(bases(attention_bias=True), **settings).save_pretrained(tmp_path)
    tensor = load_file(tmp_path / FILE)[name]
    save_with(tmp_path, {name: change and change(tensor)})
    base = bases(attention_bias=True)
    before = snapshot(base)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    model = moe_lora(base)
    before = snapshot(model)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        model.load_adapter(tmp_path, "second")
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("settings", [WHOLE_BOTH, ON_BOTH, {}], ids=str)
def test_a_vocabulary_of_another_size_is_named(settings, bases, tmp_path):
    trained(bases(), **settings).save_pretrained(tmp_path)
    base = bases(resized=False)
    before = snapshot(base)
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({RESIZED}\)"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)


def test_a_bias_that_nobody_trained_is_unknown(bases, tmp_path):
    trained(bases(attention_bias=True), target_modules=["experts", "q_proj"]).save_pretrained(
        tmp_path
    )
    name = f"{P}model.layers.1.self_attn.v_proj.bias"
    save_with(tmp_path, {name: torch.ones(16)})
    with pytest.raises(ValueError, match=r"unknown tensors.*v_proj\.bias"):
        PeftModel.from_pretrained(bases(attention_bias=True), tmp_path)


# ---- configurations that PEFT would refuse too late, or not at all -------------------------------

# fmt: off
REFUSED = [
    ({WHOLE: ["lm_haed"]}, r"modules_to_save: 'lm_haed' matches no module .*lm_head"),
    ({TOKENS: {"wte": [5]}}, r"'wte' matches no module .*model\.embed_tokens"),
    ({TOKENS: [5, VOCAB]}, r"from 0 to 63.*\[5, 64\].*resize_token_embeddings"),
    ({TOKENS: [5, 5]}, r"each once.*\[5, 5\]"),
    ({TOKENS: {"norm": [5]}}, "no rows of tokens"),
    ({TOKENS: [5], WHOLE: ["embed_tokens"]}, "which modules_to_save names too"),
    ({TOKENS: [5], TARGETS: ["experts", "embed_tokens"]}, "which target_modules names too"),
]
# fmt: on


@pytest.mark.parametrize(("settings", "message"), REFUSED)
@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
def test_what_cannot_be_trained_changes_nothing(settings, message, first):
    config = MoELoraConfig(**{TARGETS: ["experts"], **settings})
    model = tiny_model()
    if not first:
        model = moe_lora(model)
    before = snapshot(model)
    add = get_peft_model if first else PeftModel.add_adapter
    args = (model, config) if first else (model, "second", config)
    with pytest.raises(ValueError, match=message):
        add(*args)
    assert_unchanged(model, before)


def test_tokens_of_a_tied_base_beside_a_whole_head_are_refused(bases):
    """TRL asks for both; PEFT trains them, but cannot load them again."""
    base = bases(**TIED)
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"rows of lm_head, .* whose head has a weight"):
        trained(base, trainable_token_indices={"embed_tokens": NEW}, modules_to_save=["lm_head"])
    assert_unchanged(base, before)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_adapted_experts_are_refused(bias):
    model = tiny_model("gpt_oss")
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"bias='{bias}'.*gate_up_proj_bias.*experts"):
        moe_lora(model, bias=bias)
    assert_unchanged(model, before)


def test_biases_beside_experts_that_have_none_are_trained():
    """The same fields as LoraConfig trains."""
    ours = moe_lora(tiny_model(attention_bias=True), bias="all")
    theirs = get_peft_model(
        tiny_model(attention_bias=True), LoraConfig(target_modules=["q_proj"], bias="all")
    )

    def biases(model):
        return {n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".bias")}

    assert biases(ours)
    assert biases(ours) == {name.replace(".base_layer", "") for name in biases(theirs)}


@pytest.mark.parametrize("settings", [WHOLE_BOTH, ON_TOKENS], ids=str)
def test_a_second_adapter_cannot_train_what_the_first_one_adapts(settings, bases):
    model = trained(bases(), **ON_BOTH)
    before = snapshot(model)
    config = MoELoraConfig(target_modules=["experts"], **settings)
    with pytest.raises(ValueError, match="another adapter has A and B on"):
        model.add_adapter("second", config)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]


# ---- merging, deleting and several adapters ------------------------------------------------------

SHARED = ["other tokens of a tied head", "LoRA on both of a tied base", "LoRA on a tied embedding"]


@every_case
def test_merged_and_saved_as_a_plain_model(case, bases, tmp_path):
    settings, changes = CASES[case]
    model = trained(bases(**changes), **settings)
    expected = run(model)
    before = model.get_base_model().config.tie_word_embeddings
    whole = model.merge_and_unload()
    assert_close(run(whole), expected, FP32)
    whole.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(run(again), expected, FP32)
    weights = [again.get_input_embeddings().weight, again.get_output_embeddings().weight]
    if before and case in ("tokens of a tied base", "tokens of both of a tied base"):
        assert weights[0] is weights[1], "nothing had to be untied"


@pytest.mark.parametrize("case", [*SHARED, "both", "tokens of a tied base", "LoRA everywhere"])
def test_merged_in_place_and_back(case, bases):
    settings, changes = CASES[case]
    base = bases(**changes)
    model = trained(base, **settings)
    expected = run(model)
    if case in SHARED:
        before = snapshot(model)
        with pytest.raises(ValueError, match="the embedding and the head share one weight"):
            model.merge_adapter()
        assert_unchanged(model, before)
        return
    model.merge_adapter()
    assert_close(run(model), expected, FP32)
    model.unmerge_adapter()
    assert_close(run(model), expected, FP32)


ONE = {WHOLE: ["lm_head"]}
# fmt: off
# (settings of the first adapter, of the second, of the base)
PAIRS = {
    "a head and attention": (ONE, {TARGETS: ["experts", "q_proj"]}, {}),
    "a head and another head": (ONE, {WHOLE: ["lm_head", "q_proj"]}, {}),
    "tokens and other tokens": ({TOKENS: [5, 9]}, {TOKENS: [7, 9, 3], **ONE}, {}),
    "tokens and other tokens of a tied base": ({TOKENS: NEW}, {TOKENS: [7, VOCAB]}, TIED),
    "an embedding and both": ({WHOLE: ["embed_tokens"]}, {WHOLE: BOTH}, {}),
    "LoRA and LoRA": ({TARGETS: ["experts", *BOTH]}, {TARGETS: ["experts", *BOTH]}, {}),
}
# fmt: on


@pytest.mark.parametrize("pair", PAIRS)
def test_adapters_with_other_things_beside_them_stand_side_by_side(pair, bases, tmp_path):
    *both, changes = PAIRS[pair]

    def base():
        return bases(**changes)

    expected = {}
    for name, settings in zip(["first", "second"], both, strict=True):
        model = trained(base(), seed=len(name), **settings)
        expected[name] = run(model)
        model.save_pretrained(tmp_path / name)
    model = PeftModel.from_pretrained(base(), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", "second")
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert_close(run(model), expected[name], FP32, name)
    with model.disable_adapter():
        assert_close(run(model), run(base()), FP32)
    model.save_pretrained(tmp_path / "both")
    for name in ("first", "second"):
        loaded = PeftModel.from_pretrained(base(), tmp_path / "both" / name)
        assert_close(run(loaded), expected[name], FP32, name)
    model.delete_adapter("first")
    model.set_adapter("second")
    assert_close(run(model), expected["second"], FP32)
    assert_close(run(model.merge_and_unload()), expected["second"], FP32)


@pytest.mark.parametrize("settings", [({TOKENS: [5]}, {}), ({}, {TOKENS: [5]})], ids=str)
def test_tokens_of_one_adapter_alone_are_refused(settings, bases, tmp_path):
    """PEFT stops with a KeyError: when it loads the second one, or when it saves the first."""
    first, second = settings
    trained(bases(), **second).save_pretrained(tmp_path)
    model = trained(bases(), **first)
    before = snapshot(model)
    for add in (
        lambda: model.load_adapter(tmp_path, "second"),
        lambda: model.add_adapter("second", MoELoraConfig(target_modules=["experts"], **second)),
    ):
        with pytest.raises(ValueError, match=r"adapter 'default' trains rows of .* its own"):
            add()
        assert_unchanged(model, before)


@pytest.mark.parametrize("settings", [{}, {TARGETS: ["experts", *BOTH]}, WHOLE_BOTH], ids=str)
def test_an_embedding_of_another_base_beside_an_adapter_is_refused(settings, bases, tmp_path):
    """The copy in the file would replace the embedding that the first adapter uses."""
    base = bases()
    with torch.no_grad():
        base.get_input_embeddings().weight[VOCAB:] += 1
    other = trained(base, **settings)
    expected = run(other)
    other.save_pretrained(tmp_path)
    model = trained(bases())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"embed_tokens.*differs .*\['default'\].*its own"):
        model.load_adapter(tmp_path, "second")
    assert_unchanged(model, before)
    assert_close(run(PeftModel.from_pretrained(bases(), tmp_path)), expected, FP32)
