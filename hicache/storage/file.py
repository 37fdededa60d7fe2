"""Objects as local files, read and written by threads straight from and to pages.

Options: `path`, the folder, and `limit`, the bytes that it may take (both needed); `threads` (4);
`fsync`, never or always, whether an object is on the disk before it is found. Files are those of
`hicache/storage/folder.py`, the same as the nixl backend's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TypeVar

from hicache.storage.blocking import Answer, BlockingStore, Limits
from hicache.storage.folder import FULL_ERRORS, NoRoom, ObjectFolder, object_name
from hicache.storage.objects import StoredObject
from hicache.storage.options import Options
from hicache.storage.storage import Outcome, StorageError, StorageStats
from hicache.storage.threaded import ThreadedStorage

T = TypeVar("T")
_MOST_BUFFERS = os.sysconf("SC_IOV_MAX")


def make_file_storage(name: str, options: dict[str, str]) -> ThreadedStorage:
    read = Options("file", options)
    limits = Limits(threads=read.number("threads", 4, at_least=1))
    folder = open_folder(read)
    return ThreadedStorage(name, FileStore(folder), limits)


def open_folder(options: Options) -> ObjectFolder:
    """By the options that have not been read yet; there are no others."""
    path = options.text("path")
    limit = options.bytes("limit")
    fsync = options.choice("fsync", ("never", "always")) == "always"
    options.end()
    return ObjectFolder(path, limit, fsync)


class FolderStore(BlockingStore):
    """What does not depend on how bytes get into files and back."""

    def __init__(self, folder: ObjectFolder) -> None:
        self._folder = folder

    def exists(self, objects: Sequence[StoredObject]) -> list[Answer]:
        path = self._folder.path
        return [
            Outcome.PRESENT if os.path.exists(path(object_name(stored.key))) else Outcome.MISS
            for stored in objects
        ]

    def remove(self, objects: Sequence[StoredObject]) -> list[Answer]:
        return [
            Outcome.REMOVED if self._folder.remove(object_name(stored.key)) else Outcome.MISS
            for stored in objects
        ]

    def clear(self) -> None:
        self._folder.clear()

    def stats(self) -> StorageStats:
        return self._folder.stats()

    def close(self) -> None:
        self._folder.close()

    def _with_room(self, stored: StoredObject, write: Callable[[], T]) -> T | None:
        """What `write` returns, which is called again after an eviction if the disk is full, though
        the limit is not reached, for others use it too. None: there is no room."""
        for is_last in (False, True):
            try:
                return write()
            except NoRoom:
                return None
            except OSError as error:
                if error.errno not in FULL_ERRORS:
                    raise
                if is_last or not self._folder.evict(2 * stored.stored_bytes):
                    return None
        raise AssertionError("the last try ends it")


class FileStore(FolderStore):
    def put(self, objects: Sequence[StoredObject]) -> list[Answer]:
        return [_answer(self._put, stored) for stored in objects]

    def get(self, objects: Sequence[StoredObject]) -> list[Answer]:
        return [_answer(self._get, stored) for stored in objects]

    def _put(self, stored: StoredObject) -> Outcome:
        name = object_name(stored.key)
        if self._folder.touch(name):
            return Outcome.PRESENT
        done = self._with_room(stored, lambda: self._write(stored, name))
        return done or Outcome.FULL

    def _write(self, stored: StoredObject, name: str) -> Outcome:
        views = stored.views()
        header = stored.header(views)
        fd, path = self._folder.create(stored.stored_bytes)
        try:
            _move(os.writev, fd, [memoryview(header), *views])
            self._folder.publish(fd, path, name, stored.stored_bytes)
        except BaseException:
            self._folder.discard(path, stored.stored_bytes)
            raise
        finally:
            os.close(fd)
        return Outcome.STORED

    def _get(self, stored: StoredObject) -> Outcome:
        name = object_name(stored.key)
        try:
            fd = os.open(self._folder.path(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return Outcome.MISS
        try:
            views = stored.views()
            header = bytearray(stored.header_bytes)
            is_whole = (
                os.fstat(fd).st_size == stored.stored_bytes
                and _move(os.readv, fd, [memoryview(header), *views])
                and header == stored.header(views)
            )
        finally:
            os.close(fd)
        if not is_whole:
            self._folder.remove(name)
            return Outcome.CORRUPT
        self._folder.touch(name)
        return Outcome.HIT


def _answer(call: Callable[[StoredObject], Outcome], stored: StoredObject) -> Answer:
    try:
        return call(stored)
    except OSError as error:
        return StorageError(str(error))


def _move(call: Callable[[int, list[memoryview]], int], fd: int, buffers: list[memoryview]) -> bool:
    """All of `buffers`, in as many calls as it takes. False: the file ends before."""
    first = 0
    while first < len(buffers):
        done = call(fd, list(islice(buffers, first, first + _MOST_BUFFERS)))
        if done == 0:
            return False
        while first < len(buffers) and done >= len(buffers[first]):
            done -= len(buffers[first])
            first += 1
        if done:
            buffers[first] = buffers[first][done:]
    return True
