"""Run a part of the tests with several versions of the libraries, and write what came of it.

    python tests/versions/matrix.py                  every row, each in an environment of its own
    python tests/versions/matrix.py oldest           the rows of these names
    python tests/versions/matrix.py middle=FOLDER    a row in an environment that is there
    python tests/versions/matrix.py --table          only write the table again

`make matrix` is the first of these. It takes an hour and some gigabytes, and nobody else runs it:
`make test` has the newest row. Results go to docs/versions.json, with their dates, and the table of
docs/versions.md is made from there.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"
BEGIN, END = "<!-- made by make matrix -->\n", "<!-- end -->\n"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "triton")
# what is run: adapters are added, trained, saved, loaded, and converted
TESTS = (
    "tests/functional/test_functional.py",
    "tests/tuner/test_peft_api.py",
    "tests/tuner/test_several_adapters.py",
    "tests/tuner/test_dtype_and_device.py",
    "tests/files/test_checkpoint.py",
    "tests/convert/test_golden.py",
)
VERSIONS = (
    "import importlib.metadata as m, json, platform, sys; "
    "print(json.dumps({'python': platform.python_version()} "
    "| {p: m.version(p) for p in sys.argv[1:]}))"
)


@dataclass(frozen=True)
class Row:
    """Versions that are run together.

    Attributes:
        name: of the row.
        python: the interpreter.
        pins: variables of the Makefile.
    """

    name: str
    python: str
    pins: dict[str, str]


ROWS = (
    Row(
        "oldest",
        "python3.11",
        {
            "TORCH": "torch==2.9.0",
            "TRITON": "triton==3.6.0",
            "TRANSFORMERS": "transformers==5.16.1",
            "ACCELERATE": "accelerate==1.13.0",
        },
    ),
    Row(
        "middle",
        "python3.11",
        {
            "TORCH": "torch==2.11.0",
            "TRITON": "triton==3.6.0",
            "TRANSFORMERS": "transformers==5.17.0",
        },
    ),
    Row("newest", "python3.11", {}),
    Row("python 3.12", "python3.12", {}),
)


def environment(row: Row) -> Path:
    """Make the environment of a row, and return its folder."""
    folder = ROOT / f".venv-{row.name.replace(' ', '-')}"
    pins = [f"{name}={value}" for name, value in row.pins.items()]
    command = ["make", "installed", f"VENV={folder.name}", f"PYTHON={row.python}", *pins]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def outcome(row: Row, folder: Path) -> dict:
    """Run the tests in an environment: its versions, and how many tests passed and failed."""
    python = str(folder / "bin" / "python")
    asked = subprocess.run(
        [python, "-c", VERSIONS, *PACKAGES], capture_output=True, text=True, check=True
    )
    command = [python, "-m", "pytest", "-q", "-m", "not gpu and not long", *TESTS]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = ran.stdout.strip().splitlines()[-1]
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", last)
    }
    return {
        "row": row.name,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **json.loads(asked.stdout),
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0),
    }


def read_results() -> dict[str, dict]:
    """Name of a row -> what came of it last."""
    if not RESULTS.exists():
        return {}
    return {found["row"]: found for found in json.loads(RESULTS.read_text())["rows"]}


def table() -> str:
    """The results as a table in markdown."""
    columns = ("row", "python", *PACKAGES, "tests passed", "failed", "date")
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for found in read_results().values():
        cells = [found[name] for name in ("row", "python", *PACKAGES, "passed", "failed", "date")]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def write_table() -> None:
    """Replace the table of the page."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


def main(words: list[str]) -> int:
    """Run the rows, write results and table; 1 if a test failed."""
    rows = {row.name: row for row in ROWS}
    given = dict(word.partition("=")[::2] for word in words if word != "--table")
    unknown = sorted(set(given) - set(rows))
    if unknown:
        raise SystemExit(f"no rows called {unknown}; there are {list(rows)}")
    if not words:
        given = dict.fromkeys(rows, "")
    results = read_results()
    for name, folder in given.items():
        row = rows[name]
        results[name] = outcome(row, Path(folder) if folder else environment(row))
        ordered = [results[known] for known in rows if known in results]
        RESULTS.write_text(json.dumps({"tests": TESTS, "rows": ordered}, indent=1) + "\n")
        print(results[name], flush=True)
    write_table()
    return int(any(found["failed"] or not found["passed"] for found in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
