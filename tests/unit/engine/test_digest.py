"""Digests of pages: any fault in a page's bytes is seen, and other pages do not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pd.engine.digest
from pd.engine.digest import page_digests

PAGES = np.array([3, 0, 5], np.int32)


def make_pool(num_values: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((8, 2, 3, num_values), generator=generator).to(dtype)


def raw(pool: torch.Tensor) -> np.ndarray:
    """The pool's own bytes, by page."""
    return pool.view(len(pool), -1).view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("num_values", [4, 3])
def test_every_flipped_byte_is_seen_in_its_page_only(dtype: torch.dtype, num_values: int) -> None:
    """Also where a page's size is not a multiple of 8."""
    pool = make_pool(num_values, dtype)
    before = page_digests(pool, PAGES)
    assert (before.dtype, before.shape) == (np.uint64, (3,))
    assert len(set(before.tolist())) == 3
    for place in range(raw(pool).shape[1]):
        raw(pool)[5, place] ^= 0x40
        raw(pool)[4, place] ^= 0x01
        assert (page_digests(pool, PAGES) != before).tolist() == [False, False, True]
        raw(pool)[5, place] ^= 0x40
    assert (page_digests(pool, PAGES) == before).all()


def test_swapped_words_and_pages_are_seen() -> None:
    pool = make_pool()
    before = page_digests(pool, PAGES)
    words = raw(pool)[3].view(np.int64)
    for one in range(len(words)):
        for other in range(one):
            words[[one, other]] = words[[other, one]]
            assert page_digests(pool, PAGES)[0] != before[0]
            words[[one, other]] = words[[other, one]]
    assert page_digests(pool, PAGES[::-1].copy()).tolist() == before[::-1].tolist()


def test_many_pages_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool()
    pages = np.array([0, 1, 2, 3, 4, 5, 6, 7, 7], np.int32)
    at_once = page_digests(pool, pages)
    monkeypatch.setattr(pd.engine.digest, "_AT_ONCE_BYTES", 2 * raw(pool).shape[1] + 1)
    assert page_digests(pool, pages).tolist() == at_once.tolist()
    assert page_digests(pool, pages[:0]).tolist() == []
