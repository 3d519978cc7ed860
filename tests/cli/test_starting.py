"""The command starts in a moment, however it is called, and prints its own lines alone."""

import os
import resource
import runpy
import subprocess
import sys
from importlib.metadata import packages_distributions
from inspect import signature
from pathlib import Path
from typing import get_args

import pytest

import peft_moe_lora

pytest.importorskip("typer")

from typer.testing import CliRunner

from peft_moe_lora import cli
from peft_moe_lora.cli.adapters import convert
from peft_moe_lora.cli.app import app
from peft_moe_lora.cli.options import BLayoutName, FormatName
from peft_moe_lora.convert.formats import B_LAYOUTS, DEFAULT_FORMAT, WRITABLE

# a wheel holds peft_moe_lora_command beside peft_moe_lora
SCRIPT_FOLDER = Path(cli.__file__).parent
START = "from peft_moe_lora_command import main; main()"
# a checkout that is not installed imports the package for its version
INSTALLED = bool(packages_distributions().get("peft_moe_lora"))
# seconds of CPU; importing torch alone takes longer
HELP_TAKES = 0.5


def started(*arguments, before="", **variables):
    """The console script in a process of its own."""
    folders = os.pathsep.join([str(SCRIPT_FOLDER), str(Path(peft_moe_lora.__file__).parents[1])])
    return subprocess.run(
        [sys.executable, "-c", before + START, *arguments],
        env={**os.environ, "PYTHONPATH": folders, "COLUMNS": "120", **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", [(), ("convert",)], ids=["all", "convert"])
def test_help_takes_a_moment(command):
    took = []
    for _ in range(3):
        before = cpu_seconds()
        done = started(*command, "--help")
        took.append(cpu_seconds() - before)
        assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout
    assert min(took) < HELP_TAKES


def test_help_and_version_import_neither_torch_nor_the_package():
    """A meta path finder refuses them: the time above may pass on a fast machine."""
    refusing = (
        "import sys\n"
        "class No:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        assert name not in ('torch', 'peft', 'transformers'), name\n"
        "sys.meta_path.insert(0, No())\n"
    )
    for arguments in (("--help",), ("merge", "--help")):
        done = started(*arguments, before=refusing)
        assert done.returncode == 0, done.stderr
    if INSTALLED:
        assert started("--version", before=refusing).stdout == f"{peft_moe_lora.__version__}\n"
    assert "AssertionError: peft" in started("env", before=refusing).stderr


@pytest.mark.long
def test_a_command_runs_and_prints_nothing_of_other_libraries():
    """Importing PEFT makes torch, torchao or bitsandbytes log, where these are installed."""
    done = started("env")
    assert done.returncode == 0
    assert not done.stderr
    assert f"peft_moe_lora  {peft_moe_lora.__version__}" in done.stdout


def test_lines_and_levels_of_other_libraries_come_back_and_ours_stay(caplog, recwarn):
    import logging
    import warnings

    from peft_moe_lora.cli.own_lines import own_lines

    other = logging.getLogger("another_library")
    ours = logging.getLogger("peft_moe_lora.some_file")
    with own_lines():
        other.warning("theirs")
        ours.warning("ours")
        warnings.warn("theirs", stacklevel=1)
    other.warning("later")
    assert [record.message for record in caplog.records] == ["ours", "later"]
    assert not recwarn.list
    with pytest.raises(ValueError, match="stop"), own_lines():
        raise ValueError("stop")
    assert other.level == logging.NOTSET


@pytest.mark.parametrize("module", ["peft_moe_lora", "peft_moe_lora.cli"])
def test_it_is_a_module_too(module, monkeypatch, capsys):
    """`python -m`, without the seconds of importing torch once more."""
    monkeypatch.setattr(sys, "argv", [module, "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"{peft_moe_lora.__version__}\n"


def test_it_says_what_is_missing():
    for library in ("typer", "rich"):
        done = started("--help", before=f"import sys; sys.modules['{library}'] = None\n")
        assert done.returncode == 1
        assert "pip install 'peft-moe-lora[cli]'" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_completes_names(shell):
    variables = {
        "_PEFT_MOE_LORA_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": "peft-moe-lora con",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_ARGS": "peft-moe-lora con",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = started(**variables)
    assert "convert" in done.stdout
    assert "consolidate" in done.stdout
    assert "merge" not in done.stdout


# ---- choices -------------------------------------------------------------------------------------


def test_choices_are_those_of_the_package():
    assert get_args(FormatName) == tuple(WRITABLE)
    assert get_args(BLayoutName) == B_LAYOUTS
    assert signature(convert).parameters["to"].default == DEFAULT_FORMAT


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (("convert", "a", "b", "--to", "gptq"), "per_expert"),
        (("inspect", "a", "--b-layout", "expert"), "rank_major"),
        (("verify", "a", "b", "--tolerance", "small"), "number"),
        (("konvert", "a", "b"), "convert"),
    ],
)
def test_what_is_no_choice_is_wrong_usage(arguments, known):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert not done.stdout
    assert known in done.stderr


def test_every_command_prints_json_and_no_option_is_repeated():
    for command in ("env", "inspect", "convert", "consolidate", "merge", "verify"):
        told = CliRunner().invoke(app, [command, "--help"]).stdout
        assert told.count("--json") == 1
        assert ("--quiet" in told) == (command not in ("env", "inspect"))
        assert "progress" not in told.replace("progress bar", "")
