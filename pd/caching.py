"""A leader's use of its node's host tier: pages copied out when they are worth keeping, and copied
in for requests that would otherwise compute them, where that is sooner (hicache/load_cost.py).

Pure. The keeper (hicache/keeper.py) says where the pages are, or may go; the replica's ranks copy
(`CopyPages` -> `PagesCopied`). A request that its keeper may have pages for is `fetch`ed before it
is queued for the batch, in its turn: `ready` is called when what can be had of its prefix
is in the device tier, as ordinary cache, or when it is not worth waiting for. Whatever fails or
takes too long is a miss, and the request is computed.

Device pages that are copied have references until the copy has ended, also when their request is
gone, and so do, on the keeper's side, the host pages.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence

import msgspec
import numpy as np

from hicache.index import PageIndex
from hicache.load_cost import LoadCost, Verdict
from hicache.messages import Close, Copied, Find, Found, FromKeeper, Offer, Room, Take
from hicache.writes import SelectiveWrites
from pd.engine.scheduler import Scheduler, Tracked
from pd.engine.turns import NEVER, Turn
from pd.events import CopyPages, Effect, PagesCopied, Warn
from pd.messages import AnyMessage, Int32Array, unpack_ints
from pd.spec import CacheSpec, StorageCacheSpec
from transfer.layout import LayerGroup

_ANSWER_S = 5.0
"""A keeper that takes longer is not waited for."""
_READ_S = 60.0
"""The most that storage is waited for, whatever the policy."""
_QUIET_S = 10.0
"""How often the keeper hears that nothing is open, in case that it was not told so."""
_MAX_FETCHES = 256
_PROBE_S = 10.0
_PROBE_PAGES = 32
"""What is thought slower than computing is measured again with so many pages, so often."""
_SPARE_SHARE = 0.125
"""Of the device pool: with write_back, what may be evicted without notice."""
_CHAINS_KEPT = 2
"""With write_back, those known to have been offered, in pages of the device pool."""
_MAX_NAMED = 1 << 16
"""With write_back, pages of all chains that are offered at a time, if they are several."""
_AGAIN_S = 5.0
"""With write_back, after so long what the keeper did not take is offered again, then after twice as
long each time."""
_OFFERED_SHARE = 0.25
"""Of the device pool, the most pages that wait to be copied out, if they are of several offers."""


@dataclasses.dataclass(slots=True, eq=False)
class _Fetch:
    serial: int
    sequence: Tracked | None
    """None: the request has gone, a copy has not ended."""
    arrived_at: float
    hashes: list[bytes]
    have: int
    """Of these, so many were in the device tier."""
    tenant: str
    tokens_per_s: float
    deadline: float
    found: Found | None = None
    asked_to_end: bool = False
    slots: list[list[int]] = dataclasses.field(default_factory=list)
    """While copying: device pages by layer group, from page 0 on, each with a reference."""
    begin: int = 0
    """The first page copied."""
    is_copying: bool = False
    started_at: float = 0.0
    num_bytes: int = 0
    """While copying."""


@dataclasses.dataclass(slots=True, eq=False)
class _Offering:
    serial: int
    hashes: list[bytes]
    slots: list[list[int]]
    """By layer group, from page 0 on, each with a reference."""
    new: int
    """Pages that were not offered before."""
    deadline: float = 0.0
    """0: not set yet."""
    count: int = 0
    """While copying: how many pages."""
    is_all: bool = False
    """While copying: with them, all its pages are in the host tier."""
    is_copying: bool = False


class Caching:
    def __init__(
        self,
        scheduler: Scheduler,
        index: PageIndex,
        groups: Sequence[LayerGroup],
        page_bytes: Sequence[int],
        page_tokens: int,
        spec: CacheSpec,
        numbers: Iterator[int],
        ready: Callable[[Tracked], None],
        send: Callable[[str, AnyMessage], None],
        emit: Callable[[Effect], None],
    ) -> None:
        """`numbers`: never the same twice; for copies."""
        self.keeper = ""
        """Empty: there is none."""
        self.pages_in = 0
        self.pages_out = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.seconds_in = 0.0
        self.seconds_out = 0.0
        self.dropped_offers = 0
        self.lacks_pages_since = NEVER
        """Turn of the first request that finds no device pages to copy to."""
        self._scheduler = scheduler
        self._index = index
        self._groups = groups
        self._page_bytes = page_bytes
        self._page_tokens = page_tokens
        self._writes = spec.host.write if spec.host is not None else ""
        if self._writes == "write_back" and all(group.kind == "sliding" for group in groups):
            self._writes = "write_through"  # such entries are not evicted in an order
        self._pool_pages = index.num_free(0)
        self._selective: SelectiveWrites | None = None
        if spec.host is not None and self._writes == "write_through_selective":
            self._selective = SelectiveWrites(self._pool_pages, spec.host.write_hits)
        self._written: OrderedDict[bytes, tuple[float, float]] = OrderedDict()
        """write_back: last pages of chains that were offered; when to do so again, and how long to
        wait after that."""
        self._storage = spec.storage or StorageCacheSpec.model_construct()
        self._numbers = numbers
        self._ready = ready
        self._send = send
        self._emit = emit
        self._last_serial = 0
        self._open: dict[int, _Fetch | _Offering] = {}
        """By serial, ascending."""
        self._queue: deque[_Fetch] = deque()
        """Not copying yet, in order of arrival."""
        self._by_sequence: dict[Tracked, _Fetch] = {}
        self._copies: dict[int, _Fetch | _Offering] = {}
        self._num_offered = 0
        self._max_offered = int(self._pool_pages * _OFFERED_SHARE)
        self._num_copying = 0
        """Fetches that requests wait for."""
        self._quiet_since = 0.0
        self._cost = LoadCost(_PROBE_S)
        """Of copies to the device; until there was one, copies from there."""
        self._copied_in_at = -math.inf

    # ----------------------------------------------------------------------------------- the keeper

    def keeper_up(self, name: str) -> None:
        self.keeper = name

    def keeper_down(self, name: str) -> None:
        """Copies that are under way end by themselves: its memory is still mapped here."""
        if name != self.keeper:
            return
        self.keeper = ""
        self._written.clear()
        for exchange in list(self._open.values()):
            if not exchange.is_copying:
                self._end(exchange)
            elif isinstance(exchange, _Offering):
                exchange.is_all = False  # what comes next has none of it

    def _tell(self, serial: int, make: Callable[[int, int], AnyMessage]) -> None:
        """Send what `make` makes of the serial and the floor."""
        if self.keeper:
            floor = next(iter(self._open), self._last_serial + 1)
            self._send(self.keeper, make(serial, floor))

    def _next_serial(self) -> int:
        self._last_serial += 1
        return self._last_serial

    def receive(self, sender: str, message: FromKeeper, now: float) -> None:
        exchange = self._open.get(message.serial)
        if sender != self.keeper or exchange is None or exchange.is_copying:
            return
        match message:
            case Found():
                if isinstance(exchange, _Fetch):
                    self._found(exchange, message, now)
            case Room():
                if isinstance(exchange, _Offering):
                    self._copy_out(exchange, message)

    # ---------------------------------------------------------------------------------------- fetch

    def fetch(self, sequence: Tracked, tokens_per_s: float, now: float) -> bool:
        """Whether `ready` will be called for it; else there is nothing to wait for.
        `tokens_per_s`: how fast its prompt would be computed; 0: unknown."""
        wanted = (sequence.length - 1) // self._page_tokens
        if not self.keeper or wanted < 1 or len(self._by_sequence) >= _MAX_FETCHES:
            return False
        hashes = sequence.hashes[:wanted]  # of what was generated elsewhere there are none
        have = self._index.match(hashes)
        if have == len(hashes):
            return False
        serial, arrived_at = self._next_serial(), sequence.arrived_at
        deadline = now + _ANSWER_S
        fetch = _Fetch(
            serial, sequence, arrived_at, hashes, have, sequence.tenant, tokens_per_s, deadline
        )
        self._open[serial] = self._by_sequence[sequence] = fetch
        bisect.insort(self._queue, fetch, key=lambda each: each.arrived_at)
        chain = b"".join(hashes)
        self._tell(serial, lambda s, floor: Find(s, floor, chain, tokens_per_s, have))
        return True

    def __contains__(self, sequence: Tracked) -> bool:
        return sequence in self._by_sequence

    def __len__(self) -> int:
        return len(self._by_sequence)

    def leave(self, sequence: Tracked) -> None:
        """The request has ended, or goes on without its pages."""
        fetch = self._by_sequence.pop(sequence, None)
        if fetch is not None:
            fetch.sequence = None
            if fetch.is_copying:
                self._num_copying -= 1
            else:
                self._end(fetch)

    def _found(self, fetch: _Fetch, message: Found, now: float) -> None:
        num_pages = message.num_pages
        if (
            not 0 <= num_pages <= len(fetch.hashes)
            or [len(slots) for slots in message.slots] != [4 * num_pages] * len(self._groups)
            or not 0 <= message.num_read <= num_pages
        ):
            return  # unsound: as if it had not come
        if fetch.found is None:
            fetch.deadline = now + self._patience(
                len(fetch.hashes) - max(message.num_pages, fetch.have), fetch.tokens_per_s
            )
        fetch.found = message

    def _patience(self, num_pages: int, tokens_per_s: float) -> float:
        """How long storage is waited for that may bring so many pages: never longer than it takes
        to compute them."""
        num_tokens = num_pages * self._page_tokens
        longest = min(_READ_S, num_tokens / tokens_per_s) if tokens_per_s else _READ_S
        if self._storage.prefetch != "timeout":
            return longest
        patience = num_tokens / 1000 * self._storage.prefetch_timeout_per_1k
        return min(longest, self._storage.prefetch_timeout + patience)

    def advance(self, tokens_per_s: float, now: float) -> None:
        """Begin the copies of those that come next, as many as could be started soon."""
        self.lacks_pages_since = NEVER
        room = self._scheduler.num_free_rows + 1 - self._num_copying
        for fetch in sorted(self._queue, key=lambda each: self._turn(each, now)):
            if self._scheduler.num_waiting_before(self._turn(fetch, now), room, now) >= room:
                return
            if fetch.found is None:
                room -= 1
            elif fetch.found.is_last:
                room -= 1
                self._copy_in(fetch, fetch.found, tokens_per_s, now)
                if self.lacks_pages_since < NEVER:
                    return  # what there is is for this one
            elif self._storage.prefetch == "best_effort":
                room -= 1
                self._ask_to_end(fetch, now)
            # Any other waits for storage, and needs no row soon.

    def _turn(self, fetch: _Fetch, now: float) -> Turn:
        """Of one in the queue."""
        assert fetch.sequence is not None
        return self._scheduler.turns.of(fetch.sequence, now)

    def _ask_to_end(self, fetch: _Fetch, now: float) -> None:
        if not fetch.asked_to_end:
            fetch.asked_to_end = True
            fetch.deadline = now + _ANSWER_S
            self._tell(fetch.serial, Take)

    def _copy_in(self, fetch: _Fetch, found: Found, tokens_per_s: float, now: float) -> None:
        hashes = fetch.hashes[: found.num_pages]
        begin = self._index.match(hashes)
        host = [unpack_ints(slots)[begin:] for slots in found.slots]
        firsts, counts = _wanted(host)
        num_tokens = (len(hashes) - begin) * self._page_tokens
        verdict = Verdict.RECOMPUTE
        if num_tokens:
            verdict = self._judge(self._bytes(counts), num_tokens, tokens_per_s, now)
        if verdict is Verdict.RECOMPUTE:
            self._end(fetch)
            return
        is_probe = verdict is Verdict.PROBE
        if is_probe and not all(group.kind == "sliding" for group in self._groups):
            del hashes[begin + _PROBE_PAGES :]
            host = [slots[:_PROBE_PAGES] for slots in host]
            firsts, counts = _wanted(host)
        # What comes before must not make room for what follows.
        fetch.slots = self._index.acquire(hashes[:begin])
        first_pages = [begin + first for first in firsts]
        if not self._index.can_allocate(counts, first_pages):
            for g, acquired in enumerate(fetch.slots):
                self._index.release(g, acquired)
            fetch.slots = []
            if is_probe:
                self._end(fetch)
            else:
                self.lacks_pages_since = self._turn(fetch, now)
            return
        for g, wanted in enumerate(host):
            slots = self._index.allocate(g, counts[g], first_pages[g])
            assert slots is not None
            fetch.slots[g] += [-1] * firsts[g] + slots
            host[g] = np.where(np.arange(len(wanted)) < firsts[g], -1, wanted)
        fetch.hashes, fetch.begin = hashes, begin
        fetch.started_at, fetch.num_bytes = now, self._bytes(counts)
        # Whatever was predicted, it is waited for no longer than computing takes.
        fetch.deadline = now + (num_tokens / tokens_per_s if tokens_per_s else math.inf)
        self._queue.remove(fetch)
        self._num_copying += 1
        self._copy(fetch, [slots[begin:] for slots in fetch.slots], host, to_host=False)
        if is_probe:
            self._let_go(fetch)

    def _judge(self, num_bytes: int, num_tokens: int, tokens_per_s: float, now: float) -> Verdict:
        copying = [each for each in self._copies.values() if isinstance(each, _Fetch)]
        queued = sum(each.num_bytes for each in copying)
        since = min((each.started_at for each in copying), default=now)
        return self._cost.judge(num_bytes, 1, num_tokens, tokens_per_s, now, queued, since)

    def _let_go(self, fetch: _Fetch) -> None:
        """Its request goes on without its pages, while they are still copied."""
        assert fetch.sequence is not None
        sequence = fetch.sequence
        self.leave(sequence)
        sequence.is_fetched = True
        self._ready(sequence)

    def _copied_in(self, fetch: _Fetch, event: PagesCopied, now: float) -> None:
        self._num_copying -= fetch.sequence is not None
        begin, hashes, slots = fetch.begin, fetch.hashes, fetch.slots
        if event.error is None:
            if fetch.started_at >= self._copied_in_at:  # it did not wait for another one
                self._cost.add_trip(max(0.0, now - fetch.started_at - event.seconds))
            self._cost.add_read(event.bytes_moved, now - event.seconds, now)
            self._copied_in_at = now
            self.pages_in += len(hashes) - begin
            self.bytes_in += event.bytes_moved
            self.seconds_in += event.seconds
            parent = hashes[begin - 1] if begin else b""
            new = [pages[begin:] for pages in slots]
            self._index.insert(parent, hashes[begin:], new, begin, fetch.tenant or None)
            if fetch.sequence is not None and fetch.found is not None:
                num_read = min(fetch.found.num_read, len(hashes) - begin)
                fetch.sequence.host_tokens = (len(hashes) - begin) * self._page_tokens
                fetch.sequence.storage_tokens = num_read * self._page_tokens
        self._end(fetch)

    # --------------------------------------------------------------------------------------- offers

    def published(self, sequence: Tracked, begin: int, end: int) -> None:
        """Pages of a sequence, from `begin` to before `end`, are complete and in the index."""
        for page_hash in sequence.hashes[begin:end] if self._written else ():
            self._written.pop(page_hash, None)  # the host tier may have lost it as well
        if self._writes == "write_through":
            self._offer(sequence.hashes[:end], sequence.tables, begin, sequence.tenant)
        else:
            self._used(sequence, begin, end)

    def reused(self, sequence: Tracked, num_pages: int) -> None:
        """So many leading pages of a sequence were found in the device tier."""
        self._used(sequence, 0, num_pages)

    def _used(self, sequence: Tracked, begin: int, end: int) -> None:
        if self._selective is not None and self.keeper:
            first, last = self._selective.used(sequence.hashes[:end], begin)
            if last:
                self._offer(sequence.hashes[:last], sequence.tables, first, sequence.tenant)

    def _write_back(self, now: float) -> None:
        """Offer what is next to be evicted, in time."""
        spare = int(self._pool_pages * _SPARE_SHARE)
        if self._num_offered or self._index.num_free(0) >= spare:
            return
        named = 0
        for last in self._index.next_evicted(spare):
            when, pause_s = self._written.get(last, (now, _AGAIN_S))
            if now < when:
                continue
            if named > _MAX_NAMED or (named and self._num_offered >= self._max_offered):
                return
            self._offer_again(last, now + pause_s, 2 * pause_s)
            hashes = self._index.chain(last)
            named += len(hashes)
            tenant = self._index.tenant_of(last) or ""
            self._offer(hashes, self._index.resident(hashes), len(hashes) - 1, tenant)

    def _offer_again(self, last: bytes, when: float, pause_s: float = _AGAIN_S) -> None:
        """What ends in this page, if it is next to be evicted then."""
        if self._writes == "write_back" and self.keeper:
            self._written[last] = when, pause_s
            self._written.move_to_end(last)
            if len(self._written) > _CHAINS_KEPT * self._pool_pages:
                self._written.popitem(last=False)

    def _offer(
        self, hashes: list[bytes], tables: Sequence[Sequence[int]], new: int, tenant: str
    ) -> None:
        end = len(hashes)
        if not self.keeper:
            return
        if self._num_offered and self._num_offered + end - new > self._max_offered:
            self.dropped_offers += end - new
            return
        slots = [list(table[:end]) for table in tables]
        offer = _Offering(self._next_serial(), hashes, slots, end - new)
        for g, pages in enumerate(slots):
            self._index.retain(g, pages)
        self._num_offered += offer.new
        self._open[offer.serial] = offer
        have = tuple(_first_held(pages) for pages in slots)
        chain = b"".join(hashes)
        self._tell(offer.serial, lambda s, floor: Offer(s, floor, new, chain, have, tenant))

    def _copy_out(self, offer: _Offering, room: Room) -> None:
        host = [unpack_ints(slots[: len(slots) // 4 * 4]) for slots in room.slots]
        offer.count = len(host[0]) if host else 0
        is_whole = [len(slots) for slots in host] == [offer.count] * len(self._groups)
        if not is_whole or not 0 <= room.first <= len(offer.hashes) - offer.count:
            offer.count = 0
        elif room.first + offer.count == len(offer.hashes):
            offer.is_all = True
            if not offer.count:
                self._offer_again(offer.hashes[-1], math.inf)
        device = [slots[room.first : room.first + offer.count] for slots in offer.slots]
        # Without room, or given some for pages that were not offered.
        if not offer.count or any(
            ours < 0 <= theirs
            for mine, given in zip(device, host, strict=True)
            for ours, theirs in zip(mine, given.tolist(), strict=True)
        ):
            self._end(offer)
            return
        self._copy(offer, device, host, to_host=True)

    def _copied_out(self, offer: _Offering, event: PagesCopied, now: float) -> None:
        if event.error is None:
            if not self._cost.reads.bytes_per_s:
                self._cost.add_read(event.bytes_moved, now - event.seconds, now)
            self.pages_out += offer.count
            self.bytes_out += event.bytes_moved
            self.seconds_out += event.seconds
            count = offer.count
            self._tell(offer.serial, lambda s, floor: Copied(s, floor, count))
            if offer.is_all:
                self._offer_again(offer.hashes[-1], math.inf)
        self._end(offer)

    # --------------------------------------------------------------------------------------- copies

    def _copy(
        self,
        exchange: _Fetch | _Offering,
        device: Sequence[Sequence[int]],
        host: Sequence[Int32Array],
        to_host: bool,
    ) -> None:
        copy_id = next(self._numbers)
        self._copies[copy_id] = exchange
        exchange.is_copying = True
        chosen = [slots >= 0 for slots in host]
        device_pages = tuple(
            np.asarray(pages, np.int32)[which] for pages, which in zip(device, chosen, strict=True)
        )
        host_pages = tuple(pages[which] for pages, which in zip(host, chosen, strict=True))
        self._emit(CopyPages(copy_id, device_pages, host_pages, to_host))

    def copied(self, event: PagesCopied, now: float) -> None:
        exchange = self._copies.pop(event.copy_id)
        exchange.is_copying = False
        if event.error is not None:
            self._emit(Warn(f"a copy between device and host tier failed: {event.error}"))
        if isinstance(exchange, _Fetch):
            self._copied_in(exchange, event, now)
        else:
            self._copied_out(exchange, event, now)

    def _bytes(self, counts: Sequence[int]) -> int:
        return sum(n * size for n, size in zip(counts, self._page_bytes, strict=True))

    def _end(self, exchange: _Fetch | _Offering) -> None:
        """It is over on this side, and no copy of it under way."""
        self._open.pop(exchange.serial)
        self._tell(exchange.serial, Close)
        for g, slots in enumerate(exchange.slots):
            # What goes out because it is next to be evicted must stay so.
            self._index.release(g, slots, is_use=isinstance(exchange, _Fetch))
        if isinstance(exchange, _Offering):
            self._num_offered -= exchange.new
            return
        if exchange in self._queue:
            self._queue.remove(exchange)
        if exchange.sequence is not None:
            del self._by_sequence[exchange.sequence]
            exchange.sequence.is_fetched = True
            self._ready(exchange.sequence)

    def tick(self, now: float) -> None:
        if self._writes == "write_back" and self.keeper:
            self._write_back(now)
        for exchange in list(self._open.values()):
            if not exchange.deadline:
                exchange.deadline = now + _ANSWER_S
            if now < exchange.deadline:
                continue
            if exchange.is_copying:
                if isinstance(exchange, _Fetch) and exchange.sequence is not None:
                    self._let_go(exchange)
            elif isinstance(exchange, _Offering) or exchange.found is None:
                self._end(exchange)
            elif not exchange.found.is_last:
                if exchange.asked_to_end:  # there was no answer: use what was found at first
                    exchange.found = msgspec.structs.replace(exchange.found, is_last=True)
                else:
                    self._ask_to_end(exchange, now)
        if self._open:
            self._quiet_since = now
        elif self.keeper and self._last_serial and now > self._quiet_since + _QUIET_S:
            # The message that closed the last one may have been lost, and so may this one.
            self._quiet_since = now
            self._tell(self._last_serial, Close)

    # ------------------------------------------------------------------------------------ integrity

    @property
    def is_idle(self) -> bool:
        return not (self._open or self._copies or self._by_sequence)

    def held(self) -> Iterator[tuple[int, list[int]]]:
        """(group, pages) of all references that are held here."""
        for exchange in self._open.values():
            yield from enumerate(exchange.slots)

    def check_integrity(self) -> None:
        fetches = [each for each in self._open.values() if isinstance(each, _Fetch)]
        offers = [each for each in self._open.values() if isinstance(each, _Offering)]
        waiting = {each.sequence: each for each in fetches if each.sequence is not None}
        assert waiting == self._by_sequence, "fetches are not those of their sequences"
        assert set(self._queue) == {each for each in fetches if not each.is_copying}
        copying = {each for each in self._open.values() if each.is_copying}
        assert set(self._copies.values()) == copying, "a copy belongs to nothing"
        assert self._num_copying == sum(each.is_copying for each in waiting.values())
        assert self._num_offered == sum(each.new for each in offers)


def _wanted(host: Sequence[Int32Array]) -> tuple[list[int], list[int]]:
    """By layer group, of slots: what follows the last page that is not there (of a sliding group
    the last window), as the place of the first and the number."""
    firsts = [int(np.flatnonzero(slots < 0).max(initial=-1)) + 1 for slots in host]
    return firsts, [len(slots) - first for slots, first in zip(host, firsts, strict=True)]


def _first_held(pages: Sequence[int]) -> int:
    """The first page after the last one that is not there."""
    for page in range(len(pages), 0, -1):
        if pages[page - 1] < 0:
            return page
    return 0


class RecentRate:
    """So many a second: the mean over some of the last."""

    def __init__(self, forget: float) -> None:
        """`forget`: what each weighs against the next one."""
        self._forget = forget
        self._count = self._seconds = 0.0

    @property
    def per_s(self) -> float:
        """0: unknown."""
        return self._count / self._seconds if self._seconds else 0.0

    def measured(self, count: int, seconds: float) -> None:
        self._count = self._count * self._forget + count
        self._seconds = self._seconds * self._forget + seconds
