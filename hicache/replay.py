"""A trace of requests replayed through the page index: what a cache of a given size would have hit.

Pure; the same trace gives the same figures, always. One layer group with full attention, one slot
for a block. Requests are served one after the other, in the order of the trace's lines, each to its
end: it matches its leading blocks, takes room for the others, inserts all, and releases them. Of a
request that is longer than the whole cache, the leading blocks that fit are cached. The last block
of a prompt may be partly filled, and counts as a block; by token, it counts its tokens.

The format is Mooncake's: JSON lines with timestamp, input_length, output_length and hash_ids, where
equal ids stand for equal blocks after equal prefixes. A block that the trace lists after two
different ones is taken as two.

Belady's optimum is that of a cache that knows the future: after each request it keeps, of the
blocks that it had and those of the request, the ones that are used soonest. It may refuse to keep a
new block, and its room counts between requests. A block's next use is never after that of a block
that continues it, and ties are settled for the shallower one, so what it keeps is prefix-closed:
the rule costs it nothing, and it is the limit of hits by block for any order of the index, and for
any cache of single blocks too.
"""

from __future__ import annotations

import dataclasses
import heapq
import json
from collections.abc import Callable, Iterable
from typing import Any

from hicache.index import PageIndex
from hicache.keys import HASH_BYTES, root_hash
from hicache.policy import prefix_cost
from transfer.layout import LayerGroup

OPTIMUM = "belady"
BLOCK_TOKENS = 512
"""Of the published traces."""


class TraceError(ValueError):
    """A line of a trace that is none; names the line, the field, and what was expected."""


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRequest:
    num_tokens: int
    """Of the prompt."""
    blocks: tuple[int, ...]
    """Numbers from 0 in order of first use: one for each different prefix."""


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
class ReplayResult:
    order: str
    """Of eviction, or `OPTIMUM`."""
    capacity: int
    """In blocks."""
    hits: int
    """Blocks."""
    hit_tokens: int
    hit_work: int
    """Of all prompts' `work`, what the hits save."""
    evictions: int


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
        num_tokens, ids = _parse_line(line, number, block_tokens)
        blocks = []
        parent = -1
        for block_id in ids:
            parent = numbers.setdefault((parent, block_id), len(numbers))
            blocks.append(parent)
        requests.append(TraceRequest(num_tokens, tuple(blocks)))
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


def _parse_line(line: str, number: int, block_tokens: int) -> tuple[int, list[int]]:
    """(prompt tokens, hash ids)"""
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
    return num_tokens, ids


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
) -> ReplayResult:
    """Through the real index. `on_request` is called now and then, with the requests done. Raises
    ValueError for an order that there is not, or a capacity below 1."""
    if capacity < 1:
        raise ValueError(f"capacity: found {capacity}, expected at least 1 block")
    group = LayerGroup("full", (0,), kv_heads=1, head_dim=1)
    index = PageIndex([group], [capacity + 1], trace.block_tokens, order=order)
    hash_of = [number.to_bytes(HASH_BYTES, "little") for number in range(trace.num_distinct)]
    root = root_hash("trace")
    hits = hit_tokens = hit_work = 0
    for done, request in enumerate(trace.requests):
        hashes = [hash_of[block] for block in request.blocks]
        hit = index.match(hashes)
        (table,) = index.acquire(hashes[:hit])
        end = min(len(hashes), capacity)
        slots = index.allocate(0, end - hit)
        assert slots is not None, "nothing else is in use"
        index.insert(hashes[hit - 1] if hit else root, hashes[hit:end], [slots], hit)
        index.release(0, table + slots)
        hits += hit
        hit_tokens += min(hit * trace.block_tokens, request.num_tokens)
        hit_work += prefix_cost(hit, trace.block_tokens)
        if done % 256 == 255:
            on_request(done + 1)
    on_request(len(trace.requests))
    return ReplayResult(order, capacity, hits, hit_tokens, hit_work, index.evictions)


def replay_infinite(trace: Trace, order: str = "lru") -> ReplayResult:
    """With room for all there is, under which all orders are alike."""
    return replay(trace, trace.num_distinct, order)


def replay_optimum(trace: Trace, capacity: int) -> ReplayResult:
    """Belady's."""
    if capacity < 1:
        raise ValueError(f"capacity: found {capacity}, expected at least 1 block")
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
    return ReplayResult(OPTIMUM, capacity, hits, hit_tokens, hit_work, evictions)
