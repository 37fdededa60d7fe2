"""Replays by hand, the optimum against a search of all that a cache could keep, and lines that are
no trace."""

import itertools
import json
import random

import pytest

from hicache.policy import order_names, prefix_cost
from hicache.replay import (
    OPTIMUM,
    Trace,
    TraceError,
    parse_trace,
    replay,
    replay_infinite,
    replay_optimum,
)

BLOCK = 4


def line(ids: list[int], tokens: int = 0, **fields: object) -> str:
    item = {
        "timestamp": 0,
        "input_length": tokens or BLOCK * len(ids),
        "output_length": 1,
        "hash_ids": ids,
    }
    return json.dumps({**item, **fields})


def trace_of(*requests: list[int]) -> Trace:
    return parse_trace([line(ids) for ids in requests], BLOCK)


def test_a_trace_is_read() -> None:
    trace = parse_trace(
        [line([7, 8], tokens=5, timestamp=1.5, turn=3), " ", line([7, 9, 4])], BLOCK
    )
    assert [request.blocks for request in trace.requests] == [(0, 1), (0, 2, 3)]
    assert (trace.num_blocks, trace.num_distinct, trace.num_tokens) == (5, 4, 17)
    assert trace.work == prefix_cost(2, BLOCK) + prefix_cost(3, BLOCK)


def test_a_block_after_another_prefix_is_another_block() -> None:
    trace = trace_of([1, 5], [2, 5])
    assert [request.blocks for request in trace.requests] == [(0, 1), (2, 3)]
    assert replay_infinite(trace).hits == 0


@pytest.mark.parametrize("order", order_names())
def test_an_ample_cache_hits_what_an_infinite_one_does(order: str) -> None:
    trace = parse_trace(
        [line([1, 2, 3]), line([1, 2, 4], tokens=9), line([1, 2, 4], tokens=9), line([5])], BLOCK
    )
    result = replay(trace, trace.num_distinct, order)
    # 0, then 1 2, then 1 2 4 (of which the last holds one token), then none.
    assert (result.hits, result.hit_tokens, result.evictions) == (5, 8 + 9, 0)
    assert result.hit_work == prefix_cost(2, BLOCK) + prefix_cost(3, BLOCK)
    assert replay_infinite(trace).hits == 5


def test_lru_by_hand() -> None:
    # Room for 3: [1 2], [3], a hit on [1 2], then 4 takes the place of 3; 3 that of 2, the least
    # recently used leaf.
    trace = trace_of([1, 2], [3], [1, 2], [4], [3], [1, 2])
    result = replay(trace, 3, "lru")
    assert result.hits == 2 + 1
    assert result.evictions == 1 + 1 + 1
    # The future known: 1 and 2 stay, and 3 instead of 4.
    assert replay_optimum(trace, 3).hits == 2 + 1 + 2


@pytest.mark.parametrize("order", [*order_names(), OPTIMUM])
def test_a_request_that_does_not_fit_caches_what_fits(order: str) -> None:
    trace = trace_of([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [6, 7, 8, 9], [6, 7, 8])
    run = replay_optimum(trace, 3) if order == OPTIMUM else replay(trace, 3, order)
    assert run.hits == 3 + 3


def random_trace(rng: random.Random, num_requests: int, children: int) -> Trace:
    """Walks down a tree; the ids name paths."""
    names = {
        path: number
        for number, path in enumerate(
            itertools.chain.from_iterable(
                itertools.product(range(children), repeat=depth) for depth in range(1, 5)
            )
        )
    }
    requests = []
    for _ in range(num_requests):
        path = tuple(rng.randrange(children) for _ in range(rng.randint(1, 4)))
        requests.append([names[path[: depth + 1]] for depth in range(len(path))])
    return trace_of(*requests)


def most_hits(trace: Trace, capacity: int, leading: bool) -> int:
    """Of all caches: after each request any blocks that it had or that were requested are kept.
    `leading`: blocks count while those before them are there."""
    best = {frozenset[int](): 0}
    for request in trace.requests:
        after: dict[frozenset[int], int] = {}
        for kept, hits in best.items():
            there = [block in kept for block in request.blocks]
            hit = len(list(itertools.takewhile(bool, there))) if leading else sum(there)
            choice = sorted(kept.union(request.blocks))
            for size in range(min(capacity, len(choice)) + 1):
                for chosen in map(frozenset, itertools.combinations(choice, size)):
                    after[chosen] = max(after.get(chosen, 0), hits + hit)
        best = after
    return max(best.values())


@pytest.mark.parametrize("seed", range(40))
def test_the_optimum_is_that_of_a_search(seed: int) -> None:
    rng = random.Random(seed)
    trace = random_trace(rng, rng.randint(3, 8), 2)
    for capacity in (1, 2, 3):
        optimum = replay_optimum(trace, capacity).hits
        assert optimum == most_hits(trace, capacity, leading=True)
        assert optimum == most_hits(trace, capacity, leading=False)


@pytest.mark.parametrize("seed", range(10))
def test_no_order_beats_the_optimum_and_all_repeat(seed: int) -> None:
    trace = random_trace(random.Random(seed), 300, 3)
    for capacity in (1, 5, 20, 60):
        optimum = replay_optimum(trace, capacity)
        assert optimum.hits <= replay_infinite(trace).hits
        for order in order_names():
            result = replay(trace, capacity, order)
            assert result.hits <= optimum.hits
            assert result == replay(trace, capacity, order)


def test_lru_is_that_of_a_list() -> None:
    """In a trace of single blocks, leaves come first for free."""
    rng = random.Random(1)
    ids = [int(rng.paretovariate(0.6)) % 50 for _ in range(2000)]
    line: list[int] = []
    hits = 0
    for block in ids:
        if block in line:
            hits += 1
            line.remove(block)
        line = [*line[-9:], block]
    assert replay(trace_of(*([block] for block in ids)), 10, "lru").hits == hits


def test_progress_is_told() -> None:
    done: list[int] = []
    replay(trace_of(*([block] for block in range(600))), 10, "lru", done.append)
    assert done == [256, 512, 600]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", r"line 2: found \[1\], expected a JSON object"),
        (line([1], timestamp=-1), "line 2: timestamp: found -1, expected milliseconds"),
        (line([1], timestamp=True), "line 2: timestamp: found true"),
        (line([1], input_length="4"), 'line 2: input_length: found "4", expected a whole number'),
        (line([1], input_length=0), "line 2: input_length: found 0, expected .*1 or more"),
        (line([1], output_length=1.5), "line 2: output_length: found 1.5"),
        (line([1], hash_ids=3), "line 2: hash_ids: found 3, expected a list"),
        (line([1, 2], hash_ids=[1, "x"]), r'line 2: hash_ids\[1\]: found "x"'),
        (line([1, 2], hash_ids=[1, -2]), r"line 2: hash_ids\[1\]: found -2"),
        (
            line([1, 2], tokens=9),
            "line 2: hash_ids: found 2 blocks, expected 3, for input_length 9",
        ),
        ('{"timestamp": 0}', "line 2: input_length: missing, expected a whole number"),
        (line([1], hash_ids="x" * 100), r"found \"x{59}\.\.\., expected"),
    ],
)
def test_a_bad_line_is_named(text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        parse_trace([line([1]), text], BLOCK)


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(TraceError, match="no requests"):
        parse_trace(["", "\n"])
    with pytest.raises(TraceError, match="found 0, expected at least 1"):
        parse_trace([line([1])], 0)
    trace = trace_of([1])
    with pytest.raises(ValueError, match="capacity: found 0"):
        replay(trace, 0, "lru")
    with pytest.raises(ValueError, match="capacity: found 0"):
        replay_optimum(trace, 0)
    with pytest.raises(ValueError, match="found 'fifo'"):
        replay(trace, 1, "fifo")
