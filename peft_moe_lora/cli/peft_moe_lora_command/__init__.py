"""The console script `peft-moe-lora`, which prints its help without importing torch.

Importing `peft_moe_lora` imports PEFT and transformers, which takes seconds. A wheel therefore
holds this folder as a package of its own. It runs `peft_moe_lora.cli` under its own name, and
leaves `peft_moe_lora` to the first command that imports it.
"""

import importlib.util
import sys
from pathlib import Path


def main() -> None:
    """Run the command line."""
    # finding a package does not run it
    package = importlib.util.find_spec("peft_moe_lora")
    assert package is not None and package.origin is not None, "the wheel holds both packages"
    folder = Path(package.origin).parent / "cli"
    spec = importlib.util.spec_from_file_location(
        "peft_moe_lora.cli", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None, "the wheel holds the folder"
    cli = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = cli
    spec.loader.exec_module(cli)
    cli.main()
