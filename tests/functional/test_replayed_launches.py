"""A layer's launches on a Hopper GPU are replayed as they were composed.

The kernels are fakes, so no GPU is needed.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton

from peft_moe_lora.functional import Projection, experts, steps, whole
from peft_moe_lora.functional.operators import Gradient
from peft_moe_lora.ops import Activation, kernels
from peft_moe_lora.ops.kernels.launching import launch, replay
from peft_moe_lora.ops.kernels.launching.recent import Recent

E, H, I, T, TOP_K, RANK = 8, 256, 128, 2048, 2, 16  # noqa: E741 I is the glossary's letter


def flat(arguments):
    """The members of nested tuples, in their order."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from flat(argument)
        else:
            yield argument


def relative(arguments, inputs):
    """The arguments without addresses: an input and an offset into it, or the number of a buffer.

    A descriptor is its class, its fields and where it points.
    """
    order, found = {}, []
    for argument in flat(arguments):
        fields = {}
        if hasattr(argument, "base"):
            fields = {name: value for name, value in vars(argument).items() if name != "base"}
            fields["class"] = type(argument)
            argument = argument.base.data_ptr()
        if isinstance(argument, int) and argument >= 2**32:
            of = [
                (i, argument - t.data_ptr())
                for i, t in enumerate(inputs)
                if 0 <= argument - t.data_ptr() < t.nbytes
            ]
            argument = (
                ("input", *of[0]) if of else ("buffer", order.setdefault(argument, len(order)))
            )
        found.append((argument, fields))
    return found


def step(launches, transposed=False):
    """The launches of a layer's forward and backward, as `relative` describes them."""

    def weight(N, K):
        return (
            torch.zeros(E, K, N, dtype=torch.bfloat16).transpose(1, 2)
            if transposed
            else torch.zeros(E, N, K).bfloat16()
        )

    def projection(N, K):
        lora = (
            torch.zeros(RANK * E, K, requires_grad=True),
            torch.zeros(N, RANK * E, requires_grad=True),
        )
        return Projection(weight(N, K), None, *lora)

    launches.clear()
    x = torch.zeros(T, H, dtype=torch.bfloat16, requires_grad=True)
    dout, weights = (
        torch.zeros(T, H, dtype=torch.bfloat16),
        torch.zeros(T, TOP_K, requires_grad=True),
    )
    index = torch.zeros(T, TOP_K, dtype=torch.int64)
    up, down = projection(2 * I, H), projection(H, I)
    # all of them live through the whole step, so no buffer reuses their addresses
    inputs = [
        x,
        weights,
        index,
        dout,
        *(t for p in (up, down) for t in (p.weight, p.lora_A, p.lora_B)),
    ]
    experts(x, index, weights, up, down, Activation()).backward(dout)
    return [(name, grid, relative(arguments, inputs)) for name, grid, arguments in launches]


@pytest.mark.parametrize("transposed", [False, True])
def test_replayed_launches_are_those_composed(launches, transposed):
    step(launches, transposed)
    # from the second call on, the kernel compiled at the first launch runs
    composed, *replayed = (step(launches, transposed) for _ in range(3))
    assert [type(kind) for kind in replay._kinds.values()] == [replay._Replay] * 2
    # the gate and up halves of a transposed weight do not form one box
    assert [name for name, *_ in composed].count("_linear_roles_kernel") == (3 if transposed else 4)
    for launched in replayed:
        assert launched == composed


def test_what_forward_and_what_backward_launch_is_compiled_ahead(launches, monkeypatch):
    compile_ahead = launch.compile_ahead

    def watched(function, *arguments):
        launched, asked = len(launches.at_launch), len(launches.ahead)
        compile_ahead(function, *arguments)
        assert len(launches.at_launch) == launched
        assert len(launches.ahead) > asked

    monkeypatch.setattr(launch, "compile_ahead", watched)
    step(launches)
    assert sorted(launches.ahead) == sorted(launches.at_launch)
    assert launches.ahead.count("_linear_roles_kernel") == 4
    # everything is compiled; other batch sizes compile nothing more
    asked = len(launches.ahead)
    monkeypatch.setattr(launch, "compile_ahead", compile_ahead)
    monkeypatch.setattr(replay, "_kinds", Recent(replay.KINDS_BYTES))
    step(launches)
    assert len(launches.ahead) == asked


def test_a_triton_that_cannot_compile_ahead_compiles_at_the_launch(launches, monkeypatch):
    """Triton 3.5, whose mode of compiling takes no `ignore_errors`."""
    monkeypatch.setattr(launch, "COMPILES_AHEAD", False)
    monkeypatch.setattr(triton, "AsyncCompileMode", None)
    step(launches)
    assert not launches.ahead
    assert launches.at_launch.count("_linear_roles_kernel") == 4


def test_a_composition_that_fails_ahead_does_not_stop_later_launches(launches):
    def fails(x, weight):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        kernels.replayed(fails, torch.zeros(2), torch.zeros(2))
    kernels.route(torch.zeros(T, TOP_K, dtype=torch.int64), E)
    assert "_count_kernel" in launches.at_launch


def test_an_interrupted_compilation_leaves_triton_as_it_was(launches, monkeypatch):
    mode = triton.AsyncCompileMode

    class Interrupted(mode):
        def __exit__(self, *exception):
            raise KeyboardInterrupt

    monkeypatch.setattr(triton, "AsyncCompileMode", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(launches)
    with ThreadPoolExecutor() as pool, mode(pool):
        pass
    monkeypatch.setattr(triton, "AsyncCompileMode", mode)
    step(launches)
    assert launches.at_launch.count("_linear_roles_kernel") == 4


def test_a_thread_is_given_a_context_once(monkeypatch):
    made = []
    monkeypatch.setattr(torch, "zeros", lambda size, device: made.append(device))

    def calls():
        for device in (-1, 0, 0):
            launch.bind(device)

    for _ in range(2):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(calls).result()
    assert made == [torch.device("cuda", 0)] * 2


def test_a_launch_and_a_replayed_call_ask_for_a_context(launches, monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "bind", asked.append)
    kernels.route(torch.zeros(T, TOP_K, dtype=torch.int64), E)
    assert len(asked) == len(launches.at_launch) == 3
    for _ in range(3):
        asked.clear()
        step(launches)
    # forward and backward, replayed
    assert len(asked) == 2


def test_operators_make_the_table_of_tiles_once_each(launches):
    routing = kernels.route(torch.zeros(T, TOP_K, dtype=torch.int64), E)
    bf16 = torch.bfloat16
    up, down, x = (
        torch.zeros(E, 2 * I, H, dtype=bf16),
        torch.zeros(E, H, I, dtype=bf16),
        torch.zeros(T, H, dtype=bf16),
    )
    (up_A, up_B), (down_A, down_B) = (
        (torch.zeros(RANK * E, K), torch.zeros(N, RANK * E)) for N, K in ((2 * I, H), (H, I))
    )
    rows = {width: torch.zeros(T * TOP_K, width, dtype=bf16) for width in (2 * I, RANK)}

    def tables(operator, *arguments):
        launches.clear()
        launches.at_launch.clear()
        operator(*arguments)
        return [*launches.at_launch, *(name for name, *_ in launches)].count("_tiles_kernel")

    routing = routing._replace(tiles=None, block_m=0)
    inputs = whole.Inputs(
        x, torch.zeros(T, TOP_K), up_A, up_B, down_A, down_B, up, None, down, None, None
    )
    kept = whole.Kept(rows[2 * I], rows[RANK], rows[RANK])
    plan = whole.Plan("triton", True, False, 1.0, 1.0, 0.0, 0.0, None, None, False, False)
    needs = whole.Needs(True, True, True)
    backward = whole._run_backward
    assert tables(backward, Gradient(x), inputs, kept, routing, needs, Activation(), plan) == 1
    inputs, plan = (
        steps.Inputs(x, up_A, up_B, up, None, None),
        steps.Plan(1.0, 0.0, True, "triton", None),
    )
    assert tables(steps._run_linear, inputs, routing, plan) == 1
    arguments = (
        Gradient(rows[2 * I]),
        inputs,
        steps.Kept(rows[RANK]),
        routing,
        steps.Needs(True, True),
    )
    assert tables(steps._run_linear_backward, *arguments, plan) == 1
