"""Weights that accelerate offloads go back after each use, also after one that failed."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from helpers import (
    QWEN3_MOE,
    SAME,
    E,
    H,
    HandWrittenExperts,
    assert_close,
    build_experts,
    fill,
    modeling_module,
    random_rows,
    wrap,
)

CPU = torch.device("cpu")


class Act(nn.Module):
    """An activation that no kernel computes, so that it is called between the projections."""

    broken = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.broken:
            raise RuntimeError("the activation failed")
        return x.cos()


def on_the_interface():
    return build_experts(*QWEN3_MOE)


def off_the_interface():
    return fill(HandWrittenExperts())


def one_projection():
    return fill(modeling_module("jetmoe").JetMoeParallelExperts(E, H, H))


def adapted_and_offloaded(experts: nn.Module):
    """The experts with an adapter; their weights, A and B are all offloaded."""
    model = wrap(experts)
    cpu_offload(model, execution_device=CPU)
    layer = model.base_model.model.experts
    assert_everything_is_away(layer)
    return layer


def assert_everything_is_away(layer):
    here = [name for name, parameter in layer.named_parameters() if not parameter.is_meta]
    assert not here, f"still on the execution device: {here}"


# ---- a forward that fails while A and B are here -------------------------------------------------


@pytest.mark.parametrize("build", [on_the_interface, off_the_interface])
def test_an_activation_that_raises_leaves_nothing_on_the_device(build):
    experts = build()
    experts.act_fn = Act()
    layer = adapted_and_offloaded(experts)
    layer(*random_rows())
    assert_everything_is_away(layer)
    experts.act_fn.broken = True
    with pytest.raises(RuntimeError, match="the activation failed"):
        layer(*random_rows())
    assert_everything_is_away(layer)


def test_rows_that_do_not_fit_leave_nothing_on_the_device():
    layer = adapted_and_offloaded(on_the_interface())
    hidden_states, *routing = random_rows()
    with pytest.raises(ValueError, match="hidden_states"):
        layer(hidden_states[:, 1:], *routing)
    assert_everything_is_away(layer)


def test_sizes_that_do_not_fit_leave_nothing_on_the_device_of_one_projection():
    layer = adapted_and_offloaded(one_projection())
    rows, sizes = torch.randn(6, H), [1, 1, 1, 1, 2]
    assert layer(rows, sizes).shape == (6, H)
    assert_everything_is_away(layer)
    with pytest.raises(ValueError, match="expert sizes"):
        layer(rows, sizes[1:])
    assert_everything_is_away(layer)


class TornMap(dict):
    """Offloaded weights, the last of which cannot be read."""

    def __getitem__(self, name):
        if name == list(self)[-1]:
            raise OSError("the disk is gone")
        return super().__getitem__(name)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_what_was_brought_in_before_a_fetch_failed_goes_back(side):
    layer = adapted_and_offloaded(on_the_interface())
    hook = getattr(layer, side)["default"]._hf_hook
    whole = {name: hook.weights_map[name] for name in ("gate_up", "down")}
    hook.weights_map = TornMap(whole)
    with pytest.raises(OSError, match="the disk is gone"):
        layer(*random_rows())
    assert_everything_is_away(layer)
    hook.weights_map = whole
    assert layer(*random_rows()).isfinite().all()
    assert_everything_is_away(layer)


def test_a_forward_after_one_that_failed_gives_the_same_numbers():
    layer = adapted_and_offloaded(on_the_interface())
    rows = random_rows()
    expected = layer(*rows)
    with pytest.raises(ValueError, match="hidden_states"):
        layer(rows[0][:, 1:], *rows[1:])
    assert torch.equal(layer(*rows), expected)


@pytest.mark.parametrize("build", [on_the_interface, off_the_interface])
def test_a_compiled_layer_fetches_and_sends_back(build):
    experts = build()
    layer = adapted_and_offloaded(experts)
    rows = random_rows()
    expected = layer(*rows)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager")
    for _ in range(2):
        assert_close(compiled(*rows), expected, SAME)
        assert_everything_is_away(layer)
