"""A folder of objects, one file each, within a limit of bytes; several processes may share it.

Files lie in 256 folders by the digest of their key. A file is written under another name, in a
folder that is locked for as long as its writer lives, and renamed when it is whole: a reader never
sees a part, and what the dead left is removed at start. After a crash of the machine a file may
still be short or damaged (unless `fsync`); its checksum tells.

The least recently used files make room. A file's mtime is the time of its last use, so that it
survives a restart. What is there is read in the background: at start, and every RESCAN_S while
other processes use the folder; the limit may be exceeded by what those have added since. Until the
first reading is over it is not known how much there is: then room comes only from files that have
been read and are evicted, so that the limit is held.

All is safe to call from several threads, but `close`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import heapq
import logging
import os
import re
import shutil
import threading
import time
from pathlib import Path

from hicache.storage.claims import claim_folder, remove_dead
from hicache.storage.storage import StorageConfigurationError, StorageStats

logger = logging.getLogger(__name__)

RESCAN_S = 60.0
SHARDS = tuple(f"{shard:02x}" for shard in range(256))
FULL_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_NAME = re.compile(r"[0-9a-f]{32}")
_BLOCK_BYTES = 4096
_SCAN_WAIT_S = 1.0
"""So long a new object waits for the first scan to find something to evict."""


class NoRoom(Exception):
    """The limit is reached and there is nothing to evict."""


@dataclasses.dataclass(slots=True)
class _Entry:
    size: int
    used: int
    """In ns since the epoch."""
    scan: int
    """The last one that has seen it."""


class ObjectFolder:
    def __init__(self, path: str, limit_bytes: int, fsync: bool = False) -> None:
        self._path = path
        self._limit = limit_bytes
        self._fsync = fsync
        self._changed = threading.Condition()
        """Guards what follows."""
        self._entries: dict[str, _Entry] = {}
        self._by_use: list[tuple[int, str]] = []
        """A heap of (used, name); an entry that was used since is put back when it comes up."""
        self._bytes = 0
        """Of all entries."""
        self._room = 0
        """Bytes that may be added. The first scan adds the limit less what it found."""
        self._evicted = 0
        self._scan = 1
        self._scanned = 0.0
        self._last_tmp = 0
        self._stop = threading.Event()
        try:
            for shard in SHARDS:
                os.makedirs(f"{path}/{shard}", mode=0o700, exist_ok=True)
            self._tmp, self._lock_fd = claim_folder(Path(path, "tmp"))
        except OSError as error:
            raise StorageConfigurationError(f"storage in {path}: {error}") from error
        self._scanner = threading.Thread(target=self._run, name=f"scan {path}", daemon=True)
        self._scanner.start()

    def path(self, name: str) -> str:
        return f"{self._path}/{name[:2]}/{name}"

    def create(self, size: int) -> tuple[int, str]:
        """Room for a file of `size` bytes, and the file: (descriptor, path). `publish` or `discard`
        ends it; the descriptor is the caller's. Raises NoRoom."""
        self._reserve(_on_disk(size))
        with self._changed:
            self._last_tmp += 1
            path = f"{self._tmp}/{self._last_tmp}"
        try:
            return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600), path
        except OSError:
            self._give_back(_on_disk(size))
            raise

    def publish(self, fd: int, path: str, name: str, size: int) -> None:
        """The file is whole: from now on it is found."""
        if self._fsync:
            os.fdatasync(fd)
        os.rename(path, self.path(name))
        with self._changed:
            self._room += self._pop(name)  # it took the place of another one
            self._insert(name, _on_disk(size), time.time_ns())

    def discard(self, path: str, size: int) -> None:
        with contextlib.suppress(OSError):
            os.unlink(path)
        self._give_back(_on_disk(size))

    def touch(self, name: str) -> bool:
        """It was used. False: it is not there."""
        now = time.time_ns()
        try:
            os.utime(self.path(name), ns=(now, now))
        except OSError:
            if not os.path.exists(self.path(name)):
                return False
            # A folder that can only be read: after a restart it counts as older.
        with self._changed:
            if name in self._entries:
                self._entries[name].used = now
        return True

    def remove(self, name: str) -> bool:
        """False: it is not there."""
        with self._changed:
            # First: a file of that name that comes meanwhile is rather counted in vain than not.
            freed = self._pop(name)
        try:
            os.unlink(self.path(name))
        except FileNotFoundError:
            return False
        finally:
            self._give_back(freed)
        return True

    def clear(self) -> None:
        for shard in SHARDS:
            for name in os.listdir(f"{self._path}/{shard}"):
                if _NAME.fullmatch(name):
                    self.remove(name)

    def evict(self, size: int) -> bool:
        """The least recently used files, of `size` bytes in all at least. False: there are not so
        many."""
        while size > 0:
            with self._changed:
                name = self._oldest()
                if name is None:
                    return False
                freed = self._pop(name)
                self._evicted += 1
            try:
                os.unlink(self.path(name))
            except FileNotFoundError:
                pass  # another process was faster
            except OSError as error:
                logger.warning("cannot evict %s: %s", self.path(name), error)
                continue  # it stays, uncounted, until the next scan
            self._give_back(freed)
            size -= freed
        return True

    def stats(self) -> StorageStats:
        with self._changed:
            return StorageStats(
                len(self._entries),
                self._bytes,
                self._limit,
                self._scanned,
                evicted_objects=self._evicted,
            )

    def close(self) -> None:
        """When no other call is under way."""
        self._stop.set()
        self._scanner.join()
        shutil.rmtree(self._tmp, ignore_errors=True)
        os.close(self._lock_fd)

    # ------------------------------------------------------------------ room

    def _reserve(self, size: int) -> None:
        if size > self._limit:
            raise NoRoom
        deadline = time.monotonic() + _SCAN_WAIT_S
        while True:
            with self._changed:
                if self._room >= size:
                    self._room -= size
                    return
                missing = size - self._room
            if not self.evict(missing):
                with self._changed:
                    is_over = self._scanned == 1.0 or time.monotonic() > deadline
                    if is_over and self._room < size:
                        raise NoRoom
                    self._changed.wait(0.0 if is_over else 0.1)

    def _give_back(self, size: int) -> None:
        with self._changed:
            self._room += size

    # ------------------------------------------------------------------ with the lock held

    def _insert(self, name: str, size: int, used: int) -> None:
        self._entries[name] = _Entry(size, used, self._scan)
        self._bytes += size
        heapq.heappush(self._by_use, (used, name))
        if len(self._by_use) > 2 * len(self._entries) + 1024:  # entries that were removed
            self._by_use = [(entry.used, name) for name, entry in self._entries.items()]
            heapq.heapify(self._by_use)

    def _pop(self, name: str) -> int:
        """Its bytes; 0 if it was unknown."""
        entry = self._entries.pop(name, None)
        if entry is None:
            return 0
        self._bytes -= entry.size
        return entry.size

    def _oldest(self) -> str | None:
        while self._by_use:
            used, name = self._by_use[0]
            entry = self._entries.get(name)
            if entry is None:
                heapq.heappop(self._by_use)
            elif entry.used != used:
                heapq.heapreplace(self._by_use, (entry.used, name))
            else:
                return name
        return None

    # ------------------------------------------------------------------ the scanner's thread

    def _run(self) -> None:
        self._read()
        while not self._stop.wait(RESCAN_S):
            with contextlib.suppress(OSError):
                if not remove_dead(Path(self._path, "tmp")):
                    continue  # nobody but us
            with self._changed:
                self._scan += 1
            self._read()

    def _read(self) -> None:
        """What is in the folder, into the entries."""
        found = 0
        for number, shard in enumerate(SHARDS):
            if self._stop.is_set():
                return
            files = _list(f"{self._path}/{shard}")
            with self._changed:
                for name, size, used in files:
                    if name in self._entries:
                        self._entries[name].scan = self._scan
                        self._entries[name].used = max(self._entries[name].used, used)
                    else:
                        self._insert(name, size, used)
                        found += size
                if self._scan == 1:
                    self._scanned = number / len(SHARDS)
                self._changed.notify_all()
        with self._changed:
            for name in [n for n, entry in self._entries.items() if entry.scan < self._scan]:
                self._room += self._pop(name)  # another process has removed it
            self._room += (self._limit if self._scan == 1 else 0) - found
            excess = -self._room
        self.evict(excess)
        with self._changed:
            self._scanned = 1.0
            self._changed.notify_all()


def object_name(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK_BYTES) * _BLOCK_BYTES


def _list(path: str) -> list[tuple[str, int, int]]:
    """(name, bytes on disk, mtime) of the objects in a folder."""
    files = []
    try:
        with os.scandir(path) as found:
            for file in found:
                with contextlib.suppress(FileNotFoundError):
                    if _NAME.fullmatch(file.name):
                        status = file.stat(follow_symlinks=False)
                        files.append((file.name, _on_disk(status.st_size), status.st_mtime_ns))
    except OSError as error:
        logger.warning("cannot read %s: %s", path, error)
    return files
