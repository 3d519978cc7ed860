"""`functional.updated_linear` against y = W x + bias + s * (B (A drop(x))) in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from helpers import assert_share_of_order_one, relative_error
from peft_moe_lora.functional import FrozenLinear, LinearUpdate, updated_linear

# all different, so that no transpose can hide
T, K, N, R = 23, 20, 28, 3
SCALING = 1.7

# what is left of a sum where the twin happens to round to the exact value
ATOL = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
dtypes = pytest.mark.parametrize("dtype", ATOL, ids=str)
# the layer in one step, or its output with the update's share added
bases = pytest.mark.parametrize("fused", [True, False], ids=["layer", "output"])


def tensors(dtype, shape=(T,), bias=True):
    """x, A, B, W, bias: the activations and the layer in `dtype`, A and B at least in fp32."""
    generator = torch.Generator().manual_seed(0)

    def random(*size, std=1.0):
        return torch.randn(size, generator=generator, dtype=torch.float64) * std

    wide = torch.promote_types(dtype, torch.float32)
    x = random(*shape, K).to(dtype).requires_grad_()
    A = random(R, K, std=K**-0.5).to(wide).requires_grad_()
    B = random(N, R, std=R**-0.5).to(wide).requires_grad_()
    weight = random(N, K, std=K**-0.5).to(dtype)
    return x, A, B, weight, random(N).to(dtype) if bias else None


def fast(x, A, B, weight, bias, *, fused=True, p=0.0):
    base = FrozenLinear(weight, bias)
    if not fused:
        base = F.linear(x, weight, bias)
    return updated_linear(x, base, LinearUpdate(A, B, SCALING, p), weight.dtype)


def plain(x, A, B, weight, bias, mask=1.0):
    """The formula, one operation after the other, all in the dtype of the weight."""
    A = A.to(weight.dtype)
    B = B.to(weight.dtype)
    return F.linear(x, weight, bias) + F.linear(F.linear(x * mask, A), B) * SCALING


def step(call, x, A, B, weight, bias, **options):
    """The output, and the gradients of x, A and B, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, A, B)]
    out = call(*leaves, weight, bias, **options)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    out.backward(direction)
    grads = [leaf.grad for leaf in leaves]
    return dict(zip(["y", "dx", "dA", "dB"], [out.detach(), *grads], strict=True))


def in_double(arguments):
    return [None if t is None else t.detach().double() for t in arguments]


def assert_as_exact(found, twin, exact, dtype):
    for name, expected in exact.items():
        error = relative_error(found[name], expected)
        allowed = 2 * relative_error(twin[name], expected) + ATOL[dtype]
        assert error <= allowed, f"{name}: {error:.2e}, and {allowed:.2e} are allowed"


@bases
@dtypes
@pytest.mark.parametrize("shape", [(T,), (2, 5), (1,), ()], ids=str)
def test_it_is_as_exact_as_plain_pytorch(dtype, fused, shape):
    arguments = tensors(dtype, shape, bias=len(shape) != 2)
    found = step(fast, *arguments, fused=fused)
    assert found["y"].dtype == found["dx"].dtype == dtype
    assert found["dA"].dtype == found["dB"].dtype == arguments[1].dtype
    exact = step(plain, *in_double(arguments))
    x, _, _, *layer = in_double(arguments)
    assert_share_of_order_one(exact["y"], F.linear(x, *layer))
    assert_as_exact(found, step(plain, *arguments), exact, dtype)


@bases
def test_it_takes_activations_of_any_strides_and_none_at_all(fused):
    x, *others = tensors(torch.float32, (4, 6))
    x = x.detach().transpose(0, 1).requires_grad_()
    found = step(fast, x, *others, fused=fused)
    exact = step(plain, *in_double([x, *others]))
    assert_as_exact(found, step(plain, x, *others), exact, torch.float32)
    empty = step(fast, *tensors(torch.float32, (2, 0)), fused=fused)
    assert empty["y"].shape == (2, 0, N)
    assert not empty["dA"].any()
    assert not empty["dB"].any()


def test_it_takes_the_output_of_a_layer_with_any_strides():
    x, A, B, *layer = tensors(torch.float32, (4, 6))
    y = F.linear(x, *layer).detach()
    strided = y.transpose(0, 1).contiguous().transpose(0, 1)
    found, expected = (
        updated_linear(x, base, LinearUpdate(A, B, SCALING), y.dtype) for base in (strided, y)
    )
    assert torch.equal(found, expected)


@bases
def test_gradients_are_those_of_finite_differences(fused):
    x, A, B, weight, bias = tensors(torch.float64, (3,))
    assert torch.autograd.gradcheck(
        lambda x, A, B: fast(x, A, B, weight, bias, fused=fused), (x, A, B)
    )


@bases
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_without_gradients_it_gives_the_same_bits(fused, p):
    arguments = tensors(torch.bfloat16, (2, 5))
    torch.manual_seed(0)
    expected = fast(*arguments, fused=fused, p=p)
    assert expected.grad_fn is not None
    for mode in (torch.no_grad, torch.inference_mode):
        torch.manual_seed(0)
        with mode():
            found = fast(*arguments, fused=fused, p=p)
        assert torch.equal(found, expected)
    # nothing requires a gradient, as with a frozen adapter
    torch.manual_seed(0)
    frozen = fast(*[t.detach() for t in arguments], fused=fused, p=p)
    assert torch.equal(frozen, expected)
    assert not frozen.requires_grad


def test_the_output_of_a_trained_layer_gets_its_gradient():
    x, A, B, weight, bias = tensors(torch.float32)
    grads = {}
    for call in (plain, fast):
        leaves = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        options = {"fused": False} if call is fast else {}
        call(x, A, B, *leaves, **options).square().sum().backward()
        grads[call] = [leaf.grad for leaf in leaves]
    for found, expected in zip(grads[fast], grads[plain], strict=True):
        assert relative_error(found, expected) < 1e-5


@bases
@pytest.mark.parametrize("needed", ["x", "A", "B", "xA", "AB", ""])
def test_only_gradients_that_are_needed_are_computed(fused, needed):
    arguments = tensors(torch.float32)
    leaves = dict(zip("xAB", arguments[:3], strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in needed)
    out = fast(*arguments, fused=fused)
    assert out.requires_grad == bool(needed)
    if not needed:
        return
    out.sum().backward()
    exact = [t.double().detach().requires_grad_() for t in arguments[:3]]
    plain(*exact, *in_double(arguments[3:])).sum().backward()
    for (name, leaf), expected in zip(leaves.items(), exact, strict=True):
        assert (leaf.grad is not None) == (name in needed)
        if name in needed:
            assert relative_error(leaf.grad, expected.grad) < 1e-5


def test_second_derivatives_are_refused():
    x, A, B, weight, bias = tensors(torch.float32)
    with pytest.raises(RuntimeError, match="fast_linear=False"):
        torch.autograd.grad(fast(x, A, B, weight, bias).sum(), x, create_graph=True)


@bases
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(T,), (2, 5)], ids=str)
def test_a_model_may_change_the_output_in_place(shape, bias, fused):
    """Autograd would refuse it, were the output a view."""
    arguments = tensors(torch.float32, shape, bias)
    expected = step(lambda *a: fast(*a, fused=fused) * 2, *arguments)
    found = step(lambda *a: fast(*a, fused=fused).mul_(2), *arguments)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@bases
def test_torch_func_is_refused(fused):
    _, *others = arguments = tensors(torch.float32)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: fast(x, *others, fused=fused).sum())(arguments[0].detach())


def test_a_tensor_that_outlived_torch_func_counts_as_the_one_it_wraps():
    x, *others = tensors(torch.float32)
    outlived = []

    def scaled(x):
        outlived.append(x * 2)
        return outlived[0].sum()

    torch.func.grad(scaled)(x.detach())
    A, B = others[:2]
    found = torch.autograd.grad(fast(outlived[0], *others).square().sum(), (A, B))
    expected = torch.autograd.grad(fast(x.detach() * 2, *others).square().sum(), (A, B))
    assert all(map(torch.equal, found, expected))


# ---- dtypes --------------------------------------------------------------------------------------


def test_activations_wider_than_the_products_keep_their_width():
    """As in a 4-bit layer under autocast: x and y in fp32, A and B multiplied in bf16."""
    x, A, B, weight, bias = tensors(torch.float32)
    y = F.linear(x, weight, bias).detach()
    found = updated_linear(x, y, LinearUpdate(A, B, SCALING), torch.bfloat16)
    assert found.dtype == torch.float32
    share = F.linear(F.linear(x.bfloat16(), A.bfloat16()), B.bfloat16()) * SCALING
    exact = F.linear(F.linear(x.double(), A.double()), B.double()) * SCALING
    allowed = 2 * relative_error(share, exact)
    assert relative_error(found.double() - y.double(), exact) <= allowed
    grads = torch.autograd.grad(found.sum(), (x, A, B))
    assert {g.dtype for g in grads} == {torch.float32}
    expected = torch.autograd.grad(exact.sum(), (x, A, B))
    assert max(map(relative_error, grads, expected)) < 3e-2


@pytest.mark.parametrize("autocast", [False, True])
def test_products_wider_than_the_output_are_rounded_once(autocast):
    """The sum of y and the update in fp32, rounded to bf16."""
    x, A, B, weight, bias = tensors(torch.float32)
    y = F.linear(x, weight, bias).detach().bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = updated_linear(x, y, LinearUpdate(A, B, SCALING), torch.float32)
    assert found.dtype == torch.bfloat16
    share = F.linear(F.linear(x, A) * SCALING, B)
    assert torch.equal(found, (y + share).bfloat16())
    grads = torch.autograd.grad(found.sum(), (x, A, B))
    assert max(map(relative_error, grads, torch.autograd.grad(share.sum(), (x, A, B)))) < 1e-5


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_rounds_nothing_within(backward_inside):
    arguments = tensors(torch.float32)

    def call(*arguments):
        with torch.autocast("cpu", torch.bfloat16):
            out = fast(*arguments)
        return out

    expected = step(fast, *arguments)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        found = step(call, *arguments)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---- dropout -------------------------------------------------------------------------------------


@pytest.fixture
def masks(monkeypatch):
    """The masks that are drawn, as factors."""
    drawn = []
    own = torch.native_dropout

    def native_dropout(x, p, train):
        out, mask = own(x, p, train)
        drawn.append(mask.double() / (1 - p))
        return out, mask

    monkeypatch.setattr(torch, "native_dropout", native_dropout)
    return drawn


@bases
@dtypes
def test_dropout_masks_the_input_of_A_alone(dtype, fused, masks):
    arguments = tensors(dtype)
    found = step(fast, *arguments, fused=fused, p=0.4)
    (mask,) = masks
    assert 0.4 < (mask > 0).double().mean() < 0.8
    exact = step(plain, *in_double(arguments), mask=mask)
    assert_as_exact(found, step(plain, *arguments, mask=mask.to(dtype)), exact, dtype)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_drops_the_same(use_reentrant, masks):
    arguments = tensors(torch.float32)

    def call(*arguments):
        return fast(*arguments, p=0.5)

    found = []
    for run in (call, lambda *a: checkpoint(call, *a, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        found.append(step(run, *arguments))
    first, second, recomputed = masks
    assert torch.equal(first, second)
    assert torch.equal(second, recomputed)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# ---- torch.compile -------------------------------------------------------------------------------


@bases
@pytest.mark.parametrize("autocast", [False, True])
def test_it_compiles_without_a_break(autocast, fused):
    arguments = tensors(torch.bfloat16)

    def call(*arguments):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return fast(*arguments, fused=fused)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = step(compiled, *arguments)
    exact = step(plain, *in_double(arguments))
    assert_as_exact(found, step(plain, *arguments), exact, torch.bfloat16)


def test_compiled_dropout_masks_forward_and_backward_alike():
    """With ones everywhere, the rows of y count what was not dropped, and dx is zero elsewhere."""
    x = torch.ones(T, K)
    A = torch.ones(1, K)
    B = torch.ones(N, 1)
    call = torch.compile(lambda *a: fast(*a, p=0.5), backend="aot_eager", fullgraph=True)
    found = step(call, x, A, B, torch.zeros(N, K), None)
    dropped = found["dx"] == 0
    assert 0.3 < dropped.double().mean() < 0.7
    kept = (~dropped).sum(1) * 2 * SCALING
    assert relative_error(found["y"], kept[:, None].expand(T, N)) < 1e-5


# ---- what is kept, and what is launched ----------------------------------------------------------


def kept_bytes(call, known):
    """{address: bytes} of what forward keeps for backward, without the tensors in `known`."""
    known = {t.untyped_storage().data_ptr() for t in known}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # `out` lives until here, so that no storage reuses a freed address
        out = call()
    assert out.requires_grad
    return kept


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_layers_with_one_input_keep_it_once(p):
    """Each layer keeps xa, and A and B in bf16; with dropout its mask too."""
    x, A, B, weight, _ = tensors(torch.bfloat16)
    layers = [[t.detach().clone().requires_grad_() for t in (A, B)] for _ in range(3)]
    rows = x * 1

    def call():
        return sum(fast(rows, *pair, weight, None, p=p) for pair in layers)

    kept = kept_bytes(call, [weight, *(t for pair in layers for t in pair)])
    assert kept.pop(rows.untyped_storage().data_ptr()) == T * K * 2
    each = (T * R + R * K + N * R) * 2 + (T * K if p else 0)
    assert sum(kept.values()) == 3 * each


def test_a_frozen_A_keeps_no_input():
    x, A, B, weight, _ = tensors(torch.bfloat16)
    rows = x * 1
    kept = kept_bytes(lambda: fast(rows, A.detach(), B, weight, None), [weight, A, B])
    assert sum(kept.values()) == (T * R + R * K + N * R) * 2


def launches(run):
    """Names of the operations in eager PyTorch that launch kernels, in order."""
    views = {"t", "transpose", "view", "reshape", "detach", "as_strided", "expand", "empty"}
    views |= {"_unsafe_view", "new_empty", "_reshape_alias", "alias"}

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name not in views:
                names.append(name)
            return func(*args, **(kwargs or {}))

    names = []
    with Recorder():
        run()
    return names


def test_forward_and_backward_launch_five_kernels_each():
    arguments = tensors(torch.bfloat16)
    outs = []
    forward = launches(lambda: outs.append(fast(*arguments)))
    assert forward == ["_to_copy", "_to_copy", "addmm_", "addmm", "addmm_"]
    direction = torch.ones_like(outs[0])
    backward = launches(lambda: torch.autograd.grad(outs[0], arguments[:3], direction))
    # on a CPU there are two casts more, of dA and dB, which CUDA computes in fp32
    assert backward == ["addmm_", "mm", "addmm_", "mm", "_to_copy", "mm", "_to_copy"]


def test_a_step_calls_pytorch_no_more_than_it_must():
    """With few tokens the device waits for the host, which takes microseconds for each call."""
    calls = []

    class Recorder(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            # attributes are not counted
            if func.__name__ != "__get__":
                calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    arguments = tensors(torch.bfloat16, (2, 5))
    with Recorder():
        out = fast(*arguments)
    base = ["new_empty", "view", "addmm"]
    assert calls == ["reshape", "type", "type", "new_empty", "addmm_", *base, "addmm_"]
    direction = torch.ones_like(out)
    calls.clear()
    with torch.no_grad(), Recorder():
        out.grad_fn.apply(direction)
    dx = ["mm", "addmm_", "view"]
    # the two casts are those of a CPU
    dA_dB = ["reshape", "mm", "type", "mm", "type"]
    assert calls == ["reshape", "new_empty", "addmm_", *dx, *dA_dB]
