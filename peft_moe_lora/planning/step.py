"""One training step of a model with an adapter, run on the meta device.

The model's own code runs, so a family needs no formula of its own. What stands in for kernels is in
`stand_ins`; what the optimizer takes is in `optimizers`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..config import MoELoraConfig
from ..experts.layout import is_experts
from ..functional.checkpointing import keep_experts
from ..ops.quantize import quantize
from .optimizers import DEFAULT_OPTIM, OPTIMIZERS
from .stand_ins import NAME, ChunkedLoss, attention_stand_in, norms_stand_in
from .trace import Trace
from .work import Work

# experts in 4 and 8 bits are decoded into at most so much, or into one expert where that is larger
DECODED = 128 * 2**20
# errors that the code of a model class may raise on the meta device
_CANNOT_RUN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Batch:
    """What a step computes.

    Attributes:
        sequences: of the batch.
        length: of a sequence, in tokens, without padding.
        checkpointing: whether every layer is computed again in backward.
        liger: whether Liger's RMSNorm and loss run: logits are formed for a part of the tokens at a
            time.
        experts: "nf4", "fp4" or "int8" where the experts are quantized, else None.
        keep_experts: whether the experts of a checkpointed layer run once.
        optim: the optimizer, by its name in `OPTIMIZERS`.
    """

    sequences: int
    length: int
    checkpointing: bool
    liger: bool
    experts: str | None
    keep_experts: bool = False
    optim: str = DEFAULT_OPTIM


@dataclass(frozen=True)
class Step:
    """What a step takes, in bytes, and its time.

    Attributes:
        weights: of the frozen model.
        pairs: of A and B, and of whatever else is trained.
        optimizer: of AdamW's state.
        gradients: at the moment of the peak.
        activations: at the moment of the peak, what forward keeps for backward.
        loss: at the moment of the peak, what head and cross entropy need beyond activations.
        transient: at the moment of the peak, what one layer's backward needs beyond activations.
        largest_layer: weights and pairs of the largest block of layers.
        trainable: number of trained parameters.
        seconds: name of a GPU -> time of the step.
    """

    weights: int
    pairs: int
    optimizer: int
    gradients: int
    activations: int
    loss: int
    transient: int
    largest_layer: int
    trainable: int
    seconds: dict[str, float]

    @property
    def peak(self) -> int:
        """The most bytes that are allocated during the step."""
        return self.held + self.gradients + self.own_batch

    @property
    def held(self) -> int:
        """Bytes that are there all the time."""
        return self.weights + self.pairs + self.optimizer

    @property
    def own_batch(self) -> int:
        """Bytes that belong to the batch."""
        return self.activations + self.loss + self.transient


def run_step(config: PreTrainedConfig, adapter: MoELoraConfig, batch: Batch) -> Step:
    """Run one step on the meta device.

    Raises:
        ValueError: if the model cannot be built from its configuration, or its code needs the
            values of a tensor.
    """
    trace = Trace()
    with attention_stand_in(trace):
        try:
            model, stored = _build(config, adapter, batch)
            trace.decoding = _decoding(model, batch)
            if batch.liger:
                norms_stand_in(model, trace)
            windows = _run(model, batch, trace)
        except _CANNOT_RUN as error:
            raise ValueError(
                f"a step of model_type={config.model_type!r} cannot be run on the meta device: "
                f"{error}. Measure one step on the GPU instead."
            ) from error
    trained = {id(p): p for p in model.parameters() if p.requires_grad}.values()
    pairs = sum(p.nbytes for p in trained)
    sizes = [p.numel() for p in trained]
    optimizer = OPTIMIZERS[batch.optim]
    state = optimizer.state_bytes(sizes)
    # A, B and the state are read and written, the gradients read
    trace.add(Work(nbytes=3 * pairs + 2 * state, launches=optimizer.launches(len(sizes))))
    return Step(
        weights=stored - pairs,
        pairs=pairs,
        optimizer=state,
        largest_layer=_largest_layer(model, batch),
        trainable=sum(sizes),
        seconds=trace.seconds,
        **windows.parts(pairs),
    )


@dataclass
class Windows:
    """The peaks of the three parts of a step, in bytes beyond weights, pairs and optimizer.

    Attributes:
        kept: what is alive when head and loss begin.
        forward, loss, backward: the most that is alive in each part.
        gradients: bytes of gradients at the peak of backward.
    """

    kept: int = 0
    forward: int = 0
    loss: int = 0
    backward: int = 0
    gradients: int = 0

    def parts(self, trained: int) -> dict[str, int]:
        """Gradients, activations, loss and transient memory at the highest of the peaks.

        Args:
            trained: bytes of all gradients, which the optimizer's step has.
        """
        highest = max(self.forward, self.loss, self.backward, trained)
        if highest == self.loss:
            rest = {"gradients": 0, "loss": self.loss - self.kept, "transient": 0}
            return {"activations": self.kept, **rest}
        gradients = self.gradients
        if highest == self.forward:
            gradients = 0
        elif highest == trained:
            gradients = trained
        activations = min(self.kept, highest - gradients)
        transient = highest - gradients - activations
        return {
            "activations": activations,
            "gradients": gradients,
            "loss": 0,
            "transient": transient,
        }


def _build(config: PreTrainedConfig, adapter: MoELoraConfig, batch: Batch) -> tuple[PeftModel, int]:
    """The model with its adapter on the meta device, and the bytes that it stores."""
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=NAME
        )
    base.requires_grad_(False)
    stacks = [p for module in base.modules() if is_experts(module) for p in _stacks(module)]
    if not stacks:
        raise ValueError("it has no experts modules")
    model = get_peft_model(base, adapter)
    if batch.checkpointing:
        _enable_checkpointing(base, batch.keep_experts)
    # backward then goes through every layer, as with checkpointing or a quantized base
    base.enable_input_require_grads()
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    stored = sum(t.nbytes for t in tensors)
    for stack in stacks:
        stored += _stored_bytes(stack, batch.experts) - stack.nbytes
    return model.train(), stored


def _stacks(module: nn.Module) -> Iterator[torch.Tensor]:
    """The weights of an experts module; a bias has two dimensions."""
    return (p for p in module.parameters() if p.ndim == 3)


def _enable_checkpointing(base: PreTrainedModel, keeps: bool) -> None:
    options: dict[str, Any] = {"use_reentrant": False}
    if keeps:
        options["context_fn"] = keep_experts
    # transformers 5.17 has only the old name, 5.23 warns of it; drop when the floor moves
    word = "gradient"
    if hasattr(base, "activation_checkpointing_enable"):
        word = "activation"
    getattr(base, f"{word}_checkpointing_enable")(options)


def _stored_bytes(stack: torch.Tensor, experts: str | None) -> int:
    """Bytes of a stack of experts, quantized or not."""
    if experts is None:
        return stack.nbytes
    # whole rows, because int8 has a scale for each; some tables are as large for any stack
    rows = 256
    few, more = (
        quantize(torch.ones(1, n, stack.shape[2], dtype=stack.dtype), experts).nbytes
        for n in (rows, 2 * rows)
    )
    each = (more - few) / rows
    return round(few + each * (stack.numel() / stack.shape[2] - rows))


def _decoding(model: nn.Module, batch: Batch) -> int:
    """Bytes into which a layer decodes its experts; 0 if they are not quantized."""
    if batch.experts is None:
        return 0
    stacks = [p for m in model.modules() if is_experts(m) for p in _stacks(m)]
    return max(min(max(DECODED, stack[0].nbytes), stack.nbytes) for stack in stacks)


def _largest_layer(model: nn.Module, batch: Batch) -> int:
    """Bytes of the largest block of a list of blocks."""
    sizes = [0]
    for blocks in model.modules():
        if not isinstance(blocks, nn.ModuleList):
            continue
        for block in blocks:
            stacks = {id(p) for m in block.modules() if is_experts(m) for p in _stacks(m)}
            sizes.append(
                sum(
                    _stored_bytes(p, batch.experts) if id(p) in stacks else p.nbytes
                    for p in block.parameters()
                )
            )
    return max(sizes)


def _run(model: PeftModel, batch: Batch, trace: Trace) -> Windows:
    """Forward and backward."""
    # PEFT does not annotate which class this is
    base: Any = model.get_base_model()
    windows = Windows()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(trace.count_gradient)

    def loss_begins(hidden: torch.Tensor) -> None:
        windows.kept = trace.live
        windows.forward = trace.peak
        trace.start_window()
        hidden.register_hook(loss_ended)

    def loss_ended(_: torch.Tensor) -> None:
        windows.loss = trace.peak
        trace.start_window()

    ids = torch.zeros(batch.sequences, batch.length, dtype=torch.int64, device=model.device)
    with trace:
        if batch.liger:
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            loss_begins(hidden)
            head = base.get_output_embeddings().weight
            loss = ChunkedLoss.apply(hidden.flatten(0, 1), head, trace)
        else:
            head = base.get_output_embeddings()
            head.register_forward_pre_hook(lambda _, args: loss_begins(args[0]))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    windows.backward = trace.peak
    windows.gradients = trace.peak_gradients
    return windows
