"""The package's own rules that no linter holds: what rooms say, where Triton stays, exact names.

The order of the rooms is import-linter's, in `make lint`.
"""

import ast
from pathlib import Path

import pytest

import peft_moe_lora

PACKAGE = Path(peft_moe_lora.__file__).parent
ROOMS = sorted(path.parent for path in PACKAGE.rglob("*/__init__.py"))
OUTSIDE_KERNELS = sorted(
    set(PACKAGE.rglob("*.py")) - set((PACKAGE / "ops" / "kernels").rglob("*.py"))
)


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _imported(path: Path) -> set[str]:
    """The libraries that a file imports, without the modules of its own package."""
    libraries = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            libraries |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            libraries.add(node.module.partition(".")[0])
    return libraries


def _functions(path: Path) -> dict[str, list[str]]:
    """{name: names of its parameters} of the plain functions at the top level of a file."""
    return {
        node.name: [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
        for node in _parsed(path).body
        if isinstance(node, ast.FunctionDef) and not node.decorator_list
    }


@pytest.mark.parametrize("room", ROOMS, ids=_relative)
def test_a_room_says_what_it_is_and_what_it_may_import(room):
    assert ast.get_docstring(_parsed(room / "__init__.py"))


def test_every_room_has_a_folder_of_tests():
    rooms = {room.name for room in ROOMS if room.parent == PACKAGE}
    assert rooms <= {path.name for path in Path(__file__).parent.iterdir()}


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=_relative)
def test_ops_know_nothing_of_peft_or_models(path):
    assert not _imported(path) & {"peft", "transformers", "accelerate", "safetensors"}


@pytest.mark.parametrize("path", OUTSIDE_KERNELS, ids=_relative)
def test_triton_stays_in_the_kernels(path):
    assert "triton" not in _imported(path)


def test_a_kernel_takes_few_arguments():
    """What belongs together is a named tuple (`ops.kernels.operands`)."""
    taken = {}
    for path in (PACKAGE / "ops" / "kernels").rglob("*.py"):
        for node in _parsed(path).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                taken[f"{path.stem}.{node.name}"] = len(node.args.args)
    assert taken["linear_general._linear_kernel"] == 15
    assert {name: number for name, number in taken.items() if number > 15} == {}


def test_all_is_exact():
    public = {name for name, value in vars(peft_moe_lora).items() if not name.startswith("_")}
    # submodules become attributes when they are imported; `register` is called, not offered
    modules = {path.stem for path in PACKAGE.iterdir()}
    assert set(peft_moe_lora.__all__) == public - modules - {"register"}


def test_twins_and_kernels_have_the_same_names_and_signatures():
    from peft_moe_lora.ops import reference

    kernels = {}
    for path in (PACKAGE / "ops" / "kernels").rglob("*.py"):
        kernels |= _functions(path)
    twins = _functions(PACKAGE / "ops" / "reference.py")
    for name in reference.__all__:
        assert kernels.get(name) == twins[name], f"{name} differs between twins and kernels"
