"""Conversions and merges that are killed or fail: the old destination or the new one is there."""

import errno
import itertools
import os
import resource
import shutil
from collections import Counter
from contextlib import suppress

import pytest
import torch

from convert.adapters import save_ours
from helpers import tiny_model
from helpers.interrupting import (
    at_step,
    in_child,
    is_killed,
    killed_at_every_step,
    killed_at_random,
    raiser,
    tree,
)
from peft_moe_lora import convert_adapter, inspect_adapter, merge_adapter
from peft_moe_lora.files import writing
from peft_moe_lora.files.folders import new_folder
from peft_moe_lora.files.tensor_file import Block, ExistsError, TensorFile, write_tensors
from peft_moe_lora.files.writing import WriteError

HIDDEN = ".peft_moe_lora-"


class Runs:
    """One thing written twice into the same place: `old` was there before `new` is written."""

    def __init__(self, folder):
        self.folder = folder
        self.out = folder / "place" / "out"
        self.out.parent.mkdir()
        self.old = self.tree_of("first")
        self.new = self.tree_of("second")
        assert self.old != self.new

    def tree_of(self, adapter):
        self(adapter, self.folder / f"{adapter}-out")
        return tree(self.folder / f"{adapter}-out")

    def __call__(self, adapter="second", dst=None):
        tensor = torch.full((4, 4), float(len(adapter)))
        block = Block({"a": (4, 4)}, tensor.dtype, lambda: [tensor])
        with new_folder(dst or self.out, force=True) as new:
            write_tensors(new / "model.safetensors", [block], {})
            (new / "config.json").write_text(adapter)

    def start(self, is_there=True):
        """Make the place as it is before a run."""
        shutil.rmtree(self.out.parent)
        self.out.parent.mkdir()
        if is_there:
            shutil.copytree(self.folder / "first-out", self.out)

    def check_loads(self):
        assert TensorFile(self.out / "model.safetensors").tensors

    def listed(self):
        return sorted(path.name for path in self.out.parent.iterdir())


class Conversions(Runs):
    def __call__(self, adapter="second", dst=None):
        base = str(self.folder / "base")
        source = self.folder / adapter
        convert_adapter(source, dst or self.out, to="peft", base_config=base, force=True)

    def check_loads(self):
        assert "peft" in str(inspect_adapter(self.out, self.folder / "base"))


class Merges(Runs):
    def __call__(self, adapter="second", dst=None):
        merge_adapter(self.folder / adapter, self.folder / "base", dst or self.out, force=True)


@pytest.fixture
def folders(tmp_path):
    """Runs of the function that conversions and merges write with."""
    return Runs(tmp_path)


@pytest.fixture(scope="module", params=[Conversions, Merges], ids=lambda kind: kind.__name__)
def runs(request, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    base = tiny_model()
    base.config.architectures = [type(base).__name__]
    base.save_pretrained(folder / "base")
    save_ours(base, folder / "first", lora_alpha=3)
    save_ours(base, folder / "second", lora_alpha=5)
    return request.param(folder)


@pytest.fixture(params=["exchange", "two renames"])
def system(request, monkeypatch):
    """A system that can exchange two folders, and one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(writing, "_exchanged", lambda one, other: False)
    return request.param


# ---- kills ---------------------------------------------------------------------------------------


def test_a_kill_at_any_step_leaves_the_old_or_the_new(runs):
    runs.start()
    found = []
    for step in killed_at_every_step(runs):
        assert tree(runs.out) in (runs.old, runs.new), f"after step {step}"
        runs.check_loads()
        found.append(tree(runs.out) == runs.new)
        # the next run of any kind beside it
        with new_folder(runs.out.parent / "beside"):
            pass
        assert runs.listed() == ["beside", "out"]
        runs.start()
    assert len(set(found)) == 2, "all kills came before, or all after, the new was in place"


@pytest.mark.parametrize(
    ("is_there", "system", "next_run"),
    [
        (True, "exchange", "the same"),
        (True, "two renames", "beside"),
        (False, "exchange", "beside"),
        pytest.param(True, "two renames", "the same", marks=pytest.mark.long),
    ],
    indirect=["system"],
)
def test_the_next_run_removes_what_a_kill_left(folders, system, is_there, next_run):
    folders.start(is_there)
    old = folders.old if is_there else None
    for step in killed_at_every_step(folders):
        # without the exchange, the next run puts back what was moved away
        if system == "exchange":
            assert tree(folders.out) in (old, folders.new), f"after step {step}"
        if next_run == "the same":
            folders()
            assert tree(folders.out) == folders.new
        else:
            folders("first", folders.out.parent / "beside")
            shutil.rmtree(folders.out.parent / "beside")
            assert tree(folders.out) in (old, folders.new), f"after step {step}"
        assert folders.listed() == ["out"] or (folders.listed() == [] and not is_there)
        folders.start(is_there)


def test_a_run_without_force_puts_back_what_a_kill_moved_away_and_is_refused(folders, monkeypatch):
    monkeypatch.setattr(writing, "_exchanged", lambda one, other: False)
    folders.start()
    missing = 0
    for _ in killed_at_every_step(folders):
        if tree(folders.out) is None:
            missing += 1
            with pytest.raises(ExistsError, match="force"), new_folder(folders.out):
                pass
            assert tree(folders.out) == folders.old
            assert folders.listed() == ["out"]
        folders.start()
    assert missing


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_200_kills_at_random_moments(runs):
    counts = Counter()
    for is_dead in killed_at_random(runs, 200, runs.start):
        runs.check_loads()
        state = {True: "new", False: "old"}[tree(runs.out) == runs.new]
        assert tree(runs.out) in (runs.old, runs.new)
        left = len(runs.listed()) - 1
        counts["killed" if is_dead else "done", state, f"{left} left"] += 1
        with new_folder(runs.out.parent / "beside"):
            pass
        assert runs.listed() == ["beside", "out"]
    print(type(runs).__name__, sorted(counts.items()))


# ---- exceptions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_exception_at_any_step_leaves_the_old_or_the_new(folders, system, error):
    for step in itertools.count():
        folders.start()
        with at_step(step, raiser(error)) as steps, suppress(type(error)):
            folders()
        folders("first", folders.out.parent / "beside")
        assert folders.listed() == ["beside", "out"]
        assert tree(folders.out) in (folders.old, folders.new), f"after step {step}"
        if len(steps) <= step:
            break
    assert step > 5


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_an_error_of_the_system_at_any_step_leaves_the_old_and_nothing_else(
    folders, system, number
):
    for step in itertools.count():
        folders.start()
        failed = None
        error = OSError(number, os.strerror(number))
        with at_step(step, raiser(error), {"open", "os.mkdir", "os.rename"}) as steps:
            try:
                folders()
            except WriteError as raised:
                failed = str(raised)
        assert folders.listed() == ["out"], f"after step {step}"
        if failed is None:
            assert tree(folders.out) == folders.new, f"after step {step}"
        else:
            assert failed.startswith(f"{folders.out} was not written ({os.strerror(number)})")
            assert tree(folders.out) == folders.old, f"after step {step}"
        if len(steps) <= step:
            break
    assert step > 5


def test_a_disk_that_is_full_in_the_middle_of_a_file_leaves_the_old(runs):
    runs.start()

    def fails():
        limit = 4096
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(WriteError, match=r"was not written \(File too large\).*unchanged"):
            runs()

    assert not is_killed(in_child(fails))
    assert runs.listed() == ["out"]
    assert tree(runs.out) == runs.old


def test_all_is_on_the_disk_before_it_takes_its_place(folders, system, monkeypatch):
    """After a power cut too, a name never leads to a file that is not whole."""
    events = []
    fsync = os.fsync

    def recorded_fsync(descriptor):
        events.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def record_exchange(one, other):
        events.append("in place")
        return exchange(one, other)

    exchange = writing._exchanged
    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(writing, "_exchanged", record_exchange)
    folders.start()
    with at_step(10**6, None) as steps:
        folders()
    assert "os.rename" in steps
    after = events.index("in place")
    new = [folders.out, *folders.out.iterdir()]
    assert {path.stat().st_ino for path in new} <= set(events[:after])
    assert folders.out.parent.stat().st_ino in events[after:]


def test_folders_made_for_a_destination_do_not_stay_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


# ---- what other runs and other people have there -------------------------------------------------


@pytest.mark.parametrize("name", ["out", "beside"])
def test_a_run_removes_nothing_of_a_run_that_still_writes(tmp_path, name):
    with new_folder(tmp_path / "out", force=True) as one:
        (one / "config.json").write_text("one")
        with new_folder(tmp_path / name, force=True) as other:
            write_tensors(other / "model.safetensors", [], {})
        assert (one / "config.json").read_text() == "one"
        write_tensors(one / "model.safetensors", [], {})
    assert (tmp_path / "out" / "config.json").read_text() == "one"
    assert {path.name for path in tmp_path.iterdir()} == {"out", name}


def test_a_run_whose_destination_was_written_meanwhile_needs_force(tmp_path):
    written = new_folder(tmp_path / "out")
    written.__enter__()
    with new_folder(tmp_path / "out") as other:
        write_tensors(other / "model.safetensors", [], {})
    with pytest.raises(ExistsError, match="force"):
        written.__exit__(None, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    """A folder without a lock, one of another name, a file, and a link to a leftover."""
    (tmp_path / f"{HIDDEN}mine").mkdir()
    (tmp_path / f"{HIDDEN}mine" / "thesis.tex").touch()
    (tmp_path / ".peft_moe_lora" / "new").mkdir(parents=True)
    (tmp_path / f"{HIDDEN}file").touch()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "new").mkdir(parents=True)
    (elsewhere / "lock").touch()
    (tmp_path / f"{HIDDEN}link").symlink_to(elsewhere)
    before = tree(tmp_path)
    with new_folder(tmp_path / "out"):
        pass
    (tmp_path / "out").rmdir()
    assert tree(tmp_path) == before


def test_a_leftover_that_looks_like_one_is_removed(tmp_path):
    """The other side of the test above: the same folders, with a lock that nobody holds."""
    left = tmp_path / f"{HIDDEN}left"
    (left / "new").mkdir(parents=True)
    (left / "new" / "model.safetensors").touch()
    (left / "lock").touch()
    with new_folder(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
