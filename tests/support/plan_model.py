"""Who holds which byte of which page: rules 1 and 2 and the meaning of a topology, written out rank
by rank and byte by byte. The gold model of transfer/topology.py and transfer/plan.py, which it does
not use; of them it takes the sizes that describe a replica, nothing that is calculated."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from transfer.layout import LayerGroup, PageLayout
from transfer.topology import ReplicaLayout, Topology

Codes = npt.NDArray[np.int64]
CANARY = -1
"""At the target before anything is written: also in pages that are none of the sequence's."""
GARBAGE = -2
"""At the source, in pages that are none of the sequence's."""


@dataclasses.dataclass(frozen=True, slots=True)
class Holder:
    """A rank, and which bytes of a group's pages it holds: those of `heads` in `layers`, of the
    pages whose number is `cp` modulo `cp_size`."""

    rank: int
    tp: int
    cp: int
    pp: int
    cp_size: int
    heads: tuple[int, ...]
    layers: tuple[int, ...]


def holders(replica: ReplicaLayout, group: int) -> Iterator[Holder]:
    """By rank: tp changes fastest, then cp, then pp."""
    topology = replica.topology
    described = replica.layouts[group].group
    num_layers = sum(len(layout.group.layers) for layout in replica.layouts)
    rank = 0
    for pp in range(topology.pp):
        layers = tuple(x for x in described.layers if stage_of(topology, num_layers, x) == pp)
        for cp in range(topology.cp):
            for tp in range(topology.tp):
                heads = kv_heads_of(topology.tp, described.kv_heads, tp)
                yield Holder(rank, tp, cp, pp, topology.cp, heads, layers)
                rank += 1


def kv_heads_of(tp_size: int, kv_heads: int, tp: int) -> tuple[int, ...]:
    """Query heads are split evenly, and each needs its KV head."""
    queries = math.lcm(tp_size, kv_heads)
    return tuple(
        head
        for head in range(kv_heads)
        if any(
            query * tp_size // queries == tp
            for query in range(queries)
            if query * kv_heads // queries == head
        )
    )


def stage_of(topology: Topology, num_layers: int, layer: int) -> int:
    """The first stage that ends after the layer."""
    if topology.stage_ends:
        return next(stage for stage, end in enumerate(topology.stage_ends) if layer < end)
    ends = (math.floor((stage + 1) * num_layers / topology.pp) for stage in range(topology.pp))
    return next(stage for stage, end in enumerate(ends) if layer < end)


def page_codes(layout: PageLayout, holder: Holder, page: int) -> Codes:
    """What page number `page` of the sequence has in the holder's pool, byte by byte; each byte of
    the whole page, of all heads and layers, has another code, at least 0."""
    group = layout.group
    codes = [
        (((page * 64 + head) * 256 + layer) * 2 + plane) * 2**20
        + (token * group.head_dim + dim) * layout.element_bytes
        + byte
        for head in holder.heads
        for layer in holder.layers
        for plane in range(1 if group.kind == "latent" else 2)
        for token in range(layout.page_tokens)
        for dim in range(group.head_dim)
        for byte in range(layout.element_bytes)
    ]
    return np.array(codes, dtype=np.int64)


def pool(
    layout: PageLayout,
    holder: Holder,
    num_pages: int,
    first_page: int,
    slots: Sequence[int],
    empty: int,
) -> Codes:
    """(num_pages, bytes): page first_page + i lies in slots[i], if it is the holder's."""
    page_bytes = len(page_codes(layout, holder, 0))
    codes = np.full((num_pages, page_bytes), empty, dtype=np.int64)
    for page, slot in enumerate(slots, start=first_page):
        if page % holder.cp_size == holder.cp:
            codes[slot] = page_codes(layout, holder, page)
    return codes


# ----------------------------------------------------------------------------------------- examples


def full(num_layers: int, kv_heads: int, head_dim: int = 2) -> LayerGroup:
    return LayerGroup("full", tuple(range(num_layers)), kv_heads, head_dim)


def latent(num_layers: int, head_dim: int = 5) -> LayerGroup:
    return LayerGroup("latent", tuple(range(num_layers)), 1, head_dim)


def replica(
    topology: Topology,
    *groups: LayerGroup,
    page_tokens: int = 2,
    element_bytes: int = 2,
    facts: dict[str, str] | None = None,
) -> ReplicaLayout:
    layouts = tuple(PageLayout(group, page_tokens, element_bytes) for group in groups)
    return ReplicaLayout(topology, layouts, facts or {})
