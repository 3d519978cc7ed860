"""Adapted routers and experts, sharded over two processes, give the numbers of whole ones."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from helpers import SAME, adapter_parameters, assert_close, moe_lora, tiny_model, token_ids


def loss_of(model):
    return model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss


def train_sharded(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for family, beside in {"qwen3_moe": "o_proj", "deepseek_v3": "down_proj"}.items():
        model = moe_lora(tiny_model(family), target_modules=["experts", "gate", beside])
        loss = loss_of(model)
        loss.backward()
        expected = {name: p.grad for name, p in adapter_parameters(model).items()}
        model.zero_grad()
        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        sharded = loss_of(model)
        sharded.backward()
        assert_close(sharded, loss, SAME)
        for name, p in adapter_parameters(model).items():
            assert isinstance(p, DTensor), "nothing is sharded: the test proves nothing"
            assert_close(p.grad.full_tensor(), expected[name], SAME, name)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.engine("FSDP2", "train", "exact")
def test_fsdp_shards_what_is_adapted(tmp_path):
    torch.multiprocessing.spawn(train_sharded, (tmp_path / "store",), nprocs=2)
