"""`add_low_rank` of kernels and twins against xa = s * x A^T, out = y + xa B^T; and `one_expert`.

Every result of a 16-bit or 32-bit product is held to the rule of `ops.problems`: the error against
fp64 is at most twice that of the formula in plain PyTorch in the same dtype.
"""

import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from packaging.version import Version

from ops.problems import CUDA, DEVICE, assert_within, dtypes, random
from peft_moe_lora.ops import reference
from peft_moe_lora.ops.ranks import stored_rank

NAN = float("nan")
SCALING = 1.7

# rows: one; fewer than a tile; one tile; tiles with a tail; many tiles
ROWS = [1, 7, 16, 37, 130]
if CUDA:
    # from these on an H200 uses tiles of 32 and of 64 rows
    ROWS += [2200, 4300]
rows = pytest.mark.parametrize("T", ROWS)
some_rows = pytest.mark.parametrize("T", [7, 37, *ROWS[5:]])


class Widths(NamedTuple):
    """One row of the table of widths, and why it is there. No two sizes of a row are equal."""

    K: int
    N: int
    r: int
    why: str


WIDTHS = [
    Widths(37, 45, 1, "rank 1"),
    Widths(71, 39, 3, "an odd rank, stored wider; K is greater than N"),
    Widths(45, 101, 8, "the rank that is stored in 8 columns"),
    Widths(19, 67, 16, "a whole tile of ranks; K is less than a tile"),
    Widths(128, 256, 16, "whole tiles of K and of N, on a GPU too"),
    Widths(103, 21, 20, "ranks past one tile"),
    Widths(67, 83, 33, "a tile of ranks that is nearly half empty"),
    Widths(43, 55, 128, "the largest rank, with narrower tiles"),
]
widths = pytest.mark.parametrize("size", WIDTHS, ids=lambda s: f"{s.K}-{s.N}-{s.r}")
ODD = Widths(71, 45, 3, "no multiple of anything")


class Tensors(NamedTuple):
    """The arguments of one call: x [T, K], A [r, K], B [N, r], y [T, N]."""

    x: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    y: torch.Tensor


def draw(T, size, dtype=torch.float32):
    """Random tensors whose share xa B^T is as large as y; A and B are fp32."""
    K, N, r, _ = size
    x = random(T, K, dtype=dtype)
    A = random(r, K, scale=K**-0.5)
    B = random(N, r, scale=r**-0.5)
    y = random(T, N, dtype=dtype)
    if T:
        _, share = plain(x.double(), A.double(), B.double(), None)
        B *= (y.double().norm() / share.norm()).item()
    return Tensors(x, A, B, y)


def plain(x, A, B, y, scaling=SCALING):
    """xa [T, r] and out [T, N] in the dtype of x, in plain PyTorch."""
    xa = x @ A.to(x.dtype).mT * scaling
    share = xa @ B.to(x.dtype).mT
    return xa, share if y is None else y + share


def out_for(t):
    """[T, N] full of NaN."""
    return torch.full((len(t.x), len(t.B)), NAN, dtype=t.x.dtype, device=DEVICE)


def called(ops, t, out=None, scaling=SCALING, without_y=False):
    """xa and out of one call; out is a new tensor full of NaN if none is given."""
    out = out_for(t) if out is None else out
    xa = ops.add_low_rank(t.x, t.A, t.B, scaling, None if without_y else t.y, out)
    return xa, out


def check(xa, out, t, y):
    """Hold a result against the formula in fp64. `t` and `y` are what was given, unchanged."""
    dtype = t.x.dtype
    r = len(t.A)
    assert xa.shape == (len(t.x), stored_rank(r))
    assert xa.dtype == out.dtype == dtype
    exact = plain(*(v.double() for v in t[:3]), None if y is None else y.double())
    twin = plain(*t[:3], y)
    for found, in_dtype, expected in zip((xa[:, :r], out), twin, exact, strict=True):
        assert_within(found, in_dtype, expected, dtype)
    assert xa[:, r:].eq(0).all(), "xa has zeros past its r columns"


@pytest.fixture(params=["kernels", "twins"])
def ops(request):
    """The kernels, and their twins."""
    return request.getfixturevalue("kernels") if request.param == "kernels" else reference


@widths
def test_the_update_is_as_large_as_what_it_is_added_to(size):
    for T in ROWS:
        t = draw(T, size)
        _, share = plain(t.x, t.A, t.B, None)
        assert 0.9 < (share.norm() / t.y.norm()).item() < 1.1


@rows
@widths
@dtypes
def test_it_is_the_formula(ops, T, size, dtype):
    t = draw(T, size, dtype)
    given = Tensors(*(v.clone() for v in t))
    xa, out = called(ops, t)
    check(xa, out, t, t.y)
    assert all(map(torch.equal, t, given)), "an argument was changed"


@some_rows
@pytest.mark.parametrize("size", [ODD, WIDTHS[4]], ids=["odd", "even"])
@dtypes
def test_out_may_be_y_itself(ops, T, size, dtype):
    t = draw(T, size, dtype)
    y = t.y.clone()
    _, expected = called(ops, t)
    xa, out = called(ops, t, out=t.y)
    check(xa, out, t, y)
    assert torch.equal(out, expected)


@some_rows
@pytest.mark.parametrize("size", [ODD, WIDTHS[4]], ids=["odd", "even"])
@dtypes
def test_without_y_the_update_is_added_to_zeros(ops, T, size, dtype):
    t = draw(T, size, dtype)
    xa, out = called(ops, t, without_y=True)
    check(xa, out, t, None)


def transposed(t):
    """The same values, columns before rows in memory."""
    return t.mT.contiguous().mT


def every_other(t):
    """The same values between columns of NaN, and between rows of NaN."""
    wide = torch.full((2 * t.shape[0], 3 * t.shape[1]), NAN, dtype=t.dtype, device=t.device)
    view = wide[1::2, 2::3]
    return view.copy_(t)


def one_row(t):
    """The first row for every row, stride 0."""
    return t[:1].expand_as(t)


@pytest.mark.parametrize("strided", [transposed, every_other, one_row])
@pytest.mark.parametrize("which", ["x", "y"])
@pytest.mark.parametrize("size", [ODD, WIDTHS[4]], ids=["odd", "even"])
def test_x_and_y_may_have_any_strides(ops, strided, which, size):
    t = draw(37, size)
    t = t._replace(**{which: strided(getattr(t, which))})
    assert not getattr(t, which).is_contiguous()
    check(*called(ops, t), t, t.y)


@pytest.mark.parametrize("T", [7, 37])
@widths
@dtypes
def test_backward_passes_A_and_B_transposed(ops, T, size, dtype):
    """dx = dy W + s * dy B A: the roles of A and B are exchanged, by views of both."""
    K, N, r, _ = size
    forward = draw(T, size._replace(K=N, N=K), dtype)
    A = forward.B.mT.contiguous()
    B = forward.A.mT.contiguous()
    assert (A.shape, B.shape) == ((r, K), (N, r))
    dy = forward.x
    t = Tensors(dy, B.mT, A.mT, forward.y)
    assert r == 1 or not (t.A.is_contiguous() or t.B.is_contiguous())
    check(*called(ops, t), t, t.y)


@pytest.mark.parametrize("strided", [transposed, every_other])
@pytest.mark.parametrize("factor", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@dtypes
def test_A_and_B_are_cast_to_the_dtype_of_x(ops, strided, factor, dtype):
    """They are rounded before they are multiplied: then the result is that of rounded factors."""
    t = draw(23, Widths(53, 45, 20, "all odd"), dtype)
    t = t._replace(A=strided(t.A.to(factor)), B=strided(t.B.to(factor)))
    xa, out = called(ops, t)
    check(xa, out, t, t.y)
    cast = called(ops, t._replace(A=t.A.to(dtype), B=t.B.to(dtype)))
    assert torch.equal(xa, cast[0])
    assert torch.equal(out, cast[1])


def test_A_and_B_may_have_two_dtypes(ops):
    t = draw(23, ODD)
    for A, B in ((t.A.bfloat16(), t.B), (t.A, t.B.bfloat16())):
        mixed = t._replace(A=A, B=B)
        check(*called(ops, mixed), mixed, t.y)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), NAN], ids=str)
@pytest.mark.parametrize("r", [3, 8, 20])
@dtypes
def test_a_row_that_is_not_finite_has_zeros_past_its_rank_and_changes_no_other(
    ops, value, r, dtype
):
    t = draw(37, Widths(71, 45, r, "a stored rank that is wider, or not"), dtype)
    xa, out = called(ops, t)
    x = t.x.clone()
    # in the middle of a tile, and the last row, which a tile with a tail reads many times
    bad = [5, 36]
    x[bad, 11] = value
    bad_xa, bad_out = called(ops, t._replace(x=x))
    assert bad_xa[:, r:].eq(0).all()
    assert not bad_xa[bad, :r].isfinite().any()
    assert not bad_out[bad].isfinite().any()
    others = [m for m in range(37) if m not in bad]
    assert torch.equal(bad_xa[others], xa[others])
    assert torch.equal(bad_out[others], out[others])


@pytest.mark.parametrize("value", [float("inf"), NAN], ids=str)
def test_an_element_of_y_that_is_not_finite_changes_no_other(ops, value):
    t = draw(37, ODD)
    _, out = called(ops, t)
    y = t.y.clone()
    y[36, 44] = y[3, 0] = value
    _, bad = called(ops, t._replace(y=y))
    is_bad = ~y.isfinite()
    assert not bad[is_bad].isfinite().any()
    assert torch.equal(bad[~is_bad], out[~is_bad])


def test_twice_the_scaling_gives_exactly_twice_the_update(ops):
    """So it is applied once, to both results; a product with 2 rounds nothing."""
    t = draw(37, ODD)
    once = called(ops, t, without_y=True)
    twice = called(ops, t, without_y=True, scaling=2 * SCALING)
    for one, two in zip(once, twice, strict=True):
        assert one.abs().max() > 0
        assert torch.equal(two, 2 * one)


@rows
@pytest.mark.parametrize("size", [ODD, WIDTHS[4]], ids=["odd", "even"])
def test_nothing_is_written_before_or_after_out(ops, T, size):
    """Out between two rows that no one may write; with the odd width at an odd address."""
    t = draw(T, size)
    around = torch.full((T + 2, size.N), NAN, device=DEVICE)
    around[0] = around[-1] = 7.0
    xa, out = called(ops, t, out=around[1:-1])
    check(xa, out, t, t.y)
    assert around[[0, -1]].eq(7).all()


@pytest.mark.parametrize("T", [7, *ROWS[4:]])
@dtypes
def test_the_same_call_gives_the_same_bits(ops, T, dtype):
    t = draw(T, Widths(67, 83, 33, "several tiles of everything"), dtype)
    first = called(ops, t)
    second = called(ops, t)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("without_y", [False, True])
def test_there_may_be_no_rows(ops, without_y):
    t = draw(0, Widths(71, 45, 20, "stored in 32 columns"))
    xa, out = called(ops, t, without_y=without_y)
    assert xa.shape == (0, 32)
    assert out.shape == (0, 45)


# what is changed of a call that is right, T = 6, K = 71, N = 45, r = 3; and what is said of it
REFUSED = [
    ("A", lambda A: A[:, 1:], r"A of rank 3 is \(3, 71\), got \(3, 70\)"),
    ("A", lambda A: A[1:], r"A of rank 3 is \(3, 71\), got \(2, 71\)"),
    ("A", lambda A: A.mT, r"A of rank 3 is \(3, 71\), got \(71, 3\)"),
    ("B", lambda B: B[:, 1:], r"A of rank 2 is \(2, 71\), got \(3, 71\)"),
    ("B", lambda B: B[1:], r"y and out are \(6, 44\), got \(6, 45\)"),
    ("x", lambda x: x[1:], r"y and out are \(5, 45\), got \(6, 45\)"),
    ("x", lambda x: x[:, 1:], r"A of rank 3 is \(3, 70\), got \(3, 71\)"),
    ("y", lambda y: y[1:], r"y and out are \(6, 45\), got \(5, 45\)"),
    ("y", lambda y: y[:, 1:], r"y and out are \(6, 45\), got \(6, 44\)"),
    ("y", lambda y: y.half(), "y and out are torch.float32, got torch.float16"),
    ("out", lambda out: out[1:], r"y and out are \(6, 45\), got \(5, 45\)"),
    ("out", lambda out: out.double(), "y and out are torch.float32, got torch.float64"),
    ("out", transposed, "a row of out is N elements after the row before it"),
    ("out", every_other, "a row of out is N elements after the row before it"),
]


@pytest.mark.parametrize(
    ("name", "change", "message"), REFUSED, ids=[f"{n}-{row[0]}" for n, row in enumerate(REFUSED)]
)
def test_tensors_that_do_not_fit_are_refused(kernels, name, change, message):
    t = draw(6, ODD)
    out = out_for(t)
    if name == "out":
        out = change(out)
    else:
        t = t._replace(**{name: change(getattr(t, name))})
    with pytest.raises(AssertionError, match=message):
        called(kernels, t, out=out)
    assert out.isnan().all(), "out was written"


# ---- the grid ------------------------------------------------------------------------------------


@pytest.fixture
def grid_of(kernels, monkeypatch):
    """A function that calls the kernel as on so many multiprocessors.

    It returns the tiles of rows, the parts of the columns, and the two results.
    """
    from peft_moe_lora.ops.kernels import low_rank

    arch, _ = low_rank.device_facts(torch.device(DEVICE))
    launch = low_rank.launch
    grids = []

    def recorded(key, kernel, grid, *others):
        grids.append(grid)
        return launch(key, kernel, grid, *others)

    def call(t, multiprocessors):
        monkeypatch.setattr(low_rank, "device_facts", lambda device: (arch, multiprocessors))
        found = called(kernels, t)
        tiles, parts, _ = grids.pop()
        return tiles, parts, *found

    monkeypatch.setattr(low_rank, "launch", recorded)
    monkeypatch.setattr(low_rank, "PER_SM", 1)
    return call


@pytest.mark.parametrize("N", [300, 512], ids=["odd", "even"])
@dtypes
def test_with_few_rows_several_programs_share_the_columns_of_y(grid_of, N, dtype):
    """However many they are, a program computes the same for its columns, to the bit."""
    t = draw(7, Widths(71, N, 20, "many tiles of N"), dtype)
    _, parts, xa, out = grid_of(t, 1)
    assert parts == 1
    check(xa, out, t, t.y)
    found = set()
    # 3 parts of 4 of 10 tiles: the last part has fewer tiles than the others
    for multiprocessors in (2, 3, 4, 50):
        tiles, parts, again_xa, again = grid_of(t, multiprocessors)
        assert tiles == 1
        found.add(parts)
        assert torch.equal(again_xa, xa)
        assert torch.equal(again, out)
    assert min(found) == 2
    assert len(found) >= 2


def test_with_many_rows_a_program_has_all_columns(grid_of):
    t = draw(130, Widths(71, 300, 20, "many tiles of N"))
    few, parts, *_ = grid_of(t, 3)
    assert few >= 3
    assert parts == 1


# ---- memory --------------------------------------------------------------------------------------

# tensors of odd sizes and of whole tiles, in all their roles, next to forbidden pages; `guarded`
# reads from sys.argv on which side. In the end the kernel is told of one row more than there is
PROGRAM = """
import sys

import torch
from ops.guarded import guarded, guarded_empty
from peft_moe_lora.ops import kernels
from peft_moe_lora.ops.kernels import low_rank

torch.empty = guarded_empty
for side in ("front", "end"):
    sys.argv[1:] = [side]
    for T, K, N, r in ((1, 37, 45, 1), (16, 64, 96, 16), (21, 45, 71, 20)):
        x, y = guarded(torch.randn(T, K)), guarded(torch.randn(T, N))
        out = guarded(torch.zeros(T, N))
        A, B = torch.randn(r, K), torch.randn(N, r)
        # the transposed ones last: what leads outside in one order of memory may not in the other
        for order in (lambda t: guarded(t), lambda t: guarded(t.mT.contiguous().mT)):
            kernels.add_low_rank(order(x), order(A), order(B), 0.5, order(y), out)
            assert out.isfinite().all()
        kernels.add_low_rank(x, guarded(A), guarded(B), 0.5, None, out)
        kernels.add_low_rank(x, guarded(A), guarded(B), 0.5, y, y)
        assert y.isfinite().all()
    for M in (0, 1, 1025):
        assert kernels.one_expert(torch.zeros(M, 3)).expert_offsets.tolist() == [0, M]
print("within", flush=True)
launch = low_rank.launch
low_rank.launch = lambda *arguments: launch(*arguments[:-1], (T + 1,))
kernels.add_low_rank(x, guarded(A), guarded(B), 0.5, y, out)
print("not found")
"""


@pytest.mark.skipif(
    Version(version("triton")) < Version("3.9") and Version(version("numpy")) >= Version("2.4"),
    reason="an older Triton's interpreter makes an int of an array of one, which numpy 2.4 refuses",
)
def test_the_kernel_stays_within_its_tensors():
    """A read or write outside kills the process; a row too many does so in the end."""
    tests = str(Path(__file__).parent.parent)
    path = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=200
    )
    assert done.stdout.split() == ["within"], done.stderr[-2000:]
    assert done.returncode == -signal.SIGSEGV, done.stderr[-2000:]


# ---- one expert ----------------------------------------------------------------------------------


@pytest.mark.parametrize("M", [0, 1, 5, 1024, 1025, 3000])
def test_one_expert_owns_all_rows_in_their_order(ops, M):
    rows = torch.full((M, 3), NAN, device=DEVICE)
    routing = ops.one_expert(rows)
    assert routing.expert_offsets.tolist() == [0, M]
    for order in (routing.row_token, routing.row_slot, routing.slot_row):
        assert order.tolist() == list(range(M))
        assert order.dtype == torch.int32
        assert order.device == rows.device
    assert routing.expert_offsets.dtype == torch.int32
    assert (routing.num_experts, routing.num_rows, routing.num_tokens) == (1, M, M)


@pytest.mark.parametrize("M", [0, 1, 5, 1024, 1025, 3000])
def test_one_expert_is_its_twin(kernels, M):
    rows = torch.zeros(M, 3, device=DEVICE)
    found = kernels.one_expert(rows)
    for actual, expected in zip(found, reference.one_expert(rows), strict=True):
        assert type(actual) is type(expected)
        if torch.is_tensor(actual):
            assert torch.equal(actual, expected)
        else:
            assert actual == expected


@pytest.mark.parametrize(
    ("M", "P", "Q"),
    [(0, 3, 45), (1, 71, 20), (5, 3, 45), (130, 71, 20), (37, 16, 32), (300, 3, 20)],
)
@dtypes
def test_outer_of_one_expert_is_left_transposed_times_right(ops, M, P, Q, dtype):
    left = random(M, P, dtype=dtype)
    right = random(M, Q, dtype=dtype)
    out = torch.full((1, P, Q), NAN, device=DEVICE)
    ops.expert_outer(left, right, ops.one_expert(left), out)
    exact = left.double().mT @ right.double()
    assert_within(out[0], left.float().mT @ right.float(), exact, torch.float32)


@pytest.mark.parametrize("M", [1, 5, 130])
def test_shrink_of_one_expert_is_x_times_A_transposed(ops, M):
    """As backward uses it where x needs no gradient."""
    t = draw(M, Widths(71, 45, 20, "all differ"))
    xa = ops.expert_shrink(t.x, t.A[None], ops.one_expert(t.x), SCALING)
    alone, _ = called(ops, t)
    torch.testing.assert_close(xa, alone, rtol=1e-5, atol=1e-5)
    assert xa[:, 20:].eq(0).all()
