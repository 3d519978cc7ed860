"""Fine-tune an adapter on every expert with TRL: SFTTrainer, then DPOTrainer.

    python examples/trl_sft.py                    a tiny model, made here: two minutes on a laptop
    python examples/trl_sft.py --model NAME --data FILE.jsonl --preferences FILE.jsonl    a real one

Each line of --data is a row as SFTTrainer takes it ("text", "messages", or "prompt" and
"completion"); each line of --preferences one as DPOTrainer does ("prompt", "chosen", "rejected").
Without --preferences there is no DPO. The tiny model is pretrained on CPython's documentation,
learns to answer with the standard library's source, and then to prefer source to prose. DPO trains
the adapter that SFT saved; its reference is a frozen copy of that adapter, which TRL names "ref".
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, load_dataset
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from arguments import REAL_RATE, TINY_RATE, Arguments, parse
from finetune import CHECKPOINTING, load_base
from peft_moe_lora import MoELoraConfig
from texts import documentation, standard_library
from tiny import make_base

TINY = {
    "output": "moe-lora-trl",
    "length": 128,
    "batch_size": 8,
    "learning_rate": TINY_RATE,
    "steps": 60,
    "dpo_steps": 30,
    "pretrain_steps": 200,
}
REAL = {
    "length": 2048,
    "batch_size": 4,
    "learning_rate": REAL_RATE,
    "steps": 0,
    "dpo_steps": 0,
}
# for a tokenizer without one: a line that says who speaks, what is said, the end
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

Message = dict[str, str]


@dataclass
class TrlArguments(Arguments):
    """The options of this example."""

    preferences: Path | None = field(
        default=None, metadata={"help": "JSONL for DPO (without it: written here, or no DPO)"}
    )
    dpo_steps: int = field(
        default=0,
        metadata={"help": "optimizer steps of DPO; 0: once through the data", "metavar": "N"},
    )
    target_modules: list[str] = field(
        default_factory=lambda: ["experts", "q_proj", "k_proj", "v_proj", "o_proj"],
        metadata={
            "help": "what to adapt (default: experts q_proj k_proj v_proj o_proj)",
            "metavar": "NAME",
        },
    )


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Write the tiny model's data: source is the right answer, prose the wrong one.

    Returns: the files for SFT and for DPO.
    """
    ask = [{"role": "user", "content": "Python source, please."}]

    def say(text: str) -> list[Message]:
        return [{"role": "assistant", "content": text[:300]}]

    source = standard_library()
    answers = [{"prompt": ask, "completion": say(text)} for text in source]
    choices = [
        {"prompt": ask, "chosen": say(wanted), "rejected": say(unwanted)}
        for wanted, unwanted in zip(source, documentation(), strict=False)
    ]
    data = folder / "answers.jsonl"
    preferences = folder / "preferences.jsonl"
    for path, rows in ((data, answers), (preferences, choices)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data, preferences


def read_rows(path: Path) -> DatasetDict:
    """{"train": rows, "test": rows}: a tenth of a JSONL file is held out."""
    rows = load_dataset("json", data_files=str(path), split="train")
    return rows.train_test_split(test_size=0.1, seed=0)


def settings(args: TrlArguments, stage: str, steps: int, learning_rate: float) -> dict[str, Any]:
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
        "use_liger_kernel": args.liger,
    }


def sft(
    args: TrlArguments, tokenizer: PreTrainedTokenizerBase, rows: DatasetDict
) -> dict[str, float]:
    """Train a new adapter on the rows, and save it.

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


def dpo(
    args: TrlArguments, tokenizer: PreTrainedTokenizerBase, rows: DatasetDict
) -> dict[str, float]:
    """Train the saved adapter to prefer the chosen answers, against a frozen copy, and save it.

    The learning rate is a tenth of that of SFT.

    Returns: the held-out reward margin (chosen - rejected) before and after; before, it is 0.
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
    """Make the tiny model where none is named; then SFT, and DPO where there are preferences."""
    args = parse(TrlArguments, __doc__, TINY, REAL)
    args.output.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    if args.tiny:
        make_base(args.output / "base", args.pretrain_steps)
        data, preferences = write_rows(args.output)
        args.data = args.data or data
        args.preferences = args.preferences or preferences
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    if tokenizer.chat_template is None:
        print(
            "The tokenizer has no chat template; this example's own is used, and saved with the "
            "adapter."
        )
        tokenizer.chat_template = CHAT_TEMPLATE

    print(f"SFT on {args.data.name}")
    results = {"held-out loss": sft(args, tokenizer, read_rows(args.data))}
    stages = ["sft"]
    if args.preferences:
        print(f"DPO on {args.preferences.name}")
        results["reward margin"] = dpo(args, tokenizer, read_rows(args.preferences))
        stages.append("dpo")

    print(f"\n{'':<16} before   after")
    for name, numbers in results.items():
        print(f"{name:<16} {numbers['before']:6.3f}  {numbers['after']:6.3f}")
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nThe adapters are in {args.output}: {', '.join(stages)}")


if __name__ == "__main__":
    main()
