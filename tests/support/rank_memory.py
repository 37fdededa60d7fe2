"""The pools of a simulated replica's ranks, byte for byte as transfer/layout.py says, with elements
that name their token prefix, layer group, head, layer and plane; and ranks that compute them.

Every rank of every stage and stripe has memory of its own; slots of the replica become pages of
ranks as hicache/index.py says. Stages of a pipeline run the same commands in the same order, each
at its own time.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cache_world import GARBAGE

from pd.engine.batch import LAST_SAMPLED, StepCommand
from transfer.layout import PageLayout
from transfer.topology import ReplicaLayout, Topology
from transfer.transport import PagePart

ELEMENT_BYTES = 4
VOCABULARY = 97
Page = list[int | None]
"""A key for each token; None: never written."""
Array = npt.NDArray[Any]

_NEVER = 0x5B5B5B5B
_GARBAGE_BYTE = 0xA5
_GARBAGE = 0xA5A5A5A5
_SPREAD = 0x9E3779B1


def prefix_keys(tokens: Iterable[int], key: int = 0) -> list[int]:
    """Of each prefix, after one with `key`."""
    keys = []
    for token in tokens:
        key = hash((key, token)) & 0x7FFFFFFF
        keys.append(key)
    return keys


def next_token(key: int) -> int:
    return key % VOCABULARY


class RankPool:
    """A layer group's pages on one rank."""

    def __init__(self, replica: ReplicaLayout, group: int, rank: int, num_pages: int) -> None:
        layout = replica.rank_layout(group, rank)
        heads, places = replica.held(group, rank)
        self.page_tokens = layout.page_tokens
        self.data = np.full((num_pages, *layout.shape), _NEVER, np.uint32)
        self.bytes: Array = self.data.view(np.uint8).reshape(num_pages, layout.page_bytes)
        places_of = np.ix_(heads, places, range(layout.group.planes))
        numbers = 1 + ((group * 64 + places_of[0]) * 64 + places_of[1]) * 2 + places_of[2]
        self.names = (numbers * _SPREAD).astype(np.uint32)[..., None, None]

    def compute(self, page: int, offset: int, keys: Sequence[int]) -> None:
        """The elements of the tokens from `offset` on."""
        values = np.array(keys, np.uint32)[:, None] + self.names
        self.data[page, ..., offset : offset + len(keys), :] = values

    def has(self, pages: Sequence[int], keys: Array, seen: Array) -> bool:
        """Whether all that is seen of these pages is what the keys say; (pages, tokens) both."""
        wanted = keys[:, None, None, None, :, None] + self.names
        unseen = ~seen[:, None, None, None, :, None]
        return bool(((self.data[list(pages)] == wanted) | unseen).all())

    def values(self, page: int) -> Array:
        """(elements, tokens): which key each names."""
        values = self.data[page]
        keys = np.where(values == _NEVER, -2, (values - self.names).astype(np.int64))
        keys = np.where(values == _GARBAGE, -1, keys)
        return np.moveaxis(keys, -2, -1).reshape(-1, self.page_tokens)

    def fill(self, page: int, content: Page) -> None:
        for offset, key in enumerate(content):
            if key is None or key == GARBAGE:
                self.data[page, ..., offset, :] = _NEVER if key is None else _GARBAGE
            else:
                self.compute(page, offset, [key])

    def spoil(self, pages: Array, part: PagePart | None, at: int | None = None) -> None:
        """Garbage in what a write of this part writes, or in one element of it."""
        part = part or PagePart(0, 0, self.bytes.shape[1])
        for run in range(part.count):
            begin = part.target_offset + run * part.target_stride
            if at is None:
                self.bytes[pages, begin : begin + part.length] = _GARBAGE_BYTE
            elif run == 0:
                begin += at % (part.length // ELEMENT_BYTES) * ELEMENT_BYTES
                self.bytes[pages, begin : begin + ELEMENT_BYTES] = _GARBAGE_BYTE

    def write(self, pages: Array, target: RankPool, targets: Array, part: PagePart | None) -> None:
        if part is None:
            assert self.bytes.shape[1] == target.bytes.shape[1]
            part = PagePart(0, 0, self.bytes.shape[1])
        assert part.source_end <= self.bytes.shape[1]
        assert part.target_end <= target.bytes.shape[1]
        for run in range(part.count):
            source = part.source_offset + run * part.source_stride
            to = part.target_offset + run * part.target_stride
            taken = self.bytes[pages, source : source + part.length]
            target.bytes[targets, to : to + part.length] = taken


class _Row:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.keys = prefix_keys(tokens)
        self.sampled = LAST_SAMPLED
        """None yet."""

    def extend(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.keys += prefix_keys(tokens, self.keys[-1] if self.keys else 0)


class _Stage:
    """What the ranks of a stage know alike."""

    def __init__(self, num_groups: int) -> None:
        self.rows: dict[int, _Row] = {}
        self.tables: list[dict[tuple[int, int], int]] = [{} for _ in range(num_groups)]


class Ranks:
    def __init__(self, topology: Topology, layouts: Sequence[PageLayout], num_pages: int) -> None:
        """`num_pages`: of each pool of each rank."""
        self.topology = topology
        replica = ReplicaLayout(topology, tuple(layouts))
        self.groups = [layout.group for layout in layouts]
        self.page_tokens = layouts[0].page_tokens
        self.pools = [
            [RankPool(replica, group, rank, num_pages) for group in range(len(layouts))]
            for rank in range(topology.num_ranks)
        ]
        self.stages = [_Stage(len(layouts)) for _ in range(topology.pp)]

    def slot(self, rank: int, page: int) -> int:
        """Of the replica, for a page of a rank."""
        return page * self.topology.cp + self.topology.coord(rank).cp

    def _holders(self, group: int, slot: int, stage: int | None = None) -> list[RankPool]:
        """The pools that have a part of it."""
        topology = self.topology
        assert slot >= topology.cp, "a null page"
        return [
            self.pools[rank][group]
            for rank in range(topology.num_ranks)
            if topology.coord(rank).cp == slot % topology.cp
            and stage in (None, topology.coord(rank).pp)
            and self.pools[rank][group].data.size
        ]

    def read(self, group: int, slot: int) -> Page:
        """What all parts of a page name alike; garbage where they do not."""
        holders = self._holders(group, slot)
        values = np.concatenate([pool.values(slot // self.topology.cp) for pool in holders])
        first = np.where((values == values[0]).all(axis=0), values[0], GARBAGE)
        return [None if key == -2 else int(key) for key in first]

    def fill(self, group: int, slot: int, content: Page) -> None:
        for pool in self._holders(group, slot):
            pool.fill(slot // self.topology.cp, content)

    def step(
        self, command: StepCommand, number: int, in_use: Sequence[Container[int]]
    ) -> list[int]:
        """Run a command on one stage: check all it reads, compute what it says, and return the
        tokens sampled. `in_use`: by layer group, slots that it may touch."""
        stage = self.stages[number]
        for start in command.starts:
            stage.rows[start.row] = _Row(start.tokens.tolist())
        for table, update in zip(stage.tables, command.pages, strict=True):
            for row, page, slot in update.tolist():
                assert slot % self.topology.cp == page % self.topology.cp
                table[row, page] = slot
        sampled = []
        chunks = np.split(command.tokens, np.cumsum(command.counts)[:-1])
        for at, (row, position) in enumerate(
            zip(command.rows.tolist(), command.positions.tolist(), strict=True)
        ):
            known, chunk = stage.rows[row], chunks[at].tolist()
            if chunk == [LAST_SAMPLED]:
                chunk = [known.sampled]
            end = position + len(chunk)
            if position == len(known.tokens):
                known.extend(chunk)
            assert known.tokens[position:end] == chunk
            for group in range(len(self.groups)):
                self._attend(group, number, row, position, end, in_use[group])
            if command.sample[at]:
                known.sampled = next_token(known.keys[end - 1])
                sampled.append(known.sampled)
        return sampled

    def _attend(
        self,
        group: int,
        stage: int,
        row: int,
        position: int,
        end: int,
        in_use: Container[int],
    ) -> None:
        size, cp = self.page_tokens, self.topology.cp
        keys, table = self.stages[stage].rows[row].keys, self.stages[stage].tables[group]
        for page in range(position // size, (end - 1) // size + 1):
            begin, until = max(position, page * size), min(end, (page + 1) * size)
            for pool in self._holders(group, table[row, page], stage):
                pool.compute(table[row, page] // cp, begin % size, keys[begin:until])
        described = self.groups[group]
        window = described.window if described.kind == "sliding" else position + 1
        first = max(0, position - window + 1)
        num_pages = (end - 1) // size + 1
        of_pages = np.array([*keys[:end], *[0] * (num_pages * size - end)], np.uint32)
        of_pages = of_pages.reshape(num_pages, size)
        places = np.arange(num_pages * size).reshape(num_pages, size)
        seen = (places >= first) & (places < end)
        for page in range(first // size, min(first // size + cp, num_pages)):
            slots = [table[row, other] for other in range(page, num_pages, cp)]
            assert all(slot in in_use for slot in slots), "pages of a step in flight were released"
            for pool in self._holders(group, slots[0], stage):
                pages = [slot // cp for slot in slots]
                assert pool.has(pages, of_pages[page::cp], seen[page::cp]), (
                    f"{described.kind} keys of row {row} are wrong on stage {stage}"
                )
