"""The host tier's memory: a pool of whole pages per layer group, in shared memory of one node.

The keeper's process allocates it; replicas of the node map it and copy pages from and to it
(pd/engine/copier.py). Who may copy where is the keeper's to say (hicache/keeper.py). The memory
lives as long as a process has it mapped.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Sequence
from typing import Self

import msgspec

from transfer.memory import (
    HostMemory,
    MemoryFile,
    Process,
    address_of,
    allocate_host,
    describe_memory,
    describe_process,
    map_memory,
    open_process,
)
from transfer.transport import PeerError, Region


class _Description(msgspec.Struct, frozen=True):
    process: Process
    files: tuple[MemoryFile, ...]
    num_pages: tuple[int, ...]
    page_bytes: tuple[int, ...]


_decoder = msgspec.msgpack.Decoder(_Description)


@dataclasses.dataclass(frozen=True, slots=True)
class HostPool:
    buffer: mmap.mmap
    num_pages: int
    page_bytes: int

    @property
    def region(self) -> Region:
        return Region(address_of(self.buffer), self.num_pages, self.page_bytes, None)


@dataclasses.dataclass(frozen=True, slots=True)
class HostPools:
    """By layer group. Page 0 of each is never used, as in the device tier."""

    pools: tuple[HostPool, ...]
    owned: tuple[HostMemory, ...] = ()
    """Empty: another process's."""

    @classmethod
    def allocate(cls, num_pages: Sequence[int], page_bytes: Sequence[int]) -> Self:
        """All of it is backed by RAM when this returns."""
        sizes = list(zip(num_pages, page_bytes, strict=True))
        owned = tuple(allocate_host(count * size, populate=True) for count, size in sizes)
        pools = tuple(
            HostPool(memory.buffer, count, size)
            for memory, (count, size) in zip(owned, sizes, strict=True)
        )
        return cls(pools, owned)

    def describe(self) -> bytes:
        """What `open` needs; only while this process lives."""
        return msgspec.msgpack.encode(
            _Description(
                describe_process(),
                tuple(describe_memory(memory) for memory in self.owned),
                tuple(pool.num_pages for pool in self.pools),
                tuple(pool.page_bytes for pool in self.pools),
            )
        )

    @classmethod
    def open(cls, description: bytes, page_bytes: Sequence[int]) -> Self:
        """Map another process's pools. Raises PeerError where it is out of reach (on another host),
        or its pages are not of these sizes."""
        try:
            found = _decoder.decode(description)
        except msgspec.MsgspecError as error:
            raise PeerError(f"not a description of host pools: {error}") from error
        if found.page_bytes != tuple(page_bytes):
            raise PeerError(f"its pages have {found.page_bytes} bytes, ours {tuple(page_bytes)}")
        with open(open_process(found.process), "rb"):
            buffers = [map_memory(found.process, file) for file in found.files]
        counts = found.num_pages
        for buffer, count, size in zip(buffers, counts, page_bytes, strict=True):
            if len(buffer) < count * size:
                raise PeerError(f"{len(buffer)} bytes are too few for {count} pages of {size}")
        return cls(tuple(map(HostPool, buffers, counts, page_bytes)))
