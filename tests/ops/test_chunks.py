"""Sums over an expert's rows, cut into chunks: experts that end where a chunk ends."""

import pytest
import torch

from ops.problems import DEVICE, assert_within, random
from peft_moe_lora.ops import reference

CHUNK = 16
# one chunk exactly beside larger and smaller experts, in each place; two chunks exactly
ROWS = [
    [CHUNK, CHUNK + 1, 0, 2 * CHUNK, 1, CHUNK - 1],
    [0, 3 * CHUNK, CHUNK],
    [CHUNK, CHUNK, CHUNK],
    [2 * CHUNK + 1, CHUNK],
]


@pytest.fixture(params=[1024, 1], ids=["", "one program of sums"])
def chunks(request, monkeypatch):
    """Chunks of CHUNK rows; one program adds the sums of one expert, or of all."""
    monkeypatch.setattr("peft_moe_lora.ops.kernels.outer.chunk_rows", lambda *sizes: CHUNK)
    monkeypatch.setattr("peft_moe_lora.ops.kernels.tiles.chunks.SUM_PROGRAMS", request.param)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.usefixtures("chunks")
def test_an_expert_of_exactly_one_chunk(kernels, rows):
    E = len(rows)
    experts = torch.repeat_interleave(torch.arange(E), torch.tensor(rows))
    index = experts[torch.randperm(len(experts))][:, None].to(DEVICE)
    routing = kernels.route(index, E)
    assert routing.expert_offsets.diff().tolist() == rows
    left, right = random(len(experts), 6), random(len(experts), 40)
    out = torch.empty(E, 6, 40, device=DEVICE)
    actual = kernels.expert_outer(left, right, routing, out)
    twin = reference.expert_outer(left, right, routing, torch.zeros_like(out))
    wide = torch.zeros_like(out).double()
    exact = reference.expert_outer(left.double(), right.double(), routing, wide)
    assert_within(actual, twin, exact, torch.float32)
