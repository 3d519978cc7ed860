"""Linear layers in an adapter: PEFT's layers in all but the dtype of their products."""

import copy
import io

import pytest
import torch
from peft import get_peft_model
from peft.tuners import lora
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from helpers import (
    FP32,
    R,
    assert_close,
    fill_adapter,
    moe_lora,
    relative_error,
    tiny_model,
    token_ids,
)
from layers.linear_layers import (
    B,
    H,
    N,
    Projections,
    T,
    adapted,
    assert_steps_agree,
    batch,
    layers_of,
    slow,
    step,
)
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.layers.fast_linear import FastForward

# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_step_is_pefts(bias, by_peft):
    model = adapted(Projections(bias))
    found = step(model, batch())
    assert not by_peft, "PEFT's forward ran"
    expected = step(slow(model), batch())
    assert len(by_peft) == 4
    with torch.no_grad(), model.disable_adapter():
        without = model(batch())
    assert relative_error(found["y"], without) > 0.3, "the adapter's share"
    assert_steps_agree(found, expected, FP32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_as_exact_as_pefts_layer_in_that_dtype(dtype, autocast, by_peft):
    """A and B as PEFT computes them if it is told to keep them in the dtype of the model.

    Under autocast the model is in fp32, and PEFT multiplies in the dtype of autocast.
    """
    model = adapted(dtype=torch.float32 if autocast else dtype)
    twin = slow(model)
    if not autocast:
        twin = twin.to(dtype)
    exact = step(slow(model).double(), batch(dtype).double())
    by_peft.clear()
    x = batch(torch.float32 if autocast else dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        found = step(model, x)
        assert not by_peft, "PEFT's forward ran"
        expected = step(twin, x)
    assert found["y"].dtype == expected["y"].dtype == dtype
    for name, tensor in exact.items():
        error = relative_error(found[name], tensor)
        allowed = 2 * relative_error(expected[name], tensor) + 1e-3
        assert error <= allowed, f"{name}: {error:.2e}, and {allowed:.2e} are allowed"
    assert all(found[n].dtype == torch.float32 for n in found if "lora" in n)


def test_a_bf16_model_under_autocast_and_without_is_the_same():
    model = adapted(dtype=torch.bfloat16)
    found = step(model, batch(torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        under = step(model, batch(torch.bfloat16))
    assert all(torch.equal(found[name], under[name]) for name in found)


def test_autocast_leaves_fp64_alone():
    model = adapted().double()
    expected = step(model, batch(torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model, batch(torch.float64))
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_step_runs_on_the_meta_device(by_peft):
    model = adapted(dtype=torch.bfloat16).to("meta")
    found = step(model, batch(torch.bfloat16).to("meta"))
    assert not by_peft
    assert found["y"].shape == (B, T, H)


def test_several_active_adapters_add_up(by_peft):
    model = adapted()
    model.add_adapter("second", MoELoraConfig(r=2, lora_alpha=6, target_modules=["q", "o"]))
    fill_adapter(model, "second", seed=2)
    model.base_model.set_adapter(["default", "second"])
    found = step(model, batch())
    assert not by_peft
    assert {name.split(".")[-2] for name in found if "lora" in name} == {"default", "second"}
    assert_steps_agree(found, step(slow(model), batch()), FP32)


@pytest.mark.parametrize("changed", ["A", "B"])
def test_a_changed_parameter_counts_at_once(changed):
    """Optimizers write through `.data`, and some through raw addresses: no copy may be kept."""
    model = adapted()
    x = batch()
    before = model(x)
    for layer in layers_of(model):
        getattr(layer, f"lora_{changed}")["default"].weight.data.mul_(3)
    assert_close(model(x), slow(model)(x), FP32)
    assert relative_error(model(x), before) > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_training_takes_pefts_way(dtype, tolerance):
    """Losses of 20 steps on one batch, experts and attention adapted."""
    base = tiny_model().to(dtype)
    ids = token_ids()
    losses = {}
    for fast in (True, False):
        torch.manual_seed(0)
        targets = ["experts", "q_proj", "k_proj", "v_proj", "o_proj"]
        options = {"target_modules": targets, "fast_linear": fast}
        model = moe_lora(copy.deepcopy(base), randomize=False, **options).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=4e-3)
        losses[fast] = []
        for _ in range(20):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[fast].append(loss.item())
    assert losses[True][-1] < 0.8 * losses[True][0]
    assert losses[True] == pytest.approx(losses[False], rel=tolerance)


# ---- dropout and recomputation -------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_step_is_the_same(use_reentrant, by_peft):
    model = adapted(lora_dropout=0.4)
    base = model.base_model.model
    torch.manual_seed(0)
    kept = step(model, batch())
    base.forward = lambda x: checkpoint(Projections.forward, base, x, use_reentrant=use_reentrant)
    torch.manual_seed(0)
    recomputed = step(model, batch())
    assert not by_peft
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)
    assert relative_error(step(model.eval(), batch())["y"], kept["y"]) > 0.01


def test_dropout_is_off_in_evaluation():
    model = adapted(lora_dropout=0.4).eval()
    assert_close(model(batch()), slow(model)(batch()), FP32)
    model.train()
    assert relative_error(model(batch()), model(batch())) > 0.01
    for layer in layers_of(model):
        layer.lora_dropout["default"].p = 1
    with model.disable_adapter():
        without = model(batch())
    assert_close(step(model, batch())["y"], without, FP32)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("config", [{}, {"lora_dropout": 0.3}, {"bias": "all"}], ids=str)
def test_a_model_compiles_without_a_break(config, autocast, by_peft):
    model = adapted(Projections(bias=True), target_modules=["q", "o"], **config)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = step(compiled, batch())
        expected = step(model.base_model.model, batch())
    assert not by_peft
    if "lora_dropout" in config:
        # the compiled model draws other masks
        assert relative_error(found["y"], expected["y"]) < 1
        return
    found = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    assert_steps_agree(found, expected, 2e-2 if autocast else FP32)


def test_other_lengths_and_a_second_adapter_compile():
    model = adapted(target_modules=["q"])
    model.add_adapter("second", MoELoraConfig(r=2, target_modules=["q"]))
    fill_adapter(model, "second", seed=2)
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.q
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for length in (5, 7, 9, 12, 20):
        x = torch.randn(B, length, H)
        assert_close(compiled(x), layer(x), FP32)
    assert len(graphs) <= 2, "one for the first length, one for any length"


# ---- the layer as an object ----------------------------------------------------------------------


def test_fast_linear_false_gives_pefts_layers(by_peft):
    model = adapted(fast_linear=False)
    assert {type(layer) for layer in layers_of(model)} == {lora.Linear}
    model(batch())
    assert len(by_peft) == 4


@pytest.mark.parametrize("first", [False, True])
def test_each_adapter_has_the_forward_of_its_configuration(first, by_peft):
    model = adapted(fast_linear=first)
    second = MoELoraConfig(r=2, target_modules=["q", "k", "v", "o"], fast_linear=not first)
    model.add_adapter("second", second)
    for active, slow_calls in {
        ("default",): 0 if first else 4,
        ("second",): 4 if first else 0,
        ("default", "second"): 4,
    }.items():
        model.base_model.set_adapter(list(active))
        by_peft.clear()
        model(batch())
        assert len(by_peft) == slow_calls, active
    model.delete_adapter("second")
    assert all("second" not in layer.fast for layer in layers_of(model))
    model(batch())


def test_layers_look_like_pefts():
    fast, own = adapted(), adapted(fast_linear=False)
    assert repr(fast.base_model.model) == repr(own.base_model.model)
    assert list(fast.state_dict()) == list(own.state_dict())
    assert all(isinstance(layer, FastForward | lora.Linear) for layer in layers_of(fast))


def test_copies_and_pickles_are_fast(by_peft):
    model = adapted()
    expected = model(batch())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(batch()), expected)
    assert not by_peft


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("written_fast", [False, True])
def test_files_are_the_same_bit_for_bit(written_fast, tmp_path):
    model = adapted(fast_linear=written_fast)
    model.save_pretrained(tmp_path / "one")
    config = MoELoraConfig.from_pretrained(tmp_path / "one")
    assert config.fast_linear is written_fast
    config.fast_linear = not written_fast
    other = get_peft_model(Projections(), config)
    other.load_adapter(tmp_path / "one", "default")
    other.save_pretrained(tmp_path / "two")
    one, two = (
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")
    )
    assert one == two
    assert_close(other(batch()), model(batch()), FP32)


# ---- what is kept, and what is launched ----------------------------------------------------------

_VIEWS = {"t", "transpose", "view", "detach", "as_strided", "expand", "new_empty", "empty"}


class _Launches(TorchDispatchMode):
    """Names of the operations that launch kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in _VIEWS and "view" not in name and "alias" not in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def launched_and_kept(model, x):
    """Launches in forward, launches in backward, and bytes kept beside the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with _Launches() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x)
    direction = torch.ones_like(out)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    with _Launches() as backward:
        torch.autograd.grad(out, leaves, direction)
    return len(forward.names), len(backward.names), sum(kept.values())


def test_one_layer_launches_and_keeps_less_than_pefts():
    """q in bf16; on CUDA there are two casts less in backward, whose products write fp32."""
    model = adapted(dtype=torch.bfloat16)
    x = batch(torch.bfloat16)
    rows = B * T
    fast = launched_and_kept(model.base_model.model.q, x)
    peft = launched_and_kept(slow(model).base_model.model.q, x)
    assert fast == (5, 7, (rows * (H + R) + R * (H + N)) * 2)
    assert peft == (7, 10, rows * (H + R) * 4)


def test_a_model_may_change_the_output_in_place():
    """As llama4 does with its queries."""
    model = adapted()
    x = batch().requires_grad_()
    found = []
    for in_place in (False, True):
        layer = layers_of(model)[0]
        y = layer(x)
        y = y.mul_(2) if in_place else y * 2
        parameters = [p for p in layer.parameters() if p.requires_grad]
        found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])])
    for plain, changed in zip(*found, strict=True):
        assert torch.equal(plain, changed)
