"""Eviction orders: which of the pages that may go, goes first.

Pure. An order sees runs: consecutive pages of one sequence with one history. It is told what
happens to them, keeps its own notes in them, and gives the next leaf to evict from. It does not
know slots, references or what hashes mean, and never decides whether a page may be evicted: the
index offers only leaves, and cuts pages from a run's end, so that the device tier stays
prefix-closed under any order. Time is the index's counter of calls. A run may have an owner, a
name that means nothing here; the next leaf of one owner can be asked for, by the same order.

  lru     the least recently used: last released longest ago
  lfu     the least often matched; among equals the least recently used
  slru    what was never matched before what was; each by last use. At most four fifths of the pages
          are protected by a match: beyond, those matched longest ago count as new again.
  s3fifo  queues by time of insertion: a small one for new pages (a tenth), from which those matched
          twice move to the main one, and a list of what left the small one otherwise, which enters
          the main one when it comes again. In the main one, a match buys another round.
          (Yang et al., FIFO queues are all you need for cache eviction, SOSP 2023)
  cost    GreedyDual: a page is worth what it takes to recompute, above the worth of what had last
          been evicted when it was last used. A token at position p costs p / 24,576 more than the
          first one: attention's work equals the rest of the model's near six hidden sizes (4 x
          hidden x p against 24 x hidden^2 operations a layer), and 4,096 is a usual hidden size.
          (Young, On-line caching as cache size varies, 1991; Cao and Irani, 1997)

Every step takes O(log n) of the leaves, amortised over the matches and insertions.
"""

from __future__ import annotations

import heapq
import itertools
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import TypeAlias

_PROTECTED = 0.8
_SMALL = 0.1
_MAX_HITS = 3
_EQUAL_COST_TOKENS = 24_576

Key: TypeAlias = tuple[int, int]
_Record: TypeAlias = "tuple[int, int, int, Run]"
"""Key, ticket, run."""


class Run(ABC):
    """What an order knows of some consecutive pages. The fields are the order's own, but for
    `owner`."""

    __slots__ = ("age", "hits", "level", "owner", "ticket")

    def __init__(self, level: int = 0, owner: str | None = None) -> None:
        self.age = 0
        self.hits = 0
        self.level = level
        """Which queue or class it is in."""
        self.owner = owner
        """Stays the same."""
        self.ticket = 0
        """Of its record among the leaves; 0 when it has none."""

    @property
    @abstractmethod
    def num_pages(self) -> int: ...

    @property
    @abstractmethod
    def end(self) -> int:
        """Position in the sequence after its last page."""

    @property
    @abstractmethod
    def is_evictable(self) -> bool:
        """A leaf, and its last page at least may go."""


class Leaves:
    """Offered runs, smallest key first: a heap with one valid record for each, and one more heap
    for the runs of each owner.

    A record stays when its run is used again, and is brought up to date when it comes to the top.
    """

    def __init__(self, tickets: Iterator[int] | None = None) -> None:
        """`tickets` of another one, between which runs move."""
        self.tickets = tickets or itertools.count(1)
        self._heap: list[_Record] = []
        self._num_valid = 0
        self._owned: dict[str, Leaves] = {}

    def __len__(self) -> int:
        """Records, of all heaps."""
        return len(self._heap) + sum(map(len, self._owned.values()))

    def clear(self) -> None:
        self._heap.clear()
        self._num_valid = 0
        self._owned.clear()

    def check_integrity(self, runs: Sequence[Run]) -> None:
        valid = self._valid()
        assert set(valid) <= set(runs), "a leaf that is gone"
        owners = {run.owner for run in valid if run.owner is not None}
        assert owners == self._owned.keys(), "heaps are not those of the leaves' owners"
        for owner in owners:
            owned = [run for run in valid if run.owner == owner]
            assert set(self._owned[owner]._valid()) == set(owned), f"{owner} lacks leaves"

    def _valid(self) -> list[Run]:
        valid = [record[3] for record in self._heap if record[2] == record[3].ticket]
        assert len(valid) == self._num_valid, f"{len(valid)} leaves, not {self._num_valid}"
        return valid

    def push(self, key: Key, run: Run) -> None:
        """Replaces the run's record, if it has one here."""
        is_new = not run.ticket
        self._num_valid += is_new
        run.ticket = ticket = next(self.tickets)
        record = (*key, ticket, run)
        heapq.heappush(self._heap, record)
        if len(self._heap) > 2 * self._num_valid + 16:
            self._compact()
        if run.owner is not None:
            owned = self._owned.setdefault(run.owner, Leaves(self.tickets))
            owned._num_valid += is_new
            heapq.heappush(owned._heap, record)
            if len(owned._heap) > 2 * owned._num_valid + 16:
                owned._compact()

    def _compact(self) -> None:
        self._heap = [record for record in self._heap if record[2] == record[3].ticket]
        heapq.heapify(self._heap)

    def pop(self, owner: str | None = None) -> tuple[Key, Run] | None:
        """The evictable run with the smallest recorded key: of one owner, or of all."""
        heap = self._heap
        if owner is not None:
            heap = self._owned[owner]._heap if owner in self._owned else []
        while heap:
            first, second, ticket, run = heapq.heappop(heap)
            if ticket != run.ticket:
                continue
            run.ticket = 0
            self._num_valid -= 1
            if run.owner is not None:
                self._disown(run.owner)
            if run.is_evictable:
                return (first, second), run
        return None

    def withdraw(self, run: Run) -> None:
        """Its record is valid no more."""
        run.ticket = 0
        self._num_valid -= 1
        if run.owner is not None:
            self._disown(run.owner)

    def _disown(self, owner: str) -> None:
        self._owned[owner]._num_valid -= 1
        if not self._owned[owner]._num_valid:
            del self._owned[owner]


class Order(ABC):
    """Base of all: one heap of leaves under `key`, which may rise between two offers of a run."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        """Of the pool that it is to order."""
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self.leaves = Leaves()

    @abstractmethod
    def key(self, run: Run) -> Key:
        """The smallest goes first. Among runs with equal keys, the one offered first."""

    def admit(self, hashes: Sequence[bytes], begin: int) -> tuple[int, int]:
        """(level of the new page hashes[begin], how many from there have the same)."""
        return 0, len(hashes) - begin

    def add(self, run: Run, hashes: Sequence[bytes], now: int) -> None:  # noqa: B027
        """`hashes` are in the index now, as a new run or at the end of one that is still as
        added."""

    def hit(self, run: Run, now: int) -> None:  # noqa: B027
        """A request reuses it."""

    def release(self, run: Run, now: int) -> None:
        """A request has dropped a reference: the last time before it is offered again counts."""
        run.age = now

    def split(self, head: Run, tail: Run) -> None:
        """`head` is a new run for the first pages of what is now `tail`, with the same history."""
        head.age, head.hits, head.level = tail.age, tail.hits, tail.level

    def remove(self, run: Run, hashes: Sequence[bytes]) -> None:  # noqa: B027
        """These were evicted from its end; it may be empty."""

    def clear(self) -> None:
        self.leaves.clear()

    def check_integrity(self, runs: Sequence[Run]) -> None:
        """Recompute its counts from all runs there are. Raises AssertionError."""
        self.leaves.check_integrity(runs)

    def offer(self, run: Run) -> None:
        """It has become evictable (or is again, after `take`), and has no ticket."""
        self.leaves.push(self.key(run), run)

    def take(self, owner: str | None = None) -> Run | None:
        """The next run to evict from, of one owner or of all, no longer offered; None when there
        is none."""
        while (found := self.leaves.pop(owner)) is not None:
            recorded, run = found
            key = self.key(run)
            if key == recorded:
                return run
            self.leaves.push(key, run)  # used since
        return None

    def peek(self) -> Run | None:
        """As `take`, but nothing is evicted from it, and it is to be offered again."""
        return self.take()

    def withdraw(self, run: Run) -> None:
        """It is offered no more."""
        self.leaves.withdraw(run)


class LruOrder(Order):
    def key(self, run: Run) -> Key:
        return (run.age, 0)


class LfuOrder(Order):
    def key(self, run: Run) -> Key:
        return (run.hits, run.age)

    def hit(self, run: Run, now: int) -> None:
        run.hits += 1


class SlruOrder(Order):
    def __init__(self, num_pages: int, page_tokens: int) -> None:
        super().__init__(num_pages, page_tokens)
        self._limit = int(num_pages * _PROTECTED)
        self._protected: OrderedDict[Run, None] = OrderedDict()
        """By last match (or split)."""
        self._num_protected = 0

    def key(self, run: Run) -> Key:
        return (run.level, run.age)

    def hit(self, run: Run, now: int) -> None:
        if run.level:
            self._protected.move_to_end(run)
            return
        run.level = 1
        self._protected[run] = None
        self._num_protected += run.num_pages
        while self._num_protected > self._limit:
            demoted, _ = self._protected.popitem(last=False)
            self._num_protected -= demoted.num_pages
            demoted.level, demoted.age = 0, now
            if demoted.ticket:  # a key that falls: the record has to be replaced
                self.leaves.push(self.key(demoted), demoted)

    def split(self, head: Run, tail: Run) -> None:
        super().split(head, tail)
        if head.level:
            self._protected[head] = None

    def remove(self, run: Run, hashes: Sequence[bytes]) -> None:
        if run.level:
            self._num_protected -= len(hashes)
            if not run.num_pages:
                del self._protected[run]

    def clear(self) -> None:
        super().clear()
        self._protected.clear()
        self._num_protected = 0

    def check_integrity(self, runs: Sequence[Run]) -> None:
        super().check_integrity(runs)
        protected = {run for run in runs if run.level}
        assert protected == set(self._protected), "protected runs are not those in line"
        count = sum(run.num_pages for run in protected)
        assert count == self._num_protected <= self._limit, f"{count} pages protected"


class S3FifoOrder(Order):
    """Level 0 is the small queue, 1 the main one; `leaves` are the small queue's."""

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        super().__init__(num_pages, page_tokens)
        self._limit = int(num_pages * _SMALL)
        self._num_small = 0
        self._main = Leaves(self.leaves.tickets)
        self._ghosts: set[bytes] = set()
        # What they were when they left, oldest first, all lengths in all. A page that came back
        # stays in its batch: if it leaves again, it may be forgotten with the older one.
        self._batches: deque[Sequence[bytes]] = deque()
        self._num_batched = 0
        self._max_ghosts = num_pages - self._limit
        self._place = 0

    def key(self, run: Run) -> Key:
        return (run.age, 0)

    def admit(self, hashes: Sequence[bytes], begin: int) -> tuple[int, int]:
        rest = hashes[begin:]
        if self._ghosts.isdisjoint(rest):
            return 0, len(rest)
        known = list(map(self._ghosts.__contains__, rest))
        other = not known[0]
        return int(known[0]), known.index(other) if other in known else len(known)

    def add(self, run: Run, hashes: Sequence[bytes], now: int) -> None:
        if not run.age:
            run.age = self._next_place()
        if run.level:
            self._ghosts.difference_update(hashes)
        else:
            self._num_small += len(hashes)

    def hit(self, run: Run, now: int) -> None:
        if run.hits < _MAX_HITS:
            run.hits += 1

    def release(self, run: Run, now: int) -> None:
        pass

    def remove(self, run: Run, hashes: Sequence[bytes]) -> None:
        if run.level:
            return
        self._num_small -= len(hashes)
        self._ghosts.update(hashes)
        self._batches.append(hashes)
        self._num_batched += len(hashes)
        while self._num_batched > self._max_ghosts:
            oldest = self._batches.popleft()
            self._ghosts.difference_update(oldest)
            self._num_batched -= len(oldest)

    def clear(self) -> None:
        super().clear()
        self._main.clear()
        self._ghosts.clear()
        self._batches.clear()
        self._num_small = self._num_batched = 0

    def check_integrity(self, runs: Sequence[Run]) -> None:
        self.leaves.check_integrity([run for run in runs if not run.level])
        self._main.check_integrity([run for run in runs if run.level])
        count = sum(run.num_pages for run in runs if not run.level)
        assert count == self._num_small, f"{count} pages in the small queue, not {self._num_small}"
        batched = [page_hash for batch in self._batches for page_hash in batch]
        assert len(batched) == self._num_batched <= self._max_ghosts, f"{len(batched)} ghosts"
        assert self._ghosts <= set(batched), "a ghost that will not be forgotten"

    def offer(self, run: Run) -> None:
        (self._main if run.level else self.leaves).push(self.key(run), run)

    def withdraw(self, run: Run) -> None:
        (self._main if run.level else self.leaves).withdraw(run)

    def take(self, owner: str | None = None) -> Run | None:
        while True:
            found = self.leaves.pop(owner) if self._num_small > self._limit else None
            found = found or self._main.pop(owner) or self.leaves.pop(owner)
            if found is None:
                return None
            run = found[1]
            if run.level and run.hits:
                run.hits -= 1
            elif not run.level and run.hits > 1:
                run.level, run.hits = 1, 0
                self._num_small -= run.num_pages
            else:
                return run
            run.age = self._next_place()
            self._main.push(self.key(run), run)

    def _next_place(self) -> int:
        self._place += 1
        return self._place


class CostOrder(Order):
    def __init__(self, num_pages: int, page_tokens: int) -> None:
        super().__init__(num_pages, page_tokens)
        self._flat = _flat_cost(page_tokens)
        self._evicted = 0

    def key(self, run: Run) -> Key:
        return (run.age + self._flat + run.end, 0)

    def release(self, run: Run, now: int) -> None:
        run.age = self._evicted

    def take(self, owner: str | None = None) -> Run | None:
        run = super().take(owner)
        if run is not None:
            self._evicted = max(self._evicted, self.key(run)[0])
        return run

    def peek(self) -> Run | None:
        return super().take()


_ORDERS: dict[str, type[Order]] = {
    "lru": LruOrder,
    "lfu": LfuOrder,
    "slru": SlruOrder,
    "s3fifo": S3FifoOrder,
    "cost": CostOrder,
}


def prefix_cost(num_pages: int, page_tokens: int) -> int:
    """What it takes to compute the first pages of a sequence, as `cost` weighs them."""
    return num_pages * _flat_cost(page_tokens) + num_pages * (num_pages + 1) // 2


def _flat_cost(page_tokens: int) -> int:
    """Of any page, in units of what one page's depth adds, so that all sums are whole numbers."""
    return max(1, _EQUAL_COST_TOKENS // page_tokens)


def order_names() -> tuple[str, ...]:
    return tuple(_ORDERS)


def make_order(name: str, num_pages: int, page_tokens: int) -> Order:
    """Raises ValueError for an unknown name."""
    if name not in _ORDERS:
        raise ValueError(f"eviction order: found {name!r}, expected one of {', '.join(_ORDERS)}")
    return _ORDERS[name](num_pages, page_tokens)
