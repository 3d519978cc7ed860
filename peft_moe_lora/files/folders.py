"""Folders that conversions read and write.

A folder takes its place when it is complete; `writing.py` sees to that. An existing
folder is replaced only if this package wrote it and nothing that is read lies in it. The files that
are read or copied must lie in their folder; links lead out of it only within a hub cache.
"""

import filecmp
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .tensor_file import AdapterError, ExistsError, FilePath, TensorFile, check_file, is_output
from .text import shown
from .writing import written_folder

# beginnings of the names of files that an adapter's or a model's folder may hold beside weights
SIDE_FILES = (
    "tokenizer",
    "special_tokens_map",
    "added_tokens",
    "chat_template",
    "vocab.",
    "merges.txt",
    "README.md",
)
# further files that an output of this package may hold
_CONFIGS = ("adapter_config.json", "config.json", "generation_config.json")
_INDEX = "model.safetensors.index.json"
# endings of files; a folder with such a name is in the place of a file
_FILE_ENDINGS = (".json", ".md", ".txt", ".jinja", ".model", ".safetensors")
_ELSEWHERE = "Choose another destination, or move or delete this one yourself."


@contextmanager
def new_folder(
    dst: FilePath,
    force: bool = False,
    sources: Iterable[FilePath] = (),
    copied: Iterable[Path] = (),
) -> Iterator[Path]:
    """A temporary folder that replaces `dst` if the block succeeds, and is removed if it raises.

    Args:
        dst: the folder to write; a link to a folder stands for this folder.
        force: whether to replace `dst` if it exists and is an output of this package.
        sources: folders and files that are read; none of them may be in `dst`.
        copied: files that the block copies unchanged; `dst` may hold such copies.
    Yields: the temporary folder, in the parent of `dst`.
    Raises:
        ExistsError: if `dst` exists and is not an empty folder, unless `force` is set; in any case
            if it holds a source, the working directory or a file that this package did not write.
        WriteError: if the system does not let it be written, for example because the disk is full.
    """
    dst = Path(os.path.realpath(dst))
    check = partial(_check_destination, dst, force, list(sources), list(copied))
    with written_folder(dst, check) as new:
        yield new


def own_files(folder: FilePath, wanted: Callable[[str], bool]) -> list[Path]:
    """The files of a folder to read or copy, by name; its subfolders are left out.

    Args:
        folder: the folder.
        wanted: whether a file of this name is read or copied.
    Raises:
        AdapterError: if one of them is not a file, or a link that leads out of the folder.
    """
    found = []
    for entry in sorted(Path(folder).iterdir()):
        is_subfolder = entry.is_dir() and entry.suffix not in _FILE_ENDINGS
        if wanted(entry.name) and not is_subfolder:
            check_own_file(entry)
            found.append(entry)
    return found


def check_own_file(path: FilePath) -> None:
    """Check that a path is a file which lies in its folder.

    Raises:
        AdapterError: if it is there but not a file, or if it is a link that leads out of its folder
            and not to the same hub cache.
    """
    path = Path(path)
    check_file(path)
    folder = Path(os.path.realpath(path.parent))
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in (folder, *_blobs(folder))):
        raise AdapterError(
            f"{path} is a link to {shown(str(target))}, which is outside its folder; such links "
            "are not followed, because the user of a folder may not have made its links. Put the "
            "file itself in the link's place, or link the whole folder."
        )


def _blobs(folder: Path) -> list[Path]:
    """The folder with the files of a hub cache, if `folder` is one of its snapshots or in one.

    A cache holds <repository>/snapshots/<revision>/<file>, which is a link to
    <repository>/blobs/<hash>.
    """
    for snapshot in (folder, *folder.parents):
        if snapshot.parent.name == "snapshots":
            return [snapshot.parent.parent / "blobs"]
    return []


def _check_destination(dst: Path, force: bool, sources: list[FilePath], copied: list[Path]) -> None:
    """Check that `dst` is free, or may be replaced.

    Raises:
        ExistsError: if not.
    """
    if not os.path.lexists(dst):
        return
    if not dst.is_dir():
        raise ExistsError(f"{dst} exists and is not a folder. {_ELSEWHERE}")
    if _holds_working_directory(dst):
        raise ExistsError(
            f"{dst} is or holds the working directory and is not replaced; choose a folder that "
            "does not exist."
        )
    entries = sorted(dst.iterdir())
    if not entries:
        return
    if not force:
        raise ExistsError(
            f"{dst} exists; choose another destination, or overwrite it with force (--force)."
        )
    for source in sources:
        if _holds(dst, Path(source)):
            raise ExistsError(
                f"{dst} is not replaced, because it holds {source}, which is read; choose another "
                "destination."
            )
    outputs = [entry for entry in entries if _is_our_weights(entry)]
    strange = [
        entry for entry in entries if entry not in outputs and not _may_replace(entry, copied)
    ]
    if strange and strange[0].suffix == ".safetensors":
        raise ExistsError(
            f"{dst} is not replaced, because {shown(strange[0].name)} carries no mark that a "
            "conversion or a merge wrote it, so it may be what a training saved. Outputs of "
            f"versions that set no mark look the same. {_ELSEWHERE}"
        )
    if strange:
        raise ExistsError(
            f"{dst} is not replaced, because it holds {shown(strange[0].name)}, which this package "
            f"did not write. {_ELSEWHERE}"
        )
    if not outputs:
        raise ExistsError(
            f"{dst} is not replaced, because it holds no weights that this package wrote. "
            f"{_ELSEWHERE}"
        )


def _holds_working_directory(dst: Path) -> bool:
    try:
        return Path(os.path.realpath(os.getcwd())).is_relative_to(dst)
    except FileNotFoundError:  # the working directory was deleted
        return False


def _holds(dst: Path, source: Path) -> bool:
    """Whether a source, its real path, or a file that one of its links leads to, is in `dst`."""
    paths = [source]
    if source.is_dir() and os.access(source, os.R_OK):
        paths += [entry for entry in source.iterdir() if entry.is_file()]
    return any(
        Path(place).is_relative_to(dst)
        for path in paths
        for place in (os.path.realpath(path), os.path.abspath(path))
    )


def _is_our_weights(path: Path) -> bool:
    """Whether a path is a safetensors file that a conversion or a merge wrote."""
    if path.suffix != ".safetensors" or path.is_symlink():
        return False
    try:
        return is_output(TensorFile(path))
    except AdapterError:
        return False


def _may_replace(path: Path, copied: list[Path]) -> bool:
    """Whether a file is one that an output holds beside its weights."""
    if path.is_symlink() or not path.is_file():
        return False
    if path.name in (*_CONFIGS, _INDEX) or path.name.startswith(SIDE_FILES):
        return True
    return any(file.name == path.name and filecmp.cmp(file, path, shallow=False) for file in copied)
