"""`expert_shrink` and `expert_outer` of the same rows: two operations, or one pass over the rows.

The one pass runs on an H100 or H200.
"""

import pytest
import torch

from ops.problems import (
    CUT_ROWS,
    DEVICE,
    Problem,
    assert_within,
    dtypes,
    hopper,
    out_of,
    random,
    rank_rows,
    shapes,
    wide,
)
from peft_moe_lora.ops import composed, reference


def check(kernels, valid, x, lora_A, right, routing, out, dtype, **options):
    """Hold both results to the rule of `problems`; returns them."""
    results = []
    for ops, widen in ((kernels, lambda t: t), (reference, lambda t: t), (reference, wide)):
        outer = out if ops is kernels else torch.full_like(widen(out), float("nan"))
        operands = *map(widen, (x, lora_A, right)), routing, 0.7, outer
        xa = composed.expert_shrink_outer(
            ops, *operands, **{key: widen(value) for key, value in options.items()}
        )
        results.append((xa[:valid], outer))
    for actual, twin, exact in zip(*results, strict=True):
        assert_within(actual, twin, exact, dtype)
    return results[0]


@shapes
@dtypes
@pytest.mark.parametrize("of_B", [True, False])
def test_both_are_what_the_twins_say(kernels, shape, dtype, of_B):
    p = Problem(shape, dtype)
    E, routing = shape.E, kernels.route(p.index, shape.E)
    out = out_of(E, shape.H, shape.r, of_B)
    options = {"row_weights": p.weights, "gather": True}
    check(kernels, p.valid, p.x, p.down_B.transpose(1, 2), p.xa, routing, out, dtype, **options)
    out = out_of(E, 2 * shape.I, shape.r, of_B)
    check(kernels, p.valid, p.rows(2 * shape.I), p.up_B.transpose(1, 2), p.xa, routing, out, dtype)


class Pair:
    """The operands of a call over 96 experts: CUT_ROWS, then `even` rows each; the rest is NaN."""

    def __init__(self, kernels, even, K, r, gather, weighted, dtype):
        rows = [*CUT_ROWS, *[even] * (96 - len(CUT_ROWS))]
        ids = torch.cat([torch.full((n,), e) for e, n in enumerate([*rows, 37])])
        self.routing = kernels.route(ids[torch.randperm(len(ids))][:, None].to(DEVICE), 96)
        self.valid, M = sum(rows), len(ids)
        self.x, self.right = random(M, K, dtype=dtype), rank_rows(M, r, dtype)
        nobody = self.routing.row_token[self.valid :].long() if gather else slice(self.valid, None)
        self.x[nobody], self.right[self.valid :] = float("nan"), float("nan")
        self.lora_A = random(K, r * 96, scale=K**-0.5).view(K, 96, r).permute(1, 2, 0)
        self.options = {
            "gather": gather,
            "row_weights": torch.rand(M, 1, device=DEVICE) if weighted else None,
        }

    @property
    def operands(self):
        return self.x, self.lora_A, self.right, self.routing


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("even", "chunks"), [(256, 128), (60, 64)])
@pytest.mark.parametrize(
    ("K", "r", "gather", "weighted", "of_B"),
    [
        (512, 16, True, True, True),
        (192, 16, False, False, True),
        (64, 5, True, False, True),
        (128, 8, False, True, True),
        (320, 1, False, False, True),
        (256, 16, True, True, False),
        (256, 7, False, False, False),
        (272, 24, True, True, True),
        (208, 17, False, True, False),
        (128, 32, True, False, True),
    ],
)
def test_rows_read_once(
    kernels, ran, monkeypatch, dtype, even, chunks, K, r, gather, weighted, of_B
):
    p = Pair(kernels, even, K, r, gather, weighted, dtype)
    monkeypatch.setattr(
        "peft_moe_lora.ops.kernels.shrink_outer.chunk_block_m", lambda rows, experts: chunks
    )
    first = check(kernels, p.valid, *p.operands, out_of(96, K, r, of_B), dtype, **p.options)
    assert ran("shrink_outer")
    out = out_of(96, K, r, of_B)
    again = (
        composed.expert_shrink_outer(kernels, *p.operands, 0.7, out, **p.options)[: p.valid],
        out,
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(
    "why", ["K is cut", "rows begin off sixteen bytes", "ranks past a tile", "few chunks"]
)
def test_rows_that_are_read_twice(kernels, ran, monkeypatch, why):
    K, r = 260 if why.startswith("K") else 256, 33 if why.startswith("ranks") else 16
    p = Pair(kernels, 256, K, r, False, True, torch.bfloat16)
    if why.startswith("rows"):
        p.x = torch.cat([p.x.flatten()[:1], p.x.flatten()])[1:].view_as(p.x)
    if why.startswith("few"):
        monkeypatch.setattr(
            "peft_moe_lora.ops.kernels.shrink_outer.device_facts", lambda device: (90, 10**4)
        )
    check(kernels, p.valid, *p.operands, out_of(96, K, r, True), torch.bfloat16, **p.options)
    assert not ran("shrink_outer")
