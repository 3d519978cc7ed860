"""An adapter survives its whole life: the logits are the same after every step of it.

Train, keep the best checkpoint, save, load in a new process, resume, merge in memory and on files,
convert to every format that can hold it and back.
"""

import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer

from families.off_interface import off_interface_model
from helpers import (
    VOCAB,
    assert_close,
    assert_share_of_order_one,
    dense_delta,
    fill_adapter,
    outputs,
    tiny_model,
    token_ids,
    training_arguments,
)
from peft_moe_lora import MoELoraConfig, convert_adapter, load_peft_adapter, merge_adapter
from peft_moe_lora.convert.formats import FORMATS
from peft_moe_lora.files.tensor_file import RefusedError

TOLERANCE = 1e-5
# family -> name of its routers
FAMILIES = {
    "qwen3_moe": "gate",
    "gpt_oss": "router",
    "mixtral": "gate",
    "deepseek_v3": "gate",
    "nemotron_h": "gate",
    "llama4": "router",
}
MORE_WORDS = 8
TOKENS = [3, 9, 20]
RANK = 4
SCALING = 2
# experts stored as [E, K, N]
TRANSPOSED = ("gpt_oss", "llama4")
KINDS = ("tokens", "resized vocabulary")
# formats that can hold what the kind trains besides A and B
HOLDING = {family: {"moe_lora", "peft", "per_expert"} for family in FAMILIES} | {
    # no program finds their experts in per_expert files
    "gpt_oss": {"moe_lora", "peft"},
    "nemotron_h": {"moe_lora", "peft"},
    # it has no export
    "llama4": {"moe_lora"},
}
LOAD_AND_SAVE = """
import sys, torch
from test_survival import loaded
for family, kind, base, adapter, out in zip(*[iter(sys.argv[1:])] * 5):
    torch.save(loaded(family, kind, base, adapter), out)
"""


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        ids = token_ids(1, 11, seed=i)[0]
        return {"input_ids": ids, "labels": ids}


def build(family):
    if family == "llama4":
        return off_interface_model(family)
    return tiny_model(family)


def base_model(folder, kind):
    """The base model as its users load it, with the vocabulary that they give it."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if kind == "resized vocabulary":
        base.resize_token_embeddings(VOCAB + MORE_WORDS, mean_resizing=False)
    return base


def name_of(model, module):
    """The last part of a module's path."""
    return next(path for path, m in model.named_modules() if m is module).rpartition(".")[2]


def configuration(family, kind, base):
    """Experts, router and attention, and what `kind` trains of the embeddings."""
    embedding = name_of(base, base.get_input_embeddings())
    changes = {"modules_to_save": [embedding, "lm_head"]}
    if kind == "tokens":
        changes = {"trainable_token_indices": {embedding: TOKENS}}
    targets = ["experts", FAMILIES[family], "o_proj"]
    return MoELoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=targets, **changes)


def logits_of(model):
    with torch.no_grad():
        return outputs(model.eval()).clone()


def loaded(family, kind, base, adapter):
    return logits_of(PeftModel.from_pretrained(base_model(base, kind), adapter))


def written_out(family, kind, folder):
    """The logits of the base with what the adapter's file holds written into it."""
    model = base_model(folder / "base", kind)
    parameters = dict(model.named_parameters())
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    tensors = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    with torch.no_grad():
        for key, tensor in tensors.items():
            path, of_lora, name = key.partition(".lora_A.")
            # PEFT writes the base's embedding and head too, where the vocabulary was resized
            if ".lora_B." in key or ".original_module." in key:
                continue
            if key.endswith(".token_adapter.trainable_tokens_delta"):
                embedding = path.removesuffix(".token_adapter.trainable_tokens_delta")
                parameters[f"{embedding}.weight"][TOKENS] = tensor
            elif not of_lora:
                parameters[key.replace(".modules_to_save.", ".")].copy_(tensor)
            elif name == "weight":
                B = tensors[key.replace(".lora_A.", ".lora_B.")]
                parameters[f"{path}.weight"] += SCALING * B @ tensor
            else:
                B = tensors[key.replace(".lora_A.", ".lora_B.")]
                stack = parameters.get(f"{path}.{name}_proj")
                if stack is None:
                    stack = parameters[f"{path}.up_proj"]
                update = dense_delta(tensor, B, len(stack), SCALING)
                if family in TRANSPOSED:
                    update = update.mT
                stack += update
    return logits_of(model)


def trainer_of(model, folder):
    arguments = training_arguments(
        folder,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
    )
    return Trainer(model=model, args=arguments, train_dataset=Sentences(), eval_dataset=Sentences())


def fresh(family, kind, base):
    model = base_model(base, kind)
    model = get_peft_model(model, configuration(family, kind, model))
    fill_adapter(model)
    return model


def is_slow_duplicate(family, kind):
    return kind == "resized vocabulary" and family not in ("qwen3_moe", "gpt_oss")


CASES = [
    pytest.param(family, kind, marks=[pytest.mark.long] if is_slow_duplicate(family, kind) else [])
    for family in FAMILIES
    for kind in KINDS
]
cases = pytest.mark.parametrize(("family", "kind"), CASES)


@pytest.fixture(scope="module")
def lives(request, tmp_path_factory):
    """(family, kind) -> its folder, the trained logits, and those of a new process."""
    found = {}
    arguments = []
    chosen = [item.callspec.params for item in request.session.items if item.path == request.path]
    for family, kind in {(params["family"], params["kind"]): None for params in chosen}:
        folder = tmp_path_factory.mktemp(f"{family}_{kind.split()[0]}")
        build(family).save_pretrained(folder / "base")
        model = fresh(family, kind, folder / "base")
        trainer = trainer_of(model, folder / "checkpoints")
        trainer.train()
        model.save_pretrained(folder / "adapter")
        found[family, kind] = {"folder": folder, "logits": logits_of(model)}
        found[family, kind]["best"] = trainer.state.best_model_checkpoint
        names = ("base", "adapter", "logits.pt")
        arguments += [family, kind, *(str(folder / name) for name in names)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", LOAD_AND_SAVE, *arguments], check=True, timeout=280, env=environment
    )
    return found


@cases
def test_a_new_process_loads_what_was_trained(lives, family, kind):
    life = lives[family, kind]
    base = logits_of(base_model(life["folder"] / "base", kind))
    assert_share_of_order_one(life["logits"], base, low=0.1)
    assert_close(torch.load(life["folder"] / "logits.pt"), life["logits"], TOLERANCE)


@cases
def test_what_was_trained_is_what_the_file_says_written_into_the_base(lives, family, kind):
    life = lives[family, kind]
    assert_close(written_out(family, kind, life["folder"]), life["logits"], TOLERANCE)


@cases
def test_the_best_checkpoint_is_what_the_trainer_leaves(lives, family, kind):
    life = lives[family, kind]
    found = loaded(family, kind, life["folder"] / "base", life["best"])
    assert_close(found, life["logits"], TOLERANCE)


@cases
def test_a_resumed_training_ends_where_the_straight_one_does(lives, family, kind, tmp_path):
    folder = lives[family, kind]["folder"]
    trainer = trainer_of(fresh(family, kind, folder / "base"), tmp_path)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoints" / "checkpoint-2"))
    straight = loaded(family, kind, folder / "base", folder / "checkpoints" / "checkpoint-4")
    found = loaded(family, kind, folder / "base", tmp_path / "checkpoint-4")
    assert_close(found, straight, TOLERANCE)


@cases
def test_it_is_merged_in_memory_and_on_files(lives, family, kind, tmp_path):
    life = lives[family, kind]
    folder = life["folder"]
    model = PeftModel.from_pretrained(base_model(folder / "base", kind), folder / "adapter")
    model.merge_adapter()
    assert_close(logits_of(model), life["logits"], TOLERANCE)
    model.unmerge_adapter()
    assert_close(logits_of(model), life["logits"], TOLERANCE)
    assert_close(logits_of(model.merge_and_unload()), life["logits"], TOLERANCE)
    merge_adapter(folder / "adapter", resized_base(folder, kind, tmp_path), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_close(logits_of(merged), life["logits"], TOLERANCE)


@cases
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_that_can_hold_it_gives_it_back(lives, family, kind, form, tmp_path):
    life = lives[family, kind]
    base = resized_base(life["folder"], kind, tmp_path)
    there = tmp_path / "there"
    back = tmp_path / "back"
    refusal = ""
    try:
        convert_adapter(life["folder"] / "adapter", there, to=form, base_config=base)
    except RefusedError as error:
        refusal = str(error)
    if refusal:
        assert form not in HOLDING[family], refusal
        assert not there.exists()
        return
    convert_adapter(there, back, to="moe_lora", base_config=base)
    assert_close(loaded(family, "as it is", base, back), life["logits"], TOLERANCE)
    model = load_peft_adapter(AutoModelForCausalLM.from_pretrained(base), there)
    assert_close(logits_of(model), life["logits"], TOLERANCE)


def resized_base(folder, kind, tmp_path):
    """The folder of a base model with the vocabulary of the adapter."""
    if kind == "tokens":
        return folder / "base"
    base_model(folder / "base", kind).save_pretrained(tmp_path / "resized")
    return tmp_path / "resized"
