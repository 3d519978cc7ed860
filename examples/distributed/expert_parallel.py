"""Fine-tune the experts of a model on several GPUs, each of which holds some of the experts.

    torchrun --standalone --nproc_per_node 8 examples/distributed/expert_parallel.py \\
        --model NAME --data FILE.jsonl
    torchrun --standalone --nproc_per_node 2 examples/distributed/expert_parallel.py --tiny

Every process has its own part of each batch (`fsdp_size`) and of the experts (`ep_size`). The other
weights are sharded by FSDP2. The adapter is written to OUTPUT/adapter.
"""

import argparse
import os

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from recipe import Block, adapter_config, blocks, load_options, make_tiny, parse
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig


def load(args: argparse.Namespace, rank: int, size: int) -> PeftModel:
    """The model, divided among the processes while it is loaded, and a new adapter on it."""
    if args.tiny:
        if rank == 0:
            make_tiny(args.model)
        dist.barrier()
    divided = DistributedConfig(fsdp_size=size, ep_size=size)
    base = AutoModelForCausalLM.from_pretrained(
        args.model, distributed_config=divided, **load_options(args)
    )
    torch.manual_seed(0)
    return get_peft_model(base, adapter_config(args)).train()


def batch(data: list[Block], step: int, args: argparse.Namespace, rank: int) -> torch.Tensor:
    """This process's blocks of a step, [batch_size / processes, length]."""
    size = dist.get_world_size()
    mine = range(rank, args.batch_size, size)
    chosen = [data[(step * args.batch_size + i) % len(data)]["input_ids"] for i in mine]
    return torch.tensor(chosen)


def main() -> None:
    """Load, train and save; every process does the same."""
    args = parse(__doc__)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cpu")
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    size = dist.get_world_size()
    if args.batch_size % size:
        raise ValueError(f"--batch-size {args.batch_size} must be a multiple of {size} processes")
    model = load(args, rank, size)
    data = blocks(args)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate)
    for step in range(args.steps):
        ids = batch(data, step, args, rank).to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: loss {mean.item() / size:.4f}")
    # every process calls, the first one writes
    model.save_pretrained(args.output / "adapter")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
