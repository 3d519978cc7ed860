"""TRL trains the adapter: SFTTrainer from a JSONL, DPOTrainer against its frozen copy.

The example does both.
"""

import importlib
import json
import math
from functools import partial

import pytest
import torch
from datasets import Dataset, load_dataset
from peft import PeftModel
from safetensors.torch import load_file
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import use_adapter

from helpers import (
    SAME,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    fill_adapter,
    moe_lora,
    tiny_model,
)
from helpers.scripts import EXAMPLES, run_example
from peft_moe_lora import MoELoraConfig

TARGETS = ["experts", "q_proj", "v_proj"]
NAMES = SFTConfig.__dataclass_fields__
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"
)
# trl reads its own deprecated arguments
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


@pytest.fixture
def tokenizer(monkeypatch):
    """One token a byte, and a chat template."""
    monkeypatch.syspath_prepend(EXAMPLES)
    made = importlib.import_module("tiny").make_tokenizer(["a"], vocab_size=257)
    made.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}a>{% endif %}"
    )
    return made


def base_model(device):
    return tiny_model(vocab_size=257, pad_token_id=0, eos_token_id=0, bos_token_id=None).to(device)


def config_for(device, **changes):
    settings = {"r": R, "lora_alpha": 2 * R, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return MoELoraConfig(backend="triton" if device == "cuda" else "torch", **settings, **changes)


def arguments(kind, device, folder, checkpointing=False, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_length": 48,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device == "cuda",
        "disable_tqdm": True,
        CHECKPOINTING: checkpointing,
        **changes,
    }
    # GRPO has no max_length, and KTO no coefficient of the router's loss
    known = kind.__dataclass_fields__
    made = kind(**{name: value for name, value in settings.items() if name in known})
    # where there are several devices, the Trainer would take DataParallel, which TRL refuses
    made._n_gpu = min(made.n_gpu, 1)
    return made


def logits(model, device):
    ids = torch.arange(3, 27, device=device).view(2, 12)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- SFT -----------------------------------------------------------------------------------------


def say(role, content):
    return [{"role": role, "content": content}]


SFT_ROWS = {
    "text": [{"text": f"abc {i % 3} abc {i % 3}"} for i in range(24)],
    "messages": [
        {"messages": say("user", f"{i % 3}?") + say("assistant", f"abc {i % 3}")} for i in range(24)
    ],
    "prompt and completion": [
        {"prompt": say("user", f"{i % 3}?"), "completion": say("assistant", f"abc {i % 3}")}
        for i in range(24)
    ],
}


@pytest.mark.parametrize("kind", SFT_ROWS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_sft_trainer_trains_the_adapter_and_nothing_else(
    device, kind, checkpointing, tokenizer, tmp_path
):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SFT_ROWS[kind]))
    rows = load_dataset(
        "json", data_files=str(tmp_path / "data.jsonl"), split="train", cache_dir=tmp_path / "cache"
    )
    base = base_model(device)
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    trainer = SFTTrainer(
        model=base,
        args=arguments(SFTConfig, device, tmp_path / "out", checkpointing),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=config_for(device, lora_dropout=0.05),
    )
    before = logits(trainer.model.eval(), device)
    trainer.train()
    assert losses(trainer)[-1] < 0.85 * losses(trainer)[0], losses(trainer)
    trained = adapter_parameters(trainer.model)
    assert len(trained) == 2 * (
        4 + 4
    )  # layers, A and B of two projections and of two linear layers
    assert all((p != 0).any() for p in trained.values())
    trainer.save_model()
    loaded = PeftModel.from_pretrained(base_model(device), tmp_path / "out")
    after = logits(trainer.model.eval(), device)
    assert (after - before).norm() > 0.1 * before.norm()
    assert_close(logits(loaded, device), after, SAME)
    unloaded = trainer.model.unload().state_dict()
    assert all(torch.equal(unloaded[name], tensor) for name, tensor in frozen.items())


# ---- DPO -----------------------------------------------------------------------------------------


def preferences(n=16):
    return Dataset.from_list(
        [
            {
                "prompt": say("user", f"{i}?"),
                "chosen": say("assistant", f"abc {i}"),
                "rejected": say("assistant", f"xyz {i}"),
            }
            for i in range(n)
        ]
    )


def pretrained(device, folder, **changes):
    """A base model with a saved adapter that changes much of its output, loaded for training."""
    model = moe_lora(base_model(device), target_modules=TARGETS, **changes)
    fill_adapter(model)
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(base_model(device), folder, is_trainable=True)


def dpo_trainer(model, tokenizer, device, folder, **kwargs):
    # only the model's loss, without the router's
    rewards = {
        "learning_rate": 5e-3,
        "max_steps": 8,
        "router_aux_loss_coef": 0.0,
        **kwargs.pop("args", {}),
    }
    return DPOTrainer(
        model=model,
        args=arguments(DPOConfig, device, folder, **rewards),
        train_dataset=preferences(),
        processing_class=tokenizer,
        **kwargs,
    )


def references(model):
    """{name of default's parameter: (default's, reference's)}, for all parameters."""
    named = dict(model.named_parameters())
    mine = adapter_parameters(model, "default")
    assert len(mine) == len(adapter_parameters(model, "ref")) == 2 * (4 + 4)
    return {name: (named[name], named[name.replace(".default", ".ref")]) for name in mine}


def test_trl_copies_every_tensor_to_its_reference_and_trains_only_the_other(
    device, tokenizer, tmp_path
):
    model = pretrained(device, tmp_path / "adapter")
    with model.disable_adapter():
        plain = logits(model.eval(), device)
    start = logits(model, device)
    assert_share_of_order_one(start, plain)
    trainer = dpo_trainer(model, tokenizer, device, tmp_path)
    for name, (mine, reference) in references(model).items():
        assert mine.abs().max() > 0
        assert torch.equal(mine, reference), name
        assert mine.data_ptr() != reference.data_ptr()
        assert (mine.requires_grad, reference.requires_grad) == (True, False)
    copies = {
        name: reference.detach().clone() for name, (_, reference) in references(model).items()
    }
    trainer.train()
    # policy and reference are the same at first: -log sigmoid(0)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(trainer)[-1] < 0.8 * math.log(2), losses(trainer)
    for name, (mine, reference) in references(model).items():
        assert torch.equal(reference, copies[name]), name
        assert not torch.equal(mine, copies[name]), name
    model.eval()
    with use_adapter(model, "ref"):
        assert_close(logits(model, device), start, SAME)
    assert (logits(model, device) - start).norm() > 0.01 * start.norm()
    # the trained adapter is saved
    model.save_pretrained(tmp_path / "saved", selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(base_model(device), tmp_path / "saved")
    assert_close(logits(loaded, device), logits(model, device), SAME)


def test_a_new_adapters_reference_is_the_base_model(device, tokenizer, tmp_path):
    base = base_model(device)
    plain = logits(base, device)
    trainer = dpo_trainer(base, tokenizer, device, tmp_path, peft_config=config_for(device))
    assert "ref" not in trainer.model.peft_config
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(trainer)[-1] < 0.8 * math.log(2), losses(trainer)
    with use_adapter(trainer.model.eval(), None):
        assert_close(logits(trainer.model, device), plain, SAME)
    assert (logits(trainer.model, device) - plain).norm() > 0.01 * plain.norm()


@pytest.mark.parametrize("disable", [True, False])
def test_dpo_switches_dropout_off_when_told_to(device, disable, tokenizer, tmp_path):
    """TRL looks for dropout modules and finds those of the experts too."""
    model = pretrained(device, tmp_path / "adapter", lora_dropout=0.5)
    dpo_trainer(model, tokenizer, device, tmp_path, args={"disable_dropout": disable})
    model.train()
    assert torch.equal(logits(model, device), logits(model, device)) == disable


# ---- the example ---------------------------------------------------------------------------------


example = partial(run_example, "trl_sft.py")


@pytest.mark.timeout(600)
def test_the_example_runs_on_a_tiny_model_and_on_ones_own(tmp_path):
    size = ["--steps", 12, "--dpo-steps", 8, "--length", 64]
    done = example("--output", tmp_path / "tiny", "--pretrain-steps", 40, *size)
    results = json.loads((tmp_path / "tiny" / "results.json").read_text())
    assert results["held-out loss"]["after"] < results["held-out loss"]["before"] - 0.05
    assert results["reward margin"]["before"] == pytest.approx(0, abs=1e-6)
    assert results["reward margin"]["after"] > 0.01
    assert "warn" not in (done.stdout + done.stderr).lower()
    sft, dpo = (
        load_file(tmp_path / "tiny" / stage / "adapter_model.safetensors")
        for stage in ("sft", "dpo")
    )
    assert sft.keys() == dpo.keys()
    assert all(not torch.equal(sft[key], dpo[key]) for key in sft)

    # a user's model with its own template, and texts; without preferences there is no second stage
    data = tmp_path / "data.jsonl"
    data.write_text(
        "".join(json.dumps({"text": f"The square of {i} is {i * i}."}) + "\n" for i in range(60))
    )
    own = [
        "--model",
        tmp_path / "tiny" / "base",
        "--data",
        data,
        "--steps",
        8,
        "--learning-rate",
        5e-3,
    ]
    example("--output", tmp_path / "own", *own, "--length", 64)
    results = json.loads((tmp_path / "own" / "results.json").read_text())
    assert results.keys() == {"held-out loss"}
    assert results["held-out loss"]["after"] < results["held-out loss"]["before"] - 0.1
    assert (tmp_path / "own" / "sft" / "chat_template.jinja").exists()


# the examples share their arguments: test_examples runs the same check
@pytest.mark.long
def test_a_model_without_data_is_refused():
    assert "--model needs --data" in example("--model", "somewhere", ok=False).stderr
