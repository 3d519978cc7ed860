"""PEFT's own tests pass with this package in the place of PEFT's code; docs list what cannot run.

`make test-peft` downloads the sources of PEFT, which hold its tests, and names their folder in
PEFT_SOURCES. Each run is a process of its own with a plugin of this folder.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from peft_tests import linear, parameters
from test_docs import tables

ROOT = Path(__file__).parents[2]
SOURCES = os.environ.get("PEFT_SOURCES")
# tests of LoRA; the names of the other methods hold its name
LORA = "lora and not (adalora or randlora or vblora or gralora or unilora or xlora)"


@dataclass(frozen=True)
class Run:
    """Files of PEFT's tests that run in one process.

    Attributes:
        plugin: the plugin of this folder.
        files: names of the files, without ".py".
        names: the names of tests that run, as pytest's option -k takes them.
    """

    plugin: str
    files: tuple[str, ...]
    names: str


OF_LORA = (
    "test_lora_variants",
    "test_lorafa",
    "test_loraplus",
    "test_lora_conversion",
    "test_low_level_api",
    "test_helpers",
    "test_mixed",
    "test_trainable_tokens",
    "test_lora_intruders",
)
RUNS = {
    "experts": Run("parameters", ("test_target_parameters",), ""),
    "linear layers of tiny modules": Run("linear", ("test_custom_models",), LORA),
    "linear layers, other files": Run("linear", OF_LORA, LORA),
    "linear layers, initial states": Run(
        "linear", ("test_initialization",), "TestLora or lora_linear or LoraInit"
    ),
    "linear layers of Llama and OPT": Run(
        "linear", ("test_decoder_models",), f"loraconfig and (llama or opt) and {LORA}"
    ),
}


# tables of the documentation: what was run, and what cannot run
RAN, CANNOT_RUN = tables(ROOT / "docs" / "versions.md")["PEFT's own tests"]


def run(what):
    """Run a part of PEFT's tests, and return what pytest prints."""
    assert SOURCES is not None
    folder = Path(SOURCES) / "tests"
    # the tests import each other by relative names, but the sources have no such file
    (folder / "__init__.py").touch()
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "-q", "--tb", "short"]
    command += ["-p", f"peft_tests.{what.plugin}", "-p", "no:cacheprovider", "-k", what.names]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [*command, *(f"{file}.py" for file in what.files)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout


@pytest.mark.peft_tests
@pytest.mark.skipif(SOURCES is None, reason="make test-peft downloads PEFT's tests")
@pytest.mark.parametrize("what", RUNS)
def test_they_pass(what):
    printed = run(RUNS[what])
    last = printed.splitlines()[-1]
    assert not re.search(r"\d+ (failed|error)", last), printed[-20_000:]
    passed = re.search(r"(\d+) passed", last)
    ours = re.search(r"computed by peft_moe_lora: (\d+)", printed)
    assert passed is not None, printed[-20_000:]
    assert ours is not None, printed[-20_000:]
    (row,) = (row for row in RAN if row["what"] == what)
    assert passed[1] == row["passed"]
    assert int(ours[1]) >= int(row["calls computed here"])


def test_the_documentation_lists_what_was_run_and_what_cannot_run():
    assert [row["what"] for row in RAN] == list(RUNS)
    for row in RAN:
        files = RUNS[row["what"]].files
        assert row["PEFT's files, in `tests/`"] == ", ".join(f"`{file}`" for file in files)
    listed = " ".join(row["test"] for row in CANNOT_RUN)
    for plugin in (parameters, linear):
        for name in plugin.LEFT_OUT:
            assert name in listed
