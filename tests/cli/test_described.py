"""docs/command-line.md and the help of the package name every command and every exit code."""

import re

import pytest

from helpers.scripts import ROOT

pytest.importorskip("typer")

from peft_moe_lora import cli

PAGE = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")


def test_the_page_has_every_command_in_the_order_of_help():
    commands = [command.callback.__name__ for command in cli.app.registered_commands]
    assert re.findall(r"^\| `peft-moe-lora (\w+)", PAGE, re.MULTILINE) == commands


def test_the_page_has_the_exit_codes_of_the_package():
    codes = re.findall(r"^\| (\d) \| (.*) \|$", PAGE, re.MULTILINE)
    assert codes == re.findall(r"^    (\d)  (.*)$", cli.__doc__, re.MULTILINE)
    assert {"1", "3", "4", "5"} == {
        str(code) for code in (cli.DIFFERENT, cli.BAD, cli.REFUSED, cli.EXISTS)
    }
