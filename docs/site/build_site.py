"""Builds the documentation site into build/site/html; a warning is an error."""

import re
import shutil
import subprocess
import sys

from site_pages import CONFIG, ROOT, gather

BUILD = ROOT / "build" / "site"

# Zensical logs what mkdocstrings and griffe find, and does not count it among its issues
_COMPLAINT = re.compile(r"^(?:griffe|mkdocstrings): .*$", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def build() -> int:
    """Gather the pages and run Zensical; the exit code."""
    shutil.rmtree(BUILD, ignore_errors=True)
    gather(BUILD / "pages")
    shutil.copy(CONFIG, BUILD)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    command += ["--config-file", str(BUILD / CONFIG.name)]
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = _COLOUR.sub("", ran.stdout)
    print(said, end="")
    return ran.returncode or int(_COMPLAINT.search(said) is not None)


if __name__ == "__main__":
    sys.exit(build())
