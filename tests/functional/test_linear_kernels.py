"""`functional.updated_linear` by `linear_kernels`, with the operations' twins, on a CPU.

On a GPU `has_kernels` chooses this way. Here it is patched to say so; then `ops_for` picks the
twins. The formula is y = W x + bias + s * (B (A x)), or the same with a given W x + bias.
"""

from functools import partial
from itertools import combinations
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from helpers import assert_share_of_order_one, relative_error
from peft_moe_lora.functional import FrozenLinear, LinearUpdate, linear_kernels, updated_linear
from peft_moe_lora.ops import reference

# all different, so that no transpose can hide; rows of rank 3 are stored in 8 columns
T, K, N, R, STORED = 23, 20, 28, 3, 8
SCALING = 1.7

# what is left of a sum where the twin happens to round to the exact value
ATOL = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
dtypes = pytest.mark.parametrize("dtype", ATOL, ids=str)
# what is given: a layer with and without a bias, or its output
bases = pytest.mark.parametrize("base", ["layer", "layer without bias", "output"])
SUBSETS = ["".join(names) for n in (1, 2, 3) for names in combinations("xAB", n)]


class Tensors(NamedTuple):
    """x [..., K], A [R, K], B [N, R]; W [N, K], bias [N] of a layer; y [..., N], its output.

    y does not depend on x here: it is a leaf, as the output of a layer that autograd has computed.
    """

    x: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    y: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor

    def to(self, dtype):
        """All in one dtype, without history."""
        return Tensors(*(t.detach().to(dtype) for t in self))


def tensors(dtype=torch.float32, shape=(T,), factors=None):
    """A and B at least in fp32, or in `factors`; all else in `dtype`."""
    generator = torch.Generator().manual_seed(0)

    def random(*size, std=1.0):
        return torch.randn(size, generator=generator, dtype=torch.float64) * std

    factors = factors or torch.promote_types(dtype, torch.float32)
    x = random(*shape, K).to(dtype)
    A = random(R, K, std=K**-0.5).to(factors)
    B = random(N, R, std=R**-0.5).to(factors)
    y = random(*shape, N).to(dtype)
    return Tensors(x, A, B, y, random(N, K, std=K**-0.5).to(dtype), random(N).to(dtype))


def fast(t, base, p=0.0):
    bases = {
        "layer": FrozenLinear(t.weight, t.bias),
        "layer without bias": FrozenLinear(t.weight, None),
        "output": t.y,
    }
    return updated_linear(t.x, bases[base], LinearUpdate(t.A, t.B, SCALING, p), t.weight.dtype)


def without_update(t, base):
    if base == "output":
        return t.y
    return F.linear(t.x, t.weight, t.bias if base == "layer" else None)


def plain(t, base):
    """The formula, one operation after the other, all in the dtype of the weight."""
    dtype = t.weight.dtype
    xa = F.linear(t.x, t.A.to(dtype)) * SCALING
    return without_update(t, base) + F.linear(xa, t.B.to(dtype))


def step(call, t, base, needed="xAB", direction=None):
    """The output and the gradients of what is needed, of x, A, B and y, by name."""
    leaves = {name: getattr(t, name).detach().clone() for name in "xABy"}
    for name in needed:
        leaves[name].requires_grad_()
    out = call(t._replace(**leaves), base)
    if direction is None:
        generator = torch.Generator().manual_seed(3)
        direction = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(direction.to(out.dtype))
    found = {"out": out.detach()}
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in needed), f"the gradient of {name}"
        if name in needed:
            found[f"d{name}"] = leaf.grad
    return found


def assert_as_exact(found, twin, exact, dtype):
    assert found.keys() == exact.keys()
    for name, expected in exact.items():
        error = relative_error(found[name], expected)
        allowed = 2 * relative_error(twin[name], expected) + ATOL[dtype]
        assert error <= allowed, f"{name}: {error:.2e}, and {allowed:.2e} are allowed"


def assert_formula(t, base, dtype, **options):
    """Hold a step against the formula in fp64; returns what it found."""
    found = step(fast, t, base, **options)
    exact = step(plain, t.to(torch.float64), base, **options)
    assert_as_exact(found, step(plain, t, base, **options), exact, dtype)
    return found


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture
def calls(monkeypatch):
    """The names of operations that were called, in order; each is checked for its rows."""
    names = []

    def recorded(name):
        own = getattr(reference, name)

        def operation(rows, *others, **options):
            both = (rows, others[0]) if name == "expert_outer" else (rows,)
            for side in both:
                assert side.stride(1) == 1, "the elements of a row lie next to each other"
            names.append(name)
            return own(rows, *others, **options)

        return operation

    for name in ("add_low_rank", "expert_shrink", "expert_outer", "one_expert"):
        monkeypatch.setattr(reference, name, recorded(name))
    return names


@pytest.fixture
def by_kernels(monkeypatch, calls, poisoned_memory):
    """`updated_linear` computes by `linear_kernels`; a test in which it does not fails."""
    monkeypatch.setattr("peft_moe_lora.functional.linear.has_kernels", lambda *arguments: True)
    yield
    assert "add_low_rank" in calls, "no operation was called"


# ---- output and gradients ------------------------------------------------------------------------


@bases
@dtypes
@pytest.mark.parametrize("shape", [(T,), (2, 5), (2, 3, 4), (1,), ()], ids=str)
@pytest.mark.usefixtures("by_kernels")
def test_it_is_as_exact_as_plain_pytorch(base, dtype, shape):
    t = tensors(dtype, shape)
    exact = t.to(torch.float64)
    assert_share_of_order_one(plain(exact, base), without_update(exact, base), low=0.2)
    found = assert_formula(t, base, dtype)
    assert found["out"].shape == (*shape, N)
    assert found["out"].dtype == found["dx"].dtype == dtype
    assert found["dA"].dtype == found["dB"].dtype == t.A.dtype


@bases
@pytest.mark.parametrize("needed", SUBSETS)
@pytest.mark.usefixtures("by_kernels")
def test_only_gradients_that_are_needed_are_computed(base, needed, calls):
    t = tensors(shape=(2, 5))
    assert_formula(t, base, torch.float32, needed=needed)
    forward, *backward = calls
    assert forward == "add_low_rank"
    expected = ["one_expert"]
    if "x" in needed:
        expected.append("add_low_rank")
    elif "A" in needed:
        expected.append("expert_shrink")
    assert backward == expected + ["expert_outer"] * sum(name in needed for name in "AB")


@pytest.mark.parametrize("needed", ["", *SUBSETS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("by_kernels")
def test_a_given_output_gets_the_gradient_itself(needed, dtype, calls):
    """It is that of the result, to the bit."""
    t = tensors(dtype, shape=(2, 5))
    direction = torch.randn(2, 5, N, generator=torch.Generator().manual_seed(9)).to(dtype)
    found = assert_formula(t, "output", dtype, needed=needed + "y", direction=direction)
    assert torch.equal(found["dy"], direction)
    if not needed:
        assert calls == ["add_low_rank"], "backward computes nothing"


@bases
@pytest.mark.usefixtures("by_kernels")
def test_gradients_of_A_and_B_are_in_their_own_dtype(base):
    """Of bf16 they are rounded once, from fp32: half a unit in the last of 8 bits."""
    t = tensors(factors=torch.bfloat16)
    found = step(fast, t, base)
    exact = step(plain, t.to(torch.float64), base)
    assert found["dA"].dtype == found["dB"].dtype == torch.bfloat16
    assert found["out"].dtype == found["dx"].dtype == torch.float32
    for name, expected in exact.items():
        allowed = 2**-8 if name in ("dA", "dB") else 1e-6
        assert relative_error(found[name], expected) <= allowed, name


@pytest.mark.usefixtures("by_kernels")
def test_gradients_in_fp32_are_not_rounded_to_the_dtype_of_the_activations():
    found = step(fast, tensors(torch.bfloat16), "layer")
    for name in ("dA", "dB"):
        assert not torch.equal(found[name], found[name].bfloat16().float()), name


@bases
@pytest.mark.parametrize("swap", ["x", "y", "dy"])
@pytest.mark.usefixtures("by_kernels")
def test_activations_and_gradients_may_be_transposed(base, swap):
    """The columns of a matrix before its rows, in memory."""
    t = tensors()
    direction = torch.randn(T, N, generator=torch.Generator().manual_seed(4))
    if swap == "dy":
        turned = direction.mT.contiguous().mT
        assert not turned.is_contiguous()
        assert_formula(t, base, torch.float32, direction=turned)
    else:
        # `step` clones with these strides
        t = t._replace(**{swap: getattr(t, swap).mT.contiguous().mT})
        assert not getattr(t, swap).clone().is_contiguous()
        assert_formula(t, base, torch.float32, direction=direction)


@bases
@pytest.mark.parametrize("shape", [(T,), (2, 5), ()], ids=str)
@pytest.mark.usefixtures("by_kernels")
def test_a_gradient_may_have_strides_of_zero(base, shape):
    """As of a sum, or of a mean over tokens."""
    t = tensors(shape=shape)
    for direction in (torch.ones(()), torch.linspace(-1, 1, N)):
        expanded = direction.expand(*shape, N)
        assert 0 in expanded.stride() or not shape
        assert_formula(t, base, torch.float32, direction=expanded)


# ---- the output as a tensor ----------------------------------------------------------------------


@bases
@pytest.mark.parametrize("shape", [(T,), (2, 5), ()], ids=str)
@pytest.mark.usefixtures("by_kernels")
def test_a_model_may_change_the_output_in_place(base, shape):
    """Autograd would refuse it, were the output a view."""
    t = tensors(shape=shape)
    expected = step(lambda *a: fast(*a) * 2, t, base)
    assert_same_bits(step(lambda *a: fast(*a).mul_(2), t, base), expected)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            out = fast(t._replace(x=t.x.clone().requires_grad_()), base)
        assert not out._is_view()
        assert out.is_contiguous()


@pytest.mark.parametrize("needed", ["", *SUBSETS])
@pytest.mark.usefixtures("by_kernels")
def test_the_given_output_is_not_changed(needed):
    """Selective checkpointing may keep it, and would add the update again."""
    t = tensors(shape=(2, 5))
    y = t.y.clone()
    leaves = {name: getattr(t, name).requires_grad_(name in needed) for name in "xAB"}
    out = fast(t._replace(**leaves), "output")
    assert torch.equal(t.y, y)
    assert t.y._version == 0
    assert out.untyped_storage().data_ptr() != t.y.untyped_storage().data_ptr()
    out.detach().zero_()
    assert torch.equal(t.y, y)


@bases
@dtypes
@pytest.mark.usefixtures("by_kernels")
def test_without_gradients_it_gives_the_same_bits(base, dtype):
    t = tensors(dtype, (2, 5))
    for leaf in t[:3]:
        leaf.requires_grad_()
    expected = fast(t, base)
    assert expected.grad_fn is not None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = fast(t, base)
        assert torch.equal(found, expected)
    # nothing requires a gradient, as with a frozen adapter
    frozen = fast(t.to(dtype)._replace(A=t.A.detach(), B=t.B.detach()), base)
    assert torch.equal(frozen, expected)
    assert not frozen.requires_grad


# ---- autograd ------------------------------------------------------------------------------------


@bases
@pytest.mark.parametrize("needed", "xAB")
@pytest.mark.usefixtures("by_kernels")
def test_second_derivatives_are_refused(base, needed):
    t = tensors()
    leaf = getattr(t, needed).requires_grad_()
    message = "create_graph=True: .* no second derivatives; .*fast_linear=False"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(fast(t, base).sum(), leaf, create_graph=True)


@bases
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.usefixtures("by_kernels")
def test_under_autocast_the_products_are_in_the_dtype_that_is_asked_for(base, backward_inside):
    """x in fp32 and the layer in bf16, as autocast gives them: dx is in fp32 again."""
    wide = tensors()
    t = wide._replace(y=wide.y.bfloat16(), weight=wide.weight.bfloat16(), bias=wide.bias.bfloat16())

    def call(t, base):
        with torch.autocast("cpu", torch.bfloat16):
            return fast(t, base)

    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        found = step(call, t, base)
    assert found["out"].dtype == torch.bfloat16
    assert {found[name].dtype for name in ("dx", "dA", "dB")} == {torch.float32}
    for name, expected in step(plain, wide.to(torch.float64), base).items():
        assert relative_error(found[name], expected) < 2e-2, name


@bases
@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.usefixtures("by_kernels")
def test_autocast_rounds_nothing_within(base, backward_inside):
    def call(t, base):
        with torch.autocast("cpu", torch.bfloat16):
            return fast(t, base)

    t = tensors()
    expected = step(fast, t, base)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_inside):
        assert_same_bits(step(call, t, base), expected)


@bases
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.usefixtures("by_kernels")
def test_a_recomputed_forward_gives_the_same_bits(base, use_reentrant, calls):
    def recomputed(t, base):
        return checkpoint(lambda *a: fast(Tensors(*a), base), *t, use_reentrant=use_reentrant)

    t = tensors(torch.bfloat16, (2, 5))
    needed = "xABy" if base == "output" else "xAB"
    expected = step(fast, t, base, needed)
    once = len(calls)
    assert_same_bits(step(recomputed, t, base, needed), expected)
    # and it was computed twice
    assert len(calls) == 2 * once + 1


@bases
@pytest.mark.usefixtures("by_kernels")
def test_compiled_autograd_traces_the_backward_of_an_eager_forward(base):
    t = tensors()
    expected = step(fast, t, base)
    compiler = partial(torch.compile, backend="eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        found = step(fast, t, base)
    for name in expected:
        assert relative_error(found[name], expected[name]) < 1e-6, name


def kept_bytes(call, known):
    """Bytes that forward keeps for backward, without the storages of the tensors in `known`."""
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
    return sum(kept.values())


@bases
@pytest.mark.usefixtures("by_kernels")
def test_xa_is_all_that_is_kept_beside_what_was_given(base):
    """A and B are kept themselves, and no copies in bf16; without B's gradient xa is not kept."""
    t = tensors(torch.bfloat16)
    for leaf in t[:3]:
        leaf.requires_grad_()
    assert kept_bytes(lambda: fast(t, base), t) == T * STORED * 2
    assert kept_bytes(lambda: fast(t._replace(B=t.B.detach()), base), t) == 0
    frozen_A = t._replace(A=t.A.detach(), x=t.x.detach())
    assert kept_bytes(lambda: fast(frozen_A, base), [t.A, t.B, t.weight]) == T * STORED * 2


# ---- where there are kernels ---------------------------------------------------------------------


class OnGpu(torch.Tensor):
    """The shape, dtype and device of a tensor on a GPU; it has no data."""

    @staticmethod
    def __new__(cls, *shape, dtype=torch.bfloat16, index=0):
        device = torch.device("cuda", index)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} would run on the GPU")


class OtherOnGpu(OnGpu):
    """A subclass of which nothing is known."""


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def asked(make=OnGpu, rank=R, dropout_p=0.0, dtype=torch.bfloat16, **changed):
    """What `has_kernels` says of these tensors; y is given if it is among `changed`."""
    given = {
        "x": make(2, 5, K),
        "lora_A": make(rank, K, dtype=torch.float32),
        "lora_B": make(N, rank, dtype=torch.float32),
        "y": None,
        **changed,
    }
    return linear_kernels.has_kernels(**given, dropout_p=dropout_p, dtype=dtype)


@pytest.fixture
def as_on_gpu(monkeypatch):
    """`OnGpu` counts as a plain tensor, on a GPU that runs the kernels."""
    monkeypatch.setattr(linear_kernels, "_PLAIN", (OnGpu,))
    devices = []
    monkeypatch.setattr(
        linear_kernels, "select_backend", lambda *asked: devices.append(asked) or "triton"
    )
    return devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [1, R, linear_kernels.MAX_RANK])
def test_there_are_kernels_on_a_gpu_in_16_bits(as_on_gpu, dtype, rank):
    assert asked(dtype=dtype, rank=rank)
    assert asked(dtype=dtype, rank=rank, y=OnGpu(2, 5, N, dtype=dtype))
    # x, A and B are cast
    assert asked(dtype=dtype, rank=rank, x=OnGpu(K, dtype=torch.float32))
    assert asked(dtype=dtype, rank=rank, lora_A=OnGpu(rank, K, dtype=dtype))
    assert set(as_on_gpu) == {("auto", torch.device("cuda", 0))}


def test_there_are_none_on_a_cpu(monkeypatch):
    monkeypatch.setattr(linear_kernels, "select_backend", lambda *asked: "triton")

    def on_cpu(*shape, dtype=torch.bfloat16):
        return torch.zeros(shape, dtype=dtype)

    for y in (None, on_cpu(2, 5, N)):
        assert not asked(on_cpu, y=y)


@pytest.mark.parametrize(
    "changed",
    [
        {"dropout_p": 0.1},
        {"dtype": torch.float32},
        {"dtype": torch.float64},
        {"rank": 0},
        {"rank": linear_kernels.MAX_RANK + 1},
        {"y": OnGpu(2, 5, N, dtype=torch.float32)},
        {"y": OnGpu(2, 5, N, dtype=torch.float16)},
        {"y": OnGpu(2, 5, N, index=1)},
        {"y": torch.zeros(2, 5, N, dtype=torch.bfloat16)},
        {"lora_A": OnGpu(R, K, index=1)},
        {"lora_B": OnGpu(N, R, index=1)},
        {"lora_B": torch.zeros(N, R)},
        {"x": OnGpu(0, K)},
        {"x": OnGpu(2, 0, K), "y": OnGpu(2, 0, N)},
        {"lora_B": OnGpu(0, R)},
        {"x": OtherOnGpu(2, 5, K)},
        {"lora_A": OtherOnGpu(R, K)},
        {"lora_B": OtherOnGpu(N, R)},
        {"y": OtherOnGpu(2, 5, N)},
    ],
    ids=lambda changed: " ".join(changed),
)
@pytest.mark.usefixtures("as_on_gpu")
def test_there_are_none_for(changed):
    """Dropout, wider products, ranks past a tile, two devices, no elements, and subclasses."""
    assert asked()
    assert not asked(**changed)


@pytest.mark.usefixtures("as_on_gpu")
def test_there_are_none_where_something_watches_pytorchs_operations():
    with Watching():
        assert not asked()
    assert asked()


@pytest.mark.usefixtures("as_on_gpu")
def test_there_are_none_within_torch_func():
    found = []

    def function(x):
        found.append(asked())
        return x.sum()

    for transform in (torch.func.grad(function), torch.func.vmap(function)):
        transform(torch.ones(2, 3))
    assert found == [False, False]


@pytest.mark.usefixtures("as_on_gpu")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_there_are_none_while_torch_jit_traces():
    found = []

    def function(x):
        found.append(asked())
        return x * 2

    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert found == [False]


@pytest.mark.usefixtures("as_on_gpu")
def test_there_are_none_while_torch_compile_traces(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not asked()


@pytest.mark.usefixtures("as_on_gpu")
def test_there_are_none_where_the_backend_is_pytorch(monkeypatch):
    monkeypatch.setattr(linear_kernels, "select_backend", lambda *asked: "torch")
    assert not asked()


def test_a_cpu_is_never_computed_by_kernels(calls):
    """Without the patch of the tests above no operation is called."""
    for base in ("layer", "output"):
        step(fast, tensors(torch.bfloat16), base)
    assert calls == []
