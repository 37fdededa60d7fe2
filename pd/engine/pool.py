"""The device tier's memory: one page pool per layer group, in the layout of rule 1. On a CPU it is
shared memory, so that a transport can hand it to other processes of the host."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from transfer.layout import PageLayout
from transfer.memory import allocate_host
from transfer.transport import Region


class PagePool:
    """`num_pages` pages, contiguous. Page 0 is the null page: padding reads it, nothing relies on
    it."""

    def __init__(
        self, layout: PageLayout, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.layout = layout
        self.dtype = dtype
        self.device = device
        shape = (num_pages, *layout.shape)
        # Zeroed, so that a padded gather never multiplies by a stray NaN.
        if device.type == "cpu":
            self._memory = allocate_host(math.prod(shape) * dtype.itemsize, populate=True)
            # Of a group that a stage has no layers of: nothing.
            flat = torch.frombuffer(
                self._memory.buffer, dtype=dtype, count=max(1, math.prod(shape))
            )
            self.data = flat[: math.prod(shape)].view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        dim = layout.group.head_dim
        self._token_rows = self.data.view(-1, dim)
        self._page_rows = self.data.view(-1, layout.page_tokens * dim)

    @property
    def region(self) -> Region:
        device = self.device.index or 0 if self.device.type == "cuda" else None
        return Region(self.data.data_ptr(), len(self.data), self.layout.page_bytes, device)

    def token_rows(
        self, pages: npt.NDArray[np.integer], offsets: npt.NDArray[np.integer]
    ) -> torch.Tensor:
        """(planes, tokens * kv_heads): token rows of layer place 0 of tokens at (page, offset)."""
        rows = self._page_row_numbers(pages) * self.layout.page_tokens + offsets[:, None]
        return torch.from_numpy(rows.reshape(len(rows), -1)).to(self.device)

    def page_rows(self, slots: npt.NDArray[np.integer]) -> torch.Tensor:
        """(batch, pages) -> (planes, batch, kv_heads, pages) page rows of layer place 0."""
        rows = self._page_row_numbers(slots)  # (planes, batch, pages, heads)
        return torch.from_numpy(np.ascontiguousarray(rows.swapaxes(-1, -2))).to(self.device)

    def _page_row_numbers(self, slots: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """(...) -> (planes, ..., kv_heads)."""
        heads, layers, planes = self.layout.shape[:3]
        rows = (slots.astype(np.int64)[..., None] * heads + np.arange(heads)) * (layers * planes)
        return np.stack([rows + plane for plane in range(planes)])

    def write(self, token_rows: torch.Tensor, place: int, values: Sequence[torch.Tensor]) -> None:
        """Keys and values, or latents, each (tokens, kv_heads, dim), of the layer at `place`, to
        the token rows of `token_rows`."""
        # All rows of a layer lie equally far behind those of place 0.
        layer = self._token_rows[place * len(values) * self.layout.page_tokens :]
        for rows, plane in zip(token_rows, values, strict=True):
            layer.index_copy_(0, rows, plane.reshape(-1, plane.shape[-1]))

    def gather(self, page_rows: torch.Tensor, place: int, dtype: torch.dtype) -> torch.Tensor:
        """Keys and values, or latents (planes, batch, kv_heads, pages * page_tokens, dim) of the
        layer at `place`, as `dtype`."""
        layer = self._page_rows[place * self.layout.group.planes :]
        rows = layer.index_select(0, page_rows.view(-1))
        return rows.view(*page_rows.shape[:3], -1, self.layout.group.head_dim).to(dtype)
