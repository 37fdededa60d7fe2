"""Lanes: every page once and in order, bytes in flight bounded, turns fair."""

import collections
import dataclasses
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.flow import Lane, Piece


def make_write(key: int, num_pages: int, page_bytes: int, first: int = 0) -> Piece:
    pages = np.arange(first, first + num_pages, dtype=np.int32)
    return Piece(key, 0, pages, pages + 1000, None, page_bytes)


@dataclasses.dataclass
class Load:
    """Writes, by key, as (handover, pages, bytes of a page), and the lane's settings."""

    quantum: int
    max_bytes: int
    writes: list[tuple[int, int, int]]

    @property
    def largest_page(self) -> int:
        return max(page_bytes for _handover, _pages, page_bytes in self.writes)


loads = st.builds(
    Load,
    quantum=st.integers(1, 60),
    max_bytes=st.integers(1, 200),
    writes=st.lists(
        st.tuples(st.integers(0, 4), st.integers(1, 30), st.integers(1, 40)),
        min_size=1,
        max_size=12,
    ),
)


def fill(load: Load, lane: Lane) -> None:
    for key, (handover, num_pages, page_bytes) in enumerate(load.writes):
        lane.push(handover, make_write(key, num_pages, page_bytes))


@settings(deadline=None)
@given(loads, st.integers(0, 1 << 32))
def test_every_page_is_posted_once_in_order_and_the_bound_holds(load: Load, seed: int) -> None:
    random = Random(seed)
    lane = Lane(load.quantum, load.max_bytes)
    waiting = list(enumerate(load.writes))
    posted: dict[int, list[tuple[int, Piece]]] = collections.defaultdict(list)
    in_flight: list[Piece] = []
    while True:
        if waiting and random.random() < 0.5:
            key, (handover, num_pages, page_bytes) = waiting.pop(0)
            lane.push(handover, make_write(key, num_pages, page_bytes))
        piece = lane.pop()
        if piece is not None:
            in_flight.append(piece)
            posted[load.writes[piece.key][0]].append((piece.key, piece))
            assert piece.num_bytes <= load.quantum + piece.page_bytes
            assert lane.bytes_in_flight == sum(p.num_bytes for p in in_flight)
            assert lane.bytes_in_flight <= load.max_bytes or len(in_flight) == 1
        elif in_flight:
            lane.ended(in_flight.pop(random.randrange(len(in_flight))))
        elif not waiting:
            break
    assert lane.bytes_in_flight == 0
    for handover, pieces in posted.items():
        keys = [key for key, _piece in pieces]
        assert keys == sorted(keys)
        for key in set(keys):
            _, num_pages, _ = load.writes[key]
            whole = make_write(key, num_pages, 1)
            mine = [piece for number, piece in pieces if number == key]
            sources = np.concatenate([piece.source_pages for piece in mine])
            targets = np.concatenate([piece.target_pages for piece in mine])
            np.testing.assert_array_equal(sources, whole.source_pages)
            np.testing.assert_array_equal(targets, whole.target_pages)
        assert set(keys) == {k for k, write in enumerate(load.writes) if write[0] == handover}


@settings(deadline=None)
@given(loads)
def test_handovers_that_wait_get_the_same_within_a_quantum_and_a_page(load: Load) -> None:
    lane = Lane(load.quantum, load.max_bytes)
    fill(load, lane)
    left = collections.Counter[int]()
    for handover, num_pages, page_bytes in load.writes:
        left[handover] += num_pages * page_bytes
    sent = collections.Counter[int]()
    while (piece := lane.pop()) is not None:
        lane.ended(piece)
        handover = load.writes[piece.key][0]
        sent[handover] += piece.num_bytes
        left[handover] -= piece.num_bytes
        shares = [sent[h] for h, num_bytes in left.items() if num_bytes]
        if len(shares) > 1:
            assert max(shares) - min(shares) <= load.quantum + load.largest_page
    assert not any(left.values())


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 40), st.integers(0, 6), st.integers(0, 50))
def test_a_short_handover_waits_for_one_turn_of_each_long_one(
    quantum: int, page_bytes: int, num_long: int, posted_before: int
) -> None:
    lane = Lane(quantum, 1 << 30)
    for long in range(num_long):
        lane.push(long, make_write(long, 10_000, page_bytes))
    for _ in range(posted_before if num_long else 0):
        piece = lane.pop()
        assert piece is not None
        lane.ended(piece)
    lane.push(99, make_write(99, 1, page_bytes))
    others = 0
    while True:
        piece = lane.pop()
        assert piece is not None
        if piece.key == 99:
            break
        others += piece.num_bytes
    # A page needs that many turns.
    turns = -(-page_bytes // quantum)
    assert others <= num_long * (turns * quantum + page_bytes)


def test_a_page_larger_than_quantum_and_bound_goes_alone() -> None:
    lane = Lane(10, 20)
    lane.push(1, make_write(1, 2, 100))
    lane.push(2, make_write(2, 2, 7))
    order = []
    while (piece := lane.pop()) is not None:
        order.append((piece.key, len(piece.source_pages)))
        if lane.bytes_in_flight > 20:
            assert lane.pop() is None
        lane.ended(piece)
    assert order == [(2, 1), (2, 1), (1, 1), (1, 1)]


def test_a_dropped_write_leaves_the_others_their_order() -> None:
    lane = Lane(10, 100)
    for key in range(4):
        lane.push(key % 2, make_write(key, 3, 5))
    first = lane.pop()
    assert first is not None
    assert first.key == 0
    lane.drop(0)
    lane.drop(3)
    lane.drop(17)
    keys = []
    while (piece := lane.pop()) is not None:
        keys.append(piece.key)
    assert keys == [1, 2, 1, 2]
    assert lane.bytes_in_flight == 10 + 15 + 15
    lane.drop(2)
    assert lane.pop() is None


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="quantum"):
        Lane(0, 1)
    with pytest.raises(ValueError, match="without bytes"):
        Lane(1, 1).push(0, make_write(0, 0, 5))
