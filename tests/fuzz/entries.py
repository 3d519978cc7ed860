"""Every way into the package that reads an adapter's folder, from Python and from the shell.

An entry is called with a `Stage` and returns the logits that the adapter gave, or None where the
way in gives none.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from typer.testing import CliRunner

from fuzz.bases import Base
from fuzz.filled import logits_of
from peft_moe_lora import (
    MoELoraConfig,
    convert_adapter,
    inspect_adapter,
    load_peft_adapter,
    merge_adapter,
    verify_adapter,
)
from peft_moe_lora.cli import app

# documented exit codes; 2 is wrong usage, which no file can cause
OF_FILES = (3, 4)


class Stage(NamedTuple):
    """What an entry may use.

    Attributes:
        base: the base model and its checkpoint.
        adapter: folder of the damaged adapter.
        whole: folder of the adapter before it was damaged.
        out: a folder that may be written, which does not exist.
        model: a model to load into: the base, or the base with another adapter.
    """

    base: Base
    adapter: Path
    whole: Path
    out: Path
    model: torch.nn.Module


class Refused(Exception):
    """The command line refused; the argument is its line on stderr."""


def logits_of_folder(base, folder):
    return logits_of(PeftModel.from_pretrained(copy.deepcopy(base.model), folder))


def logits_of_checkpoint(base, folder):
    model = type(base.model).from_pretrained(folder, experts_implementation=None)
    model.set_experts_implementation("eager")
    return logits_of(model.double())


def logits_of_conversion(base, folder):
    """None where what was converted is refused on loading, such as a resized vocabulary."""
    try:
        return logits_of_folder(base, folder)
    except (ValueError, RuntimeError):
        return None


# ---- Python --------------------------------------------------------------------------------------


def from_pretrained(stage):
    return logits_of(PeftModel.from_pretrained(stage.model, stage.adapter))


def from_pretrained_low_memory(stage):
    return logits_of(PeftModel.from_pretrained(stage.model, stage.adapter, low_cpu_mem_usage=True))


def load_adapter(stage):
    stage.model.load_adapter(stage.adapter, adapter_name="damaged")
    stage.model.set_adapter("damaged")
    return logits_of(stage.model)


def from_pretrained_with_config(stage):
    config = MoELoraConfig.from_pretrained(stage.whole)
    return logits_of(PeftModel.from_pretrained(stage.model, stage.adapter, config=config))


def load_with_transformers(stage):
    stage.model.load_adapter(str(stage.adapter))
    return logits_of(stage.model)


def load_pefts(stage):
    return logits_of(load_peft_adapter(stage.model, stage.adapter))


def convert(stage):
    convert_adapter(stage.adapter, stage.out, to="moe_lora", base_config=stage.base.folder)
    return logits_of_conversion(stage.base, stage.out)


def convert_without_base(stage):
    convert_adapter(stage.adapter, stage.out, to="moe_lora")
    return logits_of_conversion(stage.base, stage.out)


def convert_to_peft(stage):
    convert_adapter(stage.adapter, stage.out, to="peft", base_config=stage.base.folder)
    return logits_of_conversion(stage.base, stage.out)


def convert_per_expert(stage):
    convert_adapter(stage.adapter, stage.out, to="per_expert", base_config=stage.base.folder)
    # PEFT does not read this format of every family
    try:
        return logits_of(load_peft_adapter(copy.deepcopy(stage.base.model), stage.out))
    except ValueError:
        # as in `logits_of_conversion`
        return None


def merge(stage):
    merge_adapter(stage.adapter, stage.base.folder, stage.out)
    return logits_of_checkpoint(stage.base, stage.out)


def verify(stage):
    assert verify_adapter(stage.adapter, stage.base.folder).ok


def compare(stage):
    """None where the comparison passes: then both adapters are the same."""
    found = verify_adapter(stage.whole, stage.base.folder, stage.adapter)
    if not found.ok:
        raise ValueError(f"{found.where} differs")


def inspect(stage):
    inspect_adapter(stage.adapter, stage.base.folder)


def inspect_without_base(stage):
    inspect_adapter(stage.adapter)


# ---- the command line ----------------------------------------------------------------------------


def _run(*arguments, codes=OF_FILES):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise AssertionError(f"{arguments[0]} printed a traceback") from done.exception
    if done.exit_code == 0:
        assert done.stdout
        assert done.stdout.replace("\n", "").isprintable()
        return
    assert done.exit_code in codes, (done.exit_code, done.output)
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert done.exit_code == 1 or not done.stdout
    raise Refused(line)


def shell_inspect(stage):
    _run("inspect", stage.adapter, "--base-config", stage.base.folder)


def shell_inspect_json(stage):
    _run("inspect", stage.adapter, "--json")


def shell_convert(stage):
    _run("convert", stage.adapter, stage.out, "--to", "moe_lora", "--quiet")
    return logits_of_conversion(stage.base, stage.out)


def shell_convert_with_base(stage):
    base = ("--base-config", stage.base.folder)
    _run("convert", stage.adapter, stage.out, "--to", "moe_lora", *base)
    return logits_of_conversion(stage.base, stage.out)


def shell_merge(stage):
    _run("merge", stage.adapter, stage.base.folder, stage.out)
    return logits_of_checkpoint(stage.base, stage.out)


def shell_verify(stage):
    _run("verify", stage.adapter, stage.base.folder)


def shell_compare(stage):
    _run("verify", stage.adapter, stage.base.folder, stage.whole, codes=(1, *OF_FILES))


# entries that PEFT's own code runs where the adapter is not in our format
OUR_FORMAT = {
    from_pretrained,
    from_pretrained_low_memory,
    from_pretrained_with_config,
    load_adapter,
    load_with_transformers,
}
# entries that load beside another adapter
BESIDE = {load_adapter}
ENTRIES = [
    from_pretrained,
    from_pretrained_low_memory,
    from_pretrained_with_config,
    load_adapter,
    load_with_transformers,
    load_pefts,
    convert,
    convert_without_base,
    convert_to_peft,
    convert_per_expert,
    merge,
    verify,
    compare,
    inspect,
    inspect_without_base,
    shell_inspect,
    shell_inspect_json,
    shell_convert,
    shell_convert_with_base,
    shell_merge,
    shell_verify,
    shell_compare,
]
