"""NIXL with small runs staged through blocks: every byte in its place, and none after an end was
told. In host memory, where the same code packs and unpacks without a GPU."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest

pytest.importorskip("nixl", reason="nixl is not installed")

from transfer.endpoint import Description, encode_description
from transfer.nixl import NixlTransport
from transfer.staging import Hello, Offer, _encoder
from transfer.transport import PagePart, PeerError, Region, WriteResult

OPTIONS = {"staging_bytes": str(8 << 20), "staging_block": str(1 << 20)}
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


def test_the_other_kind_of_memory_is_refused(make: Callable[..., End]) -> None:
    source, target = make("source", 1), make("target", 2)
    description = msgspec.msgpack.decode(target.transport.describe(), type=Description)
    gpu = msgspec.structs.replace(
        description, regions=(dataclasses.replace(description.regions[0], device=0),)
    )
    with pytest.raises(PeerError, match="the other kind of memory"):
        source.transport.connect("target", encode_description(gpu))


def test_a_target_that_does_not_stage_is_written_directly(make: Callable[..., End]) -> None:
    source, target = make("source", 1), make("target", 2, {})
    source.transport.connect("target", target.transport.describe())
    pages = shuffled(6, 200)
    source.transport.write("target", 0, pages, pages)
    assert [r.error for r in run(1, source, target)] == [None]
    np.testing.assert_array_equal(target.memory[pages], source.memory[pages])


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
