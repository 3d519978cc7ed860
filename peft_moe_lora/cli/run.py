"""`peft-moe-lora run -- COMMAND ...`: a program whose LoRA on experts this package computes.

PEFT's own `LoraConfig(target_parameters=...)` computes through `apply_to_peft` in the program and
in all Python processes that it starts. The program needs no line of code for it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

# `interop/counting.py`, which this file must not import, has the same name
VARIABLE = "PEFT_MOE_LORA_COUNTS"

_WHY_NONE = (
    "warning: no experts module ran through peft_moe_lora: no process ran experts that PEFT's "
    "target_parameters adapts, or a log line above says why PEFT's own code ran them, or Python "
    "was started with -I, -E or -S. A MoELoraConfig needs no `peft-moe-lora run`."
)


def run(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="-- COMMAND ...",
            help="The program and its arguments: trl sft ..., accelerate launch ..., train.py ...",
        ),
    ],
) -> None:
    """Start a program in which PEFT's LoRA on experts runs through this package's kernels."""
    words = _found(command)
    _say(
        "experts that PEFT's target_parameters adapts run through peft_moe_lora in this command "
        f"and the processes that it starts: {' '.join(command)}"
    )
    with tempfile.TemporaryDirectory(prefix="peft_moe_lora_") as folder:
        code = _wait_for(words, _environment(Path(folder)))
        _say(_in_words(list(_counts(Path(folder)))))
    raise typer.Exit(code)


def _found(command: list[str]) -> list[str]:
    """The command with the path of its program; a Python file gets this Python."""
    program, *arguments = command
    if program.endswith(".py"):
        return [sys.executable, *command]
    path = shutil.which(program)
    if path is None:
        raise typer.BadParameter(f"there is no program {program!r}.")
    return [path, *arguments]


def _environment(folder: Path) -> dict[str, str]:
    """The environment of the program; Python finds `at_start.py` in it as `sitecustomize`."""
    site = folder / "site"
    site.mkdir()
    shutil.copy(Path(__file__).with_name("at_start.py"), site / "sitecustomize.py")
    paths = [str(site)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), VARIABLE: str(folder)}


def _wait_for(words: list[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end, and return its exit code as a shell gives it."""
    with _signals_passed_on() as passed_to:
        started = subprocess.Popen(words, env=environment)
        passed_to.append(started)
        code = started.wait()
    if code < 0:
        return 128 - code
    return code


@contextmanager
def _signals_passed_on() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Within this context the started program gets SIGTERM, and Ctrl-C reaches it alone.

    A terminal sends Ctrl-C to the program as well; here it would end the wait for it.
    """
    passed_to: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: object) -> None:
        for started in passed_to:
            started.send_signal(number)

    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, pass_on),
    }
    try:
        yield passed_to
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _counts(folder: Path) -> Iterator[Counter[str]]:
    """What each process has counted: backend -> experts modules."""
    for path in sorted(folder.glob("*.json")):
        try:
            yield Counter(json.loads(path.read_text(encoding="utf-8")))
        except ValueError:
            # a process was killed while it wrote
            continue


def _in_words(counts: list[Counter[str]]) -> str:
    total: Counter[str] = sum(counts, Counter())
    if not total:
        return _WHY_NONE
    by_backend = ", ".join(f"{count} by {backend}" for backend, count in sorted(total.items()))
    processes = "1 process"
    if len(counts) > 1:
        processes = f"{len(counts)} processes"
    return f"{total.total()} experts modules ran through peft_moe_lora in {processes}: {by_backend}"


def _say(line: str) -> None:
    print(f"peft-moe-lora: {line}", file=sys.stderr, flush=True)
