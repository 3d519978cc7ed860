"""How long a call takes, and how much memory it needs beyond what the process holds."""

import resource
import signal
import time
from contextlib import contextmanager

SECONDS = 10
MIB = 256
# a call that hangs is ended, and one that takes this much more memory gets none
_HANGS = 20
_MOST_MEMORY = 2**31


class _Hangs(BaseException):
    """Not an Exception, so that nothing takes it for an error in a file."""


def _resident():
    """Bytes that the process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _highest():
    """Bytes that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def bounded(what):
    """Fail if the body takes more than SECONDS, or MIB beyond what the process holds."""
    held = _resident()
    highest = _highest()
    started = time.process_time()
    try:
        with _alarm(), _limited_memory():
            yield
    except _Hangs:
        raise AssertionError(f"{what} did not end within {_HANGS} s") from None
    except MemoryError:
        raise AssertionError(f"{what} needed more than {_MOST_MEMORY} bytes") from None
    finally:
        seconds = time.process_time() - started
        grown = _highest()
        assert seconds < SECONDS, f"{what} took {seconds:.1f} s"
        # below the mark of an earlier call, this one is not seen
        needed = (grown - held) / 2**20
        assert grown == highest or needed < MIB, f"{what} needed {needed:.0f} MiB"


@contextmanager
def _alarm():
    """Raise _Hangs after a while; pytest-timeout's own alarm goes on afterwards."""

    def ring(signum, frame):
        raise _Hangs

    handler = signal.signal(signal.SIGALRM, ring)
    left, _ = signal.setitimer(signal.ITIMER_REAL, _HANGS)
    started = time.monotonic()
    try:
        yield
    finally:
        gone = time.monotonic() - started
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, max(left - gone, 1) if left else 0)


@contextmanager
def _limited_memory():
    """Let the process map no more than _MOST_MEMORY beyond what it has mapped."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MOST_MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
