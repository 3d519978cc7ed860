"""The messages that docs/troubleshooting.md quotes."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^- `(.+)`$", PAGE, re.MULTILINE)

# what stands for a value in a message of the page
DOTS = "..."


def is_quoted_from(message, text):
    """Whether a message of the page is a part of a text; DOTS stand for anything."""
    return re.search(".*".join(map(re.escape, message.split(DOTS))), text) is not None
