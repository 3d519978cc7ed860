"""The package's own rules: imports go down, Triton stays in the kernels, names are exact, import does nothing else."""

import ast
from pathlib import Path

import pytest

import peft_moe_lora

PACKAGE = Path(peft_moe_lora.__file__).parent

DOORS = {"cli", "registration"}
ROOMS = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}


def _imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, relative imports resolved from the package's root."""
    names = set()
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # a leading dot marks the package's own modules: ".ops.routing"
            own = "".join(f".{part}" for part in parts[: len(parts) - node.level])
            module = (
                node.module if not node.level else f"{own}.{node.module}" if node.module else own
            )
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_says_what_it_is_and_what_it_may_import(room):
    said = ast.get_docstring(
        ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    )
    assert said


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.glob("ops/**/*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_ops_know_nothing_of_peft_or_models(path):
    foreign = {name.split(".")[0] for name in _imported(path)} & {
        "peft",
        "transformers",
        "accelerate",
        "safetensors",
    }
    assert not foreign
    outside = {
        name for name in _imported(path) if name.startswith(".") and not name.startswith(".ops")
    }
    assert not outside, "ops import from ops alone"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.glob("**/*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_triton_stays_in_the_kernels(path):
    if "kernels" not in path.parts:
        assert not any(name.split(".")[0] == "triton" for name in _imported(path))


def test_all_is_exact():
    public = {name for name, value in vars(peft_moe_lora).items() if not name.startswith("_")}
    # submodules become attributes by being imported; register is called, not offered
    assert set(peft_moe_lora.__all__) == public - {*ROOMS, *DOORS, "register"}


def test_twins_and_kernels_have_the_same_names_and_signatures():
    kernels = {}
    for path in (PACKAGE / "ops" / "kernels").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                kernels[node.name] = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
    source = (PACKAGE / "ops" / "reference.py").read_text(encoding="utf-8")
    twins = {
        node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)
    }
    from peft_moe_lora.ops import reference

    for name in reference.__all__:
        twin = [a.arg for a in (*twins[name].args.args, *twins[name].args.kwonlyargs)]
        assert kernels.get(name) == twin, f"{name} differs between the twins and the kernels"
