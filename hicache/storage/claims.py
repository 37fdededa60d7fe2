"""A folder for each process's unfinished files, locked for as long as the process lives, so that
others know whether what lies there is still being written. The lock (flock) ends with its holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path


def claim_folder(tmp: Path) -> tuple[str, int]:
    """A folder for this process's unfinished files, and the descriptor by which it is locked."""
    tmp.mkdir(mode=0o700, exist_ok=True)
    with _locked(tmp):
        _remove_dead(tmp)
        own = tmp / uuid.uuid4().hex
        own.mkdir(mode=0o700)
        fd = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return str(own), fd


def remove_dead(tmp: Path) -> int:
    """As at a start; returns the number of other processes that live."""
    with _locked(tmp):
        return _remove_dead(tmp)


@contextlib.contextmanager
def _locked(tmp: Path) -> Iterator[None]:
    """Folders there appear and disappear only under this lock."""
    fd = os.open(tmp / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_dead(tmp: Path) -> int:
    """Folders of processes that are gone; returns the number of the others, but the caller's."""
    alive = -1
    for folder in tmp.iterdir():
        if folder.name == "lock":
            continue
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                alive += 1
            finally:
                os.close(fd)
    return alive
