"""Expert loads of a training run, logged through the Trainer."""

import math

import torch.distributed as dist
from transformers.trainer_callback import TrainerCallback

from .load import ExpertLoad, RoutingWatch


class ExpertLoadCallback(TrainerCallback):
    """Logs, whenever the Trainer logs, how even the routing was since the last time.

        trainer.add_callback(ExpertLoadCallback(trainer))

    Logged are `expert_load/max_violation` (mean over the layers), `expert_load/largest_max_violation`,
    `expert_load/dead_experts` (experts of any layer that got no row), and with `per_layer` the max violation of each.
    Counted are the rows of all micro-batches of training; evaluation, padding and what gradient checkpointing runs
    again are not. Rows are added up over all processes, once a log.

    Args:
        trainer: whose log it writes to.
        per_layer: log the max violation of every layer too.
    Attributes:
        last: the load between the last two logs, of all processes; None before the first.
        total: the load since training began, up to the last log; at the end, all of it.
    """

    def __init__(self, trainer, per_layer: bool = False):
        self.trainer, self.per_layer = trainer, per_layer
        self.last: ExpertLoad | None = None
        self.total: ExpertLoad | None = None
        self._watch: RoutingWatch | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.last = self.total = None
        if self._watch is not None:
            self._watch.remove()
        self._watch = RoutingWatch(model, when=lambda: model.training)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if not control.should_log:
            return
        from transformers import Trainer

        metrics = self._take().metrics()
        if self.per_layer:
            ran = {
                path: value
                for path, value in self.last.max_violation.items()
                if not math.isnan(value)
            }
            metrics |= {f"max_violation/{path}": value for path, value in ran.items()}
        # not a subclass's: TRL's adds the metrics of the steps, which belong to the log that follows
        Trainer.log(self.trainer, {f"expert_load/{name}": value for name, value in metrics.items()})
        # logging takes the wish to log back; it was for the loss
        control.should_log = True

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._take()
        self._watch.remove()

    def _take(self) -> ExpertLoad:
        self.last = ExpertLoad(self._watch.take(sum_over_processes))
        self.total = self.last if self.total is None else self.total + self.last
        return self.last


def sum_over_processes(counts) -> None:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
