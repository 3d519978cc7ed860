"""Runs that are interrupted at a chosen step of what they do to the disk, or at a random moment.

A step is a call by which Python changes names or opens a file to write; the interpreter's audit
events tell of it before it happens. A run without a kill counts as done.
"""

import itertools
import os
import random
import signal
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch

_CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "ctypes.dlsym"}
# open for writing, creating or truncating
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_LONGEST = 60  # seconds

_watched = {"installed": False, "step": None}


def _on_event(event, arguments):
    step = _watched["step"]
    if step is not None and is_step(event, arguments):
        step(event)


def is_step(event, arguments):
    if event == "open":
        path, _, flags = arguments
        return (
            isinstance(path, str | bytes)
            and b"/dev/" not in os.fsencode(path)
            and (bool(flags & _WRITES))
        )
    if event == "os.mkdir":
        # a folder that must be there may be made again
        return not os.path.isdir(arguments[0])
    return event in _CHANGES


@contextmanager
def at_step(number, act, kinds=None):
    """Call `act` before the step of this number, counted from 0; only of these kinds of events.

    Yields: a list of the kinds of all steps that came.
    """
    if not _watched["installed"]:
        # an audit hook cannot be removed
        sys.addaudithook(_on_event)
        _watched["installed"] = True
    seen = []

    def step(event):
        if kinds is None or event in kinds:
            seen.append(event)
            if len(seen) == number + 1:
                act()

    _watched["step"] = step
    try:
        yield seen
    finally:
        _watched["step"] = None


def raiser(error):
    def act():
        raise error

    return act


def in_child(run):
    """Run a function in a forked child; return the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        # a child that waits for threads of its parent would wait for ever
        torch.set_num_threads(1)
        signal.alarm(_LONGEST)
        run()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def is_killed(pid):
    """Wait for a child; whether it was killed. It must not have failed otherwise."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed; its traceback is on stderr"
    return False


def killed_at_every_step(run, kinds=None):
    """Kill a run before each of its steps in turn; yields the number of the step after each.

    Args:
        run: what to kill.
        kinds: the events that count as steps; by default all that change the disk.
    """
    for number in itertools.count():

        def killed_run(number=number):
            with at_step(number, lambda: os.kill(os.getpid(), signal.SIGKILL), kinds):
                run()

        if not is_killed(in_child(killed_run)):
            assert number > 3, "a run has more steps"
            return
        yield number


def killed_at_random(run, times, prepare):
    """Kill a run at random moments until it was killed so often; yields after each run whether.

    A run that ends before its moment comes is not killed.
    """
    chance = random.Random(0)
    shortest = min(_seconds(run, prepare) for _ in range(3))
    killed = 0
    while killed < times:
        prepare()
        pid = in_child(run)
        time.sleep(chance.uniform(0, shortest))
        os.kill(pid, signal.SIGKILL)
        is_dead = is_killed(pid)
        killed += is_dead
        yield is_dead


def _seconds(run, prepare):
    prepare()
    start = time.perf_counter()
    assert not is_killed(in_child(run))
    return time.perf_counter() - start


def tree(folder):
    """Path below a folder -> the bytes of a file, or None for a folder; None if there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found
