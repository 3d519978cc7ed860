"""Breaks the package on purpose, one small break at a time, and lists what no test notices.

    python tests/mutants/run.py --sample 100 tuner ops/grouped.py

The breaks are made in a copy of the project. torch, transformers and PEFT are imported once: the
tests of each break run in a process that is forked from this one.
"""

import argparse
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# here, so that the processes of the breaks need not import them again
import accelerate  # noqa: F401
import peft  # noqa: F401
import pytest
import torch
import transformers  # noqa: F401

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import modeling_module, tiny_families
from mutants.breaks import Break, pieces_of
from mutants.nearest import NEAREST, nearest_to

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "peft_moe_lora"
# a break may make a loop endless: tests may take this many times as long as without the break
PATIENCE = 5


def main() -> None:
    arguments = _parse()
    # an end by signal ends the tests that run, too
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    torch.set_num_threads(1)
    pieces = [piece for path in _sources(arguments.paths) for piece in pieces_of(path)]
    total = len(pieces)
    if arguments.sample is not None:
        pieces = random.Random(arguments.seed).sample(pieces, min(arguments.sample, total))
    pieces.sort(key=lambda piece: (piece.path, piece.line))
    print(f"{len(pieces)} of {total} breaks", flush=True)
    alive = []
    for family in tiny_families():
        # imported once, like the libraries above
        modeling_module(family)
    with tempfile.TemporaryDirectory() as folder:
        tests = _Tests(Path(folder))
        for piece in pieces:
            one = piece.written_out()
            noticed = tests.notice(one)
            print("noticed" if noticed else "LIVES  ", _line(one), flush=True)
            if not noticed:
                alive.append(one)
    print(f"\n{len(alive)} of {len(pieces)} breaks live:")
    for one in alive:
        print(_line(one))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "paths", nargs="*", default=list(NEAREST), help="folders and files of the package"
    )
    parser.add_argument("--sample", type=int, help="how many breaks, drawn at random; else all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    return parser.parse_args()


def _sources(paths: list[str]) -> list[Path]:
    """The source files at these paths of the package, without the kernels."""
    found: set[Path] = set()
    for path in paths:
        place = PACKAGE / path
        if place.is_file():
            found.add(place)
        else:
            found.update(place.rglob("*.py"))
    return sorted(path for path in found if "kernels" not in path.parts)


def _line(one: Break) -> str:
    return f"{one.path.relative_to(ROOT)}:{one.line}: {one.before} -> {one.after}"


class _Tests:
    """Runs tests in a copy of the project.

    Args:
        folder: an empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # tests -> seconds that they may take
        self.limits: dict[tuple[str, ...], float] = {}
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)

    def notice(self, one: Break) -> bool:
        """Whether the tests nearest to a break fail, or take far too long."""
        tests = nearest_to(one.path.relative_to(PACKAGE))
        if tests not in self.limits:
            self.limits[tests] = self._limit(tests)
        place = self.folder / one.path.relative_to(ROOT)
        whole = place.read_text(encoding="utf-8")
        place.write_text(one.source, encoding="utf-8")
        # Python compares size and second of the source alone
        Path(importlib.util.cache_from_source(str(place))).unlink(missing_ok=True)
        try:
            return not self._pass(tests, self.limits[tests], write_bytecode=False)
        finally:
            place.write_text(whole, encoding="utf-8")

    def _limit(self, tests: tuple[str, ...]) -> float:
        begin = time.monotonic()
        if not self._pass(tests, limit=3600, write_bytecode=True):
            sys.exit(f"these tests fail without a break: {' '.join(tests)}")
        return 30 + PATIENCE * (time.monotonic() - begin)

    def _pass(self, tests: tuple[str, ...], limit: float, write_bytecode: bool) -> bool:
        process = os.fork()
        if process == 0:
            sys.dont_write_bytecode = not write_bytecode
            self._run_and_exit(tests)
        end = time.monotonic() + limit
        try:
            while time.monotonic() < end:
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    return status == 0
                time.sleep(0.1)
        except BaseException:
            os.killpg(process, signal.SIGKILL)
            raise
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        return False

    def _run_and_exit(self, tests: tuple[str, ...]) -> None:
        """Run tests in this process, and end it with pytest's exit code."""
        code = 1
        try:
            os.setsid()
            os.chdir(self.folder)
            # before the folder of an editable installation; also for processes that tests start
            sys.path.insert(0, str(self.folder))
            os.environ["PYTHONPATH"] = str(self.folder)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            options = ["-q", "-x", "-m", "not long and not gpu", "-p", "no:cacheprovider"]
            # one after the other: a failure in the first saves collecting the rest
            for name in tests:
                code = int(pytest.main([*options, name]))
                if code:
                    break
        finally:
            os._exit(code)


if __name__ == "__main__":
    main()
