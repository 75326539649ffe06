"""The folder of a server's temporary files, and those that killed runs left behind.

The guard removes the folder when the server has ended. Where guard and owner were both killed, nobody does: the next run
finds such folders by the lock of their owner, which the kernel releases with the process. (A process id would tell
nothing where containers share a folder.) Standard library only, Linux only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

PREFIX = "grpo-ds-"
_OWNER = "owner.lock"


class Scratch:
    """A new folder in TMPDIR, held until `remove` or the end of this process."""

    def __init__(self) -> None:
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        # Under its name only once it is locked: a sweep takes no folder without it. Child processes do not inherit it.
        self._lock = open(self.path / "making", "wb")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / "making").rename(self.path / _OWNER)

    def remove(self) -> None:
        """Removes the folder, unless the guard did. May be called more than once."""
        if self.path.exists():
            shutil.rmtree(self.path)
        self._lock.close()


def sweep() -> None:
    """Removes the folders in TMPDIR that this user's ended processes left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # It may vanish meanwhile, because another run's guard or sweep removes it.
        with contextlib.suppress(FileNotFoundError):
            if folder.stat().st_uid == os.getuid() and _free(folder / _OWNER):
                shutil.rmtree(folder, ignore_errors=True)


def _free(owner: Path) -> bool:
    """Whether its process is gone; FileNotFoundError for a folder that is being made."""
    with open(owner, "r+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
