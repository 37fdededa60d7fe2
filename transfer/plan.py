"""Which rank writes which bytes of which pages to which rank. Pure.

`PairPlan` is made once per pair of replicas: it finds the links, each from one source rank to one
target rank, with the part of a page that goes there and the pages for which it does: every so many,
from one on. Planning a handover then slices the page lists, so its cost grows with the links and
with neither pages nor bytes.

What it promises, for the pages given: every byte that a target rank holds is written exactly once,
by a rank that holds it. Where several ranks hold the same bytes (KV heads replicated as tp exceeds
them, latents), they take turns page by page (rule 2), and target by target where those are
replicated too. So in any run of pages each of them makes, of the writes that these bytes need (one
for each page and each target rank that takes it), at most one more than another; a context-parallel
rank that owns a page more has that page's writes more.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from transfer.topology import RankCoord, ReplicaLayout
from transfer.transport import Int32Array, PagePart, PeerError


@dataclasses.dataclass(frozen=True, slots=True)
class Link:
    """`source` writes `part` of those pages to `target` whose number is `residue` modulo
    `period`."""

    source: int
    target: int
    group: int
    part: PagePart
    period: int
    residue: int

    def pick(self, first_page: int) -> slice:
        """This link's among the pages `first_page`, `first_page + 1`, ..."""
        return slice((self.residue - first_page) % self.period, None, self.period)


@dataclasses.dataclass(frozen=True, slots=True)
class RankWrite:
    """source_pages[i] of rank `source` -> target_pages[i] of rank `target`, of `group`, as they
    were numbered in `PairPlan.writes`."""

    source: int
    target: int
    group: int
    source_pages: Int32Array
    target_pages: Int32Array
    part: PagePart

    @property
    def num_bytes(self) -> int:
        return len(self.source_pages) * self.part.page_bytes


class PairPlan:
    """Everything about a pair of replicas that does not depend on the request."""

    def __init__(self, source: ReplicaLayout, target: ReplicaLayout) -> None:
        """Raises PeerError, naming both values, when the two cannot exchange pages."""
        check_pair(source, target)
        self.source = source
        self.target = target
        self.links: tuple[tuple[Link, ...], ...] = tuple(
            tuple(_links(source, target, group)) for group in range(len(source.layouts))
        )
        """By layer group."""

    def writes(
        self, group: int, first_page: int, source_pages: Int32Array, target_pages: Int32Array
    ) -> list[RankWrite]:
        """All writes that move pages `first_page`, `first_page + 1`, ... of one sequence.

        Page first_page + i lies in source_pages[i] on the source ranks that own it, and belongs
        into target_pages[i] on its target ranks. The arrays returned are views of these: pages are
        picked by their position in the sequence, and their numbers may be of any kind.
        """
        if len(source_pages) != len(target_pages):
            raise ValueError(f"{len(source_pages)} source and {len(target_pages)} target pages")
        writes = []
        for link in self.links[group]:
            picked = link.pick(first_page)
            sources = source_pages[picked]
            if len(sources):
                writes.append(
                    RankWrite(
                        link.source, link.target, group, sources, target_pages[picked], link.part
                    )
                )
        return writes


def check_pair(source: ReplicaLayout, target: ReplicaLayout) -> None:
    """Raises PeerError, naming the first thing that differs and both values."""
    for name, ours, theirs in _common(source, target):
        if ours != theirs:
            raise PeerError(f"{name}: the source has {ours}, the target has {theirs}")


def _common(source: ReplicaLayout, target: ReplicaLayout) -> Iterator[tuple[str, object, object]]:
    for name in sorted({*source.facts, *target.facts}):
        yield name, source.facts.get(name, "none"), target.facts.get(name, "none")
    yield "layer groups", len(source.layouts), len(target.layouts)
    for number, (ours, theirs) in enumerate(zip(source.layouts, target.layouts, strict=True)):
        for field in ("kind", "layers", "kv_heads", "head_dim", "window"):
            yield (
                f"{field} of layer group {number}",
                getattr(ours.group, field),
                getattr(theirs.group, field),
            )
        yield "page_tokens", ours.page_tokens, theirs.page_tokens
        yield f"element bytes of layer group {number}", ours.element_bytes, theirs.element_bytes


def _links(source: ReplicaLayout, target: ReplicaLayout, group: int) -> Iterator[Link]:
    """Cut heads where any rank's share begins or ends; within such an interval all holders are
    alike. Then give each pair of ranks its turns, and join intervals that have the same."""
    ours, theirs = source.topology, target.topology
    kv_heads = source.layouts[group].group.kv_heads
    source_heads = [ours.heads(kv_heads, tp) for tp in range(ours.tp)]
    target_heads = [theirs.heads(kv_heads, tp) for tp in range(theirs.tp)]
    cuts = sorted(
        {cut for heads in (*source_heads, *target_heads) for cut in (heads.start, heads.stop)}
    )
    # (source tp, source cp, target tp, target cp) -> runs of heads, each with period and residue
    shares: dict[tuple[int, int, int, int], list[tuple[range, int, int]]] = {}
    for low, high in itertools.pairwise(cuts):
        holders = [tp for tp, heads in enumerate(source_heads) if low in heads]
        takers = [tp for tp, heads in enumerate(target_heads) if low in heads]
        turns = _turns(len(holders), len(takers), ours.cp, theirs.cp)
        for (holder, taker, source_cp, target_cp), (period, residue) in turns.items():
            runs = shares.setdefault((holders[holder], source_cp, takers[taker], target_cp), [])
            if runs and runs[-1][0].stop == low and runs[-1][1:] == (period, residue):
                low_before = runs.pop()[0].start
                runs.append((range(low_before, high), period, residue))
            else:
                runs.append((range(low, high), period, residue))
    for (source_tp, source_cp, target_tp, target_cp), runs in shares.items():
        for source_pp in range(ours.pp):
            for target_pp in range(theirs.pp):
                one = ours.rank(RankCoord(source_tp, source_cp, source_pp))
                other = theirs.rank(RankCoord(target_tp, target_cp, target_pp))
                for heads, period, residue in runs:
                    part = _part(source, one, target, other, group, heads)
                    if part is not None:
                        yield Link(one, other, group, part, period, residue)


def _turns(
    num_holders: int, num_takers: int, source_cp: int, target_cp: int
) -> dict[tuple[int, int, int, int], tuple[int, int]]:
    """(holder, taker, source cp, target cp) -> (period, residue) of page numbers.

    The j-th page of a context-parallel rank goes to each taker in turn, and each of these writes is
    the next holder's. For one taker the holders come round after `cycle` turns, each at most once;
    so (holder, source cp) says the page's number modulo source_cp * cycle, target cp modulo
    target_cp, and the two together modulo `period`: there is at most one residue.
    """
    cycle = num_holders // math.gcd(num_holders, num_takers)
    period = math.lcm(source_cp * cycle, target_cp)
    return {
        (
            (page // source_cp * num_takers + taker) % num_holders,
            taker,
            page % source_cp,
            page % target_cp,
        ): (period, page)
        for page in range(period)
        for taker in range(num_takers)
    }


def _part(
    source: ReplicaLayout, one: int, target: ReplicaLayout, other: int, group: int, heads: range
) -> PagePart | None:
    """`heads` in the layers that both ranks hold; None if there are no such layers."""
    source_heads, source_places = source.held(group, one)
    target_heads, target_places = target.held(group, other)
    first = max(source_places.start, target_places.start)
    end = min(source_places.stop, target_places.stop)
    if first >= end:
        return None
    run = source.layouts[group].run_bytes
    source_stride, target_stride = len(source_places) * run, len(target_places) * run
    source_offset = (heads.start - source_heads.start) * source_stride
    target_offset = (heads.start - target_heads.start) * target_stride
    part = PagePart(
        source_offset=source_offset + (first - source_places.start) * run,
        target_offset=target_offset + (first - target_places.start) * run,
        length=(end - first) * run,
        count=len(heads),
        source_stride=source_stride,
        target_stride=target_stride,
    )
    if part.count == 1 or part.length == source_stride == target_stride:
        length = part.page_bytes
        part = PagePart(part.source_offset, part.target_offset, length)
    return part
