"""Which heads, layers and pages each rank of a replica holds. Pure.

A replica has `tp * cp * pp` ranks; the tensor-parallel rank changes fastest, then the context-
parallel one, then the stage. Heads are split evenly where they can be: rank t of tp holds the KV
heads that its query heads use, so ranks share heads when tp does not divide their number. Layers
are split into contiguous stages. Page i of a sequence belongs to context-parallel rank i mod cp
(rule 2).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import NamedTuple

from transfer.layout import LayerGroup, PageLayout


class RankCoord(NamedTuple):
    tp: int
    cp: int
    pp: int


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
    tp: int = 1
    pp: int = 1
    cp: int = 1
    stage_ends: tuple[int, ...] = ()
    """The model layer before which each stage ends; empty: stages of equal numbers of layers."""

    def __post_init__(self) -> None:
        if min(self.tp, self.pp, self.cp) < 1:
            raise ValueError(f"topology {self}: expected tp, pp and cp of at least 1")
        ends = self.stage_ends
        if ends and (len(ends) != self.pp or any(a > b for a, b in itertools.pairwise((0, *ends)))):
            raise ValueError(f"stage_ends {ends}: expected {self.pp} ascending layer numbers")

    def __str__(self) -> str:
        return f"tp {self.tp} x pp {self.pp} x cp {self.cp}"

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp * self.cp

    def rank(self, coord: RankCoord) -> int:
        return (coord.pp * self.cp + coord.cp) * self.tp + coord.tp

    def coord(self, rank: int) -> RankCoord:
        rest, tp = divmod(rank, self.tp)
        pp, cp = divmod(rest, self.cp)
        return RankCoord(tp, cp, pp)

    def heads(self, kv_heads: int, tp_rank: int) -> range:
        """KV heads that a tensor-parallel rank holds."""
        return range(tp_rank * kv_heads // self.tp, -(-(tp_rank + 1) * kv_heads // self.tp))

    def places(self, group: LayerGroup, num_layers: int, stage: int) -> range:
        """Places within the group's pages (indices into `group.layers`) of the layers that a stage
        holds; empty if it holds none. `num_layers` is the whole model's."""
        layers = self.stage_layers(num_layers, stage)
        before = sum(layer < layers.start for layer in group.layers)
        return range(before, before + sum(layer in layers for layer in group.layers))

    def stage_layers(self, num_layers: int, stage: int) -> range:
        """The model's layers that a stage holds."""
        if self.stage_ends:
            return range(self.stage_ends[stage - 1] if stage else 0, self.stage_ends[stage])
        return range(stage * num_layers // self.pp, (stage + 1) * num_layers // self.pp)


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaLayout:
    """A replica's pages and how its ranks share them."""

    topology: Topology
    layouts: tuple[PageLayout, ...]
    """By layer group; of whole pages, all heads and layers."""
    facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """What else two replicas must have in common, by name: model, revision, dtype."""

    def __post_init__(self) -> None:
        layers = sorted(layer for layout in self.layouts for layer in layout.group.layers)
        if layers != list(range(self.num_layers)):
            raise ValueError(f"layers {layers}: expected all from 0 on, else some would not move")
        ends = self.topology.stage_ends
        if ends and ends[-1] != self.num_layers:
            raise ValueError(
                f"stages end at layer {ends[-1]}, the model has {self.num_layers}: layers would be "
                f"held by no rank"
            )

    @property
    def num_layers(self) -> int:
        return sum(len(layout.group.layers) for layout in self.layouts)

    def held(self, group: int, rank: int) -> tuple[range, range]:
        """(KV heads, layer places) that `rank` holds of each page of its context-parallel share."""
        coord = self.topology.coord(rank)
        described = self.layouts[group].group
        return (
            self.topology.heads(described.kv_heads, coord.tp),
            self.topology.places(described, self.num_layers, coord.pp),
        )

    def answered_heads(self, group: int, rank: int) -> range:
        """Of the KV heads that `rank` holds, those that no tensor-parallel rank before it holds."""
        tp, kv_heads = self.topology.coord(rank).tp, self.layouts[group].group.kv_heads
        held = self.topology.heads(kv_heads, tp)
        before = self.topology.heads(kv_heads, tp - 1).stop if tp else 0
        return range(max(held.start, before), held.stop)

    def rank_layout(self, group: int, rank: int) -> PageLayout:
        """The layout of a page of `rank`'s pool; it has no layers if the stage has none of the
        group."""
        heads, places = self.held(group, rank)
        layout = self.layouts[group]
        part = dataclasses.replace(
            layout.group,
            kv_heads=len(heads),
            layers=layout.group.layers[places.start : places.stop],
        )
        return dataclasses.replace(layout, group=part)
