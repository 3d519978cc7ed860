"""The trace counts what is alive, no more and no less, and the peak of it."""

import pytest
import torch

from peft_moe_lora.planning.gpus import gpu_of
from peft_moe_lora.planning.trace import LAUNCH, SLOWDOWN, Trace
from peft_moe_lora.planning.work import Work

KIB = 1024


def rows(n, device="meta"):
    """n KiB of fp32."""
    return torch.zeros(n, KIB // 4, device=device)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_what_is_let_go_is_not_alive(device):
    given = rows(3, device)
    with Trace() as trace:
        a = given + 1
        b = a * 2
        assert trace.live == 6 * KIB
        del a
        assert trace.live == 3 * KIB
        c = b.exp()
        del b, c
    assert trace.live == 0
    assert trace.peak == 6 * KIB


def test_views_and_writes_in_place_take_no_memory():
    given = rows(4)
    with Trace() as trace:
        _views = [given.t(), given[1:], given.view(-1), given.expand(2, 4, -1), given.detach()]
        given.add_(1)
        assert trace.live == 0
        made = given + given
        _more = [made.t(), made.unbind(), made.reshape(-1)]
        assert trace.live == 4 * KIB
        del made
        assert trace.live == 4 * KIB, "a view keeps the storage"


def test_what_autograd_keeps_is_alive_until_backward():
    weight = rows(2).requires_grad_()
    weight.register_post_accumulate_grad_hook(lambda p: trace.count_gradient(p))
    with Trace() as trace:
        # exp keeps its result
        total = weight.exp().sum()
        assert trace.live == 2 * KIB + 4
        total.backward()
    assert trace.gradients == 2 * KIB
    del total
    assert trace.live == 2 * KIB, "the gradient"


def test_a_window_has_a_peak_of_its_own():
    given = rows(1)
    with Trace() as trace:
        del_me = torch.cat([given] * 8)
        del del_me
        assert trace.peak == 8 * KIB
        trace.start_window()
        _kept = given + 1
        assert trace.peak == KIB
        trace.add(Work(scratch=5 * KIB))
    assert (trace.peak, trace.live) == (6 * KIB, KIB)


def test_the_time_is_that_of_flops_or_of_bytes_or_of_the_launch():
    gpu = gpu_of("H200")
    n = 4096
    a = torch.zeros(n, n, device="meta", dtype=torch.bfloat16)
    with Trace() as products:
        _product = a @ a
    assert products.seconds["H200"] == pytest.approx(2 * n**3 / gpu.flops * SLOWDOWN)
    with Trace() as copies:
        _copy = a + 1
    assert copies.seconds["H200"] == pytest.approx(4 * n**2 / gpu.bandwidth * SLOWDOWN)
    small = rows(1)
    with Trace() as launches:
        _small = small + 1
        _view = small.t()
    assert launches.seconds["H200"] == LAUNCH
    assert copies.seconds["RTX 4090"] > copies.seconds["H200"]
