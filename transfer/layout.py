"""Byte layout of a page (rule 1): `[kv_head][layer][k|v][token][dim]`, contiguous, the same in
every tier. A latent (MLA) group has one head and one plane in place of k and v:
`[1][layer][1][token][dim]`, with dim = kv_lora_rank + rope dimensions."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with the same attention kind and KV shape; one page pool and one page table."""

    kind: Literal["full", "sliding", "latent"]
    layers: tuple[int, ...]
    """The model's layer numbers, ascending; position in the tuple is the layer's place in a
    page."""
    kv_heads: int
    head_dim: int
    window: int = 0
    """sliding: a token at position p attends to positions p - window + 1 .. p."""

    @property
    def planes(self) -> int:
        """k and v; a latent is both."""
        return 1 if self.kind == "latent" else 2

    def first_needed_page(self, position: int, page_tokens: int) -> int:
        """First page with a key that a query at `position` (or later) attends to."""
        if self.kind != "sliding":
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
        """(kv_heads, layers, planes, page_tokens, head_dim)."""
        group = self.group
        return (group.kv_heads, len(group.layers), group.planes, self.page_tokens, group.head_dim)

    @property
    def run_bytes(self) -> int:
        """One head of one layer: the smallest run that moves."""
        group = self.group
        return group.planes * self.page_tokens * group.head_dim * self.element_bytes

    @property
    def token_bytes(self) -> int:
        return self.page_bytes // self.page_tokens

    @property
    def page_bytes(self) -> int:
        return self.group.kv_heads * len(self.group.layers) * self.run_bytes
