"""Copying scattered runs of bytes in GPU memory, own or a peer's that is mapped here.

One kernel (`copy_runs.cu`) moves runs of any size, with a bounded number of blocks, so that what it
takes from compute is bounded too; long runs can go by the copy engines instead. Both cost a few
calls to start, whatever the number of runs. Copies take turns on two streams of their own, beside
the engine's, so that one begins while another ends: they are not ordered.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import functools
import itertools
from importlib import resources

import numpy as np

from transfer import cuda
from transfer.segments import Int64Array

_PIECE_BYTES = 32 << 10
"""As in `copy_runs.cu`."""
_THREADS = 512
_STREAMS = 2
_PIECES_PER_TICKET = 2
DEFAULT_BLOCKS = 128
_TABLE_RUNS = 1 << 18
"""Runs whose addresses fit into the table at once."""


@functools.cache
def _image() -> bytes:
    return resources.files("transfer").joinpath("copy_runs.ptx").read_bytes()


class _Arguments(ctypes.Structure):
    """Of the kernels, in order."""

    _fields_ = (
        ("counter", ctypes.c_uint64),
        ("base", ctypes.c_uint64),
        ("sources", ctypes.c_uint64),
        ("targets", ctypes.c_uint64),
        ("total", ctypes.c_uint),
        ("per_ticket", ctypes.c_uint),
        ("pieces", ctypes.c_uint),
        ("run_bytes", ctypes.c_uint64),
    )


@dataclasses.dataclass(slots=True)
class _Lane:
    """A stream; its kernels run one after the other and share a counter of tickets."""

    stream: cuda.Stream
    counter: int
    """Its address."""
    drawn: int = 0
    """What the counter is when the kernels launched so far have ended."""


class RunCopier:
    """`blocks` bounds how many of a kernel's blocks, of 512 threads, there are; up to two kernels
    run at once. docs/log.md has what more or fewer bring."""

    def __init__(self, device: int, blocks: int = DEFAULT_BLOCKS) -> None:
        self._device = cuda.Device(device)
        self._blocks = blocks
        counters = self._device.allocate(8 * _STREAMS, zero=True)
        self._lanes = itertools.cycle(
            [_Lane(self._device.make_stream(), counters + 8 * i) for i in range(_STREAMS)]
        )
        self._by_words, self._by_bytes = self._device.load(
            _image(), ["copy_runs_16", "copy_runs_1"]
        )
        self._arguments = _Arguments()
        self._pointers = cuda.argument_pointers(self._arguments)
        # The kernel reads addresses from pinned memory: a copy of them would wait behind others in
        # the copy engine. It is allocated once, as that can take longer than moving a page.
        self._address = self._device.allocate_pinned(2 * 8 * _TABLE_RUNS)
        memory = (ctypes.c_uint64 * (2 * _TABLE_RUNS)).from_address(self._address)
        self._table: Int64Array = np.ctypeslib.as_array(memory).view(np.int64)
        self._next = 0
        self._in_use: collections.deque[tuple[int, int, cuda.Event]] = collections.deque()
        """(start, end, copy) of parts of the table, oldest first."""

    def copy(self, sources: Int64Array, targets: Int64Array, length: int) -> cuda.Event:
        """Start copying `length` bytes from each address in `sources` to that in `targets`.

        Returns at once, or when part of an enormous number of runs is done. The caller has seen to
        it that the source's bytes are there: that the kernels which write them have ended.
        """
        at_once = _TABLE_RUNS // 4
        copies = [
            self._launch(sources[start : start + at_once], targets[start : start + at_once], length)
            for start in range(0, len(sources), at_once)
        ]
        for copy in copies[:-1]:
            copy.wait()
        return copies[-1]

    def copy_by_engine(
        self, sources: Int64Array, targets: Int64Array, lengths: Int64Array
    ) -> cuda.Event:
        """Start copying lengths[i] bytes from sources[i] to targets[i] by the copy engines; returns
        at once."""
        stream = next(self._lanes).stream
        self._device.copy_batch(
            targets.ctypes.data, sources.ctypes.data, lengths.ctypes.data, len(lengths), stream
        )
        return self._device.record(stream)

    def _launch(self, sources: Int64Array, targets: Int64Array, length: int) -> cuda.Event:
        count = len(sources)
        first = self._reserve(2 * count)
        self._table[first : first + count] = sources
        self._table[first + count : first + 2 * count] = targets
        bits = int(np.bitwise_or.reduce(self._table[first : first + 2 * count])) | length
        pieces = -(-length // _PIECE_BYTES)
        tickets = -(-pieces * count // _PIECES_PER_TICKET)
        blocks = min(self._blocks, tickets)
        address = self._address + 8 * first
        lane = next(self._lanes)
        arguments = self._arguments
        arguments.counter, arguments.base = lane.counter, lane.drawn
        arguments.sources, arguments.targets = address, address + 8 * count
        arguments.total, arguments.per_ticket = pieces * count, _PIECES_PER_TICKET
        arguments.pieces, arguments.run_bytes = pieces, length
        self._device.launch(
            self._by_bytes if bits % 16 else self._by_words,
            blocks,
            _THREADS,
            lane.stream,
            self._pointers,
        )
        lane.drawn += tickets + blocks
        copy = self._device.record(lane.stream)
        self._in_use.append((first, first + 2 * count, copy))
        return copy

    def _reserve(self, size: int) -> int:
        """The start of `size` entries of the table that no copy reads."""
        if self._next + size > len(self._table):
            self._next = 0
        start, end = self._next, self._next + size
        in_use = self._in_use
        while in_use and in_use[0][2].is_done():
            in_use.popleft()
        while any(used < end and start < used_end for used, used_end, _ in in_use):
            in_use.popleft()[2].wait()
        self._next = end
        return start
