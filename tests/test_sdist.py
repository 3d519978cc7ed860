"""A source distribution holds what its tests read."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "examples", "notebooks", "peft_moe_lora", "tests")
FILES = ("CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml")
# what runs leave beside the files of the project
LEFT_BY_RUNS = shutil.ignore_patterns("__pycache__", ".*", "moe-lora-*", "*.egg-info")

BUILD = "from setuptools.build_meta import build_sdist; build_sdist('dist')"


def test_the_sdist_is_a_whole_checkout(tmp_path):
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=LEFT_BY_RUNS)
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    expected = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    subprocess.run(
        [sys.executable, "-c", BUILD], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {Path(*Path(name).parts[1:]) for name in opened.getnames()}
    assert expected - held == set()
