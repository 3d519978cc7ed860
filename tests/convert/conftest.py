"""One tiny base model and one saved adapter per family, made once.

Tests write into folders of their own.
"""

from types import SimpleNamespace

import pytest
import torch

from convert.adapters import FAMILIES, save_base, save_ours
from helpers import outputs


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """family -> base (model), config (its folder), ours (folder), logits (with our adapter)."""
    cache = {}

    def make(family):
        if family not in cache:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(family)
            base = save_base(family, folder / "base")
            model = save_ours(base, folder / "ours")
            cache[family] = SimpleNamespace(
                family=family,
                base=base,
                config=folder / "base",
                ours=folder / "ours",
                logits=outputs(model).detach(),
            )
        return cache[family]

    return make


@pytest.fixture(params=FAMILIES)
def case(request, made):
    return made(request.param)


@pytest.fixture
def qwen(made):
    return made("qwen3_moe")
