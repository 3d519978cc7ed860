"""Fine-tune the experts of a model on several GPUs with the Trainer.

    accelerate launch --config_file CONFIG examples/distributed/train.py \\
        --model NAME --data FILE.jsonl
    accelerate launch --config_file CONFIG examples/distributed/train.py --tiny

CONFIG is a file of this folder: accelerate_fsdp2.yaml or accelerate_zero3.yaml. The adapter is
written to OUTPUT/adapter. Started again, it goes on from the last checkpoint in OUTPUT.
"""

import torch
from peft import get_peft_model
from recipe import adapter_config, blocks, load_options, make_tiny, parse
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


def main() -> None:
    """Load, adapt, train and save; every process does the same."""
    args = parse(__doc__)
    # the first thing, because it starts the group of processes, and from_pretrained asks for it
    arguments = TrainingArguments(
        str(args.output),
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        save_steps=max(1, args.steps // 2),
        logging_steps=max(1, args.steps // 10),
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )
    size = arguments.world_size
    if args.batch_size % size:
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of {size} processes")
    arguments.per_device_train_batch_size = args.batch_size // size
    if args.tiny:
        with arguments.main_process_first():
            if arguments.process_index == 0:
                make_tiny(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, **load_options(args))
    # before the Trainer, which shards the model with the adapter in it
    model = get_peft_model(base, adapter_config(args))
    # ZeRO-3 would lose the gradients of the first experts if their input needed none
    model.enable_input_require_grads()
    trainer = Trainer(model, arguments, train_dataset=blocks(args))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(args.output)))
    trainer.save_model(str(args.output / "adapter"))
    trainer.accelerator.print(
        f"{trainer.accelerator.distributed_type.value}, {size} processes: the adapter is in "
        f"{args.output / 'adapter'}"
    )


if __name__ == "__main__":
    main()
