"""An operation that does two in one pass is asked first, with all that the two would be given."""

from types import SimpleNamespace

import pytest
import torch

from helpers import assert_close
from peft_moe_lora.ops import Activation, Dropout, composed, reference
from peft_moe_lora.ops.composed import RankRows
from peft_moe_lora.ops.ranks import as_stored_rank, of_rank

T, E, TOP_K, K, INNER, R = 7, 3, 2, 6, 5, 2
ROUTING = reference.route(
    torch.randint(E + 1, (T, TOP_K), generator=torch.Generator().manual_seed(2)), E
)
M = T * TOP_K
WEIGHTS = torch.linspace(0.5, 2.0, M).view(T, TOP_K)
TWINS = {name: getattr(reference, name) for name in reference.__all__}
asked = pytest.mark.parametrize("one_pass", [False, True], ids=["two operations", "one pass"])


def operations(asked_for, one_pass):
    """The twins; with `one_pass`, both operations in one pass exist too, made of the twins."""

    def shrink_outer(*args, **kwargs):
        asked_for.append("shrink_outer")
        return composed.expert_shrink_outer(reference, *args, **kwargs)

    def act_backward_outer(*args, **kwargs):
        asked_for.append("act_backward_outer")
        return composed.expert_act_backward_outer(reference, *args, **kwargs)

    if not one_pass:
        return reference
    own = {
        "expert_shrink_outer": shrink_outer,
        "expert_act_backward_outer": act_backward_outer,
    }
    return SimpleNamespace(**TWINS | own)


def rank_rows():
    """Random rows of rank R as they are stored."""
    return as_stored_rank(torch.randn(M, R))


def of_experts(rows, right, weights):
    """[E, K, r]: sums over the rows of each expert, one row after the other."""
    out = torch.zeros(E, rows.shape[1], right.shape[1])
    for m in range(int(ROUTING.expert_offsets[-1])):
        e = int(torch.searchsorted(ROUTING.expert_offsets, m, right=True)) - 1
        weight = weights.flatten()[int(ROUTING.row_slot[m])]
        out[e] += weight * rows[m][:, None] * right[m]
    return out


@asked
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_shrink_and_an_outer_product_of_the_same_rows(one_pass, gather, weighted):
    x = torch.randn(T if gather else M, K)
    rows = x[ROUTING.row_token.long()] if gather else x
    A, right, out = torch.randn(E, R, K), rank_rows(), torch.empty(E, K, R)
    found = []
    ops = operations(found, one_pass)
    alone = composed.expert_shrink_outer(ops, x, A, None, ROUTING, 0.7, None, gather=gather)
    assert not found, "without an outer product there is nothing to do in one pass"
    xa = composed.expert_shrink_outer(
        ops,
        x,
        A,
        right,
        ROUTING,
        0.7,
        out,
        row_weights=WEIGHTS if weighted else None,
        gather=gather,
    )
    assert found == ["shrink_outer"] * one_pass
    valid = int(ROUTING.expert_offsets[-1])
    for m in range(valid):
        e = int(torch.searchsorted(ROUTING.expert_offsets, m, right=True)) - 1
        assert_close(of_rank(xa, R)[m], 0.7 * A[e] @ rows[m])
    assert_close(alone[:valid], xa[:valid])
    ones = torch.ones(T, TOP_K)
    assert_close(out, of_experts(rows, of_rank(right, R), WEIGHTS if weighted else ones))


@asked
@pytest.mark.parametrize("wanted", ["dA and dB", "dA", "dB", "neither"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_gradient_of_an_activation_and_its_low_rank_products(one_pass, wanted, biased):
    activation = Activation()
    pre, draw = torch.randn(M, 2 * INNER), torch.randn(M, INNER)
    dA = torch.empty(E, R, INNER) if "dA" in wanted else None
    dB = torch.empty(E, 2 * INNER, R) if "dB" in wanted else None
    B = torch.randn(E, 2 * INNER, R)
    down_yb, xa = rank_rows(), rank_rows()
    found = []
    dropout = Dropout(0.5, torch.tensor([3]))
    # the gradient of the routing weights counts the bias of the projection after the activation
    rest = {}
    if biased:
        rest = {"dout": torch.randn(T, K), "bias": torch.randn(E, K)}
    dpre, yb, dweights = composed.expert_act_backward_outer(
        operations(found, one_pass),
        draw.clone(),
        pre,
        ROUTING,
        activation,
        WEIGHTS,
        RankRows(
            down_yb=down_yb if dA is not None else None,
            xa=xa if dB is not None else None,
            lora_B=B,
            scaling=0.7,
            dA=dA,
            dB=dB,
        ),
        dropout=dropout,
        **rest,
    )
    both = wanted == "dA and dB"
    assert ("act_backward_outer" in found) == (one_pass and both)
    exact, act, exact_weights = reference.expert_act_backward(
        draw.clone(), pre, ROUTING, activation, WEIGHTS, **rest
    )
    valid = int(ROUTING.expert_offsets[-1])
    assert_close(dpre[:valid], exact[:valid])
    assert_close(dweights, exact_weights)
    expected = torch.empty(M, R)
    for m in range(valid):
        e = int(torch.searchsorted(ROUTING.expert_offsets, m, right=True)) - 1
        expected[m] = 0.7 * B[e].T @ exact[m]
    assert_close(of_rank(yb, R)[:valid], expected[:valid])
    if dA is not None:
        sums = torch.empty_like(dA)
        reference.expert_outer(down_yb, act, ROUTING, sums, row_weights=WEIGHTS, dropout=dropout)
        assert_close(dA, sums)
    if dB is not None:
        assert_close(dB, of_experts(exact, of_rank(xa, R), torch.ones(T, TOP_K)))


def test_without_a_low_rank_term_there_are_no_rows_of_rank_r():
    rows = RankRows(down_yb=None, xa=None, lora_B=None, scaling=0.7, dA=None, dB=None)
    pre, draw = torch.randn(M, 2 * INNER), torch.randn(M, INNER)
    dpre, yb, _ = composed.expert_act_backward_outer(
        reference, draw.clone(), pre, ROUTING, Activation(), WEIGHTS, rows
    )
    exact, *_ = reference.expert_act_backward(draw, pre, ROUTING, Activation(), WEIGHTS)
    valid = int(ROUTING.expert_offsets[-1])
    assert_close(dpre[:valid], exact[:valid])
    assert yb is None
