"""Bytes of optimizers' states are those of the optimizers; what one cannot do is refused."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import TrainingArguments

import will_it_fit
from docs.blocks import ROOT
from helpers.optimizers import in_8bit, in_fp32
from peft_moe_lora import plan
from peft_moe_lora.planning.gpus import GIB, gpu_of
from peft_moe_lora.planning.optimizers import (
    DEFAULT_OPTIM,
    MIN_8BIT_SIZE,
    OPTIMIZERS,
    TABLES,
    optimizer_of,
)
from planning.test_step import config
from test_docs import tables

PAGE = ROOT / "docs" / "plan.md"
# around the size from which moments are in 8 bits, and where the last block is short
SIZES = (5, MIN_8BIT_SIZE - 1, MIN_8BIT_SIZE, MIN_8BIT_SIZE + 1, 40 * 256 + 255)


def stepped(make, sizes):
    """An optimizer after one step on parameters of such sizes."""
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = make(parameters)
    optimizer.step()
    return optimizer


def state_of(optimizer):
    """Bytes of an optimizer's state; a counter of steps is none."""
    found = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [value for value in found if torch.is_tensor(value) and value.ndim]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("sizes", [SIZES, SIZES[:2]], ids=["small and large", "small"])
@pytest.mark.parametrize(
    ("name", "make"), [("adamw_torch_fused", in_fp32), ("adamw_8bit", in_8bit)]
)
def test_bytes_are_those_of_the_optimizer(name, make, sizes):
    assert OPTIMIZERS[name].state_bytes(sizes) == state_of(stepped(make, sizes))


def test_a_plan_counts_the_state_in_8_bits_and_less_time_at_its_bytes():
    # A and B of experts: E r H and 2 r E I, each of at least 4096 elements
    plain, found = (plan(config(), r=16, target_modules=["experts"], optim=o) for o in OPTIMIZERS)
    elements = found.step.trainable
    assert plain.step.optimizer == 8 * elements
    assert found.step.optimizer == 2 * elements + 8 * elements // 256 + TABLES
    assert plain.step.peak - found.step.peak == plain.step.optimizer - found.step.optimizer
    # the time of a small step is that of its launches: one for each tensor
    tensors = 2 * 4
    assert found.step.seconds["H200"] - plain.step.seconds["H200"] == pytest.approx(
        9e-6 * (tensors - 1)
    )
    assert any("needs bitsandbytes" in line for line in found.assumptions())
    assert not any("bitsandbytes" in line for line in plain.assumptions())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_names_are_those_of_training_arguments(name, tmp_path):
    assert TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True).optim == name
    assert f'    optim="{name}",' in plan(config(), r=4, optim=name).paste()


def test_gpus_that_would_need_fsdp2_are_not_looked_for(monkeypatch):
    monkeypatch.setattr("peft_moe_lora.planning.plan.how_many", lambda *given: given[-1])
    for name, asked in ((DEFAULT_OPTIM, None), ("adamw_8bit", 1)):
        assert set(plan(config(), r=4, optim=name).gpus.values()) == {asked}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optim": "lion_8bit"}, r"optim must be one of \('adamw_torch_fused', .* got 'lion_8bit'"),
        ({"optim": "adamw_8bit", "gpus": 2}, "optim='adamw_8bit' needs gpus=1, got gpus=2"),
    ],
)
def test_what_is_not_known_or_does_not_run_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        plan(config(), **changes)
    assert optimizer_of("adamw_8bit", 1) is optimizer_of("adamw_8bit", None)


@pytest.fixture
def first_of_two():
    """A mesh of two processes, of which this one is the first and the other is made up."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_bitsandbytes_does_not_take_the_tensors_of_fsdp2(first_of_two):
    """Where this fails, `OPTIMIZERS` may say `sharded=True`."""
    parameter = torch.nn.Parameter(distribute_tensor(torch.ones(128, 64), first_of_two))
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match="DTensor"):
        in_8bit([parameter]).step()


# ---- the numbers of docs/plan.md -----------------------------------------------------------------


def qwen(r, optim):
    return will_it_fit.planned(will_it_fit.Case("Qwen3-30B-A3B", "nf4", r, optim))


@pytest.mark.long
@pytest.mark.parametrize("row", range(3))
def test_the_table_of_optimizers_is_the_planners(row):
    (rows,) = tables(PAGE)["The optimizer"]
    cells = rows[row]
    plans = {f"`{name}`": qwen(int(cells["r"]), name) for name in OPTIMIZERS}
    for name, found in plans.items():
        # releases of transformers and of this package differ by a few buffers
        written = float(cells[name].removesuffix(" GiB"))
        assert written == pytest.approx(found.peak_gib, abs=0.2)
    fits = [name for name, found in plans.items() if found.gpus["RTX 4090"] == 1]
    said = {2: "both", 0: "neither: tensors may take 21.8 GiB"}
    assert cells["which fits into 24 GB"] == said.get(len(fits), "".join(fits))


@pytest.mark.long
def test_a_and_b_in_bf16_take_half_with_their_gradients():
    step = qwen(16, "adamw_8bit").step
    saved = (step.pairs + step.gradients) / 2
    room = gpu_of("RTX 4090").usable
    assert step.peak > room > step.peak - saved
    said = f"{(step.peak - saved) / GIB:.1f} GiB instead of {step.peak / GIB:.1f} GiB"
    assert said in PAGE.read_text("utf-8")
