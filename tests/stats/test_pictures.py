"""Expert loads as pictures: in a notebook, in TensorBoard and in W&B."""

import importlib.util
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import E, moe_lora, tiny_model, token_ids
from peft_moe_lora import ExpertLoadCallback
from peft_moe_lora.stats import callback as callback_file
from peft_moe_lora.stats.load import ExpertLoad
from peft_moe_lora.stats.reporters import HEATMAP, Reporters

pytest.importorskip("matplotlib")

PATHS = ("model.layers.0.mlp.experts", "model.layers.1.<experts>")
LOAD = ExpertLoad(
    {PATHS[0]: torch.tensor([0, 3, 6, 3]), PATHS[1]: torch.zeros(4, dtype=torch.int64)}
)


class Recorder:
    """A SummaryWriter, and wandb, that keep what they are given."""

    def __init__(self, folder=None):
        self.folder = folder
        self.scalars = []
        self.figures = []
        self.logged = []
        self.closed = False

    def add_scalar(self, *entry):
        self.scalars.append(entry)

    def add_figure(self, name, figure, step):
        self.figures.append((name, drawn(figure), step))

    def log(self, entry):
        self.logged.append(entry)

    def close(self):
        self.closed = True


def drawn(figure):
    """The numbers of a heatmap."""
    return torch.tensor(figure.axes[0].images[0].get_array().filled(torch.nan))


@pytest.fixture
def programs(monkeypatch):
    """TensorBoard and W&B: both are made by the first call, and then returned."""
    made = SimpleNamespace(tensorboard=None, wandb=Recorder())

    def writer(folder):
        made.tensorboard = Recorder(folder)
        return made.tensorboard

    tensorboard = ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = writer
    wandb = ModuleType("wandb")
    wandb.log = made.wandb.log
    wandb.Image = lambda figure: ("image", drawn(figure))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return made


def asked(*programs):
    return SimpleNamespace(report_to=list(programs), output_dir="out")


def test_a_notebook_shows_a_heatmap():
    table = LOAD._repr_html_()
    first, second = re.findall(r"<tr>(.*?)</tr>", table)
    assert f"<th>{PATHS[0]}</th>" in first
    assert "1.&lt;experts&gt;" in second
    shades = re.findall(r"rgba\(33,102,172,([\d.]+)\)", first)
    assert shades == ["0.00", "0.33", "0.67", "0.33"]
    assert re.findall(r">(x?)</td>", first) == ["x", "", "", ""]
    assert 'title="expert 2: 6 rows, load 2.00"' in first
    # a layer that did not run
    assert re.findall(r">(x?)</td>", second) == ["x"] * 4


def test_both_programs_get_numbers_and_the_heatmap(programs):
    reporters = Reporters(asked("tensorboard", "wandb"))
    reporters.log(LOAD, {"expert_load/dead_experts": 5}, 20)
    reporters.close()
    expected = torch.tensor([[0.0, 1.0, 2.0, 1.0], [torch.nan] * 4])
    board = programs.tensorboard
    assert board.folder == "out/runs/expert_load"
    assert board.scalars == [("expert_load/dead_experts", 5, 20)]
    ((name, numbers, step),) = board.figures
    assert (name, step) == (HEATMAP, 20)
    torch.testing.assert_close(numbers, expected, equal_nan=True, check_dtype=False)
    (entry,) = programs.wandb.logged
    assert entry["expert_load/dead_experts"] == 5
    assert entry["train/global_step"] == 20
    kind, numbers = entry[HEATMAP]
    assert kind == "image"
    torch.testing.assert_close(numbers, expected, equal_nan=True, check_dtype=False)
    assert board.closed


def test_figures_do_not_pile_up(programs):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    Reporters(asked("tensorboard")).log(LOAD, {}, 1)
    assert plt.get_fignums() == before


def test_who_reports_nowhere_imports_nothing(monkeypatch):
    for name in ("torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    reporters = Reporters(asked())
    reporters.log(LOAD, {"expert_load/dead_experts": 5}, 20)
    reporters.close()


def test_without_matplotlib_numbers_are_reported_and_a_line_says_why(programs, monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reporters = Reporters(asked("tensorboard", "wandb"))
    reporters.log(LOAD, {"expert_load/dead_experts": 5}, 20)
    assert "matplotlib is not installed" in caplog.text
    assert programs.tensorboard.scalars
    assert not programs.tensorboard.figures
    assert HEATMAP not in programs.wandb.logged[0]


@pytest.mark.parametrize("with_trainer", [True, False])
def test_the_callback_can_be_given_to_the_trainer(with_trainer, tmp_path, monkeypatch, capsys):
    """In `callbacks=[...]` it does not know the Trainer; numbers and pictures are the same."""
    reported = []
    recorder = SimpleNamespace(log=lambda *call: reported.append(call), close=lambda: None)
    monkeypatch.setattr(callback_file, "Reporters", lambda args: recorder)
    samples = [{"input_ids": row, "labels": row} for row in token_ids(8)]
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True}
    settings = TrainingArguments(str(tmp_path), max_steps=4, logging_steps=2, **quiet)
    callback = ExpertLoadCallback()
    model = moe_lora(tiny_model(), randomize=False)
    trainer = Trainer(model, settings, train_dataset=samples, callbacks=[callback])
    if with_trainer:
        callback.trainer = trainer
    trainer.train()
    capsys.readouterr()
    logged = [entry for entry in trainer.state.log_history if "expert_load/max_violation" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    loads, numbers, steps = zip(*reported, strict=True)
    assert steps == (2, 4)
    assert [bool(given) for given in numbers] == [not with_trainer] * 2
    total = loads[0] + loads[1]
    assert {path: rows.tolist() for path, rows in total.counts.items()} == {
        path: rows.tolist() for path, rows in callback.total.counts.items()
    }
    assert all(len(rows) == E for rows in total.counts.values())


def test_tensorboard_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporters = Reporters(SimpleNamespace(report_to=["tensorboard"], output_dir=tmp_path))
    reporters.log(LOAD, {"expert_load/dead_experts": 5.0}, 20)
    reporters.close()
    events = EventAccumulator(str(tmp_path / "runs" / "expert_load"))
    events.Reload()
    assert events.Scalars("expert_load/dead_experts")[0].value == 5
    assert events.Images(HEATMAP)[0].encoded_image_string.startswith(b"\x89PNG")
