"""TensorBoard and Weights & Biases: loads as numbers and as a heatmap, while a model trains."""

import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .load import ExpertLoad
from .plot import plot_expert_load

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

HEATMAP = "expert_load/heatmap"


class Reporters:
    """The programs that a Trainer reports to, of those that show pictures.

    TensorBoard's files go to the folder TENSORBOARD_LOGGING_DIR, or to runs/expert_load in the
    output folder. W&B's run is the one that the Trainer began.

    Args:
        args: the Trainer's; `report_to` names the programs.
    """

    def __init__(self, args: "TrainingArguments") -> None:
        self._writer: Any = None
        self._wandb: Any = None
        # TrainingArguments has made a list of it
        programs = args.report_to or ()
        if "tensorboard" in programs:
            from torch.utils.tensorboard import SummaryWriter

            default = os.path.join(str(args.output_dir), "runs", "expert_load")
            self._writer = SummaryWriter(os.environ.get("TENSORBOARD_LOGGING_DIR", default))
        if "wandb" in programs:
            import wandb

            self._wandb = wandb
        self._draws = importlib.util.find_spec("matplotlib") is not None
        if (self._writer or self._wandb) and not self._draws:
            logger.warning(
                "no heatmap of expert loads is drawn, because matplotlib is not installed: "
                "pip install 'peft-moe-lora[notebook]'"
            )

    def log(self, load: ExpertLoad, numbers: Mapping[str, float], step: int) -> None:
        """Report a load that has rows.

        Args:
            numbers: name -> value, reported beside the heatmap.
            step: of the optimizer.
        """
        if not (self._writer or self._wandb):
            return
        figure = None
        if self._draws:
            figure = _heatmap(load)
        if self._writer:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            if figure is not None:
                self._writer.add_figure(HEATMAP, figure, step)
        if self._wandb:
            entry = {**numbers, "train/global_step": step}
            if figure is not None:
                entry[HEATMAP] = self._wandb.Image(figure)
            self._wandb.log(entry)

    def close(self) -> None:
        """Write what is buffered; W&B's run is the Trainer's to end."""
        if self._writer:
            self._writer.close()


def _heatmap(load: ExpertLoad) -> "Figure":
    """A figure that pyplot does not know, so nothing has to close it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.25 * len(load.counts)), layout="constrained")
    plot_expert_load(load, figure.subplots())
    return figure
