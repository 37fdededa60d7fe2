"""Objects in this process's memory: the reference implementation, and the one for tests.

An operation happens at the poll that returns its result and not before, so that a page that is
reused too early shows; a page of a get that does not hit is overwritten, so that one who reads it
shows. The least recently used objects make room. Tests set delays and faults.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import time
from collections.abc import Sequence
from typing import Literal, assert_never

from hicache.storage.objects import Places, StoredObject, check_keys
from hicache.storage.options import Options
from hicache.storage.storage import (
    ObjectPart,
    Outcome,
    Storage,
    StorageResult,
    StorageStats,
)
from transfer.transport import Int32Array, Region

_SCRIBBLE = 0xDD


@dataclasses.dataclass(slots=True)
class _Operation:
    kind: Literal["put", "get", "exists", "remove", "clear"]
    objects: list[StoredObject]
    started: float
    deadline: float
    polls_left: int
    error: str | None = None


class MemoryStorage(Storage):
    """Options: `limit`, in bytes of content (default: none); `delay_polls`, the number of polls
    after which an operation ends, one more than that."""

    def __init__(self, name: str, options: dict[str, str]) -> None:
        read = Options("memory", options)
        self._limit = read.bytes("limit", 0) or None
        self.delay_polls = read.number("delay_polls", 0)
        read.end()
        self.fail_next = 0
        """So many of the next operations fail."""
        self.damaged: set[str] = set()
        """The next get of these finds them corrupt."""
        self._places = Places()
        self._objects: collections.OrderedDict[str, bytes] = collections.OrderedDict()
        """Least recently used first."""
        self._bytes = 0
        self._evicted = 0
        self._operations: dict[int, _Operation] = {}
        self._last_id = 0

    def register(self, regions: Sequence[Region]) -> None:
        self._places.register(regions)

    def submit_put(
        self,
        keys: Sequence[str],
        region: int,
        pages: Int32Array,
        timeout_s: float,
        part: ObjectPart | None = None,
    ) -> int:
        return self._submit("put", self._places.objects(keys, region, pages, part), timeout_s)

    def submit_get(
        self,
        keys: Sequence[str],
        region: int,
        pages: Int32Array,
        timeout_s: float,
        part: ObjectPart | None = None,
    ) -> int:
        return self._submit("get", self._places.objects(keys, region, pages, part), timeout_s)

    def submit_exists(self, keys: Sequence[str], timeout_s: float) -> int:
        check_keys(keys)
        return self._submit("exists", [StoredObject(key) for key in keys], timeout_s)

    def submit_remove(self, keys: Sequence[str], timeout_s: float) -> int:
        check_keys(keys)
        return self._submit("remove", [StoredObject(key) for key in keys], timeout_s)

    def submit_clear(self, timeout_s: float) -> int:
        return self._submit("clear", [], timeout_s)

    def cancel(self, operation_id: int) -> None:
        operation = self._operations.get(operation_id)
        if operation is not None:
            operation.error = operation.error or "cancelled"
            operation.polls_left = 0

    def poll(self) -> list[StorageResult]:
        results = []
        now = time.monotonic()
        for number, operation in list(self._operations.items()):
            if now >= operation.deadline:
                operation.error = operation.error or "not done by its deadline"
            elif operation.polls_left:
                operation.polls_left -= 1
                continue
            del self._operations[number]
            results.append(self._end(number, operation))
        return results

    def released(self) -> list[int]:
        return []

    def stats(self) -> StorageStats:
        return StorageStats(
            len(self._objects),
            self._bytes,
            self._limit,
            evicted_objects=self._evicted,
            queued_operations=len(self._operations),
        )

    def close(self) -> None:
        self._operations.clear()
        self._objects.clear()
        self._bytes = 0

    def _submit(
        self,
        kind: Literal["put", "get", "exists", "remove", "clear"],
        objects: list[StoredObject],
        timeout_s: float,
    ) -> int:
        now = time.monotonic()
        operation = _Operation(kind, objects, now, now + timeout_s, self.delay_polls)
        if self.fail_next:
            self.fail_next -= 1
            operation.error = "injected fault"
        self._last_id += 1
        self._operations[self._last_id] = operation
        return self._last_id

    def _end(self, number: int, operation: _Operation) -> StorageResult:
        if operation.error is None and operation.kind == "clear":
            self._objects.clear()
            self._bytes = 0
        outcomes = tuple(
            self._do(operation.kind, stored) if operation.error is None else Outcome.FAILED
            for stored in operation.objects
        )
        moved = 0
        for stored, outcome in zip(operation.objects, outcomes, strict=True):
            if outcome in (Outcome.STORED, Outcome.HIT):
                moved += stored.object_bytes
            elif operation.kind == "get":
                for address, length in stored.runs:
                    ctypes.memset(address, _SCRIBBLE, length)
        seconds = time.monotonic() - operation.started
        return StorageResult(number, outcomes, operation.error, moved, seconds)

    def _do(
        self, kind: Literal["put", "get", "exists", "remove", "clear"], stored: StoredObject
    ) -> Outcome:
        match kind:
            case "put":
                return self._put(stored)
            case "get":
                return self._get(stored)
            case "exists":
                return Outcome.PRESENT if stored.key in self._objects else Outcome.MISS
            case "remove":
                return Outcome.REMOVED if self._drop(stored.key) else Outcome.MISS
            case "clear":
                raise AssertionError("clear names no object")
            case _:
                assert_never(kind)

    def _put(self, stored: StoredObject) -> Outcome:
        if stored.key in self._objects:
            self._objects.move_to_end(stored.key)
            return Outcome.PRESENT
        if self._limit is not None:
            if stored.object_bytes > self._limit:
                return Outcome.FULL
            while self._bytes + stored.object_bytes > self._limit:
                self._drop(next(iter(self._objects)))
                self._evicted += 1
        self._objects[stored.key] = b"".join(stored.views())
        self._bytes += stored.object_bytes
        return Outcome.STORED

    def _get(self, stored: StoredObject) -> Outcome:
        content = self._objects.get(stored.key)
        if content is None:
            return Outcome.MISS
        if stored.key in self.damaged or len(content) != stored.object_bytes:
            self.damaged.discard(stored.key)
            self._drop(stored.key)
            return Outcome.CORRUPT
        self._objects.move_to_end(stored.key)
        done = 0
        for view in stored.views():
            view[:] = content[done : done + len(view)]
            done += len(view)
        return Outcome.HIT

    def _drop(self, key: str) -> bool:
        content = self._objects.pop(key, None)
        if content is not None:
            self._bytes -= len(content)
        return content is not None
