"""The page index of one replica: who uses which page of device memory, and whose content can be
used again.

Pure: no torch, no clock; time is a counter of calls. It does not know requests, only references.
Each layer group has a pool of slots. Page i of a sequence lies in a slot of stripe i mod cp: slot
mod cp is the context-parallel rank, slot // cp the page in that rank's pool, of which 0 is the null
page. So slots 0 to cp - 1 are never handed out, and room is counted by stripe. A slot is
  free    nobody's,
  used    references > 0: its holders' until each has released it; perhaps in the index as well,
  cached  in the index with no reference: it can be matched again, or evicted when room is needed.

An entry of the index is one page of one sequence, found by its hash, with one slot per layer group.
Its full-attention and latent groups are resident together and only while its parent's are, so that
a prefix match is a search for the last known hash. A sliding-window group may lack pages (-1, a
tombstone); a match only needs those that the next token attends to. Hence two kinds of eviction: a
sliding page goes alone, least recently used first; an entry goes whole, when no page of it or of
its descendants is used or pinned, leaves first, in the order that was asked for (policy.py). A page
was last used when its last reference was released.

Entries are kept in runs: consecutive pages of one sequence that have been inserted, matched and
released together, and in full groups have equally many references. A call costs a few operations
for each run that it meets and list operations for the pages. A run is split where a call treats its
pages differently, or where another sequence branches off; a sequence that grows page by page
extends its last run while nobody else has used it.

The caller promises that hashes are chained (a hash names all pages before it as well), that a page
is complete before it is inserted and that no operation on it is in flight when its last reference
is released. Host and storage tiers will add slots to the same entries.

An entry belongs to the tenant that inserted it first, if that was given, whoever matches it later.
A tenant with more entries than its quota loses its own before others lose any, when it inserts new
ones and when room is needed; what is used or pinned stays, so that it may exceed the quota by that.
An index without a full-attention group knows no tenants.

With `feed`, what enters the index and what leaves it is recorded for `take_changes`.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import TypeAlias

from hicache.policy import Run, make_order
from transfer.layout import LayerGroup

_MAX_RUN_PAGES = 256
"""So that splitting a run, or looking for a slot in it, takes microseconds."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """Pages entered the index, consecutive ones of one sequence."""

    parent: bytes
    """Hash of the page before them, or the namespace's root."""
    hashes: tuple[bytes, ...]
    first_page: int


@dataclasses.dataclass(frozen=True, slots=True)
class Removed:
    """Pages left the index. A sliding page that goes alone does not count."""

    hashes: tuple[bytes, ...]
    """In no order."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cleared:
    """All pages left the index."""


Change: TypeAlias = Stored | Removed | Cleared


@dataclasses.dataclass(frozen=True, slots=True)
class TopPrefix:
    """A run of pages that were matched together."""

    page_hash: bytes
    """Of its last page."""
    first_page: int
    num_pages: int
    matches: int
    """That took all of it, since it was inserted; where runs were split, each part has those of
    the whole."""
    tenant: str | None


class _Run(Run):
    __slots__ = (
        "children",
        "first",
        "hashes",
        "holds",
        "in_use",
        "is_fresh",
        "matches",
        "parent",
        "pinned",
        "references",
        "slots",
    )

    def __init__(
        self,
        level: int,
        first: int,
        hashes: list[bytes],
        slots: list[list[int]],
        references: list[int],
        parent: _Run | None,
        tenant: str | None = None,
    ) -> None:
        super().__init__(level, tenant)
        self.first = first
        """Position in the sequence of its first page."""
        self.hashes = hashes
        self.slots = slots
        """By layer group, then by page; -1 is a tombstone."""
        self.references = references
        """By layer group, on each of its pages; 0 for sliding groups, whose slots are counted
        one by one."""
        self.parent = parent
        """The run that ends with the page before `first`."""
        self.children = 0
        self.holds = 0
        """Full groups with references, children with pinned pages, and pins on its last page."""
        self.in_use = 0
        """Sliding slots with references."""
        self.pinned = 0
        """Leading pages that may not go: all with a hold, else up to the last sliding slot in
        use."""
        self.is_fresh = True
        """Neither released nor pinned since it was inserted."""
        self.matches = 0

    def __repr__(self) -> str:
        return f"run {b''.join(self.hashes[:1]).hex()[:8]}"

    @property
    def num_pages(self) -> int:
        return len(self.hashes)

    @property
    def end(self) -> int:
        return self.first + len(self.hashes)

    @property
    def is_evictable(self) -> bool:
        return not self.children and self.pinned < len(self.hashes)


class PageIndex:
    """Allocator and prefix index of the device tier. Calls that raise ValueError met a caller's
    bug."""

    def __init__(
        self,
        groups: Sequence[LayerGroup],
        num_pages: Sequence[int],
        page_tokens: int,
        *,
        reuse: bool = True,
        order: str = "lru",
        feed: bool = False,
        cp: int = 1,
    ) -> None:
        """`num_pages` by group, of all `cp` context-parallel ranks together, their null pages
        included. `reuse=False`: a mere allocator, nothing is cached. `order`: in which entries are
        evicted; sliding pages always go least recently used first. `feed`: record changes, which
        somebody has to take."""
        if (
            not groups
            or len(groups) != len(num_pages)
            or min(num_pages) < cp
            or any(count % cp for count in num_pages)
        ):
            raise ValueError(
                f"{len(groups)} layer groups with pools of {list(num_pages)} pages, cp {cp}"
            )
        self.groups = tuple(groups)
        self.page_tokens = page_tokens
        self.cp = cp
        self.reuse = reuse
        self.evictions = 0
        """Pages evicted, over all groups: for room, for a quota, or to clear a tenant."""
        self._num_pages = list(num_pages)
        self._sliding = [g for g, group in enumerate(groups) if group.kind == "sliding"]
        self._full = [g for g in range(len(groups)) if g not in self._sliding]
        # Without a full group no entry needs its parent: each is a run of its own, without links,
        # holds and order.
        self._linked = bool(self._full)
        self._order = make_order(
            order, min((num_pages[g] for g in self._full), default=cp) - cp, page_tokens
        )
        self._runs: dict[bytes, _Run] = {}
        """Each page's."""
        # Of slots that are in no run of a full group.
        self._references = [[0] * count for count in num_pages]
        self._owners: list[list[_Run | None]] = [[None] * count for count in num_pages]
        # By group and stripe, a stack; taken and put back in ascending runs, which transfers merge
        # into one descriptor.
        self._free = [
            [list(range(cp + stripe, count, cp)) for stripe in range(cp)] for count in num_pages
        ]
        self._num_used = [0] * len(groups)
        self._num_evictable = 0  # pages of runs beyond the pinned ones
        self._evictable = [0] * cp  # the same by stripe; not kept with one stripe
        # By group (empty for full ones) and stripe: cached slots that are not kept, next to be
        # evicted first.
        self._lru: list[list[OrderedDict[int, None]]] = [
            [OrderedDict() for _ in range(cp)] for _ in groups
        ]
        # By group (likewise): pins on a slot.
        self._kept: list[Counter[int]] = [Counter() for _ in groups]
        self._pins: list[tuple[float, int, _Run | None, list[list[int]]]] = []  # heap by end
        self._num_pins = 0
        self._now = 0
        self._tenant_pages: dict[str, int] = {}
        self._quotas: dict[str, int] = {}
        self._default_quota: int | None = None
        """Of every other tenant."""
        self._over: dict[str, None] = {}
        """Tenants with more pages than their quota."""
        self._changes: list[Change] | None = [] if feed else None
        self._removed: list[bytes] = []
        """After the last of `_changes`."""

    # --------------------------------------------------------------------------------- prefix reuse

    def match(self, hashes: Sequence[bytes]) -> int:
        """The most leading pages that can be used as they are; valid until the next allocate or
        clear, or insert where there are quotas."""
        runs = self._runs
        count = len(hashes)
        if self._linked and count and hashes[-1] not in runs:
            count = bisect.bisect_left(hashes, 1, key=lambda page_hash: page_hash not in runs)
        if not self._sliding:
            return count

        # resident[g] .. count - 1 are known to be resident; it only falls, so each page is seen
        # once.
        resident = [count] * len(self.groups)
        shrunk = True
        while shrunk:
            shrunk = False
            for g in self._sliding:
                first = min(resident[g], count)
                needed = self._first_needed(g, count)
                while first > needed:
                    run = runs.get(hashes[first - 1])
                    if run is None or run.slots[g][first - 1 - run.first] < 0:
                        # Every longer match that starts at or before this page needs it too.
                        count = first - 1
                        shrunk = True
                        break
                    first -= 1
                resident[g] = first
        return count

    def _first_needed(self, group: int, num_pages: int) -> int:
        """Of a match of so many pages, the first that is needed in this group."""
        return self.groups[group].first_needed_page(num_pages * self.page_tokens, self.page_tokens)

    def acquire(self, hashes: Sequence[bytes]) -> list[list[int]]:
        """Take a reference on each page of a match that is needed: by group, len(hashes) slots.

        -1 stands outside a sliding group's window. Raises ValueError, with nothing changed, when
        `hashes` are not a match.
        """
        taken, runs = self._find(hashes)
        runs = self._cut(runs, len(hashes))
        order = self._order
        self._now = now = self._now + 1
        for run in runs:
            run.matches += 1
            for g in self._full:
                self._add_references(run, g)
            order.hit(run, now)
        for g in self._sliding:
            self._use_sliding(g, taken[g])
        return taken

    def _find(self, hashes: Sequence[bytes]) -> tuple[list[list[int]], list[_Run]]:
        """(slots of a match by group, -1 outside windows; the runs they are in, when linked)."""
        count = len(hashes)
        runs: list[_Run] = []
        taken: list[list[int]] = [[] for _ in self.groups]
        page = 0
        while self._linked and page < count:
            run = self._runs.get(hashes[page])
            end = 0 if run is None else min(run.first + len(run.hashes), count)
            # The chain vouches for the pages between.
            if run is None or run.first != page or run.hashes[end - page - 1] != hashes[end - 1]:
                raise ValueError(f"page {page} is not resident in layer group {self._full[0]}")
            runs.append(run)
            for g in self._full:
                taken[g] += run.slots[g]
            page = end
        for g in self._full:
            del taken[g][count:]
        for g in self._sliding:
            first = self._first_needed(g, count)
            slots = [-1] * first
            for page in range(first, count):
                run = self._runs.get(hashes[page])
                slot = -1 if run is None else run.slots[g][page - run.first]
                if slot < 0:
                    raise ValueError(f"page {page} is not resident in layer group {g}")
                slots.append(slot)
            taken[g] = slots
        return taken, runs

    def resident(self, hashes: Sequence[bytes], first: int = 0) -> list[list[int]]:
        """Where pages hashes[first:] lie, up to the last one that has an entry: by group, equally
        many slots, -1 where a sliding page is not there. Takes no reference and changes nothing,
        use counts and order included; valid as long as a match."""
        found: list[list[int]] = [[] for _ in self.groups]
        count = len(hashes)
        while not self._linked and count > first and hashes[count - 1] not in self._runs:
            count -= 1
        page = first
        while page < count:
            run = self._runs.get(hashes[page])
            if run is None and self._linked:
                break
            if run is None:
                for slots in found:
                    slots.append(-1)
                page += 1
                continue
            place = page - run.first
            same = min(len(run.hashes) - place, count - page)
            if run.hashes[place + same - 1] != hashes[page + same - 1]:
                same = _common(run.hashes, place, hashes, page, same)
            for slots, of_run in zip(found, run.slots, strict=True):
                slots += of_run[place : place + same]
            page += same
        return found

    def _cut(self, runs: list[_Run], count: int) -> list[_Run]:
        """The runs of a match of `count` pages, the last one ending there."""
        if runs and runs[-1].end > count:
            runs[-1] = self._split(runs[-1], count - runs[-1].first)
        return runs

    def insert(
        self,
        parent: bytes,
        hashes: Sequence[bytes],
        slots: Sequence[Sequence[int]],
        first_page: int,
        tenant: str | None = None,
    ) -> None:
        """Make complete pages findable: page first_page + i, with hashes[i], lies in slots[g][i]
        (or -1). Those that are new are the tenant's.

        `parent` is the hash of page first_page - 1, or the namespace's root when `first_page` is 0.
        The caller holds a reference on each slot and keeps it. What the index already has stays: a
        slot given for the same page and group remains the caller's private copy, free once
        released. Where a full group gives -1 for a new page, or the parent is no longer in the
        index, the rest is not inserted, for no match could reach it.
        """
        if not self.reuse:
            return
        if not self._linked:
            self._insert_unlinked(parent, hashes, slots, first_page)
            return
        above = None
        if first_page:
            above = self._runs.get(parent)
            if above is None:
                return
            place = first_page - 1 - above.first
            if not 0 <= place < len(above.hashes) or above.hashes[place] != parent:
                raise ValueError(f"the parent is not page {first_page - 1} of its sequence")
        known = 0
        count = len(hashes)
        while known < count and (run := self._runs.get(hashes[known])) is not None:
            above, place = run, first_page + known - run.first
            if not 0 <= place < len(run.hashes) or run.hashes[place] != hashes[known]:
                raise ValueError(f"hash {known} is not page {first_page + known} of its sequence")
            same = min(len(run.hashes) - place, count - known)
            if run.hashes[place + same - 1] != hashes[known + same - 1]:
                same = _common(run.hashes, place, hashes, known, same)
            for g in self._sliding:
                for i in range(known, known + same):
                    if run.slots[g][first_page + i - run.first] < 0 <= slots[g][i]:
                        self._adopt(run, g, first_page + i - run.first, slots[g][i])
            known += same
        for g in self._full:
            if -1 in slots[g][known:count]:
                count = slots[g].index(-1, known)
        if known < count:
            given = [list(group_slots[known:count]) for group_slots in slots]
            self._check_insertable(given, first_page + known)
            new = list(hashes[known:count])
            self._insert_new(above, first_page + known, new, given, tenant)
            if self._changes is not None:
                self._note_stored(hashes[known - 1] if known else parent, new, first_page + known)
            if tenant is not None:
                self._count(tenant, len(new))
                self.keep_quota(tenant)

    def _insert_new(
        self,
        above: _Run | None,
        first: int,
        hashes: list[bytes],
        slots: list[list[int]],
        tenant: str | None,
    ) -> None:
        """Pages that are not in the index, under the page before `first` in `above`."""
        if above is not None and above.end > first:
            above = self._split(above, first - above.first)
        counts = [list(map(self._references[g].__getitem__, slots[g])) for g in self._full]
        begin = 0
        while begin < len(hashes):
            level, num_pages = self._order.admit(hashes, begin)
            for group_counts in counts:
                # Pages of a run have equally many references.
                if group_counts[begin : begin + num_pages].count(group_counts[begin]) < num_pages:
                    alike = itertools.takewhile(
                        group_counts[begin].__eq__, group_counts[begin : begin + num_pages]
                    )
                    num_pages = len(list(alike))
            references = [0] * len(self.groups)
            for g, group_counts in zip(self._full, counts, strict=True):
                references[g] = group_counts[begin]
            if above is not None and _can_grow(above, level, tenant, references):
                end = begin + min(num_pages, _MAX_RUN_PAGES - len(above.hashes))
                self._grow(above, hashes[begin:end], [part[begin:end] for part in slots])
            else:
                end = begin + min(num_pages, _MAX_RUN_PAGES)
                parts = [part[begin:end] for part in slots]
                run = _Run(
                    level, first + begin, hashes[begin:end], parts, references, above, tenant
                )
                self._add_run(run)
                above = run
            begin = end

    def _add_run(self, run: _Run) -> None:
        run.holds = len(self._full)
        run.pinned = len(run.hashes)
        if run.parent is not None:
            run.parent.children += 1
            self._hold(run.parent)
        self._own(run, run.hashes, run.slots)

    def _grow(self, run: _Run, hashes: list[bytes], slots: list[list[int]]) -> None:
        run.hashes += hashes
        run.pinned = len(run.hashes)
        for group_slots, more in zip(run.slots, slots, strict=True):
            group_slots += more
        self._own(run, hashes, slots)

    def _own(self, run: _Run, hashes: list[bytes], slots: list[list[int]]) -> None:
        runs = self._runs
        for page_hash in hashes:  # a third faster than dict.update
            runs[page_hash] = run
        for g in self._full:
            references, owners = self._references[g], self._owners[g]
            for slot in slots[g]:
                references[slot] = 0
                owners[slot] = run
        for g in self._sliding:
            for slot in slots[g]:
                if slot >= 0:
                    self._owners[g][slot] = run
                    run.in_use += 1
        self._order.add(run, hashes, self._now)

    def _insert_unlinked(
        self,
        parent: bytes,
        hashes: Sequence[bytes],
        slots: Sequence[Sequence[int]],
        first_page: int,
    ) -> None:
        for i, page_hash in enumerate(hashes):
            run = self._runs.get(page_hash)
            given = [[group_slots[i]] for group_slots in slots]
            if run is not None:
                for g, (slot,) in enumerate(given):
                    if run.slots[g][0] < 0 <= slot:
                        self._adopt(run, g, 0, slot)
            elif max(given) > [-1]:
                self._check_insertable(given, first_page + i)
                run = _Run(0, first_page + i, [page_hash], given, [0] * len(given), None)
                self._runs[page_hash] = run
                for g, (slot,) in enumerate(given):
                    if slot >= 0:
                        self._owners[g][slot] = run
                        run.in_use += 1
                if self._changes is not None:
                    above = hashes[i - 1] if i else parent
                    self._note_stored(above, [page_hash], first_page + i)

    def _adopt(self, run: _Run, group: int, place: int, slot: int) -> None:
        """Fill a sliding page's tombstone."""
        given = [[slot] if g == group else [] for g in range(len(self.groups))]
        self._check_insertable(given, run.first + place)
        self._owners[group][slot] = run
        run.slots[group][place] = slot
        run.in_use += 1
        if self._linked:
            self._hold_up_to(run, place)

    def _check_insertable(self, slots: list[list[int]], first_page: int) -> None:
        cp = self.cp
        for g, group_slots in enumerate(slots):
            if cp > 1 and any(
                slot >= 0 and (slot - page) % cp
                for page, slot in enumerate(group_slots, first_page)
            ):
                raise ValueError(
                    f"layer group {g}: slots {group_slots} from page {first_page} on are not of "
                    f"their pages' stripes, cp {cp}"
                )
            if g in self._sliding:
                group_slots = [slot for slot in group_slots if slot >= 0]
                if any(self._owners[g][slot] is not None for slot in group_slots):
                    raise ValueError(f"layer group {g}: a slot of {group_slots} holds another page")
            # In full groups, slots that hold a page do not count their references themselves.
            if group_slots and min(map(self._references[g].__getitem__, group_slots)) < 1:
                raise ValueError(
                    f"layer group {g}: a slot of {group_slots} is unused or holds another page"
                )
            if len(set(group_slots)) < len(group_slots):
                raise ValueError(f"layer group {g}: two pages in one slot")

    def clear(self, tenant: str | None = None) -> None:
        """Empty the index: cached pages become free, used ones will when they are released. Pins
        end.

        Of one tenant, only entries go that nothing keeps: no page of theirs or of what continues
        them is used or pinned, and nobody else's entry continues them. The others stay, its own.
        """
        if tenant is not None:
            runs = {run: None for run in self._runs.values() if run.owner == tenant}
            for run in sorted(runs, key=lambda run: run.first, reverse=True):
                if run.is_evictable:
                    self._order.withdraw(run)
                    self._evict_end(run, len(run.hashes))
            return
        for run in dict.fromkeys(self._runs.values()):
            for g, slots in enumerate(run.slots):
                for slot in slots:
                    if slot >= 0:
                        self._owners[g][slot] = None
                        self._references[g][slot] += run.references[g]
                        if not self._references[g][slot]:
                            self._free[g][slot % self.cp].append(slot)
        self._runs.clear()
        self._order.clear()
        self._num_evictable = 0
        self._evictable = [0] * self.cp
        self._pins.clear()
        for g in self._sliding:
            for line in self._lru[g]:
                line.clear()
            self._kept[g].clear()
        self._tenant_pages.clear()
        self._over.clear()
        if self._changes is not None:
            self._flush_removed(self._changes)
            self._changes.append(Cleared())

    def pin(self, hashes: Sequence[bytes], until: float) -> None:
        """Keep a match's pages from eviction until `expire` is called with a time of `until` or
        later. Takes no reference: the pages are cached, and can be matched. Raises ValueError,
        with nothing changed, when `hashes` are not a match.

        Pinned pages are not there for `allocate`; how much of the pool they may take is the
        caller's to decide. A pin cannot be taken back but by `clear`.
        """
        kept, runs = self._find(hashes)
        runs = self._cut(runs, len(hashes))
        for g in self._sliding:
            kept[g] = kept[g][self._first_needed(g, len(hashes)) :]
            self._kept[g].update(kept[g])
            for slot in kept[g]:
                self._lru[g][slot % self.cp].pop(slot, None)
        for g in self._full:
            kept[g] = []
        last = runs[-1] if runs else None
        if last is not None:
            last.is_fresh = False
            self._hold(last)
        self._num_pins += 1
        heapq.heappush(self._pins, (until, self._num_pins, last, kept))

    def expire(self, now: float) -> int:
        """End the pins whose time has come, in the clock of their `until`; how many."""
        ended = 0
        while self._pins and self._pins[0][0] <= now:
            _, _, run, kept = heapq.heappop(self._pins)
            ended += 1
            for g in self._sliding:
                for slot in kept[g]:
                    self._kept[g][slot] -= 1
                    if not self._kept[g][slot]:
                        del self._kept[g][slot]
                        if not self._references[g][slot]:
                            self._lru[g][slot % self.cp][slot] = None
            if run is not None:
                run.holds -= 1
                self._settle(run)
        return ended

    # ----------------------------------------------------------------------------------------- runs

    def _split(self, run: _Run, count: int) -> _Run:
        """Make the first `count` pages of a run a new one, and return it. `run` keeps the rest, its
        children, its place among the leaves and its pins."""
        head = _Run(
            run.level,
            run.first,
            run.hashes[:count],
            [slots[:count] for slots in run.slots],
            list(run.references),
            run.parent,
            run.owner,
        )
        head.is_fresh = run.is_fresh
        head.matches = run.matches
        head.children = 1
        del run.hashes[:count]
        for slots in run.slots:
            del slots[:count]
        run.first += count
        run.parent = head
        for g, slots in enumerate(head.slots):
            owners = self._owners[g]
            for slot in slots:
                if slot >= 0:
                    owners[slot] = head
        for g in self._sliding:
            head.in_use += sum(
                slot >= 0 and self._references[g][slot] > 0 for slot in head.slots[g]
            )
        run.in_use -= head.in_use
        head.pinned = min(run.pinned, count)
        run.pinned -= head.pinned
        head.holds = sum(n > 0 for n in head.references) + (run.pinned > 0)
        for page_hash in head.hashes:
            self._runs[page_hash] = head
        self._order.split(head, run)
        return head

    def _part(self, run: _Run, group: int, slots: list[int], begin: int) -> _Run:
        """The run of exactly the pages in slots[begin:] that `run` goes on with. Full groups."""
        pages = run.slots[group]
        place = 0 if pages[0] == slots[begin] else pages.index(slots[begin])
        count = len(pages) - place
        if slots[begin : begin + count] != (pages[place:] if place else pages):
            count = _common(pages, place, slots, begin, min(count, len(slots) - begin))
        if place:
            self._split(run, place)
        return self._split(run, count) if count < len(run.hashes) else run

    def _hold(self, run: _Run) -> None:
        """One more reason to keep all pages; the first pinned page is a reason to keep the
        parent."""
        run.holds += 1
        while run.pinned < len(run.hashes):
            self._num_evictable -= len(run.hashes) - run.pinned
            if self.cp > 1:
                self._count_evictable(run, run.pinned, len(run.hashes), -1)
            was_pinned = run.pinned > 0
            run.pinned = len(run.hashes)
            if was_pinned or run.parent is None:
                return
            run = run.parent
            run.holds += 1

    def _hold_up_to(self, run: _Run, place: int) -> None:
        """The sliding slot of a page is in use now."""
        if place < run.pinned:
            return
        self._num_evictable -= place + 1 - run.pinned
        if self.cp > 1:
            self._count_evictable(run, run.pinned, place + 1, -1)
        was_pinned = run.pinned > 0
        run.pinned = place + 1
        if not was_pinned and run.parent is not None:
            self._hold(run.parent)

    def _settle(self, run: _Run) -> None:
        """After a reason to keep pages went: what may be evicted now."""
        while not run.holds:
            pinned = self._last_in_use(run) if run.in_use else 0
            was_pinned = run.pinned > 0
            self._num_evictable += run.pinned - pinned
            if self.cp > 1:
                self._count_evictable(run, pinned, run.pinned, 1)
            run.pinned = pinned
            if not run.ticket and run.is_evictable:
                self._order.offer(run)
            if pinned or not was_pinned or run.parent is None:
                return
            run = run.parent
            run.holds -= 1

    def _count_evictable(self, run: _Run, begin: int, end: int, sign: int) -> None:
        """Pages of a run, from place `begin` to before `end`, by stripe."""
        pages = _by_stripe(run.first + begin, end - begin, self.cp)
        for stripe, count in enumerate(pages):
            self._evictable[stripe] += sign * count

    def _last_in_use(self, run: _Run) -> int:
        """Pages up to the last one of which a sliding slot is in use."""
        for place in range(len(run.hashes), 0, -1):
            for g in self._sliding:
                slot = run.slots[g][place - 1]
                if slot >= 0 and self._references[g][slot]:
                    return place
        raise AssertionError("no sliding slot is in use")

    # ----------------------------------------------------------------------------------- references

    def allocate(self, group: int, count: int, first_page: int = 0) -> list[int] | None:
        """Slots for the pages `first_page`, `first_page + 1`, ... of a sequence, `count` in all,
        with one reference each, evicting where needed; None, nothing changed, if too many."""
        if self.cp > 1:
            return self._allocate_striped(group, count, first_page)
        free = self._free[group][0]
        if count > len(free):
            if count > self._num_available(group):
                return None
            if group in self._sliding:
                self._evict_pages(group, 0, count - len(free))
            else:
                self._evict_entries([count - len(free)])
        if not count:
            return []
        slots = free[-count:]
        del free[-count:]
        references = self._references[group]
        for slot in slots:
            references[slot] = 1
        self._num_used[group] += count
        return slots

    def _allocate_striped(self, group: int, count: int, first_page: int) -> list[int] | None:
        cp, free = self.cp, self._free[group]
        wanted = _by_stripe(first_page, count, cp)
        if not self._has_room(group, wanted):
            return None
        lacking = [need - len(stack) for need, stack in zip(wanted, free, strict=True)]
        if group not in self._sliding:
            self._evict_entries(lacking)
        else:
            for stripe, missing in enumerate(lacking):
                self._evict_pages(group, stripe, missing)
        slots = [0] * count
        for page in range(first_page, first_page + min(count, cp)):
            stack, need = free[page % cp], wanted[page % cp]
            slots[page - first_page :: cp] = stack[-need:]
            del stack[-need:]
        references = self._references[group]
        for slot in slots:
            references[slot] = 1
        self._num_used[group] += count
        return slots

    def can_allocate(
        self,
        counts: Sequence[int],
        first_pages: Sequence[int] | None = None,
        spare: Sequence[int] = (),
    ) -> bool:
        """Whether `allocate` of counts[g] pages from first_pages[g] on (None: from page 0) in every
        group g, in any order, would succeed, and of one more in each group for each page number in
        `spare`. Exact."""
        if self.cp == 1:
            more = len(spare)
            return all(count + more <= self._num_available(g) for g, count in enumerate(counts))
        more_by_stripe = [0] * self.cp
        for page in spare:
            more_by_stripe[page % self.cp] += 1
        for g, count in enumerate(counts):
            wanted = _by_stripe(first_pages[g] if first_pages else 0, count, self.cp)
            if not self._has_room(g, list(map(int.__add__, wanted, more_by_stripe))):
                return False
        return True

    def _has_room(self, group: int, wanted: Sequence[int]) -> bool:
        """Whether so many slots of each stripe are free or can be."""
        lines = self._lru[group]
        evictable = map(len, lines) if group in self._sliding else self._evictable
        free = map(len, self._free[group])
        return all(map(int.__ge__, map(int.__add__, free, evictable), wanted))

    def retain(self, group: int, slots: Sequence[int]) -> None:
        """One more reference on each slot; -1 is ignored. Raises ValueError, with nothing changed,
        if one is free."""
        slots = [slot for slot in slots if slot >= 0]
        references, owners = self._references[group], self._owners[group]
        for slot in slots:
            if not references[slot] and owners[slot] is None:
                raise ValueError(
                    f"slot {slot} of layer group {group} is free and cannot be retained"
                )
        if group in self._sliding:
            self._use_sliding(group, slots)
            return
        i = 0
        while i < len(slots):
            run = owners[slots[i]]
            if run is None:
                references[slots[i]] += 1
                i += 1
            else:
                run = self._part(run, group, slots, i)
                self._add_references(run, group)
                i += len(run.hashes)

    def _add_references(self, run: _Run, group: int) -> None:
        """One more on each page of a run, in a full group."""
        run.references[group] += 1
        if run.references[group] == 1:
            self._num_used[group] += len(run.hashes)
            self._hold(run)

    def _use_sliding(self, group: int, slots: Sequence[int]) -> None:
        references, owners, lines = self._references[group], self._owners[group], self._lru[group]
        cp = self.cp
        revived = place = 0
        previous = None
        for slot in slots:
            if slot < 0:
                continue
            references[slot] += 1
            if references[slot] > 1:
                continue
            revived += 1
            lines[slot % cp].pop(slot, None)
            run = owners[slot]
            assert run is not None
            run.in_use += 1
            if self._linked and run.pinned < len(run.hashes):
                pages = run.slots[group]
                place += 1
                if run is not previous or place >= len(pages) or pages[place] != slot:
                    place = pages.index(slot)
                previous = run
                self._hold_up_to(run, place)
        self._num_used[group] += revived

    def release(
        self, group: int, slots: Sequence[int], cold: bool = False, is_use: bool = True
    ) -> None:
        """Drop one reference on each slot; -1 is ignored. At 0 an indexed slot is cached, another
        one free.

        `cold` is for sliding pages that have left the window: they are evicted before all others.
        `is_use=False`, in full groups: the pages were held for no request, and were last used when
        they were before.
        Raises ValueError at a slot that has no reference, with those before it released.
        """
        self._now += 1
        if group in self._sliding:
            self._release_sliding(group, slots, cold)
            return
        if not isinstance(slots, list):
            slots = list(slots)
        owners = self._owners[group]
        i = 0
        while i < len(slots):
            slot = slots[i]
            run = owners[slot] if slot >= 0 else None
            if run is not None:
                if not run.references[group]:
                    raise ValueError(_unreferenced(group, slot))
                run = self._part(run, group, slots, i)
                i += len(run.hashes)
                if is_use:
                    self._order.release(run, self._now)
                self._drop_references(run, group)
                continue
            i += 1
            if slot >= 0 and self._drop_reference(group, slot):
                self._free[group][slot % self.cp].append(slot)

    def _drop_references(self, run: _Run, group: int) -> None:
        """One on each page of a run, in a full group."""
        run.references[group] -= 1
        if run.references[group]:
            return
        self._num_used[group] -= len(run.hashes)
        run.is_fresh = False
        run.holds -= 1
        if not run.holds:
            self._settle(run)

    def _drop_reference(self, group: int, slot: int) -> bool:
        """On a slot that counts its own; whether it was the last."""
        references = self._references[group]
        if references[slot] < 1:
            raise ValueError(_unreferenced(group, slot))
        references[slot] -= 1
        if references[slot]:
            return False
        self._num_used[group] -= 1
        return True

    def _release_sliding(self, group: int, slots: Sequence[int], cold: bool) -> None:
        owners, lines, kept = self._owners[group], self._lru[group], self._kept[group]
        cp = self.cp
        released: dict[_Run, None] = {}
        try:
            for slot in slots:
                if slot < 0 or not self._drop_reference(group, slot):
                    continue
                run = owners[slot]
                if run is None:
                    self._free[group][slot % cp].append(slot)
                    continue
                run.in_use -= 1
                released[run] = None
                if slot not in kept:
                    line = lines[slot % cp]
                    line[slot] = None
                    if cold:
                        line.move_to_end(slot, last=False)
        finally:
            if self._linked:
                for run in released:
                    self._settle(run)

    # ------------------------------------------------------------------------------------- eviction

    def _num_available(self, group: int) -> int:
        """Free and evictable, with one stripe. Pages beyond the pinned ones have only such
        descendants, so all can go, leaves first; what one group evicts never lowers this for
        another. The same holds for each of several stripes."""
        free = len(self._free[group][0])
        if group in self._sliding:
            return free + len(self._lru[group][0])
        return free + self._num_evictable

    def _evict_entries(self, lacking: list[int]) -> None:
        """Evict entries, all groups of them, until so many of each stripe have gone: what tenants
        have beyond their quotas, then the order's choice among leaves. There are as many."""
        if self._over:
            for tenant in list(self._over):
                self._evict_tenant(tenant, lacking)
        order = self._order
        if self.cp == 1:
            (count,) = lacking
            while count:
                run = order.take()
                assert isinstance(run, _Run), "nothing evictable was offered"
                count -= self._evict_end(run, count)
            return
        while max(lacking) > 0:
            run = order.take()
            assert isinstance(run, _Run), "nothing evictable was offered"
            self._evict_from(run, lacking, len(run.hashes))

    def _evict_tenant(self, tenant: str, lacking: list[int], coming: int = 0) -> None:
        """The same, of what a tenant has beyond its quota, or would have with so many more entries,
        as far as that goes."""
        quota = self.quota(tenant)
        most = self._tenant_pages.get(tenant, 0) + coming - quota if quota is not None else 0
        while most > 0 and max(lacking) > 0 and (run := self._order.take(tenant)) is not None:
            assert isinstance(run, _Run)
            most -= self._evict_from(run, lacking, most)

    def _evict_from(self, run: _Run, lacking: list[int], most: int) -> int:
        """Evict the last pages of an evictable run that is not offered, up to `most`, until nothing
        is lacking; how many."""
        cp = self.cp
        if cp == 1:
            num_gone = self._evict_end(run, min(most, lacking[0]))
            lacking[0] -= num_gone
            return num_gone
        end = run.end
        # The k-th last page of a stripe is so many from the end.
        count = max(
            (end - 1 - stripe) % cp + 1 + (k - 1) * cp for stripe, k in enumerate(lacking) if k > 0
        )
        num_gone = self._evict_end(run, min(most, count))
        for stripe, gone in enumerate(_by_stripe(end - num_gone, num_gone, cp)):
            lacking[stripe] -= gone
        return num_gone

    def _evict_end(self, run: _Run, count: int) -> int:
        """Evict up to `count` pages of an evictable run that is not offered; how many."""
        first = max(run.pinned, len(run.hashes) - count)
        gone = run.hashes[first:]
        self._num_evictable -= len(gone)
        cp = self.cp
        if cp > 1:
            self._count_evictable(run, first, first + len(gone), -1)
        del run.hashes[first:]
        runs = self._runs
        for page_hash in gone:
            del runs[page_hash]
        for g, slots in enumerate(run.slots):
            cut = slots[first:]
            del slots[first:]
            if g in self._sliding:
                cut = [slot for slot in cut if slot >= 0]
                for slot in cut:
                    del self._lru[g][slot % cp][slot]
            owners = self._owners[g]
            for slot in cut:
                owners[slot] = None
            if cp == 1:
                self._free[g][0] += cut
            elif g in self._sliding:
                for slot in cut:
                    self._free[g][slot % cp].append(slot)
            else:
                for place in range(min(cp, len(cut))):
                    self._free[g][cut[place] % cp] += cut[place::cp]
            self.evictions += len(cut)
        if run.owner is not None:
            self._count(run.owner, -len(gone))
        if self._changes is not None:
            self._removed += gone
        self._order.remove(run, gone)
        if run.hashes:
            if run.is_evictable:
                self._order.offer(run)
        elif run.parent is not None:
            parent = run.parent
            parent.children -= 1
            if not parent.ticket and parent.is_evictable:
                self._order.offer(parent)
        return len(gone)

    def _evict_pages(self, group: int, stripe: int, count: int) -> None:
        """Evict the first sliding pages in line, which leaves tombstones. There are as many."""
        line, free = self._lru[group][stripe], self._free[group][stripe]
        for _ in range(count):
            slot, _ = line.popitem(last=False)
            self.evictions += 1
            run = self._owners[group][slot]
            assert run is not None
            run.slots[group][run.slots[group].index(slot)] = -1
            self._owners[group][slot] = None
            free.append(slot)
            if not self._linked and max(run.slots) < [0]:
                del self._runs[run.hashes[0]]
                if self._changes is not None:
                    self._removed += run.hashes

    # ---------------------------------------------------------------------------- tenants and feed

    def set_quota(self, tenant: str | None, pages: int | None) -> None:
        """The most entries a tenant may have, None for any number; `tenant` None: each that has no
        quota of its own. What it has beyond goes when it next inserts, or when room is needed."""
        if pages is not None and (pages < 0 or not self._linked):
            raise ValueError(
                f"a quota of {pages} pages"
                + ("" if self._linked else ": without a full-attention group there are no tenants")
            )
        if tenant is None:
            self._default_quota = pages
        elif pages is None:
            self._quotas.pop(tenant, None)
        else:
            self._quotas[tenant] = pages
        for name in list(self._tenant_pages) if tenant is None else [tenant]:
            self._count(name, 0)

    def quota(self, tenant: str) -> int | None:
        return self._quotas.get(tenant, self._default_quota)

    def keep_quota(self, tenant: str, coming: int = 0) -> None:
        """Evict what a tenant has beyond its quota, or would have with so many more entries; what
        is used or pinned stays."""
        if coming or tenant in self._over:
            self._evict_tenant(tenant, [len(self._runs)] * self.cp, coming)

    def tenant_of(self, page_hash: bytes) -> str | None:
        """Whose entry it is; None: nobody's, or there is none."""
        run = self._runs.get(page_hash)
        return run.owner if run is not None else None

    def tenant_pages(self) -> dict[str, int]:
        """Entries of each tenant that has some."""
        return dict(self._tenant_pages)

    def _count(self, tenant: str, change: int) -> None:
        pages = self._tenant_pages.pop(tenant, 0) + change
        if pages:
            self._tenant_pages[tenant] = pages
        quota = self.quota(tenant)
        if quota is not None and pages > quota:
            self._over[tenant] = None
        else:
            self._over.pop(tenant, None)

    def top_prefixes(self, count: int) -> list[TopPrefix]:
        """The runs from which most pages were reused, then the longest ones. Looks at all; no
        matches are counted without a full-attention group."""
        runs = heapq.nlargest(
            count,
            dict.fromkeys(self._runs.values()),
            key=lambda run: (run.matches * len(run.hashes), len(run.hashes)),
        )
        return [
            TopPrefix(run.hashes[-1], run.first, len(run.hashes), run.matches, run.owner)
            for run in runs
        ]

    def take_changes(self) -> list[Change]:
        """What entered and left the index since the last call, in order; applied in order to a set
        of hashes, it is the index. Empty without `feed`."""
        if self._changes is None:
            return []
        changes = self._changes
        self._flush_removed(changes)
        self._changes = []
        return changes

    def _note_stored(self, parent: bytes, hashes: Sequence[bytes], first_page: int) -> None:
        assert self._changes is not None
        self._flush_removed(self._changes)
        self._changes.append(Stored(parent, tuple(hashes), first_page))

    def _flush_removed(self, changes: list[Change]) -> None:
        if self._removed:
            changes.append(Removed(tuple(self._removed)))
            self._removed = []

    def next_evicted(self, count: int) -> list[bytes]:
        """The last page of each leaf that is next to be evicted, of leaves with about `count` pages
        that may go in all. Changes nothing but, with some orders, who is next. Linked indexes
        only."""
        runs: list[_Run] = []
        while count > 0 and (run := self._order.peek()) is not None:
            assert isinstance(run, _Run)
            runs.append(run)
            count -= len(run.hashes) - run.pinned
        for run in runs:
            self._order.offer(run)
        return [run.hashes[-1] for run in runs]

    def chain(self, last: bytes) -> list[bytes]:
        """The hashes of a sequence from page 0 to the end of the leaf that ends in this page."""
        parts: list[list[bytes]] = []
        run: _Run | None = self._runs[last]
        while run is not None:
            parts.append(run.hashes)
            run = run.parent
        return [page_hash for part in reversed(parts) for page_hash in part]

    # ------------------------------------------------------------------------------------- counters

    def references(self, group: int) -> dict[int, int]:
        """Slots in use and the references on each, for checks."""
        owners = self._owners[group]
        found = {}
        for slot, own in enumerate(self._references[group]):
            run = owners[slot]
            if count := own + (run.references[group] if run is not None else 0):
                found[slot] = count
        return found

    def num_free(self, group: int) -> int:
        return sum(map(len, self._free[group]))

    def num_used(self, group: int) -> int:
        return self._num_used[group]

    def num_cached(self, group: int) -> int:
        """In the index without a reference. In a full group not all of them need be evictable at
        once: a page stays while one that continues it is used, or it is pinned."""
        return self._num_pages[group] - self.cp - self.num_free(group) - self._num_used[group]

    def check_integrity(self) -> None:
        """Recompute all state from the entries and references. Raises AssertionError. Takes
        milliseconds."""
        runs = list(dict.fromkeys(self._runs.values()))
        assert sum(len(run.hashes) for run in runs) == len(self._runs), "a page is in no run"
        for run in runs:
            self._check_run(run)
        for g in range(len(self.groups)):
            self._check_pool(g)
        if self._linked:
            self._check_holds(runs)
            self._check_leaves(runs)
        self._check_tenants(runs)

    def _check_run(self, run: _Run) -> None:
        count = len(run.hashes)
        assert 0 < count <= _MAX_RUN_PAGES, f"{run} has {count} pages"
        for page_hash in run.hashes:
            assert self._runs.get(page_hash) is run, f"{run}: {page_hash.hex()[:8]} is another's"
        assert len(run.slots) == len(run.references) == len(self.groups), f"{run} lacks a group"
        for g, slots in enumerate(run.slots):
            assert len(slots) == count, f"{run} has {len(slots)} slots in group {g}"
            if g in self._full:
                assert min(slots) >= self.cp, f"{run} lacks pages in full group {g}"
                assert run.references[g] >= 0, f"{run}: {run.references[g]} references"
            else:
                assert not run.references[g], f"{run} counts references in sliding group {g}"
            for page, slot in enumerate(slots, run.first):
                if slot >= 0:
                    assert self._owners[g][slot] is run, f"slot {slot} of group {g} is not {run}'s"
                    assert (slot - page) % self.cp == 0, f"page {page} in slot {slot} of group {g}"
        if not self._linked:
            assert count == 1, f"{run} has several pages"
            assert max(run.slots) > [0], f"{run} has no page in any layer group"
        if run.parent is not None:
            parent = run.parent
            assert self._runs.get(parent.hashes[-1]) is parent, f"{run} outlived its parent"
            assert parent.end == run.first, f"{run} does not follow its parent"
        else:
            assert not self._linked or run.first == 0, f"{run} has no parent"

    def _check_pool(self, g: int) -> None:
        free = {slot for stack in self._free[g] for slot in stack}
        assert len(free) == self.num_free(g), f"group {g}: a slot is free twice"
        for stripe, (stack, line) in enumerate(zip(self._free[g], self._lru[g], strict=True)):
            strangers = [slot for slot in (*stack, *line) if slot % self.cp != stripe]
            assert not strangers, f"group {g}: {strangers} are not of stripe {stripe}"
        used: set[int] = set()
        cached: set[int] = set()
        pool = zip(self._references[g], self._owners[g], strict=True)
        for slot, (count, owner) in enumerate(pool):
            assert count >= 0, f"slot {g}/{slot}: negative references"
            if owner is not None:
                assert slot in owner.slots[g], f"slot {g}/{slot}: not its owner's"
                assert self._runs.get(owner.hashes[0]) is owner, f"slot {g}/{slot}: owner is gone"
                assert not count or g in self._sliding, f"slot {g}/{slot}: counts for itself"
                (used if count or owner.references[g] else cached).add(slot)
            elif count:
                used.add(slot)
            else:
                assert (slot in free) == (slot >= self.cp), (
                    f"slot {g}/{slot}: leaked, or a free null page"
                )
        assert min(used | cached, default=self.cp) >= self.cp, f"group {g}: a null page is in use"
        assert not free & (used | cached), (
            f"group {g}: free slots {free & (used | cached)} have owners"
        )
        assert len(used) == self._num_used[g], (
            f"group {g}: {len(used)} used, counted {self._num_used[g]}"
        )
        assert len(cached) == self.num_cached(g), f"group {g}: {len(cached)} cached, not as counted"
        kept = Counter(slot for _, _, _, kept in self._pins for slot in kept[g])
        assert kept == self._kept[g], f"group {g}: kept slots are not those of pins"
        assert kept.keys() <= used | cached, f"group {g}: a kept slot is free"
        if g in self._sliding:
            in_line = {slot for line in self._lru[g] for slot in line}
            assert in_line == cached - kept.keys(), f"group {g}: cached slots are not those in line"
        else:
            assert not any(self._lru[g]), f"full group {g} has an eviction line"

    def _check_holds(self, runs: list[_Run]) -> None:
        holds = Counter(run for _, _, run, _ in self._pins if run is not None)
        children: Counter[_Run] = Counter()
        evictable = [0] * self.cp
        for run in sorted(runs, key=lambda run: run.first, reverse=True):  # children first
            used = [
                place
                for g in self._sliding
                for place, slot in enumerate(run.slots[g])
                if slot >= 0 and self._references[g][slot]
            ]
            assert run.in_use == len(used), f"{run}: {run.in_use} sliding slots used"
            holds[run] += sum(count > 0 for count in run.references)
            assert run.holds == holds[run], f"{run}: {run.holds} holds, not {holds[run]}"
            pinned = len(run.hashes) if holds[run] else max(used, default=-1) + 1
            assert run.pinned == pinned, f"{run}: {run.pinned} pages pinned, not {pinned}"
            assert run.children == children[run], f"{run}: children not {children[run]}"
            for page in range(run.first + pinned, run.end):
                evictable[page % self.cp] += 1
            if run.parent is not None:
                children[run.parent] += 1
                holds[run.parent] += pinned > 0
        counted = self._evictable if self.cp > 1 else [self._num_evictable]
        assert evictable == counted, f"{evictable} evictable, not {counted}"
        assert sum(evictable) == self._num_evictable

    def _check_leaves(self, runs: list[_Run]) -> None:
        for run in runs:
            assert run.ticket or not run.is_evictable, f"{run}: an evictable leaf is not offered"
        self._order.check_integrity(runs)

    def _check_tenants(self, runs: list[_Run]) -> None:
        pages: dict[str, int] = {}
        for run in runs:
            if run.owner is not None:
                pages[run.owner] = pages.get(run.owner, 0) + len(run.hashes)
        assert pages == self._tenant_pages, f"tenants have {pages} pages, not as counted"
        quotas = {tenant: self.quota(tenant) for tenant in pages}
        over = {name for name, quota in quotas.items() if quota is not None and pages[name] > quota}
        assert over == self._over.keys(), f"{over} are over their quotas, not {set(self._over)}"


def _can_grow(run: _Run, level: int, tenant: str | None, references: list[int]) -> bool:
    """Whether new pages after its last one would have its history."""
    return (
        run.is_fresh
        and not run.matches
        and not run.children
        and run.level == level
        and run.owner == tenant
        and run.references == references
        and len(run.hashes) < _MAX_RUN_PAGES
    )


def _common(one: Sequence[object], begin: int, other: Sequence[object], at: int, most: int) -> int:
    """How many items, up to `most`, are equal from one[begin] and other[at] on."""
    count = 0
    while count < most and one[begin + count] == other[at + count]:
        count += 1
    return count


def _by_stripe(first_page: int, count: int, cp: int) -> list[int]:
    """How many of `count` pages from `first_page` on each stripe has."""
    return [(count - 1 - (stripe - first_page) % cp) // cp + 1 for stripe in range(cp)]


def _unreferenced(group: int, slot: int) -> str:
    return f"slot {slot} of layer group {group} has no reference to release"
