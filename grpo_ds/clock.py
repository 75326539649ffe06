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

    def metrics(self, **parts: dict[str, float]) -> dict[str, float]:
        """`seconds/PHASE`, `seconds/total`; parts: of a phase, the seconds of what it consists of (`seconds/PHASE_PART`)."""
        found = {f"seconds/{phase}_{part}": s for phase, split in parts.items() for part, s in split.items()}
        found |= {f"seconds/{phase}": s for phase, s in self.seconds.items()}
        return found | {"seconds/total": self.total}
