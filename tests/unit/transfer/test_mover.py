"""The mover: one result per write, whatever happens to its pieces, its peer or the transport.

Loopback transports with delays and faults; where the order of calls is the point, a recording one.
"""

import dataclasses
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from transfer.loopback import LoopbackTransport
from transfer.mover import Mover
from transfer.transport import (
    Capabilities,
    Int32Array,
    PagePart,
    PeerError,
    Region,
    Transport,
    TransportError,
    WriteResult,
)

DEADLINE_S = 10.0
PAGE_BYTES = 64
SIZES = ((64, PAGE_BYTES), (0, 32), (16, 128))
Part = PagePart | None


@dataclasses.dataclass
class End:
    transport: LoopbackTransport
    memory: list[np.ndarray]


def make_end(name: str, quantum: int = 4 * PAGE_BYTES) -> End:
    transport = LoopbackTransport(name, {})
    transport.capabilities = dataclasses.replace(
        transport.capabilities, write_bytes=quantum, poll_s=0.001
    )
    random = np.random.default_rng(list(name.encode()))
    memory = [random.integers(0, 256, size, dtype=np.uint8) for size in SIZES]
    transport.register(
        [Region(array.ctypes.data, *size) for array, size in zip(memory, SIZES, strict=True)]
    )
    return End(transport, memory)


class Watched:
    """A mover and what it reported."""

    def __init__(self, transport: Transport, max_bytes_in_flight: int = 1 << 20) -> None:
        self.results: queue.Queue[tuple[int, WriteResult]] = queue.Queue()
        self.lost: queue.Queue[tuple[str, str]] = queue.Queue()
        self.faults: list[BaseException] = []
        self.mover = Mover(
            transport,
            lambda key, result: self.results.put((key, result)),
            lambda peer, error: self.lost.put((peer, error)),
            self.faults.append,
            max_bytes_in_flight,
            [page_bytes for _pages, page_bytes in SIZES],
        )

    def wait(self, count: int) -> dict[int, WriteResult]:
        results: dict[int, WriteResult] = {}
        for _ in range(count):
            key, result = self.results.get(timeout=DEADLINE_S)
            assert key not in results, "a second result"
            results[key] = result
        time.sleep(0.02)
        assert self.results.empty()
        assert not self.faults
        return results


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    made: list[Watched] = []

    def make(*arguments: object) -> Watched:
        made.append(Watched(*arguments))  # type: ignore[arg-type]
        made[-1].mover.start()
        return made[-1]

    yield make
    for watched in made:
        watched.mover.stop(DEADLINE_S)
        assert not watched.mover._thread.is_alive()


def pages(*numbers: int) -> Int32Array:
    return np.array(numbers, np.int32)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_pieces_of_many_handovers_land_and_are_reported_as_one(
    watch: Callable[..., Watched],
) -> None:
    source, target = make_end("source"), make_end("target")
    watched = watch(source.transport, 8 * PAGE_BYTES)
    watched.mover.connect("target", target.transport.describe())
    expected = [array.copy() for array in target.memory]
    order = np.random.default_rng(1).permutation(np.arange(1, 64)).astype(np.int32)
    for key in range(7):
        mine = order[key * 9 : key * 9 + 9]
        expected[0][mine] = source.memory[0][mine[::-1]]
        watched.mover.write(key, "target", 0, mine[::-1].copy(), mine, handover=key % 3)
    half = PagePart(64, 0, 64)
    expected[2][1:16, :64] = source.memory[2][1:16, 64:]
    every = np.arange(1, 16, dtype=np.int32)
    watched.mover.write(7, "target", 2, every, every, half, handover=9)
    watched.mover.write(8, "target", 2, pages(), pages())
    results = watched.wait(9)
    assert [results[key].error for key in range(9)] == [None] * 9
    moved = [results[key].bytes_moved for key in range(9)]
    assert moved == [9 * PAGE_BYTES] * 7 + [15 * 64, 0]
    assert results[7].descriptors == 15
    assert all(result.seconds >= 0 for result in results.values())
    expected[0][0] = source.memory[0][0]
    for region in range(3):
        np.testing.assert_array_equal(target.memory[region], expected[region])


def test_the_warm_up_writes_the_null_page_of_each_part_and_skips_empty_regions(
    watch: Callable[..., Watched],
) -> None:
    source, target = make_end("source"), make_end("target")
    watched = watch(source.transport)
    expected = [array.copy() for array in target.memory]
    expected[2][0, 32:64] = source.memory[2][0, :32]
    parts: list[tuple[int, Part]] = [(1, None), (2, PagePart(0, 32, 32)), (2, PagePart(0, 0, 999))]
    watched.mover.connect("target", target.transport.describe(), parts)
    wait_until(lambda: (target.memory[2][0] == expected[2][0]).all())
    watched.wait(0)
    for region in range(3):
        np.testing.assert_array_equal(target.memory[region], expected[region])
    assert watched.lost.empty()


def test_what_cannot_be_posted_is_a_result(watch: Callable[..., Watched]) -> None:
    source, target = make_end("source"), make_end("target")
    watched = watch(source.transport)
    watched.mover.write(1, "nobody", 0, pages(1), pages(1))
    watched.mover.connect("target", target.transport.describe())
    watched.mover.write(2, "target", 0, pages(*range(60), 99), pages(*range(61)))
    watched.mover.write(3, "target", 0, pages(1), pages(1), PagePart(0, 0, 65))
    watched.mover.write(4, "target", 0, pages(1), pages(1))
    results = watched.wait(4)
    for key, error in (
        (1, "not connected"),
        (2, "which has 64"),
        (3, "not within"),
    ):
        assert error in (results[key].error or ""), key
    assert results[4].error is None
    with pytest.raises(ValueError, match="2 source and 1 target"):
        watched.mover.write(5, "target", 0, pages(1, 2), pages(1))


def test_a_failed_piece_ends_its_write_and_no_other(watch: Callable[..., Watched]) -> None:
    source, target = make_end("source"), make_end("target")
    watched = watch(source.transport, 1)
    watched.mover.connect("target", target.transport.describe())
    wait_until(lambda: (target.memory[0][0] == source.memory[0][0]).all())
    source.transport.fail_next = 1
    every = np.arange(64, dtype=np.int32)
    watched.mover.write(1, "target", 0, every, every)
    watched.mover.write(2, "target", 0, every, every)
    results = watched.wait(2)
    assert results[1].error == "injected fault"
    assert results[1].bytes_moved == 0
    assert (results[2].error, results[2].bytes_moved) == (None, 64 * PAGE_BYTES)


@pytest.mark.parametrize("how", ["disconnect", "reconnect", "the peer closes"])
def test_every_write_has_a_result_when_a_connection_ends_with_pieces_queued(
    watch: Callable[..., Watched], how: str
) -> None:
    source, target, other = make_end("source"), make_end("target"), make_end("other")
    source.transport.delay_polls = 3
    watched = watch(source.transport, 6 * PAGE_BYTES)
    watched.mover.connect("target", target.transport.describe())
    watched.mover.connect("other", other.transport.describe())
    every = np.arange(64, dtype=np.int32)
    for key in range(20):
        watched.mover.write(key, "target", 0, every, every, handover=key % 4)
    for key in range(20, 23):
        watched.mover.write(key, "other", 0, every, every)
    if how == "disconnect":
        watched.mover.disconnect("target")
    elif how == "reconnect":
        watched.mover.reconnect("target")
    else:
        target.transport.close()
    results = watched.wait(23)
    assert results.keys() == set(range(23))
    assert any(results[key].error for key in range(20))
    assert [results[key].error for key in range(20, 23)] == [None] * 3
    np.testing.assert_array_equal(other.memory[0], source.memory[0])
    after = target.memory[0].copy()
    watched.mover.write(30, "target", 0, every, every)
    result = watched.wait(1)[30]
    if how == "reconnect":
        assert result.error is None
        np.testing.assert_array_equal(target.memory[0], source.memory[0])
    else:
        assert result.error is not None
        np.testing.assert_array_equal(target.memory[0], after)


class Recorder(Transport):
    """Writes end when the test says so; calls are kept in order."""

    def __init__(self, write_bytes: int = 2 * PAGE_BYTES, passive: bool = True) -> None:
        self.capabilities = Capabilities(
            write_bytes=write_bytes, poll_s=0.001, passive_target=passive
        )
        self.calls: list[tuple[str, Any]] = []
        self.in_flight: dict[int, tuple[str, int]] = {}
        """id -> (peer, pages)"""
        self.ended: queue.SimpleQueue[WriteResult] = queue.SimpleQueue()
        self.connected: set[str] = set()
        self.connect_error = ""
        self.num_polls = 0
        self._last_id = 0

    def register(self, regions: list[Region]) -> None:
        raise NotImplementedError

    def describe(self) -> bytes:
        raise NotImplementedError

    def connect(self, peer: str, description: bytes) -> None:
        self.calls.append(("connect", peer))
        if self.connect_error:
            raise PeerError(self.connect_error)
        self.connected.add(peer)

    def disconnect(self, peer: str) -> None:
        self.calls.append(("disconnect", peer))
        self._end_all(peer, f"{peer} was disconnected")

    def reset(self, peer: str) -> None:
        self.calls.append(("reset", peer))
        self._end_all(peer, f"{peer} was reset")

    def _end_all(self, peer: str, error: str) -> None:
        self.connected.discard(peer)
        for write_id, (to, _pages) in list(self.in_flight.items()):
            if to == peer:
                self.end(write_id, error)

    def write(
        self,
        peer: str,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: Part = None,
    ) -> int:
        if peer not in self.connected:
            raise PeerError(f"{peer} is not connected")
        self._last_id += 1
        self.in_flight[self._last_id] = peer, len(source_pages)
        self.calls.append(("write", (peer, source_pages.tolist())))
        return self._last_id

    def end(self, write_id: int, error: str | None = None) -> None:
        _peer, num_pages = self.in_flight.pop(write_id)
        moved = 0 if error else num_pages * PAGE_BYTES
        self.ended.put(WriteResult(write_id, error, moved, 0 if error else 1, 0.0))

    def cancel(self, write_id: int) -> None:
        self.calls.append(("cancel", write_id))

    def poll(self) -> list[WriteResult]:
        self.num_polls += 1
        results = []
        while not self.ended.empty():
            results.append(self.ended.get())
        return results

    def close(self) -> None:
        self.calls.append(("close", None))

    def count(self, call: str) -> int:
        return sum(name == call for name, _what in self.calls)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def connect(watched: Watched, recorder: Recorder, *peers: str) -> None:
    """Connect, let the warm-up end, and forget the calls."""
    for peer in peers:
        watched.mover.connect(peer, b"")
    wait_until(lambda: len(recorder.in_flight) == len(peers))
    for write_id in list(recorder.in_flight):
        recorder.end(write_id)
    watched.wait(0)
    recorder.calls.clear()


def test_bytes_in_flight_are_bounded_and_handovers_and_peers_take_turns(
    watch: Callable[..., Watched], recorder: Recorder
) -> None:
    watched = watch(recorder, 4 * PAGE_BYTES)
    connect(watched, recorder, "a", "b")
    every = np.arange(8, dtype=np.int32)
    for key in range(4):
        peer = "ab"[key // 2]
        watched.mover.write(key, peer, 0, every + 10 * key, every, handover=key)
    for num_posted in (4, 8, 12, 16):
        wait_until(lambda: recorder.count("write") == num_posted)  # noqa: B023 - called at once
        time.sleep(0.005)
        assert len(recorder.in_flight) == 4
        for write_id in list(recorder.in_flight):
            recorder.end(write_id)
    results = watched.wait(4)
    assert {result.bytes_moved for result in results.values()} == {8 * PAGE_BYTES}
    assert {result.descriptors for result in results.values()} == {4}
    posted = [what for name, what in recorder.calls if name == "write"]
    for peer, handovers in (("a", (0, 1)), ("b", (2, 3))):
        firsts = [numbers[0] // 10 for to, numbers in posted if to == peer]
        assert firsts == list(handovers) * 4
    assert {to for to, _numbers in posted[:2]} == {"a", "b"}


def test_cancel_drops_what_waits_and_asks_for_the_end_of_what_is_posted(
    watch: Callable[..., Watched], recorder: Recorder
) -> None:
    watched = watch(recorder, 2 * PAGE_BYTES)
    connect(watched, recorder, "a")
    watched.mover.write(1, "a", 0, pages(1, 2, 3, 4), pages(1, 2, 3, 4))
    watched.mover.write(2, "a", 0, pages(5, 6), pages(5, 6))
    wait_until(lambda: recorder.in_flight)
    (posted,) = recorder.in_flight
    watched.mover.cancel(1)
    watched.mover.cancel(1)
    watched.mover.cancel(99)
    wait_until(lambda: recorder.count("cancel") == 2)
    watched.wait(0)
    recorder.end(posted)
    result = watched.wait(1)[1]
    assert (result.error, result.bytes_moved) == ("cancelled", 2 * PAGE_BYTES)
    wait_until(lambda: recorder.in_flight)
    assert recorder.calls[-1] == ("write", ("a", [5, 6]))
    (posted,) = recorder.in_flight
    watched.mover.cancel(2)
    wait_until(lambda: recorder.count("cancel") == 3)
    recorder.end(posted)
    assert watched.wait(1)[2].error is None
    watched.mover.write(3, "a", 0, pages(1, 2), pages(1, 2))
    wait_until(lambda: recorder.in_flight)
    watched.mover.write(4, "a", 0, pages(1, 2), pages(1, 2))
    watched.mover.cancel(4)
    assert watched.wait(1)[4].error == "cancelled"
    assert recorder.count("connect") == 0
    watched.mover.cancel(3)
    wait_until(lambda: recorder.count("cancel") == 4)
    recorder.end(next(iter(recorder.in_flight)), "cancelled")
    assert watched.wait(1)[3].error == "cancelled"
    assert not watched.mover._reconnect_at


def test_reconnect_breaks_the_connection_and_makes_a_new_one(
    watch: Callable[..., Watched], recorder: Recorder
) -> None:
    watched = watch(recorder, 2 * PAGE_BYTES)
    connect(watched, recorder, "a", "b")
    watched.mover.write(1, "a", 0, pages(1, 2, 3, 4), pages(1, 2, 3, 4))
    watched.mover.write(2, "a", 0, pages(1, 2), pages(1, 2))
    watched.mover.write(3, "b", 0, pages(1, 2), pages(1, 2))
    wait_until(lambda: len(recorder.in_flight) == 2)
    watched.mover.reconnect("a")
    watched.mover.reconnect("nobody")
    results = watched.wait(2)
    assert results[2].error == "the connection to a was reset"
    assert results[1].error == "the connection to a was reset"
    names = [name for name, what in recorder.calls if what == "a"]
    assert names == ["reset", "connect"]
    assert {peer for peer, _pages in recorder.in_flight.values()} == {"a", "b"}
    recorder.end(next(i for i, (peer, _) in recorder.in_flight.items() if peer == "b"))
    assert watched.wait(1)[3].error is None


def test_a_failed_write_has_its_peer_connected_again_until_that_works(
    watch: Callable[..., Watched], recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transfer.mover._RECONNECT_S", 0.01)
    watched = watch(recorder)
    connect(watched, recorder, "a")
    recorder.connect_error = "no route"
    watched.mover.write(1, "a", 0, pages(1), pages(1))
    wait_until(lambda: recorder.in_flight)
    recorder.end(next(iter(recorder.in_flight)), "broken")
    assert watched.wait(1)[1].error == "broken"
    assert watched.lost.get(timeout=DEADLINE_S) == ("a", "no route")
    assert watched.lost.get(timeout=DEADLINE_S) == ("a", "no route")
    recorder.connect_error = ""
    wait_until(lambda: recorder.in_flight)
    recorder.end(next(iter(recorder.in_flight)))
    watched.wait(0)
    tries = recorder.count("connect")
    time.sleep(0.05)
    assert recorder.count("connect") == tries
    # One that died unnoticed shows at the next write, whoever cancelled the last one.
    recorder.connected.clear()
    watched.mover.write(2, "a", 0, pages(1), pages(1))
    assert watched.wait(1)[2].error == "a is not connected"
    wait_until(lambda: recorder.count("connect") == tries + 1)


@pytest.mark.parametrize("passive", [False, True])
def test_a_target_polls_often_only_where_the_transport_needs_it(
    watch: Callable[..., Watched], passive: bool
) -> None:
    recorder = Recorder(passive=passive)
    watched = watch(recorder)
    watched.mover.expect(True)
    time.sleep(0.05)
    before = recorder.num_polls
    time.sleep(0.4)
    polls = recorder.num_polls - before
    assert polls <= 21 if passive else polls > 30


def test_a_fault_ends_the_thread_and_is_told() -> None:
    class Faulty(Recorder):
        def poll(self) -> list[WriteResult]:
            raise TransportError("lost its device")

    watched = Watched(Faulty())
    watched.mover.start()
    wait_until(lambda: watched.faults)
    assert str(watched.faults[0]) == "lost its device"
    watched.mover.stop(DEADLINE_S)
