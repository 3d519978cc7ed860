"""vLLM's own loader ends up with our deltas, or does what the table says it does."""

import importlib.metadata
import re

import pytest

from readers.cases import SWAPS, command_of_card, swapped_names
from readers.deltas import TOLERANCE, lost, wrong
from readers.verdicts import EXACT, IGNORED, MISREAD_MIXED, MIXED, VLLM_0_33

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-readers installs it")

from readers.drive_vllm import FLAG, load, parser

pytestmark = pytest.mark.readers

CELLS = [
    (architecture, to, verdict)
    for architecture, row in VLLM_0_33.rows.items()
    for to, verdict in row.formats.items()
]
READ = [cell for cell in CELLS if cell[2] in (EXACT, MIXED)]


def loaded(case, kind, to, verdict):
    flags = FLAG if verdict.endswith("mixed") else {}
    return load(case.base, case.written(kind, to), stacked=to == "vllm_3d", **flags)


def check(case, kind, to, verdict):
    """Run one cell of the table."""
    right = case.right(kind)
    if verdict.startswith("refused: "):
        with pytest.raises(ValueError, match=re.escape(verdict.removeprefix("refused: "))):
            loaded(case, kind, to, verdict)
        return
    found = loaded(case, kind, to, verdict)
    if verdict in (EXACT, MIXED):
        assert not wrong(found, right)
        assert case.verified(kind, to) <= TOLERANCE
    elif verdict == IGNORED:
        assert lost(found, right)
    else:
        assert verdict == MISREAD_MIXED
        assert wrong(found, right)


def test_the_release_is_the_tables():
    assert importlib.metadata.version("vllm") == VLLM_0_33.version


@pytest.mark.parametrize(("architecture", "to", "verdict"), CELLS)
def test_experts(cases, architecture, to, verdict):
    check(cases(architecture), "experts", to, verdict)


@pytest.mark.parametrize(("architecture", "to", "verdict"), READ)
@pytest.mark.parametrize("kind", ["attention", "router"])
def test_what_is_adapted_beside_the_experts(cases, architecture, to, verdict, kind):
    said = getattr(VLLM_0_33.rows[architecture], kind)
    check(cases(architecture), kind, to, verdict if said == EXACT else said)


@pytest.mark.parametrize(("architecture", "to", "verdict"), READ)
def test_without_the_flag_the_other_layout_is_refused(cases, architecture, to, verdict):
    if verdict == MIXED:
        with pytest.raises(ValueError, match=r"fused 3D MoE weights|expected target modules"):
            loaded(cases(architecture), "experts", to, EXACT)


@pytest.mark.parametrize(
    "architecture", ["Qwen3MoeForCausalLM", "Qwen3VLMoeForConditionalGeneration"]
)
@pytest.mark.parametrize("to", ["per_expert", "vllm_3d"])
def test_it_understands_the_command_of_the_card(cases, architecture, to):
    adapter = cases(architecture).written("experts", to)
    given = parser().parse_args(command_of_card(adapter, "vllm serve"))
    mixed = VLLM_0_33.rows[architecture].formats[to] == MIXED
    (module,) = given.lora_modules
    assert (module.name, module.path) == ("adapter", "ADAPTER")
    assert module.is_3d_lora_weight == (mixed and to == "vllm_3d")
    assert given.enable_mixed_moe_lora_format == mixed
    assert given.enable_lora
    assert given.max_lora_rank == 8


@pytest.mark.parametrize("to", ["per_expert", "vllm_3d"])
@pytest.mark.parametrize("kind", SWAPS)
def test_a_swap_is_seen(cases, to, kind):
    case = cases("Qwen3MoeForCausalLM")
    verdict = VLLM_0_33.rows["Qwen3MoeForCausalLM"].formats[to]
    found = loaded(case, kind, to, verdict)
    assert sorted(wrong(found, case.right("experts"))) == swapped_names(kind)
    assert case.verified(kind, to) > 0.1
