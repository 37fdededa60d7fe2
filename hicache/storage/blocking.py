"""What a backend writes to become a storage: plain calls that may block (`BlockingStore`), and how
much of what may be under way at a time (`Limits`)."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

from hicache.storage.objects import StoredObject
from hicache.storage.storage import Outcome, StorageError, StorageStats
from transfer.transport import Region

Answer: TypeAlias = Outcome | StorageError
"""What became of one key; an error is why it failed."""
NAMES = 256


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    threads: int = 4
    batch_objects: int = 1
    """Of a put or get; names alone go by NAMES at a time."""
    batch_bytes: int = 16 << 20
    """A batch ends with the object that reaches it."""
    queue_operations: int = 4096
    queue_bytes: int = 4 << 30


class BlockingStore(abc.ABC):
    """Calls for a batch, made by several threads at once. Each returns an answer per object; what
    it raises counts for the whole batch."""

    def register(self, regions: Sequence[Region]) -> None:
        """From the owner's thread, once, before the first put or get."""
        return

    @abc.abstractmethod
    def put(self, objects: Sequence[StoredObject]) -> list[Answer]: ...

    @abc.abstractmethod
    def get(self, objects: Sequence[StoredObject]) -> list[Answer]: ...

    @abc.abstractmethod
    def exists(self, objects: Sequence[StoredObject]) -> list[Answer]: ...

    @abc.abstractmethod
    def remove(self, objects: Sequence[StoredObject]) -> list[Answer]: ...

    @abc.abstractmethod
    def clear(self) -> None: ...

    @abc.abstractmethod
    def stats(self) -> StorageStats:
        """From the owner's thread; does not block."""

    @abc.abstractmethod
    def close(self) -> None:
        """From the owner's thread, when no other call is under way."""


def plan_batches(sizes: Sequence[int], limits: Limits) -> list[tuple[int, int]]:
    """(first, the one after the last) of each batch. Pure."""
    batches, first, size = [], 0, 0
    for number, object_bytes in enumerate(sizes):
        size += object_bytes
        most = limits.batch_objects if object_bytes else NAMES
        if number + 1 - first >= most or size >= limits.batch_bytes:
            batches.append((first, number + 1))
            first, size = number + 1, 0
    if first < len(sizes):
        batches.append((first, len(sizes)))
    return batches
