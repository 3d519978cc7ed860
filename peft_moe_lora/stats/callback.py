"""Expert loads of a training run, logged through the Trainer."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from ..parallel.batches import sum_over_batches
from .load import ExpertLoad
from .watch import RoutingWatch

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


class ExpertLoadCallback(TrainerCallback):
    """Logs how even the routing was since the last log, each time the Trainer logs.

        trainer.add_callback(ExpertLoadCallback(trainer))

    It logs `expert_load/max_violation` (the mean over the layers),
    `expert_load/largest_max_violation`, `expert_load/dead_experts` (the experts of all layers that
    got no row) and, with `per_layer`, `expert_load/max_violation/<path>` of each layer with rows.

    The rows of all training micro-batches are counted. Evaluation, padding and forwards that
    gradient checkpointing recomputes are not counted. The counts of all processes are summed once
    per log; a batch that several processes share counts once.

    Args:
        trainer: the Trainer that logs the metrics.
        per_layer: whether to log the max violation of every layer too.
    Attributes:
        last: the load between the last two logs, of all processes; None before the first log.
        total: the load from the start of training to the last log; after training, to its end.
    """

    def __init__(self, trainer: "Trainer", per_layer: bool = False) -> None:
        self.trainer = trainer
        self.per_layer = per_layer
        self.last: ExpertLoad | None = None
        self.total: ExpertLoad | None = None
        self._watch: RoutingWatch | None = None
        self._add: Callable[[torch.Tensor], None] | None = None

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None, "the Trainer passes its model"
        self.last = None
        self.total = None
        if self._watch is not None:
            self._watch.remove()
        self._watch = RoutingWatch(model, when=lambda: model.training)
        self._add = sum_over_batches(model)

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not control.should_log:
            return
        from transformers import Trainer

        load = self._take()
        metrics = load.metrics()
        if self.per_layer:
            for path, violation in load.max_violation.items():
                # NaN: the layer got no row
                if not math.isnan(violation):
                    metrics[f"max_violation/{path}"] = violation
        # the base class's method, because a subclass's may do more: TRL's also logs the metrics of
        # the steps, and they belong to the next log
        Trainer.log(self.trainer, {f"expert_load/{name}": value for name, value in metrics.items()})
        # `log` has set should_log to False, but the loss still has to be logged
        control.should_log = True

    def on_train_end(
        self,
        args: "TrainingArguments",
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        self._take()
        if self._watch is not None:
            self._watch.remove()

    def _take(self) -> ExpertLoad:
        """The load of all processes since the last call, also added to `total`."""
        assert self._watch is not None, "on_train_begin creates the watch"
        load = ExpertLoad(self._watch.take(self._add))
        self.last = load
        if self.total is None:
            self.total = load
        else:
            self.total = self.total + load
        return load
