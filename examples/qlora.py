"""Fine-tune a Mixture-of-Experts model whose experts are stored in 4 bits.

    python examples/qlora.py                                 a tiny model, made here, on any machine
    python examples/qlora.py --model NAME --data FILE.jsonl  a model of yours

The model is loaded with its experts quantized as they arrive (`load_quantized`). An adapter on its
experts and its attention is trained and saved, loaded again onto freshly quantized experts, and
merged into the unquantized checkpoint (`merge_adapter`), where it is exact up to the checkpoint's
dtype. With --linear-4bit the other linear layers are in 4 bits too.
"""

import json
from dataclasses import dataclass, field

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from arguments import REAL_RATE, TINY_RATE, Arguments, parse
from finetune import device_and_dtype, distance, held_out_loss, logits_of, training_arguments
from peft_moe_lora import MoELoraConfig, load_quantized, merge_adapter
from texts import Block, documentation, hold_out, pack, read_jsonl, standard_library
from tiny import make_base

TINY = {
    "output": "moe-qlora-demo",
    "length": 128,
    "batch_size": 16,
    "learning_rate": TINY_RATE,
    "steps": 200,
    "r": 4,
}
REAL = {
    "output": "moe-qlora-out",
    "length": 2048,
    "batch_size": 1,
    "learning_rate": REAL_RATE,
    "steps": 0,
}
# of |a - b| / |b| of the logits, for the adapter on experts quantized anew
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


@dataclass
class QloraArguments(Arguments):
    """The options of this example."""

    experts: str = field(
        default="nf4",
        metadata={"choices": ["nf4", "fp4", "int8", "mxfp4"], "help": "(default: nf4)"},
    )
    linear_4bit: bool = field(
        default=False, metadata={"help": "the other linear layers too, by bitsandbytes"}
    )
    merge: bool = field(
        default=False, metadata={"help": "merge a real model's adapter into its checkpoint too"}
    )


def load_base(args: QloraArguments) -> PreTrainedModel:
    """The frozen model with quantized experts."""
    settings = device_and_dtype(args)
    linear = None
    if args.linear_4bit:
        linear = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=settings["dtype"],
        )
    return load_quantized(args.base, args.experts, quantization_config=linear, **settings)


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of everything a model holds."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def train(
    args: QloraArguments,
    tokenizer: PreTrainedTokenizerBase,
    blocks: list[Block],
    held_out: list[Block],
    probe: list[Block],
) -> tuple[dict[str, float], torch.Tensor]:
    """Attach an adapter, train it, save it with the tokenizer.

    Returns: the model's bytes and its held-out losses, and its logits on `probe`.
    """
    base = load_base(args)
    size = stored_bytes(base)
    print(f"Experts in {args.experts}: {size / 2**20:,.1f} MiB in all")
    config = MoELoraConfig(
        r=args.r,
        lora_alpha=2 * args.r,
        target_modules=["experts", "q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    before = held_out_loss(model, held_out, args.batch_size)
    settings = training_arguments(args, save_strategy="no")
    Trainer(model, settings, train_dataset=blocks).train()
    model.save_pretrained(args.output / "adapter")
    tokenizer.save_pretrained(args.output / "adapter")
    after = held_out_loss(model, held_out, args.batch_size)
    print(f"Held-out loss, nats per token: {before:.3f} before, {after:.3f} after")
    return {"bytes": size, "before": before, "after": after}, logits_of(model, probe)


def check_reloaded(
    args: QloraArguments, probe: list[Block], trained: torch.Tensor
) -> dict[str, float]:
    """Load the saved adapter onto experts that are quantized anew, and compare the logits.

    Returns: the distances of the reloaded model and of the base from the trained model.
    Raises:
        SystemExit: if the reloaded model differs by more than rounding.
    """
    model = PeftModel.from_pretrained(load_base(args), args.output / "adapter")
    reloaded = distance(logits_of(model, probe), trained)
    print(f"Distance of the logits, adapter on experts quantized anew: {reloaded:.1e}")
    if not reloaded <= TOLERANCE[model.dtype]:
        raise SystemExit("The loaded adapter is not the trained one.")
    with model.disable_adapter():
        base = distance(logits_of(model, probe), trained)
    return {"reloaded": reloaded, "base": base}


def merge(args: QloraArguments, probe: list[Block], trained: torch.Tensor) -> float:
    """Merge the adapter into the unquantized checkpoint.

    Returns: the distance of the merged model's logits from the trained model's.
    """
    merged = args.output / "merged"
    print(merge_adapter(args.output / "adapter", args.base, merged, force=True))
    model = AutoModelForCausalLM.from_pretrained(merged)
    found = distance(logits_of(model, probe), trained)
    print(f"Distance of the logits, merged into the unquantized model: {found:.1e}")
    return found


def main(argv: list[str] | None = None) -> None:
    """Train an adapter on quantized experts, save it, load it again, merge it."""
    args = parse(QloraArguments, __doc__, TINY, REAL, argv)
    args.output.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    if args.tiny:
        make_base(args.output / "base", args.pretrain_steps)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    texts = standard_library()
    if args.data:
        texts = read_jsonl(args.data, tokenizer)
    texts, unseen = hold_out(texts)
    blocks = pack(texts, tokenizer, args.length)
    held_out = pack(unseen, tokenizer, args.length)
    _, unseen_documentation = hold_out(documentation())
    probe = pack(unseen_documentation, tokenizer, args.length)

    found, trained = train(args, tokenizer, blocks, held_out, probe)
    results = {"experts": args.experts, **found, **check_reloaded(args, probe, trained)}
    if args.tiny or args.merge:
        results["merged"] = merge(args, probe, trained)
        print(f"That of the model without adapter: {results['base']:.1e}")
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"Everything is in {args.output}")


if __name__ == "__main__":
    main()
