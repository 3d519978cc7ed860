"""docs/one-step.md: sizes are right, and what it says is kept is kept."""

import re
from pathlib import Path

import pytest
import torch

from peft_moe_lora.functional import Projection, experts
from peft_moe_lora.ops import Activation

PAGE = (Path(__file__).parents[2] / "docs" / "one-step.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in re.findall(r"^\| .+ \|$", PAGE, re.MULTILINE)[2:]
]
BYTES = {"bf16": 2, "fp32": 4}
# of the layer that the page describes, and of a small one whose shapes all differ
SIZES = {"r": 16, **{name: int(n) for name, n in re.findall(r"\b(\w+) = (\d+)", PAGE)}}
SMALL = {"r": 16, "T": 10, "H": 24, "I": 40, "N": 80, "E": 4, "top_k": 3, "M": 30}
# tensors of one shape
ALIKE = {"xa": 2, "ha": 2}


def shape_of(text, sizes):
    dimensions = text.strip("[]").split(", ")
    return tuple(eval(dimension, {"__builtins__": {}}, sizes) for dimension in dimensions)


def test_the_page_names_the_sizes_of_its_layer():
    assert SIZES["M"] == SIZES["T"] * SIZES["top_k"]
    assert SIZES["N"] == 2 * SIZES["I"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_sizes_are_those_of_the_shapes(row):
    _, shape, dtype, mib, _ = row
    numbers = torch.Size(shape_of(shape, SIZES)).numel()
    assert int(mib) == numbers * BYTES[dtype] / 2**20


def test_a_layer_needs_what_the_page_says_for_the_optimizer():
    (mib,) = re.findall(r"(\d+) MiB a layer", PAGE)
    pairs = sum(int(row[3]) for row in ROWS if row[0][:4] in ("A of", "B of"))
    # parameters, gradients and two moments
    assert int(mib) == 4 * pairs


def projection(out_features, in_features):
    """A projection of the small layer, by the names of its sizes."""
    N, K, E = SMALL[out_features], SMALL[in_features], SMALL["E"]
    lora_A = torch.randn(SMALL["r"] * E, K, requires_grad=True)
    lora_B = torch.randn(N, SMALL["r"] * E, requires_grad=True)
    return Projection(torch.randn(E, N, K), None, lora_A, lora_B)


def kept_shapes():
    """Shapes of what one forward of the small layer keeps."""
    x = torch.randn(SMALL["T"], SMALL["H"], requires_grad=True)
    index = torch.stack([torch.randperm(SMALL["E"])[: SMALL["top_k"]] for _ in x])
    weights = torch.rand(index.shape, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(x, index, weights, projection("N", "H"), projection("H", "I"), Activation())
    return kept


def test_what_the_page_says_is_kept_is_kept():
    kept = kept_shapes()
    for name, shape, _, _, said in ROWS:
        expected = 0
        if said == "yes":
            expected = ALIKE.get(name, 1)
        assert kept.count(shape_of(shape, SMALL)) == expected, name
