"""Reading pages from storage into the host tier before a request needs them.

A prefetch asks once which of the pages that the host tier lacks are there. From the answer follows
how long a prefix can be restored: full-attention and latent groups need every page, sliding-window
groups the last window before its end. What is lacking of that is read in page order, in batches,
into slots of the host tier's pools. A batch that has landed is inserted when all before it are, so
that no page is ever without its predecessor; from then on its pages are ordinary cache. Only what
the rest continues is held until the prefetch is done: the last batch, with which all before it
stays, and what there is of the last windows.

A page that cannot be read, or finds no room, ends the prefix: on all groups together. What can be
restored up to there is worked out anew, for a shorter prefix has another last window. Two
prefetches of the same pages share one read: the second waits until the first one's has ended.
"""

from __future__ import annotations

import collections
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence

from hicache.grid import ObjectGrid
from hicache.index import PageIndex
from hicache.load_cost import Verdict
from hicache.storage.storage import Outcome
from hicache.storage_hints import StorageHints
from hicache.storage_io import BreakerState, Operations, OpKind, StorageLimits, bytes_of

_ASKING_SHARE = 0.02
"""Of the time to compute pages, the most that a request waits to hear that storage lacks them."""


@dataclasses.dataclass(slots=True, eq=False)
class Prefetch:
    """One request's read. Its public fields are for who asked for it, to be read only."""

    _hashes: list[bytes]
    _begin: int
    _have: int
    """The request has the pages before."""
    is_probe: bool
    """It is not waited for: it finds out whether reading is faster than prefill, or whether there
    is anything to read."""
    _tokens_per_s: float
    _deadline: float
    num_groups: dataclasses.InitVar[int]
    num_pages: int = dataclasses.field(init=False)
    """Leading pages of the request that the host tier could match when this last changed: a lower
    bound, exact when it is done."""
    target: int = dataclasses.field(init=False)
    """What `num_pages` will be if all goes well, once storage has said what it has."""
    is_done: bool = False
    """Nothing more will come."""
    _limit: int = dataclasses.field(init=False)
    """No page from here on will be had."""
    _exists_id: int | None = None
    """While storage is asked."""
    _present: list[int] = dataclasses.field(init=False)
    """By page from `begin` on, bits of the groups in which storage has it."""
    _next: int = dataclasses.field(init=False)
    """All before it that is needed is there or under way."""
    _batches: collections.deque[_Batch] = dataclasses.field(default_factory=collections.deque)
    """Those not inserted yet, in page order."""
    _hold: list[list[int]] = dataclasses.field(init=False)
    """Slots by group with a reference."""
    _kept: int = 0
    """The first page of the full groups among them."""
    _reserved: list[int] = dataclasses.field(init=False)
    """Pages of each pool that it is to fill."""
    _unread_bytes: int = 0
    """That have not been asked for yet."""
    _is_cancelled: bool = False

    def __post_init__(self, num_groups: int) -> None:
        self.num_pages = self.target = self._next = self._begin
        self._limit = len(self._hashes)
        self._present = [0] * (len(self._hashes) - self._begin)
        self._hold = [[] for _ in range(num_groups)]
        self._reserved = [0] * num_groups


@dataclasses.dataclass(slots=True, eq=False)
class _Batch:
    owner: Prefetch
    epoch: int
    pages: list[int]
    slots: list[dict[int, int]]
    """By group, then by page."""
    failed: dict[int, int] = dataclasses.field(default_factory=dict)
    """By page, bits of groups."""
    op_ids: list[int] = dataclasses.field(default_factory=list)
    num_pending: int = 0


class Prefetcher:
    def __init__(
        self,
        index: PageIndex,
        num_pages: Sequence[int],
        grid: ObjectGrid,
        hints: StorageHints,
        operations: Operations,
        limits: StorageLimits,
        lose: Callable[[bytes, int], None],
    ) -> None:
        """`lose` is told of a page, and its place in its chain, that was thought to be stored."""
        self._index = index
        self._grid = grid
        self._hints = hints
        self._operations = operations
        self._limits = limits
        self._lose = lose
        self._groups = index.groups
        self._sliding = [g for g, group in enumerate(index.groups) if group.kind == "sliding"]
        self._full = [g for g in range(len(index.groups)) if g not in self._sliding]
        self._pool_pages = [count - 1 for count in num_pages]
        self._page_bytes = [layout.page_bytes for layout in grid.layouts]
        self._batch_pages = max(
            1, min(limits.batch_pages, limits.max_get_bytes // sum(self._page_bytes))
        )
        self._active: dict[Prefetch, None] = {}
        """In the order of their beginning."""
        self._loading: dict[bytes, _Batch] = {}
        """By page, from the get on until it is inserted or given up."""
        self._unused: OrderedDict[bytes, None] = OrderedDict()
        """Pages that were read and that no request has matched since."""
        self._max_unused = sum(self._pool_pages)
        self.num_restored = 0
        """Pages that entered the host tier."""
        self.num_missed = 0
        """Prefetches that found nothing to read."""
        self.num_judged_slow = 0
        """Not begun, for computing the tokens again was predicted to be faster."""
        self.num_used = 0
        self.num_wasted = 0
        """Pages that were read in vain: cut off, or evicted before any request matched them."""

    @property
    def num_active(self) -> int:
        return len(self._active)

    # ------------------------------------------------------------------------------- what to read

    def begin(
        self, hashes: Sequence[bytes], begin: int, now: float, tokens_per_s: float, have: int
    ) -> Prefetch | None:
        """As `StorageTier.prefetch`."""
        if not self._operations.can_start(now):
            return None
        end = min(len(hashes), begin + self._limits.max_prefetch_pages)
        end = self._hints.first_absent(hashes, begin, end, now)
        if max(begin, have) >= end or any(self._room(g) < 1 for g in self._full):
            return None
        chain = list(hashes[:end])
        slots = self._index.resident(chain, max(begin - 1, 0))
        if self._full and begin and not slots[0]:
            return None
        num_pages = end - max(begin, have)
        trips = 1 + self._num_batches(end - begin)
        verdict = self._judge(self._estimate(begin, end), trips, num_pages, tokens_per_s, now)
        if verdict is Verdict.RECOMPUTE:
            self.num_judged_slow += 1
            return None
        if verdict is Verdict.LOAD and not self._is_worth_asking(chain, begin, have, tokens_per_s):
            verdict = Verdict.PROBE
        if verdict is Verdict.PROBE:
            del chain[begin + self._limits.probe_pages :]
        prefetch = Prefetch(
            chain,
            begin,
            have,
            verdict is Verdict.PROBE,
            tokens_per_s,
            now + self._limits.prefetch_timeout_s,
            len(self._groups),
        )
        self._active[prefetch] = None
        self._keep(prefetch, max(begin - 1, 0))
        self._ask(prefetch, now)
        return prefetch

    def _estimate(self, begin: int, end: int) -> int:
        """Bytes of the pages that a prefix of `end` pages needs beyond `begin`."""
        return sum(
            size * (end - max(begin, self._first_needed(g, end)))
            for g, size in enumerate(self._page_bytes)
        )

    def _num_batches(self, num_pages: int) -> int:
        return -(-num_pages // self._batch_pages)

    def _judge(
        self, num_bytes: int, trips: int, num_pages: int, tokens_per_s: float, now: float
    ) -> Verdict:
        operations = self._operations
        num_bytes += sum(prefetch._unread_bytes for prefetch in self._active)
        num_tokens = num_pages * self._index.page_tokens
        return operations.cost.judge(
            num_bytes,
            trips,
            num_tokens,
            tokens_per_s,
            now,
            operations.bytes_in_flight[OpKind.GET],
            operations.reading_since(),
        )

    def _is_worth_asking(
        self, chain: list[bytes], begin: int, have: int, tokens_per_s: float
    ) -> bool:
        """Whether a request should wait for the answer: it may be that nothing is there, or that
        storage fails again."""
        if not tokens_per_s:
            return True
        if self._operations.breaker.state is not BreakerState.CLOSED:
            return False
        if self._hints.groups(chain[max(begin, have)]):
            return True
        computing_s = (len(chain) - max(begin, have)) * self._index.page_tokens / tokens_per_s
        return self._operations.cost.latency_s <= _ASKING_SHARE * computing_s

    def _keep(self, prefetch: Prefetch, first: int) -> None:
        """Hold what the rest of a prefetch continues: of full groups the pages from `first` on, and
        with them all before; of sliding ones what there is of the last window. No others any
        more."""
        prefetch._kept = max(prefetch._kept, first)
        starts = [
            prefetch._kept if g in self._full else self._first_needed(g, prefetch.target)
            for g in range(len(self._groups))
        ]
        low = min(starts)
        slots = self._index.resident(prefetch._hashes, low)
        old = prefetch._hold
        prefetch._hold = [
            of_group[start - low :] for start, of_group in zip(starts, slots, strict=True)
        ]
        for g, of_group in enumerate(prefetch._hold):
            self._index.retain(g, of_group)
        self._release(old)

    def _ask(self, prefetch: Prefetch, now: float) -> None:
        """Whether storage has each cell of each page that the host tier lacks."""
        begin = prefetch._begin
        slots = self._index.resident(prefetch._hashes, begin)
        asked: list[tuple[int, int]] = []
        keys: list[str] = []
        present = [0] * len(prefetch._present)
        for g, of_group in enumerate(slots):
            pages = [
                page
                for page in range(begin, len(prefetch._hashes))
                if page - begin >= len(of_group) or of_group[page - begin] < 0
            ]
            for page in pages:
                present[page - begin] |= 1 << g
            wanted = [prefetch._hashes[page] for page in pages]
            for cell in range(len(self._grid.cells(g))):
                asked += [(page, g) for page in pages]
                keys += self._grid.keys(g, cell, wanted)
        epoch = self._hints.epoch

        def then(outcomes: tuple[Outcome, ...], now: float) -> None:
            prefetch._exists_id = None
            missing: dict[int, int] = {}
            for (page, group), outcome in zip(asked, outcomes, strict=True):
                if outcome is not Outcome.PRESENT:
                    present[page - begin] &= ~(1 << group)
                    if outcome is Outcome.MISS:
                        missing[page] = missing.get(page, 0) | 1 << group
            prefetch._present = present
            if epoch == self._hints.epoch:
                self._learn(prefetch, missing, now)
            if not prefetch.is_done:
                self._plan(prefetch, now)

        prefetch._exists_id = -1
        if keys:
            prefetch._exists_id = self._operations.exists(keys, now, then)
        else:
            then((), now)

    def _learn(self, prefetch: Prefetch, missing: dict[int, int], now: float) -> None:
        """What the answer says about pages that storage has, or has not."""
        hashes, full = prefetch._hashes, self._hints.full_groups
        gone = [page for page, groups in missing.items() if groups & full]
        end = min(gone, default=len(hashes))
        for page, groups in missing.items():
            if page <= end:
                self._learn_missing(prefetch, page, groups, now)
        for page in gone:
            if page > end:
                self._hints.add_absent(hashes[page], now)
        for page in range(prefetch._begin, end):
            self._hints.add_stored(hashes[page], prefetch._present[page - prefetch._begin])

    def _learn_missing(self, prefetch: Prefetch, page: int, groups: int, now: float) -> None:
        hashes = prefetch._hashes
        if groups & self._hints.full_groups:
            if self._hints.groups(hashes[page]):
                self._lose(hashes[page], page)
            self._hints.remove_stored(hashes[page:])
            self._hints.add_absent(hashes[page], now)
        for g in self._sliding:
            if groups >> g & 1:
                self._hints.remove_group(hashes[page], g)

    def _plan(self, prefetch: Prefetch, now: float) -> None:
        """Set out for the longest prefix that can be restored, from what is there now."""
        prefetch._reserved = [0] * len(self._groups)
        prefetch.target, counts = self._longest(prefetch)
        prefetch._unread_bytes = 0
        num_bytes = sum(map(int.__mul__, counts, self._page_bytes))
        num_pages = prefetch.target - prefetch.num_pages
        if num_pages < 1 or not num_bytes:
            prefetch._next = prefetch.target
            return
        num_gained = prefetch.target - max(prefetch.num_pages, prefetch._have)
        if num_gained < 1 and not prefetch.is_probe:
            prefetch.target = prefetch._next = prefetch.num_pages
            return
        # A prefetch that has begun to read goes on.
        if (
            not prefetch.is_probe
            and not prefetch._batches
            and prefetch.num_pages == prefetch._begin
        ):
            trips = self._num_batches(num_pages)
            verdict = self._judge(num_bytes, trips, num_gained, prefetch._tokens_per_s, now)
            if verdict is Verdict.RECOMPUTE:
                self.num_judged_slow += 1
                prefetch.target = prefetch._next = prefetch.num_pages
                return
            if verdict is Verdict.PROBE:
                prefetch.is_probe = True
                prefetch._limit = min(prefetch._limit, prefetch._begin + self._limits.probe_pages)
                self._plan(prefetch, now)
                return
        prefetch._next = prefetch.num_pages
        self._keep(prefetch, prefetch._kept)
        prefetch._reserved = counts
        prefetch._unread_bytes = num_bytes

    def _longest(self, prefetch: Prefetch) -> tuple[int, list[int]]:
        """(pages of the longest prefix that can be restored and has room, pages of each group to
        read for it); what can be matched already, and zeros, if that is all."""
        begin, present, full = prefetch._begin, prefetch._present, self._hints.full_groups
        first = min([begin, *(self._first_needed(g, begin + 1) for g in self._sliding)])
        slots = self._index.resident(prefetch._hashes[: prefetch._limit], first)
        resident = first + len(slots[0])
        best = max(begin, min(resident, prefetch._limit))
        while best < prefetch._limit and present[best - begin] & full == full:
            best += 1
        for g in self._full:
            best = min(best, resident + self._room(g))

        def is_there(g: int, page: int) -> bool:
            if page < resident and slots[g][page - first] >= 0:
                return True
            return page >= begin and present[page - begin] >> g & 1 == 1

        checked = [best] * len(self._groups)
        """By group, the first of the pages before `best` that are known to be there."""
        windows = list(self._sliding)
        while windows and best > prefetch.num_pages:
            g = windows.pop()
            page, needed = min(checked[g], best), max(first, self._first_needed(g, best))
            while page > needed and is_there(g, page - 1):
                page -= 1
            checked[g] = page
            if page > needed:
                # Every longer prefix that starts at or before this page needs it too.
                best = page - 1
                windows = list(self._sliding)
        counts = [max(0, best - max(resident, begin))] * len(self._groups)
        for g in self._sliding:
            pages = range(max(first, self._first_needed(g, best)), best)
            counts[g] = sum(page >= resident or slots[g][page - first] < 0 for page in pages)
        if best <= prefetch.num_pages or any(counts[g] > self._room(g) for g in self._sliding):
            return prefetch.num_pages, [0] * len(self._groups)
        return best, counts

    def _first_needed(self, group: int, num_pages: int) -> int:
        page_tokens = self._index.page_tokens
        return self._groups[group].first_needed_page(num_pages * page_tokens, page_tokens)

    def _room(self, group: int) -> int:
        """Pages of a pool that another prefetch may fill. One alone may read a window, even if that
        is most of the pool."""
        reserved = sum(prefetch._reserved[group] for prefetch in self._active)
        if group in self._sliding and not reserved:
            return self._pool_pages[group]
        share = int(self._limits.pool_share * self._pool_pages[group])
        return max(share, 1) - reserved

    # ------------------------------------------------------------------------------------- reading

    def pump(self, now: float) -> None:
        """Begin what may be begun now, the oldest prefetch first."""
        can_read = True
        for prefetch in list(self._active):
            while can_read and self._is_ready(prefetch):
                if not self._operations.can_start(now):
                    prefetch._is_cancelled = True
                else:
                    can_read = self._read_next(prefetch, now)
            self._finish_if_done(prefetch)

    def _is_ready(self, prefetch: Prefetch) -> bool:
        return (
            prefetch._exists_id is None
            and not prefetch._is_cancelled
            and prefetch._next < prefetch.target
            and prefetch._hashes[prefetch._next] not in self._loading
        )

    def _read_next(self, prefetch: Prefetch, now: float) -> bool:
        """The next batch of a prefetch; False: it has to wait for bytes in flight."""
        wanted = self._next_pages(prefetch)
        if not wanted:
            return True
        first, groups = wanted[0]
        if groups & self._hints.full_groups:
            # Another prefetch may have found out meanwhile.
            absent = self._hints.first_absent(prefetch._hashes, first, wanted[-1][0] + 1, now)
            wanted = [(page, groups) for page, groups in wanted if page < absent]
        if not self._operations.has_room(OpKind.GET, self._num_bytes(wanted)):
            return False
        slots = self._allocate(wanted)
        if slots is None:
            self._cut(prefetch, first, now)
            return True
        pages = [page for page, _ in wanted]
        batch = _Batch(prefetch, self._hints.epoch, pages, slots)
        prefetch._batches.append(batch)
        prefetch._next = pages[-1] + 1
        prefetch._unread_bytes = max(0, prefetch._unread_bytes - self._num_bytes(wanted))
        for page in pages:
            self._loading[prefetch._hashes[page]] = batch
        for g, of_group in enumerate(slots):
            if of_group:
                self._get(batch, g, list(of_group), list(of_group.values()), now)
        return True

    def _next_pages(self, prefetch: Prefetch) -> list[tuple[int, int]]:
        """(page, bits of the groups to read) of the next batch; none if nothing is left, or if it
        has to wait for a page that is being read."""
        hashes, first = prefetch._hashes, prefetch._next
        needed = [self._first_needed(g, prefetch.target) for g in range(len(self._groups))]
        slots = self._index.resident(hashes[: prefetch.target], first)
        wanted: list[tuple[int, int]] = []
        for page in range(first, prefetch.target):
            place = page - first
            groups = sum(
                1 << g
                for g, of_group in enumerate(slots)
                if page >= needed[g] and (place >= len(of_group) or of_group[place] < 0)
            )
            if not groups:
                continue
            if hashes[page] in self._loading:
                if not wanted:
                    prefetch._next = page
                return wanted
            wanted.append((page, groups))
            if len(wanted) == self._batch_pages:
                return wanted
        if not wanted:
            prefetch._next = prefetch.target
        return wanted

    def _num_bytes(self, wanted: list[tuple[int, int]]) -> int:
        return bytes_of(self._page_bytes, (groups for _, groups in wanted))

    def _allocate(self, wanted: list[tuple[int, int]]) -> list[dict[int, int]] | None:
        """Slots by group and page; pages are taken off the end of `wanted` for which there is no
        room. None: there is none for the first."""
        while wanted:
            pages = [
                [page for page, groups in wanted if groups >> g & 1]
                for g in range(len(self._groups))
            ]
            if self._index.can_allocate([len(of_group) for of_group in pages]):
                slots = []
                for g, of_group in enumerate(pages):
                    allocated = self._index.allocate(g, len(of_group))
                    assert allocated is not None
                    slots.append(dict(zip(of_group, allocated, strict=True)))
                return slots
            del wanted[len(wanted) // 2 :]
        return None

    def _get(
        self, batch: _Batch, group: int, pages: list[int], slots: list[int], now: float
    ) -> None:
        hashes = batch.owner._hashes
        wanted = [hashes[page] for page in pages]

        def then(outcomes: tuple[Outcome, ...], now: float) -> None:
            for page, outcome in zip(pages, outcomes, strict=True):
                if outcome is Outcome.HIT:
                    continue
                batch.failed[page] = batch.failed.get(page, 0) | 1 << group
                is_gone = outcome is Outcome.MISS or outcome is Outcome.CORRUPT
                if is_gone and batch.epoch == self._hints.epoch:
                    self._learn_missing(batch.owner, page, 1 << group, now)
            batch.num_pending -= 1
            if not batch.num_pending:
                self._land(batch.owner, now)

        for number, cell in enumerate(self._grid.cells(group)):
            batch.num_pending += 1
            keys = self._grid.keys(group, number, wanted)
            op_id = self._operations.move(OpKind.GET, group, keys, slots, cell.part, now, then)
            batch.op_ids.append(op_id)

    # ------------------------------------------------------------------------------------- landing

    def _land(self, prefetch: Prefetch, now: float) -> None:
        """Insert the batches that have ended and whose predecessors have."""
        while prefetch._batches and not prefetch._batches[0].num_pending:
            batch = prefetch._batches.popleft()
            good = 0
            for page in batch.pages:
                if page in batch.failed:
                    break
                good += 1
            inserted = self._insert(prefetch, batch, good)
            self._release([list(of_group.values()) for of_group in batch.slots])
            for page in batch.pages:
                del self._loading[prefetch._hashes[page]]
            self.num_restored += inserted
            self.num_wasted += len(batch.pages) - len(batch.failed) - inserted
            if inserted < len(batch.pages):
                self._cut(prefetch, batch.pages[inserted], now)

    def _insert(self, prefetch: Prefetch, batch: _Batch, count: int) -> int:
        """The first `count` pages of a batch; how many of them are in the index now."""
        if not count:
            return 0
        hashes = prefetch._hashes
        first, end = batch.pages[0], batch.pages[count - 1] + 1
        rows = [[of_group.get(page, -1) for page in range(first, end)] for of_group in batch.slots]
        self._index.insert(hashes[first - 1] if first else b"", hashes[first:end], rows, first)
        found = first + len(self._index.resident(hashes[:end], first)[0])
        inserted = sum(page < found for page in batch.pages[:count])
        self._keep(prefetch, first)
        # Without another page of a sliding group, the match that is new is rarely one.
        if not self._sliding or any(batch.slots[g] for g in self._sliding):
            prefetch.num_pages = max(self._index.match(hashes), prefetch.num_pages)
        for page in batch.pages[:inserted]:
            self._count_unused(hashes[page])
        return inserted

    def _cut(self, prefetch: Prefetch, page: int, now: float) -> None:
        """No page from `page` on will be had."""
        if page >= prefetch._limit:
            return
        prefetch._limit = page
        for batch in prefetch._batches:
            if batch.pages[0] >= page:
                for op_id in batch.op_ids:
                    self._operations.cancel(op_id)
        if not prefetch._is_cancelled:
            self._plan(prefetch, now)

    def _finish_if_done(self, prefetch: Prefetch) -> None:
        if prefetch._batches or prefetch.is_done:
            return
        is_idle = prefetch._exists_id is None and prefetch._next >= prefetch.target
        if not prefetch._is_cancelled and not is_idle:
            return
        if prefetch._exists_id is not None:
            self._operations.cancel(prefetch._exists_id)
        self._release(prefetch._hold)
        prefetch._hold = [[] for _ in self._groups]
        prefetch.num_pages = self._index.match(prefetch._hashes)
        prefetch.is_done = True
        self.num_missed += prefetch.num_pages <= prefetch._begin
        del self._active[prefetch]

    def cancel(self, prefetch: Prefetch) -> None:
        """No new reads; what is under way still lands."""
        prefetch._is_cancelled = True
        self._finish_if_done(prefetch)

    def tick(self, now: float) -> None:
        """End those that take too long."""
        for prefetch in list(self._active):
            if now >= prefetch._deadline:
                self._abandon(prefetch)

    def abandon_all(self) -> None:
        for prefetch in list(self._active):
            self._abandon(prefetch)

    def _abandon(self, prefetch: Prefetch) -> None:
        for batch in prefetch._batches:
            for op_id in batch.op_ids:
                self._operations.cancel(op_id)
        self.cancel(prefetch)

    # ------------------------------------------------------------------------------------- helpers

    def used(self, hashes: Sequence[bytes]) -> None:
        """A request has matched these pages."""
        if self._unused:
            for page_hash in hashes:
                if page_hash in self._unused:
                    del self._unused[page_hash]
                    self.num_used += 1

    def _count_unused(self, page_hash: bytes) -> None:
        if page_hash in self._unused:
            self.num_wasted += 1
            self._unused.move_to_end(page_hash)
        self._unused[page_hash] = None
        if len(self._unused) > self._max_unused:
            self._unused.popitem(last=False)
            self.num_wasted += 1

    def _release(self, slots: list[list[int]]) -> None:
        for g, of_group in enumerate(slots):
            self._index.release(g, of_group)

    def slots_in_use(self, group: int) -> list[int]:
        """On each of which this holds a reference, as often as it does."""
        used: list[int] = []
        for prefetch in self._active:
            used += [slot for slot in prefetch._hold[group] if slot >= 0]
            for batch in prefetch._batches:
                used += batch.slots[group].values()
        return used

    def check_integrity(self) -> None:
        loading: dict[bytes, _Batch] = {}
        for prefetch in self._active:
            assert not prefetch.is_done, "a prefetch that is done is active"
            assert prefetch._begin <= prefetch.num_pages <= len(prefetch._hashes), "odd progress"
            assert prefetch._limit <= len(prefetch._hashes), "a limit beyond the prefix"
            for batch in prefetch._batches:
                assert batch.owner is prefetch, "another prefetch's batch"
                assert batch.pages == sorted(set(batch.pages)), "pages out of order"
                for page in batch.pages:
                    page_hash = prefetch._hashes[page]
                    assert page_hash not in loading, "a page is read twice at once"
                    loading[page_hash] = batch
        assert loading == self._loading, "pages that are being read are not those of batches"
        for g in self._full:
            reserved = sum(prefetch._reserved[g] for prefetch in self._active)
            assert reserved <= max(1, self._limits.pool_share * self._pool_pages[g]), (
                f"group {g}: {reserved} pages reserved"
            )
