"""What is known of a storage's content, which others may change: hints, both of them bounded.

A page is *known to be stored* when all its cells of full-attention and latent groups were put, read
or seen there; of sliding-window groups a bit says which. A page is *known to be absent* for some
time after it was not there. Either may be wrong: the first is corrected by a miss, the second by
time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from transfer.layout import LayerGroup


class StorageHints:
    def __init__(
        self, groups: Sequence[LayerGroup], max_stored: int, max_absent: int, absent_s: float
    ) -> None:
        self.all_groups = (1 << len(groups)) - 1
        self.full_groups = sum(1 << g for g, group in enumerate(groups) if group.kind != "sliding")
        """Bits of those that every page needs, and without which no later page can be used."""
        self.epoch = 0
        """Changes when the storage is emptied: what was begun before says nothing."""
        self._max_stored = max_stored
        self._max_absent = max_absent
        self._absent_s = absent_s
        self._stored: OrderedDict[bytes, int] = OrderedDict()
        """Bits of groups; least recently used first."""
        self._absent: OrderedDict[bytes, float] = OrderedDict()
        """Until when; the oldest first."""

    def __len__(self) -> int:
        return len(self._stored)

    def groups(self, page_hash: bytes) -> int:
        """Bits of the groups in which it is known to be stored; 0: the page is not."""
        return self._stored.get(page_hash, 0)

    def first_unknown(self, hashes: Sequence[bytes], end: int) -> int:
        """The first of pages 0 to `end` - 1 that is not known to be stored, else `end`."""
        stored = self._stored
        for page in range(end):
            if hashes[page] not in stored:
                return page
        return end

    def add_stored(self, page_hash: bytes, groups: int) -> None:
        """It is there in these groups. Without all full ones that is not worth knowing."""
        groups |= self._stored.get(page_hash, 0)
        if not groups or groups & self.full_groups != self.full_groups:
            return
        self._absent.pop(page_hash, None)
        self._stored[page_hash] = groups
        self._stored.move_to_end(page_hash)
        if len(self._stored) > self._max_stored:
            self._stored.popitem(last=False)

    def touch(self, hashes: Sequence[bytes]) -> None:
        """A chain was used: its last pages are forgotten first."""
        for page_hash in reversed(hashes):
            if page_hash in self._stored:
                self._stored.move_to_end(page_hash)

    def remove_group(self, page_hash: bytes, group: int) -> None:
        """It is not there in a sliding-window group."""
        known = self._stored.get(page_hash, 0) & ~(1 << group)
        if known:
            self._stored[page_hash] = known
        else:
            self._stored.pop(page_hash, None)

    def remove_stored(self, hashes: Sequence[bytes]) -> None:
        """The first is not there, so that the others are of no use."""
        for page_hash in hashes:
            self._stored.pop(page_hash, None)

    def add_absent(self, page_hash: bytes, now: float) -> None:
        self._absent.pop(page_hash, None)
        self._absent[page_hash] = now + self._absent_s
        if len(self._absent) > self._max_absent:
            self._absent.popitem(last=False)

    def first_absent(self, hashes: Sequence[bytes], begin: int, end: int, now: float) -> int:
        """The first of pages `begin` to `end` - 1 that is known to be absent, else `end`."""
        for page in range(begin, end):
            until = self._absent.get(hashes[page])
            if until is not None:
                if now < until:
                    return page
                del self._absent[hashes[page]]
        return end

    def clear(self) -> None:
        """The storage has been emptied."""
        self.epoch += 1
        self._stored.clear()

    def check_integrity(self) -> None:
        assert len(self._stored) <= self._max_stored, f"{len(self._stored)} hints"
        assert len(self._absent) <= self._max_absent, f"{len(self._absent)} absent pages"
        for page_hash, groups in self._stored.items():
            assert groups, "a page in no group"
            assert groups & self.full_groups == self.full_groups, "a page without a full group"
            assert page_hash not in self._absent, "a page is known to be stored and to be absent"
