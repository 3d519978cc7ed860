"""The table of families in docs/guides/, made from the installed transformers.

    python tests/families/families_table.py

Every class of routed experts in transformers' modeling files is built with tiny sizes, and read as
an adapter reads it.
"""

import re
import sys
from functools import cache
from pathlib import Path

import transformers
from torch import nn

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from families.off_interface import BUILD
from helpers import MODELS, build_experts, build_step3p7, interface_families
from peft_moe_lora.experts.families import NOT_YET
from peft_moe_lora.experts.layout import read_layout

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "experts-routers-attention.md"
BEGIN, END = (
    "<!-- made by tests/families/families_table.py from transformers {} -->\n",
    "<!-- end -->\n",
)

WHOLE, BETWEEN, ONE = (
    "fused whole",
    "fused products, the model's own code between",
    "one fused product per module",
)
LINEAR, NOT = "are linear layers: PEFT's own LoRA, by their names", "not yet"
OUTCOMES = (WHOLE, BETWEEN, ONE, LINEAR, NOT)


def outcome(module: nn.Module) -> tuple[str, str]:
    """How a module's experts run with an adapter, and why they are not fused."""
    layout = read_layout(module)
    if len(layout.projections) == 1:
        return ONE, ""
    if layout.activation is not None:
        return WHOLE, ""
    if getattr(module, "has_post_expert_norm", False):
        return BETWEEN, "a norm after down"
    if len(layout.gate_up.weights) > 1:
        return BETWEEN, "gate and up are two parameters"
    return BETWEEN, "an activation no kernel has"


@cache
def undecorated() -> dict[str, tuple[str, str]]:
    """Class called experts, off the interface -> its family and base class."""
    found = {}
    on_the_interface = {name for _, name in interface_families()}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        for name, base in re.findall(
            r"^class (\w*Experts)\(nn\.(\w+)\)", path.read_text("utf-8"), re.MULTILINE
        ):
            # shared experts are chosen by no router
            if name not in on_the_interface and "Shared" not in name:
                found[name] = path.parent.name, base
    return found


@cache
def families() -> dict[str, tuple[str, str]]:
    """Family -> how its experts run, and why; each layer or class where those of one differ.

    Raises:
        KeyError: for a class of experts that nothing here knows how to build.
    """
    found: dict[str, tuple[str, str]] = {}
    for family, name in interface_families():
        told = outcome(build_experts(family, name))
        found[family if found.get(family, told) == told else f"{family} {name}"] = told
    for family, base in undecorated().values():
        if base == "ModuleDict":
            found[family] = (LINEAR, "")
        elif family == "step3p7":
            experts = build_step3p7()
            found["step3p7 with a clamp"] = outcome(experts)
            experts.limit = float("inf")
            found[family] = outcome(experts)
        else:
            found[family] = outcome(BUILD[family]())
    return found | {name: (NOT, why) for name, why in NOT_YET.items()}


def table(found: dict[str, tuple[str, str]]) -> str:
    lines = ["| experts | of |", "| --- | --- |"]
    for what in OUTCOMES:
        named = [
            name + (f" ({why})" if why else "")
            for name, (told, why) in sorted(found.items())
            if told == what
        ]
        lines.append(f"| {what} | {', '.join(named)} |")
    return BEGIN.format(transformers.__version__) + "\n".join(lines) + "\n" + END


def written() -> tuple[str, str]:
    """The version that the page's table was made from, and the table."""
    pattern = re.escape(BEGIN).replace(r"\{\}", r"(\S+)") + ".*?" + re.escape(END)
    match = re.search(pattern, PAGE.read_text("utf-8"), re.DOTALL)
    assert match, f"{PAGE} has no lines {BEGIN!r} and {END!r}"
    return match[1], match[0]


def read(text: str) -> dict[str, tuple[str, str]]:
    """The inverse of `table`."""
    found = {}
    for line in text.splitlines():
        what, _, names = line.strip("| ").partition(" | ")
        if what in OUTCOMES:
            for name, why in re.findall(r"([^,(]+?)(?: \(([^)]*)\))?(?:, |$)", names):
                found[name] = (what, why)
    return found


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text("utf-8").replace(written()[1], table(families())), "utf-8")
