"""Hand-written gradients against finite differences in fp64; the operator torch.compile sees."""

import pytest
import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from peft_moe_lora.functional import Projection, experts, select_backend, steps, whole
from peft_moe_lora.functional.operators import Operator
from peft_moe_lora.ops import Activation, reference

T, E, TOP_K, H, INNER, R = 5, 3, 2, 4, 3, 2


def _call(activation, *, gated=True, bias=False, dropout=0.0, dtype=torch.float64, sentinels=False):
    """Random tensors of one small layer: (differentiable inputs, function of them)."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=dtype)

    N = 2 * INNER if gated else INNER
    up, down = draw(E, N, H), draw(E, H, INNER)
    up_bias, down_bias = (draw(E, N), draw(E, H)) if bias else (None, None)
    index = torch.randint(E + 1 if sentinels else E, (T, TOP_K), generator=g)
    leaves = [
        draw(T, H),
        draw(T, TOP_K),
        draw(R * E, H),
        draw(N, R * E),
        draw(R * E, INNER),
        draw(H, R * E),
    ]

    def run(x, w, A1, B1, A2, B2, **options):
        return experts(
            x,
            index,
            w,
            Projection(up, up_bias, A1, B1, 0.7, dropout),
            Projection(down, down_bias, A2, B2, 1.3, dropout),
            activation,
            **options,
        )

    def seeded(*args, **options):
        torch.manual_seed(1)  # every call draws the same dropout masks
        return run(*args, **options)

    seeded.bare = run
    return [t.requires_grad_() for t in leaves], seeded


ACTIVATIONS = [
    Activation(),  # most families
    Activation("gelu_tanh"),  # gemma4
    Activation("gelu"),
    Activation("relu2", gated=False),  # nemotron_h
    Activation(limit=0.5),  # deepseek_v4: the clamp bites on part of the rows
    Activation(alpha=1.702, limit=0.7, up_shift=1.0, interleaved=True),  # gpt_oss
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "sentinels": True}, {"dropout": 0.4}], ids=str
)
def test_gradients_are_those_of_the_formula(activation, options):
    leaves, run = _call(activation, gated=activation.gated, **options)
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "sentinels": True}, {"dropout": 0.4}], ids=str
)
def test_unfused_path_has_the_same_gradients(options):
    leaves, run = _call(Activation(), **options)
    fused = run(*leaves)
    _, run_own = _call(
        lambda pre: torch.nn.functional.silu(pre.chunk(2, -1)[0]) * pre.chunk(2, -1)[1], **options
    )
    own = run_own(*leaves)
    torch.testing.assert_close(own, fused)
    assert torch.autograd.gradcheck(run_own, leaves)
    for a, b in zip(
        torch.autograd.grad(own.sum(), leaves),
        torch.autograd.grad(fused.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}, {"bias": True}], ids=str)
def test_recompute_changes_nothing(options):
    leaves, run = _call(Activation(), **options)
    kept, recomputed = run(*leaves), run(*leaves, recompute=True)
    assert torch.equal(kept, recomputed)
    for a, b in zip(
        torch.autograd.grad(kept.sum(), leaves),
        torch.autograd.grad(recomputed.sum(), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)


def own_activation(pre):
    """An activation that no kernel has."""
    gate, up = pre.chunk(2, -1)
    return torch.tanh(gate) * up


@pytest.mark.parametrize("options", [{}, {"bias": True, "dropout": 0.4}], ids=str)
@pytest.mark.parametrize("activation", [Activation(), own_activation], ids=["fused", "unfused"])
def test_compiled_layer_is_one_graph_with_the_same_gradients(activation, options):
    leaves, run = _call(activation, dtype=torch.float32, **options)
    eager = run(*leaves)
    expected = torch.autograd.grad(eager.square().sum(), leaves)
    torch.manual_seed(1)
    compiled = torch.compile(run.bare, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("activation", [Activation(), own_activation], ids=["fused", "unfused"])
def test_dynamo_does_not_trace_launches_of_a_call_it_gave_up_on(activation, monkeypatch):
    """It would run kernels while it traces them; on a GPU that is an illegal memory access."""
    callbacks = []

    class Recording:
        def __getattr__(self, name):
            callbacks.append(get_eval_frame_callback())
            return getattr(reference, name)

    def give_up(*groups):
        # as Dynamo raises for what it does not know; the call then runs without being traced
        raise TypeError("unknown to Dynamo")

    leaves, run = _call(activation, dtype=torch.float32)
    expected = run.bare(*leaves)
    for module in (whole, steps):
        monkeypatch.setattr(module, "ops_for", lambda backend, device: Recording())
    monkeypatch.setattr(Operator, "compiled", give_up)
    torch.testing.assert_close(torch.compile(run.bare, backend="eager")(*leaves), expected)
    assert callbacks
    assert not any(callable(callback) for callback in callbacks), "Dynamo traces within"


def test_base_weights_that_ask_for_a_gradient_are_refused():
    up = Projection(torch.randn(E, 2 * INNER, H, requires_grad=True))
    down = Projection(torch.randn(E, H, INNER))
    rows = torch.randn(T, H), torch.zeros(T, 1, dtype=torch.long), torch.ones(T, 1)
    with pytest.raises(ValueError, match="requires_grad"):
        experts(*rows, up, down, Activation())


def test_shapes_that_do_not_fit_are_named():
    up, down = Projection(torch.randn(E, 2 * INNER, H)), Projection(torch.randn(E, H, INNER))
    x, index = torch.randn(T, H + 1), torch.zeros(T, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"hidden_states \[T, H\]"):
        experts(x, index, torch.ones(T, 1), up, down, Activation())


def test_triton_where_it_cannot_run_is_an_error(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from peft_moe_lora.functional import backends

    backends._triton_obstacle.cache_clear()
    with pytest.raises(RuntimeError, match='backend="triton" cannot run here'):
        select_backend("triton", torch.device("cpu"))
    backends._triton_obstacle.cache_clear()


def test_rocm_runs_in_plain_pytorch_and_refuses_the_kernels_by_name(monkeypatch):
    """There, a GPU's capability is a number that would pass."""
    from peft_moe_lora.functional import backends

    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    backends._triton_obstacle.cache_clear()
    assert select_backend("auto", device) == "torch"
    with pytest.raises(RuntimeError, match=r'"triton" cannot run here: .*ROCm 6\.4.*"torch"'):
        select_backend("triton", device)
    backends._triton_obstacle.cache_clear()


def test_auto_on_cpu_is_torch():
    assert select_backend("auto", torch.device("cpu")) == "torch"


@pytest.mark.parametrize("configured", [True, False])
def test_what_auto_picked_is_shown_once(configured, monkeypatch, capsys, caplog):
    """On stderr, or in the log of whoever set up logging; never while torch.compile traces."""
    from peft_moe_lora.functional import backends

    monkeypatch.setattr(backends.logger, "hasHandlers", lambda: configured)
    caplog.set_level("INFO", logger=backends.__name__)
    backends._show_choice.cache_clear()
    backends._shown_operations.cache_clear()
    cpu = torch.device("cpu")
    with monkeypatch.context() as tracing:
        tracing.setattr(torch.compiler, "is_compiling", lambda: True)
        backends.ops_for("auto", cpu)
    backends.ops_for("torch", cpu)
    backends.select_backend("auto", cpu)
    assert not capsys.readouterr().err + caplog.text
    for _ in range(3):
        backends.ops_for("auto", cpu)
    printed = capsys.readouterr().err
    assert printed.count('backend="auto" picked "torch" on cpu') == (not configured)
    assert caplog.text.count('backend="auto" picked "torch" on cpu') == configured
