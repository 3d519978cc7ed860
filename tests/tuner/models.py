"""A model with two layers of experts, and what experts with several adapters compute."""

from helpers import QWEN3_MOE, build_experts, in_double, oracle

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


def experts_layer(model, path=SECOND):
    return model.get_submodule(f"base_model.model.{path}")


def qwen_experts():
    return build_experts(*QWEN3_MOE)


def oracle_output(plain, rows, *deltas):
    """The oracle's output with the sum of several adapters' deltas."""
    total = {}
    for one in deltas:
        for projection, delta in one.items():
            total[projection] = total.get(projection, 0) + delta.detach().double()
    return oracle(in_double(plain), rows[0].double(), rows[1], rows[2].double(), total)
