"""Linear layers in an adapter on a CUDA device: as exact as plain PyTorch, launches, memory."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gpu.layers import ATOL, no_wait_for_the_device
from helpers import relative_error
from peft_moe_lora.functional import FrozenLinear, LinearUpdate, updated_linear

pytestmark = pytest.mark.gpu

T, K, N, R, SCALING = 777, 512, 768, 16, 2.0
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
bases = pytest.mark.parametrize("fused", [True, False], ids=["layer", "output"])


def tensors(dtype, rows=T):
    torch.manual_seed(0)
    x = torch.randn(rows, K, device="cuda", dtype=dtype)
    A = torch.randn(R, K, device="cuda") * K**-0.5
    B = torch.randn(N, R, device="cuda") * R**-0.5
    weight = torch.randn(N, K, device="cuda", dtype=dtype) * K**-0.5
    bias = torch.randn(N, device="cuda", dtype=dtype)
    return x, A, B, weight, bias


def fast(x, A, B, weight, bias, fused=True, p=0.0):
    base = FrozenLinear(weight, bias) if fused else F.linear(x, weight, bias)
    return updated_linear(x, base, LinearUpdate(A, B, SCALING, p), weight.dtype)


def plain(x, A, B, weight, bias):
    share = F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype)) * SCALING
    return F.linear(x, weight, bias) + share


def step(call, x, A, B, weight, bias, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, A, B)]
    out = call(*leaves, weight, bias, **options)
    torch.manual_seed(7)
    direction = torch.randn(out.shape, device="cuda").to(out.dtype)
    # as from a loss: PyTorch warns of a backward that begins with a product of cuBLAS
    (out * direction).sum().backward()
    return dict(
        zip(["y", "dx", "dA", "dB"], [out.detach(), *(t.grad for t in leaves)], strict=True)
    )


@bases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_as_exact_as_plain_pytorch(dtype, fused, compiled):
    arguments = tensors(dtype)
    call = torch.compile(fast, fullgraph=True) if compiled else fast
    found = step(call, *arguments, fused=fused)
    twin = step(plain, *arguments)
    exact = step(plain, *(t.double() for t in arguments))
    for name, expected in exact.items():
        error = relative_error(found[name], expected)
        allowed = 2 * relative_error(twin[name], expected) + ATOL[dtype]
        assert error <= allowed, f"{name}: {error:.2e}, and {allowed:.2e} are allowed"


@narrow
def test_gradients_of_A_and_B_are_summed_and_written_in_fp32(dtype):
    """Rounded to the dtype of x, they would be 1e-3 off and more."""
    arguments = tensors(dtype)
    found = step(fast, *arguments)
    x, _, B, *_ = arguments
    torch.manual_seed(7)
    dy = torch.randn(found["y"].shape, device="cuda").to(dtype)
    yb = ((dy @ B.to(dtype)) * SCALING).double()
    assert relative_error(found["dA"], yb.mT @ x.double()) < 2e-3
    assert found["dA"].dtype == found["dB"].dtype == torch.float32
    assert not torch.equal(found["dA"], found["dA"].to(dtype).float())
    assert not torch.equal(found["dB"], found["dB"].to(dtype).float())


@narrow
def test_no_rows_at_all(dtype):
    empty = step(fast, *tensors(dtype, rows=0))
    assert empty["y"].shape == (0, N)
    assert not empty["dA"].any()
    assert not empty["dB"].any()


def launched_by(call):
    """{name of a kernel: how often a call launches it}."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    events = [e for e in recorded.key_averages() if e.device_time_total and "Mem" not in e.key]
    return {e.key: e.count for e in events}


# of a backward that begins with a product of cuBLAS, as this one does and one from a loss does not
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")
def test_a_step_launches_a_few_kernels_each_way_and_waits_for_none():
    arguments = tensors(torch.bfloat16)
    leaves = [t.requires_grad_() for t in arguments[:3]]

    def run():
        out = fast(*leaves, *arguments[3:])
        return torch.autograd.grad(out, leaves, torch.empty_like(out))

    # called, recorded
    run()
    run()
    with no_wait_for_the_device():
        run()
    kernels = launched_by(run)
    assert kernels.pop("_add_low_rank_kernel") == 2
    assert kernels.pop("_outer_kernel") == 2
    assert kernels.pop("_one_expert_kernel") == 1
    assert kernels.pop("_sum_chunks_kernel", 0) <= 2
    # W in both directions; a product whose rows are few may be split, and its parts summed
    assert 2 <= sum(kernels.values()) <= 4, kernels


@pytest.mark.parametrize("rows", [1, 63, 777, 3000, 9000])
@pytest.mark.parametrize("r", [1, 8, 12, 16, 33, 64, 128, 129])
def test_every_rank_and_number_of_rows_in_recorded_and_replayed_calls(rows, r):
    x, _, _, weight, bias = tensors(torch.bfloat16, rows)
    A = torch.randn(r, K, device="cuda") * K**-0.5
    B = torch.randn(N, r, device="cuda") * r**-0.5
    arguments = x, A, B, weight, bias
    twin = step(plain, *arguments)
    exact = step(plain, *(t.double() for t in arguments))
    first = None
    for _ in range(5):
        # memory that a result leaves unwritten would hold these
        poison = [torch.full((rows, N), float("nan"), device="cuda") for _ in range(3)]
        del poison
        found = step(fast, *arguments)
        for name, expected in exact.items():
            error = relative_error(found[name], expected)
            allowed = 2 * relative_error(twin[name], expected) + ATOL[torch.bfloat16]
            assert error <= allowed, f"{name}: {error:.2e}, and {allowed:.2e} are allowed"
        first = first or found
        assert all(torch.equal(found[name], first[name]) for name in found)


@pytest.mark.parametrize("needed", ["x", "A", "B", "xA", "AB"])
@bases
def test_gradients_that_are_needed_are_those_of_all(needed, fused):
    arguments = tensors(torch.bfloat16)
    every = step(fast, *arguments, fused=fused)
    leaves = [
        t.detach().clone().requires_grad_(name in needed)
        for name, t in zip("xAB", arguments[:3], strict=True)
    ]
    out = fast(*leaves, *arguments[3:], fused=fused)
    torch.manual_seed(7)
    (out * torch.randn(out.shape, device="cuda").to(out.dtype)).sum().backward()
    for name, leaf in zip("xAB", leaves, strict=True):
        if name in needed:
            assert relative_error(leaf.grad, every[f"d{name}"]) < 5e-3
        else:
            assert leaf.grad is None


def test_selective_checkpointing_that_keeps_products_adds_the_update_once():
    arguments = tensors(torch.bfloat16)
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def checkpointed(*arguments):
        # a product whose result selective checkpointing keeps, so that something is recomputed
        return checkpoint(fast, *arguments, use_reentrant=False, context_fn=contexts)

    expected = step(fast, *arguments)
    found = step(checkpointed, *arguments)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 5e-3, name


def test_compiled_autograd_traces_the_backward_of_an_eager_forward():
    arguments = tensors(torch.bfloat16)
    expected = step(fast, *arguments)
    compiler = partial(torch.compile, backend="eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        found = step(fast, *arguments)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 5e-3, name


def test_rows_that_begin_at_no_multiple_of_16_bytes():
    x, *others = tensors(torch.bfloat16)
    shifted = torch.empty(x.numel() + 1, device="cuda", dtype=x.dtype)[1:].view_as(x).copy_(x)
    expected = fast(x, *others)
    for _ in range(4):
        assert relative_error(fast(shifted, *others), expected) < 5e-3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_drops_the_same(use_reentrant):
    arguments = tensors(torch.bfloat16)

    def dropped(*arguments):
        return fast(*arguments, p=0.3)

    found = []
    for call in (dropped, lambda *a: checkpoint(dropped, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(3)
        found.append(step(call, *arguments))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    without = step(fast, *arguments)
    assert 0.1 < relative_error(found[0]["y"], without["y"]) < 1


def test_dropout_masks_forward_and_backward_alike():
    """With ones everywhere, the rows of y count what was not dropped, and dx is zero elsewhere."""
    x = torch.ones(T, K, device="cuda")
    A = torch.ones(1, K, device="cuda")
    B = torch.ones(N, 1, device="cuda")
    for call in (fast, torch.compile(fast, fullgraph=True)):
        found = step(call, x, A, B, torch.zeros(N, K, device="cuda"), None, p=0.5)
        dropped = found["dx"] == 0
        assert 0.45 < dropped.double().mean() < 0.55
        kept = (~dropped).sum(1) * 2 * SCALING
        assert relative_error(found["y"], kept[:, None].expand(T, N)) < 1e-5


def test_three_layers_keep_their_input_once():
    x, A, B, weight, _ = tensors(torch.bfloat16, rows=8192)
    pairs = [[t.clone().requires_grad_() for t in (A, B)] for _ in range(3)]
    x.requires_grad_()
    rows = x * 1
    # cuBLAS allocates its workspace in the first call
    fast(rows, *pairs[0], weight, None)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    outs = [fast(rows, *pair, weight, None) for pair in pairs]
    kept = torch.cuda.memory_allocated() - before - sum(out.nbytes for out in outs)
    each = (8192 * R + R * K + N * R) * 2
    assert kept <= 3 * each + 3 * 3 * 512
