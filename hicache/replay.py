"""A trace of requests replayed through the page index: what a cache of given sizes would have hit.

Pure; the same trace gives the same figures, always. One layer group with full attention, one slot
for a block. Requests are served one after the other, in the order of the trace's lines, each to its
end: it matches its leading blocks, takes room for the others, inserts all, and releases them. Of a
request that is longer than the whole cache, the leading blocks that fit are cached. The last block
of a prompt may be partly filled, and counts as a block; by token, it counts its tokens.

A host tier and a storage may lie below the device tier, each with an index of its own (`Tiers`).
They are used as in serving (pd/caching.py, hicache/keeper.py), but every copy ends before the next
step, and always beats computing. A request that the device tier lacks
blocks for looks in the host tier; what storage has beyond is read into that, whatever the device
tier has of it; and what was found enters the device tier before the request starts. Each block
counts once, in the first tier that had it. Blocks are offered to the host tier by the write policy,
and what enters that as offered is written to storage, which evicts by last use.

The format is Mooncake's: JSON lines with timestamp, input_length, output_length and hash_ids, where
equal ids stand for equal blocks after equal prefixes. A block that the trace lists after two
different ones is taken as two.

Belady's optimum is that of a cache that knows the future: after each request it keeps, of the
blocks that it had and those of the request, the ones that are used soonest. It may refuse to keep a
new block, and its room counts between requests. A block's next use is never after that of a block
that continues it, and ties are settled for the shallower one, so what it keeps is prefix-closed:
the rule costs it nothing, and it is the limit of hits by block for any order of the index, and for
any cache of single blocks too. Of several tiers, the first ones together can hit no more than it
does with the room of all of them.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hicache.index import PageIndex
from hicache.keys import HASH_BYTES, root_hash
from hicache.policy import prefix_cost
from hicache.writes import WRITE_POLICIES, SelectiveWrites
from transfer.layout import LayerGroup

OPTIMUM = "belady"
BLOCK_TOKENS = 512
"""Of the published traces."""
INFINITE = 2**63 - 1
"""Blocks."""
TIER_NAMES = ("device", "host", "storage")
_ROOT = root_hash("trace")


class TraceError(ValueError):
    """A line of a trace that is none; names the line, the field, and what was expected."""


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRequest:
    num_tokens: int
    """Of the prompt."""
    blocks: tuple[int, ...]
    """Numbers from 0 in order of first use: one for each different prefix."""
    arrived_s: float = 0.0
    num_output: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    requests: tuple[TraceRequest, ...]
    block_tokens: int
    num_blocks: int
    """References to blocks, in all."""
    num_distinct: int
    num_tokens: int
    work: int
    """To compute all prompts, in policy.py's units: deeper blocks cost more."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tiers:
    """Below the device tier; sizes in blocks, of which `INFINITE` is enough."""

    host: int
    storage: int = 0
    """0: there is none."""
    write: str = "write_through"
    write_hits: int = 2
    """write_through_selective: uses after which a block is offered."""


@dataclasses.dataclass(frozen=True, slots=True)
class TierHits:
    name: str
    """device, host or storage."""
    capacity: int
    """In blocks."""
    hits: int
    """Blocks that this tier had and those above it lacked."""
    hit_tokens: int
    hit_work: int
    """Of all prompts' `work`, what these hits save."""
    evictions: int


@dataclasses.dataclass(frozen=True, slots=True)
class ReplayResult:
    order: str
    """Of eviction, or `OPTIMUM`."""
    write: str | None
    """None: the device tier is the only one, or the optimum's, which has no policy."""
    tiers: tuple[TierHits, ...]
    """From the device tier on."""

    @property
    def capacity(self) -> int:
        """Of the device tier."""
        return self.tiers[0].capacity

    @property
    def hits(self) -> int:
        """Of all tiers, like those that follow. The other blocks were computed."""
        return sum(tier.hits for tier in self.tiers)

    @property
    def hit_tokens(self) -> int:
        return sum(tier.hit_tokens for tier in self.tiers)

    @property
    def hit_work(self) -> int:
        return sum(tier.hit_work for tier in self.tiers)

    @property
    def evictions(self) -> int:
        return sum(tier.evictions for tier in self.tiers)


# ------------------------------------------------------------------------------------ the trace


def parse_trace(lines: Iterable[str], block_tokens: int = BLOCK_TOKENS) -> Trace:
    """Empty lines are skipped, unknown fields ignored. Raises TraceError."""
    if block_tokens < 1:
        raise TraceError(f"tokens of a block: found {block_tokens}, expected at least 1")
    requests = []
    numbers: dict[tuple[int, int], int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        num_tokens, num_output, ids, arrived_s = _parse_line(line, number, block_tokens)
        blocks = []
        parent = -1
        for block_id in ids:
            parent = numbers.setdefault((parent, block_id), len(numbers))
            blocks.append(parent)
        requests.append(TraceRequest(num_tokens, tuple(blocks), arrived_s, num_output))
    if not requests:
        raise TraceError("the trace has no requests")
    return Trace(
        requests=tuple(requests),
        block_tokens=block_tokens,
        num_blocks=sum(len(request.blocks) for request in requests),
        num_distinct=len(numbers),
        num_tokens=sum(request.num_tokens for request in requests),
        work=sum(prefix_cost(len(request.blocks), block_tokens) for request in requests),
    )


def _parse_line(line: str, number: int, block_tokens: int) -> tuple[int, int, list[int], float]:
    """(prompt tokens, output tokens, hash ids, seconds)"""
    try:
        item = json.loads(line)
    except ValueError as error:
        raise TraceError(f"line {number}: not JSON: {error}") from error
    if not isinstance(item, dict):
        raise TraceError(f"line {number}: found {_shown(item)}, expected a JSON object")
    timestamp = _field(item, "timestamp", number, "milliseconds, 0 or more")
    if not isinstance(timestamp, int | float) or isinstance(timestamp, bool) or not timestamp >= 0:
        raise _wrong(number, "timestamp", timestamp, "milliseconds, 0 or more")
    num_tokens = _field(item, "input_length", number, "a whole number, 1 or more")
    if not _is_count(num_tokens) or num_tokens < 1:
        raise _wrong(number, "input_length", num_tokens, "a whole number, 1 or more")
    num_output = _field(item, "output_length", number, "a whole number, 0 or more")
    if not _is_count(num_output):
        raise _wrong(number, "output_length", num_output, "a whole number, 0 or more")
    ids = _field(item, "hash_ids", number, "a list of whole numbers")
    if not isinstance(ids, list):
        raise _wrong(number, "hash_ids", ids, "a list of whole numbers")
    for place, block_id in enumerate(ids):
        if not _is_count(block_id):
            raise _wrong(number, f"hash_ids[{place}]", block_id, "a whole number, 0 or more")
    expected = -(-num_tokens // block_tokens)
    if len(ids) != expected:
        raise TraceError(
            f"line {number}: hash_ids: found {len(ids)} blocks, expected {expected}, for "
            f"input_length {num_tokens} in blocks of {block_tokens} tokens"
        )
    return num_tokens, num_output, ids, timestamp / 1000


def _field(item: dict[str, Any], name: str, number: int, expected: str) -> Any:
    if name not in item:
        raise TraceError(f"line {number}: {name}: missing, expected {expected}")
    return item[name]


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _wrong(number: int, field: str, value: object, expected: str) -> TraceError:
    return TraceError(f"line {number}: {field}: found {_shown(value)}, expected {expected}")


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# ------------------------------------------------------------------------------------ the replay


def replay(
    trace: Trace,
    capacity: int,
    order: str,
    on_request: Callable[[int], None] = lambda done: None,
    tiers: Tiers | None = None,
) -> ReplayResult:
    """Through the real index, of which the device tier has `capacity` blocks. `on_request` is
    called now and then, with the requests done. Raises ValueError for an order or a write policy
    that there is not, or a capacity below 1."""
    device = _make_index(trace, "capacity", capacity, order)
    lower = _Lower(trace, device, capacity, order, tiers) if tiers is not None else None
    hash_of = [number.to_bytes(HASH_BYTES, "little") for number in range(trace.num_distinct)]
    count = _Count(trace, 1 if lower is None else len(lower.indexes) + 1)
    for done, request in enumerate(trace.requests):
        hashes = [hash_of[block] for block in request.blocks]
        hit = device.match(hashes)
        if lower is None or hit == len(hashes):
            count.add(request, hit)
        else:
            count.add(request, hit, *lower.fetch(hashes[:capacity], hit))
            hit = device.match(hashes)
        (table,) = device.acquire(hashes[:hit])
        end = min(len(hashes), capacity)
        if lower is not None:
            lower.reused(hashes[:hit])
            lower.before_eviction(end - hit)
        slots = device.allocate(0, end - hit)
        assert slots is not None, "nothing else is in use"
        device.insert(hashes[hit - 1] if hit else _ROOT, hashes[hit:end], [slots], hit)
        if lower is not None and end > hit:
            lower.computed(hashes[:end], hit)
        device.release(0, table + slots)
        if done % 256 == 255:
            on_request(done + 1)
    on_request(len(trace.requests))
    indexes = [device] if lower is None else [device, *lower.indexes]
    sizes = [capacity] if lower is None else [capacity, *lower.sizes]
    evictions = [index.evictions for index in indexes]
    write = None if tiers is None else tiers.write
    return ReplayResult(order, write, count.tiers(sizes, evictions))


def _make_index(trace: Trace, what: str, capacity: int, order: str) -> PageIndex:
    if capacity < 1:
        raise ValueError(f"{what}: found {capacity}, expected at least 1 block")
    group = LayerGroup("full", (0,), kv_heads=1, head_dim=1)
    room = trace.num_distinct if capacity == INFINITE else capacity
    return PageIndex([group], [room + 1], trace.block_tokens, order=order)


class _Count:
    """Hits by tier."""

    def __init__(self, trace: Trace, num_tiers: int) -> None:
        self._block_tokens = trace.block_tokens
        self._hits, self._tokens, self._work = ([0] * num_tiers for _ in range(3))

    def add(self, request: TraceRequest, *ends: int) -> None:
        """By tier, the end of the leading blocks that it or those above it had; those that are not
        given had no more."""
        block_tokens = self._block_tokens
        blocks = tokens = work = 0
        for tier, end in enumerate(ends):
            if end > blocks:
                self._hits[tier] += end - blocks
                all_tokens = min(end * block_tokens, request.num_tokens)
                all_work = prefix_cost(end, block_tokens)
                self._tokens[tier] += all_tokens - tokens
                self._work[tier] += all_work - work
                blocks, tokens, work = end, all_tokens, all_work

    def tiers(self, capacities: Sequence[int], evictions: Sequence[int]) -> tuple[TierHits, ...]:
        figures = zip(
            TIER_NAMES, capacities, self._hits, self._tokens, self._work, evictions, strict=False
        )
        return tuple(TierHits(*each) for each in figures)


class _Lower:
    """The tiers below one device tier, and the write policy between them."""

    def __init__(
        self, trace: Trace, device: PageIndex, capacity: int, order: str, tiers: Tiers
    ) -> None:
        if tiers.write not in WRITE_POLICIES:
            names = ", ".join(WRITE_POLICIES)
            raise ValueError(f"write: found {tiers.write!r}, expected one of {names}")
        self._device = device
        self._host = _make_index(trace, "host", tiers.host, order)
        self._storage = None
        if tiers.storage:
            self._storage = _make_index(trace, "storage", tiers.storage, "lru")
        self.indexes = [self._host, *([self._storage] if self._storage is not None else [])]
        self.sizes = [tiers.host, *([tiers.storage] if self._storage is not None else [])]
        self._write = tiers.write
        self._selective = SelectiveWrites(capacity, tiers.write_hits)

    def fetch(self, hashes: Sequence[bytes], hit: int) -> tuple[int, int]:
        """Bring what there is of these to the device tier, which has `hit` of them. The ends of
        what the host tier had, and of that with storage's."""
        host, device = self._host, self._device
        found = in_host = host.match(hashes)
        (held,) = host.acquire(hashes[:found])
        if self._storage is not None:
            found = self._read(self._storage, hashes, found)
        host.release(0, held)
        if found > hit:
            (table,) = device.acquire(hashes[:hit])
            self.before_eviction(found - hit)
            table += _insert(device, hashes[:found], hit)
            device.release(0, table)
        return in_host, found

    def _read(self, storage: PageIndex, hashes: Sequence[bytes], begin: int) -> int:
        """Storage's blocks from `begin` on, as many as the host tier has room for beside those
        before; the new end."""
        end = storage.match(hashes)
        while end > begin and not self._host.can_allocate([end - begin]):
            end -= 1
        if end <= begin:
            return begin
        (read,) = storage.acquire(hashes[:end])
        storage.release(0, read)
        self._host.release(0, _insert(self._host, hashes[:end], begin))
        return end

    # --------------------------------------------------------------------------------------- offers

    def computed(self, hashes: Sequence[bytes], begin: int) -> None:
        """Those from `begin` on were; all are in the device tier."""
        if self._write == "write_through":
            self._offer(hashes)
        else:
            self._used(hashes, begin)

    def reused(self, hashes: Sequence[bytes]) -> None:
        """A request has found these in the device tier, or they were brought there for it."""
        self._used(hashes, 0)

    def _used(self, hashes: Sequence[bytes], begin: int) -> None:
        if self._write == "write_through_selective":
            _, end = self._selective.used(hashes, begin)
            if end:
                self._offer(hashes[:end])

    def before_eviction(self, count: int) -> None:
        """Room for `count` blocks is needed in the device tier."""
        evicted = count - self._device.num_free(0)
        if self._write == "write_back" and evicted > 0:
            for last in self._device.next_evicted(evicted):
                self._offer(self._device.chain(last))

    def _offer(self, hashes: Sequence[bytes]) -> None:
        """What the host tier lacks of these enters it, half of it if that is too much, or half of
        that, as in the keeper."""
        if _add(self._host, hashes) and self._storage is not None:
            _add(self._storage, hashes)


def _add(index: PageIndex, hashes: Sequence[bytes]) -> bool:
    """Whether all of these are in the index then."""
    begin = index.match(hashes)
    count = len(hashes) - begin
    if not count:
        return True
    (before,) = index.resident(hashes[:begin])
    index.retain(0, before)
    while count and not index.can_allocate([count]):
        count //= 2
    index.release(0, _insert(index, hashes[: begin + count], begin))
    index.release(0, before, is_use=False)
    return begin + count == len(hashes)


def _insert(index: PageIndex, hashes: Sequence[bytes], begin: int) -> list[int]:
    """From `begin` on; the slots, each with a reference."""
    slots = index.allocate(0, len(hashes) - begin)
    assert slots is not None, "there is no room"
    index.insert(hashes[begin - 1] if begin else _ROOT, hashes[begin:], [slots], begin)
    return slots


def replay_infinite(trace: Trace, order: str = "lru") -> ReplayResult:
    """With room for all there is, under which all orders are alike."""
    return replay(trace, trace.num_distinct, order)


def replay_optimum(trace: Trace, capacity: int, tiers: Tiers | None = None) -> ReplayResult:
    """Belady's. The hits of tiers up to one, together, are those with the room of all of them."""
    capacities = [capacity]
    if tiers is not None:
        capacities += [tiers.host, *([tiers.storage] if tiers.storage else [])]
    results: list[TierHits] = []
    room = 0
    for name, size in zip(TIER_NAMES, capacities, strict=False):
        if size < 1:
            what = "capacity" if name == "device" else name
            raise ValueError(f"{what}: found {size}, expected at least 1 block")
        room = min(room + size, INFINITE)
        hits, tokens, work, evictions = _optimum(trace, room)
        results.append(
            TierHits(
                name,
                size,
                hits - sum(tier.hits for tier in results),
                tokens - sum(tier.hit_tokens for tier in results),
                work - sum(tier.hit_work for tier in results),
                evictions,
            )
        )
    return ReplayResult(OPTIMUM, None, tuple(results))


def _optimum(trace: Trace, capacity: int) -> tuple[int, int, int, int]:
    """(hits, their tokens and work, evictions)"""
    never = len(trace.requests)
    next_uses: list[list[int]] = []
    last_seen = [never] * trace.num_distinct
    for time in range(never - 1, -1, -1):
        blocks = trace.requests[time].blocks
        next_uses.append([last_seen[block] for block in blocks])
        for block in blocks:
            last_seen[block] = time
    next_uses.reverse()

    kept_until = [-1] * trace.num_distinct  # next use; -1: not kept
    latest: list[tuple[int, int, int]] = []  # heap: (-next use, -depth, block), perhaps outdated
    num_kept = hits = hit_tokens = hit_work = evictions = 0
    for request, uses in zip(trace.requests, next_uses, strict=True):
        hit = 0
        for depth, (block, use) in enumerate(zip(request.blocks, uses, strict=True)):
            was_kept = kept_until[block] >= 0
            hit += was_kept and hit == depth
            num_kept += (use < never) - was_kept
            kept_until[block] = use if use < never else -1
            evictions += was_kept and use == never
            if use < never:
                heapq.heappush(latest, (-use, -depth, block))
        while num_kept > capacity:
            use, _, block = heapq.heappop(latest)
            if kept_until[block] == -use:
                kept_until[block] = -1
                num_kept -= 1
                evictions += 1
        hits += hit
        hit_tokens += min(hit * trace.block_tokens, request.num_tokens)
        hit_work += prefix_cost(hit, trace.block_tokens)
    return hits, hit_tokens, hit_work, evictions
