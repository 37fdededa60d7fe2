"""Where routers send a recorded load, and what that hits: `pd bench router TRACE`.

A simulation on a virtual clock: the real router, page map, page feeds and page indexes; the same
trace gives the same figures, always. Prefill replicas compute one prompt after the other in order
of arrival, at a fixed speed; a prompt is matched when its turn comes, and its pages are in the
index when it is done. There is one decode replica, which takes no time. Reports come every half
second from each replica, in turns, changes of pages when the feed gives them, and both without
delay. One page is one block of the trace, one layer group with full attention, eviction by last
use. There may be host tiers, each shared by some replicas, and a storage tier shared by all: what
is computed is kept there at once, what is not in the nearer ones is loaded from there at a fixed
speed. The router knows of neither.

Load is what a replica has computed: prompt tokens that it did not find in any tier. Time to first
token is waiting, loading and computing.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

from hicache.index import PageIndex
from hicache.keys import root_hash
from hicache.replay import Trace
from pd.bench.errors import BenchError
from pd.bench.stats import percentile
from pd.messages import PagesChanged, PagesHeld, PagesWanted, ReplicaLoad
from pd.page_feed import EVERY_S, PageFeed
from pd.router import Policy, Router
from transfer.layout import LayerGroup

_REPORT_S = 0.5
"""As of nodes (pd/node.py)."""
_ROOT = root_hash("trace")
_DECODE = "decode-0"


@dataclasses.dataclass(frozen=True, slots=True)
class PlacementOptions:
    replicas: int = 10
    room_tokens: int = 3_000_000
    """In the device tier of each."""
    tokens_per_s: float = 10_000.0
    """That a replica computes."""
    host_room_tokens: int = 0
    """In each host tier; 0: there is none."""
    host_replicas: int = 5
    """That share one."""
    storage_room_tokens: int = 0
    host_tokens_per_s: float = 300_000.0
    """That are loaded: 8B-shaped KV in bfloat16 at 44 GB/s."""
    storage_tokens_per_s: float = 30_000.0
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class PlacementRow:
    policy: Policy
    tokens_per_s: float
    hit_rate: float
    """Prompt tokens found cached, of all; in whatever tier."""
    host_hit_rate: float
    """Of all prompt tokens those that came from there; and here."""
    storage_hit_rate: float
    max_over_mean: float
    """Of tokens computed, by replica."""
    ttft_mean_s: float
    ttft_p99_s: float
    computed_tokens: tuple[int, ...]
    """By replica."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(slots=True)
class _Request:
    arrived_s: float
    num_tokens: int
    hashes: list[bytes]


def _make_index(room_tokens: int, block_tokens: int, feed: bool = False) -> PageIndex:
    group = LayerGroup("full", (0,), kv_heads=1, head_dim=1)
    return PageIndex([group], [room_tokens // block_tokens + 1], block_tokens, feed=feed)


class _Tier:
    """Pages that several replicas share."""

    def __init__(self, room_tokens: int, block_tokens: int, tokens_per_s: float) -> None:
        self.tokens_per_s = tokens_per_s
        self.hit_tokens = 0
        self._index = _make_index(room_tokens, block_tokens)

    def match(self, hashes: list[bytes]) -> int:
        """How many of the first pages are there; they are used now."""
        hit = self._index.match(hashes)
        (slots,) = self._index.acquire(hashes[:hit])
        self._index.release(0, slots)
        return hit

    def keep(self, hashes: list[bytes]) -> None:
        hit = self._index.match(hashes)
        (table,) = self._index.acquire(hashes[:hit])
        slots = self._index.allocate(0, len(hashes) - hit)
        assert slots is not None, "nothing else is in use"
        parent = hashes[hit - 1] if hit else _ROOT
        self._index.insert(parent, hashes[hit:], [slots], hit)
        self._index.release(0, table + slots)


class _Replica:
    def __init__(
        self, name: str, trace: Trace, options: PlacementOptions, tiers: list[_Tier]
    ) -> None:
        self.name = name
        block_tokens = trace.block_tokens
        self.index = _make_index(options.room_tokens, block_tokens, feed=True)
        self.tiers = tiers
        """The nearest first."""
        self.feed = PageFeed()
        self.waiting: deque[_Request] = deque()
        self.running: _Request | None = None
        self.ends_at = 0.0
        self.computed = self.hit_tokens = 0
        self.tells_at = 0.0
        """The next time at which its feed is asked."""
        self._block_tokens = block_tokens
        self._speed = options.tokens_per_s
        self._table: list[int] = []
        self._hit = 0

    def start(self, now: float) -> None:
        """The next one that waits."""
        self.running = request = self.waiting.popleft()
        hashes = request.hashes
        self._hit = found = self.index.match(hashes)
        cached, load_s = self._cached(request, found), 0.0
        for tier in self.tiers:
            found = max(found, tier.match(hashes))
            loaded = self._cached(request, found) - cached
            tier.hit_tokens += loaded
            cached += loaded
            load_s += loaded / tier.tokens_per_s
        (self._table,) = self.index.acquire(hashes[: self._hit])
        slots = self.index.allocate(0, len(hashes) - self._hit)
        assert slots is not None, "nothing else is in use"
        self._table += slots
        self.hit_tokens += cached
        self.computed += request.num_tokens - cached
        self.ends_at = now + load_s + (request.num_tokens - cached) / self._speed

    def end(self) -> _Request:
        request, self.running = self.running, None
        assert request is not None
        hit, hashes = self._hit, request.hashes
        parent = hashes[hit - 1] if hit else _ROOT
        self.index.insert(parent, hashes[hit:], [self._table[hit:]], hit)
        self.index.release(0, self._table)
        for tier in self.tiers:
            tier.keep(hashes)
        return request

    def _cached(self, request: _Request, num_pages: int) -> int:
        """Tokens; the last one of a prompt is always computed, for its logits."""
        return min(num_pages * self._block_tokens, request.num_tokens - 1)

    def load(self, now: float) -> ReplicaLoad:
        left = int((self.ends_at - now) * self._speed) if self.running is not None else 0
        for request in self.waiting:
            left += request.num_tokens - self._cached(request, self.index.match(request.hashes))
        return ReplicaLoad(
            waiting=len(self.waiting),
            running=self.running is not None,
            waiting_tokens=left,
            pages_free=(self.index.num_free(0),),
            pages_cached=(self.index.num_cached(0),),
            pages_used=(self.index.num_used(0),),
            prefill_tokens=self.computed,
            cached_tokens=self.hit_tokens,
            prefill_tokens_per_s=self._speed,
            pages_told=self.feed.sequence,
        )


def simulate_placement(
    trace: Trace,
    policy: Policy,
    options: PlacementOptions,
    on_request: Callable[[int], None] = lambda done: None,
) -> PlacementRow:
    """`on_request` is called now and then, with the requests placed. Raises BenchError."""
    longest = max(len(request.blocks) for request in trace.requests) * trace.block_tokens
    rooms = {"--room": options.room_tokens}
    rooms |= {"--host-room": options.host_room_tokens} if options.host_room_tokens else {}
    rooms |= {"--storage-room": options.storage_room_tokens} if options.storage_room_tokens else {}
    for key, room in rooms.items():
        if longest > room:
            raise BenchError(
                f"{key}: found {room} tokens, expected at least {longest}, for the longest prompt"
            )
    return _Simulation(trace, policy, options).run(on_request)


class _Simulation:
    def __init__(self, trace: Trace, policy: Policy, options: PlacementOptions) -> None:
        self._trace = trace
        self._policy: Policy = policy
        self._options = options
        self._router = Router(1, policy, trace.block_tokens, seed=str(options.seed))
        self._hosts, self._storage = self._make_tiers()
        self._replicas: dict[str, _Replica] = {}
        for number in range(options.replicas):
            host = number // options.host_replicas
            tiers = self._hosts[host : host + 1] + self._storage
            name = f"prefill-{number}"
            self._replicas[name] = _Replica(name, trace, options, tiers)
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        """A heap; each is called with its time."""
        self._order = itertools.count()
        self._num_arrived = 0
        self._ttfts: list[float] = []

    def _make_tiers(self) -> tuple[list[_Tier], list[_Tier]]:
        options, block_tokens = self._options, self._trace.block_tokens
        num_hosts = -(-options.replicas // options.host_replicas)
        rooms = [options.host_room_tokens] * num_hosts if options.host_room_tokens else []
        hosts = [_Tier(room, block_tokens, options.host_tokens_per_s) for room in rooms]
        rooms = [options.storage_room_tokens] if options.storage_room_tokens else []
        return hosts, [_Tier(room, block_tokens, options.storage_tokens_per_s) for room in rooms]

    def run(self, on_request: Callable[[int], None]) -> PlacementRow:
        router, trace = self._router, self._trace
        router.update(_DECODE, "decode", None)
        for number, replica in enumerate(self._replicas.values()):
            self._ask(replica, router.update(replica.name, "prefill", None, 0.0), 0.0)
            self._report_at(replica, _REPORT_S * number / len(self._replicas))
        arrivals = sorted(trace.requests, key=lambda request: request.arrived_s)
        names = [number.to_bytes(32, "little") for number in range(trace.num_distinct)]
        for request in arrivals:
            self._run_until(request.arrived_s)
            hashes = [names[block] for block in request.blocks]
            self._arrive(_Request(request.arrived_s, request.num_tokens, hashes))
            self._num_arrived += 1
            if not self._num_arrived % 256:
                on_request(self._num_arrived)
        self._run_until(float("inf"))
        on_request(self._num_arrived)
        return self._row()

    def _row(self) -> PlacementRow:
        replicas = list(self._replicas.values())
        computed = [replica.computed for replica in replicas]
        ttfts = sorted(self._ttfts)
        return PlacementRow(
            policy=self._policy,
            tokens_per_s=self._options.tokens_per_s,
            hit_rate=sum(replica.hit_tokens for replica in replicas) / self._trace.num_tokens,
            host_hit_rate=self._hit_rate(self._hosts),
            storage_hit_rate=self._hit_rate(self._storage),
            max_over_mean=max(computed) * len(computed) / sum(computed),
            ttft_mean_s=sum(ttfts) / len(ttfts),
            ttft_p99_s=percentile(ttfts, 99),
            computed_tokens=tuple(computed),
        )

    def _hit_rate(self, tiers: list[_Tier]) -> float:
        return sum(tier.hit_tokens for tier in tiers) / self._trace.num_tokens

    def _run_until(self, time: float) -> None:
        while self._events and self._events[0][0] <= time:
            now, _, event = heapq.heappop(self._events)
            event(now)

    def _at(self, time: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _arrive(self, request: _Request) -> None:
        full = request.num_tokens // self._trace.block_tokens
        pages = b"".join(request.hashes[:full])
        replica = self._replicas[self._router.place(request.num_tokens, pages).prefill]
        replica.waiting.append(request)
        self._start(replica, request.arrived_s)

    def _start(self, replica: _Replica, now: float) -> None:
        if replica.running is None and replica.waiting:
            replica.start(now)
            self._at(replica.ends_at, lambda now: self._end(replica, now))

    def _end(self, replica: _Replica, now: float) -> None:
        request = replica.end()
        self._ttfts.append(now - request.arrived_s)
        self._start(replica, now)
        replica.feed.note(replica.index.take_changes())
        if replica.tells_at <= now:
            self._tell(replica, now)
        elif replica.tells_at < float("inf"):
            self._at(replica.tells_at, lambda now: self._tell(replica, now))
            replica.tells_at = float("inf")

    def _tell(self, replica: _Replica, now: float) -> None:
        for _, message in replica.feed.take_messages(now):
            self._receive(replica, message, now)
        replica.tells_at = now + EVERY_S

    def _receive(self, replica: _Replica, message: PagesChanged | PagesHeld, now: float) -> None:
        self._ask(replica, self._router.receive_pages(replica.name, message, now), now)

    def _ask(self, replica: _Replica, wanted: PagesWanted | None, now: float) -> None:
        if wanted is not None:
            replica.feed.wanted("api-0", wanted.serial)

    def _report_at(self, replica: _Replica, time: float) -> None:
        def report(now: float) -> None:
            load = replica.load(now)
            self._ask(replica, self._router.update(replica.name, "prefill", load, now), now)
            if replica.tells_at <= now:
                self._tell(replica, now)
            if self._num_arrived < len(self._trace.requests):
                self._report_at(replica, now + _REPORT_S)

        self._at(time, report)
