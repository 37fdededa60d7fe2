"""A storage, the memory of its region with a page of canary before and after, and content that
names its place: each byte is a function of its object's key and of its offset."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from hicache.storage.backends import make_storage
from hicache.storage.storage import ObjectPart, Outcome, Storage, StorageResult
from transfer.memory import HostMemory, allocate_host
from transfer.transport import Region

DEADLINE_S = 20.0
NUM_PAGES, PAGE_BYTES = 24, 12_000
CANARY = 0xC5


@dataclasses.dataclass
class End:
    storage: Storage
    memory: np.ndarray
    allocated: HostMemory

    @property
    def pages(self) -> np.ndarray:
        size = len(self.memory) // (NUM_PAGES + 2)
        return self.memory[size:-size].reshape(NUM_PAGES, size)

    def fill(self, pages: Sequence[int], keys: Sequence[str]) -> None:
        for page, key in zip(pages, keys, strict=True):
            self.pages[page] = content(key, self.pages.shape[1])

    def put(self, keys: Sequence[str], pages: Sequence[int]) -> list[Outcome]:
        """The content of `keys`, by way of `pages`."""
        self.fill(pages, keys)
        return self.do("put", keys, pages)

    def get(self, keys: Sequence[str], pages: Sequence[int]) -> list[Outcome]:
        """Checks the pages of all hits, and that no other byte has changed."""
        expected = self.memory.copy()
        outcomes = self.do("get", keys, pages)
        size = self.pages.shape[1]
        rows = expected[size:-size].reshape(NUM_PAGES, size)
        for key, page, outcome in zip(keys, pages, outcomes, strict=True):
            rows[page] = content(key, size) if outcome is Outcome.HIT else self.pages[page]
        np.testing.assert_array_equal(self.memory, expected)
        return outcomes

    def exists(self, keys: Sequence[str]) -> list[Outcome]:
        return list(self.wait(self.storage.submit_exists(keys, DEADLINE_S)).outcomes)

    def remove(self, keys: Sequence[str]) -> list[Outcome]:
        return list(self.wait(self.storage.submit_remove(keys, DEADLINE_S)).outcomes)

    def clear(self) -> None:
        assert self.wait(self.storage.submit_clear(DEADLINE_S)).error is None

    def do(
        self, kind: str, keys: Sequence[str], pages: Sequence[int], part: ObjectPart | None = None
    ) -> list[Outcome]:
        return list(self.wait(self.submit(kind, keys, pages, part=part)).outcomes)

    def submit(
        self,
        kind: str,
        keys: Sequence[str],
        pages: Sequence[int],
        timeout_s: float = DEADLINE_S,
        part: ObjectPart | None = None,
    ) -> int:
        call = self.storage.submit_put if kind == "put" else self.storage.submit_get
        return call(keys, 0, np.array(pages, np.int32), timeout_s, part)

    def wait(self, operation_id: int, deadline_s: float = DEADLINE_S) -> StorageResult:
        """The only operation under way."""
        deadline = time.monotonic() + deadline_s
        while not (results := self.storage.poll()):
            assert time.monotonic() < deadline, "the operation did not end"
            time.sleep(0.0005)
        (result,) = results
        assert result.operation_id == operation_id
        return result


def content(key: str, size: int) -> np.ndarray:
    place = np.arange(size, dtype=np.uint64) + np.uint64(zlib.crc32(key.encode()))
    return ((place * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(56)).astype(np.uint8)


def make_end(backend: str, options: dict[str, str], page_bytes: int = PAGE_BYTES) -> End:
    storage = make_storage(backend, "test", options)
    allocated = allocate_host((NUM_PAGES + 2) * page_bytes)
    memory = np.frombuffer(allocated.buffer, np.uint8, (NUM_PAGES + 2) * page_bytes)
    memory[:] = CANARY
    storage.register([Region(allocated.address + page_bytes, NUM_PAGES, page_bytes)])
    return End(storage, memory, allocated)


def keys_of(*numbers: int) -> list[str]:
    return [f"page-{number}" for number in numbers]


def free_port() -> int:
    """Below those that the kernel gives to whoever asks for any."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def start_master(log: Path, port: int) -> subprocess.Popen[bytes]:
    """A Mooncake master that listens."""
    command = [
        str(Path(sys.executable).parent / "mooncake_master"),
        "--rpc_address=127.0.0.1",
        f"--rpc_port={port}",
        "--metrics_host=127.0.0.1",
        f"--metrics_port={free_port()}",
        "--enable_metric_reporting=false",
        "--client_ttl=2",
    ]
    with log.open("ab") as output:
        master = subprocess.Popen(command, stdout=output, stderr=output)
    deadline = time.monotonic() + DEADLINE_S
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return master
        assert master.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "the master does not listen"
        time.sleep(0.02)


@contextlib.contextmanager
def running_master(log: Path) -> Iterator[str]:
    """Its address."""
    port = free_port()
    master = start_master(log, port)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        master.kill()
        master.wait()


STORE = """
import sys, time
import mooncake.store
store = mooncake.store.MooncakeDistributedStore()
address = sys.argv[1]
assert not store.setup("127.0.0.1", "P2PHANDSHAKE", 64 << 20, 1 << 20, "tcp", "", address)
print("ready", flush=True)
time.sleep(600)
"""


def start_store(log: Path, address: str) -> subprocess.Popen[bytes]:
    """A process that gives memory to the Mooncake store of the master at `address`."""
    with log.open("ab") as output:
        store = subprocess.Popen(
            [sys.executable, "-c", STORE, address],
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, "MC_FORCE_TCP": "1"},
        )
    assert store.stdout is not None
    with store.stdout as said:
        assert said.readline() == b"ready\n", log.read_text()
    return store


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of `size`, mounted at `path`; OSError or CalledProcessError where that is not
    allowed."""
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill_up(file: Path) -> None:
    """Write until its disk has no block left."""
    with contextlib.suppress(OSError), file.open("ab") as output:
        while True:
            output.write(bytes(4096))
            output.flush()
