"""Shared memory: found by its address, opened by others, gone with its users."""

import gc
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import torch

from pd.engine.pool import PagePool
from transfer.layout import LayerGroup, PageLayout
from transfer.memory import (
    address_of,
    allocate_host,
    describe_memory,
    describe_process,
    find_host,
    map_memory,
    open_process,
)
from transfer.transport import PeerError


@pytest.mark.parametrize("populate", [False, True])
def test_memory_is_zero_and_has_a_page_aligned_address(populate: bool) -> None:
    memory = allocate_host(10_000, populate)
    assert memory.size == 10_000
    assert memory.address % 4096 == 0
    assert memory.address == address_of(memory.buffer)
    assert not np.frombuffer(memory.buffer, np.uint8).any()


def test_memory_is_found_by_any_range_within_it() -> None:
    memory, other, empty = allocate_host(10_000), allocate_host(5), allocate_host(0)
    assert find_host(memory.address, 10_000) == (memory, 0)
    assert find_host(memory.address + 9_999, 1) == (memory, 9_999)
    assert find_host(memory.address + 9_999, 2) is None
    assert find_host(memory.address - 1, 1) is None
    assert find_host(other.address + 2, 3) == (other, 2)
    assert find_host(empty.address, 1) is None


def test_what_is_made_from_memory_outlives_it_and_its_descriptor_does_not() -> None:
    memory = allocate_host(4096)
    fd, address = memory.fd, memory.address
    tensor = torch.frombuffer(memory.buffer, dtype=torch.bfloat16)
    del memory
    gc.collect()
    assert find_host(address, 1) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    tensor.fill_(1)
    assert tensor.data_ptr() == address
    assert tensor.sum() == 2048


def test_both_mappings_show_the_same_bytes_also_when_the_owner_is_gone() -> None:
    program = """
import msgspec, sys, time
from transfer.memory import allocate_host, describe_memory, describe_process
memory = allocate_host(8192)
memory.buffer[100:105] = b"there"
sys.stdout.buffer.write(msgspec.json.encode((describe_process(), describe_memory(memory))))
sys.stdout.buffer.write(b"\\n")
sys.stdout.flush()
sys.stdin.read(1)
assert memory.buffer[200:204] == b"here"
sys.stdout.buffer.write(b"seen\\n")
sys.stdout.flush()
time.sleep(60)
"""
    from transfer.memory import MemoryFile, Process

    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=os.getcwd(),
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        process, file = msgspec.json.decode(
            child.stdout.readline(), type=tuple[Process, MemoryFile]
        )
        pidfd = open_process(process)
        mapped = map_memory(process, file)
        assert mapped[100:105] == b"there"
        mapped[200:204] = b"here"
        child.stdin.write(b"x")
        child.stdin.flush()
        assert child.stdout.readline() == b"seen\n"
        child.kill()
        child.wait()
        os.close(pidfd)
        assert mapped[100:105] == b"there"
        mapped[0:8192] = bytes(8192)
        with pytest.raises(PeerError, match="gone"):
            open_process(process)
        with pytest.raises(PeerError, match="cannot map"):
            map_memory(process, file)


def test_memory_keeps_its_size() -> None:
    memory = allocate_host(8192)
    for size in (4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)


def test_another_file_is_not_taken_for_the_memory_described(tmp_path: object) -> None:
    memory, other = allocate_host(4096), allocate_host(4096)
    file = msgspec.structs.replace(describe_memory(memory), fd=other.fd)
    with pytest.raises(PeerError, match="not the memory"):
        map_memory(describe_process(), file)
    reader, writer = os.pipe()
    with pytest.raises(PeerError, match="cannot map"):
        map_memory(describe_process(), msgspec.structs.replace(file, fd=writer))
    os.close(reader)
    os.close(writer)


def test_a_cpu_pool_lies_in_shared_memory_and_lives_as_long_as_its_tensors() -> None:
    layout = PageLayout(LayerGroup("full", (0, 1), 2, 8), 4, 2)
    pool = PagePool(layout, 5, torch.bfloat16, torch.device("cpu"))
    region = pool.region
    found = find_host(region.address, region.num_pages * region.page_bytes)
    assert found is not None
    memory, offset = found
    assert (memory.size, offset) == (5 * layout.page_bytes, 0)
    assert pool.data.shape == (5, *layout.shape)
    assert not pool.data.any()
    data = pool.data
    del pool, memory, found
    gc.collect()
    assert find_host(region.address, 1) is None
    assert data.fill_(1).sum() == data.numel()
