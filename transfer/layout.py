"""Byte layout of a page (rule 1): `[kv_head][layer][k|v][token][dim]`, contiguous, the same in
every tier."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with the same attention kind and KV shape; one page pool and one page table."""

    kind: Literal["full", "sliding"]
    layers: tuple[int, ...]
    """The model's layer numbers, ascending; position in the tuple is the layer's place in a
    page."""
    kv_heads: int
    head_dim: int
    window: int = 0
    """sliding: a token at position p attends to positions p - window + 1 .. p."""

    def first_needed_page(self, position: int, page_tokens: int) -> int:
        """First page with a key that a query at `position` (or later) attends to."""
        if self.kind == "full":
            return 0
        return max(0, position - self.window + 1) // page_tokens


@dataclasses.dataclass(frozen=True, slots=True)
class PageLayout:
    """Sizes of one group's pages. All in bytes unless the name says otherwise."""

    group: LayerGroup
    page_tokens: int
    element_bytes: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(kv_heads, layers, 2, page_tokens, head_dim)."""
        group = self.group
        return (group.kv_heads, len(group.layers), 2, self.page_tokens, group.head_dim)

    @property
    def token_bytes(self) -> int:
        group = self.group
        return group.kv_heads * len(group.layers) * 2 * group.head_dim * self.element_bytes

    @property
    def page_bytes(self) -> int:
        return self.token_bytes * self.page_tokens
