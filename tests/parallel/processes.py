"""Runs functions in several processes on this machine, and brings back what they return."""

import datetime
import importlib
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def run(module, folder, world_size=2, backend="gloo"):
    """Call every scenario of a module in `world_size` processes of one group.

    Args:
        module: name of a module with SCENARIOS: name -> function(rank, folder). A function returns
            numbers and CPU tensors, or raises in every process.
        folder: a folder that all processes share.
        backend: "nccl" gives every process a GPU of its own.
    Returns: name -> list of what it returned in each process. An exception comes as a string that
        starts with the name of its type.
    """
    torch.multiprocessing.spawn(_process, (module, folder, world_size, backend), nprocs=world_size)
    saved = [torch.load(Path(folder) / f"rank{rank}.pt") for rank in range(world_size)]
    return {name: [results[name] for results in saved] for name in saved[0]}


def _process(rank, module, folder, world_size, backend):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/rendezvous"
    timeout = datetime.timedelta(seconds=60)
    if backend == "nccl":
        # as torchrun sets them; transformers reads them
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = str(world_size)
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend, init_method=store, rank=rank, world_size=world_size, timeout=timeout
    )
    results = {}
    for name, scenario in importlib.import_module(module).SCENARIOS.items():
        torch.manual_seed(0)
        try:
            results[name] = scenario(rank, Path(folder))
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        dist.barrier()
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
