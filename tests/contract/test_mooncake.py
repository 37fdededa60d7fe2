"""What is Mooncake's own: peers that die, stop, restart or are not who they were."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import msgspec
import numpy as np
import pytest

from transfer.backends import make_transport
from transfer.endpoint import Description, encode_description
from transfer.transport import (
    ConfigurationError,
    PeerError,
    Region,
    Transport,
    WriteResult,
)

try:
    import transfer.mooncake  # noqa: F401
except (ImportError, OSError) as error:
    needed = "pip install 'pagerelay[mooncake]', and libibverbs1, libnuma1 and libcurl4"
    pytest.skip(f"needs {needed} ({error})", allow_module_level=True)

NUM_PAGES, PAGE_BYTES = 16, 4 << 20
PAGES = np.arange(NUM_PAGES, dtype=np.int32)
DEADLINE_S = 20.0


def make_end(name: str, fill: int) -> tuple[Transport, np.ndarray]:
    transport = make_transport("mooncake", name)
    memory = np.full((NUM_PAGES, PAGE_BYTES), fill, dtype=np.uint8)
    transport.register([Region(memory.ctypes.data, NUM_PAGES, PAGE_BYTES)])
    return transport, memory


def wait(transport: Transport, deadline_s: float = DEADLINE_S) -> WriteResult:
    deadline = time.monotonic() + deadline_s
    while not (results := transport.poll()):
        assert time.monotonic() < deadline, "the write did not end"
        time.sleep(0.001)
    (result,) = results
    return result


def run_target(connection: Connection) -> None:
    """Say where we are, then how many bytes of the memory were written, as often as asked."""
    transport, memory = make_end("target", 0)
    connection.send(transport.describe())
    while connection.recv() == "count":
        connection.send(int(np.count_nonzero(memory)))
    transport.close()


Start = Callable[[], tuple[BaseProcess, Connection, bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a target process; it ends with the test."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:

        def started() -> tuple[BaseProcess, Connection, bytes]:
            here, there = context.Pipe()
            process = context.Process(target=run_target, args=(there,), daemon=True)
            process.start()
            there.close()
            stack.callback(here.close)
            stack.callback(process.join)
            stack.callback(process.kill)
            assert here.poll(DEADLINE_S)
            return process, here, here.recv()

        yield started


@pytest.fixture
def source() -> Iterator[Transport]:
    transport, memory = make_end("source", 1)
    yield transport
    transport.close()
    assert memory.all()


def count(connection: Connection) -> int:
    connection.send("count")
    assert connection.poll(DEADLINE_S)
    return int(connection.recv())


@pytest.mark.parametrize("after_s", [None, 0.0, 0.005])
def test_a_killed_peer_gives_an_error_in_time(
    start: Start, source: Transport, after_s: float | None
) -> None:
    process, _connection, description = start()
    source.connect("target", description)
    source.write("target", 0, PAGES[:1], PAGES[:1])
    assert wait(source).error is None
    if after_s is None:
        process.kill()
        process.join()
    source.write("target", 0, PAGES, PAGES[::-1].copy())
    if after_s is not None:
        time.sleep(after_s)
        process.kill()
    result = wait(source, 5)
    assert result.error is not None
    assert result.bytes_moved == 0
    with pytest.raises(PeerError, match="not connected"):
        source.write("target", 0, PAGES, PAGES)
    _, connection, description = start()
    source.connect("target", description)
    source.write("target", 0, PAGES, PAGES)
    assert wait(source).error is None
    assert count(connection) == NUM_PAGES * PAGE_BYTES


@pytest.mark.parametrize("end_it", ["time out", "disconnect"])
def test_no_byte_follows_an_error_of_a_stopped_peer(
    start: Start, source: Transport, monkeypatch: pytest.MonkeyPatch, end_it: str
) -> None:
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "1")
    monkeypatch.setenv("MC_TCP_STATUS_TIMEOUT_SEC", "1")
    process, connection, description = start()
    source.connect("target", description)
    source.write("target", 0, PAGES[:1], PAGES[:1])
    assert wait(source).error is None
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    source.write("target", 0, PAGES, PAGES)
    if end_it == "disconnect":
        time.sleep(0.05)
        source.disconnect("target")
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        assert source.poll() == [], "what its kernel has may still land"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGCONT)
    assert wait(source).error is not None
    landed = count(connection)
    assert landed > PAGE_BYTES, "nothing was on its way, so the test shows nothing"
    time.sleep(0.5)
    assert count(connection) == landed


@pytest.mark.parametrize("was_open", [True, False])
def test_a_stopped_peer_does_not_delay_another(
    start: Start, source: Transport, monkeypatch: pytest.MonkeyPatch, was_open: bool
) -> None:
    monkeypatch.setenv("MC_TCP_PROGRESS_TIMEOUT_SEC", "1")
    stopped, _, description = start()
    assert stopped.pid is not None
    if not was_open:
        os.kill(stopped.pid, signal.SIGSTOP)
    source.connect("stopped", description)
    if was_open:
        source.write("stopped", 0, PAGES[:1], PAGES[:1])
        assert wait(source).error is None
        os.kill(stopped.pid, signal.SIGSTOP)
    source.write("stopped", 0, PAGES, PAGES)
    _, _, description = start()
    source.connect("other", description)
    for _ in range(5):
        write_id = source.write("other", 0, PAGES, PAGES)
        result = wait(source)  # it comes first: the other write has not ended
        assert (result.write_id, result.error) == (write_id, None)
        time.sleep(0.4)
    stopped.kill()
    assert wait(source).error is not None


def test_who_has_the_address_of_a_former_peer_is_another_peer(
    start: Start, source: Transport
) -> None:
    _, connection, description = start()
    end = msgspec.msgpack.decode(description, type=Description)
    metadata = msgspec.msgpack.decode(end.metadata)
    for former in range(3):
        old = {**metadata, "identity": bytes([former] * 16)}
        source.connect(
            "target",
            encode_description(
                msgspec.structs.replace(
                    end, endpoint=f"former-{former}", metadata=msgspec.msgpack.encode(old)
                )
            ),
        )
        source.write("target", 0, PAGES, PAGES)
        error = wait(source).error
        assert error is not None
        assert "another answers" in error
    assert count(connection) == 0
    source.connect("target", description)
    source.write("target", 0, PAGES[:3], PAGES[5:8])
    assert wait(source).error is None
    assert count(connection) == 3 * PAGE_BYTES


def test_a_cancelled_write_ends_early(start: Start, source: Transport) -> None:
    _, connection, description = start()
    source.connect("target", description)
    long = np.tile(PAGES, 16)
    write_id = source.write("target", 0, long, long)
    source.cancel(write_id)
    assert wait(source).error == "cancelled"
    landed = count(connection)
    time.sleep(0.1)
    assert count(connection) == landed
    source.write("target", 0, PAGES, PAGES)
    assert wait(source).error is None


def test_close_with_a_write_in_flight(start: Start) -> None:
    _, _, description = start()
    transport, _memory = make_end("closing", 1)
    transport.connect("target", description)
    transport.write("target", 0, PAGES, PAGES)
    time.sleep(0.005)
    transport.close()
    assert transport.poll() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"speed": "9", "host": "127.0.0.1"}, "'speed'"), ({"protocol": "smoke"}, "tcp and rdma")],
)
def test_a_wrong_option_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_transport("mooncake", "name", options)


@pytest.mark.skipif(
    Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()),
    reason="this host has RDMA devices",
)
def test_rdma_without_a_device_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no RDMA device"):
        make_transport("mooncake", "name", {"protocol": "rdma"})


def test_gpu_memory_is_refused() -> None:
    with (
        contextlib.closing(make_transport("mooncake", "name")) as transport,
        pytest.raises(ConfigurationError, match="host memory only"),
    ):
        transport.register([Region(4096, 1, 4096, device=0)])


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "transfer.mooncake", raising=False)
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(ConfigurationError, match=r"pip install.*libibverbs1"):
        make_transport("mooncake", "name")
