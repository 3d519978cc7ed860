"""The layer as users get it, on a CUDA device: numbers, graphs, syncs, memory, large sizes."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gpu.layers import (
    ATOL,
    FAMILIES,
    TOP_K,
    E,
    H,
    I,
    R,
    T,
    adapted,
    inputs,
    no_wait_for_the_device,
    step,
)
from helpers import GPT_OSS, NEMOTRON_H, QWEN3_MOE
from peft_moe_lora.ops import kernels
from peft_moe_lora.ops.kernels.launching import graphs, replay
from peft_moe_lora.ops.routing import Routing
from peft_moe_lora.stats.watch import RoutingWatch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_fused_path_is_as_exact_as_plain_pytorch(family, name, dtype):
    model, layer = adapted(family, name, dtype, backend="triton")
    args = inputs(dtype)
    with torch.no_grad(), model.disable_adapter():
        without = model(*args)
    fused = step(model, layer, *args)
    assert 0.3 < ((fused["output"] - without).norm() / without.norm()).item() < 3, (
        "the adapter's share"
    )
    layer.backend = "torch"
    plain = step(model, layer, *args)
    exact = step(*_in_double(model), *(t.double() if t.is_floating_point() else t for t in args))
    assert fused.keys() == exact.keys()
    for key, expected in exact.items():
        error, twin = (
            (t[key].double() - expected).norm() / expected.norm() for t in (fused, plain)
        )
        assert error <= 2 * twin + ATOL[dtype], (
            f"{key}: {error:.2e} against {twin:.2e} in plain PyTorch"
        )


def _in_double(model):
    double = copy.deepcopy(model).double()
    layer = double.base_model.model.experts
    layer.backend = "torch"
    return double, layer


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_some_experts_are_as_exact_as_plain_pytorch(family, name):
    dtype = torch.bfloat16
    model, layer = adapted(
        family, name, dtype, backend="triton", expert_indices={"experts": [6, 1, 2]}
    )
    args = inputs(dtype)
    fused = step(model, layer, *args)
    with no_wait_for_the_device():
        again = step(model, layer, *args)
    assert all(torch.equal(fused[key], again[key]) for key in fused)
    layer.backend = "torch"
    plain = step(model, layer, *args)
    exact = step(*_in_double(model), *(t.double() if t.is_floating_point() else t for t in args))
    assert fused["lora_A.default.gate_up"].shape == (3 * R, H)
    for key, expected in exact.items():
        error, twin = (
            (t[key].double() - expected).norm() / expected.norm() for t in (fused, plain)
        )
        assert error <= 2 * twin + ATOL[dtype], (
            f"{key}: {error:.2e} against {twin:.2e} in plain PyTorch"
        )


@pytest.mark.parametrize("calls", [1, 3], ids=["composed", "replayed"])
def test_a_thread_may_begin_with_a_descriptor(calls):
    """Autograd's thread begins so in a process's first backward with `recompute`."""
    x = torch.randn(512, H, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(E, 2 * I, H, device="cuda", dtype=torch.bfloat16)
    routing = kernels.route(torch.rand(512, E, device="cuda").topk(TOP_K).indices, E)
    index = [
        getattr(routing, name)
        for name in ("expert_offsets", "row_token", "row_slot", "slot_row", "tiles")
    ]

    def product(x, weight, *index):
        *order, tiles = index
        again = Routing(*order, TOP_K, tiles, routing.block_m)
        return (kernels.expert_linear(x, weight, again, gather=True),)

    expected = product(x, weight, *index)[0]
    # leaves cached memory: a thread that asked CUDA for memory would get a context
    product(x, weight, *index)
    # each runs in its own thread; the third is replayed
    for _ in range(calls):
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(kernels.replayed, product, x, weight, *index).result()[0]
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("family", "name", "config"),
    [
        (*QWEN3_MOE, {}),
        (*QWEN3_MOE, {"recompute": True}),
        (*QWEN3_MOE, {"lora_dropout": 0.3}),
        (*QWEN3_MOE, {"target_projections": ["down"]}),
        (*QWEN3_MOE, {"expert_indices": {"experts": [6, 1, 2]}}),
        (*GPT_OSS, {"r": 64}),
        (*NEMOTRON_H, {}),
    ],
    ids=["plain", "recompute", "dropout", "down", "some", "gpt_oss", "ungated"],
)
@pytest.mark.parametrize("tokens", [T, 2048])
def test_a_replayed_step_has_the_bits_of_a_composed_one(monkeypatch, family, name, config, tokens):
    """New data at new addresses each time, one expert without rows, one with most of them."""
    model, layer = adapted(family, name, torch.bfloat16, **config)
    batches = [inputs(torch.bfloat16, tokens) for _ in range(6)]
    batches[3][1][:, 0] = 5
    batches[4][1][batches[4][1] == 2] = E
    replay.forget()

    def steps():
        for seed, batch in enumerate(batches):
            torch.manual_seed(seed)
            yield step(model, layer, *batch)

    found = list(steps())
    assert [kind.__class__ for kind in replay._kinds.values()] == [replay._Replay] * 2
    monkeypatch.setattr(kernels, "replayed", lambda function, *arguments: function(*arguments))
    for i, (actual, expected) in enumerate(zip(found, steps(), strict=True)):
        for key in expected:
            assert torch.equal(actual[key], expected[key]), f"{key} of step {i}"


def test_a_replayed_step_needs_no_more_memory():
    model, layer = adapted(*QWEN3_MOE, torch.bfloat16)
    batch = inputs(torch.bfloat16, 8192)
    replay.forget()

    def peak():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(model, layer, *batch)
        return torch.cuda.max_memory_allocated() - before

    composed, _, *replayed = (peak() for _ in range(4))
    assert max(replayed) <= 1.02 * composed


def test_counting_rows_waits_for_nothing():
    model, layer = adapted(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16)
    with RoutingWatch(model) as watch:
        step(model, layer, *args)  # kernels are compiled
        watch.take()
        with no_wait_for_the_device():
            step(model, layer, *args)
        (counts,) = watch.take().values()
    assert torch.equal(counts, args[1].flatten().bincount(minlength=E).cpu())


def test_same_bits_every_time():
    model, layer = adapted(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16)
    first, second = step(model, layer, *args), step(model, layer, *args)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_nothing_waits_for_the_device():
    model, layer = adapted(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16)
    step(model, layer, *args)  # kernels are compiled
    with no_wait_for_the_device():
        step(model, layer, *args)


def test_compiled_layer_is_one_graph_with_the_same_numbers():
    model, layer = adapted(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16)
    eager = step(model, layer, *args)
    compiled = step(torch.compile(model.base_model.model.experts, fullgraph=True), layer, *args)
    for key, expected in eager.items():
        torch.testing.assert_close(compiled[key], expected, msg=key)


def test_a_captured_graph_follows_the_adapter():
    """Nothing is packed at capture: a replay reads the parameters as they are then."""
    model, layer = adapted(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16)
    with torch.no_grad():
        model(*args)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(*args)
        layer.lora_B["default"]["down"].data.mul_(-3)
        graph.replay()
        assert torch.equal(captured, model(*args))


def test_at_the_same_addresses_a_graph_takes_over_with_the_same_bits():
    replay.forget()
    model, layer = adapted(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16)
    others = inputs(torch.bfloat16)

    def graphed():
        owners = [captured.owner for captured in graphs.kept(args[0].device).values()]
        kinds = replay._kinds.values()
        return [isinstance(kind, replay._Replay) and kind.graphs in owners for kind in kinds]

    for _ in range(20):
        step(model, layer, *args)
        if graphed() == [True, True]:
            break
    else:
        pytest.fail("no addresses came three times")
    # the same memory, other routing, other tokens and another adapter
    for mine, other in zip(args, others, strict=True):
        mine.copy_(other)
    with torch.no_grad():
        layer.lora_B["default"]["down"].mul_(-3)
    by_graph = [step(model, layer, *args) for _ in range(3)][-1]
    replay.forget()
    composed = step(model, layer, *args)
    assert all(torch.equal(by_graph[key], composed[key]) for key in composed)


@pytest.mark.parametrize("tokens", [1, 8, 64, 2048])
@pytest.mark.parametrize("config", [{}, {"recompute": True}, {"expert_indices": {"experts": [1]}}])
def test_without_gradients_the_output_has_the_same_bits(config, tokens):
    """Composed, recorded, replayed, and at the third call at the same addresses as a graph."""
    model, _ = adapted(*QWEN3_MOE, torch.bfloat16, **config)
    args = inputs(torch.bfloat16, tokens)
    expected = model(*args).detach()
    replay.forget()
    with torch.no_grad():
        for _ in range(7):
            assert torch.equal(model(*args), expected)


def test_without_gradients_nothing_but_the_output_is_kept():
    model, _ = adapted(*QWEN3_MOE, torch.bfloat16)
    args = inputs(torch.bfloat16, 8192)
    with torch.no_grad():
        # a first CUDA graph, which stays: PyTorch makes two tensors for the first of a process
        others = inputs(torch.bfloat16, 64)
        for _ in range(7):
            model(*others)
        # what is made once in a process
        model(*args)
        for _ in range(5):
            before = torch.cuda.memory_allocated()
            out = model(*args)
            assert torch.cuda.memory_allocated() - before <= out.nbytes + 512
            del out


def test_graphs_that_make_room_for_others_do_not_change_the_bits(monkeypatch):
    """A graph is dropped while the device may still run it."""
    model, _ = adapted(*QWEN3_MOE, torch.bfloat16)
    batches = [inputs(torch.bfloat16, tokens) for tokens in (40, 80, 120)]
    with torch.no_grad():
        expected = [model(*batch) for batch in batches]
        monkeypatch.setattr(graphs, "PATIENCE", 3)
        replay.forget()
        device = batches[0][0].device
        limit = 2 * (graphs.GRAPH_BYTES + 16 * graphs.NODE_BYTES)
        graphs.kept(device).limit = limit
        for n in [0, 1, 2, 0, 2, 1]:
            for _ in range(12):
                assert torch.equal(model(*batches[n]), expected[n])
        assert 0 < graphs.kept(device).size <= limit
    replay.forget()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_repeats_dropout(use_reentrant):
    model, layer = adapted(*QWEN3_MOE, torch.bfloat16, lora_dropout=0.3)
    model.train()
    args = inputs(torch.bfloat16)

    def seeded(call):
        torch.manual_seed(3)
        return step(call, layer, *args)

    kept = seeded(model)
    recomputed = seeded(lambda *a: checkpoint(model, *a, use_reentrant=use_reentrant))
    assert all(torch.equal(kept[key], recomputed[key]) for key in kept)
    model.eval()
    assert not torch.equal(seeded(model)["output"], kept["output"]), "dropout did nothing"


@pytest.mark.parametrize("recompute", [False, True])
def test_kept_memory_is_the_pre_activation_two_rank_wide_tensors_and_indices(recompute):
    model, _ = adapted(*QWEN3_MOE, torch.bfloat16, recompute=recompute)
    x, index, weights = inputs(torch.bfloat16, tokens=20_000)
    x.requires_grad_()
    model(x, index, weights)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = model(x, index, weights)
    kept = torch.cuda.memory_allocated() - before - out.numel() * out.element_size()
    M = index.numel()
    floor = M * (2 * I * 2 * (not recompute) + 2 * R * 2 + 3 * 4)
    # room for tile tables and the allocator's rounding
    assert kept <= 1.02 * floor + 2**20


def test_weights_past_two_to_the_31_elements():
    E, N, K = 40, 8192, 8192
    from peft_moe_lora.ops import kernels

    weight = torch.empty(E, N, K, device="cuda", dtype=torch.bfloat16)
    for e in range(E):
        weight[e].normal_(std=K**-0.5)
    assert weight.numel() > 2**31
    x = torch.randn(64, K, device="cuda", dtype=torch.bfloat16)
    routing = kernels.route(torch.full((64, 1), E - 1, device="cuda"), E)
    y = kernels.expert_linear(x, weight, routing, gather=True)
    torch.testing.assert_close(y, x @ weight[-1].T, rtol=0.02, atol=0.02)
    # stored in the other order
    dx = kernels.expert_linear(y, weight.transpose(1, 2), routing)
    torch.testing.assert_close(dx, y @ weight[-1], rtol=0.02, atol=0.05)


def test_rows_past_two_to_the_31_elements():
    E, N, K, M = 2, 8192, 64, 2**18 + 77
    from peft_moe_lora.ops import kernels

    weight = torch.randn(E, N, K, device="cuda", dtype=torch.bfloat16) * K**-0.5
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    index = torch.zeros(M, 1, dtype=torch.long, device="cuda")
    index[-100:] = 1
    routing = kernels.route(index, E)
    y = kernels.expert_linear(x, weight, routing, gather=True)
    assert y.numel() > 2**31
    torch.testing.assert_close(y[-100:], x[-100:] @ weight[1].T, rtol=0.02, atol=0.02)
    out = kernels.combine(y, routing, torch.ones(M, 1, device="cuda"))
    assert torch.equal(out, y)
    xa = kernels.expert_shrink(y, weight[:, :, :16].transpose(1, 2), routing, 1.0)
    torch.testing.assert_close(xa[-100:], y[-100:] @ weight[1, :, :16], rtol=0.02, atol=0.05)
