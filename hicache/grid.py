"""The grid of stored objects: how each layer group's pages are cut into cells (rule 3).

A cell is a range of KV heads and a range of the group's layers; its part of every page is one
object. The grid depends on the model and two numbers only, never on who writes or reads, so that
what replicas of one parallel shape have stored is found by those of any other. Cells start at
multiples of the two numbers; the last one of a row or column may be smaller. A latent has one head,
so that its pages are cut by layers only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hicache.keys import object_key
from hicache.storage.storage import ObjectPart
from transfer.layout import PageLayout


@dataclasses.dataclass(frozen=True, slots=True)
class Cell:
    heads: range
    layers: range
    """Places within the group's pages."""
    part: ObjectPart
    """Where it is in a page."""


class ObjectGrid:
    """Immutable; `group` and `cell` are places in `layouts` and in `cells(group)`."""

    def __init__(
        self,
        fingerprint: str,
        layouts: Sequence[PageLayout],
        heads: int | None = None,
        layers: int | None = None,
    ) -> None:
        """Cells of at most so many KV heads and layers of a group; None: all. `fingerprint` names
        the model as in `object_key`. Raises ValueError if a number is not positive."""
        for name, number in (("heads", heads), ("layers", layers)):
            if number is not None and number < 1:
                raise ValueError(f"cells of {number} {name}: expected at least 1")
        self.layouts = tuple(layouts)
        self._fingerprint = fingerprint
        self._cells = [_cut(layout, heads, layers) for layout in layouts]

    def cells(self, group: int) -> tuple[Cell, ...]:
        """They cover each page of the group once, in the order of its bytes' first heads."""
        return self._cells[group]

    def keys(self, group: int, cell: int, hashes: Sequence[bytes]) -> list[str]:
        """The names of this cell of the pages with these hashes."""
        cut = self._cells[group][cell]
        return [
            object_key(self._fingerprint, page_hash, group, cut.heads, cut.layers)
            for page_hash in hashes
        ]


def _cut(layout: PageLayout, heads: int | None, layers: int | None) -> tuple[Cell, ...]:
    num_heads, num_layers = layout.group.kv_heads, len(layout.group.layers)
    return tuple(
        Cell(head_range, layer_range, _part(layout, head_range, layer_range))
        for head_range in _ranges(num_heads, heads or num_heads)
        for layer_range in _ranges(num_layers, layers or num_layers)
    )


def _ranges(count: int, most: int) -> list[range]:
    return [range(first, min(first + most, count)) for first in range(0, count, most)]


def _part(layout: PageLayout, heads: range, layers: range) -> ObjectPart:
    """A head's layers are contiguous, so there is a run for each head; with all layers, one."""
    num_layers = len(layout.group.layers)
    offset = (heads.start * num_layers + layers.start) * layout.run_bytes
    if len(layers) == num_layers:
        return ObjectPart(offset, len(heads) * num_layers * layout.run_bytes)
    length = len(layers) * layout.run_bytes
    if len(heads) == 1:
        return ObjectPart(offset, length)
    return ObjectPart(offset, length, len(heads), num_layers * layout.run_bytes)
