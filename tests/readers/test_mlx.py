"""mlx-lm's own loader ends up with our deltas, and its models with our logits."""

import copy
import importlib.metadata
import re

import pytest

from helpers import assert_close, moe_lora, outputs, token_ids
from peft_moe_lora import convert_adapter, load_peft_adapter
from readers.cases import BASES, SWAPS, swapped_names
from readers.deltas import TOLERANCE, wrong
from readers.verdicts import EXACT, MLX_0_32

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed here; make test-readers installs it")

from readers.drive_mlx import load, logits

pytestmark = pytest.mark.readers

# mlx-lm reads gpt_oss from MXFP4 checkpoints only
WITH_WEIGHTS = sorted(set(MLX_0_32.rows) - {"GptOssForCausalLM"})


def test_the_release_is_the_tables():
    assert importlib.metadata.version("mlx-lm") == MLX_0_32.version


@pytest.mark.parametrize("kind", ["experts", "attention", "router"])
@pytest.mark.parametrize("architecture", MLX_0_32.rows)
def test_deltas(cases, architecture, kind):
    case = cases(architecture)
    row = MLX_0_32.rows[architecture]
    said = {"experts": row.formats["mlx"]}.get(kind) or getattr(row, kind)
    adapter = case.written(kind, "mlx")
    if said.startswith("refused: "):
        with pytest.raises(ValueError, match=re.escape(said.removeprefix("refused: "))):
            load(case.base, adapter)
        return
    assert said == EXACT
    assert not wrong(load(case.base, adapter), case.right(kind))
    assert case.verified(kind, "mlx") <= TOLERANCE


@pytest.mark.parametrize("architecture", WITH_WEIGHTS)
def test_logits(architecture, tmp_path):
    """fp32 on both sides: measured differences are about 1e-6."""
    base = BASES[architecture]()
    base.config.architectures = [architecture]
    base.save_pretrained(tmp_path / "base")
    model = moe_lora(copy.deepcopy(base), target_modules=["experts", "o_proj"]).eval()
    model.save_pretrained(tmp_path / "ours")
    convert_adapter(tmp_path / "ours", tmp_path / "mlx", to="mlx", base_config=tmp_path / "base")
    right = outputs(model).detach()
    assert_close(logits(tmp_path / "base", tmp_path / "mlx", token_ids()), right, 1e-4, "logits")
    back = load_peft_adapter(copy.deepcopy(base), tmp_path / "mlx").eval()
    assert_close(outputs(back), right, 1e-6, "logits of what we read")


@pytest.mark.parametrize("kind", SWAPS)
def test_a_swap_is_seen(cases, kind):
    case = cases("Qwen3MoeForCausalLM")
    found = load(case.base, case.written(kind, "mlx"))
    assert sorted(wrong(found, case.right("experts"))) == swapped_names(kind)
    assert case.verified(kind, "mlx") > 0.1
