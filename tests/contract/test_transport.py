"""One suite over every transport: what `Transport` promises, checked byte by byte.

The content of each byte is a function of its place, and both ends are compared as a whole after
every move, so a byte in the wrong place and a byte that should not have changed are both seen.
"""

import contextlib
import dataclasses
import importlib.metadata
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import pytest
import torch

from transfer.backends import BACKENDS, ENTRY_POINTS, backend_names, make_transport
from transfer.endpoint import Description, encode_description
from transfer.loopback import LoopbackTransport
from transfer.memory import HostMemory, allocate_host
from transfer.transport import (
    ConfigurationError,
    PagePart,
    PeerError,
    Region,
    Transport,
    TransportError,
    WriteResult,
)

DEADLINE_S = 20.0
SIZES = ((40, 512), (24, 4096))
"""(pages, bytes of a page) of each region."""
Sizes = tuple[tuple[int, int], ...]


@dataclasses.dataclass
class End:
    """A transport and the memory of its regions, with a page of canary before and after each."""

    transport: Transport
    memory: list[np.ndarray]
    sizes: Sizes
    allocated: list[HostMemory]

    def pages(self, region: int) -> np.ndarray:
        return pages_of(self.memory[region], *self.sizes[region])


def pages_of(memory: np.ndarray, num_pages: int, page_bytes: int) -> np.ndarray:
    return memory[page_bytes:-page_bytes].reshape(num_pages, page_bytes)


def pattern(region: int, size: int, seed: int) -> np.ndarray:
    place = np.arange(size, dtype=np.uint64)
    mixed = (place + np.uint64(seed * 7919 + region)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(56)).astype(np.uint8)


def patterns(sizes: Sizes, seed: int) -> list[np.ndarray]:
    return [
        pattern(number, (num_pages + 2) * page_bytes, seed)
        for number, (num_pages, page_bytes) in enumerate(sizes)
    ]


def make_end(backend: str, name: str, seed: int, sizes: Sizes = SIZES) -> End:
    transport = make_transport(backend, name)
    allocated, memory = [], []
    for content in patterns(sizes, seed):
        allocated.append(allocate_host(len(content)))
        memory.append(np.frombuffer(allocated[-1].buffer, np.uint8, len(content)))
        memory[-1][:] = content
    transport.register(
        [
            Region(array.ctypes.data + page_bytes, num_pages, page_bytes)
            for array, (num_pages, page_bytes) in zip(memory, sizes, strict=True)
        ]
    )
    return End(transport, memory, sizes, allocated)


def int32(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def wait(
    transport: Transport, count: int, others: tuple[Transport, ...] = ()
) -> dict[int, WriteResult]:
    """Poll until `count` writes have ended."""
    results: dict[int, WriteResult] = {}
    deadline = time.monotonic() + DEADLINE_S
    while len(results) < count:
        assert time.monotonic() < deadline, f"{count - len(results)} writes did not end"
        for result in transport.poll():
            assert result.write_id not in results, "a result was returned twice"
            results[result.write_id] = result
        for other in others:
            other.poll()
    return results


def skip_if_missing(backend: str) -> None:
    """Skip when the backend's library or device is not there, and for no other reason: that one
    does not load for a fault of ours is a failure."""
    if backend == "ipc":
        pytest.skip("no CUDA device" if not torch.cuda.is_available() else "moves no host memory")
    try:
        make_transport(backend, "probe").close()
    except ConfigurationError as error:
        cause = error.__cause__
        name = getattr(cause, "name", None) or ""
        ours = name.startswith(("transfer.", "pd.")) and name != f"transfer.{backend}"
        if not isinstance(cause, ImportError | OSError) or ours or backend in ("shm", "loopback"):
            raise
        pytest.skip(str(error))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    skip_if_missing(request.param)
    return str(request.param)


@pytest.fixture
def end(backend: str) -> Iterator[Callable[..., End]]:
    with contextlib.ExitStack() as stack:

        def make(name: str, seed: int, sizes: Sizes = SIZES) -> End:
            made = make_end(backend, name, seed, sizes)
            stack.callback(made.transport.close)
            return made

        yield make


@pytest.fixture
def pair(end: Callable[..., End]) -> tuple[End, End]:
    """Two ends; the source is connected to the target, as "target"."""
    source, target = end("source", 1), end("target", 2)
    source.transport.connect("target", target.transport.describe())
    return source, target


def test_scattered_pages_land_in_their_places_and_nowhere_else(pair: tuple[End, End]) -> None:
    source, target = pair
    before = [array.copy() for array in source.memory]
    expected = [array.copy() for array in target.memory]
    random = np.random.default_rng(0)
    posted = {}
    for region, count in ((0, 17), (1, 9), (0, 8)):
        num_pages, page_bytes = SIZES[region]
        sources = random.permutation(num_pages)[:count].astype(np.int32)
        # Two writes go to region 0; their targets lie in different halves.
        half = num_pages // 2
        targets = (random.permutation(half) + half * (count == 8))[:count].astype(np.int32)
        view = expected[region][page_bytes:-page_bytes].reshape(num_pages, page_bytes)
        view[targets] = source.pages(region)[sources]
        write_id = source.transport.write("target", region, sources, targets)
        posted[write_id] = count * page_bytes
    results = wait(source.transport, 3, (target.transport,))
    assert {write_id: result.bytes_moved for write_id, result in results.items()} == posted
    for result in results.values():
        assert result.error is None
        assert result.seconds >= 0
    for region in range(len(SIZES)):
        np.testing.assert_array_equal(target.memory[region], expected[region])
        np.testing.assert_array_equal(source.memory[region], before[region])
    assert source.transport.poll() == []


def test_descriptors_count_runs_adjacent_on_both_sides(pair: tuple[End, End]) -> None:
    source, target = pair
    cases = [
        ((1, 2, 3, 4), (5, 6, 7, 8), 1),
        ((1, 2, 3, 4), (5, 6, 8, 9), 2),
        ((1, 2, 5, 6), (10, 11, 12, 13), 2),
        ((4, 3, 2), (7, 6, 5), 3),
        ((9,), (9,), 1),
    ]
    for sources, targets, runs in cases:
        source.transport.write("target", 0, int32(*sources), int32(*targets))
        (result,) = wait(source.transport, 1, (target.transport,)).values()
        assert result.descriptors == runs
        pages = target.pages(0)[list(targets)]
        np.testing.assert_array_equal(pages, source.pages(0)[list(sources)])


def test_a_write_of_no_pages_ends_like_another(pair: tuple[End, End]) -> None:
    source, target = pair
    write_id = source.transport.write("target", 0, int32(), int32())
    result = wait(source.transport, 1, (target.transport,))[write_id]
    assert (result.error, result.bytes_moved, result.descriptors) == (None, 0, 0)


def test_both_ends_can_write(pair: tuple[End, End]) -> None:
    one, other = pair
    other.transport.connect("one", one.transport.describe())
    expected = one.pages(1)[3].copy(), other.pages(1)[5].copy()
    one.transport.write("target", 1, int32(3), int32(7))
    wait(one.transport, 1, (other.transport,))
    other.transport.write("one", 1, int32(5), int32(8))
    wait(other.transport, 1, (one.transport,))
    np.testing.assert_array_equal(other.pages(1)[7], expected[0])
    np.testing.assert_array_equal(one.pages(1)[8], expected[1])


def test_a_source_page_may_change_once_the_result_is_there(pair: tuple[End, End]) -> None:
    source, target = pair
    for value in range(5):
        source.pages(0)[:] = value
        source.transport.write(
            "target", 0, np.arange(40, dtype=np.int32), np.arange(40, dtype=np.int32)
        )
        wait(source.transport, 1, (target.transport,))
        source.pages(0)[:] = 255
        assert (target.pages(0) == value).all()


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([(40, 512)], "1 regions, we have 2"),
        ([(40, 512), (24, 4096), (1, 64)], "3 regions, we have 2"),
    ],
)
def test_a_mismatch_is_refused_naming_both_values(
    end: Callable[..., End], regions: list[tuple[int, int]], message: str
) -> None:
    source, other = end("source", 1), end("peer", 2, tuple(regions))
    with pytest.raises(PeerError, match=message):
        source.transport.connect("peer", other.transport.describe())
    with pytest.raises(PeerError):
        source.transport.write("peer", 0, int32(0), int32(0))


@pytest.mark.parametrize("description", [b"", b"rubbish", b"\x80"])
def test_what_is_no_description_is_refused(end: Callable[..., End], description: bytes) -> None:
    with pytest.raises(PeerError, match="peer"):
        end("source", 1).transport.connect("peer", description)


def test_pools_may_differ_in_their_number_of_pages(end: Callable[..., End]) -> None:
    source, other = end("source", 1), end("other", 2, ((50, 512), (2, 4096)))
    source.transport.connect("other", other.transport.describe())
    source.transport.write("other", 0, int32(39), int32(49))
    wait(source.transport, 1, (other.transport,))
    np.testing.assert_array_equal(other.pages(0)[49], source.pages(0)[39])
    with pytest.raises(IndexError, match="which has 2"):
        source.transport.write("other", 1, int32(0), int32(2))


PARTS = {
    "a head of eight to one of two": ((4096, 1024), PagePart(1536, 512, 512)),
    "a quarter of the layers of each head": ((4096, 1024), PagePart(128, 0, 128, 8, 512, 128)),
    "the other way round": ((1024, 4096), PagePart(0, 256, 128, 8, 128, 512)),
    "odd bytes, back to back": ((600, 500), PagePart(7, 11, 61, 8, 61, 61)),
    "whole pages of two sizes": ((4096, 4104), PagePart(0, 0, 4096)),
    "long runs": ((1 << 20, 3 << 18), PagePart(1 << 18, 5, 3 << 16, 3, 1 << 18, (3 << 16) + 7)),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_pages_land_in_their_places_and_nowhere_else(
    end: Callable[..., End], case: str
) -> None:
    (source_bytes, target_bytes), part = PARTS[case]
    source = end("source", 1, ((13, source_bytes), (2, 64)))
    target = end("target", 2, ((11, target_bytes), (2, 64)))
    source.transport.connect("target", target.transport.describe())
    before = [array.copy() for array in source.memory]
    expected = [array.copy() for array in target.memory]
    sources, targets = int32(12, 0, 1, 2, 7, 7), int32(10, 3, 4, 5, 0, 8)
    view = pages_of(expected[0], 11, target_bytes)
    for run in range(part.count):
        here = part.source_offset + run * part.source_stride
        there = part.target_offset + run * part.target_stride
        view[targets, there : there + part.length] = source.pages(0)[
            sources, here : here + part.length
        ]
    source.transport.write("target", 0, sources, targets, part)
    (result,) = wait(source.transport, 1, (target.transport,)).values()
    assert (result.error, result.bytes_moved) == (None, 6 * part.page_bytes)
    for region in range(2):
        np.testing.assert_array_equal(target.memory[region], expected[region])
        np.testing.assert_array_equal(source.memory[region], before[region])


def test_a_part_must_lie_within_both_pages(end: Callable[..., End]) -> None:
    source = end("source", 1, ((4, 512), (2, 64)))
    target = end("target", 2, ((4, 256), (2, 64)))
    source.transport.connect("target", target.transport.describe())
    with pytest.raises(ValueError, match="256 bytes at target, 512 here"):
        source.transport.write("target", 0, int32(0), int32(0))
    for part in (
        PagePart(0, 0, 257),
        PagePart(0, 1, 256),
        PagePart(257, 0, 256),
        PagePart(-1, 0, 8),
        PagePart(0, -1, 8),
        PagePart(0, 0, 64, 5, 64, 64),
        PagePart(0, 0, 64, 2, 449, 64),
    ):
        with pytest.raises(ValueError, match="not within pages"):
            source.transport.write("target", 0, int32(0), int32(0), part)
    assert source.transport.poll() == []
    np.testing.assert_array_equal(target.memory[0], pattern(0, 6 * 256, 2))


def test_many_small_writes_in_flight_at_once(pair: tuple[End, End]) -> None:
    source, target = pair
    expected = [array.copy() for array in target.memory]
    for region, (num_pages, page_bytes) in enumerate(SIZES):
        places = np.random.default_rng(region).permutation(num_pages).astype(np.int32)
        pages_of(expected[region], num_pages, page_bytes)[places] = source.pages(region)
    posted = set()
    for turn in range(3):
        for region, (num_pages, _bytes) in enumerate(SIZES):
            places = np.random.default_rng(region).permutation(num_pages).astype(np.int32)
            for page in range(num_pages):
                posted.add(
                    source.transport.write(
                        "target", region, int32(page), places[page : page + 1].copy()
                    )
                )
        assert len(posted) == (turn + 1) * 64
    results = wait(source.transport, len(posted), (target.transport,))
    assert results.keys() == posted
    assert {result.error for result in results.values()} == {None}
    for region in range(len(SIZES)):
        np.testing.assert_array_equal(target.memory[region], expected[region])


def test_a_cancelled_write_gives_one_result_and_no_byte_follows_it(
    end: Callable[..., End],
) -> None:
    sizes = ((64, 128 << 10), (2, 64))
    source, target = end("source", 1, sizes), end("target", 2, sizes)
    source.transport.connect("target", target.transport.describe())
    source.transport.cancel(12345)
    pages = np.arange(64, dtype=np.int32)
    posted = [source.transport.write("target", 0, pages, pages[::-1].copy()) for _ in range(3)]
    source.transport.cancel(posted[1])
    source.transport.cancel(posted[1])
    results = wait(source.transport, 3, (target.transport,))
    assert results.keys() == set(posted)
    for write_id in (posted[0], posted[2]):
        assert results[write_id].error is None
    cancelled = results[posted[1]]
    assert (cancelled.error is None) == (cancelled.bytes_moved == 64 * (128 << 10))
    np.testing.assert_array_equal(target.pages(0), source.pages(0)[::-1])
    last = source.transport.write("target", 0, pages, pages)
    source.transport.cancel(last)
    wait(source.transport, 1, (target.transport,))
    after = target.memory[0].copy()
    source.memory[0][:] = 255
    for _ in range(50):
        assert source.transport.poll() == []
        target.transport.poll()
    np.testing.assert_array_equal(target.memory[0], after)
    source.transport.write("target", 0, int32(0), int32(1))
    assert [r.error for r in wait(source.transport, 1, (target.transport,)).values()] == [None]


def test_what_cannot_be_written_is_an_error_at_once(pair: tuple[End, End]) -> None:
    source, target = pair
    with pytest.raises(PeerError, match="nobody"):
        source.transport.write("nobody", 0, int32(0), int32(0))
    for sources, targets in (
        (int32(40), int32(0)),
        (int32(0), int32(40)),
        (int32(-1), int32(0)),
        (int32(0), int32(-1)),
    ):
        with pytest.raises(IndexError, match="pages"):
            source.transport.write("target", 0, sources, targets)
    with pytest.raises(IndexError):
        source.transport.write("target", 2, int32(0), int32(0))
    with pytest.raises(ValueError, match="2 source and 1 target"):
        source.transport.write("target", 0, int32(0, 1), int32(0))
    with pytest.raises(TransportError):
        source.transport.register([])
    assert source.transport.poll() == []
    np.testing.assert_array_equal(target.memory[0], pattern(0, target.memory[0].size, 2))


def test_disconnect_forgets_the_peer_and_connect_brings_it_back(pair: tuple[End, End]) -> None:
    source, target = pair
    source.transport.disconnect("nobody")
    for _ in range(2):
        source.transport.write("target", 0, int32(1), int32(2))
        wait(source.transport, 1, (target.transport,))
        source.transport.disconnect("target")
        with pytest.raises(PeerError):
            source.transport.write("target", 0, int32(1), int32(2))
        source.transport.connect("target", target.transport.describe())
    source.transport.connect("target", target.transport.describe())
    source.transport.write("target", 0, int32(3), int32(4))
    assert [r.error for r in wait(source.transport, 1, (target.transport,)).values()] == [None]
    np.testing.assert_array_equal(target.pages(0)[4], source.pages(0)[3])


def test_a_write_in_flight_at_disconnect_still_gives_one_result(pair: tuple[End, End]) -> None:
    source, _target = pair
    pages = np.arange(24, dtype=np.int32)
    write_id = source.transport.write("target", 1, pages, pages)
    source.transport.disconnect("target")
    result = wait(source.transport, 1)[write_id]
    assert result.error is None or "disconnected" in result.error
    assert source.transport.poll() == []


def test_a_peer_that_restarted_under_its_name_replaces_the_old_one(
    end: Callable[..., End], pair: tuple[End, End]
) -> None:
    source, old = pair
    source.transport.write("target", 0, int32(1), int32(2))
    wait(source.transport, 1, (old.transport,))
    old.transport.close()
    new = end("target", 3)
    before = old.memory[0].copy()
    source.transport.connect("target", new.transport.describe())
    source.transport.write("target", 0, int32(5), int32(6))
    results = wait(source.transport, 1, (new.transport,))
    assert [result.error for result in results.values()] == [None]
    np.testing.assert_array_equal(new.pages(0)[6], source.pages(0)[5])
    np.testing.assert_array_equal(old.memory[0], before)


def test_close_is_idempotent_and_final(pair: tuple[End, End]) -> None:
    source, _target = pair
    source.transport.close()
    source.transport.close()
    assert source.transport.poll() == []
    with pytest.raises(PeerError):
        source.transport.write("target", 0, int32(0), int32(0))


# ------------------------------------------------------------------------------------ two processes


def run_target(backend: str, connection: Connection) -> None:
    """A target process: describe, poll, and answer with its memory when asked, until told to
    end."""
    target = make_end(backend, "target", 2)
    connection.send(target.transport.describe())
    while True:
        target.transport.poll()
        if connection.poll(0.001):
            if connection.recv() == "end":
                break
            connection.send([array.tobytes() for array in target.memory])
    target.transport.close()
    connection.send("closed")


@contextlib.contextmanager
def target_process(
    backend: str,
) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_target, args=(backend, there), daemon=True)
    process.start()
    there.close()
    try:
        yield process, here
    finally:
        if process.is_alive():
            with contextlib.suppress(OSError):
                here.send("end")
        process.join(DEADLINE_S)
        process.kill()


def receive(connection: Connection) -> object:
    assert connection.poll(DEADLINE_S), "the target process did not answer"
    return connection.recv()


@pytest.fixture
def remote_backend(backend: str) -> str:
    if backend == "loopback":
        pytest.skip("loopback stays within its process")
    return backend


def test_writes_to_another_process_then_to_its_successor(
    remote_backend: str, end: Callable[..., End]
) -> None:
    source = end("source", 1)
    for _ in range(2):
        with target_process(remote_backend) as (process, connection):
            source.transport.connect("target", receive(connection))
            expected = patterns(SIZES, 2)
            for region, (num_pages, page_bytes) in enumerate(SIZES):
                sources = np.arange(0, num_pages, 2, dtype=np.int32)
                targets = sources[::-1].copy()
                view = pages_of(expected[region], num_pages, page_bytes)
                view[targets] = source.pages(region)[sources]
                part = PagePart(64, 32, 16, 3, 100, 48)
                source.transport.write("target", region, sources, targets)
                # Odd pages, so that no two writes meet.
                for run in range(3):
                    view[targets + 1, 32 + run * 48 : 48 + run * 48] = source.pages(region)[
                        sources, 64 + run * 100 : 80 + run * 100
                    ]
                source.transport.write("target", region, sources, targets + 1, part)
            results = wait(source.transport, 2 * len(SIZES))
            assert [result.error for result in results.values()] == [None] * 2 * len(SIZES)
            connection.send("memory")
            assert receive(connection) == [array.tobytes() for array in expected]
            connection.send("end")
            # Not the exit status: with the system's libibverbs, libnl's destructors crash at exit
            # in every process that has loaded NIXL.
            assert receive(connection) == "closed"
            process.join(DEADLINE_S)


def write_error(source: End, pages: np.ndarray) -> str | None:
    try:
        write_id = source.transport.write("target", 0, pages, pages)
    except PeerError as error:
        return str(error)
    result = wait(source.transport, 1)[write_id]
    assert (result.error is None) == (result.bytes_moved > 0)
    return result.error


@pytest.mark.parametrize("was_used", [False, True])
def test_a_dead_peer_gives_an_error_in_time(
    remote_backend: str, end: Callable[..., End], was_used: bool
) -> None:
    source = end("source", 1)
    pages = np.arange(40, dtype=np.int32)
    with target_process(remote_backend) as (process, connection):
        description = receive(connection)
        source.transport.connect("target", description)
        if was_used:
            assert write_error(source, pages) is None
        process.kill()
        process.join(DEADLINE_S)
        assert write_error(source, pages) is not None
    with pytest.raises(PeerError, match="not connected"):
        source.transport.write("target", 0, pages, pages)
    with target_process(remote_backend) as (_process, connection):
        source.transport.connect("target", receive(connection))
        assert write_error(source, pages) is None


# ------------------------------------------------------------------------------- faults of loopback


@pytest.fixture
def loopback_pair() -> Iterator[tuple[End, End, LoopbackTransport]]:
    source, target = make_end("loopback", "source", 1), make_end("loopback", "target", 2)
    source.transport.connect("target", target.transport.describe())
    assert isinstance(source.transport, LoopbackTransport)
    yield source, target, source.transport
    source.transport.close()
    target.transport.close()


def test_a_delayed_loopback_write_is_half_there_until_its_result(
    loopback_pair: tuple[End, End, LoopbackTransport],
) -> None:
    source, target, transport = loopback_pair
    transport.delay_polls = 2
    transport.write("target", 0, int32(0, 2), int32(10, 20))
    assert transport.poll() == []
    assert transport.poll() == []
    np.testing.assert_array_equal(target.pages(0)[10], source.pages(0)[0])
    assert (target.pages(0)[20] != source.pages(0)[2]).any()
    assert len(transport.poll()) == 1
    np.testing.assert_array_equal(target.pages(0)[20], source.pages(0)[2])


def test_a_loopback_fault_is_scripted(loopback_pair: tuple[End, End, LoopbackTransport]) -> None:
    _source, _target, transport = loopback_pair
    transport.fail_next = 1
    transport.write("target", 0, int32(0), int32(1))
    transport.write("target", 0, int32(0), int32(1))
    errors = [result.error for result in wait(transport, 2).values()]
    assert errors == ["injected fault", None]


@pytest.mark.parametrize("end_it", ["close the target", "disconnect"])
def test_no_byte_follows_the_end_of_a_loopback_connection(
    loopback_pair: tuple[End, End, LoopbackTransport], end_it: str
) -> None:
    _source, target, transport = loopback_pair
    transport.delay_polls = 3
    write_id = transport.write("target", 0, int32(0, 2), int32(10, 20))
    if end_it == "disconnect":
        transport.disconnect("target")
    else:
        target.transport.close()
    before = target.memory[0].copy()
    assert wait(transport, 1)[write_id].error is not None
    np.testing.assert_array_equal(target.memory[0], before)


def test_a_dead_loopback_peer_is_refused(
    loopback_pair: tuple[End, End, LoopbackTransport],
) -> None:
    source, target, _transport = loopback_pair
    description = target.transport.describe()
    target.transport.close()
    source.transport.disconnect("target")
    with pytest.raises(PeerError, match="gone"):
        source.transport.connect("target", description)


# ------------------------------------------------------------------------------------ faults of shm


@pytest.fixture
def shm_pair() -> Iterator[tuple[End, End]]:
    source, target = make_end("shm", "source", 1), make_end("shm", "target", 2)
    source.transport.connect("target", target.transport.describe())
    yield source, target
    source.transport.close()
    target.transport.close()


def test_shm_says_how_to_allocate() -> None:
    private = np.zeros(4096, np.uint8)
    with contextlib.closing(make_transport("shm", "source")) as transport:
        with pytest.raises(ConfigurationError, match="allocate_host"):
            transport.register([Region(private.ctypes.data, 1, 4096)])
        with pytest.raises(ConfigurationError, match="allocate_host"):
            transport.register([Region(private.ctypes.data, 1, 4096, device=0)])
        transport.register([Region(private.ctypes.data, 0, 4096)])


@pytest.mark.parametrize("options", [{"threads": "0"}, {"threads": "x"}, {"speed": "9"}])
def test_shm_refuses_options(options: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="shm transport"):
        make_transport("shm", "source", options)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("host", "another", "another host"),
        ("pid_namespace", "pid:[1]", "another pid namespace"),
        ("started", "1", "another one has its number"),
        ("pid", 1 << 30, "is gone"),
    ],
)
def test_shm_refuses_processes_that_it_cannot_share_memory_with(
    shm_pair: tuple[End, End], field: str, value: object, message: str
) -> None:
    source, target = shm_pair
    description = msgspec.msgpack.decode(target.transport.describe())
    metadata = msgspec.msgpack.decode(description["metadata"])
    metadata["process"][field] = value
    description["metadata"] = msgspec.msgpack.encode(metadata)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PeerError, match=f"other.*{message}"):
        source.transport.connect("other", msgspec.msgpack.encode(description))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("change", ["inode", "size", "fd"])
def test_shm_refuses_memory_that_is_not_the_one_described(
    shm_pair: tuple[End, End], change: str
) -> None:
    source, target = shm_pair
    description = msgspec.msgpack.decode(target.transport.describe())
    metadata = msgspec.msgpack.decode(description["metadata"])
    metadata["places"][0]["file"][change] += 1 << 20
    description["metadata"] = msgspec.msgpack.encode(metadata)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PeerError, match=r"other.*(not the memory|cannot map)"):
        source.transport.connect("other", msgspec.msgpack.encode(description))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("metadata", [b"", msgspec.msgpack.encode({"process": 1})])
def test_shm_refuses_metadata_of_another_kind(shm_pair: tuple[End, End], metadata: bytes) -> None:
    source, target = shm_pair
    end = msgspec.msgpack.decode(target.transport.describe(), type=Description)
    with pytest.raises(PeerError, match="no description"):
        source.transport.connect(
            "other", encode_description(msgspec.structs.replace(end, metadata=metadata))
        )


def test_shm_writes_on_while_its_target_is_stopped_and_sees_it_die() -> None:
    source = make_end("shm", "source", 1)
    pages = np.arange(40, dtype=np.int32)
    with contextlib.closing(source.transport), target_process("shm") as (process, connection):
        source.transport.connect("target", receive(connection))
        os.kill(process.pid or 0, signal.SIGSTOP)
        assert write_error(source, pages) is None
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(DEADLINE_S)
        assert source.transport.poll() == []
        with pytest.raises(PeerError, match="not connected"):
            source.transport.write("target", 0, pages, pages)


def test_closed_shm_transports_leave_no_thread_descriptor_or_mapping() -> None:
    def state() -> tuple[int, int]:
        with open("/proc/self/maps") as maps:
            mapped = sum("memfd:pagerelay" in line for line in maps)
        return len(os.listdir("/proc/self/fd")), mapped

    before = state()
    for _ in range(3):
        source, target = make_end("shm", "source", 1), make_end("shm", "target", 2)
        source.transport.connect("target", target.transport.describe())
        assert write_error(source, int32(1, 5)) is None
        assert state() > before
        source.transport.close()
        target.transport.close()
        del source, target
        assert state() == before


# ------------------------------------------------------------------------------------ configuration


def test_a_wrong_configuration_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="nixl, mooncake, shm, ipc, loopback"):
        make_transport("carrier pigeon", "name")
    with pytest.raises(ConfigurationError, match="speed"):
        make_transport("loopback", "name", {"speed": "9"})
    monkeypatch.delitem(sys.modules, "transfer.nixl", raising=False)
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(ConfigurationError, match="pip install"):
        make_transport("nixl", "name")


def test_others_can_register_a_transport(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found(importlib.metadata.EntryPoint):
        def load(self) -> object:
            if self.value == "broken:factory":
                raise RuntimeError("no such device")
            return lambda name, options: LoopbackTransport(name, options)

    found = importlib.metadata.EntryPoints(
        [Found("fast", "fast:factory", ENTRY_POINTS), Found("slow", "broken:factory", ENTRY_POINTS)]
    )
    monkeypatch.setattr(importlib.metadata, "entry_points", found.select)
    assert backend_names() == [*BACKENDS, "fast", "slow"]
    with contextlib.closing(make_transport("fast", "name", {"delay_polls": "3"})) as transport:
        assert isinstance(transport, LoopbackTransport)
        assert transport.delay_polls == 3
    with pytest.raises(ConfigurationError, match="'slow' does not load: no such device"):
        make_transport("slow", "name")
    with pytest.raises(ConfigurationError, match=r"there are nixl, .*fast, slow"):
        make_transport("carrier pigeon", "name")
