"""Blocks through which many small runs move, packed and unpacked on either side: the memory, and
the copies into it and out of it. `transfer/pulling.py` says when."""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np

from transfer.segments import plan_segments, run_offsets
from transfer.transport import Int32Array, PagePart, Region

UNIT_BYTES = 1 << 20
"""Blocks are read in whole units, so that descriptors can be prepared."""


class Copying(Protocol):
    """A copy within reach of this process, under way."""

    def is_done(self) -> bool: ...
    def wait(self) -> None: ...


class Ring:
    """Memory of a device, or of the host, in blocks of `block_bytes`, and copies into and out of
    it."""

    def __init__(self, device: int | None, block_bytes: int, num_blocks: int) -> None:
        size = block_bytes * num_blocks
        self._copier: Any = None
        self._device: Any = None
        if device is None:
            self._memory = np.empty(size, dtype=np.uint8)
            address = self._memory.ctypes.data
        else:
            from transfer import cuda
            from transfer.gpu import RunCopier

            self._device = cuda.Device(device)
            self._copier = RunCopier(device)
            address = self._device.allocate(size)
        self.block_bytes = block_bytes
        self.num_blocks = num_blocks
        self.region = Region(address, size // UNIT_BYTES, UNIT_BYTES, device)

    def close(self) -> None:
        """Only when nobody reads or writes it any more."""
        if self._device is not None:
            self._device.free(self.region.address)

    def unit(self, block: int) -> int:
        return block * (self.block_bytes // UNIT_BYTES)

    def pack(self, block: int, region: Region, pages: Int32Array, part: PagePart) -> Copying:
        """Part of each page, end to end, into a block."""
        places = np.arange(len(pages), dtype=np.int32)
        packed = PagePart(
            part.source_offset, 0, part.length, part.count, part.source_stride, part.length
        )
        address = self.region.address + block * self.block_bytes
        return self._copy(region, pages, _packed(address, part), places, packed)

    def unpack(self, block: int, region: Region, pages: Int32Array, part: PagePart) -> Copying:
        places = np.arange(len(pages), dtype=np.int32)
        packed = PagePart(
            0, part.target_offset, part.length, part.count, part.length, part.target_stride
        )
        address = self.region.address + block * self.block_bytes
        return self._copy(_packed(address, part), places, region, pages, packed)

    def _copy(
        self,
        source: Region,
        source_pages: Int32Array,
        target: Region,
        target_pages: Int32Array,
        part: PagePart,
    ) -> Copying:
        if self._copier is not None:
            sources = run_offsets(
                source_pages, source.page_bytes, part.source_offset, part.count, part.source_stride
            )
            targets = run_offsets(
                target_pages, target.page_bytes, part.target_offset, part.count, part.target_stride
            )
            copied: Copying = self._copier.copy(
                sources + source.address, targets + target.address, part.length
            )
            return copied
        runs = plan_segments(source_pages, target_pages, part, source.page_bytes, target.page_bytes)
        for to, origin, length in zip(
            (runs.target_offsets + target.address).tolist(),
            (runs.source_offsets + source.address).tolist(),
            runs.lengths.tolist(),
            strict=True,
        ):
            ctypes.memmove(to, origin, length)
        return _Copied()


class _Copied:
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


def _packed(address: int, part: PagePart) -> Region:
    """A block as an array of page parts."""
    return Region(address, 0, part.page_bytes)
