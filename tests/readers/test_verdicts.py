"""Our conversions say of every reader, family and format what the reader itself did.

No reader is needed here: what each did is written in `verdicts.py`.
"""

from dataclasses import replace

import pytest

from peft_moe_lora.convert.convert import prepare
from peft_moe_lora.convert.formats import FORMATS, WRITABLE
from peft_moe_lora.convert.reading import open_adapter
from peft_moe_lora.experts.families import VLLM_3D
from peft_moe_lora.files.servers import VLLM
from peft_moe_lora.files.tensor_file import RefusedError
from readers.cases import SWAPS
from readers.deltas import TOLERANCE
from readers.readers_table import tables, written
from readers.verdicts import EXACT, IGNORED, MISREAD_MIXED, MIXED, READERS, VLLM_0_33

CELLS = [
    (reader, architecture, to, kind)
    for reader in READERS
    for architecture, row in reader.rows.items()
    for to in row.formats
    for kind in ("experts", "attention", "router")
]


def verdict_of(reader, architecture, to, kind):
    row = reader.rows[architecture]
    if row.formats[to] in (EXACT, MIXED) and kind != "experts" and getattr(row, kind) != EXACT:
        return getattr(row, kind)
    return row.formats[to]


def answer(adapter, reader, to):
    """Whether a conversion promises that the reader reads the result, and what it notes."""
    form = WRITABLE[to]
    assert reader.server is None or reader.server in form.card.served_by
    try:
        prepared = prepare(adapter, form)
    except RefusedError as error:
        return False, str(error)
    notes = " ".join(note for note in prepared.notes if reader.name in note)
    if reader.server is None:
        return True, notes
    started = {server.name: server.command for server in form.servers(prepared)}
    return reader.name in started, f"{notes} {started.get(reader.name)}"


@pytest.mark.parametrize(
    ("reader", "architecture", "to", "kind"),
    [pytest.param(*cell, id="-".join([cell[0].package, *cell[1:]])) for cell in CELLS],
)
def test_a_conversion_promises_what_the_reader_did(cases, reader, architecture, to, kind):
    if to == "gguf":
        pytest.importorskip("gguf", reason="the package gguf is not installed")
    case = cases(architecture)
    promised, notes = answer(open_adapter(case.ours(kind), case.base_model), reader, to)
    verdict = verdict_of(reader, architecture, to, kind)
    assert promised == (verdict in (EXACT, MIXED)), notes
    if reader.server is VLLM and promised:
        # in the notes, and in the command of the model card
        assert notes.count("--enable-mixed-moe-lora-format") == 2 * (verdict == MIXED)
    if not promised:
        assert reader.name in notes
        words = verdict.removeprefix("refused: ")
        assert words in notes or verdict in (IGNORED, MISREAD_MIXED)


# every cell that a reader reads, once a format; gguf is not read by `verify`
READ = sorted(
    {
        (architecture, to)
        for reader, architecture, to, kind in CELLS
        if kind == "experts" and to in FORMATS
        if verdict_of(reader, architecture, to, kind) in (EXACT, MIXED)
    }
)


@pytest.mark.parametrize(("architecture", "to"), READ)
def test_verify_agrees_with_the_readers(cases, architecture, to):
    assert cases(architecture).verified("experts", to) <= TOLERANCE


@pytest.mark.parametrize("kind", SWAPS)
@pytest.mark.parametrize("to", ["per_expert", "vllm_3d", "sglang_3d", "mlx"])
def test_verify_sees_the_swaps_that_the_readers_see(cases, to, kind):
    assert cases("Qwen3MoeForCausalLM").verified(kind, to) > 0.1


def test_the_3d_architectures_are_those_that_were_run():
    stacked = {name for name, row in VLLM_0_33.rows.items() if row.formats["vllm_3d"] == EXACT}
    assert stacked == VLLM_3D


def test_an_unknown_architecture_is_promised_the_layout_of_most(cases):
    case = cases("Qwen3MoeForCausalLM")
    base = replace(case.base_model, architecture="SomebodysMoeForCausalLM")
    promised, notes = answer(open_adapter(case.ours("experts"), base), VLLM_0_33, "vllm_3d")
    assert promised
    assert "--enable-mixed-moe-lora-format" in notes


def test_the_documents_have_this_table():
    assert written() == tables(), "run python tests/readers/readers_table.py"
