"""What other libraries do to a model with an adapter: copy, pickle, offload, look at its names."""

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers import (
    FUSED_KINDS,
    QWEN3_MOE,
    SAME,
    E,
    Holder,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    build_experts,
    experts_adapter,
    experts_paths,
    fill_adapter,
    moe_lora,
    outputs,
    random_rows,
    tiny_families,
    tiny_model,
    wrap,
)
from peft_moe_lora import MoELoraConfig

every_family = pytest.mark.parametrize("family", tiny_families())


# ---- copies --------------------------------------------------------------------------------------


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@every_family
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, through_pickle, through_torch_save], ids=lambda f: f.__name__
)
def test_a_copy_gives_the_same_numbers_and_shares_nothing(family, copied):
    base = tiny_model(family)
    plain = outputs(base)
    model = moe_lora(base)
    expected = outputs(model)
    twin = copied(model)
    assert_share_of_order_one(outputs(twin), plain)
    assert torch.equal(outputs(twin), expected)
    fill_adapter(twin, seed=17)
    assert torch.equal(outputs(model), expected)
    assert not torch.equal(outputs(twin), expected)
    # the copy has its own implementation too
    twin.base_model.model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "grouped_mm"
    with twin.disable_adapter():
        assert_close(outputs(twin), plain, 1e-5)


def test_a_copied_model_trains_and_merges():
    model = copy.deepcopy(moe_lora(tiny_model()))
    outputs(model).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in adapter_parameters(model).values())
    expected = outputs(model)
    assert_close(outputs(model.merge_and_unload()), expected)


def test_a_whole_state_dict_loads_back():
    model, other = moe_lora(tiny_model()), moe_lora(tiny_model(seed=5), randomize=False)
    assert not torch.equal(outputs(other), outputs(model))
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(outputs(other), outputs(model))


# ---- accelerate ----------------------------------------------------------------------------------


@every_family
def test_cpu_offload_after_wrapping_gives_the_same_numbers(family):
    base = tiny_model(family)
    plain = outputs(base)
    model = moe_lora(base)
    expected = outputs(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    experts = model.get_submodule(
        f"base_model.model.{experts_paths(tiny_model(family))[0]}"
    ).get_base_layer()
    assert all(p.is_meta for p in experts.parameters()), (
        "nothing is offloaded: the test proves nothing"
    )
    assert_share_of_order_one(outputs(model), plain)
    assert_close(outputs(model), expected, SAME)
    with model.disable_adapter():
        assert_close(outputs(model), plain, SAME)
    assert_close(outputs(model), expected, SAME)


@every_family
def test_cpu_offload_before_wrapping_gives_the_same_numbers(family, tmp_path):
    base = tiny_model(family)
    plain = outputs(base)
    model = moe_lora(copy.deepcopy(base))
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in base.get_submodule(experts_paths(base)[0]).parameters())
    offloaded = moe_lora(base)
    assert not any(p.is_meta for p in adapter_parameters(offloaded).values())
    assert_share_of_order_one(outputs(offloaded), plain)
    assert_close(outputs(offloaded), expected, SAME)
    with offloaded.disable_adapter():
        assert_close(outputs(offloaded), plain, SAME)


def test_an_adapter_loads_into_an_offloaded_model(tmp_path):
    base = tiny_model()
    plain = outputs(base)
    model = moe_lora(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    cpu_offload(base, execution_device=torch.device("cpu"))
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert_share_of_order_one(outputs(loaded), plain)
    assert_close(outputs(loaded), outputs(model), SAME)


def test_an_offloaded_model_trains():
    base = tiny_model()
    right = moe_lora(copy.deepcopy(base))
    outputs(right).square().mean().backward()
    cpu_offload(base, execution_device=torch.device("cpu"))
    model = moe_lora(base)
    outputs(model).square().mean().backward()
    for name, parameter in adapter_parameters(model).items():
        expected = dict(right.named_parameters())[name].grad
        assert expected.abs().max() > 0
        assert_close(parameter.grad, expected, 1e-6, name)


def test_taking_the_hooks_off_leaves_a_working_model():
    model = moe_lora(tiny_model())
    expected = outputs(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    remove_hook_from_submodules(model)
    assert_close(outputs(model), expected, SAME)


def test_nothing_is_read_while_wrapping_under_init_empty_weights():
    with init_empty_weights():
        model = get_peft_model(tiny_model(), MoELoraConfig(r=R, target_modules=["experts"]))
    assert all(p.is_meta for p in adapter_parameters(model).values())


# ---- transformers --------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_changing_the_experts_implementation_keeps_the_adapter(family, implementation):
    base = tiny_model(family)
    plain = outputs(base)
    model = moe_lora(base)
    expected = outputs(model)
    assert_share_of_order_one(expected, plain)
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    assert torch.equal(outputs(model), expected)
    # and without the adapter the model runs what it was told to
    with model.disable_adapter():
        assert_close(outputs(model), plain, 1e-5)
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_implementation_set_before_wrapping_does_not_matter(implementation):
    base = tiny_model()
    expected = outputs(moe_lora(copy.deepcopy(base)))
    base.set_experts_implementation(implementation)
    assert torch.equal(outputs(moe_lora(base)), expected)


def test_the_models_config_stays_what_it_was():
    base = tiny_model()
    before, implementation = base.config.to_dict(), base.config._experts_implementation
    model = moe_lora(base)
    outputs(model)
    assert model.config is base.config
    assert base.config.to_dict() == before
    assert base.config._experts_implementation == implementation
    assert "moe_lora" not in base.config.to_json_string().replace("peft_moe_lora", "")
    # the experts module still sees its own config, for reading and writing
    experts = model.base_model.model.model.layers[0].mlp.experts.get_base_layer()
    assert experts.config.num_experts == E
    assert experts.config.to_dict() == before


def test_gradients_of_the_router_loss_still_flow():
    """Models read their routers' logits by hooks, which wrapping the experts leaves in place."""
    model = moe_lora(tiny_model())
    ids = torch.arange(3, 15)[None]
    out = model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
    assert len(out.router_logits) == 2
    assert out.aux_loss is not None
    out.loss.backward()
    assert all(p.grad.abs().max() > 0 for p in adapter_parameters(model).values())


# ---- memory --------------------------------------------------------------------------------------


class LargestNew(TorchDispatchMode):
    """Remembers the largest tensor that any operation made; views are not counted."""

    def __init__(self, *known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.elements, self.operation = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            # an expanded view has more elements than were allocated
            elements = min(
                tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size()
            )
            if (
                tensor.untyped_storage().data_ptr() not in self.known | inputs
                and elements > self.elements
            ):
                self.elements, self.operation = elements, func
        return out


@pytest.mark.parametrize("case", FUSED_KINDS, ids=lambda c: c[0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_a_weights_size_is_made(case, dtype):
    """With few rows every tensor that is made is smaller than one expert's weight.

    So no delta, no dW and no copy of the weights is made.
    """
    hidden, intermediate, T = 64, 48, 8
    model = wrap(build_experts(*case, hidden=hidden, intermediate=intermediate, dtype=dtype), r=2)
    x, index, weights = random_rows(T=T, hidden=hidden, dtype=dtype)
    x.requires_grad_()
    weights.requires_grad_()
    known = [*model.parameters(), x, weights]
    model(x, index, weights).float().square().sum().backward()
    largest = LargestNew(*known)
    with largest:
        model(x, index, weights).float().square().sum().backward()
    one_expert = hidden * intermediate
    assert max(p.numel() for p in adapter_parameters(model).values()) < one_expert
    assert 0 < largest.elements < one_expert, (
        f"{largest.operation} made {largest.elements} elements"
    )


def test_the_watch_for_large_tensors_sees_them():
    """PEFT's own route makes the delta of all experts, and the same watch must see it."""
    experts = build_experts(*QWEN3_MOE, hidden=64, intermediate=48)
    weight = experts.gate_up_proj
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"])
    model = get_peft_model(Holder(experts), config)
    rows = random_rows(T=8, hidden=64)
    largest = LargestNew(*model.parameters(), *rows)
    with largest:
        model(*rows)
    assert largest.elements >= weight.numel()


def kept_for_backward(model, rows):
    """Bytes that forward keeps for backward, parameters and inputs not counted."""
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *rows]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(*rows)
    # `out` lives until here, so that no storage reuses a freed address
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("case", FUSED_KINDS, ids=lambda c: c[0])
def test_recompute_keeps_less(case):
    T, intermediate = 256, 48
    kept = {}
    for recompute in (False, True):
        model = wrap(build_experts(*case, intermediate=intermediate), recompute=recompute)
        x, index, weights = random_rows(T=T)
        kept[recompute] = kept_for_backward(
            model, (x.requires_grad_(), index, weights.requires_grad_())
        )
    rows, width = T * 2, intermediate * (1 if case[0] == "nemotron_h" else 2)
    # it saves the pre-activation, in fp32
    assert kept[False] - kept[True] >= rows * width * 4
    # besides: the activation, two rank-r products and the routing, each once at most
    assert kept[False] <= rows * (width + intermediate + 2 * R + 16) * 4 + 4096


@pytest.mark.parametrize("case", FUSED_KINDS, ids=lambda c: c[0])
def test_a_gradient_for_a_frozen_weight_is_refused_not_forgotten(case):
    """No dW is ever computed, so unfreezing a base weight by hand raises."""
    model = wrap(build_experts(*case))
    weight = model.base_model.model.experts.get_base_layer().down_proj
    model(*random_rows()).sum().backward()
    assert weight.grad is None
    assert all(p.grad is not None for pair in experts_adapter(model).values() for p in pair)
    weight.requires_grad_()
    with pytest.raises(ValueError, match=r"frozen|requires_grad"):
        model(*random_rows())
    model.requires_grad_(False)
    model(*random_rows())


# ---- import --------------------------------------------------------------------------------------


IMPORT = """
import importlib, json, sys, time, types
import peft, transformers.integrations.moe, transformers.integrations.finegrained_fp8


def code_of(module):
    found = {}
    for name, value in list(vars(module).items()):
        if isinstance(value, (type, types.FunctionType)):
            found[name] = id(value)
        if isinstance(value, type) and value.__module__ == module.__name__:
            for method, body in list(vars(value).items()):
                if isinstance(body, (types.FunctionType, classmethod, staticmethod, property)):
                    found[f"{name}.{method}"] = id(body)
    return found


def all_code():
    names = [name for name in sys.modules if name.split(".")[0] in ("peft", "transformers")]
    return {name: code_of(sys.modules[name]) for name in names if sys.modules[name]}


before = all_code()
# an installed package is compiled once, at its first import
sys.pycache_prefix = sys.argv[1]
sys.dont_write_bytecode = False
print("ours", file=sys.stderr)
start = time.process_time()
import peft_moe_lora
seconds = time.process_time() - start
after = all_code()
replaced = []
for module, names in before.items():
    replaced += [f"{module}.{n}" for n, i in names.items() if after[module].get(n) != i]
first = peft.PeftType.MOE_LORA
importlib.reload(peft_moe_lora.registration)
importlib.reload(peft_moe_lora)
assert peft.PeftType.MOE_LORA is first
types = [str(t.value) for t in peft.PeftType]
print(json.dumps({"seconds": seconds, "replaced": replaced, "types": types}))
"""


def fresh_import(compiled):
    """What the script above found in a fresh interpreter, and what our import wrote to stderr.

    compiled: folder in which compiled modules of ours are kept from one import to the next.
    """
    command = [sys.executable, "-W", "default", "-c", IMPORT, str(compiled)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {**json.loads(run.stdout), "stderr": run.stderr.partition("ours\n")[2]}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def imported(compiled):
    return fresh_import(compiled)


def test_import_is_silent(imported):
    assert imported["stderr"] == ""


def test_import_is_fast(imported, compiled):
    """0.3 s of CPU time on top of peft and transformers; the best of three on a busy machine."""
    seconds = imported["seconds"]
    for _ in range(2):
        if seconds >= 0.3:
            seconds = min(seconds, fresh_import(compiled)["seconds"])
    assert seconds < 0.3, seconds


def test_import_patches_nothing(imported):
    """Registration adds entries; peft and transformers keep every function, class and method."""
    assert imported["replaced"] == []


def test_importing_again_registers_once(imported):
    assert imported["types"].count("MOE_LORA") == 1


def test_the_peft_type_behaves_like_the_others():
    assert PeftType("MOE_LORA") is PeftType.MOE_LORA
    assert PeftType["MOE_LORA"] is PeftType.MOE_LORA
    assert PeftType.MOE_LORA in list(PeftType)
    assert PeftType.MOE_LORA == "MOE_LORA"
    assert pickle.loads(pickle.dumps(PeftType.MOE_LORA)) is PeftType.MOE_LORA
    assert copy.deepcopy(PeftType.MOE_LORA) is PeftType.MOE_LORA
    assert json.dumps(PeftType.MOE_LORA) == '"MOE_LORA"'


@pytest.mark.filterwarnings("error")
def test_using_the_package_warns_about_nothing():
    """One forward, one backward and one merge of a bare module, with every warning an error."""
    model = wrap(build_experts(*QWEN3_MOE), lora_dropout=0.1)
    rows = random_rows()
    model(*rows).sum().backward()
    model.eval()
    assert_close(model.merge_and_unload()(*rows), model(*rows))
