"""docs/ and CONTRIBUTING.md name what is there.

That is kernels in the order of their launches, files, functions, and where links lead.
"""

import importlib
import re
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import peft_moe_lora
from helpers.launches import record_launches
from peft_moe_lora.functional import Projection, experts
from peft_moe_lora.ops import Activation
from peft_moe_lora.ops.quantize import quantize

ROOT = Path(__file__).parents[1]
PACKAGE = Path(peft_moe_lora.__file__).parent
DOCUMENTS = sorted(
    [
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/guides/*.md"),
        *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "README.md")),
    ]
)
ARCHITECTURE = ROOT / "docs" / "architecture.md"

every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)

# ---- tables --------------------------------------------------------------------------------------


def tables(path):
    """{heading: its tables}; a table is a list of rows, a row {column: cell}."""
    found = {}
    heading = ""
    lines = path.read_text(encoding="utf-8").splitlines()
    for before, line in pairwise(["", *lines]):
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not before.startswith("|"):
                columns = cells
                found.setdefault(heading, []).append([])
            elif set(line) - set("|- "):
                found[heading][-1].append(dict(zip(columns, cells, strict=True)))
    return found


def kernels_in(cell):
    return re.findall(r"`(_\w+_kernel)`", cell)


TABLES = tables(ARCHITECTURE)
(FORWARD,) = TABLES["Forward: `functional/whole.py`"]
(BACKWARD,) = TABLES["Backward: `functional/whole.py`"]
STEPS_FORWARD, STEPS_BACKWARD = TABLES["Around the model's own code: `functional/steps.py`"]
(VARIANTS,) = TABLES["What differs"]
(FILES,) = TABLES["Kernels and their files"]

ROOMS_TABLE, OPS_TABLE, KERNELS_TABLE = TABLES["The rooms"]

# ---- the order of the rooms ----------------------------------------------------------------------

CONTRACTS = {
    contract["name"]: contract["layers"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]["contracts"]
}


@pytest.mark.parametrize(
    ("table", "contract"),
    [
        (ROOMS_TABLE, "rooms of the package"),
        (OPS_TABLE, "rooms of the operations"),
        (KERNELS_TABLE, "rooms of the kernels"),
    ],
    ids=["package", "ops", "kernels"],
)
def test_the_floors_are_those_that_import_linter_holds(table, contract):
    floors = [set(re.findall(r"\w+", layer)) for layer in reversed(CONTRACTS[contract])]
    if table is KERNELS_TABLE:
        # the top floor is all files
        floors[-1] = {"kernels"}
    described = [set() for _ in floors]
    for row in table:
        names = [Path(name).stem for name in re.findall(r"`([^`]+)`", row["room"])]
        described[int(row["floor"]) - 1] |= set(names)
    assert described == floors


# ---- launches ------------------------------------------------------------------------------------

E, H, I, TOP_K = 128, 128, 128, 2  # noqa: E741
# tokens that give each expert 192 rows, 32 and 8: on 9.0 its tiles have 128 rows, 64 and 16
MANY, MIDDLING, FEW = 12288, 2048, 512

# GPUs by compute capability and multiprocessors, and the column that says what they launch
HOPPER = ((9, 0), 132)
AMPERE = ((8, 0), 108)
BLACKWELL = ((10, 0), 148)
COLUMNS = {HOPPER: "kernels on 9.0", AMPERE: "kernels elsewhere", BLACKWELL: "kernels elsewhere"}


@dataclass(frozen=True)
class Case:
    """A layer whose launches are recorded.

    Attributes:
        T: tokens.
        rank: of one expert's update.
        up, down: whether gate_up and down have an adapter.
        experts: ids of the experts that have one; None for all.
        fused: whether the activation runs in the kernels.
        x_grad: whether the hidden states need a gradient.
        widths: H and I.
    """

    T: int = MANY
    rank: int = 16
    up: bool = True
    down: bool = True
    experts: tuple[int, ...] | None = None
    fused: bool = True
    x_grad: bool = True
    recompute: bool = False
    dropout: float = 0.0
    quantized: str | None = None
    transposed: bool = False
    rank_major: bool = False
    widths: tuple[int, int] = (H, I)


ON_BLACKWELL = "compute capability 10.0"
# the variants of the table "What differs", and cases that the tables describe without one
CASES = {
    "": Case(),
    "recompute": Case(recompute=True),
    "dropout": Case(dropout=0.1),
    "quantized": Case(quantized="nf4"),
    "quantized, few rows": Case(T=FEW, quantized="nf4"),
    "few rows": Case(T=FEW),
    "middling rows": Case(T=MIDDLING),
    "between sixteens": Case(rank=40),
    "many ranks": Case(rank=80),
    "some experts": Case(experts=(1, 2)),
    "PEFT's order": Case(rank_major=True),
    "transposed base": Case(transposed=True),
    "odd widths": Case(widths=(H - 1, I - 4)),
    "up alone": Case(down=False),
    "down alone": Case(up=False),
    "no adapter": Case(up=False, down=False),
    ON_BLACKWELL: Case(),
    "frozen hidden states": Case(x_grad=False),
    "own code": Case(fused=False),
}
NOT_VARIANTS = {"", "dropout", "frozen hidden states", "own code"}

CONDITIONS = {
    "always": lambda case: True,
    "adapter on up": lambda case: case.up,
    "adapter on down": lambda case: case.down,
    "x needs a gradient": lambda case: case.x_grad,
    "post_norm": lambda case: not case.fused,
}


def projection(case, N, K, adapted):
    dtype = torch.bfloat16
    weight = torch.zeros(E, N, K, dtype=dtype)
    if case.transposed:
        weight = torch.zeros(E, K, N, dtype=dtype).transpose(1, 2)
    if case.quantized:
        weight = quantize(weight, case.quantized)
    if not adapted:
        return Projection(weight)
    S = E if case.experts is None else len(case.experts)
    A = torch.zeros(case.rank * S, K, requires_grad=True)
    B = torch.zeros(N, case.rank * S, requires_grad=True)
    return Projection(
        weight,
        None,
        A,
        B,
        dropout_p=case.dropout,
        experts=case.experts,
        rank_major=case.rank_major,
    )


def recorded(case, launches):
    """The kernels of one forward and of one backward."""
    H, I = case.widths  # noqa: E741
    up = projection(case, 2 * I, H, case.up)
    down = projection(case, H, I, case.down)
    x = torch.zeros(case.T, H, dtype=torch.bfloat16, requires_grad=case.x_grad)
    weights = torch.zeros(case.T, TOP_K, requires_grad=True)
    index = torch.zeros(case.T, TOP_K, dtype=torch.int64)
    activation = Activation()
    post_norm = None
    if not case.fused:
        activation = lambda pre: pre[:, :I] * pre[:, I:]  # noqa: E731
        post_norm = torch.clone
    names = []
    # the first launch of a kernel goes through Triton
    for _ in range(2):
        launches.clear()
        out = experts(
            x, index, weights, up, down, activation, post_norm=post_norm, recompute=case.recompute
        )
        forward = [name for name, *_ in launches]
        launches.clear()
        out.backward(torch.zeros_like(out))
        names = forward, [name for name, *_ in launches]
    return names


def documented(table, column, variant, case):
    """The kernels that the tables name, in order."""
    changes = [row for row in VARIANTS if row["variant"] == variant]
    everywhere = [row for row in changes if row["where"] == "everywhere"]
    if everywhere:
        assert [row[column] for row in everywhere] == ["as elsewhere"], "one line says it all"
        column = "kernels elsewhere"
        changes = [row for row in changes if row not in everywhere]
    found = []
    for row in table:
        if not all(CONDITIONS[word](case) for word in row["when"].split(", ")):
            continue
        own = kernels_in(row[column])
        for change in changes:
            where, steps = re.fullmatch(r"(before|after|instead of) (.*)", change["where"]).groups()
            if row["step"] in steps.split(", "):
                named = kernels_in(change[column])
                placed = {"before": named + own, "after": own + named, "instead of": named}
                own = placed[where]
        found += own
    return found


RECORDED = [(ON_BLACKWELL, BLACKWELL)]
RECORDED += [(v, gpu) for v in CASES if v != ON_BLACKWELL for gpu in (HOPPER, AMPERE)]


@pytest.mark.parametrize(("variant", "gpu"), RECORDED, ids=str)
def test_a_layer_launches_what_the_tables_say(variant, gpu, monkeypatch):
    case = CASES[variant]
    forward, backward = FORWARD, BACKWARD
    if not case.fused:
        forward, backward = STEPS_FORWARD, STEPS_BACKWARD
    launches = record_launches(monkeypatch, gpu)
    launched_forward, launched_backward = recorded(case, launches)
    assert launched_forward == documented(forward, COLUMNS[gpu], variant, case)
    assert launched_backward == documented(backward, COLUMNS[gpu], variant, case)


def test_every_variant_of_the_tables_is_recorded():
    assert {row["variant"] for row in VARIANTS} == set(CASES) - NOT_VARIANTS
    steps = {row["step"] for row in (*FORWARD, *BACKWARD)}
    named = {step for row in VARIANTS for step in re.findall(r"\b[A-Z]\d+\b", row["where"])}
    assert named <= steps


def test_every_kernel_is_listed_with_its_file():
    listed = {}
    for row in FILES:
        (name,) = kernels_in(row["kernel"])
        listed[name] = row["file"].strip("`")
    defined = {}
    for path in (PACKAGE / "ops" / "kernels").rglob("*.py"):
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(encoding="utf-8"), re.M):
            defined[name] = path.relative_to(PACKAGE).as_posix()
    assert listed == defined


def test_only_kernels_that_exist_are_named():
    listed = {name for row in FILES for name in kernels_in(row["kernel"])}
    for path in DOCUMENTS:
        assert set(kernels_in(path.read_text(encoding="utf-8"))) <= listed, path.name


# ---- names ---------------------------------------------------------------------------------------

ROOMS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"registration"}


def quoted(path):
    """What stands in backticks, or in a block of code."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


@every_document
def test_files_that_are_named_exist(path):
    for word in quoted(path):
        # a path of ours, not a placeholder, a pattern or a command
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", word) or "/" not in word:
            continue
        if not (word.endswith("/") or re.search(r"\.(py|md|toml|ipynb|safetensors)$", word)):
            continue
        assert (ROOT / word).exists() or (PACKAGE / word).exists(), f"{path.name}: {word}"


@every_document
def test_names_said_to_be_in_a_file_are_there(path):
    """`NAME` of `file.py`; in an item of a list, the names between its first two files."""
    text = path.read_text(encoding="utf-8")
    for name, file in re.findall(r"`(\w[\w.]*)`[^`.;]{0,40}\b(?:of|in) `([\w/.-]+\.py)`", text):
        assert name.split(".")[-1] in words_of(file), f"{path.name}: {name} of {file}"
    for file, item in re.findall(r"^\d+\. `([\w/.-]+\.py)`(?: [^:]*)?: (.*)", text, re.M):
        about_it = re.split(r"`[\w/.-]+(?:\.py|/)`|`python ", item)[0]
        for name in re.findall(r"`(\w+)", about_it):
            assert name in words_of(file), f"{path.name}: {name} in {file}"


def words_of(file):
    path = ROOT / file
    if not path.exists():
        path = PACKAGE / file
    return set(re.findall(r"\w+", path.read_text(encoding="utf-8")))


@every_document
def test_functions_that_are_named_can_be_imported(path):
    for word in quoted(path):
        if not re.fullmatch(r"\w+(\.\w+)+", word) or word.split(".")[0] not in ROOMS:
            continue
        if word.endswith((".py", ".md")):
            assert (ROOT / word).exists() or (PACKAGE / word).exists(), f"{path.name}: {word}"
            continue
        assert imported(word), f"{path.name}: peft_moe_lora.{word} does not exist"


def imported(dotted):
    """Whether peft_moe_lora.<dotted> is a module, or an attribute of one."""
    parts = dotted.split(".")
    for n in range(len(parts), -1, -1):
        try:
            found = importlib.import_module(".".join(["peft_moe_lora", *parts[:n]]))
        except ModuleNotFoundError as error:
            # a module that is there and lacks another package is not what is asked here
            if not str(error.name).startswith("peft_moe_lora"):
                raise
            continue
        for name in parts[n:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@every_document
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_names_of_the_glossary_are_used():
    used = set()
    for file in PACKAGE.rglob("*.py"):
        used |= set(re.findall(r"\w+", file.read_text(encoding="utf-8")))
    for table in (
        table for found in tables(ROOT / "docs" / "glossary.md").values() for table in found
    ):
        for row in table:
            for name in re.findall(r"`(\w+)`", row["name"]):
                assert name in used, f"nothing is called {name}"
