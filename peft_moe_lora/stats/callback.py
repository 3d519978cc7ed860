"""Expert loads of a training run, logged through the Trainer."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from ..parallel.batches import sum_over_batches
from .load import ExpertLoad
from .reporters import Reporters
from .watch import RoutingWatch

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


class ExpertLoadCallback(TrainerCallback):
    """Logs how even the routing was since the last log, each time the Trainer logs.

        Trainer(..., callbacks=[ExpertLoadCallback()])

    What it logs; a row is one token at one expert:

    - `expert_load/max_violation`: how far the busiest expert is above the mean of its layer,
      (max - mean) / mean; the mean over the layers. 0 is even.
    - `expert_load/largest_max_violation`: the same of the most uneven layer.
    - `expert_load/dead_experts`: how many experts of all layers got no row.
    - `expert_load/max_violation/<path>`, with `per_layer`: that of one layer.
    - `expert_load/heatmap`: a picture, a row for each layer and a column for each expert, for
      TensorBoard and W&B where `report_to` names them.

    The rows of all training micro-batches are counted. Evaluation, padding and forwards that
    gradient checkpointing recomputes are not counted. The counts of all processes are summed once
    per log; a batch that several processes share counts once.

    Args:
        trainer: the Trainer that logs the numbers with its own. Without one, they go to
            `state.log_history`, and to TensorBoard and W&B directly.
        per_layer: whether to log the max violation of every layer too.
    Attributes:
        last: the load between the last two logs, of all processes; None before the first log.
        total: the load from the start of training to the last log; after training, to its end.
    """

    def __init__(self, trainer: "Trainer | None" = None, per_layer: bool = False) -> None:
        self.trainer = trainer
        self.per_layer = per_layer
        self.last: ExpertLoad | None = None
        self.total: ExpertLoad | None = None
        self._watch: RoutingWatch | None = None
        self._add: Callable[[torch.Tensor], None] | None = None
        self._reporters: Reporters | None = None

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
        self._reporters = None
        if state.is_world_process_zero:
            self._reporters = Reporters(args)

    def on_step_end(
        self,
        args: "TrainingArguments",
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not control.should_log:
            return
        load = self._take()
        metrics = load.metrics()
        if self.per_layer:
            for path, violation in load.max_violation.items():
                # NaN: the layer got no row
                if not math.isnan(violation):
                    metrics[f"max_violation/{path}"] = violation
        self._log(load, {f"expert_load/{name}": value for name, value in metrics.items()}, state)
        # `log` has set should_log to False, but the loss still has to be logged
        control.should_log = True

    def _log(self, load: ExpertLoad, numbers: dict[str, float], state: TrainerState) -> None:
        """Numbers by the Trainer where it is known, else to its history and the reporters."""
        if self.trainer is not None:
            from transformers import Trainer

            # the base class's method, because a subclass's may do more: TRL's also logs the metrics
            # of the steps, and they belong to the next log
            Trainer.log(self.trainer, numbers)
            numbers = {}
        elif numbers:
            state.log_history.append({**numbers, "step": state.global_step})
        if self._reporters is not None and any(rows.any() for rows in load.counts.values()):
            self._reporters.log(load, numbers, state.global_step)

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
        if self._reporters is not None:
            self._reporters.close()

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
