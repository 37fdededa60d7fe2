"""Writing the host tier's pages to storage, without holes: a page is put only when all pages before
it in its chain are known to be stored, or are put in the same batch.

A chain waits in a queue and has one batch under way at a time; chains take turns, batch by batch.
What waits holds no reference: a page is looked up when its turn comes, and if it has been evicted
meanwhile, it and what follows are skipped. Of a batch in which some puts fail, the pages before the
first failure count, and the others are put again, some times with growing pauses; then the chain is
dropped. It is written from its first missing page on when its pages are offered or hit again.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Callable, Sequence

from hicache.grid import ObjectGrid
from hicache.index import PageIndex
from hicache.storage.storage import Outcome
from hicache.storage_hints import StorageHints
from hicache.storage_io import Operations, OpKind, StorageLimits, bytes_of


@dataclasses.dataclass(slots=True, eq=False)
class _Chain:
    """Pages of one sequence that wait to be written: from `start` up to `end`."""

    hashes: Sequence[bytes]
    """From page 0 up to `end`, and perhaps what was appended since."""
    start: int
    """Those before it were stored when it was set."""
    end: int
    attempts: int = 0
    """That failed, since a page was last stored."""
    is_dropped: bool = False

    @property
    def last(self) -> bytes:
        return self.hashes[self.end - 1]


@dataclasses.dataclass(slots=True, eq=False)
class _Batch:
    chain: _Chain
    first: int
    """The first page that is put."""
    end: int
    epoch: int
    put: list[int]
    """By page from `first` on, bits of the groups that are put; 0: it is there already."""
    failed: list[int]
    stored: set[int] = dataclasses.field(default_factory=set)
    """Pages of which an object was not there before."""
    num_pending: int = 0
    waiting: list[_Chain] = dataclasses.field(default_factory=list)
    """Chains whose next page is in this batch."""


class Writer:
    def __init__(
        self,
        index: PageIndex,
        grid: ObjectGrid,
        hints: StorageHints,
        operations: Operations,
        limits: StorageLimits,
    ) -> None:
        self._index = index
        self._grid = grid
        self._hints = hints
        self._operations = operations
        self._limits = limits
        self._is_chained = hints.full_groups > 0
        self._page_bytes = [layout.page_bytes for layout in grid.layouts]
        self._batch_pages = max(
            1, min(limits.batch_pages, limits.max_put_bytes // sum(self._page_bytes))
        )
        self._chains: dict[bytes, _Chain] = {}
        """All that are in the queue, by the hash of their last page."""
        self._ready: collections.deque[_Chain] = collections.deque()
        self._paused: list[tuple[float, int, _Chain]] = []
        self._num_pauses = 0
        self._writing: dict[bytes, _Batch] = {}
        """By page."""
        self.num_queued = 0
        """Pages."""
        self._num_hashes = 0
        """That the queue keeps: a chain has those before its pages too."""
        self.num_written = 0
        """Pages of which an object was not in storage before."""
        self.num_overflowed = 0
        """Pages that found no room in the queue."""
        self.num_evicted = 0
        """Pages that were not in the host tier any more when their turn came."""
        self.num_abandoned = 0
        """Pages whose chain was dropped: puts failed too often, or the storage was emptied."""

    def offer(self, hashes: Sequence[bytes], first: int) -> None:
        """Pages `first` and later shall be stored, and those before them that are not known to
        be."""
        start = self._hints.first_unknown(hashes, first) if self._is_chained else first
        end = len(hashes)
        if start >= end or hashes[end - 1] in self._chains:
            return
        chain = self._chains.get(hashes[first - 1]) if first else None
        begin = chain.end if chain is not None else start
        fits = min(end, begin + self._limits.max_queued_pages - self.num_queued)
        others = self._num_hashes - (chain.end if chain is not None else 0)
        if others:
            fits = min(fits, self._limits.max_queued_hashes - others)
        fits = max(fits, begin)
        self.num_overflowed += end - fits
        if fits <= begin or hashes[fits - 1] in self._chains:
            return
        self.num_queued += fits - begin
        self._num_hashes = others + fits
        if fits < end:
            hashes = hashes[:fits]
        if chain is not None:
            del self._chains[chain.last]
            chain.hashes, chain.end = hashes, fits
        else:
            chain = _Chain(hashes, start, fits)
            self._ready.append(chain)
        self._chains[chain.last] = chain

    def offer_hit(self, hashes: Sequence[bytes]) -> None:
        """Pages that are in the host tier: as `offer`, from the first with something to write."""
        groups, every = self._hints.groups, self._hints.all_groups
        if all(groups(page_hash) == every for page_hash in hashes):
            return
        slots = self._index.resident(hashes)
        for page in range(len(slots[0])):
            if self._lacking(hashes[page], slots, page):
                self.offer(hashes[: len(slots[0])], page)
                return

    def _lacking(self, page_hash: bytes, slots: list[list[int]], place: int) -> int:
        """Bits of the groups in which a page is in the host tier and not known to be stored."""
        known = self._hints.groups(page_hash)
        if known == self._hints.all_groups:
            return 0
        return sum(
            1 << g
            for g, of_group in enumerate(slots)
            if of_group[place] >= 0 and not known >> g & 1
        )

    def pump(self, now: float) -> None:
        """Begin what may be begun now."""
        while self._paused and self._paused[0][0] <= now:
            self._ready.append(heapq.heappop(self._paused)[2])
        while self._ready and self._operations.can_start(now):
            chain = self._ready[0]
            if chain.is_dropped:
                self._ready.popleft()
                continue
            batch, slots = self._plan(chain)
            if batch is None:
                self._ready.popleft()
                self._drop(chain)
                continue
            blocking = self._writing.get(chain.hashes[batch.first])
            if blocking is not None:
                blocking.waiting.append(self._ready.popleft())
                continue
            if not self._operations.has_room(OpKind.PUT, bytes_of(self._page_bytes, batch.put)):
                return
            self._ready.popleft()
            self._begin(batch, slots, now)

    def _plan(self, chain: _Chain) -> tuple[_Batch | None, list[list[int]]]:
        """The next batch of a chain and the slots of its pages by group. None: nothing is left."""
        while chain.start < chain.end:
            stop = min(chain.start + self._batch_pages, chain.end)
            slots = self._index.resident(chain.hashes[:stop], chain.start)
            found = len(slots[0])
            lacking = [self._lacking(chain.hashes[chain.start + i], slots, i) for i in range(found)]
            skipped = next((i for i, groups in enumerate(lacking) if groups), found)
            self._advance(chain, chain.start + skipped)
            if skipped < found:
                count = self._num_unclaimed(chain, found - skipped)
                put = lacking[skipped : skipped + count]
                end = chain.start + count
                batch = _Batch(chain, chain.start, end, self._hints.epoch, put, [0] * count)
                return batch, [of_group[skipped : skipped + count] for of_group in slots]
            if chain.start < stop:
                if self._is_chained:
                    self.num_evicted += chain.end - chain.start
                    return None, []
                self.num_evicted += stop - chain.start
                self._advance(chain, stop)
        return None, []

    def _num_unclaimed(self, chain: _Chain, most: int) -> int:
        """Pages from `chain.start` on up to one that another batch writes; at least that one."""
        for i in range(1, most):
            if chain.hashes[chain.start + i] in self._writing:
                return i
        return most

    def _advance(self, chain: _Chain, start: int) -> None:
        if not chain.is_dropped:
            self.num_queued -= start - chain.start
        chain.start = start

    def _begin(self, batch: _Batch, slots: list[list[int]], now: float) -> None:
        hashes = batch.chain.hashes
        for page in range(batch.first, batch.end):
            if batch.put[page - batch.first]:
                self._writing[hashes[page]] = batch
        for g, of_group in enumerate(slots):
            places = [i for i, groups in enumerate(batch.put) if groups >> g & 1]
            if not places:
                continue
            wanted = [hashes[batch.first + i] for i in places]
            for number, cell in enumerate(self._grid.cells(g)):
                batch.num_pending += 1
                self._operations.move(
                    OpKind.PUT,
                    g,
                    self._grid.keys(g, number, wanted),
                    [of_group[i] for i in places],
                    cell.part,
                    now,
                    self._make_then(batch, g, places),
                )

    def _make_then(
        self, batch: _Batch, group: int, places: list[int]
    ) -> Callable[[tuple[Outcome, ...], float], None]:
        def then(outcomes: tuple[Outcome, ...], now: float) -> None:
            for place, outcome in zip(places, outcomes, strict=True):
                if outcome is Outcome.STORED:
                    batch.stored.add(place)
                elif outcome is not Outcome.PRESENT:
                    batch.failed[place] |= 1 << group
            batch.num_pending -= 1
            if not batch.num_pending:
                self._end(batch, now)

        return then

    def _end(self, batch: _Batch, now: float) -> None:
        chain = batch.chain
        for page in range(batch.first, batch.end):
            if batch.put[page - batch.first]:
                del self._writing[chain.hashes[page]]
        self._ready.extend(batch.waiting)
        count = len(batch.put)
        good = next((i for i, groups in enumerate(batch.failed) if groups), count)
        self.num_written += sum(place < good for place in batch.stored)
        if batch.epoch == self._hints.epoch:
            for i in range(good):
                if batch.put[i]:
                    self._hints.add_stored(chain.hashes[batch.first + i], batch.put[i])
        if chain.is_dropped:
            return
        self._advance(chain, batch.first + good)
        if good:
            chain.attempts = 0
        if good == count:
            if chain.start < chain.end:
                self._ready.append(chain)
            else:
                self._drop(chain)
            return
        chain.attempts += 1
        if chain.attempts >= self._limits.put_attempts:
            self.num_abandoned += chain.end - chain.start
            self._drop(chain)
            return
        self._num_pauses += 1
        pause_s = self._limits.put_pause_s * 2 ** (chain.attempts - 1)
        heapq.heappush(self._paused, (now + pause_s, self._num_pauses, chain))

    def _drop(self, chain: _Chain) -> None:
        """It leaves the queue; a batch of it that is under way ends as it does."""
        self.num_queued -= chain.end - chain.start
        self._num_hashes -= chain.end
        chain.is_dropped = True
        del self._chains[chain.last]

    def lose(self, page_hash: bytes, page: int) -> None:
        """A page was thought to be stored and is not: chains that were to continue it are dropped,
        until they are hit again."""
        for chain in list(self._chains.values()):
            if chain.start > page and chain.hashes[page] == page_hash:
                self.num_abandoned += chain.end - chain.start
                self._drop(chain)

    def drop_all(self) -> None:
        for chain in list(self._chains.values()):
            self.num_abandoned += chain.end - chain.start
            self._drop(chain)
        self._ready.clear()
        self._paused.clear()

    def check_integrity(self) -> None:
        queued = sum(chain.end - chain.start for chain in self._chains.values())
        assert self.num_queued == queued, f"{self.num_queued} pages queued, not {queued}"
        assert queued <= self._limits.max_queued_pages, f"{queued} pages queued"
        kept = [chain.end for chain in self._chains.values()]
        assert self._num_hashes == sum(kept), f"{self._num_hashes} hashes kept, not {sum(kept)}"
        assert len(kept) < 2 or sum(kept) <= self._limits.max_queued_hashes, f"{sum(kept)} hashes"
        batches = dict.fromkeys(self._writing.values())
        places = [chain for chain in self._ready if not chain.is_dropped]
        places += [chain for _, _, chain in self._paused if not chain.is_dropped]
        for batch in batches:
            assert batch.num_pending > 0, "a batch without operations"
            places += [batch.chain] if not batch.chain.is_dropped else []
            places += [chain for chain in batch.waiting if not chain.is_dropped]
        assert len(places) == len(set(map(id, places))), "a chain is in two places"
        assert set(map(id, places)) == set(map(id, self._chains.values())), "a chain is lost"
        for last, chain in self._chains.items():
            assert chain.last == last, "a chain under another name"
            assert 0 <= chain.start < chain.end <= len(chain.hashes), "a chain without pages"
