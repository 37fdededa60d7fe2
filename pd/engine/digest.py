"""One number per page, from its bytes: equal on both sides of a handover if the pages are, however
their ranks share them."""

from __future__ import annotations

import dataclasses
import functools
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from transfer.topology import ReplicaLayout

_MULTIPLIER = 0x9E3779B97F4A7C15
"""2**64 over the golden ratio; odd."""
_AT_ONCE_BYTES = 1 << 26
"""So many are gathered; it takes twice as much memory."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunPlaces:
    """Which runs (one head of one layer each) of a whole page the pages of a pool have."""

    places: tuple[int, ...]
    """By run of the pool's page, its number in the whole page; -1: another rank answers for it."""

    @classmethod
    def of_rank(cls, layout: ReplicaLayout, group: int, rank: int) -> Self:
        """Of several ranks that hold a head, the first answers for it."""
        heads, layers = layout.held(group, rank)
        answered = layout.answered_heads(group, rank)
        num_layers = len(layout.layouts[group].group.layers)
        return cls(
            tuple(
                head * num_layers + layer if head in answered else -1
                for head in heads
                for layer in layers
            )
        )


_WHOLE = RunPlaces((0,))
"""A page as one run."""


def page_digests(
    data: torch.Tensor, pages: npt.NDArray[np.integer], runs: RunPlaces = _WHOLE
) -> npt.NDArray[np.uint64]:
    """`data` (pages of the pool, ...), contiguous -> one number for each of `pages`.

    The sum, modulo 2**64, of each 8-byte word times an odd number that depends on its place in the
    whole page: a changed word changes it, and so do words that swap places. The numbers of ranks
    that hold parts of a page add up to that of the whole one. Meant for faults, not for forgers.
    """
    digests = np.zeros(len(pages), np.uint64)
    if not runs.places:
        return digests
    raw = data.view(len(data), -1).view(torch.uint8)
    at_once = max(1, _AT_ONCE_BYTES // raw.shape[1])
    for first in range(0, len(pages), at_once):
        wanted = torch.from_numpy(pages[first : first + at_once].astype(np.int64)).to(data.device)
        rows = raw.index_select(0, wanted).view(len(wanted), len(runs.places), -1)
        if rest := -rows.shape[2] % 8:
            rows = torch.nn.functional.pad(rows, (0, rest))
        words = rows.view(torch.int64)
        sums = (words * _multipliers(runs, words.shape[2], data.device)).sum((1, 2))
        digests[first : first + at_once] = sums.cpu().numpy().view(np.uint64)
    return digests


@functools.lru_cache(maxsize=8)
def _multipliers(runs: RunPlaces, words: int, device: torch.device) -> torch.Tensor:
    """(runs, words of one): odd and different for each place; 0 for others' runs."""
    run = np.array(runs.places, np.int64)[:, None]
    places = (run * words + np.arange(words)).astype(np.uint64)
    numbers = np.where(run < 0, np.uint64(0), (2 * places + 1) * np.uint64(_MULTIPLIER))
    return torch.from_numpy(numbers.view(np.int64)).to(device)
