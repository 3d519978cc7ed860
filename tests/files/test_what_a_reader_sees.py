"""What says how to load an adapter: the card, adapter_config.json, and PEFT's own error.

Trainers write the card again. That of transformers calls the model afterwards, and our section
stays. TRL's calls nothing, and adapter_config.json keeps the sentence.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import transformers.trainer
from transformers import Trainer

from helpers import moe_lora, tiny_model, token_ids, training_arguments
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.config import PEFT_TYPE_FROM
from peft_moe_lora.files.card import _BEGIN

IMPORT = "import peft_moe_lora  # registers the tuner"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Hub:
    """A stand-in for the hub: it keeps the card and the configuration of each upload."""

    def __init__(self):
        self.uploads = []

    def upload_folder(self, *, folder_path, **kwargs):
        folder = Path(folder_path)
        names = ("README.md", "adapter_config.json")
        self.uploads.append(
            {name: (folder / name).read_text() for name in names if (folder / name).is_file()}
        )


@pytest.fixture
def hub(monkeypatch):
    made = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *args, **kwargs: made)
    return made


def trainer(folder, kind=Trainer, **settings):
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8)]
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, **settings}
    made = kind(
        model=moe_lora(tiny_model(), task_type="CAUSAL_LM"),
        args=training_arguments(folder, **settings),
        train_dataset=rows,
    )
    made.hub_model_id = "someone/something"
    return made


def sentence(folder):
    content = json.loads((Path(folder) / "adapter_config.json").read_text())
    names = list(content)
    # beside the line at which PEFT stops
    assert names.index("peft_type_from") == names.index("peft_type") + 1
    return content["peft_type_from"]


def test_the_sentence_says_what_to_install_and_to_import():
    assert "pip install peft-moe-lora" in PEFT_TYPE_FROM
    assert "import peft_moe_lora" in PEFT_TYPE_FROM
    assert MoELoraConfig(peft_type_from="something else").peft_type_from == PEFT_TYPE_FROM


def test_a_saved_adapter_and_a_checkpoint_say_it_in_both_files(tmp_path):
    made = trainer(tmp_path, save_strategy="steps", save_steps=1)
    made.train()
    made.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"):
        assert IMPORT in (folder / "README.md").read_text()
        assert sentence(folder) == PEFT_TYPE_FROM


def test_our_section_survives_the_card_of_transformers_trainer(tmp_path):
    made = trainer(tmp_path)
    made.train()
    made.save_model()
    made.create_model_card(model_name="something")
    card = (tmp_path / "README.md").read_text()
    # the trainer's own text and ours, once
    assert "Training hyperparameters" in card
    assert IMPORT in card
    assert card.count(_BEGIN) == 1


def test_our_section_survives_push_to_hub(tmp_path, hub):
    made = trainer(tmp_path)
    made.train()
    made.push_to_hub()
    (upload,) = hub.uploads
    assert IMPORT in upload["README.md"]
    assert json.loads(upload["adapter_config.json"])["peft_type_from"] == PEFT_TYPE_FROM


def test_trl_drops_the_section_and_the_sentence_stays(tmp_path, hub):
    base_trainer = pytest.importorskip("trl.trainer.base_trainer")
    made = trainer(tmp_path)
    made.train()
    made.save_model()
    made._tag_names, made._name, made._paper, made._template_file = ["trl"], "SFT", {}, None
    # TRL's own method, without one of its trainers
    base_trainer._BaseTrainer.create_model_card(made, model_name="something")
    assert IMPORT not in (tmp_path / "README.md").read_text()
    assert sentence(tmp_path) == PEFT_TYPE_FROM
    # saved again, the section is back
    made.save_model()
    assert IMPORT in (tmp_path / "README.md").read_text()


def test_another_methods_card_is_not_ours(tmp_path):
    model = moe_lora(tiny_model())
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    model.create_or_update_model_card(str(tmp_path))
    assert _BEGIN not in (tmp_path / "README.md").read_text()


@pytest.mark.long
def test_without_the_import_peft_stops_at_the_line_above_the_sentence(tmp_path):
    moe_lora(tiny_model()).save_pretrained(tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("KeyError: 'MOE_LORA'")
    assert sentence(tmp_path).endswith("KeyError: 'MOE_LORA'.")
