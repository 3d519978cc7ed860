"""SGLang's own loader ends up with our deltas, or does what the table says it does."""

import importlib.metadata
import re

import pytest

from helpers import R
from readers.cases import SWAPS, command_of_card, swapped_names, write_unchecked
from readers.deltas import TOLERANCE, wrong
from readers.verdicts import EXACT, SGLANG_0_5_23

pytest.importorskip("sglang", reason="SGLang is not installed here; make test-readers installs it")

from readers.drive_sglang import load, parser

pytestmark = pytest.mark.readers

CELLS = [
    (architecture, to, verdict)
    for architecture, row in SGLANG_0_5_23.rows.items()
    for to, verdict in row.formats.items()
]
READ = [(architecture, to) for architecture, to, verdict in CELLS if verdict == EXACT]


def check(case, kind, to, verdict):
    """Run one cell of the table."""
    adapter = case.written(kind, to)
    if verdict.startswith("refused: "):
        # SGLang raises whatever came: NotImplementedError, ValueError, Exception
        with pytest.raises(Exception, match=re.escape(verdict.removeprefix("refused: "))):
            load(case.base, adapter)
        return
    assert verdict == EXACT
    assert not wrong(load(case.base, adapter), case.right(kind))
    assert case.verified(kind, to) <= TOLERANCE


def test_the_release_is_the_tables():
    assert importlib.metadata.version("sglang") == SGLANG_0_5_23.version


@pytest.mark.parametrize(("architecture", "to", "verdict"), CELLS)
def test_experts(cases, architecture, to, verdict):
    check(cases(architecture), "experts", to, verdict)


@pytest.mark.parametrize(("architecture", "to"), READ)
@pytest.mark.parametrize("kind", ["attention", "router"])
def test_what_is_adapted_beside_the_experts(cases, architecture, to, kind):
    check(cases(architecture), kind, to, getattr(SGLANG_0_5_23.rows[architecture], kind))


@pytest.mark.parametrize("to", ["per_expert", "sglang_3d"])
def test_it_understands_the_command_of_the_card(cases, to):
    adapter = cases("Qwen3MoeForCausalLM").written("experts", to)
    given = parser().parse_args(command_of_card(adapter, "python -m sglang.launch_server"))
    assert given.enable_lora
    assert given.lora_paths == ["adapter=ADAPTER"]
    assert given.max_lora_rank == R


@pytest.mark.parametrize("to", ["per_expert", "sglang_3d"])
@pytest.mark.parametrize("kind", SWAPS)
def test_a_swap_is_seen(cases, to, kind):
    case = cases("Qwen3MoeForCausalLM")
    found = load(case.base, case.written(kind, to))
    assert sorted(wrong(found, case.right("experts"))) == swapped_names(kind)
    assert case.verified(kind, to) > 0.1


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("Qwen3MoeForCausalLM", ["q_proj", "k_proj"]),
        ("Qwen3MoeForCausalLM", ["v_proj"]),
        ("Qwen3MoeForCausalLM", ["k_proj"]),
        ("DeepseekV3ForCausalLM", ["q_a_proj", "o_proj"]),
        ("DeepseekV3ForCausalLM", ["kv_a_proj_with_mqa"]),
    ],
)
def test_a_part_of_what_it_stacks_is_not_loaded(cases, architecture, names, tmp_path):
    """SGLang raises whatever came, and says nothing that a user understands."""
    case = cases(architecture)
    case.save(tmp_path / "in", ["experts", *names])
    write_unchecked(tmp_path / "in", case.base, "sglang_3d", tmp_path / "out")
    with pytest.raises(Exception, match=r"proj|shape|parallel"):
        load(case.base, tmp_path / "out")
