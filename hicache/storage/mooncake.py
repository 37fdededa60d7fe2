"""Objects in a Mooncake Store: memory of many processes, found through a master.

Pages are registered and moved without a copy; header and content are parts of one object. The
library's client finds the master again by itself, and offers its memory again to a new one, which
has forgotten all objects. Its calls can block, for as long as 20 s when a process stops that it
talks to; threads make them. The first connection is made by the first call that needs it.

Known, of 0.3.13: a put of a key that exists says that it was stored, so keys are looked up first.
A call to a master that is gone takes 4 s, so after one that failed others do for DOWN_S without
one. While it sets up its client the library holds the interpreter's lock, for 90 s if nobody
answers, so it is done only when somebody listens there; a master that is stopped at that moment
stops the process. Objects are removed by force: a reader who is at it may get other bytes, which
its checksum shows.

Options: `master` (host:port, needed); `host`, our address as others reach it; `protocol`, tcp or
rdma; `device`, the RDMA devices; `segment`, the memory that this process adds to the store (0);
`prefix` of our keys in the store ("pagerelay/"), which is what `clear` removes; `threads` (4).
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from hicache.storage.blocking import Answer, BlockingStore, Limits
from hicache.storage.objects import MAX_HEADER_BYTES, StoredObject, view
from hicache.storage.options import Options
from hicache.storage.storage import Outcome, StorageConfigurationError, StorageError, StorageStats
from hicache.storage.threaded import ThreadedStorage
from transfer.transport import Region

# Read when it is loaded: it announces every step on standard error, unless told not to.
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
import mooncake.store

DOWN_S = 1.0
_BATCH_OBJECTS = 64
_PROBE_S = 1.0
_LOCAL_BUFFER_BYTES = 16 << 20
# Codes of mooncake-store/include/types.h.
_TOO_SMALL, _TRANSFER_FAILED, _NO_MASTER = -600, -800, -900
_MEANING = {
    -200: Outcome.FULL,  # no memory left, and nothing to evict yet
    -703: Outcome.MISS,  # being written
    -704: Outcome.MISS,
    -705: Outcome.PRESENT,
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Settings:
    master: str
    host: str
    protocol: str
    device: str
    segment_bytes: int
    prefix: str


def make_mooncake_storage(name: str, options: dict[str, str]) -> ThreadedStorage:
    read = Options("mooncake", options)
    limits = Limits(read.number("threads", 4, at_least=1), _BATCH_OBJECTS, 32 << 20)
    settings = _Settings(
        read.text("master"),
        read.text("host", "127.0.0.1"),
        read.choice("protocol", ("tcp", "rdma")),
        read.text("device", ""),
        read.bytes("segment", 0),
        read.text("prefix", "pagerelay/"),
    )
    read.end()
    _host, colon, port = settings.master.rpartition(":")
    if not colon or not port.isdecimal():
        raise StorageConfigurationError(
            f"mooncake storage, master: expected host:port, got {settings.master!r}"
        )
    return ThreadedStorage(name, MooncakeStore(settings, limits.threads), limits)


class MooncakeStore(BlockingStore):
    def __init__(self, settings: _Settings, threads: int) -> None:
        self._settings = settings
        self._connecting = threading.Lock()
        self._store: Any = None
        self._down_until = 0.0
        self._regions: tuple[Region, ...] = ()
        self._registered: list[Region] = []
        slots = np.zeros((threads, _BATCH_OBJECTS * MAX_HEADER_BYTES), np.uint8)
        self._slots = slots
        """Room for headers, registered."""
        self._free_slots = list(slots)

    def register(self, regions: Sequence[Region]) -> None:
        self._regions = tuple(regions)

    def put(self, objects: Sequence[StoredObject]) -> list[Answer]:
        answers = self.exists(objects)
        missing = [i for i, answer in enumerate(answers) if answer is Outcome.MISS]
        if missing:
            new = [objects[index] for index in missing]
            for index, answer in zip(missing, self._put(new), strict=True):
                answers[index] = answer
        return answers

    def _put(self, objects: Sequence[StoredObject]) -> list[Answer]:
        store = self._connected()
        slots = self._free_slots.pop()
        try:
            headers = _header_slots(slots, objects)
            for stored, (address, length) in zip(objects, headers, strict=True):
                view(address, length)[:] = stored.header(stored.views())
            codes = store.batch_put_from_multi_buffers(*self._arguments(objects, headers))
        finally:
            self._free_slots.append(slots)
        return [self._answer("put", code, {0: Outcome.STORED}) for code in codes]

    def get(self, objects: Sequence[StoredObject]) -> list[Answer]:
        store = self._connected()
        slots = self._free_slots.pop()
        try:
            headers = _header_slots(slots, objects)
            codes = store.batch_get_into_multi_buffers(*self._arguments(objects, headers))
            return [
                self._checked(stored, header, code)
                for stored, header, code in zip(objects, headers, codes, strict=True)
            ]
        finally:
            self._free_slots.append(slots)

    def exists(self, objects: Sequence[StoredObject]) -> list[Answer]:
        meaning = {1: Outcome.PRESENT, 0: Outcome.MISS}
        codes = self._connected().batch_is_exist(self._keys(objects))
        return [self._answer("lookup", code, meaning) for code in codes]

    def remove(self, objects: Sequence[StoredObject]) -> list[Answer]:
        codes = self._connected().batch_remove(self._keys(objects), True)
        return [self._answer("remove", code, {0: Outcome.REMOVED}) for code in codes]

    def clear(self) -> None:
        code = self._connected().remove_by_regex("^" + re.escape(self._settings.prefix), True)
        answer = self._answer("clear", min(code, 0), {0: Outcome.REMOVED})
        if isinstance(answer, StorageError):
            raise answer

    def stats(self) -> StorageStats:
        return StorageStats(None, None, None)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None

    def _checked(self, stored: StoredObject, header: tuple[int, int], code: int) -> Answer:
        if code >= 0:
            is_right = code == stored.stored_bytes and bytes(view(*header)) == stored.header(
                stored.views()
            )
            answer: Answer = Outcome.HIT if is_right else Outcome.CORRUPT
        elif code == _TRANSFER_FAILED and self._has_other_size(stored):
            answer = Outcome.CORRUPT
        else:
            answer = self._answer("get", code, {_TOO_SMALL: Outcome.CORRUPT})
        if answer is Outcome.CORRUPT:
            self.remove([stored])
        return answer

    def _has_other_size(self, stored: StoredObject) -> bool:
        """A read of more than there is fails as one from a process that is gone."""
        size = self._connected().get_size(*self._keys([stored]))
        return bool(size >= 0 and size != stored.stored_bytes)

    def _answer(self, what: str, code: int, meaning: dict[int, Outcome]) -> Answer:
        found = meaning.get(code) or _MEANING.get(code)
        if found is not None:
            return found
        if code != _NO_MASTER:
            return StorageError(f"mooncake: {what} failed with {code}")
        self._down_until = time.monotonic() + DOWN_S
        return StorageError(f"the master at {self._settings.master} does not answer")

    def _keys(self, objects: Sequence[StoredObject]) -> list[str]:
        return [self._settings.prefix + stored.key for stored in objects]

    def _arguments(
        self, objects: Sequence[StoredObject], headers: Sequence[tuple[int, int]]
    ) -> tuple[list[str], list[list[int]], list[list[int]]]:
        """Keys, and the addresses and the sizes of each one's parts."""
        parts = [(header, *stored.runs) for stored, header in zip(objects, headers, strict=True)]
        return (
            self._keys(objects),
            [[address for address, _ in runs] for runs in parts],
            [[length for _, length in runs] for runs in parts],
        )

    def _connected(self) -> Any:
        if time.monotonic() < self._down_until:
            raise StorageError(f"the master at {self._settings.master} did not answer just now")
        if self._store is None or len(self._registered) < len(self._regions):
            with self._connecting:
                if self._store is None:
                    self._store = self._connect()
                for region in self._regions[len(self._registered) :]:
                    _register(self._store, region.address, region.num_pages * region.page_bytes)
                    self._registered.append(region)
        return self._store

    def _connect(self) -> Any:
        settings = self._settings
        host, _, port = settings.master.rpartition(":")
        try:
            socket.create_connection((host, int(port)), _PROBE_S).close()
        except OSError as error:
            self._down_until = time.monotonic() + DOWN_S
            raise StorageError(f"no master at {settings.master}: {error}") from error
        if settings.protocol == "tcp":
            # What it is told is not what it takes: it uses RDMA where it finds a device.
            os.environ["MC_FORCE_TCP"] = "1"
        else:
            os.environ.pop("MC_FORCE_TCP", None)
        store = mooncake.store.MooncakeDistributedStore()
        status = store.setup(
            settings.host,
            "P2PHANDSHAKE",
            settings.segment_bytes,
            _LOCAL_BUFFER_BYTES,
            settings.protocol,
            settings.device,
            settings.master,
        )
        if status:
            self._down_until = time.monotonic() + DOWN_S
            raise StorageError(f"mooncake's client does not start (status {status})")
        _register(store, self._slots.ctypes.data, self._slots.nbytes)
        return store


def _register(store: Any, address: int, size: int) -> None:
    if size and store.register_buffer(address, size):
        raise StorageError(f"mooncake cannot register {size} bytes")


def _header_slots(slots: np.ndarray, objects: Sequence[StoredObject]) -> list[tuple[int, int]]:
    first = slots.ctypes.data
    return [
        (first + number * MAX_HEADER_BYTES, stored.header_bytes)
        for number, stored in enumerate(objects)
    ]
