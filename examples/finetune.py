"""Fine-tune a Mixture-of-Experts model with one LoRA adapter per expert.

    python examples/finetune.py                                 a tiny model, made here, on a laptop
    python examples/finetune.py --model NAME --data FILE.jsonl  a real one, on a GPU

Both do the same: measure the loss on held-out text, attach the adapter, train it, measure again,
save it, load it into a fresh model and compare the logits, merge it and compare once more. The last
lines are a verdict; the exit code is 1 if it is FAIL. The tiny model is pretrained on CPython's
documentation and fine-tuned on the standard library's source. Each line of a JSONL file has "text",
or "messages" for the model's chat template. After an interruption, the same command with --resume
goes on from the last checkpoint.
"""

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from arguments import REAL_RATE, TINY_RATE, Arguments, parse
from peft_moe_lora import MoELoraConfig
from texts import Block, documentation, hold_out, pack, read_jsonl, standard_library
from tiny import make_base
from verdict import (
    Check,
    continuation,
    next_command,
    plot_losses,
    print_checks,
    print_losses,
)

# peft 0.21 reads a name that transformers 5.23 deprecates; drop when peft's floor moves
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)
# transformers 5.17 has only the old name of this setting, 5.23 warns of it; drop with the floor
CHECKPOINTING = "gradient_checkpointing"
if "activation_checkpointing" in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "activation_checkpointing"

TINY = {
    "output": "moe-lora-demo",
    "length": 128,
    "batch_size": 16,
    "learning_rate": TINY_RATE,
    "steps": 200,
    "save_steps": 0,
}
REAL = {
    "output": "moe-lora-out",
    "length": 2048,
    "batch_size": 4,
    "learning_rate": REAL_RATE,
    "steps": 0,
    "save_steps": 100,
}
EVAL_BLOCKS = 64
# of |a - b| / |b| of the logits. In fp32 sums are taken in another order; in bf16 merged weights
# are rounded, which can send a token to other experts
TOLERANCE = {
    torch.float32: {"reloaded": 1e-4, "merged": 1e-4},
    torch.bfloat16: {"reloaded": 1e-2, "merged": 1e-1},
}
WHAT_IS = {
    "base": "the tiny model, as pretrained",
    "adapter": "the adapter: PeftModel.from_pretrained(base, this)",
    "merged": "the model with the adapter merged in: AutoModelForCausalLM.from_pretrained(this)",
    "loss.png": "the training loss",
    "results.json": "the numbers above",
}
TINY_PLAN = """\
This takes less than two minutes on two CPU cores, and needs no GPU and no network. It will
  1. pretrain a tiny Mixture-of-Experts model on CPython's documentation, {pretrain_steps} steps;
  2. train a LoRA of its experts and attention on the standard library's source, {steps} steps;
  3. save the adapter, load it into a fresh model, and compare the logits;
  4. merge the adapter into the model, and compare the logits again.
"""

Losses = dict[str, float]


@dataclass
class FinetuneArguments(Arguments):
    """The options of this example."""

    save_steps: int = field(
        default=0, metadata={"help": "steps between checkpoints; 0: none", "metavar": "N"}
    )
    accumulate: int = field(
        default=1, metadata={"help": "batches per optimizer step (default: 1)", "metavar": "N"}
    )
    target_modules: list[str] = field(
        default_factory=lambda: ["experts", "q_proj", "k_proj", "v_proj", "o_proj"],
        metadata={
            "help": "what to adapt (default: experts q_proj k_proj v_proj o_proj)",
            "metavar": "NAME",
        },
    )
    resume: bool = field(
        default=False, metadata={"help": "go on from the last checkpoint in the output folder"}
    )
    save_merged: bool = field(
        default=False, metadata={"help": "write a real model's merged weights to disk too"}
    )


def device_and_dtype(args: Arguments) -> dict[str, Any]:
    """Where and how a base model is loaded: bf16 if it is a real one on a GPU, fp32 otherwise."""
    if not torch.cuda.is_available():
        return {"dtype": torch.float32, "device_map": "cpu"}
    if args.tiny:
        return {"dtype": torch.float32, "device_map": "cuda:0"}
    return {"dtype": torch.bfloat16, "device_map": "cuda:0"}


def load_base(args: Arguments) -> PreTrainedModel:
    """The frozen model."""
    return AutoModelForCausalLM.from_pretrained(args.base, **device_and_dtype(args))


@torch.no_grad()
def held_out_loss(model: PeftModel, blocks: list[Block], batch_size: int) -> float:
    """Mean loss of the first EVAL_BLOCKS blocks, in nats per token."""
    model.eval()
    ids = torch.stack([block["input_ids"] for block in blocks[:EVAL_BLOCKS]]).to(model.device)
    total = 0.0
    for batch in ids.split(batch_size):
        total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    return total / len(ids)


@torch.no_grad()
def logits_of(model: torch.nn.Module, blocks: list[Block]) -> torch.Tensor:
    """[1, T, V] logits on the start of a held-out block, to see whether two models are the same."""
    model.eval()
    ids = blocks[0]["input_ids"][None, :256].to(model.device)
    return model(input_ids=ids).logits.float().cpu()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item()


def training_arguments(args: Arguments, **more: Any) -> TrainingArguments:
    """What the Trainer is told; `more` are further settings of an example."""
    logging_steps = 10
    if args.tiny:
        logging_steps = 20
    checkpointing = {
        CHECKPOINTING: not args.tiny,
        f"{CHECKPOINTING}_kwargs": {"use_reentrant": False},
    }
    return TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps or -1,
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        logging_steps=logging_steps,
        label_names=["labels"],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        use_liger_kernel=args.liger,
        **checkpointing,
        **more,
    )


@dataclass(frozen=True)
class Trained:
    """What training found.

    Attributes:
        before, after: held-out losses by text, in nats per token.
        prompt: the start of a held-out text.
        samples: how the model goes on, before and after.
        logits: of the trained model, for `check`.
        history: what the Trainer logged.
    """

    before: Losses
    after: Losses
    prompt: str
    samples: tuple[str, str]
    logits: torch.Tensor
    history: list[dict[str, Any]]


def train(
    args: FinetuneArguments,
    tokenizer: PreTrainedTokenizerBase,
    blocks: list[Block],
    held_out: dict[str, list[Block]],
    checkpoint: str | None,
) -> Trained:
    """Attach an adapter, train it, save it with the tokenizer.

    Args:
        held_out: blocks by text; the last text is the one that is trained on.
        checkpoint: folder of a checkpoint to go on from.
    """
    config = MoELoraConfig(
        r=args.r, lora_alpha=2 * args.r, target_modules=args.target_modules, task_type="CAUSAL_LM"
    )
    model = get_peft_model(load_base(args), config)
    model.print_trainable_parameters()

    def losses() -> Losses:
        return {
            name: held_out_loss(model, unseen, args.batch_size) for name, unseen in held_out.items()
        }

    shown = list(held_out.values())[-1][0]
    before = losses()
    prompt, sample_before = continuation(model, tokenizer, shown)
    saving: dict[str, Any] = {"save_strategy": "no"}
    if args.save_steps:
        saving = {"save_strategy": "steps", "save_steps": args.save_steps, "save_total_limit": 2}
    trainer = Trainer(
        model,
        training_arguments(args, gradient_accumulation_steps=args.accumulate, **saving),
        train_dataset=blocks,
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    model.save_pretrained(args.output / "adapter")
    tokenizer.save_pretrained(args.output / "adapter")
    _, sample_after = continuation(model, tokenizer, shown)
    return Trained(
        before,
        losses(),
        prompt,
        (sample_before, sample_after),
        logits_of(model, held_out["documentation"]),
        trainer.state.log_history,
    )


def check(
    args: FinetuneArguments,
    tokenizer: PreTrainedTokenizerBase,
    blocks: list[Block],
    trained: torch.Tensor,
) -> tuple[dict[str, float], list[Check]]:
    """Load the saved adapter into a fresh model, then merge it, and compare the logits each time.

    Returns: |logits - trained| / |trained| of the base, the reloaded and the merged model, and
        whether that of the base is larger and those of the others are rounding.
    """
    print("Loading the adapter into a fresh model, and merging it")
    model = load_base(args)
    tolerances = TOLERANCE[model.dtype]
    distances = {"base": distance(logits_of(model, blocks), trained)}
    model = PeftModel.from_pretrained(model, args.output / "adapter")
    distances["reloaded"] = distance(logits_of(model, blocks), trained)
    model = model.merge_and_unload(safe_merge=True)
    distances["merged"] = distance(logits_of(model, blocks), trained)
    if args.tiny or args.save_merged:
        model.save_pretrained(args.output / "merged")
        tokenizer.save_pretrained(args.output / "merged")
    changed = Check(
        f"the adapter changes the logits, by {distances['base']:.1e}",
        distances["base"] > distances["reloaded"],
    )
    same = [
        Check(
            f"the {name} model gives the trained model's logits: they differ by "
            f"{distances[name]:.1e}, rounding allows {tolerance:.0e}",
            distances[name] <= tolerance,
        )
        for name, tolerance in tolerances.items()
    ]
    return distances, [changed, *same]


def find_checkpoint(args: FinetuneArguments) -> str | None:
    """The last checkpoint in the output folder.

    Raises:
        SystemExit: if there is one, and --resume was not given.
    """
    if not args.output.is_dir():
        return None
    checkpoint = get_last_checkpoint(args.output)
    if checkpoint and not args.resume:
        raise SystemExit(f"{checkpoint} is there already; add --resume to go on from it.")
    return checkpoint


def main() -> None:
    """Pretrain the tiny model where none is named; train, save, reload and merge an adapter."""
    args = parse(FinetuneArguments, __doc__, TINY, REAL)
    checkpoint = find_checkpoint(args)
    args.output.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    if args.tiny:
        print(TINY_PLAN.format(pretrain_steps=args.pretrain_steps, steps=args.steps))
        make_base(args.output / "base", args.pretrain_steps)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    data = "standard library"
    texts = standard_library()
    if args.data:
        data = args.data.name
        texts = read_jsonl(args.data, tokenizer)
    texts, unseen = hold_out(texts)
    _, unseen_documentation = hold_out(documentation())
    held_out = {
        "documentation": pack(unseen_documentation, tokenizer, args.length),
        data: pack(unseen, tokenizer, args.length),
    }

    print(f"Fine-tuning on {data}")
    if checkpoint:
        print(f"Going on from {checkpoint}")
    blocks = pack(texts, tokenizer, args.length)
    trained = train(args, tokenizer, blocks, held_out, checkpoint)
    distances, checks = check(args, tokenizer, held_out["documentation"], trained.logits)
    results = {
        "before": trained.before,
        "after": trained.after,
        "distance_from_trained": distances,
    }
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    pictured = plot_losses(trained.history, args.output / "loss.png")
    report(args, trained, data, checks)
    if not pictured:
        print("For a picture of the loss: pip install 'peft-moe-lora[examples]'")


def report(args: FinetuneArguments, trained: Trained, data: str, checks: list[Check]) -> None:
    """Print what was found, the verdict, what is where, and the next command."""
    print_losses(trained.before, trained.after)
    before, after = trained.samples
    print(f"\nHow {trained.prompt!r} goes on")
    print(f"  before  {before}")
    print(f"  after   {after}")
    learned = Check(
        f"{data} was learned: its held-out loss fell from {trained.before[data]:.3f} to "
        f"{trained.after[data]:.3f}",
        trained.after[data] < trained.before[data],
    )
    print_checks([learned, *checks])
    print(f"\nEverything is in {args.output}:")
    for path in sorted(args.output.iterdir()):
        print(f"  {path.name:<16} {WHAT_IS.get(path.name, 'a checkpoint to --resume from')}")
    print("\nNext, the adapter in the form that vLLM and SGLang read:")
    print(f"  {next_command(args.output, args.base)}")


if __name__ == "__main__":
    main()
