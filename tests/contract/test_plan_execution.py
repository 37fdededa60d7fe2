"""Plans carried out for real: every rank of two replicas is a transport of this process with pools
of its own, and every byte of all pools is compared afterwards, those that must not change too."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import plan_model as model
import pytest

from transfer.backends import BACKENDS, make_transport
from transfer.layout import LayerGroup
from transfer.memory import HostMemory, allocate_host
from transfer.plan import PairPlan
from transfer.topology import ReplicaLayout, Topology
from transfer.transport import ConfigurationError, Region, Transport

DEADLINE_S = 30.0
PAGES = 23
FIRST_PAGE = 3
NUM_PAGES = 14
"""Of the sequence; in two chunks."""

MIXED = (LayerGroup("full", (0, 3, 4), 2, 16), LayerGroup("sliding", (1, 2, 5), 3, 8, 32))
PAIRS = {
    "whole pages": (Topology(), Topology(), (model.full(3, 2, 16),)),
    "tp3 to tp2": (Topology(tp=3), Topology(tp=2), (model.full(3, 6, 16),)),
    "tp2 to tp3, heads shared on both sides": (
        Topology(tp=2),
        Topology(tp=3),
        (model.full(2, 5, 16),),
    ),
    "heads replicated at the source": (Topology(tp=4), Topology(tp=1), (model.full(2, 2, 16),)),
    "heads replicated at the target": (Topology(tp=2), Topology(tp=4), (model.full(2, 2, 16),)),
    "cp2 to cp3": (Topology(cp=2), Topology(cp=3), (model.full(2, 2, 16),)),
    "pp2 to pp3": (Topology(pp=2), Topology(pp=3), (model.full(5, 3, 16),)),
    "stages without a layer of a group": (
        Topology(pp=2, stage_ends=(3, 6)),
        Topology(pp=3, stage_ends=(1, 3, 6)),
        MIXED,
    ),
    "latents, tp4 to tp2": (Topology(tp=4), Topology(tp=2), (model.latent(3, 36),)),
    "latents and heads, everything differs": (
        Topology(tp=2, cp=2),
        Topology(tp=2, pp=2),
        (LayerGroup("latent", (0, 2), 1, 40), LayerGroup("full", (1, 3), 3, 8)),
    ),
}


SLOW = {"mooncake": ("whole pages", "tp3 to tp2", "cp2 to cp3", "pp2 to pp3")}
"""Backends that take a second to close a rank, and the pairs that they are tried with."""


@dataclasses.dataclass
class Rank:
    """A transport and its pools, by layer group: all bytes, with a page of canary at each end."""

    transport: Transport
    memory: list[np.ndarray]
    holders: list[model.Holder]
    allocated: list[HostMemory]

    def pages(self, group: int) -> np.ndarray:
        return self.memory[group].reshape(PAGES + 2, -1)[1:-1]


def place_noise(size: int, seed: int) -> np.ndarray:
    places = np.arange(size, dtype=np.uint64) + np.uint64(seed << 32)
    return (places * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(56)).astype(np.uint8)


def content(codes: np.ndarray) -> np.ndarray:
    """A byte for each of `model.page_codes`."""
    mixed = codes.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93)
    return ((mixed ^ (mixed >> np.uint64(29))) >> np.uint64(37)).astype(np.uint8)


@contextlib.contextmanager
def make_ranks(backend: str, side: str, replica: ReplicaLayout) -> Iterator[list[Rank]]:
    ranks = []
    with contextlib.ExitStack() as stack:
        by_group = [list(model.holders(replica, group)) for group in range(len(replica.layouts))]
        for rank in range(replica.topology.num_ranks):
            try:
                transport = make_transport(backend, f"{side}-{rank}")
            except ConfigurationError as error:
                pytest.skip(str(error))
            stack.callback(transport.close)
            holders = [holders[rank] for holders in by_group]
            memory, regions, kept = [], [], []
            for group, holder in enumerate(holders):
                page_bytes = len(model.page_codes(replica.layouts[group], holder, 0))
                size = (PAGES + 2) * page_bytes
                allocated = allocate_host(size)
                bytes_here = np.frombuffer(allocated.buffer, np.uint8, count=size)
                bytes_here[:] = place_noise(size, 100 * (side == "target") + 10 * rank + group)
                kept.append(allocated)
                memory.append(bytes_here)
                regions.append(Region(allocated.address + page_bytes, PAGES, page_bytes))
            try:
                transport.register(regions)
            except ConfigurationError as error:
                pytest.skip(str(error))
            ranks.append(Rank(transport, memory, holders, kept))
        yield ranks


def draw_slots(random: np.random.Generator, cp: int) -> np.ndarray:
    """Of pages FIRST_PAGE, FIRST_PAGE + 1, ...: scattered, and never page 0."""
    slots = np.zeros(NUM_PAGES, dtype=np.int32)
    for rank in range(cp):
        owned = [i for i in range(NUM_PAGES) if (FIRST_PAGE + i) % cp == rank]
        slots[owned] = 1 + random.permutation(PAGES - 1)[: len(owned)]
    return slots


def put(ranks: list[Rank], replica: ReplicaLayout, slots: list[np.ndarray]) -> None:
    """Each rank's share of the sequence's pages, in all groups."""
    for rank in ranks:
        for group, holder in enumerate(rank.holders):
            for page, slot in enumerate(slots[group].tolist(), start=FIRST_PAGE):
                if page % holder.cp_size == holder.cp:
                    codes = model.page_codes(replica.layouts[group], holder, page)
                    rank.pages(group)[slot] = content(codes)


def execute(
    plan: PairPlan, ranks: list[Rank], target: list[Rank], slots: tuple[list[np.ndarray], ...]
) -> None:
    """Chunk by chunk, all ranks at once; polls all of them until every write has ended."""
    connected = set()
    in_flight = [0] * len(ranks)
    for start, end in ((0, 5), (5, NUM_PAGES)):
        for group in range(len(plan.links)):
            ours, theirs = (slots[side][group][start:end] for side in range(2))
            for write in plan.writes(group, FIRST_PAGE + start, ours, theirs):
                transport, peer = ranks[write.source].transport, f"target-{write.target}"
                if (write.source, write.target) not in connected:
                    connected.add((write.source, write.target))
                    transport.connect(peer, target[write.target].transport.describe())
                transport.write(peer, group, write.source_pages, write.target_pages, write.part)
                in_flight[write.source] += 1
    deadline = time.monotonic() + DEADLINE_S
    while any(in_flight):
        assert time.monotonic() < deadline, f"writes in flight by rank: {in_flight}"
        for number, rank in enumerate(ranks):
            for result in rank.transport.poll():
                assert result.error is None
                in_flight[number] -= 1
        for rank in target:
            assert rank.transport.poll() == []


@pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for backend in BACKENDS for name in SLOW.get(backend, PAIRS)],
)
def test_every_byte_of_every_pool_is_as_planned(backend: str, name: str) -> None:
    ours, theirs, groups = PAIRS[name]
    source, target = model.replica(ours, *groups), model.replica(theirs, *groups)
    random = np.random.default_rng(len(name))
    slots = tuple(
        [draw_slots(random, each.topology.cp) for _ in groups] for each in (source, target)
    )
    with (
        make_ranks(backend, "source", source) as ranks,
        make_ranks(backend, "target", target) as target_ranks,
    ):
        put(ranks, source, slots[0])
        before = [[memory.copy() for memory in rank.memory] for rank in ranks]
        landed = [
            dataclasses.replace(rank, memory=[memory.copy() for memory in rank.memory])
            for rank in target_ranks
        ]
        put(landed, target, slots[1])
        execute(PairPlan(source, target), ranks, target_ranks, slots)
        for group in range(len(groups)):
            for rank, expected in zip(target_ranks, landed, strict=True):
                np.testing.assert_array_equal(rank.memory[group], expected.memory[group])
            for rank, expected_bytes in zip(ranks, before, strict=True):
                np.testing.assert_array_equal(rank.memory[group], expected_bytes[group])
