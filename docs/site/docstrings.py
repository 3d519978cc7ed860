"""Docstrings of this package in the form that griffe reads.

Here a section's text may start on the line of its name, and one line may describe several
parameters:

    Returns: [M, N], dtype of x.
    Args:
        blocksize, double_quant: as in `quantize_experts`.

griffe wants an empty line before each section, its text indented below its name, and a line for
each parameter.
"""

import re

import griffe

_SECTION = re.compile(r"(?P<name>Args|Attributes|Returns|Raises|Source|Legend):(?P<text>.*)")
_SEVERAL = re.compile(r"(?P<indent> +)(?P<names>\w+(?:, \w+)+):(?P<text>.*)")


def in_sections(text: str) -> str:
    """The docstring with its sections as griffe wants them."""
    lines = []
    section = ""
    for line in text.splitlines():
        found = _SECTION.fullmatch(line)
        several = _SEVERAL.fullmatch(line)
        if found:
            section = found["name"]
            lines += ["", f"{section}:"]
            if found["text"]:
                lines.append(f"    {found['text'].strip()}")
        elif several and section in ("Args", "Attributes"):
            for name in several["names"].split(", "):
                lines.append(f"{several['indent']}{name}:{several['text']}")
        else:
            lines.append(line)
    return "\n".join(lines)


class Sections(griffe.Extension):
    """Rewrites every docstring when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = in_sections(obj.docstring.value)
