"""The contiguous runs of bytes that a write consists of. Pure."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from transfer.transport import Int32Array, PagePart

Int64Array = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class Segments:
    """Contiguous runs of bytes, merged where neighbours are adjacent on both sides; offsets are
    from the start of the source and of the target pool."""

    source_offsets: Int64Array
    target_offsets: Int64Array
    lengths: Int64Array

    def __len__(self) -> int:
        return len(self.lengths)


def run_offsets(
    pages: Int32Array, page_bytes: int, offset: int, count: int, stride: int
) -> Int64Array:
    """From the pool's start, of each of the `count` runs of each page."""
    offsets: Int64Array = np.multiply(pages, page_bytes, dtype=np.int64)
    offsets += offset
    if count == 1:
        return offsets
    runs: Int64Array = (offsets[:, None] + np.arange(count, dtype=np.int64) * stride).ravel()
    return runs


def plan_segments(
    source_pages: Int32Array,
    target_pages: Int32Array,
    part: PagePart,
    source_page_bytes: int,
    target_page_bytes: int,
) -> Segments:
    """The runs that a write of `part` of these pages consists of."""
    source = run_offsets(
        source_pages, source_page_bytes, part.source_offset, part.count, part.source_stride
    )
    target = run_offsets(
        target_pages, target_page_bytes, part.target_offset, part.count, part.target_stride
    )
    if not len(source):
        return Segments(source, target, source.copy())
    joined = (np.diff(source) == part.length) & (np.diff(target) == part.length)
    starts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    counts = np.diff(np.append(starts, len(source)))
    return Segments(source[starts], target[starts], counts * part.length)
