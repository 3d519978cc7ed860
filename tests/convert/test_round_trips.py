"""From every format into every other one: bit for bit, or with one rounding of B.

Converted directly from ours, an adapter of one rank and one scaling is the same file as converted
by way of any other format. Where ranks and scalings differ, a format that has one of each holds B
times a factor, rounded once to B's dtype; a later conversion rounds nothing.
"""

import pytest
import torch
from safetensors.torch import load_file

from convert.adapters import MISREAD, rewrite, save_ours
from peft_moe_lora import convert_adapter, verify_adapter
from peft_moe_lora.convert.base import read_base
from peft_moe_lora.convert.formats import FORMATS

FAMILIES = ["qwen3_moe", "gpt_oss", pytest.param("mixtral", marks=pytest.mark.long)]
PAIRS = [(first, second) for first in FORMATS for second in FORMATS]
# half the distance between bf16 numbers near 1, for B; the sum over ranks is relative to its
# largest value
ONE_ROUNDING = 2.0**-8
MIXED = {
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "rank_pattern": {"layers.1.mlp.experts": 2, "q_proj": 3},
    "alpha_pattern": {"layers.0.mlp.experts": 5},
}


def cannot_hold(family, pair):
    """Whether one of two formats cannot hold an adapter of a family."""
    return any((family, name) in MISREAD for name in pair)


class Conversions:
    """An adapter in every format, written once."""

    def __init__(self, ours, base, folder):
        self.ours = ours
        self.base = base
        self._folder = folder

    def direct(self, to):
        return self._converted(self.ours, to, to)

    def by_way_of(self, first, second):
        return self._converted(self.direct(first), second, f"{first}-{second}")

    def _converted(self, source, to, name):
        out = self._folder / name
        if not out.exists():
            convert_adapter(source, out, to=to, base_config=self.base)
        return out


@pytest.fixture(scope="module")
def conversions(made, tmp_path_factory):
    """(family, kind of adapter) -> its conversions."""
    cache = {}

    def make(family, settings, dtype):
        key = (family, dtype)
        if key not in cache:
            case = made(family)
            folder = tmp_path_factory.mktemp(f"{family}-{dtype}".replace(".", "-"))
            targets = ["experts", "q_proj", "v_proj"]
            save_ours(case.base, folder / "ours", target_modules=targets, **settings)
            rewrite_dtype(folder / "ours", dtype)
            cache[key] = Conversions(folder / "ours", read_base(case.config), folder)
        return cache[key]

    return make


def rewrite_dtype(folder, dtype):
    rewrite(folder, lambda state: {name: t.to(dtype) for name, t in state.items()})


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_bit_for_bit(conversions, family, pair):
    if cannot_hold(family, pair):
        return
    adapter = conversions(family, {}, torch.float32)
    found = weights(adapter.by_way_of(*pair))
    right = weights(adapter.direct(pair[1]))
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in right.items())


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_every_pair_with_one_rounding(conversions, pair):
    """rsLoRA, ranks and alphas by pattern, bf16."""
    adapter = conversions("qwen3_moe", MIXED, torch.bfloat16)
    first, second = pair
    result = adapter.by_way_of(first, second)
    error = verify_adapter(adapter.ours, adapter.base, result).max_error
    assert error <= ONE_ROUNDING
    rounded = FORMATS[first].one_rank
    assert (error > 0) == (rounded or FORMATS[second].one_rank)
    if rounded:
        assert verify_adapter(adapter.direct(first), adapter.base, result).max_error == 0
