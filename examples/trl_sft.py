"""Fine-tune with TRL: SFTTrainer with an adapter on every expert, then DPO against a frozen copy of that adapter.

    python examples/trl_sft.py                                    a tiny model, made here: two minutes on a laptop
    python examples/trl_sft.py --model NAME --data FILE.jsonl --preferences FILE.jsonl        a real one, on a GPU

Every line of --data is a row as SFTTrainer takes it ("text", "messages", or "prompt" and "completion"), every line of
--preferences one as DPOTrainer does ("prompt", "chosen", "rejected"); without --preferences there is no DPO. The tiny
model is pretrained on CPython's documentation, learns to answer with the standard library's source, and then to prefer
source to prose. DPO trains the adapter that SFT saved; TRL keeps a copy of it under the name "ref" for reference.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from peft_moe_lora import MoELoraConfig
from texts import documentation, standard_library
from tiny import complete, pretrain

# peft 0.21 reads a name that transformers 5.23 deprecates; drop when peft's floor moves
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)
# transformers 5.17 has only the old name of this setting, 5.23 warns of it; drop when the floor moves
NAMES = SFTConfig.__dataclass_fields__
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"
)

TINY = {
    "output": "moe-lora-trl",
    "length": 128,
    "batch_size": 8,
    "learning_rate": 5e-3,
    "steps": 60,
    "dpo_steps": 30,
}
REAL = {"output": "moe-lora-trl", "length": 2048, "batch_size": 4, "learning_rate": 2e-4}
# for a tokenizer without one: a line that says who speaks, what is said, the end
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def parse_arguments() -> argparse.Namespace:
    """The command line; what it leaves open is filled from TINY or REAL."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="name or folder of a model (default: a tiny one, pretrained here)"
    )
    parser.add_argument(
        "--data", type=Path, help="JSONL for SFT (default: written here, source of the library)"
    )
    parser.add_argument(
        "--preferences", type=Path, help="JSONL for DPO (default: written here | no DPO)"
    )
    parser.add_argument("--output", type=Path, help="folder for everything (default: moe-lora-trl)")
    parser.add_argument(
        "--steps", type=int, help="optimizer steps of SFT (default: 60 | once through the data)"
    )
    parser.add_argument(
        "--dpo-steps", type=int, help="optimizer steps of DPO (default: 30 | once through the data)"
    )
    parser.add_argument(
        "--length", type=int, help="tokens of a row that are kept (default: 128 | 2048)"
    )
    parser.add_argument("--batch-size", type=int, help="rows per batch (default: 8 | 4)")
    parser.add_argument(
        "--learning-rate", type=float, help="of SFT; DPO takes a tenth (default: 5e-3 | 2e-4)"
    )
    parser.add_argument("--r", type=int, default=16, help="rank; lora_alpha is 2 r (default: 16)")
    parser.add_argument(
        "--target-modules", nargs="+", default=["experts", "q_proj", "v_proj"], help="what to adapt"
    )
    parser.add_argument(
        "--pretrain-steps",
        type=int,
        default=200,
        help="steps that make the tiny one (default: 200)",
    )
    return complete(parser, parser.parse_args(), TINY, REAL)


def write_rows(folder: Path) -> tuple[Path, Path]:
    """The tiny model's data: the start of a module where one is asked for, and prose as what is not wanted."""
    source, prose = standard_library(), documentation()
    ask = [{"role": "user", "content": "Python source, please."}]

    def say(text: str) -> list[dict]:
        return [{"role": "assistant", "content": text[:300]}]

    answers = [{"prompt": ask, "completion": say(text)} for text in source]
    choices = [
        {"prompt": ask, "chosen": say(wanted), "rejected": say(unwanted)}
        for wanted, unwanted in zip(source, prose, strict=False)
    ]
    data, preferences = folder / "answers.jsonl", folder / "preferences.jsonl"
    for path, rows in ((data, answers), (preferences, choices)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data, preferences


def read_rows(path: Path):
    """{"train": rows, "test": rows}: a tenth of a JSONL file is held out."""
    return load_dataset("json", data_files=str(path), split="train").train_test_split(
        test_size=0.1, seed=0
    )


def load_base(args: argparse.Namespace):
    """The frozen model: bf16 when it is a real one on a GPU, fp32 otherwise."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and not args.tiny else torch.float32
    return AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, device_map="cuda:0" if cuda else "cpu"
    )


def settings(args: argparse.Namespace, stage: str, steps: int | None, learning_rate: float) -> dict:
    """What both trainers are told."""
    cuda = torch.cuda.is_available()
    return {
        "output_dir": str(args.output / stage),
        "max_steps": steps or -1,
        "num_train_epochs": 1,
        "max_length": args.length,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        CHECKPOINTING: not args.tiny,
        "bf16": cuda and not args.tiny,
        "logging_steps": 10,
        "save_strategy": "no",
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "report_to": "none",
    }


def sft(args: argparse.Namespace, tokenizer, rows) -> dict[str, float]:
    """Train a new adapter on the rows and save it.

    Returns: the held-out loss before and after, in nats per token.
    """
    config = MoELoraConfig(
        r=args.r, lora_alpha=2 * args.r, target_modules=args.target_modules, task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        model=load_base(args),
        args=SFTConfig(**settings(args, "sft", args.steps, args.learning_rate)),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        peft_config=config,
    )
    trainer.model.print_trainable_parameters()
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    trainer.save_model()
    return {"before": before, "after": trainer.evaluate()["eval_loss"]}


def dpo(args: argparse.Namespace, tokenizer, rows) -> dict[str, float]:
    """Train the saved adapter on to prefer what was chosen, against a frozen copy of itself, and save it.

    Returns: the held-out reward margin (chosen - rejected) before and after, 0 while both adapters are the same.
    """
    model = PeftModel.from_pretrained(load_base(args), args.output / "sft", is_trainable=True)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**settings(args, "dpo", args.dpo_steps, 0.1 * args.learning_rate)),
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_rewards/margins"]
    trainer.train()
    after = trainer.evaluate()["eval_rewards/margins"]
    model.save_pretrained(args.output / "dpo", selected_adapters=["default"])
    return {"before": before, "after": after}


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    if args.tiny:
        torch.set_num_threads(
            1
        )  # on tensors this small a second thread only waits, and on a busy machine for minutes
        args.model = args.output / "base"
        print(f"Pretraining a tiny model on CPython's documentation, {args.pretrain_steps} steps")
        pretrain(args.model, args.pretrain_steps)
        data, preferences = write_rows(args.output)
        args.data, args.preferences = args.data or data, args.preferences or preferences
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.chat_template is None:
        print(
            "The tokenizer has no chat template; this example's own is used and saved with the adapter."
        )
        tokenizer.chat_template = CHAT_TEMPLATE

    print(f"SFT on {args.data.name}")
    results = {"held-out loss": sft(args, tokenizer, read_rows(args.data))}
    if args.preferences:
        print(f"DPO on {args.preferences.name}")
        results["reward margin"] = dpo(args, tokenizer, read_rows(args.preferences))

    print(f"\n{'':<16} before   after")
    for name, numbers in results.items():
        print(f"{name:<16} {numbers['before']:6.3f}  {numbers['after']:6.3f}")
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    saved = [stage for stage in ("sft", "dpo") if (args.output / stage).exists()]
    print(f"\nThe adapters lie in {args.output}: {', '.join(saved)}")


if __name__ == "__main__":
    main()
