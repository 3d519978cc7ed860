"""`plan`: does a training step fit, on which GPUs, and how long does it take?"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, TrainingArguments

from ..config import MoELoraConfig
from ..ops.quantize import FORMATS
from .gpus import CALIBRATED, COUNTS, GIB, GPUS, how_many
from .optimizers import DEFAULT_OPTIM, OPTIMIZERS, optimizer_of
from .step import Batch, Step, run_step

# the time of a compiled step over that of an eager one: 8 layers of Qwen3-30B-A3B, 4 x 2048 tokens
# (H200, 2026-11-29)
COMPILED = 0.80
DEFAULT_TARGETS = ("experts", "q_proj", "k_proj", "v_proj", "o_proj")
PARTS = ("weights", "pairs", "optimizer", "gradients", "activations", "loss", "transient")


@dataclass(frozen=True)
class Plan:
    """What a training step needs.

    Attributes:
        model: name of the model, or its model_type.
        adapter: the adapter.
        batch: the batch.
        compiled: whether the model is compiled.
        step: the step's memory in bytes, and its times.
        gpus: name of a GPU -> how many of them hold the step under FSDP2; None if one node does not
            hold it. With `gpus` given, None if so many do not.
    """

    model: str
    adapter: MoELoraConfig
    batch: Batch
    compiled: bool
    step: Step
    gpus: dict[str, int | None]

    @property
    def peak_gib(self) -> float:
        """The most memory that tensors take on one GPU, in GiB."""
        return self.step.peak / GIB

    def milliseconds(self, gpu: str = CALIBRATED) -> float:
        """Estimated time of a step on one GPU of a name in `gpus`."""
        factor = 1.0
        if self.compiled:
            factor = COMPILED
        return 1e3 * self.step.seconds[gpu] * factor

    def assumptions(self) -> list[str]:
        """What the numbers take for granted."""
        optimizer = OPTIMIZERS[self.batch.optim]
        found = [
            f"bf16 weights and activations, fp32 A and B, {optimizer.words}, no padding, "
            "one GPU a batch",
            "memory: what PyTorch allocates; a GPU needs 1 GiB and 5 % more, which 'gpus' includes",
            "attention keeps no [length, length] matrix (sdpa or flash attention)",
            f"time: fitted to steps on an {CALIBRATED}; for other GPUs by their data sheets alone",
        ]
        if self.compiled:
            found.append("compile: memory as in eager mode, which is an upper bound")
        if not optimizer.sharded:
            found.append(
                f"{self.batch.optim}: needs bitsandbytes; one GPU alone, because it does not take "
                "the DTensors of FSDP2; nobody has compared its memory with a GPU"
            )
        if any(count not in (None, 1) for count in self.gpus.values()):
            found.append("several GPUs: FSDP2 divides what is held; a batch on every GPU")
        return found

    def paste(self) -> list[str]:
        """Lines of Python that configure the step."""
        names = ", ".join(f'"{name}"' for name in self._targets())
        lines = [
            f"config = MoELoraConfig(r={self.adapter.r}, lora_alpha={self.adapter.lora_alpha}, "
            f"target_modules=[{names}])",
            "arguments = TrainingArguments(",
            f"    per_device_train_batch_size={self.batch.sequences},",
            f'    optim="{self.batch.optim}",',
        ]
        if self.batch.checkpointing:
            lines.append(f"    {_checkpointing_field()}=True,")
        if self.batch.keep_experts:
            options = '{"use_reentrant": False, "context_fn": keep_experts}'
            lines.append(f"    {_checkpointing_field()}_kwargs={options},")
        if self.compiled:
            lines.append("    torch_compile=True,")
        if self.batch.liger:
            lines.append("    use_liger_kernel=True,")
        lines.append(")")
        if self.batch.experts is not None:
            load = f'base = load_quantized({self.model!r}, "{self.batch.experts}", '
            lines.insert(0, load + 'dtype="bfloat16", device_map="cuda")')
        return lines

    def found(self) -> dict[str, Any]:
        """Names and values, as JSON holds them; memory in GiB."""
        gib = {part: round(getattr(self.step, part) / GIB, 2) for part in PARTS}
        gib["A and B"] = gib.pop("pairs")
        gpus = {}
        for name, count in self.gpus.items():
            said = "no"
            if count == 1:
                said = f"1, {self.milliseconds(name):.0f} ms a step"
            elif count is not None:
                said = str(count)
            gpus[name] = said
        return {
            "model": self.model,
            "batch": f"{self.batch.sequences} x {self.batch.length} tokens",
            "trainable": self.step.trainable,
            "peak_gib": round(self.peak_gib, 2),
            "gib": gib,
            "gpus": gpus,
            "paste": self.paste(),
            "assumptions": self.assumptions(),
        }

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {gib}" for name, gib in self.found()["gib"].items())
        return (
            f"{self.model}: {self.peak_gib:.1f} GiB at most ({parts}), "
            f"{self.step.trainable:,} trained parameters, {self.milliseconds():.0f} ms a step on "
            f"one {CALIBRATED}"
        )

    def _targets(self) -> Sequence[str]:
        targets = self.adapter.target_modules or ()
        if isinstance(targets, str):
            return [targets]
        return sorted(targets)


def _checkpointing_field() -> str:
    # transformers 5.17 has only the old name, 5.23 warns of it; drop when the floor moves
    names = {field.name for field in fields(TrainingArguments)}
    if "activation_checkpointing" in names:
        return "activation_checkpointing"
    return "gradient_checkpointing"


def plan(
    model: str | PreTrainedConfig,
    *,
    r: int = 16,
    length: int = 2048,
    batch: int = 1,
    quant: str | None = None,
    gpus: int | None = None,
    checkpointing: bool = False,
    keep_experts: bool = False,
    compile: bool = False,
    liger: bool = False,
    optim: str = DEFAULT_OPTIM,
    target_modules: Sequence[str] = DEFAULT_TARGETS,
) -> Plan:
    """Find what a training step of a model needs, without a GPU and without its weights.

    The model is built on the meta device from its configuration, and one step runs there: forward,
    backward, AdamW. Every tensor is followed, so memory is that of the model's own code.

    Args:
        model: name of a model on the hub, a folder with a config.json, or a configuration.
        r: rank; lora_alpha is 2 r.
        length: tokens of a sequence.
        batch: sequences of a batch on each GPU.
        quant: "nf4", "fp4" or "int8" for quantized experts; None for bf16.
        gpus: how many GPUs there are; None looks for the least number of each kind.
        checkpointing: whether every layer is computed again in backward.
        keep_experts: whether the experts of such a layer run once (`keep_experts`).
        compile: whether the model is compiled.
        liger: whether Liger's RMSNorm and loss are used.
        optim: "adamw_torch_fused", or "adamw_8bit", bitsandbytes' AdamW with moments in 8 bits: the
            names of TrainingArguments.
        target_modules: as in `MoELoraConfig`.
    Raises:
        ValueError: if a number is not positive, `quant`, `gpus` or `optim` is not known, a name in
            target_modules matches nothing, keep_experts is given without checkpointing, adamw_8bit
            is given with several GPUs, or the step cannot be run on the meta device.
        OSError: if there is no such configuration.
    """
    for name, value in (("r", r), ("length", length), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if quant not in (None, *FORMATS):
        raise ValueError(f"quant must be None or one of {FORMATS}, got {quant!r}.")
    if gpus not in (None, *COUNTS):
        raise ValueError(f"gpus must be None or one of {COUNTS}, got {gpus!r}.")
    if keep_experts and not checkpointing:
        raise ValueError("keep_experts=True needs checkpointing; give checkpointing=True too.")
    optimizer = optimizer_of(optim, gpus)
    config = model
    if isinstance(config, str):
        config = AutoConfig.from_pretrained(config)
    adapter = MoELoraConfig(
        r=r, lora_alpha=2 * r, target_modules=list(target_modules), task_type="CAUSAL_LM"
    )
    name = model if isinstance(model, str) else config.name_or_path or config.model_type
    settings = Batch(batch, length, checkpointing, liger, quant, keep_experts, optim)
    step = run_step(config.get_text_config(), adapter, settings)
    if keep_experts:
        # the first step finds out whether the output of experts is kept in all others
        step = run_step(config.get_text_config(), adapter, settings)
    if not optimizer.sharded:
        gpus = 1
    counts = {
        gpu.name: how_many(
            gpu, step.held + step.gradients, step.own_batch, step.largest_layer, gpus
        )
        for gpu in GPUS
    }
    return Plan(name, adapter, settings, compile, step, counts)
