"""A storage made of blocking calls: queue, threads, deadlines, cancelling.

Operations are cut into batches. Free threads take a batch at a time, of the operations in turn, so
that a small one need not wait for all of a large one; those that a request waits for (get, exists)
go first, but every fourth turn is for the others. A hanging call keeps its thread; its operation
ends by its deadline all the same, and says that its pages are in use.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

from hicache.storage.blocking import Answer, BlockingStore, Limits, plan_batches
from hicache.storage.objects import Places, StoredObject, check_keys
from hicache.storage.storage import (
    CLOSE_S,
    ObjectPart,
    Outcome,
    Storage,
    StorageError,
    StorageResult,
    StorageStats,
)
from transfer.transport import Int32Array, Region

logger = logging.getLogger(__name__)

_TURNS = 4


@dataclasses.dataclass(slots=True, eq=False)
class _Operation:
    operation_id: int
    call: Callable[[Sequence[StoredObject]], list[Answer]]
    objects: list[StoredObject]
    batches: collections.deque[tuple[int, int]]
    """(first object, the one after the last), not yet begun."""
    started: float
    deadline: float
    queued_bytes: int
    answers: list[Answer | None]
    running: int = 0
    error: str | None = None
    is_reported: bool = False


class ThreadedStorage(Storage):
    def __init__(self, name: str, store: BlockingStore, limits: Limits) -> None:
        self._store = store
        self._limits = limits
        self._places = Places()
        self._has_work = threading.Condition()
        """Guards all that follows."""
        self._operations: dict[int, _Operation] = {}
        """Those that have no result yet."""
        self._urgent: collections.deque[_Operation] = collections.deque()
        self._others: collections.deque[_Operation] = collections.deque()
        self._turn = 0
        self._queued_bytes = 0
        self._hanging: set[int] = set()
        self._results: list[StorageResult] = []
        self._released: list[int] = []
        self._last_id = 0
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"storage {name} {number}", daemon=True)
            for number in range(limits.threads)
        ]
        for thread in self._threads:
            thread.start()

    def register(self, regions: Sequence[Region]) -> None:
        self._places.register(regions)
        self._store.register(regions)

    def submit_put(
        self,
        keys: Sequence[str],
        region: int,
        pages: Int32Array,
        timeout_s: float,
        part: ObjectPart | None = None,
    ) -> int:
        objects = self._places.objects(keys, region, pages, part)
        return self._submit(self._others, self._store.put, objects, timeout_s)

    def submit_get(
        self,
        keys: Sequence[str],
        region: int,
        pages: Int32Array,
        timeout_s: float,
        part: ObjectPart | None = None,
    ) -> int:
        objects = self._places.objects(keys, region, pages, part)
        return self._submit(self._urgent, self._store.get, objects, timeout_s)

    def submit_exists(self, keys: Sequence[str], timeout_s: float) -> int:
        check_keys(keys)
        objects = [StoredObject(key) for key in keys]
        return self._submit(self._urgent, self._store.exists, objects, timeout_s)

    def submit_remove(self, keys: Sequence[str], timeout_s: float) -> int:
        check_keys(keys)
        objects = [StoredObject(key) for key in keys]
        return self._submit(self._others, self._store.remove, objects, timeout_s)

    def submit_clear(self, timeout_s: float) -> int:
        def clear(_objects: Sequence[StoredObject]) -> list[Answer]:
            self._store.clear()
            return []

        return self._submit(self._others, clear, [], timeout_s, [(0, 0)])

    def cancel(self, operation_id: int) -> None:
        with self._has_work:
            operation = self._operations.get(operation_id)
            if operation is not None:
                operation.error = operation.error or "cancelled"
                operation.batches.clear()
                self._settle(operation)

    def poll(self) -> list[StorageResult]:
        now = time.monotonic()
        with self._has_work:
            for operation in list(self._operations.values()):
                if now >= operation.deadline:
                    operation.error = operation.error or "not done by its deadline"
                    operation.batches.clear()
                    self._report(operation)
            results, self._results = self._results, []
        return results

    def released(self) -> list[int]:
        with self._has_work:
            released, self._released = self._released, []
        return released

    def stats(self) -> StorageStats:
        known = self._store.stats()
        with self._has_work:
            return dataclasses.replace(
                known,
                queued_operations=len(self._operations),
                queued_bytes=self._queued_bytes,
                hanging_operations=len(self._hanging),
            )

    def close(self) -> None:
        with self._has_work:
            if self._is_closed:
                return
            self._is_closed = True
            for operation in self._operations.values():
                operation.batches.clear()
                operation.is_reported = True
            self._operations.clear()
            self._results.clear()
            self._has_work.notify_all()
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        hanging = [thread.name for thread in self._threads if thread.is_alive()]
        if hanging:
            logger.warning("%s: left hanging in a call of the storage", ", ".join(hanging))
        else:
            self._store.close()

    def _submit(
        self,
        line: collections.deque[_Operation],
        call: Callable[[Sequence[StoredObject]], list[Answer]],
        objects: list[StoredObject],
        timeout_s: float,
        batches: list[tuple[int, int]] | None = None,
    ) -> int:
        if batches is None:
            batches = plan_batches([stored.object_bytes for stored in objects], self._limits)
        size = sum(stored.object_bytes for stored in objects)
        now = time.monotonic()
        with self._has_work:
            if self._is_closed:
                raise StorageError("the storage is closed")
            self._last_id += 1
            if (
                len(self._operations) >= self._limits.queue_operations
                or self._queued_bytes + size > self._limits.queue_bytes
            ):
                refused = tuple(Outcome.REFUSED for _ in objects)
                error = f"{self._queued_bytes} bytes are queued, of {self._limits.queue_bytes}"
                self._results.append(StorageResult(self._last_id, refused, error, 0, 0.0))
                return self._last_id
            operation = _Operation(
                self._last_id,
                call,
                objects,
                collections.deque(batches),
                now,
                now + timeout_s,
                size,
                [None] * len(objects),
            )
            self._operations[self._last_id] = operation
            self._queued_bytes += size
            if batches:
                line.append(operation)
                self._has_work.notify(len(batches))
            else:
                self._settle(operation)
            return self._last_id

    # ------------------------------------------------------------------ the threads

    def _run(self) -> None:
        while True:
            with self._has_work:
                while (taken := self._take()) is None:
                    if self._is_closed:
                        return
                    self._has_work.wait()
            operation, first, end = taken
            answers = self._do(operation, first, end)
            with self._has_work:
                operation.running -= 1
                operation.answers[first:end] = answers
                self._settle(operation)

    def _take(self) -> tuple[_Operation, int, int] | None:
        self._turn += 1
        lines = (self._urgent, self._others)
        for line in lines if self._turn % _TURNS else lines[::-1]:
            while line:
                operation = line.popleft()
                if not operation.batches:
                    continue  # cancelled, or past its deadline
                first, end = operation.batches.popleft()
                if operation.batches:
                    line.append(operation)
                operation.running += 1
                return operation, first, end
        return None

    def _do(self, operation: _Operation, first: int, end: int) -> Sequence[Answer]:
        objects = operation.objects[first:end]
        try:
            return operation.call(objects)
        except (StorageError, OSError) as error:
            failure = StorageError(str(error))
        except Exception as error:  # the top of a thread, which must live on
            logger.exception("a storage failed in a way that it should not")
            failure = StorageError(repr(error))
        if not objects:
            operation.error = operation.error or str(failure)
        return [failure] * len(objects)

    # ------------------------------------------------------------------ with the lock held

    def _settle(self, operation: _Operation) -> None:
        if operation.running:
            return
        if operation.is_reported:
            if operation.operation_id in self._hanging:
                self._hanging.remove(operation.operation_id)
                self._released.append(operation.operation_id)
        elif not operation.batches:
            self._report(operation)

    def _report(self, operation: _Operation) -> None:
        operation.is_reported = True
        del self._operations[operation.operation_id]
        self._queued_bytes -= operation.queued_bytes
        if operation.running:
            self._hanging.add(operation.operation_id)
        outcomes, moved = [], 0
        for stored, answer in zip(operation.objects, operation.answers, strict=True):
            if isinstance(answer, Outcome):
                outcomes.append(answer)
                if answer in (Outcome.STORED, Outcome.HIT):
                    moved += stored.object_bytes
            else:
                outcomes.append(Outcome.FAILED)
                operation.error = operation.error or str(answer)
        self._results.append(
            StorageResult(
                operation.operation_id,
                tuple(outcomes),
                operation.error if Outcome.FAILED in outcomes or not outcomes else None,
                moved,
                time.monotonic() - operation.started,
                pages_in_use=bool(operation.running),
            )
        )
