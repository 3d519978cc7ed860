"""Fine-tune a Mixture-of-Experts model whose experts are stored in 4 bits.

    python examples/qlora.py                                     a tiny model, pretrained here, on any machine
    python examples/qlora.py --model NAME --data FILE.jsonl      a model of yours; --linear-4bit for its other layers

The model is loaded with its experts quantized as they arrive (`load_quantized`), an adapter on its experts and its
attention is trained and saved, loaded again onto freshly quantized experts, and merged into the unquantized checkpoint
(`merge_adapter`), where it is exact up to the checkpoint's dtype.
"""

import argparse
import json
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

from finetune import CHECKPOINTING, held_out_loss, logits_of
from peft_moe_lora import MoELoraConfig, load_quantized, merge_adapter
from texts import documentation, hold_out, pack, read_jsonl, standard_library
from tiny import complete, pretrain

# peft 0.21 reads a name that transformers 5.23 deprecates; drop when peft's floor moves
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)

TINY = {
    "output": "moe-qlora-demo",
    "length": 128,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "steps": 200,
}
REAL = {
    "output": "moe-qlora-out",
    "length": 2048,
    "batch_size": 1,
    "learning_rate": 2e-4,
    "steps": -1,
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
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
        "--output",
        type=Path,
        help="folder for everything (default: moe-qlora-demo | moe-qlora-out)",
    )
    parser.add_argument(
        "--experts", default="nf4", choices=("nf4", "fp4", "int8", "mxfp4"), help="(default: nf4)"
    )
    parser.add_argument(
        "--linear-4bit", action="store_true", help="the other linear layers too, by bitsandbytes"
    )
    parser.add_argument(
        "--merge", action="store_true", help="merge a real model's adapter into its checkpoint too"
    )
    parser.add_argument(
        "--steps", type=int, help="optimizer steps (default: 200 | once through the data)"
    )
    parser.add_argument("--length", type=int, help="tokens per block (default: 128 | 2048)")
    parser.add_argument("--batch-size", type=int, help="blocks per batch (default: 16 | 1)")
    parser.add_argument(
        "--learning-rate", type=float, help="highest learning rate (default: 1e-2 | 2e-4)"
    )
    parser.add_argument(
        "--r", type=int, default=4, help="rank of each update; lora_alpha is 2 r (default: 4)"
    )
    parser.add_argument(
        "--pretrain-steps",
        type=int,
        default=300,
        help="steps that make the tiny one (default: 300)",
    )
    return complete(parser, parser.parse_args(argv), TINY, REAL)


def load_base(args: argparse.Namespace):
    """The frozen model, its experts quantized: bf16 besides when it is a real one on a GPU, fp32 otherwise."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda and not args.tiny else torch.float32
    linear = None
    if args.linear_4bit:
        linear = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return load_quantized(
        str(args.model),
        args.experts,
        quantization_config=linear,
        dtype=dtype,
        device_map="cuda:0" if cuda else "cpu",
    )


def stored_bytes(model) -> int:
    """Bytes of everything a model holds."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|."""
    return (torch.linalg.norm(a - b) / torch.linalg.norm(b)).item()


def main(argv: list[str] | None = None) -> dict:
    args = parse_arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    set_seed(0)
    if args.tiny:
        torch.set_num_threads(1)  # on tensors this small a second thread only waits
        args.model = args.output / "base"
        print(f"Pretraining a tiny model on CPython's documentation, {args.pretrain_steps} steps")
        pretrain(args.model, args.pretrain_steps)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts, unseen = hold_out(read_jsonl(args.data, tokenizer) if args.data else standard_library())
    blocks, held_out = (pack(part, tokenizer, args.length) for part in (texts, unseen))
    probe = pack(hold_out(documentation())[1], tokenizer, args.length)

    base = load_base(args)
    results = {"experts": args.experts, "bytes": stored_bytes(base)}
    print(f"Experts in {args.experts}: {results['bytes'] / 2**20:,.1f} MiB in all")
    config = MoELoraConfig(
        r=args.r,
        lora_alpha=2 * args.r,
        target_modules=["experts", "q_proj", "k_proj", "v_proj", "o_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    results["before"] = held_out_loss(model, held_out, args.batch_size)
    arguments = TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=10,
        **{CHECKPOINTING: not args.tiny, f"{CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        logging_steps=50 if args.tiny else 10,
        save_strategy="no",
        label_names=["labels"],
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )
    Trainer(model, arguments, train_dataset=blocks).train()
    model.save_pretrained(args.output / "adapter")
    results["after"] = held_out_loss(model, held_out, args.batch_size)
    trained = logits_of(model, probe)
    print(
        f"Held-out loss, nats per token: {results['before']:.3f} before, {results['after']:.3f} after"
    )
    del model, base

    model = PeftModel.from_pretrained(load_base(args), args.output / "adapter")
    results["reloaded"] = distance(logits_of(model, probe), trained)
    print(
        f"Distance of the logits, adapter loaded onto experts quantized anew: {results['reloaded']:.1e}"
    )
    if not results["reloaded"] <= (1e-4 if model.dtype == torch.float32 else 1e-2):
        raise SystemExit("The loaded adapter is not the trained one.")
    with model.disable_adapter():
        results["base"] = distance(logits_of(model, probe), trained)
    del model
    if args.tiny or args.merge:
        done = merge_adapter(
            args.output / "adapter", args.model, args.output / "merged", force=True
        )
        merged = AutoModelForCausalLM.from_pretrained(args.output / "merged")
        results["merged"] = distance(logits_of(merged, probe), trained)
        print(done)
        print(f"Distance of the merged, unquantized model's logits: {results['merged']:.1e}")
        print(f"That of the model without adapter: {results['base']:.1e}")
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"Everything lies in {args.output}")
    return results


if __name__ == "__main__":
    main()
