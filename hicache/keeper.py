"""The keeper of a node's cache: which pages lie in the host tier, and who copies from or to them.

Pure. A node has one host tier, shared by its replicas, and one keeper, which owns the tier's
`PageIndex` (its slots are pages of host memory) and the storage tier behind it. Host pages are
whole pages, whatever part of them the ranks of a replica hold, so replicas of different parallel
shapes share them. Replicas copy; the keeper says where, and never touches the bytes.

What a replica finds has references from `Found` to `Close`, what it is given room for, and what
that continues, from `Room` to `Copied`: no slot is used for something else while a replica may copy
from or to it, and no copy is in vain because what comes before it has gone. Room ends in
the index only when the replica has said that its copies are complete. A replica that is gone
(`client_down`: its process has ended, no copy of it is under way) gives back all. Two replicas that
offer the same pages at the same time: the second gets no room for them, and what it has after them
is inserted when they are, or not at all.

Pages belong to the tenant that offered them first, and those that storage brought to nobody. A
tenant with more pages than its quota loses its own first (hicache/index.py).

Everything here may be refused or forgotten: it is a cache. The host tier is prefix-closed, like the
device tier.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from hicache.index import PageIndex
from hicache.keys import HASH_BYTES
from hicache.messages import (
    Close,
    Copied,
    Find,
    Found,
    FromKeeper,
    Offer,
    Room,
    Take,
    ToKeeper,
    pack_ints,
    split_hashes,
)
from hicache.storage_prefetch import Prefetch
from hicache.storage_tier import StorageTier
from transfer.layout import LayerGroup

MAX_OPEN = 4096
"""Exchanges of one replica at a time; what it opens beyond is refused."""


@dataclasses.dataclass(slots=True, eq=False)
class _Search:
    hashes: list[bytes]
    num_resident: int
    """Found at once."""
    held: list[list[int]]
    """Slots with a reference for each time that they were found, by layer group."""
    prefetch: Prefetch | None = None
    """None: the last `Found` has been sent."""


@dataclasses.dataclass(slots=True, eq=False)
class _Offer:
    first: int
    """Of the pages that room was given for."""
    hashes: list[bytes]
    """From page 0 to the last that room was given for. Others need not copy those from `first`
    on."""
    slots: list[list[int]]
    """By layer group; each has a reference."""
    tenant: str
    before: list[list[int]]
    """By layer group, slots of what the pages from `first` on continue. Each has a reference: it
    must not make room for what follows, nor for others meanwhile."""


@dataclasses.dataclass(slots=True)
class KeeperStats:
    """Since the start; pages are those of the first layer group's sequence, not of groups."""

    found_pages: int = 0
    read_pages: int = 0
    """Of these, those that storage brought."""
    offered_pages: int = 0
    copied_pages: int = 0
    refused_pages: int = 0
    """No room, or the pages before them are not there any more."""


class Keeper:
    def __init__(
        self,
        index: PageIndex,
        groups: Sequence[LayerGroup],
        storage: StorageTier | None,
        send: Callable[[str, FromKeeper], object],
        quotas: Mapping[str | None, int] = {},
    ) -> None:
        """`quotas`: pages of tenants; None: of each that has no quota of its own. Raises ValueError
        for some without a full-attention group: its index knows no tenants."""
        for tenant, pages in quotas.items():
            index.set_quota(tenant, pages)
        self.index = index
        self.storage = storage
        self.stats = KeeperStats()
        self._groups = groups
        self._send = send
        self._clients: dict[str, dict[int, _Search | _Offer]] = {}
        """Open exchanges, by serial."""
        self._floors: dict[str, int] = {}
        self._ended: dict[str, set[int]] = {}
        """Serials not below the floor: a repeated message must not open them again, as a late
        `Copied` would then speak of other slots."""
        self._coming: Counter[bytes] = Counter()
        """Pages that somebody copies to the host tier now."""
        self._parked: list[_Offer] = []
        """Copied, but pages before them are still coming."""

    # -------------------------------------------------------------------------------------- clients

    def client_up(self, name: str) -> None:
        self._clients[name] = {}
        self._floors[name] = 0
        self._ended[name] = set()

    def client_down(self, name: str, now: float) -> None:
        """Its process has ended."""
        self._floors.pop(name, None)
        self._ended.pop(name, None)
        for exchange in self._clients.pop(name, {}).values():
            self._drop(exchange, now)
        self._unpark(now)

    def receive(self, client: str, message: ToKeeper, now: float) -> None:
        exchanges = self._clients.get(client)
        if exchanges is None or not self._is_sound(message):
            return
        ended = self._ended[client]
        if message.floor > self._floors[client]:
            self._floors[client] = message.floor
            ended.difference_update([serial for serial in ended if serial < message.floor])
            for serial in [serial for serial in exchanges if serial < message.floor]:
                self._drop(exchanges.pop(serial), now)
        if message.serial < self._floors[client] or message.serial in ended:
            self._unpark(now)
            return  # repeated, or overtaken by what closed it
        match message:
            case Find() | Offer():
                if message.serial not in exchanges:
                    self._open(client, message, len(exchanges) < MAX_OPEN, now)
            case Take():
                search = exchanges.get(message.serial)
                if isinstance(search, _Search) and search.prefetch is not None:
                    self._end_prefetch(search, now)
                    self._last_found(client, message.serial, search, now)
            case Copied():
                offer = exchanges.get(message.serial)
                if isinstance(offer, _Offer):
                    del exchanges[message.serial]
                    ended.add(message.serial)
                    self._copied(offer, message.num_pages, now)
            case Close():
                ended.add(message.serial)
                if message.serial in exchanges:
                    self._drop(exchanges.pop(message.serial), now)
        self._unpark(now)

    def _open(self, client: str, message: Find | Offer, is_allowed: bool, now: float) -> None:
        hashes = split_hashes(message.page_hashes)
        nothing = (b"",) * len(self._groups)
        match message, is_allowed:
            case Find(), True:
                self._find(client, message, hashes, now)
            case Find(), False:
                self._send(client, Found(message.serial, 0, nothing, is_last=True))
            case Offer(), True:
                self._offer(client, message, hashes)
            case Offer(), False:
                self._send(client, Room(message.serial, 0, nothing))

    def tick(self, now: float) -> None:
        """Also to be called when storage has brought something."""
        for client, exchanges in self._clients.items():
            for serial, search in exchanges.items():
                if (
                    isinstance(search, _Search)
                    and search.prefetch is not None
                    and (search.prefetch.is_done or search.prefetch.is_probe)
                ):
                    self._last_found(client, serial, search, now)

    def _is_sound(self, message: ToKeeper) -> bool:
        match message:
            case Find():
                return not len(message.page_hashes) % HASH_BYTES
            case Offer():
                num_pages, rest = divmod(len(message.page_hashes), HASH_BYTES)
                is_one_per_group = len(message.have) == len(self._groups)
                return not rest and 0 <= message.first <= num_pages and is_one_per_group
        return True

    def detach(self, now: float) -> None:
        """Do without storage from now on; the tier drains by itself."""
        for client, exchanges in self._clients.items():
            for serial, search in exchanges.items():
                if isinstance(search, _Search) and search.prefetch is not None:
                    self._end_prefetch(search, now)
                    self._last_found(client, serial, search, now)
        if self.storage is not None:
            self.storage.detach(now)
            self.storage = None

    # --------------------------------------------------------------------------------------- search

    def _find(self, client: str, message: Find, hashes: list[bytes], now: float) -> None:
        found = self.index.match(hashes)
        search = _Search(hashes, found, [[] for _ in self._groups])
        self._clients[client][message.serial] = search
        if self.storage is not None:
            self.storage.pages_hit(hashes[:found], now)
            if found < len(hashes):
                prefetch = self.storage.prefetch(
                    hashes, found, now, message.tokens_per_s, message.have
                )
                if prefetch is not None and not prefetch.is_probe:
                    search.prefetch = prefetch
        self.stats.found_pages += found
        self._tell(client, message.serial, search, found)

    def _last_found(self, client: str, serial: int, search: _Search, now: float) -> None:
        search.prefetch = None
        found = self.index.match(search.hashes)
        if self.storage is not None and found > search.num_resident:
            self.storage.pages_hit(search.hashes[:found], now)
        self._tell(client, serial, search, found)

    def _tell(self, client: str, serial: int, search: _Search, found: int) -> None:
        slots = self.index.acquire(search.hashes[:found])
        for held, taken in zip(search.held, slots, strict=True):
            held += taken
        num_read = max(0, found - search.num_resident)
        self.stats.found_pages += num_read
        self.stats.read_pages += num_read
        packed = tuple(map(pack_ints, slots))
        self._send(client, Found(serial, found, packed, search.prefetch is None, num_read))

    # --------------------------------------------------------------------------------------- offers

    def _offer(self, client: str, message: Offer, hashes: list[bytes]) -> None:
        before = self.index.resident(hashes)
        first = len(before[0])
        page_tokens = self.index.page_tokens
        for g, group in enumerate(self._groups):
            del before[g][: group.first_needed_page(first * page_tokens, page_tokens)]
            self.index.retain(g, before[g])
        if all(group.kind == "sliding" for group in self._groups):
            first = max(first, message.first)  # the pages before need not be there
        while first < len(hashes) and hashes[first] in self._coming:
            first += 1
        offer = _Offer(first, hashes, [[] for _ in self._groups], message.tenant, before)
        self._clients[client][message.serial] = offer
        self.stats.offered_pages += len(hashes) - first
        count = self._make_room(offer, message.have)
        self.stats.refused_pages += len(hashes) - first - count
        del hashes[first + count :]
        self._coming.update(hashes[first:])
        self._send(client, Room(message.serial, first, tuple(map(pack_ints, offer.slots))))

    def _make_room(self, offer: _Offer, have: tuple[int, ...]) -> int:
        """Give the pages from `first` on slots; returns for how many there was room."""
        count = len(offer.hashes) - offer.first
        quota = self.index.quota(offer.tenant) if offer.tenant else None
        if quota is not None:
            before = map(self.index.tenant_of, offer.hashes[: offer.first])
            count = min(count, max(0, quota - list(before).count(offer.tenant)))
        if any(
            begin > offer.first
            for group, begin in zip(self._groups, have, strict=True)
            if group.kind != "sliding"
        ):
            return 0
        if count and quota is not None:
            self.index.keep_quota(offer.tenant, count)  # its own go, before others make room
        while count:
            missing = [min(count, max(0, begin - offer.first)) for begin in have]
            counts = [count - absent for absent in missing]
            if self.index.can_allocate(counts):
                break
            count //= 2
        else:
            return 0
        for g, absent in enumerate(missing):
            slots = self.index.allocate(g, counts[g])
            assert slots is not None
            offer.slots[g] = [-1] * absent + slots
        return count

    def _copied(self, offer: _Offer, num_pages: int, now: float) -> None:
        """Of those that room was given for, the first pages are complete."""
        count = max(0, min(num_pages, len(offer.hashes) - offer.first))
        self._cut(offer, offer.first + count)
        self.stats.copied_pages += count
        if count and offer.first and offer.hashes[offer.first - 1] in self._coming:
            self._parked.append(offer)
        else:
            self._insert(offer, now)

    def _insert(self, offer: _Offer, now: float) -> None:
        first, hashes = offer.first, offer.hashes
        if len(hashes) > first:
            parent = hashes[first - 1] if first else b""
            tenant = offer.tenant or None
            self.index.insert(parent, hashes[first:], offer.slots, first, tenant=tenant)
            if self.storage is not None and len(self.index.resident(hashes)[0]) == len(hashes):
                self.storage.pages_stored(list(hashes), first, now)
        self._give_back(offer)
        if offer.tenant:
            self.index.keep_quota(offer.tenant)

    def _give_back(self, offer: _Offer) -> None:
        """It is over: give back the slots that are left."""
        self._cut(offer, offer.first)
        for g, slots in enumerate(offer.before):
            self.index.release(g, slots, is_use=False)

    def _cut(self, offer: _Offer, end: int) -> None:
        """Give back the slots of the pages from `end` on; nobody copies to them."""
        for g, slots in enumerate(offer.slots):
            self.index.release(g, slots[end - offer.first :])
            del slots[end - offer.first :]
        self._coming.subtract(offer.hashes[end:])
        for page_hash in offer.hashes[end:]:
            if not self._coming[page_hash]:
                del self._coming[page_hash]
        del offer.hashes[end:]

    def _unpark(self, now: float) -> None:
        """Insert what waited for pages that have come, or will not."""
        again = bool(self._parked)
        while again:
            again = False
            for offer in list(self._parked):
                if offer.hashes[offer.first - 1] not in self._coming:
                    self._parked.remove(offer)
                    self._insert(offer, now)
                    again = True

    def _end_prefetch(self, search: _Search, now: float) -> None:
        if search.prefetch is not None and self.storage is not None:
            self.storage.cancel_prefetch(search.prefetch, now)

    def _drop(self, exchange: _Search | _Offer, now: float) -> None:
        if isinstance(exchange, _Offer):
            self._give_back(exchange)
            return
        self._end_prefetch(exchange, now)
        for g, slots in enumerate(exchange.held):
            self.index.release(g, slots)

    # ------------------------------------------------------------------------------------ integrity

    @property
    def num_open(self) -> int:
        return sum(map(len, self._clients.values()))

    def held(self) -> Iterator[tuple[int, list[int]]]:
        """(group, slots) of all references but those of the storage tier."""
        everything = [each for of in self._clients.values() for each in of.values()]
        for exchange in [*everything, *self._parked]:
            if isinstance(exchange, _Offer):
                yield from enumerate(exchange.slots)
                yield from enumerate(exchange.before)
            else:
                yield from enumerate(exchange.held)

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        self.index.check_integrity()
        coming: Counter[bytes] = Counter()
        offers = [e for each in self._clients.values() for e in each.values()]
        for offer in [*offers, *self._parked]:
            if isinstance(offer, _Offer):
                coming.update(offer.hashes[offer.first :])
                for slots in offer.slots:
                    assert len(slots) == len(offer.hashes) - offer.first
        assert coming == self._coming, "pages that are coming are not those of open offers"
        for name, exchanges in self._clients.items():
            assert all(serial >= self._floors[name] for serial in exchanges)
