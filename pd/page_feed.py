"""What a leader tells API processes of the pages it holds. Pure; the other side is pd/page_map.py.

Subscribers have asked with `PagesWanted`. Each first gets all pages there are, as a numbered
sequence of `PagesHeld`, and from its first part on every `PagesChanged`. These have one sequence
number for all subscribers, so that each sees by itself what it missed, and asks again. Nothing is
kept for those who do not keep up.

A message has at most `PART_PAGES` pages, and there is one to a subscriber every `EVERY_S`, or two
while it gets all of them. Of changes that wait only the last one of each page is kept. If they are
too many, or the index was cleared, they are thrown away and a number is left out, which makes all
subscribers ask again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import assert_never

from hicache.index import Change, Cleared, Removed, Stored
from pd.messages import PAGE_KEY_BYTES, PagesChanged, PagesHeld

EVERY_S = 0.05
PART_PAGES = 8192
"""64 KiB."""
_MAX_WAITING = 16 * PART_PAGES


class _Snapshot:
    """All pages, on their way to one subscriber."""

    def __init__(self, serial: int, sequence: int, pages: bytes) -> None:
        self.serial = serial
        self.sequence = sequence
        self.pages = pages
        self.parts_sent = 0

    def next_part(self) -> PagesHeld:
        size = PART_PAGES * PAGE_KEY_BYTES
        begin = self.parts_sent * size
        part = self.pages[begin : begin + size]
        is_last = begin + size >= len(self.pages)
        self.parts_sent += 1
        return PagesHeld(self.serial, self.sequence, self.parts_sent - 1, is_last, part)


class PageFeed:
    def __init__(self) -> None:
        self.sequence = 1
        """Of the last `PagesChanged`; 0 is for leaders that tell nothing."""
        self._held: set[bytes] = set()
        self._waiting: dict[bytes, bool] = {}
        """Pages whose change was not told: whether they are there now."""
        self._subscribers: set[str] = set()
        self._asked: dict[str, int] = {}
        """Those who are to get all pages, and their serials."""
        self._snapshots: dict[str, _Snapshot] = {}
        self._next_at = 0.0

    def note(self, changes: Iterable[Change]) -> None:
        """Changes of the index, in order."""
        held, waiting = self._held, self._waiting
        for change in changes:
            match change:
                case Stored():
                    held.update(change.hashes)
                    waiting |= dict.fromkeys(change.hashes, True)
                case Removed():
                    held.difference_update(change.hashes)
                    waiting |= dict.fromkeys(change.hashes, False)
                case Cleared():
                    held.clear()
                    self._skip()
                case _:
                    assert_never(change)
        if not self._subscribers:
            waiting.clear()
        elif len(waiting) > _MAX_WAITING:
            self._skip()

    def _skip(self) -> None:
        self._waiting.clear()
        self.sequence += 1

    def wanted(self, subscriber: str, serial: int) -> None:
        """It gets all pages from the start, and changes from then on."""
        self._subscribers.add(subscriber)
        self._snapshots.pop(subscriber, None)
        self._asked[subscriber] = serial

    def leave(self, subscriber: str) -> None:
        self._subscribers.discard(subscriber)
        self._asked.pop(subscriber, None)
        self._snapshots.pop(subscriber, None)

    def take_messages(self, now: float) -> list[tuple[str, PagesChanged | PagesHeld]]:
        """What is to be sent now, and to whom; whether it arrives is not to be found out. `now` in
        seconds, of any clock that does not go back."""
        if now < self._next_at or not self._subscribers:
            return []
        messages: list[tuple[str, PagesChanged | PagesHeld]] = []
        if self._waiting:
            changed = self._next_change()
            messages += [(each, changed) for each in sorted(self._subscribers)]
        for subscriber, serial in self._asked.items():
            # Its first part follows on this number, and so do all later changes.
            pages = _keys(self._held)
            self._snapshots[subscriber] = _Snapshot(serial, self.sequence, pages)
        self._asked.clear()
        for subscriber, snapshot in list(self._snapshots.items()):
            part = snapshot.next_part()
            messages.append((subscriber, part))
            if part.is_last:
                del self._snapshots[subscriber]
        if messages:
            self._next_at = now + EVERY_S
        return messages

    def _next_change(self) -> PagesChanged:
        told = self._waiting
        self._waiting = dict(itertools.islice(told.items(), PART_PAGES, None))
        if self._waiting:
            told = dict(itertools.islice(told.items(), PART_PAGES))
        stored = [page for page, is_there in told.items() if is_there]
        removed = [page for page, is_there in told.items() if not is_there]
        self.sequence += 1
        return PagesChanged(self.sequence, _keys(stored), _keys(removed))

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        assert self._asked.keys() | self._snapshots.keys() <= self._subscribers
        assert len(self._waiting) <= _MAX_WAITING
        for page, is_there in self._waiting.items():
            assert (page in self._held) is is_there


def _keys(page_hashes: Iterable[bytes]) -> bytes:
    return b"".join([page_hash[:PAGE_KEY_BYTES] for page_hash in page_hashes])
