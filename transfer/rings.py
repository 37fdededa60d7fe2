"""The memory that small runs are staged in: blocks, and copies into and out of them.

Copies run beside the caller: a GPU's on streams of their own, the host's in one thread for each
ring, which numpy lets go of the interpreter for. They are over when `Copying` says so; only then
may their pages or their block be used otherwise.
"""

from __future__ import annotations

import abc
from typing import Protocol

import numpy as np

from transfer.copies import Bytes, gather, scatter, view_memory
from transfer.segments import Int64Array, run_offsets
from transfer.transport import Int32Array, PagePart, Region

UNIT_BYTES = 1 << 20
"""Blocks are read in whole units, so that descriptors can be prepared."""


class Copying(Protocol):
    """A copy within reach of this process, under way."""

    def is_done(self) -> bool: ...
    def wait(self) -> None: ...


class Ring(abc.ABC):
    """`num_blocks` of `block_bytes`, in `region`, whose pages are units."""

    def __init__(self, address: int, device: int | None, block_bytes: int, num_blocks: int) -> None:
        self.block_bytes = block_bytes
        self.num_blocks = num_blocks
        self.num_copies = 0
        """That were made while the caller waited."""
        units = block_bytes * num_blocks // UNIT_BYTES
        self.region = Region(address, units, UNIT_BYTES, device)

    def unit(self, block: int) -> int:
        """The first of a block."""
        return block * (self.block_bytes // UNIT_BYTES)

    @abc.abstractmethod
    def pack(self, block: int, region: Region, pages: Int32Array, part: PagePart) -> Copying:
        """Copy the source's part of each page, end to end, into a block."""

    @abc.abstractmethod
    def unpack(self, block: int, region: Region, pages: Int32Array, part: PagePart) -> Copying:
        """Copy a block into the target's part of each page."""

    @abc.abstractmethod
    def close(self) -> None:
        """Only when nobody else reads or writes it any more."""


def make_ring(device: int | None, block_bytes: int, num_blocks: int) -> Ring:
    if device is None:
        return HostRing(block_bytes, num_blocks)
    return DeviceRing(device, block_bytes, num_blocks)


def _source_runs(pages: Int32Array, region: Region, part: PagePart) -> Int64Array:
    return run_offsets(pages, region.page_bytes, part.source_offset, part.count, part.source_stride)


def _target_runs(pages: Int32Array, region: Region, part: PagePart) -> Int64Array:
    return run_offsets(pages, region.page_bytes, part.target_offset, part.count, part.target_stride)


# --------------------------------------------------------------------------------------------- host


class _Copied:
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class HostRing(Ring):
    def __init__(self, block_bytes: int, num_blocks: int) -> None:
        self._memory = np.empty(block_bytes * num_blocks, dtype=np.uint8)
        super().__init__(self._memory.ctypes.data, None, block_bytes, num_blocks)

    def pack(self, block: int, region: Region, pages: Int32Array, part: PagePart) -> Copying:
        runs = _source_runs(pages, region, part)
        gather(self._pages(region), runs, part.length, self._block(block))
        self.num_copies += 1
        return _Copied()

    def unpack(self, block: int, region: Region, pages: Int32Array, part: PagePart) -> Copying:
        runs = _target_runs(pages, region, part)
        scatter(self._block(block), self._pages(region), runs, part.length)
        self.num_copies += 1
        return _Copied()

    def close(self) -> None:
        pass

    def _pages(self, region: Region) -> Bytes:
        return view_memory(region.address, region.num_pages * region.page_bytes)

    def _block(self, block: int) -> Bytes:
        return self._memory[block * self.block_bytes :][: self.block_bytes]


# --------------------------------------------------------------------------------------------- GPU


class DeviceRing(Ring):
    def __init__(self, device: int, block_bytes: int, num_blocks: int) -> None:
        from transfer import cuda
        from transfer.gpu import RunCopier

        self._device = cuda.Device(device)
        self._copier = RunCopier(device)
        address = self._device.allocate(block_bytes * num_blocks)
        super().__init__(address, device, block_bytes, num_blocks)

    def pack(self, block: int, region: Region, pages: Int32Array, part: PagePart) -> Copying:
        runs = _source_runs(pages, region, part) + region.address
        return self._copier.copy(runs, self._places(block, len(runs), part.length), part.length)

    def unpack(self, block: int, region: Region, pages: Int32Array, part: PagePart) -> Copying:
        runs = _target_runs(pages, region, part) + region.address
        return self._copier.copy(self._places(block, len(runs), part.length), runs, part.length)

    def close(self) -> None:
        self._device.free(self.region.address)

    def _places(self, block: int, count: int, length: int) -> Int64Array:
        """Addresses of runs that lie end to end in a block."""
        first = self.region.address + block * self.block_bytes
        return np.arange(count, dtype=np.int64) * length + first
