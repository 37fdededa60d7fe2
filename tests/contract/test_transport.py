"""One suite over every transport: what `Transport` promises, checked byte by byte.

The content of each byte is a function of its place, and both ends are compared as a whole after
every move, so a byte in the wrong place and a byte that should not have changed are both seen.
"""

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest

from transfer.backends import BACKENDS, make_transport
from transfer.loopback import LoopbackTransport
from transfer.transport import (
    ConfigurationError,
    PeerError,
    Region,
    Transport,
    TransportError,
    WriteResult,
)

DEADLINE_S = 20.0
SIZES = ((40, 512), (24, 4096))
"""(pages, bytes of a page) of each region."""


@dataclasses.dataclass
class End:
    """A transport and the memory of its regions, with a page of canary before and after each."""

    transport: Transport
    memory: list[np.ndarray]

    def pages(self, region: int) -> np.ndarray:
        num_pages, page_bytes = SIZES[region]
        return self.memory[region][page_bytes:-page_bytes].reshape(num_pages, page_bytes)


def pattern(region: int, size: int, seed: int) -> np.ndarray:
    place = np.arange(size, dtype=np.uint64)
    mixed = (place + np.uint64(seed * 7919 + region)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(56)).astype(np.uint8)


def make_end(backend: str, name: str, seed: int) -> End:
    transport = make_transport(backend, name)
    memory = [
        pattern(number, (num_pages + 2) * page_bytes, seed)
        for number, (num_pages, page_bytes) in enumerate(SIZES)
    ]
    transport.register(
        [
            Region(array.ctypes.data + page_bytes, num_pages, page_bytes)
            for array, (num_pages, page_bytes) in zip(memory, SIZES, strict=True)
        ]
    )
    return End(transport, memory)


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


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "nixl" and importlib.util.find_spec("nixl") is None:
        pytest.skip("nixl is not installed")
    return str(request.param)


@pytest.fixture
def end(backend: str) -> Iterator[Callable[..., End]]:
    with contextlib.ExitStack() as stack:

        def make(name: str, seed: int) -> End:
            made = make_end(backend, name, seed)
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
    backend: str, end: Callable[..., End], regions: list[tuple[int, int]], message: str
) -> None:
    source = end("source", 1)
    other = make_transport(backend, "peer")
    memory = [np.zeros(count * size, dtype=np.uint8) for count, size in regions]
    with contextlib.closing(other):
        other.register(
            [
                Region(array.ctypes.data, count, size)
                for array, (count, size) in zip(memory, regions, strict=True)
            ]
        )
        with pytest.raises(PeerError, match=message):
            source.transport.connect("peer", other.describe())
        with pytest.raises(PeerError):
            source.transport.write("peer", 0, int32(0), int32(0))


@pytest.mark.parametrize("description", [b"", b"rubbish", b"\x80"])
def test_what_is_no_description_is_refused(end: Callable[..., End], description: bytes) -> None:
    with pytest.raises(PeerError, match="peer"):
        end("source", 1).transport.connect("peer", description)


def test_pools_may_differ_in_their_number_of_pages(backend: str, end: Callable[..., End]) -> None:
    source = end("source", 1)
    memory = [np.zeros(count * size, dtype=np.uint8) for count, size in ((50, 512), (2, 4096))]
    with contextlib.closing(make_transport(backend, "other")) as other:
        other.register(
            [Region(memory[0].ctypes.data, 50, 512), Region(memory[1].ctypes.data, 2, 4096)]
        )
        source.transport.connect("other", other.describe())
        source.transport.write("other", 0, int32(39), int32(49))
        wait(source.transport, 1, (other,))
        np.testing.assert_array_equal(memory[0][-512:], source.pages(0)[39])
        with pytest.raises(IndexError, match="which has 2"):
            source.transport.write("other", 1, int32(0), int32(2))


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


def run_target(connection: Connection) -> None:
    """A target process: describe, poll, and answer with its memory when asked, until told to
    end."""
    target = make_end("nixl", "target", 2)
    connection.send(target.transport.describe())
    while True:
        target.transport.poll()
        if connection.poll(0.001):
            if connection.recv() == "end":
                break
            connection.send([array.tobytes() for array in target.memory])
    target.transport.close()


@contextlib.contextmanager
def target_process() -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=run_target, args=(there,), daemon=True)
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
def nixl_source() -> Iterator[End]:
    pytest.importorskip("nixl", reason="nixl is not installed")
    source = make_end("nixl", "source", 1)
    yield source
    source.transport.close()


def test_nixl_writes_to_another_process_then_to_its_successor(nixl_source: End) -> None:
    source = nixl_source
    for _ in range(2):
        with target_process() as (process, connection):
            source.transport.connect("target", receive(connection))
            expected = [
                pattern(region, (pages + 2) * size, 2) for region, (pages, size) in enumerate(SIZES)
            ]
            for region, (num_pages, page_bytes) in enumerate(SIZES):
                sources = np.arange(0, num_pages, 2, dtype=np.int32)
                targets = sources[::-1].copy()
                view = expected[region][page_bytes:-page_bytes].reshape(num_pages, page_bytes)
                view[targets] = source.pages(region)[sources]
                source.transport.write("target", region, sources, targets)
            results = wait(source.transport, len(SIZES))
            assert [result.error for result in results.values()] == [None] * len(SIZES)
            connection.send("memory")
            assert receive(connection) == [array.tobytes() for array in expected]
            connection.send("end")
            process.join(DEADLINE_S)
            assert process.exitcode == 0


@pytest.mark.parametrize("was_connected", [False, True])
def test_a_dead_nixl_peer_gives_an_error_in_time(nixl_source: End, was_connected: bool) -> None:
    source = nixl_source
    pages = np.arange(40, dtype=np.int32)
    with target_process() as (process, connection):
        source.transport.connect("target", receive(connection))
        if was_connected:
            source.transport.write("target", 0, pages, pages)
            wait(source.transport, 1)
        process.kill()
        process.join(DEADLINE_S)
        write_id = source.transport.write("target", 0, pages, pages)
        result = wait(source.transport, 1)[write_id]
        assert result.error is not None
        assert result.bytes_moved == 0
    with pytest.raises(PeerError, match="not connected"):
        source.transport.write("target", 0, pages, pages)
    with target_process() as (_process, connection):
        source.transport.connect("target", receive(connection))
        source.transport.write("target", 0, pages, pages)
        assert [result.error for result in wait(source.transport, 1).values()] == [None]


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


def test_a_wrong_configuration_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match="nixl, loopback"):
        make_transport("carrier pigeon", "name")
    with pytest.raises(ConfigurationError, match="speed"):
        make_transport("loopback", "name", {"speed": "9"})
    monkeypatch.delitem(sys.modules, "transfer.nixl", raising=False)
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(ConfigurationError, match="pip install"):
        make_transport("nixl", "name")
