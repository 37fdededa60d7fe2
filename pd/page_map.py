"""Which replicas hold which pages, as their leaders tell (pd/page_feed.py). Pure.

The map is a hint: it lags behind by what is on its way, and a leader matches its own index again.
But it does not drift: whatever is lost, repeated or out of order is noticed by its number, and all
pages of that replica are asked for again; meanwhile what was known of it stays.

A page's key is the start of its hash; its entry is the set of replicas that hold it, as the bits of
an int over *slots*. A replica has a slot while it is known, and another one whenever all its pages
come anew: that one takes over when they are complete. The bits of a slot that was left count no
more and are swept out by later calls; only then is it given again. So nothing here takes long.

On a device, full-attention pages are there only while those before them are: who holds page i holds
page i - 1. So `match` looks at few pages: between two with the same holders nothing changes. Of a
model without full attention, and while changes are on their way, that may be wrong; a deeper page
then vouches for those before it.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from hicache.keys import HASH_BYTES
from pd.messages import PAGE_KEY_BYTES, PagesChanged, PagesHeld, PagesWanted

_SHARDS = 256
"""Dictionaries, by a key's first byte: growing one takes a 256th of the time."""
_MAX_LOOKUPS = 32
"""In a match, after the first. If they do not suffice, replicas are taken to hold less than they
do, those with the shortest matches first."""
_PRECISION = 64
"""Of what a replica lacks, by how much its match may be too short: this part."""
_NEAR = 32
"""Pages from either end of a prompt, where most matches end: after a system prompt, and before what
is new of a conversation."""
_FEW = 2
"""So many bits are read one by one, more of them all at once."""
_MAX_KNOWN = 256
_ASK_AGAIN_S = 1.0
"""After nothing was heard."""
_serials = itertools.count(1)
"""Of a process: a router's successor does not take answers for its own that were not."""


class _State(enum.Enum):
    ASKED = 0
    FILLING = 1
    """Some of its pages have come."""
    READY = 2


class _Source:
    """A replica."""

    def __init__(self, row: int, slot: int) -> None:
        self.row = row
        self.slot = slot
        """Whose bits count."""
        self.state = _State.ASKED
        self.filling = -1
        """The slot that will take over."""
        self.serial = 0
        self.heard_at = 0.0
        self.sequence = 0
        """Of the last change that was applied, or is in the pages that are coming."""
        self.next_part = 0
        self.gone: set[bytes] = set()
        """Left while the others were on their way: they may be in a later part."""


class PageMap:
    """Replicas are named to it, and have *rows*: small numbers of the caller's, by which matches
    come."""

    def __init__(self) -> None:
        self._shards: list[dict[bytes, int]] = [{} for _ in range(_SHARDS)]
        self._sources: dict[str, _Source] = {}
        self._bits: list[int] = []
        """By slot; one object, for all entries of pages that are only there."""
        self._rows = np.zeros(64, np.int64)
        """By slot."""
        self._known_rows: dict[int, npt.NDArray[np.int64]] = {}
        """Of some sets of slots."""
        self._live = 0
        """Slots that count."""
        self._free: list[int] = []
        self._left: list[int] = []
        """To be swept after the present sweep."""
        self._sweeping: list[int] = []
        self._shard_to_sweep = 0
        self.num_resyncs = 0
        """How often all pages were asked for again."""

    def __len__(self) -> int:
        """Pages, those that are to be swept included."""
        return sum(map(len, self._shards))

    # ------------------------------------------------------------------------------------- replicas

    def join(self, replica: str, row: int, now: float) -> PagesWanted:
        """From nothing on, also where it is known. What is returned, here and below, is for the
        replica's leader; it may get lost. `now`: seconds of any clock that does not go back."""
        self.leave(replica)
        slot = self._take_slot(row)
        self._live |= self._bits[slot]
        source = self._sources[replica] = _Source(row, slot)
        return self._ask(source, now)

    def leave(self, replica: str) -> None:
        source = self._sources.pop(replica, None)
        if source is not None:
            self._leave_slot(source.slot)
            self._leave_slot(source.filling)

    def reported(self, replica: str, sequence: int, now: float) -> PagesWanted | None:
        """Its heartbeat: the number of the last change that it told, 0 if it tells none."""
        self._sweep()
        source = self._sources.get(replica)
        if source is None or not sequence:
            return None
        if source.state is not _State.READY:
            is_late = now - source.heard_at >= _ASK_AGAIN_S
        else:
            is_late = sequence > source.sequence
        return self._ask_again(source, now) if is_late else None

    def receive(
        self, replica: str, message: PagesChanged | PagesHeld, now: float
    ) -> PagesWanted | None:
        self._sweep()
        source = self._sources.get(replica)
        if source is None:
            return None
        if isinstance(message, PagesHeld):
            return self._held(source, message, now)
        return self._changed(source, message, now)

    def _changed(self, source: _Source, message: PagesChanged, now: float) -> PagesWanted | None:
        if source.state is _State.ASKED or message.sequence <= source.sequence:
            return None
        if message.sequence > source.sequence + 1:
            return self._ask_again(source, now)
        source.sequence = message.sequence
        stored, removed = _keys(message.stored), _keys(message.removed)
        if source.state is _State.FILLING:
            source.gone.difference_update(stored)
            source.gone.update(removed)
            self._store(source.filling, stored)
            self._remove(source.filling, removed)
        else:
            self._store(source.slot, stored)
            self._remove(source.slot, removed)
        return None

    def _held(self, source: _Source, message: PagesHeld, now: float) -> PagesWanted | None:
        if source.state is _State.READY or message.serial != source.serial:
            return None
        if message.part != source.next_part:
            # A repeated one has been here; after a lost one the rest is of no use.
            return self._ask_again(source, now) if message.part > source.next_part else None
        if source.state is _State.ASKED:
            source.state = _State.FILLING
            source.sequence = message.sequence
        source.heard_at = now
        source.next_part += 1
        keys: Iterable[bytes] = _keys(message.pages)
        if source.gone:
            keys = [key for key in keys if key not in source.gone]
        self._store(source.filling, keys)
        if message.is_last:
            self._leave_slot(source.slot)
            source.slot, source.filling = source.filling, -1
            self._live |= self._bits[source.slot]
            source.state = _State.READY
            source.gone.clear()
        return None

    def _ask_again(self, source: _Source, now: float) -> PagesWanted:
        self.num_resyncs += 1
        return self._ask(source, now)

    def _ask(self, source: _Source, now: float) -> PagesWanted:
        self._leave_slot(source.filling)
        source.filling = self._take_slot(source.row)
        source.state = _State.ASKED
        source.serial = next(_serials)
        source.heard_at = now
        source.next_part = 0
        source.gone.clear()
        return PagesWanted(source.serial)

    # -------------------------------------------------------------------------------------- entries

    def _store(self, slot: int, keys: Iterable[bytes]) -> None:
        shards, bit = self._shards, self._bits[slot]
        before, after = 0, bit  # consecutive pages mostly have the same holders, and share the int
        for key in keys:
            shard = shards[key[0]]
            holders = shard.get(key, 0)
            if holders != before:
                before, after = holders, holders | bit
            shard[key] = after

    def _remove(self, slot: int, keys: Iterable[bytes]) -> None:
        shards, bit = self._shards, self._bits[slot]
        before = after = 0
        for key in keys:
            shard = shards[key[0]]
            holders = shard.get(key, 0)
            if holders != before:
                before, after = holders, holders & ~bit
            if after:
                shard[key] = after
            elif holders:
                del shard[key]

    def _take_slot(self, row: int) -> int:
        if self._free:
            slot = self._free.pop()
        else:
            slot = len(self._bits)
            self._bits.append(1 << slot)
            if slot == len(self._rows):
                self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)))
        self._rows[slot] = row
        self._known_rows.clear()
        return slot

    def _leave_slot(self, slot: int) -> None:
        if slot >= 0:
            self._live &= ~self._bits[slot]
            self._left.append(slot)

    def _sweep(self) -> None:
        """One shard of those that hold bits of slots that were left."""
        if not self._sweeping:
            if not self._left:
                return
            self._sweeping, self._left = self._left, []
            self._shard_to_sweep = 0
        swept = sum(self._bits[slot] for slot in self._sweeping)
        shard = self._shards[self._shard_to_sweep]
        before = after = 0
        for key, holders in list(shard.items()):
            if not holders & swept:
                continue
            if holders != before:
                before, after = holders, holders & ~swept
            if after:
                shard[key] = after
            else:
                del shard[key]
        self._shard_to_sweep += 1
        if self._shard_to_sweep == _SHARDS:
            self._free += self._sweeping
            self._sweeping = []

    # ---------------------------------------------------------------------------------------- match

    def match(self, page_hashes: bytes, num_pages: int, num_rows: int) -> npt.NDArray[np.float64]:
        """By row, how many of the first `num_pages` pages of a prompt are held, from its start on;
        their hashes lie end to end."""
        matched = np.zeros(num_rows)
        for length, holders in self._levels(page_hashes, num_pages):
            if holders.bit_count() > _FEW:
                matched[self._rows_of(holders)] = length
                continue
            while holders:
                slot = holders.bit_length() - 1
                holders ^= self._bits[slot]
                matched[self._rows[slot]] = length
        return matched

    def _rows_of(self, holders: int) -> npt.NDArray[np.int64]:
        """Many prompts begin like others, whose holders are the same."""
        rows = self._known_rows.get(holders)
        if rows is None:
            if len(self._known_rows) == _MAX_KNOWN:
                self._known_rows.clear()
            data = holders.to_bytes((holders.bit_length() + 7) // 8, "little")
            bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
            rows = self._known_rows[holders] = self._rows[bits.nonzero()[0]]
        return rows

    def _levels(self, page_hashes: bytes, count: int) -> list[tuple[int, int]]:
        """(pages, the slots that hold exactly so many of the leading ones), each slot once."""
        shards, live = self._shards, self._live
        count = min(count, len(page_hashes) // HASH_BYTES)
        if count < 1:
            return []
        levels: list[tuple[int, int]] = []
        key = page_hashes[:PAGE_KEY_BYTES]
        low, low_holders = 0, shards[key[0]].get(key, 0) & live
        high, high_holders = count, 0  # nobody's
        # Where ranges begin that lie before `low`, each of which ends where the next begins.
        before: list[tuple[int, int]] = []
        lookups = 0
        while True:
            if low_holders != high_holders:
                if high - low > 1 + (count - high) // _PRECISION and lookups < _MAX_LOOKUPS:
                    before.append((low, low_holders))
                    middle = (low + high) >> 1
                    if middle >= low + _NEAR and (low == 0) != (high == count):
                        middle = _NEAR if low == 0 else count - _NEAR
                    low, begin = middle, middle * HASH_BYTES
                    key = page_hashes[begin : begin + PAGE_KEY_BYTES]
                    low_holders = shards[key[0]].get(key, 0) & low_holders | high_holders
                    lookups += 1
                    continue
                levels.append((low + 1, low_holders & ~high_holders))
            if not before:
                return levels
            high, high_holders = low, low_holders
            low, low_holders = before.pop()

    def holders(self, page_hash: bytes) -> set[int]:
        """Rows; for tests."""
        key = page_hash[:PAGE_KEY_BYTES]
        holders = self._shards[key[0]].get(key, 0) & self._live
        return {int(self._rows[slot]) for slot, bit in enumerate(self._bits) if holders & bit}

    def check_integrity(self) -> None:
        """Every slot has one use, and no entry is empty or has bits of free slots. Raises
        AssertionError."""
        used = [source.slot for source in self._sources.values()]
        filling = [source.filling for source in self._sources.values() if source.filling >= 0]
        slots = [*used, *filling, *self._free, *self._left, *self._sweeping]
        assert sorted(slots) == list(range(len(self._bits))), f"slots {slots}"
        assert self._live == sum(self._bits[slot] for slot in used)
        free = sum(self._bits[slot] for slot in self._free)
        for shard in self._shards:
            for key, holders in shard.items():
                assert holders > 0, f"{key.hex()} has no holders"
                assert not holders & free, f"{key.hex()} has bits of free slots"
        for source in self._sources.values():
            assert (source.filling >= 0) == (source.state is not _State.READY)


def _keys(data: bytes) -> list[bytes]:
    size = PAGE_KEY_BYTES
    return [data[i : i + size] for i in range(0, len(data) - size + 1, size)]
