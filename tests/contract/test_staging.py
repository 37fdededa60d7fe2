"""NIXL with small runs staged through blocks: every byte in its place, and none after an end was
told. In host memory, where the same code packs and unpacks without a GPU."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

pytest.importorskip("nixl", reason="nixl is not installed")

from transfer.nixl import NixlTransport
from transfer.staging import Hello, Offer, _encoder
from transfer.transport import PagePart, PeerError, Region, WriteResult

OPTIONS = {
    "staging_bytes": str(8 << 20),
    "staging_block": str(1 << 20),
    "staging_below": str(1 << 20),
    "staging_runs": "2",
}
NUM_PAGES, PAGE_BYTES = 1024, 16384
DEADLINE_S = 20.0


class End:
    def __init__(self, name: str, seed: int, options: dict[str, str] = OPTIONS) -> None:
        self.transport = NixlTransport(name, dict(options))
        random = np.random.default_rng(seed)
        self.memory = random.integers(0, 256, (NUM_PAGES, PAGE_BYTES), dtype=np.uint8)
        self.transport.register([Region(self.memory.ctypes.data, NUM_PAGES, PAGE_BYTES)])


@pytest.fixture
def make() -> Iterator[Callable[..., End]]:
    ends: list[End] = []

    def one(*arguments: object) -> End:
        ends.append(End(*arguments))  # type: ignore[arg-type]
        return ends[-1]

    yield one
    for end in ends:
        end.transport.close()


@pytest.fixture
def pair(make: Callable[..., End]) -> tuple[End, End]:
    source, target = make("source", 1), make("target", 2)
    source.transport.connect("target", target.transport.describe())
    return source, target


def run(count: int, *ends: End) -> list[WriteResult]:
    results: list[WriteResult] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(results) < count:
        assert time.monotonic() < deadline, f"{count - len(results)} writes did not end"
        for end in ends:
            results += end.transport.poll()
    return results


def poll_for(seconds: float, *ends: End) -> list[WriteResult]:
    results: list[WriteResult] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for end in ends:
            results += end.transport.poll()
    return results


def shuffled(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(NUM_PAGES)[:count].astype(np.int32)


@pytest.mark.parametrize(
    "part",
    [
        PagePart(0, 0, PAGE_BYTES),
        PagePart(4096, 8192, 2048),
        PagePart(64, 128, 192, 5, 1024, 2048),
    ],
    ids=["pages", "slices", "runs"],
)
def test_runs_that_went_through_blocks_are_in_their_places(
    pair: tuple[End, End], part: PagePart
) -> None:
    source, target = pair
    expected = target.memory.copy()
    sources, targets = shuffled(3, 700), shuffled(4, 700)
    for k in range(part.count):
        to = part.target_offset + k * part.target_stride
        origin = part.source_offset + k * part.source_stride
        moved = source.memory[sources, origin : origin + part.length]
        expected[targets, to : to + part.length] = moved
    source.transport.write("target", 0, sources, targets, part)
    (result,) = run(1, source, target)
    assert (result.error, result.bytes_moved) == (None, 700 * part.page_bytes)
    np.testing.assert_array_equal(target.memory, expected)
    assert poll_for(0.05, source, target) == []


def test_many_writes_share_the_ring_and_each_ends_once(pair: tuple[End, End]) -> None:
    source, target = pair
    expected = target.memory.copy()
    ids = []
    for start in range(0, 1000, 100):
        pages = np.arange(start, start + 100, dtype=np.int32)
        expected[pages[::-1]] = source.memory[pages]
        ids.append(source.transport.write("target", 0, pages, pages[::-1].copy()))
    results = run(len(ids), source, target)
    assert sorted(result.write_id for result in results) == ids
    assert all(result.error is None for result in results)
    np.testing.assert_array_equal(target.memory, expected)


def test_both_ends_stage_at_once(pair: tuple[End, End]) -> None:
    one, other = pair
    other.transport.connect("source", one.transport.describe())
    low, high = np.arange(0, 500, dtype=np.int32), np.arange(500, 1000, dtype=np.int32)
    one.transport.write("target", 0, low, high)
    other.transport.write("source", 0, low, high)
    assert [r.error for r in run(2, one, other)] == [None, None]
    np.testing.assert_array_equal(other.memory[high], one.memory[low])
    np.testing.assert_array_equal(one.memory[high], other.memory[low])


def test_what_was_offered_ends_only_when_the_target_has_let_go(pair: tuple[End, End]) -> None:
    source, target = pair
    pages = shuffled(5, 100)
    run_until_idle(pair)
    write_id = source.transport.write("target", 0, pages, pages)
    source.transport.poll()  # the offer is out; the target has not looked
    source.transport.reset("target")
    assert poll_for(0.05, source) == [], "it may still be unpacked"
    source.transport.connect("target", target.transport.describe())
    (result,) = run(1, source, target)
    assert result.write_id == write_id
    before = target.memory.copy()
    poll_for(0.05, source, target)
    np.testing.assert_array_equal(target.memory, before)
    source.transport.write("target", 0, pages, pages)
    assert [r.error for r in run(1, source, target)] == [None]
    np.testing.assert_array_equal(target.memory[pages], source.memory[pages])


def test_a_dead_target_ends_what_was_offered(pair: tuple[End, End]) -> None:
    source, _target = pair
    run_until_idle(pair)
    pages = shuffled(5, 100)
    source.transport.write("target", 0, pages, pages)
    source.transport.poll()
    source.transport.disconnect("target")
    (result,) = run(1, source)
    assert "disconnected" in (result.error or "")


def test_nothing_lands_from_a_source_that_was_disconnected(pair: tuple[End, End]) -> None:
    source, target = pair
    run_until_idle(pair)
    pages = shuffled(5, 640)
    before = target.memory.copy()
    source.transport.write("target", 0, pages, pages)
    for _ in range(3):
        source.transport.poll()
    target.transport.disconnect("source")
    landed = target.memory.copy()
    poll_for(0.05, source, target)
    np.testing.assert_array_equal(target.memory, landed)
    np.testing.assert_array_equal(landed, before)


def test_cancelled_before_it_is_offered(pair: tuple[End, End]) -> None:
    source, target = pair
    pages = shuffled(5, 100)
    before = target.memory.copy()
    # The target has not answered the greeting, so nothing is offered.
    write_id = source.transport.write("target", 0, pages, pages)
    source.transport.cancel(write_id)
    (result,) = run(1, source)
    assert result.error == "cancelled"
    poll_for(0.05, source, target)
    np.testing.assert_array_equal(target.memory, before)


def test_a_target_that_does_not_stage_is_written_directly(make: Callable[..., End]) -> None:
    source, target = make("source", 1), make("target", 2, {"staging_bytes": "0"})
    source.transport.connect("target", target.transport.describe())
    pages = shuffled(6, 200)
    source.transport.write("target", 0, pages, pages)
    assert [r.error for r in run(1, source, target)] == [None]
    np.testing.assert_array_equal(target.memory[pages], source.memory[pages])


def test_blocks_may_differ_in_size(make: Callable[..., End]) -> None:
    source, target = make("source", 1), make("target", 2, OPTIONS | {"staging_block": str(4 << 20)})
    source.transport.connect("target", target.transport.describe())
    target.transport.connect("source", source.transport.describe())
    pages = np.arange(0, 600, dtype=np.int32)
    for one, other in ((source, target), (target, source)):
        one.transport.write("target" if one is source else "source", 0, pages, pages[::-1].copy())
        assert [r.error for r in run(1, source, target)] == [None]
        np.testing.assert_array_equal(other.memory[pages[::-1]], one.memory[pages])


def test_a_reset_leaves_the_other_direction_alone(pair: tuple[End, End]) -> None:
    source, target = pair
    target.transport.connect("source", source.transport.describe())
    run_until_idle(pair)
    pages = shuffled(7, 300)
    target.transport.write("source", 0, pages, pages)
    assert [r.error for r in run(1, source, target)] == [None]
    for _ in range(2):
        source.transport.reset("target")
        poll_for(0.02, source, target)
        target.memory[:] += 1
        target.transport.write("source", 0, pages, pages)
        assert [r.error for r in run(1, source, target)] == [None]
        np.testing.assert_array_equal(source.memory[pages], target.memory[pages])
        source.transport.connect("target", target.transport.describe())


def test_many_short_runs_are_staged_unless_told_otherwise(make: Callable[..., End]) -> None:
    """Short ones only, and only if they are many."""
    source, target = make("source", 1, {}), make("target", 2, {})
    source.transport.connect("target", target.transport.describe())
    pages = np.arange(NUM_PAGES, dtype=np.int32)
    # No run touches the next one.
    many = PagePart(0, 0, 512, 4, 1024, 1024)
    for part, expected in (
        (many, True),
        (PagePart(0, 0, 4096, 2, 8192, 8192), False),
        (dataclasses.replace(many, count=1), True),
    ):
        source.transport.write("target", 0, pages, pages[::-1].copy(), part)
        assert bool(source.transport._staged) == expected
        assert [r.error for r in run(1, source, target)] == [None]
        np.testing.assert_array_equal(
            target.memory[::-1, : part.length], source.memory[:, : part.length]
        )
    source.transport.write("target", 0, pages[:200], pages[:200], many)
    assert not source.transport._staged
    run(1, source, target)


@pytest.mark.parametrize(
    "change",
    [
        {"region": 7},
        {"pages": np.array([NUM_PAGES], "<i4").tobytes()},
        {"pages": np.array([-1], "<i4").tobytes()},
        {"pages": b"abc"},
        {"offset": PAGE_BYTES},
        {"num_bytes": 1 << 30},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_offer_that_does_not_fit_is_refused(
    pair: tuple[End, End], change: dict[str, object]
) -> None:
    _source, target = pair
    staging = target.transport._staging
    assert staging is not None
    answers: list[bytes] = []
    staging._wire = type(
        "Wire",
        (),
        {
            "send": lambda self, agent, message: answers.append(message),
            "admit": lambda self, metadata, ring: "stranger",
            "close": lambda self: None,
        },
    )()
    staging.receive("stranger", _encoder.encode(Hello(1, "x", Region(0, 1, 1), b"")))
    sound = Offer(1, 9, 0, 8, 0, np.array([3], "<i4").tobytes(), 0, 8, 1, 0)
    before = target.memory.copy()
    staging.receive("stranger", _encoder.encode(msgspec.structs.replace(sound, **change)))
    staging.poll()
    assert b"does not fit" in answers[-1]
    np.testing.assert_array_equal(target.memory, before)


def test_rubbish_is_dropped(pair: tuple[End, End]) -> None:
    staging = pair[1].transport._staging
    assert staging is not None
    staging.receive("stranger", b"rubbish")
    staging.receive("stranger", b"\xff")
    assert not staging.is_busy


def run_until_idle(pair: tuple[End, End]) -> None:
    """Greetings are exchanged."""
    source, target = pair
    pages = shuffled(0, 100)
    source.transport.write("target", 0, pages, pages)
    run(1, source, target)


@pytest.mark.parametrize("page_bytes", [4096, 1 << 20])
def test_writes_to_one_peer_go_on_while_another_is_reset(page_bytes: int) -> None:
    """With NIXL's own threads this crashed within a few turns."""
    total = 32 << 20
    num_pages = total // page_bytes
    ends = []
    for seed in range(3):
        memory = np.full((num_pages, page_bytes), seed, dtype=np.uint8)
        transport = NixlTransport(f"end{seed}", {"staging_bytes": "0"})
        transport.register([Region(memory.ctypes.data, num_pages, page_bytes)])
        ends.append((transport, memory))
    (source, sent), (one, _), (other, received) = ends
    try:
        sent[:] = np.arange(num_pages, dtype=np.uint8)[:, None]
        pages = np.random.default_rng(1).permutation(num_pages).astype(np.int32)
        source.connect("other", other.describe())
        for _ in range(30):
            deadline = time.monotonic() + DEADLINE_S
            while True:
                try:
                    source.connect("one", one.describe())
                    break
                except PeerError:
                    assert time.monotonic() < deadline
                    source.poll()
            expected = {source.write("one", 0, pages, pages): "one"}
            received[:] = 0
            expected[source.write("other", 0, pages, pages)] = "other"
            source.reset("one")
            expected[source.write("other", 0, pages, pages)] = "other"
            while expected:
                assert time.monotonic() < deadline
                for result in source.poll():
                    is_one = expected.pop(result.write_id) == "one"
                    assert is_one or result.error is None
                one.poll()
                other.poll()
            np.testing.assert_array_equal(received, sent)
    finally:
        for transport, _ in ends:
            transport.close()


def wait_for_lane(source: NixlTransport, peer: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not source._lanes[0].is_ready(peer):
        assert time.monotonic() < deadline
        source.poll()


def test_a_long_write_is_shared_with_a_thread(make: Callable[..., End]) -> None:
    source, target = make("source", 1, {}), make("target", 2, {})
    source.transport.connect("target", target.transport.describe())
    wait_for_lane(source.transport, "target")
    for seed in range(5):
        sources, targets = shuffled(seed, 1000), shuffled(seed + 50, 1000)
        expected = target.memory.copy()
        expected[targets] = source.memory[sources]
        source.transport.write("target", 0, sources, targets)
        assert source.transport._shared
        (result,) = run(1, source, target)
        assert (result.error, result.bytes_moved) == (None, 1000 * PAGE_BYTES)
        np.testing.assert_array_equal(target.memory, expected)
    assert not source.transport._shared


def test_no_share_of_a_write_lands_after_its_end(make: Callable[..., End]) -> None:
    source, target = make("source", 1, {}), make("target", 2, {})
    pages = np.arange(NUM_PAGES, dtype=np.int32)
    for turn in range(10):
        source.transport.connect("target", target.transport.describe())
        if turn % 2:
            wait_for_lane(source.transport, "target")
        write_id = source.transport.write("target", 0, pages, pages[::-1].copy())
        source.transport.disconnect("target")
        with pytest.raises(PeerError):
            source.transport.write("target", 0, pages, pages)
        (result,) = run(1, source)
        assert result.write_id == write_id
        target.memory[:] = 1
        poll_for(0.02, source, target)
        assert (target.memory == 1).all()


def test_lanes_end_with_their_transport(make: Callable[..., End]) -> None:
    source, target = make("source", 1, {"threads": "3"}), make("target", 2, {})
    before = threading.active_count()
    source.transport.connect("target", target.transport.describe())
    wait_for_lane(source.transport, "target")
    assert threading.active_count() == before + 2
    pages = np.arange(NUM_PAGES, dtype=np.int32)
    source.transport.write("target", 0, pages, pages)
    source.transport.close()
    assert len(source.transport.poll()) == 1
    assert threading.active_count() == before
