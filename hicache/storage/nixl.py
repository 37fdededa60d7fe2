"""Objects as local files, moved by NIXL's POSIX plug-in between them and registered pages.

The files are those of `hicache/storage/folder.py`, with the same header, checksum, limit and
eviction: either backend reads what the other has written, also in one folder at a time. What
differs: NIXL moves all objects of a batch at once, each by a request of its own, for it says of a
request only that a part of it failed. It does not say why, and a full disk must be told apart: so
the file's blocks are allocated before (on a file system that cannot, that costs a write per block).

Options: `path` and `limit` (both needed), `threads` (2, each with an agent of its own), `fsync`, as
those of the file backend; `queue`, how the plug-in talks to the kernel: aio, uring or posix.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import nixl._api
import numpy as np

from hicache.storage.blocking import Answer, Limits
from hicache.storage.file import FolderStore, open_folder
from hicache.storage.folder import ObjectFolder, object_name
from hicache.storage.objects import MAX_HEADER_BYTES, StoredObject, view
from hicache.storage.options import Options
from hicache.storage.storage import Outcome, StorageConfigurationError, StorageError
from hicache.storage.threaded import ThreadedStorage
from transfer.nixl import NIXL_ERRORS
from transfer.transport import Region

_BATCH_OBJECTS = 32
_QUEUES = {"aio": "use_aio", "uring": "use_uring", "posix": "use_posix_aio"}
_PAUSE_S = 0.0001
_HEADER_SLOT = -(-MAX_HEADER_BYTES // 64) * 64


def make_nixl_storage(name: str, options: dict[str, str]) -> ThreadedStorage:
    read = Options("nixl", options)
    limits = Limits(
        threads=read.number("threads", 2, at_least=1),
        batch_objects=_BATCH_OBJECTS,
        batch_bytes=64 << 20,
    )
    queue = _QUEUES[read.choice("queue", tuple(_QUEUES))]
    with contextlib.closing(_Mover(queue, ())):
        pass  # so that a plug-in that does not work is known now
    return ThreadedStorage(name, NixlStore(open_folder(read), queue), limits)


@dataclasses.dataclass(slots=True, eq=False)
class _Move:
    """One object on its way."""

    index: int
    stored: StoredObject
    name: str
    fd: int
    tmp: str = ""
    """Of a put: the file's path until it is published."""
    error: str = ""


class NixlStore(FolderStore):
    def __init__(self, folder: ObjectFolder, queue: str) -> None:
        super().__init__(folder)
        self._queue = queue
        self._regions: tuple[Region, ...] = ()
        self._movers: list[_Mover] = []
        self._own = threading.local()

    def register(self, regions: Sequence[Region]) -> None:
        self._regions = tuple(regions)

    def put(self, objects: Sequence[StoredObject]) -> list[Answer]:
        mover = self._mover()
        answers, moves = self._create(objects)
        mover.move("WRITE", moves)
        for move in moves:
            answers[move.index] = self._publish(move)
        return answers

    def get(self, objects: Sequence[StoredObject]) -> list[Answer]:
        mover = self._mover()
        answers: list[Answer] = [Outcome.MISS] * len(objects)
        moves = []
        for index, stored in enumerate(objects):
            name = object_name(stored.key)
            try:
                fd = os.open(self._folder.path(name), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as error:
                answers[index] = StorageError(str(error))
                continue
            if os.fstat(fd).st_size == stored.stored_bytes:
                moves.append(_Move(index, stored, name, fd))
            else:
                os.close(fd)
                answers[index] = self._corrupt(name)
        headers = mover.move("READ", moves)
        for move, header in zip(moves, headers, strict=True):
            os.close(move.fd)
            if move.error:
                answers[move.index] = StorageError(move.error)
            elif bytes(header) != move.stored.header(move.stored.views()):
                answers[move.index] = self._corrupt(move.name)
            else:
                self._folder.touch(move.name)
                answers[move.index] = Outcome.HIT
        return answers

    def close(self) -> None:
        while self._movers:
            self._movers.pop().close()
        super().close()

    def _create(self, objects: Sequence[StoredObject]) -> tuple[list[Answer], list[_Move]]:
        """Answers for those that are not to be written, and the files of the others."""
        answers: list[Answer] = [Outcome.PRESENT] * len(objects)
        moves = []
        for index, stored in enumerate(objects):
            name = object_name(stored.key)
            if self._folder.touch(name):
                continue
            try:
                made = self._with_room(stored, partial(self._allocate, stored))
            except OSError as error:
                answers[index] = StorageError(str(error))
                continue
            if made is None:
                answers[index] = Outcome.FULL
            else:
                moves.append(_Move(index, stored, name, *made))
        return answers, moves

    def _allocate(self, stored: StoredObject) -> tuple[int, str]:
        fd, tmp = self._folder.create(stored.stored_bytes)
        try:
            os.posix_fallocate(fd, 0, stored.stored_bytes)
        except OSError:
            os.close(fd)
            self._folder.discard(tmp, stored.stored_bytes)
            raise
        return fd, tmp

    def _publish(self, move: _Move) -> Answer:
        size = move.stored.stored_bytes
        try:
            if not move.error:
                self._folder.publish(move.fd, move.tmp, move.name, size)
                return Outcome.STORED
        except OSError as error:
            move.error = str(error)
        finally:
            os.close(move.fd)
        self._folder.discard(move.tmp, size)
        return StorageError(move.error)

    def _corrupt(self, name: str) -> Outcome:
        self._folder.remove(name)
        return Outcome.CORRUPT

    def _mover(self) -> _Mover:
        """This thread's; first of all, for it may not start."""
        if not hasattr(self._own, "mover"):
            self._own.mover = _Mover(self._queue, self._regions)
            self._movers.append(self._own.mover)
        mover: _Mover = self._own.mover
        return mover


class _Mover:
    """A thread's agent."""

    def __init__(self, queue: str, regions: Sequence[Region]) -> None:
        self._name = uuid.uuid4().hex
        self._headers = np.zeros(_BATCH_OBJECTS * _HEADER_SLOT, np.uint8)
        config = nixl._api.nixl_agent_config(enable_prog_thread=False, backends=[])
        try:
            self._agent: Any = nixl._api.nixl_agent(self._name, config)
            self._agent.create_backend("POSIX", {queue: "true"})
            for address, size in (
                (self._headers.ctypes.data, self._headers.nbytes),
                *((region.address, region.num_pages * region.page_bytes) for region in regions),
            ):
                if size:
                    self._agent.register_memory([(address, size, 0, "")], "DRAM", ["POSIX"])
        except NIXL_ERRORS as error:
            raise StorageConfigurationError(f"NIXL's POSIX plug-in: {error!r}") from error

    def move(self, operation: str, moves: list[_Move]) -> list[memoryview]:
        """Objects between their files and their pages; sets their errors. Returns the headers,
        valid until the next call."""
        headers = []
        for slot, move in enumerate(moves):
            first = self._headers.ctypes.data + slot * _HEADER_SLOT
            headers.append(view(first, move.stored.header_bytes))
            if operation == "WRITE":
                headers[-1][:] = move.stored.header(move.stored.views())
        if not moves:
            return headers
        try:
            files = self._agent.register_memory(
                [(0, move.stored.stored_bytes, move.fd, "") for move in moves], "FILE", ["POSIX"]
            )
        except NIXL_ERRORS as error:
            for move in moves:
                move.error = f"NIXL cannot register files: {error!r}"
            return headers
        handles = [
            self._post(operation, move, self._headers.ctypes.data + slot * _HEADER_SLOT)
            for slot, move in enumerate(moves)
        ]
        for move, handle in zip(moves, handles, strict=True):
            self._wait(move, handle)
        with contextlib.suppress(*NIXL_ERRORS):
            self._agent.deregister_memory(files, ["POSIX"])
        return headers

    def close(self) -> None:
        # It must go while the interpreter still runs; at exit it can crash.
        self._agent = None

    def _post(self, operation: str, move: _Move, header: int) -> Any:
        memory, file, offset = [], [], 0
        for address, length in ((header, move.stored.header_bytes), *move.stored.runs):
            memory.append((address, length, 0))
            file.append((offset, length, move.fd))
            offset += length
        try:
            handle = self._agent.initialize_xfer(
                operation,
                self._agent.get_xfer_descs(memory, "DRAM"),
                self._agent.get_xfer_descs(file, "FILE"),
                self._name,
                "",
                ["POSIX"],
            )
            self._agent.transfer(handle)
        except NIXL_ERRORS as error:
            move.error = f"NIXL cannot {operation.lower()} a file: {error!r}"
            return None
        return handle

    def _wait(self, move: _Move, handle: Any) -> None:
        """Until nothing more of it will move."""
        if handle is None:
            return
        try:
            while (state := self._agent.check_xfer_state(handle)) == "PROC":
                time.sleep(_PAUSE_S)
            if state != "DONE":
                move.error = f"NIXL's transfer ended with {state}"
        except NIXL_ERRORS as error:
            move.error = f"NIXL's transfer failed: {error!r}"
        with contextlib.suppress(*NIXL_ERRORS):
            self._agent.release_xfer_handle(handle)
