"""What each process of test_several_processes.py runs: one step on its own rows of a batch."""

from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers import token_ids
from interop.models import pairs, peft_model
from peft_moe_lora import apply_to_peft
from peft_moe_lora.interop import wrappers


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def data_parallel(model):
    return DistributedDataParallel(model)


def sharded_by_layer(model):
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def _step(engine):
    def scenario(rank, folder):
        calls = []
        compute = wrappers.ExpertsCall.compute

        def counted(call, *rows):
            calls.append(call)
            return compute(call, *rows)

        wrappers.ExpertsCall.compute = counted
        model = peft_model().train()
        parallel = engine(model)
        with apply_to_peft():
            loss_of(parallel, token_ids()[rank : rank + 1]).backward()
        wrappers.ExpertsCall.compute = compute
        gradients = [parameter.grad for parameter in pairs(model)]
        whole = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]
        return {"calls": len(calls), "gradients": whole}

    return scenario


SCENARIOS = {engine.__name__: _step(engine) for engine in (data_parallel, sharded_by_layer)}
