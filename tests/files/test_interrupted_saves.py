"""`save_pretrained` that is killed or fails: the old adapter, the new one, or one clear error."""

import copy
import errno
import itertools
import json
import os
import re
import resource
import shutil
import stat
from collections import Counter
from contextlib import suppress

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from helpers import SAME, assert_share_of_order_one, fill_adapter, moe_lora, outputs, tiny_model
from helpers.interrupting import (
    at_step,
    in_child,
    is_killed,
    killed_at_every_step,
    killed_at_random,
    raiser,
    tree,
)
from peft_moe_lora import MoELoraConfig, convert_adapter
from peft_moe_lora.files.adapter_file import complete_adapter_file
from peft_moe_lora.files.tensor_file import AdapterError
from peft_moe_lora.files.writing import WriteError, written_files

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CARD = "README.md"
HIDDEN = ".peft_moe_lora-"
# attention, the router and the head beside the experts
BESIDE = {
    "target_modules": ["experts", "q_proj", "gate"],
    "modules_to_save": ["lm_head"],
}


class Saves:
    """Two adapters of the same shapes and other scalings: the first is there, then the second."""

    def __init__(self, folder, **config):
        torch.manual_seed(0)
        self.base = tiny_model()
        self.folder = folder / "out"
        self.models = {
            "old": moe_lora(copy.deepcopy(self.base), lora_alpha=2, **config),
            "new": moe_lora(copy.deepcopy(self.base), lora_alpha=9, **config),
        }
        fill_adapter(self.models["new"], seed=2)
        self.outputs = {name: outputs(model).detach() for name, model in self.models.items()}
        for name, model in self.models.items():
            model.save_pretrained(folder / name)
            assert tree(folder / name).keys() == {FILE, CONFIG, CARD}
        assert_share_of_order_one(self.outputs["old"], self.outputs["new"])
        self._states = {}

    def start(self, is_there=True):
        """Make the folder as it is before a save."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if is_there:
            shutil.copytree(self.folder.parent / "old", self.folder)

    def __call__(self):
        self.models["new"].save_pretrained(self.folder)

    def state(self):
        """What the folder loads as: "old", "new", "interrupted" or "nothing", else a failure."""
        content = re.sub(rf"{HIDDEN}\w+", HIDDEN, repr(tree(self.folder)))
        if content not in self._states:
            self._states[content] = self._load()
        return self._states[content]

    def _load(self):
        try:
            loaded = PeftModel.from_pretrained(copy.deepcopy(self.base), self.folder)
        except ValueError as error:
            if f"Can't find '{CONFIG}'" in str(error):
                return "nothing"
            return self._interrupted(str(error))
        found = outputs(loaded)
        same = [
            name
            for name, expected in self.outputs.items()
            if torch.allclose(found, expected, atol=SAME, rtol=0)
        ]
        assert len(same) == 1, "neither the old adapter nor the new one"
        return same[0]

    def _interrupted(self, message):
        (moving,) = self.folder.glob(f"{HIDDEN}*/moving")
        assert message.startswith(f"{self.folder}: saving was interrupted")
        assert f"is in {moving}: move" in message
        return "interrupted"

    def listed(self):
        # a save that is killed early has not made the folder yet
        return {path.name for path in self.folder.glob("*")}


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    return Saves(tmp_path_factory.mktemp("saves"))


# ---- kills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "kinds"), [("old", {"open", "os.rename", "os.rmdir"}), ("nothing", {"os.rename"})]
)
def test_a_kill_at_any_step_leaves_the_old_the_new_or_an_error(saves, before, kinds):
    is_there = before == "old"
    saves.start(is_there)
    states = []
    for step in killed_at_every_step(saves, kinds):
        is_moving = any(saves.folder.glob(f"{HIDDEN}*/moving"))
        states.append(saves.state())
        if saves.state() == "interrupted":
            with pytest.raises(AdapterError, match="saving was interrupted"):
                convert_adapter(saves.folder, saves.folder.parent / "converted", to="peft")
        # the next save finishes or takes back what was begun, even if it saves something else
        with written_files(saves.folder):
            pass
        assert saves.listed() in ({FILE, CONFIG, CARD}, set()), f"after step {step}"
        assert saves.state() == ("new" if is_moving else states[-1])
        saves.start(is_there)
    assert {before, "interrupted"} <= set(states) <= {before, "interrupted", "new"}


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("before", ["old", "nothing"])
@pytest.mark.parametrize("config", [{}, BESIDE], ids=["experts", "beside experts"])
def test_200_kills_at_random_moments(tmp_path, config, before):
    saves = Saves(tmp_path, **config)
    counts = Counter()
    for is_dead in killed_at_random(saves, 100, lambda: saves.start(before == "old")):
        state = saves.state()
        left = any(name.startswith(HIDDEN) for name in saves.listed())
        counts["killed" if is_dead else "done", state, "left" if left else "none left"] += 1
        saves()
        assert saves.state() == "new"
        assert saves.listed() == {FILE, CONFIG, CARD}
    print(sorted(counts.items()))
    assert {state for _, state, _ in counts} <= {before, "interrupted", "new"}


def test_an_adapter_in_a_subfolder_is_asked_for_too(tmp_path):
    """PEFT saves an adapter that is not called "default" in a subfolder of the one it is given."""
    model = moe_lora(tiny_model(), adapter_name="style")
    model.save_pretrained(tmp_path)
    model.peft_config["style"].lora_alpha = 9
    errors = 0
    for _ in killed_at_every_step(lambda: model.save_pretrained(tmp_path), {"os.rename"}):
        moving = list(tmp_path.glob(f"{HIDDEN}*/moving/style/{FILE}"))
        if moving:
            errors += 1
            with pytest.raises(AdapterError, match="saving was interrupted"):
                MoELoraConfig.from_pretrained(tmp_path / "style")
            # the adapter beside it is whole
            MoELoraConfig(r=3).save_pretrained(tmp_path / "other")
            assert MoELoraConfig.from_pretrained(tmp_path / "other").r == 3
        with written_files(tmp_path):
            pass
        assert not list(tmp_path.glob(f"{HIDDEN}*"))
    assert errors


# ---- exceptions ----------------------------------------------------------------------------------


def test_an_exception_at_any_step_leaves_the_old_or_the_new(saves):
    for step in itertools.count():
        saves.start()
        with at_step(step, raiser(KeyboardInterrupt())) as steps, suppress(KeyboardInterrupt):
            saves()
        assert saves.state() in ("old", "new"), f"after step {step}"
        if len(steps) <= step:
            break
    assert step > 5


def test_a_full_disk_at_any_step_is_one_error(saves):
    kinds = {"open", "os.mkdir", "os.rename"}
    for step in itertools.count():
        saves.start()
        failed = ""
        error = OSError(errno.ENOSPC, "No space left on device")
        with at_step(step, raiser(error), kinds) as steps:
            try:
                saves()
            except WriteError as raised:
                failed = str(raised)
        if "was not written" in failed:
            assert failed.startswith(f"{saves.folder} was not written (No space left on device)")
            assert saves.state() == "old", f"after step {step}"
        else:
            assert not failed or f"{saves.folder}: saving was interrupted" in failed
            assert saves.state() == "new", f"after step {step}"
        assert saves.listed() == {FILE, CONFIG, CARD}, f"after step {step}"
        if len(steps) <= step:
            break
    assert step > 5


def test_a_disk_that_is_full_in_the_middle_of_the_weights_leaves_the_old(saves):
    saves.start()

    def fails():
        limit = 4096
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(WriteError, match=r"was not written \(.*File too large.*unchanged"):
            saves()

    assert not is_killed(in_child(fails))
    assert saves.state() == "old"
    assert saves.listed() == {FILE, CONFIG, CARD}


def test_all_is_on_the_disk_before_it_takes_its_place(saves, monkeypatch):
    saves.start()
    events = []
    fsync = os.fsync
    replace = os.replace

    def recorded_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def recorded_replace(file, target):
        if target.parent == saves.folder:
            events.append(target.name)
        replace(file, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    saves()
    # without its configuration, nobody takes the weights for an adapter
    assert [event for event in events if isinstance(event, str)] == [CONFIG, CARD, FILE]
    first = events.index(CONFIG)
    assert {path.stat().st_ino for path in saves.folder.iterdir()} <= set(events[:first])
    assert events[-1] == saves.folder.stat().st_ino


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="lists open files on Linux")
def test_no_file_stays_open(tmp_path):
    before = os.listdir("/proc/self/fd")
    with written_files(tmp_path) as new:
        (new / "one").mkdir()
        (new / "one" / FILE).write_text("new")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_folder_in_the_place_of_a_file_is_named_before_anything_moves(saves):
    saves.start()
    (saves.folder / CARD).unlink()
    (saves.folder / CARD).mkdir()
    with pytest.raises(WriteError, match=f"{CARD} is a folder"):
        saves()
    assert saves.state() == "old"


# ---- what else is in the folder ------------------------------------------------------------------


def test_other_files_and_the_card_that_a_user_wrote_stay(saves):
    saves.start()
    (saves.folder / "notes.txt").write_text("mine")
    (saves.folder / CARD).write_text("# My adapter\n")
    (saves.folder / "adapter_model.bin").write_bytes(b"an old pickle")
    saves()
    assert (saves.folder / "notes.txt").read_text() == "mine"
    assert "# My adapter" in (saves.folder / CARD).read_text()
    assert saves.state() == "new"


def test_only_the_main_process_writes(saves):
    saves.start()
    (saves.folder / "README.md").write_text("a card of the user")
    before = tree(saves.folder)
    files = {path: path.stat().st_ino for path in saves.folder.iterdir()}
    saves.models["new"].save_pretrained(saves.folder, is_main_process=False)
    assert tree(saves.folder) == before
    # not even the card is put back
    assert {path: path.stat().st_ino for path in saves.folder.iterdir()} == files


# ---- new metadata in a file ----------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path):
    """A file of weights as PEFT saves it, and its tensors."""
    held = {"a": torch.arange(6.0), "b": torch.arange(3, dtype=torch.int8)}
    save_file(held, tmp_path / FILE, {"format": "pt"})
    os.chmod(tmp_path / FILE, 0o640)
    return tmp_path, held


# padding differs with the length of the description
@pytest.mark.parametrize("length", range(8))
def test_new_metadata_keep_the_tensors_their_alignment_and_the_mode(plain, length):
    folder, held = plain
    description = {"text": "x" * length}
    complete_adapter_file(folder, description)
    content = (folder / FILE).read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert header % 8 == 0
    described = json.loads(content[8 : 8 + header])["__metadata__"]["peft_moe_lora"]
    assert json.loads(described) == description
    assert stat.S_IMODE((folder / FILE).stat().st_mode) == 0o640
    found = load_file(folder / FILE)
    assert found.keys() == held.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())


def test_nothing_stays_of_new_metadata_that_could_not_be_written(plain):
    folder, _ = plain
    before = tree(folder)
    for step in itertools.count():
        error = OSError(errno.ENOSPC, "No space left on device")
        with at_step(step, raiser(error), {"open", "os.mkdir"}) as steps, suppress(WriteError):
            complete_adapter_file(folder, {})
        if len(steps) <= step:
            break
        assert tree(folder) == before, f"after step {step}"
    assert step > 2
    assert tree(folder).keys() == {FILE}
