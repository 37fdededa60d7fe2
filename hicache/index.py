"""The page index of one replica: who uses which page of device memory, and whose content can be
used again.

Pure: no torch, no clock; time is a counter of calls. It does not know requests, only references.
Each layer group has a pool of slots; slot 0 is the null page and never handed out. A slot is
  free    nobody's,
  used    references > 0: its holders' until each has released it; perhaps in the index as well,
  cached  in the index with no reference: it can be matched again, or evicted when room is needed.

An entry of the index is one page of one sequence, found by its hash, with one slot per layer group.
Its full-attention groups are resident together and only while its parent's are, so that a prefix
match is a walk from the first page. A sliding-window group may lack pages (-1, a tombstone); a
match only needs those that the next token attends to. Hence two kinds of eviction: a sliding page
goes alone, least recently used first; an entry goes whole, when no page of it or of its descendants
is used, leaves first. A page was last used when its last reference was released.

The caller promises that a page is complete before it is inserted and that no operation on it is in
flight when its last reference is released. Host and storage tiers will add slots to the same
entries.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

from transfer.layout import LayerGroup


class _Entry:
    __slots__ = ("children", "hash", "last_use", "parent", "pins", "queued", "slots")

    def __init__(self, page_hash: bytes, parent: _Entry | None, slots: list[int]) -> None:
        self.hash = page_hash
        self.parent = parent
        self.slots = slots
        """By layer group; -1 is a tombstone."""
        self.children = 0
        self.pins = 0
        """Own slots in use, plus children with pins: the entry is evictable, in its turn, at 0."""
        self.last_use = 0
        self.queued = False
        """In the heap of leaves, at most once, under a key that may be older than `last_use`."""


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
    ) -> None:
        """`num_pages` by group, slot 0 included. `reuse=False`: a mere allocator, nothing is
        cached."""
        if not groups or len(groups) != len(num_pages) or min(num_pages) < 1:
            raise ValueError(f"{len(groups)} layer groups with pools of {list(num_pages)} pages")
        self.groups = tuple(groups)
        self.page_tokens = page_tokens
        self.reuse = reuse
        self.evictions = 0
        """Pages evicted to make room, over all groups."""
        self._num_pages = list(num_pages)
        self._full = [g for g, group in enumerate(groups) if group.kind == "full"]
        self._sliding = [g for g, group in enumerate(groups) if group.kind == "sliding"]
        # Without a full group no entry needs its parent: parents, children and pins stay unset.
        self._linked = bool(self._full)
        self._entries: dict[bytes, _Entry] = {}
        self._references = [[0] * count for count in num_pages]
        self._owners: list[list[_Entry | None]] = [[None] * count for count in num_pages]
        # A stack; taken and put back in ascending runs, which transfers merge into one descriptor.
        self._free = [list(range(1, count)) for count in num_pages]
        self._num_used = [0] * len(groups)
        self._num_evictable = 0  # entries without pins
        self._leaves: list[
            tuple[int, int, _Entry]
        ] = []  # heap of (last use or earlier, tie, entry)
        self._tie = 0
        # By group (empty for full ones): cached slots, next to be evicted first.
        self._lru: list[OrderedDict[int, None]] = [OrderedDict() for _ in groups]
        self._now = 0

    # --------------------------------------------------------------------------------- prefix reuse

    def match(self, hashes: Sequence[bytes]) -> int:
        """The most leading pages that can be used as they are; valid until the next allocate or
        clear."""
        entries = self._entries
        count = 0 if self._linked else len(hashes)
        if self._linked:
            for page_hash in hashes:
                if page_hash not in entries:
                    break
                count += 1
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
                needed = self.groups[g].first_needed_page(
                    count * self.page_tokens, self.page_tokens
                )
                while first > needed:
                    entry = entries.get(hashes[first - 1])
                    if entry is None or entry.slots[g] < 0:
                        # Every longer match that starts at or before this page needs it too.
                        count = first - 1
                        shrunk = True
                        break
                    first -= 1
                resident[g] = first
        return count

    def acquire(self, hashes: Sequence[bytes]) -> list[list[int]]:
        """Take a reference on each page of a match that is needed: by group, len(hashes) slots.

        -1 stands outside a sliding group's window. Raises ValueError, with nothing changed, when
        `hashes` are not a match.
        """
        count = len(hashes)
        entries = list(map(self._entries.get, hashes))
        position = count * self.page_tokens
        firsts = [group.first_needed_page(position, self.page_tokens) for group in self.groups]
        taken: list[list[int]] = []
        for g, first in enumerate(firsts):
            slots = [-1] * first
            for entry in entries[first:]:
                if entry is None or entry.slots[g] < 0:
                    raise ValueError(f"page {len(slots)} is not resident in layer group {g}")
                slots.append(entry.slots[g])
            taken.append(slots)
        for g, first in enumerate(firsts):
            self._add_references(g, taken[g][first:])
        return taken

    def insert(
        self,
        parent: bytes,
        hashes: Sequence[bytes],
        slots: Sequence[Sequence[int]],
        first_page: int,
    ) -> None:
        """Make complete pages findable: page first_page + i, with hashes[i], lies in slots[g][i]
        (or -1).

        `parent` is the hash of page first_page - 1, or the namespace's root when `first_page` is 0.
        The caller holds a reference on each slot and keeps it. What the index already has stays: a
        slot given for the same page and group remains the caller's private copy, free once
        released. Where a full group gives -1 for a new page, or the parent is no longer in the
        index, the rest is not inserted, for no match could reach it.
        """
        if not self.reuse:
            return
        entries = self._entries
        linked, sliding = self._linked, self._sliding
        above = entries.get(parent) if linked and first_page else None
        if linked and first_page and above is None:
            return
        for i, page_hash in enumerate(hashes):
            entry = entries.get(page_hash)
            if entry is None:
                given = [group_slots[i] for group_slots in slots]
                if any(given[g] < 0 for g in self._full) or max(given) < 0:
                    if linked:
                        return
                    continue
                entry = self._new_entry(page_hash, above, given)
            else:
                for g in sliding:
                    if entry.slots[g] < 0 <= slots[g][i]:
                        self._adopt(entry, g, slots[g][i])
            above = entry if linked else None

    def _new_entry(self, page_hash: bytes, parent: _Entry | None, slots: list[int]) -> _Entry:
        given = [(g, slot) for g, slot in enumerate(slots) if slot >= 0]
        for g, slot in given:
            self._check_insertable(g, slot)
        entry = _Entry(page_hash, parent, slots)
        for g, slot in given:
            self._owners[g][slot] = entry
        self._entries[page_hash] = entry
        if self._linked:
            entry.pins = len(given)
            if parent is not None:
                parent.children += 1
                self._pin(parent)
        return entry

    def _adopt(self, entry: _Entry, group: int, slot: int) -> None:
        self._check_insertable(group, slot)
        self._owners[group][slot] = entry
        entry.slots[group] = slot
        if self._linked:
            self._pin(entry)

    def _check_insertable(self, group: int, slot: int) -> None:
        if self._owners[group][slot] is not None or self._references[group][slot] < 1:
            raise ValueError(f"slot {slot} of layer group {group} is unused or holds another page")

    def clear(self) -> None:
        """Empty the index: cached pages become free, used ones will when they are released."""
        for entry in self._entries.values():
            for g, slot in enumerate(entry.slots):
                if slot >= 0:
                    self._owners[g][slot] = None
                    if not self._references[g][slot]:
                        self._free[g].append(slot)
        self._entries.clear()
        self._leaves.clear()
        self._num_evictable = 0
        for lru in self._lru:
            lru.clear()

    # ----------------------------------------------------------------------------------- references

    def allocate(self, group: int, count: int) -> list[int] | None:
        """`count` slots with one reference each, evicting where needed; None, nothing changed, if
        too many."""
        free = self._free[group]
        if count > len(free):
            if count > self._num_available(group):
                return None
            evict = self._evict_entry if self.groups[group].kind == "full" else self._evict_page
            while count > len(free):
                evict(group)
        if not count:
            return []
        slots = free[-count:]
        del free[-count:]
        references = self._references[group]
        for slot in slots:
            references[slot] = 1
        self._num_used[group] += count
        return slots

    def can_allocate(self, counts: Sequence[int]) -> bool:
        """Whether `allocate` of counts[g] in every group g, in any order, would succeed. Exact."""
        return all(count <= self._num_available(g) for g, count in enumerate(counts))

    def retain(self, group: int, slots: Sequence[int]) -> None:
        """One more reference on each slot; -1 is ignored. Raises ValueError, with nothing changed,
        if one is free."""
        slots = [slot for slot in slots if slot >= 0]
        for slot in slots:
            if not self._references[group][slot] and self._owners[group][slot] is None:
                raise ValueError(
                    f"slot {slot} of layer group {group} is free and cannot be retained"
                )
        self._add_references(group, slots)

    def _add_references(self, group: int, slots: list[int]) -> None:
        references, owners = self._references[group], self._owners[group]
        lru = self._lru[group] if self.groups[group].kind == "sliding" else None
        linked = self._linked
        revived = 0
        for slot in slots:
            count = references[slot]
            references[slot] = count + 1
            if count:
                continue
            revived += 1
            if lru is not None:
                del lru[slot]
            if linked:
                entry = owners[slot]
                assert entry is not None
                if entry.pins:
                    entry.pins += 1
                else:
                    self._pin(entry)
        self._num_used[group] += revived

    def release(self, group: int, slots: Sequence[int], cold: bool = False) -> None:
        """Drop one reference on each slot; -1 is ignored. At 0 an indexed slot is cached, another
        one free.

        `cold` is for sliding pages that have left the window: they are evicted before all others.
        Raises ValueError at a slot that has no reference, with those before it released.
        """
        references, owners = self._references[group], self._owners[group]
        free = self._free[group]
        lru = self._lru[group] if self.groups[group].kind == "sliding" else None
        linked = self._linked
        self._now = now = self._now + 1
        dropped = 0
        for slot in slots:
            if slot < 0:
                continue
            count = references[slot] - 1
            if count > 0:
                references[slot] = count
                continue
            if count < 0:
                self._num_used[group] -= dropped
                raise ValueError(f"slot {slot} of layer group {group} has no reference to release")
            references[slot] = 0
            dropped += 1
            entry = owners[slot]
            if entry is None:
                free.append(slot)
                continue
            if lru is None:
                entry.last_use = now
            else:
                lru[slot] = None
                if cold:
                    lru.move_to_end(slot, last=False)
            if linked:
                if entry.pins > 1:
                    entry.pins -= 1
                else:
                    self._unpin(entry)
        self._num_used[group] -= dropped

    def _pin(self, start: _Entry) -> None:
        """One more reason to keep an entry; the first one is a reason to keep its parent."""
        entry: _Entry | None = start
        while entry is not None:
            entry.pins += 1
            if entry.pins > 1:
                return
            self._num_evictable -= 1
            entry = entry.parent

    def _unpin(self, start: _Entry) -> None:
        entry: _Entry | None = start
        while entry is not None:
            entry.pins -= 1
            if entry.pins:
                return
            self._num_evictable += 1
            if not entry.children and not entry.queued:
                self._queue(entry)
            entry = entry.parent

    # ------------------------------------------------------------------------------------- eviction

    def _num_available(self, group: int) -> int:
        """Free and evictable. Entries without pins have only such descendants, so all can go,
        leaves first; what one group evicts never lowers this for another."""
        evictable = (
            self._num_evictable if self.groups[group].kind == "full" else len(self._lru[group])
        )
        return len(self._free[group]) + evictable

    def _queue(self, entry: _Entry) -> None:
        entry.queued = True
        self._tie += 1
        heapq.heappush(self._leaves, (entry.last_use, self._tie, entry))

    def _evict_entry(self, group: int) -> None:
        """Evict the least recently used evictable leaf, all groups of it. There is one."""
        while True:
            last_use, _, entry = heapq.heappop(self._leaves)
            entry.queued = False
            if entry.pins or entry.children:
                continue  # it is queued again when it has neither
            if last_use != entry.last_use:
                self._queue(entry)  # it was used since: keys only rise, so the heap's order stands
                continue
            break
        del self._entries[entry.hash]
        for g, slot in enumerate(entry.slots):
            if slot >= 0:
                self._owners[g][slot] = None
                self._free[g].append(slot)
                self._lru[g].pop(slot, None)
                self.evictions += 1
        self._num_evictable -= 1
        parent = entry.parent
        if parent is not None:
            parent.children -= 1
            if not parent.children and not parent.pins and not parent.queued:
                self._queue(parent)

    def _evict_page(self, group: int) -> None:
        """Evict the first sliding page in line, which leaves a tombstone. There is one."""
        slot, _ = self._lru[group].popitem(last=False)
        entry = self._owners[group][slot]
        assert entry is not None
        self._owners[group][slot] = None
        self._free[group].append(slot)
        self.evictions += 1
        entry.slots[group] = -1
        if not self._linked and max(entry.slots) < 0:
            del self._entries[entry.hash]

    # ------------------------------------------------------------------------------------- counters

    def references(self, group: int) -> dict[int, int]:
        """Slots in use and the references on each, for checks."""
        return {slot: count for slot, count in enumerate(self._references[group]) if count}

    def num_free(self, group: int) -> int:
        return len(self._free[group])

    def num_used(self, group: int) -> int:
        return self._num_used[group]

    def num_cached(self, group: int) -> int:
        """In the index without a reference. In a full group not all of them need be evictable at
        once: a page stays while one that continues it is used."""
        return self._num_pages[group] - 1 - len(self._free[group]) - self._num_used[group]

    def check_integrity(self) -> None:
        """Recompute all state from the entries and references. Raises AssertionError. Takes
        milliseconds."""
        for page_hash, entry in self._entries.items():
            where = f"entry {page_hash.hex()[:8]}"
            assert entry.hash == page_hash, f"{where} is filed under another hash"
            assert len(entry.slots) == len(self.groups), f"{where} has slots {entry.slots}"
            assert max(entry.slots) > 0, f"{where} has no page in any layer group"
            for g in self._full:
                assert entry.slots[g] > 0, f"{where} lacks full group {g}"
            for g, slot in enumerate(entry.slots):
                if slot >= 0:
                    assert self._owners[g][slot] is entry, (
                        f"slot {slot} of group {g} is not {where}'s"
                    )
            if entry.parent is not None:
                known = self._entries.get(entry.parent.hash)
                assert known is entry.parent, f"{where} outlived its parent"
        for g in range(len(self.groups)):
            self._check_pool(g)
        self._check_pins()
        self._check_leaves()

    def _check_pool(self, g: int) -> None:
        free = set(self._free[g])
        assert len(free) == len(self._free[g]), f"group {g}: a slot is free twice"
        cached, used = set(), set()
        for slot in range(self._num_pages[g]):
            references, owner = self._references[g][slot], self._owners[g][slot]
            where = f"group {g}, slot {slot}"
            assert references >= 0, f"{where}: {references} references"
            if owner is not None:
                assert self._entries.get(owner.hash) is owner, f"{where}: owner is not in the index"
                assert owner.slots[g] == slot, f"{where}: owner has slot {owner.slots[g]}"
            if references:
                used.add(slot)
            elif owner is not None:
                cached.add(slot)
            else:
                assert (slot in free) == (slot != 0), f"{where}: leaked, or the null page is free"
        assert 0 not in used | cached, f"group {g}: the null page is in use"
        assert not free & (used | cached), (
            f"group {g}: free slots {free & (used | cached)} have owners"
        )
        assert len(used) == self._num_used[g], (
            f"group {g}: {len(used)} used, counted {self._num_used[g]}"
        )
        assert len(cached) == self.num_cached(g), f"group {g}: {len(cached)} cached, not as counted"
        if self.groups[g].kind == "sliding":
            assert cached == set(self._lru[g]), f"group {g}: cached slots are not those in line"
        else:
            assert not self._lru[g], f"full group {g} has an eviction line"

    def _check_pins(self) -> None:
        pins = dict.fromkeys(self._entries.values(), 0)
        children = dict.fromkeys(self._entries.values(), 0)
        # An entry follows its parent in the map: it was inserted later and is removed earlier.
        for entry in reversed(self._entries.values()) if self._linked else ():
            pins[entry] += sum(
                slot >= 0 and self._references[g][slot] > 0 for g, slot in enumerate(entry.slots)
            )
            if entry.parent is not None:
                children[entry.parent] += 1
                pins[entry.parent] += pins[entry] > 0
        for entry in self._entries.values():
            where = f"entry {entry.hash.hex()[:8]}"
            assert entry.pins == pins[entry], f"{where}: {entry.pins} pins, not {pins[entry]}"
            assert entry.children == children[entry], f"{where}: children not {children[entry]}"
        evictable = sum(entry.pins == 0 for entry in self._entries.values()) if self._linked else 0
        assert evictable == self._num_evictable, f"{evictable} evictable, not {self._num_evictable}"

    def _check_leaves(self) -> None:
        queued = {entry for _, _, entry in self._leaves}
        assert len(queued) == len(self._leaves), "an entry is queued twice"
        for last_use, _, entry in self._leaves:
            assert self._entries.get(entry.hash) is entry, "a queued entry is not in the index"
            assert last_use <= entry.last_use, "a queued entry's key is too new"
        for entry in self._entries.values():
            where = f"entry {entry.hash.hex()[:8]}"
            assert entry.queued == (entry in queued), f"{where}: wrongly marked as queued"
            if self._linked and not entry.pins and not entry.children:
                assert entry.queued, f"{where}: an evictable leaf is not queued"
