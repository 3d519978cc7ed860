"""Folders and links: what is read is never lost, and no file outside a folder is copied."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from convert.adapters import save_ours, tensors
from peft_moe_lora import convert_adapter, merge_adapter
from peft_moe_lora.files.tensor_file import AdapterError, ExistsError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@pytest.fixture
def place(qwen, tmp_path):
    """A folder with an adapter, its base and a file of somebody else."""
    folder = tmp_path / "place"
    qwen.base.save_pretrained(folder / "base")
    shutil.copytree(qwen.ours, folder / "adapter")
    return folder


def everything(folder):
    """Path below a folder -> the bytes of a file, the target of a link, or None for a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        held = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = os.readlink(path) if path.is_symlink() else held
    return found


def convert(place, dst, force=True):
    return convert_adapter(
        place / "adapter", dst, to="peft", base_config=str(place / "base"), force=force
    )


def merge(place, dst, force=True):
    return merge_adapter(place / "adapter", place / "base", dst, force=force)


def refused(act, place, dst, match, error=ExistsError):
    before = everything(place.parent)
    with pytest.raises(error, match=match):
        act(place, dst)
    assert everything(place.parent) == before


# ---- force ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [convert, merge])
@pytest.mark.parametrize("inside", ["", "adapter", "base"])
@pytest.mark.parametrize("through", ["itself", "link", "dots"])
def test_force_replaces_no_folder_with_a_source(place, act, inside, through):
    dst = place / inside
    if through == "link":
        dst = place.parent / "link"
        dst.symlink_to(place / inside)
    elif through == "dots":
        dst = place / "base" / ".." / inside
    refused(act, place, dst, "which is read")


@pytest.mark.parametrize("act", [convert, merge])
def test_force_replaces_no_output_that_is_also_a_source(place, act):
    """An earlier output looks like one, even if it is the adapter or the base of this run."""
    convert(place, place / "new", force=False)
    merge(place, place / "merged", force=False)
    shutil.rmtree(place / "adapter")
    shutil.rmtree(place / "base")
    (place / "new").rename(place / "adapter")
    (place / "merged").rename(place / "base")
    for name in ("adapter", "base"):
        refused(act, place, place / name, "which is read")


def test_force_replaces_no_folder_that_a_sources_link_leads_to(place):
    merge(place, place / "merged", force=False)
    weights = place / "base" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(place / "merged" / "model.safetensors")
    refused(convert, place, place / "merged", "which is read")


def test_force_replaces_no_base_that_the_adapter_names(place, qwen):
    """An adapter of a merged model: its base looks like an output."""
    merge(place, place / "merged", force=False)
    shutil.rmtree(place / "adapter")
    base = type(qwen.base).from_pretrained(place / "merged")
    save_ours(base, place / "adapter")
    before = everything(place)
    with pytest.raises(ExistsError, match="which is read"):
        convert_adapter(place / "adapter", place / "merged", to="peft", force=True)
    assert everything(place) == before


@pytest.mark.parametrize("act", [convert, merge])
@pytest.mark.parametrize("name", ["thesis.tex", "notes/day.txt", "model-2.safetensors", "link"])
def test_force_replaces_no_folder_with_files_of_others(place, act, name):
    out = place / "out"
    act(place, out, force=False)
    (out / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (out / name).symlink_to(place / "adapter" / WEIGHTS)
    elif name.endswith(".safetensors"):
        save_file(load_file(place / "adapter" / WEIGHTS), out / name)
    else:
        (out / name).write_text("years of work")
    refused(act, place, out, name.split("/")[0])


def test_force_replaces_no_trained_adapter_and_no_model(place, qwen):
    """They hold the same files as an output, but this package did not convert or merge them."""
    for name in ("adapter", "base"):
        shutil.copytree(place / name, place / f"other-{name}")
    refused(convert, place, place / "other-adapter", WEIGHTS)
    refused(merge, place, place / "other-base", "model.safetensors")


@pytest.mark.parametrize("act", [convert, merge])
def test_an_output_without_a_mark_names_what_to_do(place, act):
    """As earlier versions wrote it: what a training saves looks the same."""
    out = place / "out"
    act(place, out, force=False)
    (weights,) = out.glob("*.safetensors")
    save_file(load_file(weights), weights, {"format": "pt"})
    refused(act, place, out, "carries no mark.*move or delete this one yourself")


@pytest.mark.parametrize("act", [convert, merge])
def test_force_replaces_an_earlier_output(place, act):
    (place / "adapter" / "tokenizer.json").write_text("{}")
    (place / "base" / "LICENSE").write_text("free")
    out = place / "out"
    act(place, out, force=False)
    first = everything(out)
    (place / "link").symlink_to(out)
    act(place, out)
    act(place, place / "link")
    assert everything(out) == first
    assert (place / "link").is_symlink()
    merge(place, out)
    assert (out / "LICENSE").exists()


def test_force_replaces_no_file_that_only_looks_like_a_copy(place):
    """It has the name, the size and the time of the base's file, and other words."""
    out = place / "out"
    (place / "base" / "LICENSE").write_text("free")
    merge(place, out, force=False)
    (out / "LICENSE").write_text("mine")
    time = (place / "base" / "LICENSE").stat().st_mtime_ns
    os.utime(out / "LICENSE", ns=(time, time))
    refused(merge, place, out, "holds LICENSE")


@pytest.mark.parametrize("act", [convert, merge])
def test_an_output_may_lie_within_a_source(place, act):
    out = place / "base" / "out"
    act(place, out, force=False)
    act(place, out)
    assert (place / "base" / "config.json").exists()


def test_the_working_directory_stays(place, monkeypatch):
    out = place / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    refused(convert, place, out, "working directory")
    refused(convert, place, Path(), "working directory")


@pytest.mark.parametrize("kind", ["file", "loop"])
def test_a_destination_that_is_no_folder_is_refused(place, kind):
    out = place / "out"
    if kind == "file":
        out.write_text("years of work")
    else:
        out.symlink_to(out)
    refused(convert, place, out, "not a folder")


def test_strange_files_that_appear_in_the_meantime_stay(place):
    out = place / "out"
    convert(place, out, force=False)

    def disturb(done, total):
        (out / "thesis.tex").write_text("years of work")

    with pytest.raises(ExistsError, match=r"thesis\.tex"):
        convert_adapter(
            place / "adapter",
            out,
            to="peft",
            base_config=place / "base",
            force=True,
            progress=disturb,
        )
    assert (out / "thesis.tex").exists()
    assert sorted(p.name for p in place.iterdir()) == ["adapter", "base", "out"]


# ---- links ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "folder", "name"),
    [
        (convert, "adapter", WEIGHTS),
        (convert, "adapter", CONFIG),
        (convert, "adapter", "README.md"),
        (convert, "adapter", "tokenizer.json"),
        (merge, "adapter", WEIGHTS),
        (merge, "base", "model.safetensors"),
        (merge, "base", "config.json"),
        (merge, "base", "notes.txt"),
    ],
)
def test_a_link_that_leads_out_of_its_folder_is_refused(place, act, folder, name):
    secret = place.parent / "secret"
    file = place / folder / name
    if file.exists():
        file.rename(secret)
    else:
        secret.write_text("a password")
    file.symlink_to(secret)
    refused(act, place, place / "out", "outside its folder", AdapterError)


def test_a_link_within_its_folder_is_followed(place):
    (place / "adapter" / WEIGHTS).rename(place / "adapter" / "weights")
    (place / "adapter" / WEIGHTS).symlink_to("weights")
    convert(place, place / "out")
    assert not (place / "out" / WEIGHTS).is_symlink()


def test_a_link_to_a_whole_folder_is_followed(place):
    for name in ("adapter", "base"):
        (place / name).rename(place / f"real-{name}")
        (place / name).symlink_to(f"real-{name}")
    convert(place, place / "out")
    merge(place, place / "merged")


def as_in_the_hub_cache(folder, repository):
    """Move a folder's files to where the hub's cache keeps them; return the snapshot."""
    snapshot = repository / "snapshots" / "0123abc"
    blobs = repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    folder.rmdir()
    return snapshot


def test_the_links_of_a_hub_cache_are_followed(place):
    (place / "adapter" / "tokenizer.json").write_text("{}")
    right = tensors(place / "adapter")
    adapter = as_in_the_hub_cache(place / "adapter", place / "models--a--adapter")
    base = as_in_the_hub_cache(place / "base", place / "models--a--base")
    convert_adapter(adapter, place / "out", to="moe_lora", base_config=base)
    assert right.keys() == tensors(place / "out").keys()
    assert (place / "out" / "tokenizer.json").read_text() == "{}"
    merge_adapter(adapter, base, place / "merged")
    assert not any(path.is_symlink() for path in (place / "merged").iterdir())


@pytest.mark.parametrize("to", ["secret", "models--a--base/blobs/0", "blobs"])
def test_a_link_out_of_a_hub_cache_is_refused(place, to):
    """Links lead to the blobs of their own repository only."""
    adapter = as_in_the_hub_cache(place / "adapter", place / "models--a--adapter")
    as_in_the_hub_cache(place / "base", place / "models--a--base")
    (place / "secret").write_text("a password")
    if to == "blobs":  # the folder of the blobs is itself a link
        blobs = place / "models--a--adapter" / "blobs"
        blobs.rename(place / "blobs")
        blobs.symlink_to(place / "blobs")
    else:
        (adapter / "tokenizer.json").symlink_to(place / to)
    with pytest.raises(AdapterError, match="outside its folder"):
        convert_adapter(adapter, place / "out", to="moe_lora")
    assert not (place / "out").exists()


# ---- no files ------------------------------------------------------------------------------------


def put(kind, path):
    """Put something that is not a file at a path."""
    if path.exists():
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "named pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.parent / "absent")


@pytest.mark.parametrize("kind", ["folder", "named pipe", "link that leads to no file"])
@pytest.mark.parametrize(
    ("act", "folder", "name"),
    [
        (convert, "adapter", WEIGHTS),
        (convert, "adapter", CONFIG),
        (convert, "adapter", "README.md"),
        (convert, "adapter", "tokenizer_config.json"),
        (convert, "base", "config.json"),
        (merge, "base", "config.json"),
        (merge, "base", "model.safetensors"),
        (merge, "base", "model.safetensors.index.json"),
        (merge, "base", "generation_config.json"),
    ],
)
def test_what_is_not_a_file_is_refused_by_name(place, act, folder, name, kind):
    put(kind, place / folder / name)
    refused(act, place, place / "out", f"{name} is a {kind}", AdapterError)


def test_the_command_line_neither_waits_nor_shows_a_traceback(place):
    put("named pipe", place / "adapter" / CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "peft_moe_lora.cli", "inspect", place / "adapter"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "is a named pipe" in done.stderr
    assert "Traceback" not in done.stderr
