"""A source distribution holds what its tests read, and a wheel made of it holds the package."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("docs", "examples", "notebooks", "peft_moe_lora", "tests")
FILES = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "pyproject.toml",
)
# what runs leave beside the files of the project
LEFT_BY_RUNS = shutil.ignore_patterns("__pycache__", ".*", "moe-lora-*", "*.egg-info")

BUILD = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
BUILD_WHEEL = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
# the console script, a package of its own
SCRIPT = "peft_moe_lora_command"


def build(command, folder):
    subprocess.run(
        [sys.executable, "-c", command], cwd=folder, check=True, capture_output=True, text=True
    )


def test_the_sdist_is_a_whole_checkout_and_the_wheel_of_it_is_whole(tmp_path):
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=LEFT_BY_RUNS)
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path)
    expected = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    build(BUILD, tmp_path)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {Path(*Path(name).parts[1:]) for name in opened.getnames()}
        opened.extractall(tmp_path / "unpacked", filter="data")
    assert expected - held == set()

    (unpacked,) = (tmp_path / "unpacked").iterdir()
    build(BUILD_WHEEL, unpacked)
    (wheel,) = (unpacked / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        held = {Path(name) for name in opened.namelist()}
        script = opened.read(f"{SCRIPT}/__init__.py")
        (entries,) = (name for name in opened.namelist() if name.endswith("entry_points.txt"))
        assert f"peft-moe-lora = {SCRIPT}:main" in opened.read(entries).decode()
    package = {path for path in expected if path.parts[0] == "peft_moe_lora"}
    metadata = {path for path in held if path.parts[0].endswith(".dist-info")}
    assert held - metadata == package | {Path(SCRIPT, "__init__.py")}
    assert script == (ROOT / "peft_moe_lora" / "cli" / SCRIPT / "__init__.py").read_bytes()
