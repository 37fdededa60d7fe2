"""Replays through several tiers: by hand, and against a slow model of single blocks."""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter

import pytest

from hicache.policy import order_names
from hicache.replay import (
    INFINITE,
    Tiers,
    Trace,
    parse_trace,
    replay,
    replay_infinite,
    replay_optimum,
)
from hicache.writes import WRITE_POLICIES, SelectiveWrites

BLOCK = 4


def trace_of(*requests: list[int]) -> Trace:
    lines = [
        json.dumps(
            {
                "timestamp": 0,
                "input_length": BLOCK * len(ids) - 1,  # the last block is not full
                "output_length": 1,
                "hash_ids": ids,
            }
        )
        for ids in requests
    ]
    return parse_trace(lines, BLOCK)


def conversations(rng: random.Random, num_requests: int, most_blocks: int) -> Trace:
    """Requests that repeat, extend or branch off from some of the last ones, or are new."""
    recent: list[list[int]] = [[]]
    requests = []
    fresh = iter(range(10_000))
    for _ in range(num_requests):
        base = rng.choice(recent)
        kept = base[: rng.randint(0, len(base))] if rng.random() < 0.4 else base
        more = rng.randint(0 if kept else 1, 3)
        ids = [*kept, *(next(fresh) for _ in range(more))][:most_blocks]
        requests.append(ids)
        recent = [*recent[-8:], ids]
    return trace_of(*requests)


# --------------------------------------------------------------------------------------- the model


class ModelTier:
    """A tier of single blocks: the leaf that was last used longest ago goes first.

    Blocks that entered together stay together until a request uses only some of them; that is all
    that the index's runs mean here.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used: dict[int, int] = {}
        self.parent: dict[int, int | None] = {}
        self.is_joined: dict[int, bool] = {}
        """With its parent, in one run."""
        self.now = 0
        self.evictions = 0

    def match(self, blocks: list[int]) -> int:
        return next((n for n, block in enumerate(blocks) if block not in self.used), len(blocks))

    def part(self, blocks: list[int]) -> None:
        """These are used, and what continues them is not."""
        for block, parent in self.parent.items():
            if blocks and parent == blocks[-1]:
                self.is_joined[block] = False

    def use(self, blocks: list[int]) -> None:
        self.now += 1
        for block in blocks:
            self.used[block] = self.now

    def leaves(self, held: list[int]) -> list[int]:
        parents = set(self.parent.values())
        leaves = [block for block in self.used if block not in parents and block not in held]
        return sorted(leaves, key=lambda block: self.used[block])

    def num_lacking(self, count: int) -> int:
        return max(0, len(self.used) + count - self.capacity)

    def next_evicted(self, count: int, held: list[int]) -> list[list[int]]:
        """Paths to leaves, the runs of which have so many blocks together."""
        paths = []
        for leaf in self.leaves(held):
            if count <= 0:
                break
            path = [leaf]
            while (above := self.parent[path[0]]) is not None:
                path.insert(0, above)
            paths.append(path)
            count -= 1
            block: int | None = leaf
            while block is not None and self.is_joined[block]:
                block = self.parent[block]
                count -= 1
        return paths

    def add(self, blocks: list[int], begin: int, held: list[int]) -> None:
        """Those from `begin` on."""
        for _ in range(self.num_lacking(len(blocks) - begin)):
            leaf = self.leaves(held)[0]
            del self.used[leaf], self.parent[leaf], self.is_joined[leaf]
            self.evictions += 1
        for place in range(begin, len(blocks)):
            block = blocks[place]
            self.parent[block] = blocks[place - 1] if place else None
            self.is_joined[block] = place > begin
            self.used[block] = self.now
        self.part(blocks)


@dataclasses.dataclass
class Model:
    device: ModelTier
    host: ModelTier
    storage: ModelTier | None
    write: str
    uses: dict[int, int] = dataclasses.field(default_factory=dict)
    """Those used last at the end."""
    hits: Counter[str] = dataclasses.field(default_factory=Counter)

    def offer(self, blocks: list[int]) -> None:
        for tier in (self.host, self.storage):
            if tier is not None:
                begin = tier.match(blocks)
                end = len(blocks)
                while end - begin > tier.capacity - begin:
                    end = begin + (end - begin) // 2
                if end > begin:
                    tier.part(blocks[:begin])
                    tier.add(blocks[:end], begin, blocks[:begin])
                    tier.use(blocks[begin:end])
                if tier.match(blocks) < len(blocks):
                    return

    def count_uses(self, blocks: list[int], begin: int) -> None:
        if self.write != "write_through_selective":
            return
        end = 0
        for place in range(begin, len(blocks)):
            self.uses[blocks[place]] = self.uses.pop(blocks[place], 0) + 1
            if self.uses[blocks[place]] > 1:
                end = place + 1
        while len(self.uses) > 2 * self.device.capacity:
            del self.uses[next(iter(self.uses))]
        if end:
            self.offer(blocks[:end])

    def make_room(self, count: int, held: list[int]) -> None:
        lacking = self.device.num_lacking(count)
        if self.write == "write_back" and lacking:
            for path in self.device.next_evicted(lacking, held):
                self.offer(path)

    def fetch(self, blocks: list[int], hit: int) -> None:
        in_host = found = self.host.match(blocks)
        self.host.part(blocks[:found])
        if self.storage is not None and self.storage.match(blocks) > found:
            found = min(self.storage.match(blocks), self.host.capacity)
            if found > in_host:
                self.storage.part(blocks[:found])
                self.storage.use(blocks[:found])
                self.host.add(blocks[:found], in_host, blocks[:in_host])
                self.host.use(blocks[in_host:found])
        self.host.use(blocks[:in_host])
        self.hits["host"] += max(0, in_host - hit)
        self.hits["storage"] += max(0, found - max(hit, in_host))
        if found > hit:
            self.device.part(blocks[:hit])
            self.make_room(found - hit, blocks[:hit])
            self.device.add(blocks[:found], hit, blocks[:hit])
            self.device.use(blocks[:found])

    def run(self, trace: Trace) -> Model:
        for request in trace.requests:
            blocks = list(request.blocks)
            hit = self.device.match(blocks)
            self.hits["device"] += hit
            if hit < len(blocks):
                self.fetch(blocks, hit)
                hit = self.device.match(blocks)
            self.device.part(blocks[:hit])
            self.count_uses(blocks[:hit], 0)
            self.make_room(len(blocks) - hit, blocks[:hit])
            self.device.add(blocks, hit, blocks[:hit])
            if hit < len(blocks):
                if self.write == "write_through":
                    self.offer(blocks)
                self.count_uses(blocks, hit)
            self.device.use(blocks)
        return self


@pytest.mark.parametrize("write", WRITE_POLICIES)
@pytest.mark.parametrize("seed", range(40))
def test_hits_are_those_of_a_model_of_single_blocks(seed: int, write: str) -> None:
    rng = random.Random(seed)
    trace = conversations(rng, 120, 8)
    for device, host, storage in ((8, 8, 0), (10, 30, 0), (12, 20, 60), (30, 9, INFINITE)):
        model = Model(
            ModelTier(device),
            ModelTier(host),
            ModelTier(min(storage, 10_000)) if storage else None,
            write,
        ).run(trace)
        result = replay(trace, device, "lru", tiers=Tiers(host, storage, write))
        assert {tier.name: tier.hits for tier in result.tiers} == {
            tier.name: model.hits[tier.name] for tier in result.tiers
        }
        evictions = [model.device.evictions, model.host.evictions]
        evictions += [model.storage.evictions] if model.storage is not None else []
        assert [tier.evictions for tier in result.tiers] == evictions


# ------------------------------------------------------------------------------------------ by hand


def hits(trace: Trace, device: int, tiers: Tiers, order: str = "lru") -> list[tuple[int, int]]:
    """(blocks, tokens) by tier."""
    result = replay(trace, device, order, tiers=tiers)
    return [(tier.hits, tier.hit_tokens) for tier in result.tiers]


def test_what_was_evicted_from_the_device_tier_is_hit_in_the_host_tier() -> None:
    # 1 2 is driven out by 3 4, comes back, and is there the third time.
    trace = trace_of([1, 2], [3, 4], [1, 2], [1, 2])
    for write in ("write_through", "write_back"):
        assert hits(trace, 2, Tiers(4, write=write)) == [(2, 7), (2, 7)]
    # Selectively, 1 2 is offered when it is computed again, and then 3 4.
    selective = Tiers(4, write="write_through_selective")
    assert hits(trace, 2, selective) == [(2, 7), (0, 0)]
    trace = trace_of([1, 2], [3, 4], [1, 2], [3, 4], [1, 2], [3, 4])
    assert hits(trace, 2, selective) == [(0, 0), (4, 14)]
    assert hits(trace, 2, dataclasses.replace(selective, write_hits=1)) == [(0, 0), (8, 28)]
    assert hits(trace, 2, dataclasses.replace(selective, write_hits=3)) == [(0, 0), (0, 0)]


def test_what_was_evicted_from_the_host_tier_is_hit_in_storage() -> None:
    trace = trace_of([1, 2, 3], [4, 5, 6], [1, 2, 3, 7])
    tiers = Tiers(3, INFINITE)
    assert hits(trace, 3, tiers) == [(0, 0), (0, 0), (3, 12)]
    # Half of the host tier's chain is left there, a block of it in the device tier.
    trace = trace_of([1, 2, 3, 4], [5, 6], [7], [1, 2, 3, 4])
    assert hits(trace, 4, Tiers(5, INFINITE)) == [(1, 4), (1, 4), (2, 7)]


def test_a_block_counts_in_the_first_tier_that_has_it() -> None:
    trace = trace_of([1, 2], [1, 2, 3])
    assert hits(trace, 10, Tiers(10, 10)) == [(2, 8), (0, 0), (0, 0)]


@pytest.mark.parametrize(
    ("order", "tiers"),
    [
        *((order, Tiers(INFINITE)) for order in order_names()),
        *((order, Tiers(30, INFINITE)) for order in order_names()),
        ("lru", Tiers(INFINITE, 0, "write_back")),
        ("lru", Tiers(30, INFINITE, "write_back")),
    ],
)
def test_with_room_below_nothing_is_lost(order: str, tiers: Tiers) -> None:
    trace = conversations(random.Random(3), 200, 8)
    infinite = replay_infinite(trace)
    result = replay(trace, 12, order, tiers=tiers)
    assert (result.hits, result.hit_tokens) == (infinite.hits, infinite.hit_tokens)
    assert result.hit_work == infinite.hit_work
    assert result.tiers[0].hits < infinite.hits


@pytest.mark.parametrize("seed", range(5))
def test_no_tiers_beat_the_optimum_and_all_repeat(seed: int) -> None:
    trace = conversations(random.Random(seed), 300, 8)
    for order in order_names():
        for write in WRITE_POLICIES:
            tiers = Tiers(5, 6, write)
            result = replay(trace, 4, order, tiers=tiers)
            optimum = replay_optimum(trace, 4, tiers)
            assert [tier.capacity for tier in optimum.tiers] == [4, 5, 6]
            for number in (1, 2, 3):
                both = (result.tiers[:number], optimum.tiers[:number])
                got, most = (sum(tier.hits for tier in each) for each in both)
                assert got <= most == replay_optimum(trace, (4, 9, 15)[number - 1]).hits
            assert result == replay(trace, 4, order, tiers=tiers)


def test_without_lower_tiers_there_is_one() -> None:
    trace = conversations(random.Random(1), 100, 8)
    result = replay(trace, 12, "lru")
    assert [tier.name for tier in result.tiers] == ["device"]
    assert result.write is None
    below = replay(trace, 12, "lru", tiers=Tiers(1))
    assert below.tiers[0].hits == result.hits  # one block below brings nothing but that block


def test_what_cannot_be_replayed_is_refused() -> None:
    trace = trace_of([1])
    with pytest.raises(ValueError, match="host: found 0, expected at least 1"):
        replay(trace, 1, "lru", tiers=Tiers(0))
    with pytest.raises(ValueError, match="storage: found -2"):
        replay(trace, 1, "lru", tiers=Tiers(1, -2))
    with pytest.raises(ValueError, match="host: found 0"):
        replay_optimum(trace, 1, Tiers(0))
    with pytest.raises(ValueError, match="write: found 'later', expected one of write_through, "):
        replay(trace, 1, "lru", tiers=Tiers(1, write="later"))


# ------------------------------------------------------------------------------- selective writing


def test_uses_are_counted_and_forgotten() -> None:
    pages = [bytes([number]) * 32 for number in range(6)]
    writes = SelectiveWrites(pool_pages=2, hits=2)
    assert writes.used(pages[:3]) == (0, 0)
    assert writes.used(pages[:2], begin=1) == (1, 2)
    assert writes.used(pages[:3]) == (0, 3)
    writes.used(pages[2:6])  # four are known
    assert writes.used(pages[:2]) == (0, 0)


def test_what_had_enough_uses_before_is_not_new() -> None:
    pages = [bytes([number]) * 32 for number in range(6)]
    writes = SelectiveWrites(pool_pages=6, hits=2)
    writes.used(pages[:5])
    assert writes.used(pages[:3]) == (0, 3)
    assert writes.used(pages[:3]) == (3, 3)
    assert writes.used(pages[:5]) == (3, 5)
    assert writes.used(pages) == (5, 5)
