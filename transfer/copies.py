"""Runs of bytes between two mapped buffers, cut into pieces to be copied one by one, by any
thread.

Long runs go by memmove, short ones through a buffer of numpy's that stays in the cache, so that a
run does not cost a Python call. Both let other threads run.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from transfer.memory import address_of
from transfer.segments import Int64Array, Segments

PIECE_BYTES = 4 << 20
_LONG_BYTES = 128 << 10
"""From here on memmove is as fast, and needs no buffer."""

Piece = Callable[[], None]


def plan_pieces(
    source: mmap.mmap,
    source_offset: int,
    target: mmap.mmap,
    target_offset: int,
    runs: Segments,
    unit: int,
) -> list[Piece]:
    """The copies of `runs`, which lie within the buffers; their offsets count from those given,
    their lengths are multiples of `unit`."""
    if not unit:
        return []
    sources, targets = runs.source_offsets + source_offset, runs.target_offsets + target_offset
    is_long = runs.lengths >= _LONG_BYTES
    long = _long_pieces(
        sources[is_long] + address_of(source),
        targets[is_long] + address_of(target),
        runs.lengths[is_long],
    )
    if is_long.all():
        return [*long]
    is_short = ~is_long
    counts = runs.lengths[is_short] // unit
    short = _short_pieces(
        _windows(source, unit),
        _windows(target, unit),
        _spread(sources[is_short], counts, unit),
        _spread(targets[is_short], counts, unit),
    )
    return [*long, *short]


def _long_pieces(sources: Int64Array, targets: Int64Array, lengths: Int64Array) -> Iterator[Piece]:
    copies: list[tuple[int, int, int]] = []
    room = PIECE_BYTES
    runs = zip(sources.tolist(), targets.tolist(), lengths.tolist(), strict=True)
    for source, target, length in runs:
        done = 0
        while done < length:
            size = min(room, length - done)
            copies.append((target + done, source + done, size))
            done += size
            room -= size
            if not room:
                yield _long_piece(copies)
                copies, room = [], PIECE_BYTES
    if copies:
        yield _long_piece(copies)


def _long_piece(copies: list[tuple[int, int, int]]) -> Piece:
    move = ctypes.memmove

    def copy() -> None:
        for target, source, length in copies:
            move(target, source, length)

    return copy


def _short_pieces(
    source: npt.NDArray[np.uint8],
    target: npt.NDArray[np.uint8],
    source_rows: Int64Array,
    target_rows: Int64Array,
) -> Iterator[Piece]:
    count = max(1, PIECE_BYTES // source.shape[1])
    for start in range(0, len(source_rows), count):
        picked = slice(start, start + count)
        yield _short_piece(source, target, source_rows[picked], target_rows[picked])


def _short_piece(
    source: npt.NDArray[np.uint8],
    target: npt.NDArray[np.uint8],
    source_rows: Int64Array,
    target_rows: Int64Array,
) -> Piece:
    def copy() -> None:
        target[target_rows] = source[source_rows]

    return copy


def _windows(buffer: mmap.mmap, length: int) -> npt.NDArray[np.uint8]:
    """Row i: the `length` bytes from offset i on. No copy."""
    return np.ndarray((len(buffer) - length + 1, length), np.uint8, buffer, strides=(1, 1))


def _spread(offsets: Int64Array, counts: Int64Array, length: int) -> Int64Array:
    """Offsets of the `counts[i]` runs of `length` that follow each other from offsets[i] on."""
    firsts = np.cumsum(counts) - counts
    within = np.arange(int(counts.sum())) - np.repeat(firsts, counts)
    return np.repeat(offsets, counts) + within * length
