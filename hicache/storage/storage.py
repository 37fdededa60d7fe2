"""The storage interface: named objects of bytes, from and to pages of registered host memory.

An object is a page or the same part of a page, named by a key that says what its content is (rule
3): the same key always holds the same bytes, so it is written once and never changed. A storage is
a cache: it may forget any object at any time. It checks what it reads: an object that is short,
damaged or another one is never a hit.

One thread owns a storage: no method is called from two threads, and none blocks but `close`. What
is submitted ends in exactly one result, which `poll` returns, by its deadline or soon after; what
was submitted before its result came may happen in any order. What does not fit into the queue is
refused, with a result like any other. A key fails alone: each has its own outcome.

Pages belong to the storage until the result, and for as long as `pages_in_use` says after that: a
library or a file system that hangs cannot be interrupted, and may still read or write them. After
any outcome of a get but HIT the content of a page is unspecified.

Errors are `StorageError`; they are raised for misuse and bad settings only.
"""

from __future__ import annotations

import abc
import dataclasses
import enum
from collections.abc import Sequence

from transfer.transport import Int32Array, Region

MAX_KEY_BYTES = 1024


class StorageError(Exception):
    """Base."""


class StorageConfigurationError(StorageError):
    """The backend is not installed or cannot work with these settings."""


class Outcome(enum.Enum):
    """What became of one key."""

    STORED = "stored"
    PRESENT = "present"
    """put: it was there already; exists: it is there. By its name: whether it is damaged shows only
    when it is read."""
    FULL = "full"
    HIT = "hit"
    MISS = "miss"
    """get, exists, remove: it is not there."""
    CORRUPT = "corrupt"
    """It was there, not as it was stored; it has been removed. A miss, to be counted apart."""
    REMOVED = "removed"
    FAILED = "failed"
    """It may or may not have been done."""
    REFUSED = "refused"
    """The queue is full; nothing was done."""


@dataclasses.dataclass(frozen=True, slots=True)
class ObjectPart:
    """Which bytes of a page an object has: `count` runs of `length` bytes, run k from
    `offset + k * stride` on."""

    offset: int
    length: int
    count: int = 1
    stride: int = 0

    @property
    def object_bytes(self) -> int:
        return self.length * self.count

    @property
    def end(self) -> int:
        return self.offset + (self.count - 1) * self.stride + self.length


@dataclasses.dataclass(frozen=True, slots=True)
class StorageResult:
    operation_id: int
    outcomes: tuple[Outcome, ...]
    """By key, in the order given; none for `clear`."""
    error: str | None
    """Why some keys failed or were refused: the first cause."""
    bytes_moved: int
    """Of the objects that were stored or hit."""
    seconds: float
    """From `submit_...` to the result."""
    pages_in_use: bool = False
    """It ended by its deadline, with a part under way: the pages of keys that failed may still be
    read or written, until `released` names the operation."""


@dataclasses.dataclass(frozen=True, slots=True)
class StorageStats:
    """None: the backend cannot tell."""

    objects: int | None
    object_bytes: int | None
    """As they are stored, with what is stored beside their content."""
    limit_bytes: int | None
    scanned: float = 1.0
    """How much is known of what earlier processes left, from 0 to 1."""
    evicted_objects: int = 0
    queued_operations: int = 0
    queued_bytes: int = 0
    hanging_operations: int = 0
    """Those past their deadline whose pages are still in use."""


class Storage(abc.ABC):
    """One process's end. Regions are numbered in the order given."""

    @abc.abstractmethod
    def register(self, regions: Sequence[Region]) -> None:
        """Name the host memory that pages lie in, once, before the first put or get. It is there
        until `close` has returned, and pages in use for as long as they are."""

    @abc.abstractmethod
    def submit_put(
        self,
        keys: Sequence[str],
        region: int,
        pages: Int32Array,
        timeout_s: float,
        part: ObjectPart | None = None,
    ) -> int:
        """Store `part` of pages[i] (None: the whole page) as keys[i]; returns the operation's id.

        Raises IndexError when a page is out of range, ValueError when keys and pages differ in
        number, the part is not within a page, or a key is empty or longer than MAX_KEY_BYTES.
        """

    @abc.abstractmethod
    def submit_get(
        self,
        keys: Sequence[str],
        region: int,
        pages: Int32Array,
        timeout_s: float,
        part: ObjectPart | None = None,
    ) -> int:
        """Read keys[i] into `part` of pages[i]; as `submit_put`. Pages must be distinct."""

    @abc.abstractmethod
    def submit_exists(self, keys: Sequence[str], timeout_s: float) -> int:
        """PRESENT or MISS for each key. A hint: a later get may miss."""

    @abc.abstractmethod
    def submit_remove(self, keys: Sequence[str], timeout_s: float) -> int:
        """REMOVED or MISS for each key. Who reads one meanwhile has a hit or no hit."""

    @abc.abstractmethod
    def submit_clear(self, timeout_s: float) -> int:
        """Remove all objects, also those that other processes have put there."""

    @abc.abstractmethod
    def cancel(self, operation_id: int) -> None:
        """The rest is no longer wanted: keys that have not been begun fail. Its result is still to
        be waited for. Unknown ids are ignored."""

    @abc.abstractmethod
    def poll(self) -> list[StorageResult]:
        """The operations that ended since the last call."""

    @abc.abstractmethod
    def released(self) -> list[int]:
        """The operations whose result said `pages_in_use` and whose pages have become free since
        the last call."""

    @abc.abstractmethod
    def stats(self) -> StorageStats:
        """Quickly, from what is known in this process."""

    @abc.abstractmethod
    def close(self) -> None:
        """End all operations, without results, and release everything. Waits for what is under way,
        for CLOSE_S at most; what hangs longer keeps memory of `transfer.memory` alive. Idempotent.
        """


CLOSE_S = 5.0
