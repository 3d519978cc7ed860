"""An activation's gradient with its rank-r products: several operations, or one pass over rows.

The one pass runs on an H100 or H200.
"""

import pytest
import torch

from ops.problems import (
    ACTIVATIONS,
    CUT_ROWS,
    DEVICE,
    SHAPES,
    Problem,
    assert_within,
    dtypes,
    dtypes_compiled,
    hopper,
    out_of,
    random,
    rank_rows,
    small_shapes,
    wide,
)
from peft_moe_lora.ops import Activation, Dropout, RankRows, composed, reference


def check(kernels, valid, r, I, activation, operands, lora_B, dtype, **options):  # noqa: E741
    """Hold every result to the rule of `problems`; returns them."""
    draw, pre, routing, weights, right, xa = operands
    E, N, results = lora_B.shape[0], lora_B.shape[1], []
    for ops, widen in ((reference, lambda t: t), (reference, wide), (kernels, lambda t: t)):
        beside = {name: widen(value) for name, value in options.items()}
        dA, dB = widen(out_of(E, r, I, False)), widen(out_of(E, N, r, True))
        rows = RankRows(widen(right), dA, widen(xa), widen(lora_B), 0.7, dB)
        dpre, yb, dw = composed.expert_act_backward_outer(
            ops,
            widen(draw).clone(),
            widen(pre),
            routing,
            activation,
            widen(weights),
            rows,
            **beside,
        )
        results.append((dpre[:valid], yb[:valid], dw, dA, dB))
    for twin, exact, actual in zip(*results, strict=True):
        assert_within(actual, twin, exact, dtype)
    return results[2]


@small_shapes
@dtypes_compiled
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("beside", [False, True], ids=["", "bias and dropout"])
def test_all_are_what_the_twins_say(kernels, shape, dtype, activation, beside):
    p = Problem(shape, dtype)
    routing, N = kernels.route(p.index, shape.E), shape.I * (1 + activation.gated)
    operands = p.rows(shape.I), p.rows(N), routing, p.weights, p.rank_rows(shape.r), p.xa
    _, lora_B = p.lora(N, shape.H)
    options = {
        "dout": p.x,
        "bias": p.down_bias,
        "dropout": Dropout(0.4, torch.tensor([77], device=DEVICE)),
    }
    check(
        kernels,
        p.valid,
        shape.r,
        shape.I,
        activation,
        operands,
        lora_B,
        dtype,
        **(options if beside else {}),
    )


@dtypes
@pytest.mark.parametrize("biased", [False, True])
def test_panels_add_up(kernels, dtype, biased):
    """The second kernel of the one pass, which runs anywhere: five half panels, one unused."""
    panels = pytest.importorskip("peft_moe_lora.ops.kernels.sm90.sum_panels")
    p = Problem(SHAPES[1], dtype)
    routing, bias, dout = kernels.route(p.index, p.shape.E), p.down_bias, p.x
    partial_yb, partial_dw = random(3, p.M, 6), random(6, p.M)
    for partial in (partial_yb, partial_dw):
        partial[:, p.valid :] = float("nan")
    partial_dw[5] = float("nan")
    yb, dw = (
        torch.empty(p.M, 6, dtype=dtype, device=DEVICE),
        torch.empty(p.weights.shape, device=DEVICE),
    )
    given = (dout, bias) if biased else (None, None)
    panels.sum_panels(partial_yb, partial_dw, routing, 0.7, *given, 320, yb, dw)
    assert_within(
        yb[: p.valid],
        (0.7 * partial_yb.sum(0)).to(dtype)[: p.valid],
        wide(partial_yb).sum(0)[: p.valid] * 0.7,
        dtype,
    )
    zeros = torch.zeros(p.M, 4, device=DEVICE)
    rest = {"dout": wide(dout), "bias": wide(bias)} if biased else {}
    *_, exact = reference.expert_act_backward(
        wide(zeros), wide(zeros), routing, ACTIVATIONS[4], wide(p.weights), **rest
    )
    exact.view(-1)[routing.row_slot[: p.valid].long()] += wide(partial_dw[:5, : p.valid]).sum(0)
    assert_within(dw, exact.float(), exact, torch.float32)


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("I", "r", "activation", "biased", "p"),
    [
        (256, 16, Activation(), False, None),
        (256, 16, Activation(), False, 0.4),
        (128, 5, Activation(), False, None),
        (192, 24, Activation(), True, None),
        (192, 32, Activation(), True, 0.05),
        (128, 32, Activation("silu", True, True, 0.8, 1.702, 1.0), False, None),
        (64, 6, Activation("gelu_tanh"), True, 0.4),
        (320, 8, Activation("silu", True, False, 0.8, 1.702, 1.0), False, None),
        (320, 8, Activation("silu", True, True, 0.8, 1.702, 1.0), True, None),
        (320, 8, Activation("silu", True, True, 0.8, 1.702, 1.0), True, 0.4),
        (64, 16, Activation("gelu", True, True), False, None),
        (192, 16, Activation("relu2", gated=False), False, None),
        (192, 16, Activation("relu2", gated=False), False, 0.4),
        (320, 32, Activation("gelu", gated=False), True, None),
        (320, 32, Activation("gelu", gated=False), True, 0.05),
        (64, 5, Activation("silu", gated=False), False, None),
    ],
)
def test_one_pass_is_the_operations(
    kernels,
    ran,
    dtype,
    I,  # noqa: E741
    r,
    activation,
    biased,
    p,
):
    # besides `CUT_ROWS`: a step that ends in its first half, at its middle, after it
    rows = [*CUT_ROWS, 32, 33, 95, 96, 97, 160, 161]
    # the last expert ends within a step; after it come unrouted rows
    rows += [256] * (95 - len(rows)) + [165]
    ids = torch.cat([torch.full((n,), e) for e, n in enumerate([*rows, 37])])
    routing = kernels.route(ids[torch.randperm(len(ids))][:, None].to(DEVICE), 96)
    M, valid = len(ids), sum(rows)
    N = (1 + activation.gated) * I
    draw, pre = random(M, I, dtype=dtype), random(M, N, dtype=dtype)
    right, xa = rank_rows(M, r, dtype), rank_rows(M, r, dtype)
    for t in (draw, pre, right, xa):
        t[valid:] = float("nan")
    lora_B = random(N, r * 96, scale=r**-0.5).view(N, 96, r).permute(1, 0, 2)
    options = {}
    if biased:
        options = {"dout": random(M, 72, dtype=dtype), "bias": random(96, 72, dtype=dtype)}
        options["dout"][routing.row_token[valid:].long()] = float("nan")
    if p is not None:
        options["dropout"] = Dropout(p, torch.tensor([2**31 + 77], device=DEVICE))
    operands = draw, pre, routing, torch.rand(M, 1, device=DEVICE), right, xa
    first = check(kernels, valid, r, I, activation, operands, lora_B, dtype, **options)
    assert ran("act_backward_outer")
    again = check(kernels, valid, r, I, activation, operands, lora_B, dtype, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("r", "I"), [(33, 64), (16, 72)])
def test_what_the_one_pass_does_not_do_the_operations_do(kernels, ran, r, I):  # noqa: E741
    E = 4
    M = 512
    N = 2 * I
    activation = Activation()
    routing = kernels.route(torch.randint(E, (M, 1), device=DEVICE), E)
    operands = (
        random(M, I),
        random(M, N),
        routing,
        torch.rand(M, 1, device=DEVICE),
        rank_rows(M, r),
        rank_rows(M, r),
    )
    operands = tuple(t.bfloat16() if torch.is_tensor(t) else t for t in operands)
    lora_B = random(N, r * E, scale=r**-0.5).view(N, E, r).permute(1, 0, 2)
    check(kernels, M, r, I, activation, operands, lora_B, torch.bfloat16)
    assert not ran("act_backward_outer")
