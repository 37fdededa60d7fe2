"""GPU memory to GPU memory of another process: bytes in their places, nothing else changed.

Runs where there is a CUDA device, on two devices where there are two.
"""

import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch

from transfer.backends import make_transport
from transfer.transport import PagePart, PeerError, Region, Transport, WriteResult

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

DEADLINE_S = 60.0
NUM_PAGES, PAGE_BYTES = 96, 3 << 20
PARTS = {
    "whole pages": PagePart(0, 0, PAGE_BYTES),
    "head slices": PagePart(3 << 18, 0, 3 << 18),
    "strided runs": PagePart(4096, 8192, 2048, 40, 4096, 8192),
    "odd bytes": PagePart(3, 5, 1027, 7, 2050, 4099),
    "halves of words": PagePart(4, 12, 2052, 3, 4104, 8212),
}


class Pool:
    """A region on a GPU, with a page of canary before and after it."""

    def __init__(self, backend: str, name: str, device: int, seed: int) -> None:
        generator = torch.Generator(device=f"cuda:{device}").manual_seed(seed)
        self.all = torch.randint(
            0,
            256,
            (NUM_PAGES + 2, PAGE_BYTES),
            dtype=torch.uint8,
            device=f"cuda:{device}",
            generator=generator,
        )
        torch.cuda.synchronize(device)
        self.transport: Transport = make_transport(backend, name)
        self.transport.register([Region(self.all[1].data_ptr(), NUM_PAGES, PAGE_BYTES, device)])

    @property
    def pages(self) -> torch.Tensor:
        return self.all[1:-1]


def run_target(connection: Connection, backend: str, device: int) -> None:
    """Describe, poll, and answer with a copy of the memory, or disconnect, as told."""
    pool = Pool(backend, "target", device, 2)
    connection.send(pool.transport.describe())
    while True:
        pool.transport.poll()
        if connection.poll(0.0001):
            match connection.recv():
                case "end":
                    break
                case "memory":
                    torch.cuda.synchronize()
                    connection.send_bytes(pool.all.cpu().numpy().tobytes())
                case "describe":
                    connection.send(pool.transport.describe())
    pool.transport.close()


@contextlib.contextmanager
def target_process(
    backend: str,
) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection, bytes]]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    device = torch.cuda.device_count() - 1
    process = context.Process(target=run_target, args=(there, backend, device), daemon=True)
    process.start()
    there.close()
    assert here.poll(DEADLINE_S), "the target process did not start"
    try:
        yield process, here, here.recv()
    finally:
        with contextlib.suppress(OSError):
            here.send("end")
        process.join(DEADLINE_S)
        process.kill()


@pytest.fixture(params=["ipc", "nixl"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "nixl":
        pytest.importorskip("nixl", reason="nixl is not installed")
    return str(request.param)


@pytest.fixture
def source(backend: str) -> Iterator[Pool]:
    pool = Pool(backend, "source", 0, 1)
    yield pool
    pool.transport.close()


def wait(transport: Transport, count: int) -> list[WriteResult]:
    results: list[WriteResult] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(results) < count:
        assert time.monotonic() < deadline, f"{count - len(results)} writes did not end"
        results += transport.poll()
    return results


def memory(connection: Connection) -> torch.Tensor:
    connection.send("memory")
    assert connection.poll(DEADLINE_S)
    data = np.frombuffer(connection.recv_bytes(), dtype=np.uint8)
    return torch.from_numpy(data.copy()).view(NUM_PAGES + 2, PAGE_BYTES)


def apply(
    source: Pool, expected: torch.Tensor, origin: np.ndarray, to: np.ndarray, part: PagePart
) -> None:
    ours = source.pages[torch.from_numpy(origin).long().cuda()].cpu()
    for k in range(part.count):
        start = part.source_offset + k * part.source_stride
        place = part.target_offset + k * part.target_stride
        moved = ours[:, start : start + part.length]
        expected[1 + torch.from_numpy(to).long(), place : place + part.length] = moved


def test_parts_of_pages_land_in_another_process(backend: str, source: Pool) -> None:
    with target_process(backend) as (_, connection, description):
        source.transport.connect("target", description)
        expected = memory(connection)
        for seed, part in enumerate(PARTS.values()):
            random = np.random.default_rng(seed)
            origin = random.permutation(NUM_PAGES)[:80].astype(np.int32)
            to = random.permutation(NUM_PAGES)[:80].astype(np.int32)
            apply(source, expected, origin, to, part)
            source.transport.write("target", 0, origin, to, part)
            (result,) = wait(source.transport, 1)
            assert (result.error, result.bytes_moved) == (None, 80 * part.page_bytes)
            found = memory(connection)
            assert torch.equal(found, expected), f"part {seed}"


def test_many_writes_at_once(backend: str, source: Pool) -> None:
    with target_process(backend) as (_, connection, description):
        source.transport.connect("target", description)
        expected = memory(connection)
        ids = []
        for start in range(0, 96, 12):
            origin = np.arange(start, start + 12, dtype=np.int32)
            to = origin[::-1].copy()
            for k in range(4):
                part = PagePart(k * (PAGE_BYTES // 4), k * (PAGE_BYTES // 4), PAGE_BYTES // 4)
                apply(source, expected, origin, to, part)
                ids.append(source.transport.write("target", 0, origin, to, part))
        results = wait(source.transport, len(ids))
        assert sorted(result.write_id for result in results) == ids
        assert {result.error for result in results} == {None}
        assert torch.equal(memory(connection), expected)


def test_a_peer_that_was_killed_and_its_successor(backend: str, source: Pool) -> None:
    pages = np.random.default_rng(0).permutation(NUM_PAGES).astype(np.int32)
    part = PARTS["head slices"]
    with target_process(backend) as (process, _, description):
        source.transport.connect("target", description)
        source.transport.write("target", 0, pages, pages, part)
        wait(source.transport, 1)
        source.transport.write("target", 0, pages, pages, part)
        process.kill()
        process.join(DEADLINE_S)
        source.transport.disconnect("target")
        assert len(wait(source.transport, 1)) == 1
        with pytest.raises(PeerError, match="not connected"):
            source.transport.write("target", 0, pages, pages, part)
    with target_process(backend) as (_, connection, description):
        source.transport.connect("target", description)
        expected = memory(connection)
        apply(source, expected, pages, pages, part)
        source.transport.write("target", 0, pages, pages, part)
        assert [result.error for result in wait(source.transport, 1)] == [None]
        assert torch.equal(memory(connection), expected)


def test_in_one_process(backend: str, source: Pool) -> None:
    target = Pool(backend, "target", torch.cuda.device_count() - 1, 2)
    try:
        source.transport.connect("target", target.transport.describe())
        expected = target.all.cpu()
        pages = np.random.default_rng(1).permutation(NUM_PAGES).astype(np.int32)
        for part in PARTS.values():
            apply(source, expected, pages, pages[::-1].copy(), part)
            source.transport.write("target", 0, pages, pages[::-1].copy(), part)
            results: list[WriteResult] = []
            deadline = time.monotonic() + DEADLINE_S
            while not results:
                assert time.monotonic() < deadline
                results += source.transport.poll()
                target.transport.poll()
            assert results[0].error is None
        assert torch.equal(target.all.cpu(), expected)
    finally:
        target.transport.close()


def test_ipc_refuses_what_it_cannot_reach() -> None:
    from transfer.transport import ConfigurationError

    transport = make_transport("ipc", "x")
    with pytest.raises(ConfigurationError, match="GPU memory only"):
        transport.register([Region(4096, 1, 64)])
    with pytest.raises(ConfigurationError, match="colour"):
        make_transport("ipc", "x", {"colour": "red"})
