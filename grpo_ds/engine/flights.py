"""Which calls of `generate` an abort ends: those that began before it, and no later one."""

from __future__ import annotations

import threading
from collections import Counter


class Flights:
    """Counts calls in flight by the number of aborts before them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._aborts = 0
        self._flying: Counter[int] = Counter()

    def take_off(self) -> int:
        """Begin a call; returns what the other methods know it by."""
        with self._changed:
            self._flying[self._aborts] += 1
            return self._aborts

    def land(self, flight: int) -> None:
        """End a call."""
        with self._changed:
            self._flying[flight] -= 1
            self._changed.notify_all()

    def any(self) -> bool:
        """Whether a call is in flight."""
        with self._changed:
            return any(self._flying.values())

    def aborted(self, flight: int) -> bool:
        """Whether an abort came after the call began."""
        return flight != self._aborts

    def abort(self) -> None:
        """Mark every call in flight as aborted."""
        with self._changed:
            self._aborts += 1

    def wait_aborted(self, timeout_s: float) -> bool:
        """Wait until no aborted call is in flight; False when that takes longer than timeout_s seconds."""
        with self._changed:
            return self._changed.wait_for(self._none_left, timeout_s)

    def _none_left(self) -> bool:
        return not any(count for flight, count in self._flying.items() if flight != self._aborts)
