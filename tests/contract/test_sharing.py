"""NIXL with large writes shared between source and target: every byte in its place, whoever moved
it, and none after an end was told."""

import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import msgspec
import numpy as np
import pytest

pytest.importorskip("nixl", reason="nixl is not installed")

import transfer.nixl
import transfer.pulling
from transfer.nixl import NixlTransport
from transfer.pulling import Done, Hello, Offer, Pulling, Refused, Welcome, _decoder, _encoder
from transfer.tickets import Tickets
from transfer.transport import ConfigurationError, PagePart, PeerError, Region, WriteResult

NUM_PAGES, PAGE_BYTES = 96, 96 << 10
DEADLINE_S = 20.0
ON = {"pull": "on"}
ALL = np.arange(NUM_PAGES, dtype=np.int32)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes of a few MiB are shared, in many pieces."""
    monkeypatch.setattr(transfer.pulling, "SHARE_BYTES", 256 << 10)
    monkeypatch.setattr(transfer.nixl, "_SHARE_FROM", 1 << 20)


class End:
    """A pool with a page of canary before and after it."""

    def __init__(self, name: str, seed: int, options: dict[str, str] = ON) -> None:
        self.transport = NixlTransport(name, dict(options))
        random = np.random.default_rng(seed)
        self.all = random.integers(0, 256, (NUM_PAGES + 2, PAGE_BYTES), dtype=np.uint8)
        self.pages = self.all[1:-1]
        self.transport.register([Region(self.pages.ctypes.data, NUM_PAGES, PAGE_BYTES)])
        self.bytes_read = 0
        """As the target of shares."""
        pull = self.pulling.pull if options == ON else None

        def counted() -> int:
            assert pull is not None
            moved = pull()
            self.bytes_read += moved
            return moved

        if pull is not None:
            self.pulling.pull = counted  # type: ignore[method-assign]

    @property
    def pulling(self) -> Pulling:
        assert self.transport._pulling is not None
        return self.transport._pulling


Make = Callable[..., End]


@pytest.fixture
def make() -> Iterator[Make]:
    ends: list[End] = []

    def one(*arguments: object) -> End:
        ends.append(End(*arguments))  # type: ignore[arg-type]
        return ends[-1]

    yield one
    for end in ends:
        end.transport.close()


@pytest.fixture
def pair(make: Make) -> tuple[End, End]:
    source, target = make("source", 1), make("target", 2)
    connect(source, target)
    return source, target


def connect(source: End, target: End) -> None:
    """And have both move something once: that sets up the wires, for which both must poll."""
    source.transport.connect("target", target.transport.describe())
    poll_until(lambda: source.pulling.shares_with("target"), source, target)
    source.transport.write("target", 0, ALL, ALL)
    assert [r.error for r in run(1, target, source)] == [None]
    assert target.bytes_read > 0
    target.bytes_read = 0
    target.all[:] += 1


def begin(source: End, target: End) -> None:
    """The target reads, while the source writes nothing and takes nothing back. (Within one process
    UCX reads with the help of both.)"""

    def has_read() -> bool:
        source.transport._progress()
        return target.bytes_read > 0

    assert poll_until(has_read, target) == []


def poll_until(is_so: Callable[[], bool], *ends: End) -> list[WriteResult]:
    results: list[WriteResult] = []
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        for end in ends:
            results += end.transport.poll()
    return results


def run(count: int, *ends: End) -> list[WriteResult]:
    results: list[WriteResult] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(results) < count:
        assert time.monotonic() < deadline, f"{count - len(results)} writes did not end"
        for end in ends:
            results += end.transport.poll()
    return results


def poll_often(*ends: End) -> None:
    """Nothing ends any more."""
    for _ in range(100):
        for end in ends:
            assert end.transport.poll() == []


def shuffled(seed: int, count: int = NUM_PAGES) -> np.ndarray:
    return np.random.default_rng(seed).permutation(NUM_PAGES)[:count].astype(np.int32)


def keep_answers(end: End, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads, and says nothing about it."""
    send = end.pulling._send

    def silent(agent: str, message: object) -> None:
        if not isinstance(message, Done | Refused):
            send(agent, message)  # type: ignore[arg-type]

    monkeypatch.setattr(end.pulling, "_send", silent)


# --------------------------------------------------------------------------------------- the bytes


@pytest.mark.parametrize(
    "part",
    [
        PagePart(0, 0, PAGE_BYTES),
        PagePart(4096, 8192, 40960),
        PagePart(64, 128, 4096, 11, 8192, 4099),
        PagePart(3, 5, 24571, 3, 30011, 24571),
    ],
    ids=["pages", "slices", "runs", "odd bytes"],
)
@pytest.mark.parametrize("share_bytes", [1 << 20, 256 << 10, 20 << 10])
def test_large_writes_are_in_their_places_and_nowhere_else(
    pair: tuple[End, End], monkeypatch: pytest.MonkeyPatch, part: PagePart, share_bytes: int
) -> None:
    monkeypatch.setattr(transfer.pulling, "SHARE_BYTES", share_bytes)
    source, target = pair
    sources, targets = shuffled(3, 90), shuffled(4, 90)
    before, expected = source.all.copy(), target.all.copy()
    for k in range(part.count):
        to = part.target_offset + k * part.target_stride
        origin = part.source_offset + k * part.source_stride
        moved = source.pages[sources, origin : origin + part.length]
        expected[1 + targets, to : to + part.length] = moved
    source.transport.write("target", 0, sources, targets, part)
    (result,) = run(1, target, source)
    assert (result.error, result.bytes_moved) == (None, 90 * part.page_bytes)
    np.testing.assert_array_equal(target.all, expected)
    np.testing.assert_array_equal(source.all, before)
    assert 0 < target.bytes_read < result.bytes_moved
    poll_often(source, target)


def test_both_directions_at_once(pair: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer.nixl, "_POLL_BYTES", 1)
    one, other = pair
    other.transport.connect("source", one.transport.describe())
    poll_until(lambda: other.pulling.shares_with("source"), one, other)
    low, high = ALL[: NUM_PAGES // 2], ALL[NUM_PAGES // 2 :]
    ids = [one.transport.write("target", 0, low, high) for _ in range(3)]
    ids += [other.transport.write("source", 0, low, high) for _ in range(3)]
    results = run(6, other, one)
    assert sorted(result.write_id for result in results) == sorted(ids)
    assert {result.error for result in results} == {None}
    np.testing.assert_array_equal(other.pages[high], one.pages[low])
    np.testing.assert_array_equal(one.pages[high], other.pages[low])
    assert min(one.bytes_read, other.bytes_read) > 0


def test_many_writes_share_a_target_and_each_ends_once(pair: tuple[End, End]) -> None:
    source, target = pair
    ids = []
    for start in range(0, NUM_PAGES, 16):
        pages = ALL[start : start + 16]
        ids.append(source.transport.write("target", 0, pages, pages[::-1].copy()))
        # Too small to be shared.
        ids.append(source.transport.write("target", 0, pages[:1], pages[-1:].copy()))
    results = run(len(ids), target, source)
    assert sorted(result.write_id for result in results) == sorted(ids)
    np.testing.assert_array_equal(target.pages.reshape(-1, 16, PAGE_BYTES)[:, ::-1], by_16(source))


def by_16(end: End) -> np.ndarray:
    return end.pages.reshape(-1, 16, PAGE_BYTES)


@pytest.mark.parametrize("options", [(ON, {"pull": "off"}), ({"pull": "off"}, ON)])
def test_both_ends_must_agree(make: Make, options: tuple[dict[str, str], ...]) -> None:
    source, target = make("source", 1, options[0]), make("target", 2, options[1])
    source.transport.connect("target", target.transport.describe())
    for _ in range(3):
        source.transport.write("target", 0, ALL, ALL)
        assert [r.error for r in run(1, source, target)] == [None]
    np.testing.assert_array_equal(target.pages, source.pages)
    assert target.bytes_read == 0


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="auto, on or off, not 'yes'"):
        NixlTransport("source", {"pull": "yes"})


# ----------------------------------------------------------------------------------------- the ends


def test_a_target_that_has_not_begun_delays_nothing(pair: tuple[End, End]) -> None:
    source, target = pair
    for seed in range(3):
        pages = shuffled(seed)
        write_id = source.transport.write("target", 0, pages, ALL)
        results: list[WriteResult] = []
        while not results:
            target.transport._progress()
            results = source.transport.poll()
        assert [(r.write_id, r.error) for r in results] == [(write_id, None)]
        np.testing.assert_array_equal(target.pages, source.pages[pages])
    landed = target.all.copy()
    source.pages[:] = 7
    poll_often(source, target)
    np.testing.assert_array_equal(target.all, landed)
    assert target.bytes_read == 0


def test_cancelled_before_anything_has_begun(pair: tuple[End, End]) -> None:
    source, target = pair
    before = target.all.copy()
    write_id = source.transport.write("target", 0, ALL, ALL)
    other = source.transport.write("target", 0, ALL[:16], ALL[:16])
    source.transport.cancel(write_id)
    source.transport.cancel(write_id)
    results = {result.write_id: result.error for result in run(2, source, target)}
    assert results == {write_id: "cancelled", other: None}
    np.testing.assert_array_equal(target.pages[:16], source.pages[:16])
    np.testing.assert_array_equal(target.all[17:], before[17:])
    source.pages[:] = 7
    after = target.all.copy()
    poll_often(source, target)
    np.testing.assert_array_equal(target.all, after)


def test_cancelled_in_the_middle(pair: tuple[End, End]) -> None:
    source, target = pair
    write_id = source.transport.write("target", 0, ALL, ALL)
    begin(source, target)
    source.transport.cancel(write_id)
    (result,) = run(1, source, target)
    assert (result.error, result.bytes_moved) == ("cancelled", 0)
    landed = target.all.copy()
    source.pages[:] = 7
    poll_often(source, target)
    np.testing.assert_array_equal(target.all, landed)
    source.transport.write("target", 0, ALL, ALL)
    assert [r.error for r in run(1, target, source)] == [None]
    assert (target.pages == 7).all()


def test_what_was_begun_ends_only_when_the_target_has_let_go(
    pair: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair
    with monkeypatch.context() as patched:
        keep_answers(target, patched)
        write_id = source.transport.write("target", 0, ALL, ALL)
        begin(source, target)
    source.transport.reset("target")
    poll_often(source, target)
    source.transport.connect("target", target.transport.describe())
    (result,) = run(1, source, target)
    assert result.write_id == write_id
    assert "was reset" in (result.error or "")
    landed = target.all.copy()
    source.pages[:] = 7
    poll_often(source, target)
    np.testing.assert_array_equal(target.all, landed)
    poll_until(lambda: source.pulling.shares_with("target"), source, target)
    source.transport.write("target", 0, ALL, ALL)
    assert [r.error for r in run(1, target, source)] == [None]
    assert (target.pages == 7).all()


def test_a_reset_ends_what_was_not_begun(pair: tuple[End, End]) -> None:
    source, target = pair
    before = target.all.copy()
    source.transport.write("target", 0, ALL, ALL)
    source.transport.reset("target")
    (result,) = run(1, source)
    assert "was reset" in (result.error or "")
    poll_often(source, target)
    np.testing.assert_array_equal(target.all, before)


def test_a_reset_leaves_the_other_direction_alone(pair: tuple[End, End]) -> None:
    source, target = pair
    target.transport.connect("source", source.transport.describe())
    poll_until(lambda: target.pulling.shares_with("source"), source, target)
    for seed in range(3):
        pages, read = shuffled(seed), source.bytes_read
        target.transport.write("source", 0, pages, ALL)
        source.transport.reset("target")
        assert [r.error for r in run(1, source, target)] == [None]
        np.testing.assert_array_equal(source.pages, target.pages[pages])
        assert source.bytes_read > read
        connect(source, target)


def test_nothing_lands_from_a_source_that_was_disconnected(pair: tuple[End, End]) -> None:
    source, target = pair
    source.transport.write("target", 0, ALL, ALL)
    begin(source, target)
    source.transport.write("target", 0, ALL, ALL)
    target.transport.disconnect("source")
    landed, read = target.all.copy(), target.bytes_read
    for _ in range(100):
        target.transport.poll()
    np.testing.assert_array_equal(target.all, landed)
    assert target.bytes_read == read


def test_a_target_that_restarted_under_its_name(pair: tuple[End, End], make: Make) -> None:
    source, old = pair
    with pytest.MonkeyPatch.context() as patched:
        keep_answers(old, patched)
        source.transport.write("target", 0, ALL, ALL)
        begin(source, old)
    old.transport.close()
    new = make("target", 3)
    landed = old.all.copy()
    source.transport.connect("target", new.transport.describe())
    (result,) = run(1, source, new)
    assert result.error is not None
    poll_until(lambda: source.pulling.shares_with("target"), source, new)
    source.transport.write("target", 0, ALL, ALL)
    assert [r.error for r in run(1, new, source)] == [None]
    np.testing.assert_array_equal(new.pages, source.pages)
    np.testing.assert_array_equal(old.all, landed)
    assert new.bytes_read > 0


def test_a_source_that_restarted_under_its_name(pair: tuple[End, End], make: Make) -> None:
    old, target = pair
    old.transport.write("target", 0, ALL, ALL)
    old.transport.close()
    target.transport.disconnect("source")
    new = make("source", 3)
    connect(new, target)
    new.transport.write("target", 0, ALL, ALL)
    assert [r.error for r in run(1, target, new)] == [None]
    np.testing.assert_array_equal(target.pages, new.pages)


def test_what_the_target_cannot_read_is_written(
    pair: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair

    def fail(*arguments: object) -> object:
        raise PeerError("out of reach")

    monkeypatch.setattr(target.transport, "start_read", fail)
    source.transport.write("target", 0, ALL, ALL)
    assert [r.error for r in run(1, target, source)] == [None]
    np.testing.assert_array_equal(target.pages, source.pages)
    assert not source.pulling.shares_with("target")
    source.transport.write("target", 0, ALL[:32], ALL[32:64])
    assert [r.error for r in run(1, target, source)] == [None]
    np.testing.assert_array_equal(target.pages[32:64], source.pages[:32])


# ------------------------------------------------------------------------------------ odd messages


class FakeWire:
    """Keeps what is sent; every endpoint is "stranger"; reads last until they are stopped."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.reads: list[tuple[object, ...]] = []
        self.stopped: list[object] = []
        self.is_done = False

    def send(self, agent: str, message: bytes) -> None:
        self.sent.append(message)

    def admit(self, metadata: bytes, regions: object) -> str:
        return "stranger"

    def expel(self, agent: str) -> None:
        pass

    def start_read(self, *arguments: object) -> object:
        self.reads.append(arguments)
        return len(self.reads)

    def is_read(self, handle: object) -> bool:
        return self.is_done

    def release(self, handle: object) -> bool:
        return True

    def stop(self, agent: str, handle: object) -> None:
        self.stopped.append(handle)


REGION = Region(1 << 20, 8, 4096)
RING = Region(0, 0, 1 << 20)
SOUND = Offer(
    1,
    9,
    -1,
    0,
    np.array([3, 4], "<i4").tobytes(),
    np.array([5, 6], "<i4").tobytes(),
    PagePart(0, 0, 64, 2, 128, 64),
)


@pytest.fixture
def tickets() -> Iterator[Tickets]:
    made = Tickets()
    yield made
    made.close()


def a_target(tickets: Tickets) -> tuple[Pulling, FakeWire]:
    wire = FakeWire()
    pulling = Pulling(wire, "target", b"", [REGION], None, shares=True)
    hello = Hello(1, "source", (dataclasses.replace(REGION, num_pages=6), RING), None, b"")
    file = tickets.describe()
    pulling.receive("stranger", _encoder.encode(msgspec.structs.replace(hello, tickets=file)))
    assert _decoder.decode(wire.sent[-1]) == Welcome(1, True)
    return pulling, wire


def test_a_share_is_read_once_its_ticket_was_drawn(tickets: Tickets) -> None:
    pulling, wire = a_target(tickets)
    for piece in (7, 8, 9):
        tickets.put(piece)
        if piece != 7:
            offer = msgspec.structs.replace(SOUND, piece=piece)
            pulling.receive("stranger", _encoder.encode(offer))
    assert tickets.draw() == 7
    assert tickets.draw() == 8
    assert pulling.pull() == 0
    assert len(wire.reads) == 1
    wire.is_done = True
    assert pulling.pull() == 2 * 128
    assert _decoder.decode(wire.sent[-1]) == Done(9)
    assert wire.stopped == [1]
    assert pulling.pull() == 0
    assert tickets.draw() is None
    tickets.put(10)
    pulling.receive("stranger", _encoder.encode(msgspec.structs.replace(SOUND, piece=11)))
    assert pulling.pull() == 0, "what is drawn is another one"
    assert len(wire.reads) == 1


@pytest.mark.parametrize("end_it", ["dead", "hello", "close"])
def test_a_read_under_way_is_stopped_before_its_source_is_forgotten(
    tickets: Tickets, end_it: str
) -> None:
    pulling, wire = a_target(tickets)
    tickets.put(9)
    pulling.receive("stranger", _encoder.encode(SOUND))
    pulling.pull()
    assert (len(wire.reads), wire.stopped) == (1, [])
    match end_it:
        case "dead":
            pulling.dead("source", "gone")
        case "hello":
            hello = Hello(2, "source", (REGION, RING), None, b"")
            pulling.receive("stranger", _encoder.encode(hello))
            assert _decoder.decode(wire.sent[-1]) == Welcome(2, False)
        case "close":
            pulling.close()
    assert wire.stopped == [1]
    pulling.receive("stranger", _encoder.encode(SOUND))
    pulling.pull()
    assert len(wire.reads) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"region": 1},
        {"region": -1},
        {"target_pages": np.array([5, 8], "<i4").tobytes()},
        {"target_pages": np.array([-1, 5], "<i4").tobytes()},
        {"target_pages": b"abc"},
        {"target_pages": b""},
        {"target_pages": np.array([5], "<i4").tobytes()},
        {"source_pages": np.array([3, 6], "<i4").tobytes()},
        {"source_pages": np.array([3, -1], "<i4").tobytes()},
        {"source_pages": b"abcdefg"},
        {"source_pages": b""},
        {"part": PagePart(4096, 0, 64)},
        {"part": PagePart(0, 4033, 64)},
        {"part": PagePart(-1, 0, 64)},
        {"part": PagePart(0, 0, 64, 2, -64, 64)},
        {"part": PagePart(0, 64, 64, 2, 64, -128)},
        {"part": PagePart(0, 0, 0)},
        {"part": PagePart(0, 0, 64, 0)},
        {"unit": 0},
    ],
    ids=str,
)
def test_a_share_that_does_not_fit_is_refused(tickets: Tickets, change: dict[str, object]) -> None:
    pulling, wire = a_target(tickets)
    tickets.put(9)
    pulling.receive("stranger", _encoder.encode(msgspec.structs.replace(SOUND, **change)))
    pulling.poll()
    pulling.pull()
    assert isinstance(_decoder.decode(wire.sent[-1]), Refused)
    assert (wire.reads, pulling.is_busy) == ([], False)
    tickets.put(10)
    pulling.receive("stranger", _encoder.encode(msgspec.structs.replace(SOUND, piece=10)))
    pulling.pull()
    assert len(wire.reads) == 1, "the next one is sound"


def test_tickets_out_of_reach_are_not_used(tickets: Tickets) -> None:
    wire = FakeWire()
    pulling = Pulling(wire, "target", b"", [REGION], None, shares=True)
    file = tickets.describe()
    for odd in (
        msgspec.structs.replace(file, inode=file.inode + 1),
        msgspec.structs.replace(file, fd=1 << 30),
        msgspec.structs.replace(file, fd=-1),
        msgspec.structs.replace(
            file, process=msgspec.structs.replace(file.process, host="another")
        ),
        msgspec.structs.replace(file, process=msgspec.structs.replace(file.process, pid=1 << 30)),
        msgspec.structs.replace(file, process=msgspec.structs.replace(file.process, pid=1 << 40)),
        None,
    ):
        hello = Hello(1, "source", (REGION, RING), odd, b"")
        pulling.receive("stranger", _encoder.encode(hello))
        assert _decoder.decode(wire.sent[-1]) == Welcome(1, False)
        pulling.receive("stranger", _encoder.encode(SOUND))
        assert isinstance(_decoder.decode(wire.sent[-1]), Refused)


def test_answers_that_nobody_waits_for_are_dropped(pair: tuple[End, End]) -> None:
    source, target = pair
    for message in (Done(1), Done(10**9), Refused(1, "no"), Welcome(99, True)):
        source.pulling.receive("stranger", _encoder.encode(message))
    source.transport.write("target", 0, ALL, ALL)
    assert [r.error for r in run(1, target, source)] == [None]
    np.testing.assert_array_equal(target.pages, source.pages)


# ------------------------------------------------------------------------------------ two processes


def run_target(connection: Connection, is_silent: bool) -> None:
    target = End("target", 2)
    connection.send(target.transport.describe())
    with pytest.MonkeyPatch.context() as patched:
        if is_silent:
            keep_answers(target, patched)
        said = False
        while not connection.poll(0.0005):
            target.transport.poll()
            if target.bytes_read and not said:
                connection.send("reads")
                said = True
    connection.send_bytes(target.all.tobytes())
    connection.recv()
    target.transport.close()


def run_source(connection: Connection) -> None:
    """Write on and on."""
    transfer.nixl._SHARE_FROM = 1 << 20
    transfer.pulling.SHARE_BYTES = 256 << 10
    source = End("source", 1)
    source.transport.connect("target", connection.recv())
    connection.send("connected")
    in_flight = 0
    while True:
        while in_flight < 4:
            source.transport.write("target", 0, ALL, ALL)
            in_flight += 1
        in_flight -= len(source.transport.poll())


@contextlib.contextmanager
def process(
    function: Callable[..., None], *arguments: object
) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    started = context.Process(target=function, args=(there, *arguments), daemon=True)
    started.start()
    there.close()
    try:
        yield started, here
    finally:
        started.kill()
        started.join(DEADLINE_S)


def receive(connection: Connection) -> object:
    assert connection.poll(DEADLINE_S), "the other process did not answer"
    return connection.recv()


def test_a_share_is_read_by_another_process(make: Make) -> None:
    source = make("source", 1)
    with process(run_target, False) as (_, connection):
        source.transport.connect("target", receive(connection))
        poll_until(lambda: source.pulling.shares_with("target"), source)
        deadline = time.monotonic() + DEADLINE_S
        pages = shuffled(5)
        while not connection.poll():
            assert time.monotonic() < deadline, "the target has no share"
            source.transport.write("target", 0, pages, ALL)
            assert [r.error for r in run(1, source)] == [None]
        expected = End("target", 2, {"pull": "off"})
        expected.transport.close()
        expected.pages[:] = source.pages[pages]
        assert connection.recv() == "reads"
        connection.send("memory")
        assert connection.poll(DEADLINE_S)
        assert connection.recv_bytes() == expected.all.tobytes()


def test_a_target_that_was_killed_in_the_middle(make: Make) -> None:
    source = make("source", 1)
    with process(run_target, True) as (target, connection):
        source.transport.connect("target", receive(connection))
        poll_until(lambda: source.pulling.shares_with("target"), source)
        posted = set()
        deadline = time.monotonic() + DEADLINE_S
        ended: set[int] = set()
        while not connection.poll():
            assert time.monotonic() < deadline, "the target has no share"
            if len(posted) - len(ended) < 2:
                posted.add(source.transport.write("target", 0, ALL, ALL))
            ended |= {result.write_id for result in source.transport.poll()}
        for _ in range(200):
            ended |= {result.write_id for result in source.transport.poll()}
        assert posted - ended, "the target has said nothing"
        target.kill()
        target.join(DEADLINE_S)
        assert not {r.write_id for r in source.transport.poll() if r.error is None} - ended
        source.transport.disconnect("target")
        results = source.transport.poll()
        assert posted - ended == {result.write_id for result in results}
        assert all(result.error for result in results)
    with process(run_target, False) as (_, connection):
        source.transport.connect("target", receive(connection))
        source.transport.write("target", 0, ALL, ALL)
        assert [r.error for r in run(1, source)] == [None]


def test_a_source_that_was_killed_in_the_middle(make: Make) -> None:
    target = make("target", 2)
    with process(run_source) as (source, connection):
        connection.send(target.transport.describe())
        assert receive(connection) == "connected"
        poll_until(lambda: target.bytes_read > 4 << 20, target)
        source.kill()
        target.transport.poll()
        source.join(DEADLINE_S)
        target.transport.disconnect("source")
        landed = target.all.copy()
        poll_often(target)
        np.testing.assert_array_equal(target.all, landed)
        assert not target.pulling.is_busy
    again = make("source", 3)
    connect(again, target)
    again.transport.write("target", 0, ALL, ALL)
    assert [r.error for r in run(1, target, again)] == [None]
    np.testing.assert_array_equal(target.pages, again.pages)
