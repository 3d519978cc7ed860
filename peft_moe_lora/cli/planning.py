"""`peft-moe-lora plan`."""

from typing import Annotated, Literal

import typer

from .answers import Answer

# ops.quantize.FORMATS, planning.gpus.COUNTS and planning.optimizers.OPTIMIZERS, which a test
# compares
QuantName = Literal["nf4", "fp4", "int8"]
GpuCount = Literal["1", "2", "4", "8"]
OptimName = Literal["adamw_torch_fused", "adamw_8bit"]


def plan(
    model: Annotated[str, typer.Argument(help="A folder with a config.json, or a hub name.")],
    r: Annotated[int, typer.Option("--r", min=1, help="Rank of each update.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of a batch, on each GPU.")] = 1,
    quant: Annotated[QuantName | None, typer.Option(help="Quantize the experts.")] = None,
    gpus: Annotated[
        GpuCount | None, typer.Option(help="Use so many GPUs; by default as few as possible.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="What is adapted; may be repeated. [default: experts q_proj k_proj v_proj o_proj]"
        ),
    ] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute every layer again in backward.")
    ] = False,
    keep_experts: Annotated[
        bool, typer.Option("--keep-experts", help="Of these layers, run the experts once.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="With torch.compile.")] = False,
    liger: Annotated[bool, typer.Option("--liger", help="With Liger's norms and loss.")] = False,
    optim: Annotated[
        OptimName, typer.Option(help="The optimizer, by its name in TrainingArguments.")
    ] = "adamw_torch_fused",
) -> Answer:
    """Say what a training step needs: memory by part, GPUs, time; no GPU and no weights needed."""
    from ..planning.plan import DEFAULT_TARGETS
    from ..planning.plan import plan as planned

    found = planned(
        model,
        r=r,
        length=length,
        batch=batch,
        quant=quant,
        gpus=int(gpus) if gpus else None,
        checkpointing=checkpointing,
        keep_experts=keep_experts,
        compile=compile,
        liger=liger,
        optim=optim,
        target_modules=target or DEFAULT_TARGETS,
    )
    return Answer(found.found())
