"""Docstrings of this package in the form that griffe reads.

Here a section's text may start on the line of its name, and one line may describe several
parameters, each by itself:

    Returns: [M, N], dtype of x.
    Args:
        blocksize, double_quant: as in `quantize_experts`.

griffe wants an empty line before each section, its text below its name, and a line for each
parameter.
"""

import re

import griffe

_SECTION = re.compile(
    r"^(?P<name>Args|Attributes|Returns|Raises|Source|Legend):[ ]*(?P<text>.*)$", re.MULTILINE
)
# a line, and the lines below it that are indented further
_SEVERAL = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+)(?P<text>: .*(?:\n(?P=indent) .*)*)$", re.MULTILINE
)


def in_sections(text: str) -> str:
    """The docstring with its sections as griffe wants them."""
    text = _SEVERAL.sub(_one_line_each, text)
    return _SECTION.sub(_text_below_name, text)


def _one_line_each(found: re.Match[str]) -> str:
    names = found["names"].split(", ")
    return "\n".join(found["indent"] + name + found["text"] for name in names)


def _text_below_name(found: re.Match[str]) -> str:
    heading = f"\n{found['name']}:"
    if found["text"]:
        return f"{heading}\n    {found['text']}"
    return heading


class Sections(griffe.Extension):
    """Rewrites every docstring when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = in_sections(obj.docstring.value)
