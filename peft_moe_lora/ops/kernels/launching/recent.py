"""A dict of bounded size: what was used least recently is dropped, one entry after the other."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class _Entry(Generic[V]):
    """One entry.

    Attributes:
        size: its share of the limit.
        used: number of the look-up that used it last.
    """

    __slots__ = ("key", "size", "used", "value")

    def __init__(self, key: Hashable, value: V, size: int, used: int) -> None:
        self.key = key
        self.value = value
        self.size = size
        self.used = used


class Recent(Generic[V]):
    """Values by key, up to a total size.

    Autograd runs backward in threads of its own, so each method holds a lock.

    Args:
        limit: the largest total size of the entries.
        dropped: called with each value that is dropped to make room.
    Attributes:
        size: the total size of the entries.
        lookups: number of calls of `get`.
    """

    def __init__(self, limit: int, dropped: Callable[[V], None] | None = None) -> None:
        self.limit = limit
        self.size = 0
        self.lookups = 0
        self._dropped = dropped
        self._entries: dict[Hashable, _Entry[V]] = {}
        # least recently used first; an entry's hash is its identity, so a key is hashed only once
        self._order: OrderedDict[_Entry[V], None] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def values(self) -> list[V]:
        """All values, the least recently used first."""
        with self._lock:
            return [entry.value for entry in self._order]

    def get(self, key: Hashable) -> V | None:
        """The value of a key, which counts as used now; None if there is none."""
        with self._lock:
            self.lookups += 1
            entry = self._entries.get(key)
            if entry is None:
                return None
            entry.used = self.lookups
            self._order.move_to_end(entry)
            return entry.value

    def put(self, key: Hashable, value: V, size: int = 1) -> None:
        """Set the value of a key; it counts as used now. Larger than the limit, it is not kept."""
        with self._lock:
            self._remove(key)
            if size > self.limit:
                return
            dropped = self._make_room(size)
            entry = _Entry(key, value, size, self.lookups)
            self._entries[key] = entry
            self._order[entry] = None
            self.size += size
        if self._dropped is not None:
            for old in dropped:
                self._dropped(old)

    def newest_in_the_way(self, size: int) -> int | None:
        """When the entries that a new one would drop were used last.

        Args:
            size: size of the new entry.
        Returns: the number of the last look-up that used one of them; None if there is room.
        """
        with self._lock:
            excess = self.size + size - self.limit
            used = None
            for entry in self._order:
                if excess <= 0:
                    break
                excess -= entry.size
                used = entry.used
            return used

    def drop(self, key: Hashable) -> None:
        """Remove the entry of a key, if there is one."""
        with self._lock:
            self._remove(key)

    def remove(self, unwanted: Callable[[V], bool]) -> None:
        """Remove the entries with these values."""
        with self._lock:
            for key in [entry.key for entry in self._order if unwanted(entry.value)]:
                self._remove(key)

    def clear(self) -> None:
        """Remove all entries."""
        with self._lock:
            self._entries.clear()
            self._order.clear()
            self.size = 0

    def _make_room(self, size: int) -> list[V]:
        dropped = []
        while self.size + size > self.limit:
            oldest = next(iter(self._order))
            self._remove(oldest.key)
            dropped.append(oldest.value)
        return dropped

    def _remove(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            del self._order[entry]
            self.size -= entry.size
