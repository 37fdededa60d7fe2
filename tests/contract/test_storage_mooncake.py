"""What is Mooncake's own: a master or a store that dies, stops or is replaced."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from storage_world import NUM_PAGES, End, free_port, keys_of, make_end, start_master, start_store

from hicache.storage.backends import make_storage
from hicache.storage.storage import Outcome, StorageConfigurationError, StorageResult

try:
    import hicache.storage.mooncake  # noqa: F401
except (ImportError, OSError) as error:
    needed = "pip install 'pagerelay[mooncake]', and libibverbs1, libnuma1 and libcurl4"
    pytest.skip(f"needs {needed} ({error})", allow_module_level=True)

HIT, MISS, STORED, PRESENT = Outcome.HIT, Outcome.MISS, Outcome.STORED, Outcome.PRESENT
PAGE_BYTES = 1 << 18
KEYS = keys_of(*range(NUM_PAGES))
PAGES = list(range(NUM_PAGES))


class World:
    """A master, a process with the store's memory, and our end, which adds none."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"

    def start_master(self) -> subprocess.Popen[bytes]:
        return self._ended(start_master(self._folder / "master.log", self._port))

    def start_store(self) -> subprocess.Popen[bytes]:
        return self._ended(start_store(self._folder / "store.log", self.address))

    def make_end(self, **options: str) -> End:
        end = make_end("mooncake", {"master": self.address, **options}, PAGE_BYTES)
        self._stack.callback(end.storage.close)
        return end

    def _ended(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)
        self._stack.callback(process.send_signal, signal.SIGCONT)
        return process


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        yield World(tmp_path, stack)


def in_time(end: End, number: int, timeout_s: float) -> StorageResult:
    started = time.monotonic()
    result = end.wait(number, timeout_s + 1)
    assert time.monotonic() - started < timeout_s + 0.5
    return result


def until_stored(end: End, names: list[str], deadline_s: float = 20.0) -> None:
    """Service resumes by itself."""
    deadline = time.monotonic() + deadline_s
    while set(end.put(names, PAGES[: len(names)])) != {STORED}:
        assert time.monotonic() < deadline, "nothing can be stored"
        time.sleep(0.1)


def test_a_killed_master_gives_failures_in_time_and_a_new_one_service(world: World) -> None:
    master, store = world.start_master(), world.start_store()
    end = world.make_end()
    assert end.put(KEYS, PAGES) == [STORED] * NUM_PAGES
    end.fill(PAGES, KEYS)
    numbers = [end.submit("get", KEYS, PAGES, timeout_s=2.0) for _ in range(20)]
    master.kill()
    results: dict[int, StorageResult] = {}
    deadline = time.monotonic() + 3.0
    while len(results) < len(numbers):
        assert time.monotonic() < deadline
        results.update((result.operation_id, result) for result in end.storage.poll())
    assert {o for r in results.values() for o in r.outcomes} <= {HIT, MISS, Outcome.FAILED}
    for kind in ("put", "get"):
        names = keys_of(*range(100, 100 + NUM_PAGES))
        result = in_time(end, end.submit(kind, names, PAGES, timeout_s=1.0), 1.0)
        assert set(result.outcomes) == {Outcome.FAILED}
        assert result.error
    result = in_time(end, end.storage.submit_exists(KEYS, 1.0), 1.0)
    assert set(result.outcomes) == {Outcome.FAILED}
    world.start_master()
    until_stored(end, keys_of(*range(200, 208)))
    assert end.get(keys_of(*range(200, 208)), PAGES[8:16]) == [HIT] * 8
    assert set(end.get(KEYS, PAGES)) <= {MISS, HIT}
    assert store.poll() is None


def test_a_killed_store_gives_misses_and_a_new_one_service(world: World) -> None:
    world.start_master()
    store = world.start_store()
    end = world.make_end()
    assert end.put(KEYS, PAGES) == [STORED] * NUM_PAGES
    number = end.submit("get", KEYS, PAGES, timeout_s=5.0)
    store.kill()
    assert set(in_time(end, number, 5.0).outcomes) <= {HIT, MISS, Outcome.FAILED}
    deadline = time.monotonic() + 15
    while set(end.get(KEYS, PAGES)) != {MISS}:  # until the master has seen it dead
        assert time.monotonic() < deadline
    assert set(end.put(KEYS, PAGES)) == {Outcome.FULL}, "there is no memory"
    world.start_store()
    until_stored(end, KEYS)
    assert end.get(KEYS, PAGES[::-1]) == [HIT] * NUM_PAGES


def test_a_stopped_store_holds_pages_beyond_the_deadline(world: World) -> None:
    world.start_master()
    store = world.start_store()
    end = world.make_end(threads="1")
    end.put(KEYS, PAGES)
    store.send_signal(signal.SIGSTOP)
    number = end.submit("get", KEYS, PAGES, timeout_s=0.5)
    result = in_time(end, number, 0.5)
    assert set(result.outcomes) == {Outcome.FAILED}
    assert result.pages_in_use
    late = in_time(end, end.submit("get", KEYS, PAGES, timeout_s=0.2), 0.2)
    assert not late.pages_in_use
    store.send_signal(signal.SIGCONT)
    deadline = time.monotonic() + 10
    while not (released := end.storage.released()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert released == [number]
    before = end.memory.copy()
    time.sleep(0.2)
    assert (end.memory == before).all(), "pages were written after they had been released"


def test_without_a_master_operations_fail_until_there_is_one(world: World) -> None:
    end = world.make_end(segment="64M")
    for _ in range(2):
        result = in_time(end, end.submit("put", KEYS, PAGES, timeout_s=2.0), 2.0)
        assert set(result.outcomes) == {Outcome.FAILED}
        assert result.error
        assert "master" in result.error
    world.start_master()
    until_stored(end, KEYS)
    assert end.get(KEYS, PAGES) == [HIT] * NUM_PAGES


def test_damage_in_the_store_is_a_miss_and_clear_removes_our_keys_only(world: World) -> None:
    import mooncake.store
    import numpy as np

    world.start_master()
    world.start_store()
    end, others = world.make_end(prefix="a.b/"), world.make_end(prefix="aXb/")
    assert end.put(["x", "y"], [0, 1]) == [STORED] * 2
    assert others.put(["x"], [0]) == [STORED]
    client = mooncake.store.MooncakeDistributedStore()
    assert not client.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 << 20, "tcp", "", world.address)
    data = np.frombuffer(client.get("a.b/x"), np.uint8).copy()
    assert len(data) == PAGE_BYTES + 29
    for place in (3, 9, 25, 28, 29, len(data) - 1):
        damaged = data.copy()
        damaged[place] ^= 1
        client.remove("a.b/x", True)
        assert client.put("a.b/x", damaged.tobytes()) == 0
        assert end.get(["x", "y"], [4, 5]) == [Outcome.CORRUPT, HIT]
        assert end.get(["x"], [4]) == [MISS]
        assert end.put(["x"], [0]) == [STORED]
    client.close()
    end.clear()
    assert end.exists(["x", "y"]) == [MISS, MISS]
    assert others.get(["x"], [1]) == [HIT]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs option 'master'"),
        ({"master": "somewhere"}, "host:port"),
        ({"master": "a:1", "protocol": "smoke"}, "tcp or rdma"),
        ({"master": "a:1", "segment": "-1"}, "segment: expected a size"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(StorageConfigurationError, match=message):
        make_storage("mooncake", "name", options)
