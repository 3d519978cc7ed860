"""Under `keep_experts` a checkpointed experts layer runs once, and gives the same bits."""

import gc
import itertools
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from functional.test_without_gradients import TOP_K, E, H, R, layer, own_activation
from peft_moe_lora import keep_experts
from peft_moe_lora.functional import checkpointing, experts, whole
from peft_moe_lora.ops import table_memory
from peft_moe_lora.planning.trace import Trace

OPTIONS = [{}, {"bias": True, "dropout": 0.4}, {"some": (0, 3)}]
PLAIN = {"use_reentrant": False}
KEEPING = {"use_reentrant": False, "context_fn": keep_experts}


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    """No earlier test has found out whether an output is needed."""
    monkeypatch.setattr(checkpointing, "_output_needed", set())


@pytest.fixture
def runs(monkeypatch):
    """One entry for each time that the experts run."""
    found = []
    forward = whole._forward

    def counted(*values):
        found.append(values)
        return forward(*values)

    monkeypatch.setattr(whole, "_forward", counted)
    return found


def residual(run):
    """Nothing behind the experts keeps a tensor, as in a decoder layer."""
    return lambda x, *others: x + run(x, *others)


def gated(run):
    """The product behind the experts keeps their output."""
    return lambda x, *others: torch.tanh(x) * run(x, *others)


def in_place(run):
    """The output is changed, and then needed."""

    def block(x, *others):
        out = run(x, *others)
        out.mul_(3).add_(x)
        return torch.tanh(out) * x

    return block


BLOCKS = {"residual": residual, "gated": gated, "in place": in_place}


def gradients(block, leaves, how):
    """The gradients of all leaves, checkpointed as `how` says, or not if it is None."""
    if how is None:
        out = block(*leaves)
    else:
        out = checkpoint(block, *leaves, **how)
    return torch.autograd.grad(out.square().sum(), leaves)


def differentiable_layer(*args, **options):
    leaves, run = layer(*args, **options)
    return [leaf.requires_grad_() for leaf in leaves], run


def assert_same_bits(found, expected):
    for gradient, right in zip(found, expected, strict=True):
        assert right.norm() > 0
        assert torch.equal(gradient, right)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_experts_run_once_and_gradients_have_the_same_bits(options, runs):
    leaves, run = differentiable_layer(**options)
    block = residual(run)
    expected = gradients(block, leaves, None)
    runs.clear()
    assert_same_bits(gradients(block, leaves, PLAIN), expected)
    assert len(runs) == 2
    runs.clear()
    assert_same_bits(gradients(block, leaves, KEEPING), expected)
    assert len(runs) == 1


@pytest.mark.parametrize(("name", "counts"), [("gated", [2, 1, 1]), ("in place", [2, 2, 2])])
def test_an_output_that_is_needed_again_is_kept_from_the_second_step_on(name, counts, runs):
    """An output that the model has changed is not kept, but computed again."""
    leaves, run = differentiable_layer()
    block = BLOCKS[name](run)
    expected = gradients(block, leaves, None)
    for count in counts:
        runs.clear()
        assert_same_bits(gradients(block, leaves, KEEPING), expected)
        assert len(runs) == count


@pytest.mark.parametrize("name", BLOCKS)
def test_a_run_that_is_not_ended_early_gives_the_same(name):
    leaves, run = differentiable_layer()
    block = BLOCKS[name](run)
    expected = gradients(block, leaves, None)
    with set_checkpoint_early_stop(False):
        for _ in range(2):
            assert_same_bits(gradients(block, leaves, KEEPING), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_two_backwards_of_one_forward_are_the_same(name):
    leaves, run = differentiable_layer(dropout=0.4)
    block = BLOCKS[name](run)
    expected = gradients(block, leaves, None)
    # the second forward keeps the output
    for _ in range(2):
        loss = checkpoint(block, *leaves, **KEEPING).square().sum()
        for keep in (True, False):
            assert_same_bits(torch.autograd.grad(loss, leaves, retain_graph=keep), expected)


def test_several_layers_in_one_region_take_what_is_theirs(runs):
    leaves, run = differentiable_layer()

    def block(x, *others):
        first = x + run(x, *others)
        return first + run(torch.tanh(first), *others)

    expected = gradients(block, leaves, None)
    for count in (3, 3):
        runs.clear()
        assert_same_bits(gradients(block, leaves, KEEPING), expected)
        # the second layer needs the output of the first
        assert len(runs) <= count


def test_a_region_within_a_region_keeps_its_own(runs):
    leaves, run = differentiable_layer(dropout=0.4)

    def block(x, *others):
        inner = checkpoint(residual(run), x, *others, **KEEPING)
        return inner + run(torch.tanh(inner), *others)

    expected = gradients(block, leaves, None)
    for _ in range(2):
        runs.clear()
        assert_same_bits(gradients(block, leaves, KEEPING), expected)
    # the first run of both regions; the second run of the outer one is a first run of the inner one
    assert len(runs) == 3


def test_masks_of_dropout_are_those_of_the_rows_that_were_kept():
    """Also where the second run draws others."""
    leaves, run = differentiable_layer(dropout=0.4)
    torch.manual_seed(1)
    expected = torch.autograd.grad(residual(run.bare)(*leaves).square().sum(), leaves)
    torch.manual_seed(1)
    out = checkpoint(residual(run.bare), *leaves, **KEEPING, preserve_rng_state=False)
    torch.manual_seed(2)
    assert_same_bits(torch.autograd.grad(out.square().sum(), leaves), expected)


def test_it_keeps_rows_of_rank_r_and_the_routing():
    """Bytes beyond those of plain checkpointing; the output only where it is needed."""
    kept = {}
    for how in ("plain", "residual", "gated"):
        leaves, run = differentiable_layer(tokens=64, dtype=torch.float32)
        block = BLOCKS.get(how, residual)(run)
        options = PLAIN if how == "plain" else KEEPING
        gradients(block, leaves, options)
        gc.collect()
        trace = Trace()
        with trace:
            out = checkpoint(block, *leaves, **options)
            kept[how] = trace.live
        del out
    M = 64 * TOP_K
    # xa and ha in fp32, with 8 columns for rank 2 (`ops.ranks`)
    assert R == 2
    rows = 2 * M * 8 * 4
    # expert_offsets, row_token, row_slot, slot_row, and the table of tiles
    routing = 4 * (E + 1 + 3 * M) + table_memory(torch.empty(64, TOP_K), E).nbytes
    assert kept["residual"] - kept["plain"] == rows + routing
    assert kept["gated"] - kept["residual"] == 64 * H * 4


def test_what_is_kept_goes_with_the_graph(monkeypatch):
    alive = []
    kept = checkpointing._kept

    def watched(*groups):
        found = kept(*groups)
        alive.extend(weakref.ref(t) for t in (found.results.xa, found.out) if t is not None)
        return found

    monkeypatch.setattr(checkpointing, "_kept", watched)
    leaves, run = differentiable_layer()
    gradients(gated(run), leaves, KEEPING)
    gc.collect()
    gc.disable()
    try:
        loss = checkpoint(gated(run), *leaves, **KEEPING).sum()
        assert len([r for r in alive if r() is not None]) == 2
        loss.backward()
        assert not any(r() is not None for r in alive), "backward leaves something"
        out = checkpoint(gated(run), *leaves, **KEEPING)
        del out
        assert not any(r() is not None for r in alive), "a graph without a backward leaves it"
    finally:
        gc.enable()


def test_an_activation_of_the_model_runs_twice_as_without_it():
    leaves, run = differentiable_layer(own_activation)
    expected = gradients(residual(run), leaves, None)
    assert_same_bits(gradients(residual(run), leaves, KEEPING), expected)


def test_reentrant_checkpointing_is_refused_before_anything_runs(runs):
    leaves, run = differentiable_layer()
    with pytest.raises(ValueError, match="only supported when use_reentrant=False"):
        checkpoint(residual(run), *leaves, use_reentrant=True, context_fn=keep_experts)
    assert not runs


# ---- a second run that does not repeat the first one --------------------------------------------


def captured(monkeypatch):
    """The arguments of `experts` of one small layer."""
    leaves, run = differentiable_layer()
    found = {}

    def watched(*args, **options):
        found["args"] = args
        return experts(*args, **options)

    monkeypatch.setattr("functional.test_without_gradients.experts", watched)
    run(*leaves)
    return leaves, found["args"]


def other_experts(call, args):
    x, index, *rest = args
    if call == 2:
        index = index.flip(1)
    return experts(x, index, *rest)


def another_scaling(call, args):
    x, index, weights, up, down, activation = args
    if call == 2:
        up = up._replace(scaling=2 * up.scaling)
    return experts(x, index, weights, up, down, activation)


def one_call_more(call, args):
    out = experts(*args)
    if call == 2:
        out = out + experts(*args)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_experts, "the router selected other experts"),
        (another_scaling, "calls other experts, or calls them otherwise"),
        (one_call_more, "calls experts more than the 1 times"),
    ],
)
def test_a_second_run_that_differs_is_refused(change, message, monkeypatch):
    leaves, args = captured(monkeypatch)
    calls = itertools.count(1)

    def changing(x, *_):
        return change(next(calls), (x, *args[1:]))

    # the output behind the experts is needed, so that the second run goes on
    out = checkpoint(gated(changing), *leaves, **KEEPING)
    with pytest.raises(RuntimeError, match=message):
        out.sum().backward()
