"""Arguments and options that several commands have."""

from pathlib import Path
from typing import Annotated, Literal

import typer

BASE_HELP = "The base model: a folder with a config.json, or a name on the hub."

# the names of WRITABLE and B_LAYOUTS of convert.formats, which a test compares: help
# does not import them, because it needs no torch
FormatName = Literal["moe_lora", "peft", "per_expert", "vllm_3d", "sglang_3d", "mlx", "gguf"]
BLayoutName = Literal["auto", "rank_major", "expert_major"]

Adapter = Annotated[Path, typer.Argument(help="Folder of an adapter, in any format.")]
BaseConfig = Annotated[str | None, typer.Option(help=BASE_HELP)]
BLayout = Annotated[BLayoutName, typer.Option(help="Order of lora_B under PEFT's keys.")]
Destination = Annotated[Path, typer.Argument(help="Folder to write.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the destination if it is an earlier output.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
