"""One number per page, from its bytes: equal on both sides of a handover if the pages are."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch

_MULTIPLIER = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio; odd."""
_AT_ONCE_BYTES = 1 << 26
"""So many are gathered; it takes twice as much memory."""


def page_digests(data: torch.Tensor, pages: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """`data` (pages of the pool, ...), contiguous -> one number for each of `pages`.

    The sum, modulo 2**64, of each 8-byte word times an odd number that depends on its place: a
    changed word changes it, and so do words that swap places. Meant for faults, not for forgers.
    """
    raw = data.view(len(data), -1).view(torch.uint8)
    at_once = max(1, _AT_ONCE_BYTES // raw.shape[1])
    digests = np.empty(len(pages), np.uint64)
    for first in range(0, len(pages), at_once):
        wanted = torch.from_numpy(pages[first : first + at_once].astype(np.int64)).to(data.device)
        rows = raw.index_select(0, wanted)
        if rest := -rows.shape[1] % 8:
            rows = torch.nn.functional.pad(rows, (0, rest))
        words = rows.view(torch.int64)
        sums = (words * _multipliers(words.shape[1], data.device)).sum(1)
        digests[first : first + at_once] = sums.cpu().numpy().view(np.uint64)
    return digests


@functools.lru_cache(maxsize=8)
def _multipliers(count: int, device: torch.device) -> torch.Tensor:
    """Odd, and different for each place."""
    places = np.arange(count, dtype=np.uint64)
    numbers = (2 * places + 1) * np.uint64(_MULTIPLIER)
    return torch.from_numpy(numbers.view(np.int64)).to(device)
