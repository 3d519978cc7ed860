"""`make` installs again when a pin differs, whichever it is, and only then."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def folder(tmp_path):
    """The project's Makefile beside an environment in which nothing is installed yet."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    return tmp_path


def commands(folder, *settings, target="test"):
    """What `make test`, or another target, would run."""
    command = ["make", "--dry-run", "--no-print-directory", target, *settings]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def install(folder, target="test"):
    """Leave the stamps that `make test`, or another target, leaves."""
    for stamp in re.findall(r"touch '(.*)'", commands(folder, target=target)):
        (folder / stamp).touch()


def test_the_same_pins_are_not_installed_again(folder):
    assert "pip install" in commands(folder)
    install(folder)
    assert "pip install" not in commands(folder)
    assert "pytest" in commands(folder)


@pytest.mark.parametrize(
    "pin",
    [
        "TORCH=torch==2.11.0",
        "TRITON=triton==3.6.0",
        "TRANSFORMERS=transformers==5.17.0",
        "PEFT=peft==0.20.0",
        "PINS=accelerate==1.13.0",
    ],
)
def test_another_pin_is_installed(folder, pin):
    install(folder)
    planned = commands(folder, pin)
    assert "pip install" in planned
    assert pin.partition("=")[2] in planned


def test_triton_is_left_to_a_torch_that_requires_one(folder):
    """Any other torch gets the pinned one, also where another version is installed."""
    (line,) = re.findall(r"^.*triton==.*platform_system.*$", commands(folder), re.MULTILINE)
    check, _, installs = line.partition("||")
    assert "requires('torch')" in check
    assert "pip install" in installs


def test_the_site_needs_no_torch(folder):
    planned = commands(folder, target="docs")
    assert "zensical==" in planned
    assert "torch" not in planned
    for stamp in re.findall(r"touch '(.*)'", planned):
        (folder / stamp).touch()
    assert "pip install" not in commands(folder, target="docs")
    assert "zensical==1" in commands(folder, "DOCS=zensical==1", target="docs")


def test_help_lists_every_target():
    command = ["make", "--silent", "help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make (\S+)  ", told, re.MULTILINE)) == set(targets.split())


@pytest.mark.parametrize(
    ("code", "succeeds", "run"),
    [
        (0, True, ["test_a.py", "test_b.py"]),
        (5, True, ["test_a.py", "test_b.py"]),
        (1, False, ["test_a.py"]),
        (2, False, ["test_a.py"]),
    ],
)
def test_a_reader_that_is_not_installed_ends_no_other_readers_tests(folder, code, succeeds, run):
    """pytest's exit codes: 5 if it collected nothing, 1 if a test failed, 2 if it was stopped."""
    install(folder, target="test-readers")
    tests = folder / "tests" / "readers"
    tests.mkdir(parents=True)
    for name in ("test_a.py", "test_b.py"):
        (tests / name).touch()
    python = folder / ".venv" / "readers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # the first one ends with the code, the second one well
    python.write_text(
        f'#!/bin/sh\nfor last; do :; done\nbasename $last >> ran\n[ "$last" != '
        f"tests/readers/test_a.py ] || exit {code}\n"
    )
    python.chmod(0o755)
    done = subprocess.run(["make", "test-readers"], cwd=folder, capture_output=True, check=False)
    assert (done.returncode == 0) == succeeds
    assert (folder / "ran").read_text().split() == run
