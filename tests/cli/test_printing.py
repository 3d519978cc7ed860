"""What a command found: a table on a terminal, lines in a pipe, JSON where asked."""

import json
import sys

import pytest

pytest.importorskip("rich")

from rich.console import Console

from peft_moe_lora.cli import text
from peft_moe_lora.cli.text import print_found

FOUND = {"path": "/models/a[bold]b", "notes": ["one\x1b[2J", "two"], "nothing": None, "n": 3}


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 40 columns that knows no colours; what it got is returned."""
    console = Console(width=40, force_terminal=True, no_color=True, record=True, highlight=False)
    monkeypatch.setattr(text, "Console", lambda: console)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    return console


@pytest.mark.parametrize("forced", [None, "1"])
def test_a_pipe_gets_a_line_a_row(forced, capsys, monkeypatch):
    """Also where FORCE_COLOR is set, as in the subprocesses of a notebook."""
    if forced:
        monkeypatch.setenv("FORCE_COLOR", forced)
    print_found({**FOUND, "long": "x" * 500}, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["path     /models/a[bold]b", r"notes    one\x1b[2J", "         two"]
    assert lines[3:5] == ["nothing  -", "n        3"]
    assert lines[5] == "long     " + "x" * 500


def test_a_terminal_gets_a_table_that_folds_and_obeys_no_markup(terminal):
    print_found({**FOUND, "long": "x" * 60}, as_json=False)
    lines = [line.rstrip() for line in terminal.export_text().splitlines()]
    assert lines[:3] == ["path     /models/a[bold]b", r"notes    one\x1b[2J", "         two"]
    assert "".join(lines[5:]).replace(" ", "") == "long" + "x" * 60
    assert max(map(len, lines)) <= 40


def test_json_is_json_on_a_terminal_too(terminal, capsys):
    print_found(FOUND, as_json=True)
    assert json.loads(capsys.readouterr().out) == FOUND


def test_many_lines_are_cut(capsys):
    print_found({"all": list(range(500))}, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == text.MOST_LINES + 1
    assert "and 400 more (--json prints all)" in lines[-1]
