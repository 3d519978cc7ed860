"""Fine-tune a Mixture-of-Experts model with one LoRA adapter per expert.

    python examples/finetune.py                                   a tiny model, made here: two minutes on a laptop
    python examples/finetune.py --model NAME --data FILE.jsonl    a real one, on a GPU

Both do the same job: measure the loss on held-out text, attach the adapter, train it, measure again, save it, load it
into a fresh model, compare the logits, merge it and compare once more. The tiny model is pretrained on CPython's
documentation and fine-tuned on the standard library's source. A line of a JSONL file has a "text", or "messages" for
the model's chat template. After an interruption the same command with --resume goes on from the last checkpoint.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from peft_moe_lora import MoELoraConfig
from texts import documentation, hold_out, pack, read_jsonl, standard_library
from tiny import complete, pretrain

# peft 0.21 reads a name that transformers 5.23 deprecates; drop when peft's floor moves
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)
# transformers 5.17 has only the old name of this setting, 5.23 warns of it; drop when the floor moves
NAMES = TrainingArguments.__dataclass_fields__
CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in NAMES else "gradient_checkpointing"
)

TINY = {
    "output": "moe-lora-demo",
    "length": 128,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "steps": 200,
}
REAL = {
    "output": "moe-lora-out",
    "length": 2048,
    "batch_size": 4,
    "learning_rate": 2e-4,
    "save_steps": 100,
}
EVAL_BLOCKS = 64
# of |a - b| / |a|, logits: fp32 sums in another order; bf16 rounds merged weights, which can change a token's experts
TOLERANCE = {
    torch.float32: {"reloaded": 1e-4, "merged": 1e-4},
    torch.bfloat16: {"reloaded": 1e-2, "merged": 1e-1},
}
WHAT_IS = {
    "base": "the tiny model, as pretrained",
    "adapter": "the adapter: PeftModel.from_pretrained(base, this)",
    "merged": "the model with the adapter merged in: AutoModelForCausalLM.from_pretrained(this)",
    "results.json": "the numbers above",
}


def parse_arguments() -> argparse.Namespace:
    """The command line; what it leaves open is filled from TINY or REAL."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", help="name or folder of a model (default: a tiny one, pretrained here)"
    )
    parser.add_argument(
        "--data", type=Path, help="JSONL to train on (default: the standard library's source)"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for everything (default: moe-lora-demo | moe-lora-out)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in the output folder"
    )
    parser.add_argument(
        "--steps", type=int, help="optimizer steps (default: 200 | once through the data)"
    )
    parser.add_argument(
        "--save-steps", type=int, help="steps between checkpoints (default: none | 100)"
    )
    parser.add_argument("--length", type=int, help="tokens per block (default: 128 | 2048)")
    parser.add_argument("--batch-size", type=int, help="blocks per batch (default: 16 | 4)")
    parser.add_argument(
        "--accumulate", type=int, default=1, help="batches per optimizer step (default: 1)"
    )
    parser.add_argument(
        "--learning-rate", type=float, help="highest learning rate (default: 1e-2 | 2e-4)"
    )
    parser.add_argument(
        "--r",
        type=int,
        default=16,
        help="rank of each expert's update; lora_alpha is 2 r (default: 16)",
    )
    parser.add_argument(
        "--target-modules", nargs="+", default=["experts", "q_proj", "v_proj"], help="what to adapt"
    )
    parser.add_argument(
        "--save-merged", action="store_true", help="write a real model's merged weights to disk too"
    )
    parser.add_argument(
        "--pretrain-steps",
        type=int,
        default=300,
        help="steps that make the tiny one (default: 300)",
    )
    return complete(parser, parser.parse_args(), TINY, REAL)


def load_base(args: argparse.Namespace):
    """The frozen model: bf16 when it is a real one on a GPU, fp32 otherwise."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and not args.tiny else torch.float32
    return AutoModelForCausalLM.from_pretrained(
        args.model, dtype=dtype, device_map="cuda:0" if cuda else "cpu"
    )


@torch.no_grad()
def held_out_loss(model, blocks: list, batch_size: int) -> float:
    """Mean loss of the first EVAL_BLOCKS blocks, in nats per token."""
    model.eval()
    batches = (
        torch.stack([block["input_ids"] for block in blocks[:EVAL_BLOCKS]])
        .to(model.device)
        .split(batch_size)
    )
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in batches]
    return sum(losses) / sum(map(len, batches))


@torch.no_grad()
def logits_of(model, blocks: list) -> torch.Tensor:
    """[1, T, V] logits on the start of a held-out block: two models that agree on them are one model."""
    model.eval()
    return model(input_ids=blocks[0]["input_ids"][None, :256].to(model.device)).logits.float().cpu()


def train(args: argparse.Namespace, blocks: list, held_out: dict[str, list]):
    """Attach an adapter, train it, save it.

    Returns: the held-out losses before and after, by text, and the trained model's logits.
    """
    config = MoELoraConfig(
        r=args.r, lora_alpha=2 * args.r, target_modules=args.target_modules, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_base(args), config)
    model.print_trainable_parameters()
    before = {
        name: held_out_loss(model, texts, args.batch_size) for name, texts in held_out.items()
    }

    arguments = TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps or -1,
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        **{CHECKPOINTING: not args.tiny, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        logging_steps=50 if args.tiny else 10,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 0,
        save_total_limit=2,
        label_names=["labels"],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    Trainer(model, arguments, train_dataset=blocks).train(resume_from_checkpoint=args.checkpoint)
    model.save_pretrained(args.output / "adapter")

    after = {name: held_out_loss(model, texts, args.batch_size) for name, texts in held_out.items()}
    return before, after, logits_of(model, held_out["documentation"])


def check(args: argparse.Namespace, blocks: list, trained: torch.Tensor) -> dict[str, float]:
    """Load the saved adapter into a fresh model, then merge it; both times the logits are the trained model's.

    Returns: |logits - trained| / |trained| of the base, the reloaded and the merged model.
    Raises:
        SystemExit: if the reloaded or the merged model differs by more than rounding.
    """
    model, distances = load_base(args), {}

    def measure(name):
        distances[name] = (
            torch.linalg.norm(logits_of(model, blocks) - trained) / torch.linalg.norm(trained)
        ).item()
        print(f"  {name:<10} {distances[name]:.1e}")

    print("Distance of the logits from the trained model's:")
    measure("base")
    model = PeftModel.from_pretrained(model, args.output / "adapter")
    measure("reloaded")
    model = model.merge_and_unload(safe_merge=True)
    measure("merged")
    for name, tolerance in TOLERANCE[model.dtype].items():
        if not distances[name] <= tolerance:
            raise SystemExit(
                f"The {name} model is not the trained one: {distances[name]:.1e} is over {tolerance:.0e}."
            )
    if args.tiny or args.save_merged:
        model.save_pretrained(args.output / "merged")
    return distances


def main() -> None:
    args = parse_arguments()
    args.checkpoint = get_last_checkpoint(args.output) if args.output.is_dir() else None
    if args.checkpoint and not args.resume:
        raise SystemExit(f"{args.checkpoint} is there already; add --resume to go on from it.")
    args.output.mkdir(parents=True, exist_ok=True)
    set_seed(0)

    if args.tiny:
        torch.set_num_threads(
            1
        )  # on tensors this small a second thread only waits, and on a busy machine for minutes
        args.model = args.output / "base"
        print(f"Pretraining a tiny model on CPython's documentation, {args.pretrain_steps} steps")
        pretrain(args.model, args.pretrain_steps)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts, unseen = hold_out(read_jsonl(args.data, tokenizer) if args.data else standard_library())
    data = args.data.name if args.data else "standard library"
    held_out = {
        "documentation": pack(hold_out(documentation())[1], tokenizer, args.length),
        data: pack(unseen, tokenizer, args.length),
    }

    print(f"Fine-tuning on {data}" + (f", from {args.checkpoint}" if args.checkpoint else ""))
    before, after, trained = train(args, pack(texts, tokenizer, args.length), held_out)
    print(f"\n{'held-out loss, nats per token':<32} before   after")
    for name in held_out:
        print(f"{name:<32} {before[name]:6.3f}  {after[name]:6.3f}")
    print()
    distances = check(args, held_out["documentation"], trained)

    results = {"before": before, "after": after, "distance_from_trained": distances}
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nEverything lies in {args.output}:")
    for path in sorted(args.output.iterdir()):
        print(f"  {path.name:<16} {WHAT_IS.get(path.name, 'a checkpoint to --resume from')}")


if __name__ == "__main__":
    main()
