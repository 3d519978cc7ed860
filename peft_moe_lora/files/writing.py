"""Writes folders and files so that an interruption leaves what was there, or what was written.

Everything is written into a hidden folder beside its place, and reaches the disk there. A folder
then takes its place in one step. Files of one save take their places one after the other; until
the last one has, `check_saved` tells that they do not belong together.

    .peft_moe_lora-<random>/    the hidden folder of one run
        lock                    locked by the run (flock) for as long as it lives
        new/                    what is being written, or what was replaced and is to be removed
        moving/                 complete files, of which some may already be in their places
        old/<name>              a folder that is being replaced, where two cannot be exchanged

A run that is killed cannot remove its hidden folder. The next run in the same place takes the lock,
finishes or takes back what was begun, and removes the folder. The lock of a run that still writes
cannot be taken.
"""

import ctypes
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

from safetensors import SafetensorError

from .tensor_file import AdapterError, FilePath
from .text import shown

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CONFIG_NAME = "adapter_config.json"
_WORK = ".peft_moe_lora-"
_LOCK = "lock"
_NEW = "new"
_MOVING = "moving"
_OLD = "old"
# of linux/fcntl.h and linux/fs.h
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class WriteError(OSError):
    """A folder or file could not be written, for example because the disk is full."""


@contextmanager
def written_folder(dst: Path, check: Callable[[], None]) -> Iterator[Path]:
    """A folder to write into, which takes the place of `dst` in one step if the block succeeds.

    Args:
        dst: the folder to write.
        check: raises an error if `dst` is there and may not be replaced. It is called before
            anything is written, and again before `dst` is replaced.
    Yields: an empty folder.
    Raises:
        WriteError: if the system does not let it be written. What was there is unchanged.
    """
    check()
    with _reported(dst), _workspace(dst.parent) as work:
        # a killed run may have left `dst` in its hidden folder
        check()
        new = work / _NEW
        new.mkdir()
        yield new
        _sync_all(new)
        check()
        try:
            # also takes the place of an empty folder
            os.rename(new, dst)
        except OSError:
            if not dst.is_dir():
                raise
            # another run may have written it since
            check()
            _replace(dst, new)
        _sync(dst.parent)


@contextmanager
def written_files(folder: FilePath) -> Iterator[Path]:
    """A folder to write into, whose files take their places in `folder` if the block succeeds.

    Yields: an empty folder. Files of its subfolders get into subfolders of `folder`.
    Raises:
        WriteError: if the system does not let them be written. If that happens before the first
            file takes its place, what was there is unchanged.
    """
    folder = Path(folder)
    with _reported(folder), _workspace(folder) as work:
        new = work / _NEW
        new.mkdir()
        yield new
        _sync_all(new)
        for file in _files(new):
            target = folder / file.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                raise IsADirectoryError(f"{target} is a folder, not a file")
        os.rename(new, work / _MOVING)
        _sync(work)
        _move(work)


def check_saved(folder: FilePath) -> None:
    """Check that weights and configuration in a folder are of one save.

    Raises:
        AdapterError: if a save was interrupted while files took their places.
    """
    folder = Path(os.path.realpath(folder))
    # PEFT saves an adapter that is not called "default" in a subfolder
    for place, subfolder in ((folder, ""), (folder.parent, folder.name)):
        for work in _works(place):
            rest = work / _MOVING / subfolder
            if rest.is_dir() and any(file.is_file() for file in rest.iterdir()):
                raise AdapterError(
                    f"{folder}: saving was interrupted, so its weights and its configuration may "
                    f"not belong together. The rest of the new files is in {rest}: move them to "
                    f"{folder}, or save the adapter again."
                )


@contextmanager
def _workspace(parent: Path) -> Iterator[Path]:
    """A hidden folder in `parent`, which is removed at the end; so are those of killed runs."""
    missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for work in _works(parent):
            _remove_leftover(work)
        work, lock = _new_work(parent)
        try:
            yield work
        finally:
            try:
                _close(work)
            finally:
                os.close(lock)
    except BaseException:
        with suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


def _works(parent: Path) -> list[Path]:
    return sorted(parent.glob(f"{_WORK}*"))


def _new_work(parent: Path) -> tuple[Path, int]:
    """A new hidden folder, and the descriptor of its locked file."""
    while True:
        work = Path(tempfile.mkdtemp(dir=parent, prefix=_WORK))
        try:
            lock = os.open(work / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            if _take(lock, work) is not False:
                return work, lock
            os.close(lock)
        except FileNotFoundError:
            # another run took the folder for a leftover, because it was not locked yet
            continue
        except BaseException:
            with suppress(OSError):
                work.rmdir()
            raise


def _take(lock: int, work: Path) -> bool | None:
    """Lock the open file of a hidden folder without waiting.

    Returns: True if it is locked; False if another run has it, or removed it; None if this system
        cannot lock it.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    try:
        return os.path.samestat(os.fstat(lock), os.stat(work / _LOCK))
    except FileNotFoundError:
        return False


def _remove_leftover(work: Path) -> None:
    """Remove a hidden folder of this user, unless a run still writes it.

    Raises:
        OSError: if the files that it still holds cannot take their places.
    """
    if fcntl is None:
        return
    try:
        status = work.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return
        lock = os.open(work / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        # killed before it made its lock or after it removed it; fails if the folder is not empty
        with suppress(OSError):
            work.rmdir()
        return
    except OSError:
        return
    try:
        if _take(lock, work):
            _close(work)
    finally:
        os.close(lock)


def _close(work: Path) -> None:
    """Finish or take back what a run began, and remove its hidden folder; the lock comes last."""
    _move(work)
    _put_back(work)
    for name in (_NEW, _OLD):
        shutil.rmtree(work / name, ignore_errors=True)
    with suppress(OSError):
        if os.listdir(work) == [_LOCK]:
            (work / _LOCK).unlink()
            work.rmdir()


def _move(work: Path) -> None:
    """Move complete files to their places, the configuration of an adapter first.

    Without its configuration, an adapter is not loaded at all; so whoever finds one of the others
    finds the configuration, and `check_saved` can be asked.
    """
    moving = work / _MOVING
    if not moving.is_dir():
        return
    try:
        for file in sorted(_files(moving), key=lambda path: path.name != CONFIG_NAME):
            target = work.parent / file.relative_to(moving)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_file():
                shutil.copymode(target, file)
            os.replace(file, target)
            _sync(target.parent)
    except OSError as error:
        if _is_hidden(work.parent):
            raise
        raise WriteError(
            f"{work.parent}: saving was interrupted ({_reason(error)}). The rest of the new files "
            f"is in {moving}: move them to {work.parent}, or save again."
        ) from error
    shutil.rmtree(moving, ignore_errors=True)


def _put_back(work: Path) -> None:
    """Put a folder back that was moved away, if no other took its place."""
    for old in (work / _OLD).glob("*"):
        if not os.path.lexists(work.parent / old.name):
            os.rename(old, work.parent / old.name)


def _replace(dst: Path, new: Path) -> None:
    """Put a new folder in the place of another, in one step where the system can."""
    if not _exchanged(new, dst):
        old = new.parent / _OLD
        old.mkdir()
        os.rename(dst, old / dst.name)
        os.rename(new, dst)
    _sync(new.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        # not Linux
        return False
    paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    # fails on an old kernel and on a file system without the exchange
    return renameat2(*paths, _RENAME_EXCHANGE) == 0


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if not path.is_dir()]


def _sync_all(folder: Path) -> None:
    """Wait until a folder and all it holds are on the disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _reported(dst: Path) -> Iterator[None]:
    """Name the destination in errors of the system."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, WriteError) or _is_hidden(dst):
            raise
        raise WriteError(
            f"{dst} was not written ({_reason(error)}), and what was there is unchanged. Free "
            "space on its disk, or choose a folder that you may write."
        ) from error


def _is_hidden(folder: Path) -> bool:
    """Whether a folder is in a hidden one; errors then name the destination of that one."""
    return _WORK in str(folder)


def _reason(error: Exception) -> str:
    """What the system says of an error, with the file it names unless that is a hidden one."""
    if not isinstance(error, OSError) or error.strerror is None:
        return shown(error)
    if error.filename is None or _WORK in str(error.filename):
        return error.strerror
    return shown(f"{error.strerror}: {error.filename}")
