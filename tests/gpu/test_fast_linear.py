"""Linear layers in an adapter on a CUDA device: as exact as plain PyTorch, launches, memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

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
    out.backward(direction)
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


def test_a_step_launches_five_kernels_each_way_and_waits_for_none():
    arguments = tensors(torch.bfloat16)
    leaves = [t.requires_grad_() for t in arguments[:3]]

    def run():
        out = fast(*leaves, *arguments[3:])
        return torch.autograd.grad(out, leaves, torch.empty_like(out))

    run()
    with no_wait_for_the_device():
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = [e.key for e in recorded.key_averages() if e.device_time_total and "Mem" not in e.key]
    count = sum(e.count for e in recorded.key_averages() if e.key in kernels)
    # a product whose rows are few may be split, and its parts summed by one launch more
    assert 10 <= count <= 14, kernels


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
