"""Runs whose speed a test sets while they run."""

from __future__ import annotations

from pathlib import Path

PACE = '''
import time
from pathlib import Path

def paced(completions, **columns):
    """1 for an even number of digits, after the seconds that stand in the file `pace` beside this one."""
    time.sleep(float((Path(__file__).parent / "pace").read_text()))
    return [float(sum(c.isdigit() for c in text) % 2 == 0) for text in completions]
'''


class Pace:
    """How long a reward call takes: a run that is slow enough can be met in the middle, then let go."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.free()

    def slow(self) -> None:
        """About two seconds a round."""
        self._set("0.5")

    def free(self) -> None:
        """As fast as it goes."""
        self._set("0")

    def _set(self, seconds: str) -> None:
        # In one step: a reward process may be reading.
        new = self._file.with_suffix(".new")
        new.write_text(seconds)
        new.replace(self._file)
