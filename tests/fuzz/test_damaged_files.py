"""Damaged adapters through every entry: the same numbers as before the damage, or one clear error.

After an error the model, the adapter's folder, the base's folder and the disk are as they were. No
call takes more than 10 s, or 256 MiB beyond what the process held.
"""

import copy
import hashlib
import json
import os
import shutil
import stat
import tempfile
from types import SimpleNamespace

import pytest
from hypothesis import currently_in_test_context, given, note
from hypothesis import strategies as st
from peft import get_peft_model

from fuzz import written_out
from fuzz.bounds import bounded
from fuzz.configurations import Drawn
from fuzz.damage import damages
from fuzz.entries import (
    BESIDE,
    ENTRIES,
    OUR_FORMAT,
    Refused,
    Stage,
    logits_of,
)
from fuzz.filled import fill
from fuzz.listed import LISTED
from helpers import assert_unchanged, relative_error, snapshot
from peft_moe_lora import MoELoraConfig, convert_adapter

# fp32 files, computed in fp64; merged checkpoints are fp32
SAME = 1e-5

SUBJECTS = {
    # everything at once
    "ours": ("qwen3_moe", "moe_lora"),
    "some experts": ("gpt_oss", "moe_lora"),
    "peft": ("qwen3_moe", "peft"),
    "per_expert": ("mixtral", "per_expert"),
    "sglang_3d": ("deepseek_v3", "sglang_3d"),
}
_FIELDS = {
    "ours": {
        "target_modules": ["experts", "q_proj", "v_proj", "gate"],
        "rank_pattern": {"model.layers.1.mlp.experts": 3, "q_proj": 2},
        "alpha_pattern": {"model.layers.0.mlp.experts": 6},
    },
    "some experts": {
        "target_modules": ["experts", "o_proj"],
        "expert_indices": {"model.layers.1.mlp.experts": [1, 4], "model.layers.0.mlp.experts": [0]},
        "use_rslora": True,
    },
    "peft": {"target_modules": ["experts", "q_proj"], "modules_to_save": ["lm_head"]},
    "per_expert": {"target_modules": ["experts", "q_proj", "v_proj"]},
    "sglang_3d": {"target_modules": ["experts"]},
}


@pytest.fixture(scope="module")
def subjects(bases, tmp_path_factory):
    """name -> an undamaged adapter: base, folder, logits."""
    made = {}
    for name, (family, to) in SUBJECTS.items():
        base = bases[family]
        fields = {"r": 4, "lora_alpha": 8, **_FIELDS[name]}
        adapted = get_peft_model(copy.deepcopy(base.model), MoELoraConfig(**fields))
        fill(
            base,
            Drawn(family, fields, None, "float32", 5),
            adapted,
            written_out.meaning(fields, base.names),
        )
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        adapted.save_pretrained(folder / "moe_lora")
        if to != "moe_lora":
            convert_adapter(folder / "moe_lora", folder / to, to=to, base_config=base.folder)
        other = get_peft_model(copy.deepcopy(base.model), MoELoraConfig(r=2))
        made[name] = SimpleNamespace(
            base=base, folder=folder / to, logits=logits_of(adapted), other=other, to=to
        )
    return made


@pytest.fixture
def _temporary(tmp_path, monkeypatch):
    """What is written outside of a destination is found in this folder."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.mark.usefixtures("_temporary")
def test_a_damaged_adapter_is_right_or_refused(subjects, tmp_path, examples):
    @examples(fixed=100, random=250, many=1000)
    @given(st.sampled_from(sorted(SUBJECTS)), damages())
    def check(name, damage):
        check_entries(subjects[name], damage, tmp_path)

    check()


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.usefixtures("_temporary")
def test_without_damage_every_entry_is_right(subjects, name, tmp_path):
    outcomes = check_entries(subjects[name], None, tmp_path)
    refused = {entry for entry, outcome in outcomes.items() if outcome != "right"}
    # per-expert tensors cannot be combined without the base model
    blind = {"convert_without_base", "inspect_without_base", "shell_inspect_json", "shell_convert"}
    assert refused == (blind if name == "per_expert" else set()), outcomes


@pytest.mark.long
@pytest.mark.parametrize("name", ["ours", "per_expert"])
@pytest.mark.parametrize("damage", LISTED)
@pytest.mark.usefixtures("_temporary")
def test_listed_damage_is_right_or_refused(subjects, tmp_path, damage, name):
    listed = LISTED[damage]
    outcomes = check_entries(subjects[name], listed.damage, tmp_path)
    if name == "ours" and listed.becomes != "either":
        # it gets the configuration of the undamaged adapter
        outcomes.pop("from_pretrained_with_config")
        are_right = {outcome == "right" for outcome in outcomes.values()}
        assert are_right == {listed.becomes == "right"}, outcomes


def check_entries(subject, damage, tmp_path):
    """Send a damaged adapter through every entry; return entry's name -> "right" or the error."""
    place = tmp_path / "place"
    shutil.copytree(subject.folder, place / "adapter")
    try:
        if damage is not None:
            damage.apply(place / "adapter")
        return {
            entry.__name__: check_entry(entry, subject, damage, place, tmp_path / "temporary")
            for entry in ENTRIES
            if entry not in OUR_FORMAT or is_read_by_us(subject, place / "adapter")
        }
    finally:
        shutil.rmtree(place)


def is_read_by_us(subject, folder):
    """Whether PEFT's own code neither runs the adapter nor reads a huge configuration first."""
    path = folder / "adapter_config.json"
    is_huge = path.is_file() and path.stat().st_size > 2**24
    return subject.to == "moe_lora" and not is_huge


def check_entry(entry, subject, damage, place, temporary):
    model = copy.deepcopy(subject.other if entry in BESIDE else subject.base.model)
    before = snapshot(model)
    files = prints_of(place / "adapter"), prints_of(subject.base.folder)
    stage = Stage(subject.base, place / "adapter", subject.folder, place / "out", model)
    try:
        with bounded(entry.__name__):
            found = entry(stage)
        outcome = "right"
        hidden = damage is not None and damage.hidden
        if found is not None and not hidden:
            error = relative_error(found, subject.logits)
            assert error < SAME, f"{entry.__name__} accepted it and is wrong by {error:.1e}"
    except (ValueError, OSError, Refused, *errors_of_peft(entry, stage.adapter)) as error:
        outcome = f"{type(error).__name__}: {error}"
        if currently_in_test_context():
            note(f"{entry.__name__}: {outcome[:300]}")
        if type(error) not in PEFTS_OWN:
            check_clear(entry, str(error))
        assert_unchanged(model, before)
        assert not (place / "out").exists(), f"{entry.__name__} left something"
    shutil.rmtree(place / "out", ignore_errors=True)
    assert {path.name for path in place.iterdir()} == {"adapter"}
    assert not list(temporary.iterdir())
    assert files == (prints_of(place / "adapter"), prints_of(subject.base.folder))
    return outcome


# what PEFT raises for a configuration that is no object, or is nested too deeply
PEFTS_OWN = (TypeError, AttributeError, KeyError, RecursionError)


def errors_of_peft(entry, folder):
    """What PEFT's own code may raise before it knows that the adapter is ours."""
    if entry not in OUR_FORMAT or peft_type_of(folder) == "MOE_LORA":
        return ()
    return PEFTS_OWN


def peft_type_of(folder):
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return config.get("peft_type") if isinstance(config, dict) else None


def check_clear(entry, message):
    """One line of printable text, not too long, that says something."""
    text = message.replace("\n", " ")
    assert text.isprintable(), f"{entry.__name__}: {message!r}"
    assert 20 < len(text) < 4000, f"{entry.__name__}: {message[:300]!r} ({len(text)} characters)"


def prints_of(folder):
    """What a folder holds: kinds, sizes and contents; only plain files are opened."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content = os.readlink(path) if stat.S_ISLNK(status.st_mode) else ""
        if stat.S_ISREG(status.st_mode) and status.st_size < 2**24:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path)] = (kind, status.st_size, content)
    return found
