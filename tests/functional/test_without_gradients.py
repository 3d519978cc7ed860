"""Where no gradient can be asked for, the layer gives the same numbers and keeps nothing."""

import contextlib

import pytest
import torch
from torch.autograd import forward_ad

from peft_moe_lora.functional import Projection, experts, whole
from peft_moe_lora.ops import Activation
from peft_moe_lora.ops.kernels.launching import replay

T, E, TOP_K, H, INNER, R = 7, 5, 2, 8, 4, 2


def own_activation(pre):
    """An activation that no kernel has."""
    gate, up = pre.chunk(2, -1)
    return torch.tanh(gate) * up


def layer(activation=None, *, bias=False, dropout=0.0, some=None, dtype=torch.float64, tokens=T):
    """(leaves, function of them): a small layer whose low-rank share is of order one."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    S = E
    if some is not None:
        S = len(some)
    up, down = draw(E, 2 * INNER, H), draw(E, H, INNER)
    up_bias = down_bias = None
    if bias:
        up_bias, down_bias = draw(E, 2 * INNER), draw(E, H)
    index = torch.randint(E + 1, (tokens, TOP_K), generator=generator)
    leaves = [draw(tokens, H), draw(tokens, TOP_K)]
    leaves += [draw(R * S, H), draw(2 * INNER, R * S), draw(R * S, INNER), draw(H, R * S)]

    def bare(x, weights, up_A, up_B, down_A, down_B):
        return experts(
            x,
            index,
            weights,
            Projection(up, up_bias, up_A, up_B, 0.7, dropout, some),
            Projection(down, down_bias, down_A, down_B, 1.3, dropout, some),
            activation or Activation(),
        )

    def run(*leaves):
        torch.manual_seed(1)  # every call draws the same masks of dropout
        return bare(*leaves)

    run.bare = bare
    return leaves, run


OPTIONS = [{}, {"bias": True, "dropout": 0.4}, {"some": (0, 3)}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("activation", [Activation(), own_activation], ids=["fused", "unfused"])
def test_the_output_has_the_bits_of_a_call_with_gradients(activation, options):
    leaves, run = layer(activation, **options)
    frozen = run(*leaves)
    assert not frozen.requires_grad
    for leaf in leaves:
        leaf.requires_grad_()
    expected = run(*leaves)
    assert expected.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(run(*leaves), expected)
    assert torch.equal(frozen, expected)


@pytest.mark.parametrize("leaf", range(6))
def test_one_tensor_that_asks_for_a_gradient_gets_it(leaf):
    leaves, run = layer()
    leaves[leaf].requires_grad_()
    (gradient,) = torch.autograd.grad(run(*leaves).sum(), [leaves[leaf]])
    assert gradient.norm() > 0


@pytest.mark.parametrize("activation", [Activation(), own_activation], ids=["fused", "unfused"])
def test_what_differentiates_without_autograd_is_refused(activation):
    """A direct call would drop the tangent and say nothing."""
    leaves, run = layer(activation)
    x, *others = leaves
    with torch.no_grad():
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            run(forward_ad.make_dual(x, torch.ones_like(x)), *others)
        with pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.vmap(lambda x: run(x, *others))(x[None])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_it_is_one_graph_with_the_same_output(options):
    leaves, run = layer(dtype=torch.float32, **options)
    with torch.no_grad():
        expected = run(*leaves)
        torch.manual_seed(1)
        compiled = torch.compile(run.bare, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, expected)


@contextlib.contextmanager
def watched_results(monkeypatch):
    """Within it, the results of every forward are appended to the yielded list."""
    found = []
    forward = whole._forward

    def watched(*values):
        found.append(forward(*values))
        return found[-1]

    monkeypatch.setattr(whole, "_forward", watched)
    yield found


def test_forward_returns_the_output_alone(monkeypatch):
    leaves, run = layer()
    with watched_results(monkeypatch) as found:
        run(*leaves)
        leaves[0].requires_grad_()
        with torch.no_grad():
            run(*leaves)
        run(*leaves)
    *without, kept = found
    for results in without:
        assert [name for name, value in results._asdict().items() if value is not None] == ["out"]
    assert None not in kept


def test_a_replayed_call_allocates_the_output_and_one_workspace(launches, monkeypatch):
    # in 16 bits a layer of these widths is computed on copies
    leaves, run = layer(dtype=torch.float32, tokens=512)
    with torch.no_grad():
        for _ in range(2):
            run(*leaves)
        (plan,) = replay._kinds.values()
        assert isinstance(plan, replay._Replay)
        made = []

        def noted(empty):
            def allocate(*args, **kwargs):
                made.append(empty(*args, **kwargs))
                return made[-1]

            return allocate

        monkeypatch.setattr(plan, "empty", noted(plan.empty))
        for name in ("empty", "empty_strided"):
            monkeypatch.setattr(torch, name, noted(getattr(torch, name)))
        out = run(*leaves)
    assert [tuple(t.shape) for t in made if t.dtype == torch.float32] == [out.shape]
    assert len(made) == 2


def test_a_graph_that_was_traced_without_gradients_refuses_them():
    """Its backward would need what the forward has not kept."""
    leaves, run = layer()

    class Experts(torch.nn.Module):
        def forward(self, *leaves):
            return run.bare(*leaves)

    with torch.no_grad():
        exported = torch.export.export(Experts(), tuple(leaves)).module()
        torch.testing.assert_close(exported(*leaves), run.bare(*leaves))
    leaves[0].requires_grad_()
    with pytest.raises(RuntimeError, match=r"traced without gradients.*torch\.no_grad"):
        exported(*leaves)
