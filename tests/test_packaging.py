"""What a package index and a citation say agrees with the package."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import peft_moe_lora

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == peft_moe_lora.__version__
    assert cited["license"] == PROJECT["license"]
    assert cited["keywords"] == PROJECT["keywords"]
    assert cited["authors"] == PROJECT["authors"]


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == peft_moe_lora.__version__
    assert len(set(headings)) == len(headings)


def test_the_changelog_names_what_is_public():
    app = pytest.importorskip("peft_moe_lora.cli").app
    commands = {command.callback.__name__ for command in app.registered_commands}
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(\w+)`", text):
        assert name in (*peft_moe_lora.__all__, *commands), name
