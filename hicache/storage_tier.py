"""The storage tier behind one host's cache: what is written to it, and what is read ahead.

Pure: no clock, thread or socket. It works on the host tier's `PageIndex`, whose slots are pages of
host memory, and says through `emit` what the storage shall do (storage_io.py). Storage follows the
host tier: what enters that is written, in the order of its chain (storage_writing.py); what it
lacks is read when a request asks for it, and enters it as ordinary cache (storage_prefetch.py).

It holds references only on pages that are being written or read, and for each prefetch on those
that its next ones continue; all else may be evicted at any time, and the index be cleared. Nothing
it does can fail a request: a storage that is slow, full, damaged or gone only means fewer pages.

One thread calls it. `emit` only takes note of an effect: it must not call back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from hicache.grid import ObjectGrid
from hicache.index import PageIndex
from hicache.storage.storage import Outcome, StorageResult
from hicache.storage_hints import StorageHints
from hicache.storage_io import (
    BreakerState,
    Effect,
    Operations,
    OpKind,
    PagesFreed,
    StorageLimits,
)
from hicache.storage_prefetch import Prefetch, Prefetcher
from hicache.storage_writing import Writer


@dataclasses.dataclass(frozen=True, slots=True)
class StorageTierStats:
    """Counts from the beginning on, unless the name says otherwise."""

    pages_written: int
    """That had an object which storage did not have."""
    pages_restored: int
    """Read and entered into the host tier."""
    pages_used: int
    """Of those, matched by a request later on."""
    pages_wasted: int
    """Of those read, evicted or cut off before that; known when they are read again, or late."""
    bytes_written: int
    bytes_read: int
    write_bytes_per_s: float
    """A running average of recent operations, as those below; 0: not known."""
    read_bytes_per_s: float
    latency_s: float
    hit_objects: int
    missed_objects: int
    """Neither a read nor a question found them."""
    corrupt_objects: int
    failed_objects: int
    """Of all kinds of operations, those refused or without room included."""
    operations_given_up: int
    operations_in_flight: int
    operations_hanging: int
    """That have ended, with pages still in use."""
    queued_pages: int
    """Now; the next three: of those offered for writing, what became of the rest."""
    overflowed_pages: int
    evicted_pages: int
    abandoned_pages: int
    prefetches: int
    """Under way now."""
    prefetches_missed: int
    """That gained nothing."""
    prefetches_judged_slow: int
    """Where prefill was predicted to be faster."""
    breaker: BreakerState
    breaker_times_opened: int


class StorageTier:
    def __init__(
        self,
        index: PageIndex,
        num_pages: Sequence[int],
        grid: ObjectGrid,
        emit: Callable[[Effect], None],
        limits: StorageLimits | None = None,
    ) -> None:
        """`index` is the host tier's, `num_pages` its pools by group, slot 0 included. Raises
        ValueError if the grid is of other layer groups."""
        if [layout.group for layout in grid.layouts] != list(index.groups):
            raise ValueError("the grid and the index are of different layer groups")
        limits = limits or StorageLimits()
        self._operations = Operations(index, emit, limits)
        self._hints = StorageHints(
            index.groups, limits.max_hints, limits.max_absent, limits.absent_s
        )
        self._writer = Writer(index, grid, self._hints, self._operations, limits)
        self._prefetcher = Prefetcher(
            index, num_pages, grid, self._hints, self._operations, limits, self._writer.lose
        )

    def pages_stored(self, hashes: Sequence[bytes], first: int, now: float) -> None:
        """Pages from `first` on of a chain, given from page 0 on, have entered the host tier: they
        are to be written. `hashes` is kept: it may be appended to, but not changed otherwise."""
        if not self._operations.is_detached:
            self._writer.offer(hashes, first)
            self._pump(now)

    def pages_hit(self, hashes: Sequence[bytes], now: float) -> None:
        """A request has matched these pages in the host tier. What of them is not known to be
        stored is written as well. `hashes` is kept, as by `pages_stored`."""
        self._prefetcher.used(hashes)
        if not self._operations.is_detached:
            self._hints.touch(hashes)
            self._writer.offer_hit(hashes)
            self._pump(now)

    def prefetch(
        self,
        hashes: Sequence[bytes],
        begin: int,
        now: float,
        tokens_per_s: float = 0.0,
        have: int = 0,
    ) -> Prefetch | None:
        """Read what follows the `begin` pages that the host tier matches of these, for a request
        that has the first `have` already. None: nothing to expect, or its tokens are predicted to
        be prefilled sooner, at `tokens_per_s` (0: not known). The result may be done at once; it
        changes with the calls that follow."""
        prefetch = self._prefetcher.begin(hashes, begin, now, tokens_per_s, have)
        self._pump(now)
        return prefetch

    def cancel_prefetch(self, prefetch: Prefetch, now: float) -> None:
        """No new reads; what is under way still lands, before it is done. Idempotent."""
        self._prefetcher.cancel(prefetch)
        self._pump(now)

    def handle(self, event: StorageResult | PagesFreed, now: float) -> None:
        """An operation has ended, or its pages have become free. Unknown ones are ignored."""
        self._operations.handle(event, now)
        self._pump(now)

    def tick(self, now: float) -> None:
        """Deadlines and pauses; to be called every 0.1 s or so, for they are that exact."""
        self._operations.tick(now)
        self._prefetcher.tick(now)
        self._pump(now)

    def storage_cleared(self, now: float) -> None:
        """All objects have been removed: nothing is known to be stored any more, and what waits to
        be written is dropped, until it is hit again."""
        self._hints.clear()
        self._writer.drop_all()
        self._pump(now)

    def detach(self, now: float) -> None:
        """No new operations, for ever: what waits is dropped, what is under way is cancelled, and
        prefetches are done when that has ended."""
        self._operations.is_detached = True
        self._writer.drop_all()
        self._operations.cancel_all()
        self._prefetcher.abandon_all()
        self._pump(now)

    @property
    def is_drained(self) -> bool:
        """No operation is under way and no page is in use by the storage; after `detach` it may be
        closed."""
        return not len(self._operations)

    def _pump(self, now: float) -> None:
        """Reads first: requests wait for them."""
        self._prefetcher.pump(now)
        self._writer.pump(now)

    def stats(self) -> StorageTierStats:
        operations, writer, prefetcher = self._operations, self._writer, self._prefetcher
        outcomes = operations.outcomes
        return StorageTierStats(
            pages_written=writer.num_written,
            pages_restored=prefetcher.num_restored,
            pages_used=prefetcher.num_used,
            pages_wasted=prefetcher.num_wasted,
            bytes_written=operations.bytes_moved[OpKind.PUT],
            bytes_read=operations.bytes_moved[OpKind.GET],
            write_bytes_per_s=operations.writes.bytes_per_s,
            read_bytes_per_s=operations.cost.reads.bytes_per_s,
            latency_s=operations.cost.latency_s,
            hit_objects=outcomes[Outcome.HIT],
            missed_objects=outcomes[Outcome.MISS],
            corrupt_objects=outcomes[Outcome.CORRUPT],
            failed_objects=sum(
                outcomes[o] for o in (Outcome.FAILED, Outcome.REFUSED, Outcome.FULL)
            ),
            operations_given_up=operations.num_given_up,
            operations_in_flight=len(operations),
            operations_hanging=operations.num_in_use,
            queued_pages=writer.num_queued,
            overflowed_pages=writer.num_overflowed,
            evicted_pages=writer.num_evicted,
            abandoned_pages=writer.num_abandoned,
            prefetches=prefetcher.num_active,
            prefetches_missed=prefetcher.num_missed,
            prefetches_judged_slow=prefetcher.num_judged_slow,
            breaker=operations.breaker.state,
            breaker_times_opened=operations.breaker.times_opened,
        )

    def slots_in_use(self, group: int) -> list[int]:
        """Those that it holds references on, each as often as it does: for checks."""
        return self._operations.slots_in_use(group) + self._prefetcher.slots_in_use(group)

    def check_integrity(self) -> None:
        """Recompute all state. Raises AssertionError."""
        self._operations.check_integrity()
        self._hints.check_integrity()
        self._writer.check_integrity()
        self._prefetcher.check_integrity()
