"""Seconds by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds by phase of one round."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start = time.monotonic()

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        """Adds the time of the block to `phase`."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[phase] += time.monotonic() - start

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.monotonic() - self._start
