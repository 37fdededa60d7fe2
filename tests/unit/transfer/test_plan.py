"""Plans against a model that knows, byte by byte, who holds what; then merging and errors."""

import itertools
from collections import Counter, defaultdict

import hypothesis.strategies as st
import numpy as np
import plan_model as model
import pytest
from hypothesis import HealthCheck, given, settings

from transfer.layout import LayerGroup, PageLayout
from transfer.plan import PairPlan, RankWrite, check_pair
from transfer.segments import plan_segments
from transfer.topology import ReplicaLayout, Topology
from transfer.transport import PagePart, PeerError

repeatable = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
sizes = st.integers(1, 6)


@st.composite
def topologies(draw: st.DrawFn, num_layers: int) -> Topology:
    tp, pp, cp = draw(sizes), draw(sizes), draw(sizes)
    ends: tuple[int, ...] = ()
    if draw(st.booleans()):
        cut = st.integers(0, num_layers)
        ends = (*sorted(draw(st.lists(cut, min_size=pp - 1, max_size=pp - 1))), num_layers)
    return Topology(tp, pp, cp, ends)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[ReplicaLayout, ReplicaLayout]:
    """Two replicas of one model with up to three layer groups."""
    num_layers = draw(st.integers(1, 9))
    of_layer = draw(st.lists(st.integers(0, 2), min_size=num_layers, max_size=num_layers))
    groups = []
    for number in sorted(set(of_layer)):
        kind = draw(st.sampled_from(("full", "sliding", "latent")))
        groups.append(
            LayerGroup(
                kind,
                tuple(layer for layer in range(num_layers) if of_layer[layer] == number),
                kv_heads=1 if kind == "latent" else draw(st.integers(1, 9)),
                head_dim=draw(st.integers(1, 3)),
                window=4 if kind == "sliding" else 0,
            )
        )
    page_tokens, element_bytes = draw(st.integers(1, 2)), draw(st.sampled_from((1, 2)))
    source, target = (
        model.replica(topology, *groups, page_tokens=page_tokens, element_bytes=element_bytes)
        for topology in (draw(topologies(num_layers)), draw(topologies(num_layers)))
    )
    return source, target


@st.composite
def slot_lists(draw: st.DrawFn, cp: int, first_page: int, num_pages: int) -> list[int]:
    """Where each page lies. A pool has num_pages + 3 pages; page 0 is never used. Two pages lie in
    one slot only if they belong to different context-parallel ranks."""
    slots: list[int] = [0] * num_pages
    for rank in range(cp):
        owned = [i for i in range(num_pages) if (first_page + i) % cp == rank]
        free = draw(st.permutations(range(1, num_pages + 3)))
        for i, slot in zip(owned, free, strict=False):
            slots[i] = slot
    return slots


def int32(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def copies(write: RankWrite) -> list[tuple[int, int, int, int]]:
    """(source page, its first byte, target page, its first byte) of each run of `part.length`."""
    part = write.part
    return [
        (
            source,
            part.source_offset + run * part.source_stride,
            target,
            part.target_offset + run * part.target_stride,
        )
        for source, target in zip(
            write.source_pages.tolist(), write.target_pages.tolist(), strict=True
        )
        for run in range(part.count)
    ]


@given(st.data(), pairs(), st.integers(0, 40), st.integers(0, 13))
@settings(repeatable, max_examples=500)
def test_each_byte_of_the_target_is_written_once_by_a_rank_that_holds_it_and_nothing_else(
    data: st.DataObject, pair: tuple[ReplicaLayout, ReplicaLayout], first_page: int, num_pages: int
) -> None:
    source, target = pair
    plan = PairPlan(source, target)
    for group, layout in enumerate(source.layouts):
        source_slots, target_slots = (
            data.draw(slot_lists(each.topology.cp, first_page, num_pages)) for each in pair
        )
        pool_pages = num_pages + 3
        held = [
            model.pool(layout, holder, pool_pages, first_page, source_slots, model.GARBAGE)
            for holder in model.holders(source, group)
        ]
        expected = [
            model.pool(layout, holder, pool_pages, first_page, target_slots, model.CANARY)
            for holder in model.holders(target, group)
        ]
        written = [np.full_like(codes, model.CANARY) for codes in expected]
        times = [np.zeros(codes.shape, dtype=np.int64) for codes in expected]
        for write in plan.writes(group, first_page, int32(source_slots), int32(target_slots)):
            length = write.part.length
            assert write.group == group
            assert write.num_bytes == len(copies(write)) * length
            for source_page, source_byte, target_page, target_byte in copies(write):
                bytes_there = slice(target_byte, target_byte + length)
                codes = held[write.source][source_page, source_byte : source_byte + length]
                assert len(codes) == length
                written[write.target][target_page, bytes_there] = codes
                times[write.target][target_page, bytes_there] += 1
        for rank, codes in enumerate(expected):
            np.testing.assert_array_equal(written[rank], codes)
            np.testing.assert_array_equal(times[rank], codes != model.CANARY)


@given(pairs(), st.integers(0, 40), st.integers(1, 30))
@settings(repeatable, max_examples=500)
def test_holders_of_the_same_bytes_take_equal_shares(
    pair: tuple[ReplicaLayout, ReplicaLayout], first_page: int, num_pages: int
) -> None:
    """A head in the layers of one stage of each side: of the writes that its pages need, one for
    each page and each target rank that takes it, any holder makes at most one more than another.
    Where the target does not replicate the head, this is so also across context-parallel ranks;
    where it does, one of those may own a page more, which goes to every taker."""
    source, target = pair
    plan = PairPlan(source, target)
    pages = np.arange(num_pages, dtype=np.int32)
    for group in range(len(source.layouts)):
        ours = list(model.holders(source, group))
        theirs = list(model.holders(target, group))
        made: Counter[tuple[int, int, int]] = Counter()
        for write in plan.writes(group, first_page, pages, pages):
            stage = theirs[write.target].pp
            run = source.layouts[group].run_bytes
            layers = set(ours[write.source].layers) & set(theirs[write.target].layers)
            first = write.part.source_offset // (run * len(ours[write.source].layers))
            num_heads = write.part.page_bytes // (run * len(layers))
            for head in ours[write.source].heads[first : first + num_heads]:
                made[write.source, head, stage] += len(write.source_pages)
        for pp, stage in itertools.product(range(source.topology.pp), range(target.topology.pp)):
            of_source = [holder for holder in ours if holder.pp == pp]
            of_target = [taker for taker in theirs if taker.pp == stage]
            if not set(of_source[0].layers) & set(of_target[0].layers):
                continue
            for head in range(source.layouts[group].group.kv_heads):
                shares = defaultdict(list)
                for holder in of_source:
                    if head in holder.heads:
                        shares[holder.cp].append(made[holder.rank, head, stage])
                takers = sum(head in taker.heads for taker in of_target if taker.cp == 0)
                for cp, counts in shares.items():
                    owned = sum(
                        page % source.topology.cp == cp
                        for page in range(first_page, first_page + num_pages)
                    )
                    assert sum(counts) == owned * takers
                    assert max(counts) - min(counts) <= 1
                if takers == 1:
                    all_counts = list(itertools.chain.from_iterable(shares.values()))
                    assert max(all_counts) - min(all_counts) <= 1


@given(st.data(), pairs(), st.integers(0, 20), st.integers(0, 25))
@settings(repeatable, max_examples=200)
def test_chunk_by_chunk_is_the_same_as_at_once(
    data: st.DataObject, pair: tuple[ReplicaLayout, ReplicaLayout], first_page: int, num_pages: int
) -> None:
    plan = PairPlan(*pair)
    source_slots = int32(data.draw(slot_lists(1, 0, num_pages)))
    target_slots = int32(data.draw(slot_lists(1, 0, num_pages)))
    cuts = sorted(data.draw(st.lists(st.integers(0, num_pages), max_size=4)))

    def moves(group: int, start: int, end: int) -> Counter[tuple[object, ...]]:
        writes = plan.writes(
            group, first_page + start, source_slots[start:end], target_slots[start:end]
        )
        return Counter(
            (write.source, write.target, write.part, int(source), int(target))
            for write in writes
            for source, target in zip(write.source_pages, write.target_pages, strict=True)
        )

    for group in range(len(pair[0].layouts)):
        chunks: Counter[tuple[object, ...]] = Counter()
        for start, end in itertools.pairwise([0, *cuts, num_pages]):
            chunks += moves(group, start, end)
        assert chunks == moves(group, 0, num_pages)


# ------------------------------------------------------------------------------------------ merging


@st.composite
def parts(draw: st.DrawFn) -> tuple[PagePart, int, int]:
    """A part, and the sizes of the pages that it lies in; often the whole page."""
    length, count = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    gaps, ends, offsets = (
        [draw(st.sampled_from((0, 0, 1, 3))) for _ in range(2)] for _ in range(3)
    )
    strides = [length + gap for gap in gaps]
    part = PagePart(offsets[0], offsets[1], length, count, strides[0], strides[1])
    return part, part.source_end + ends[0], part.target_end + ends[1]


@given(
    parts(),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=12),
    st.lists(st.integers(1, 4), max_size=4),
)
@settings(repeatable, max_examples=400)
def test_segments_are_maximal_and_equal_to_the_runs_one_by_one(
    described: tuple[PagePart, int, int], pages: list[tuple[int, int]], run_lens: list[int]
) -> None:
    part, source_page_bytes, target_page_bytes = described
    # Some of the pages are runs of neighbours, as in a pool that is not scrambled.
    for (source, target), run_len in zip(list(pages), run_lens, strict=False):
        pages += [(source + i, target + i) for i in range(1, run_len)]
    sources, targets = (int32([page[side] for page in pages]) for side in range(2))
    write = RankWrite(0, 0, 0, sources, targets, part)
    expected = [
        (
            source_page * source_page_bytes + source_byte + byte,
            target_page * target_page_bytes + target_byte + byte,
        )
        for source_page, source_byte, target_page, target_byte in copies(write)
        for byte in range(part.length)
    ]
    found = plan_segments(sources, targets, part, source_page_bytes, target_page_bytes)
    segments = list(
        zip(
            found.source_offsets.tolist(),
            found.target_offsets.tolist(),
            found.lengths.tolist(),
            strict=True,
        )
    )
    assert len(found) == len(segments)
    assert expected == [
        (source + byte, target + byte)
        for source, target, length in segments
        for byte in range(length)
    ]
    for (source, target, length), following in itertools.pairwise(segments):
        assert (source + length, target + length) != following[:2]


def test_offsets_beyond_two_gigabytes() -> None:
    found = plan_segments(int32([3000]), int32([4000]), PagePart(0, 0, 1 << 20), 1 << 20, 1 << 20)
    assert found.source_offsets.tolist() == [3000 << 20]
    assert found.target_offsets.tolist() == [4000 << 20]


# --------------------------------------------------------------------------------------- what it is


def test_whole_pages_where_both_sides_are_alike() -> None:
    group = model.full(4, kv_heads=4)
    source = model.replica(Topology(tp=2, pp=2), group)
    plan = PairPlan(source, source)
    page_bytes = source.rank_layout(0, 0).page_bytes
    assert {(link.source, link.target, link.part) for link in plan.links[0]} == {
        (rank, rank, PagePart(0, 0, page_bytes)) for rank in range(4)
    }


def test_a_slice_of_heads_is_one_run_and_one_of_layers_a_run_for_each_head() -> None:
    group = model.full(4, kv_heads=4)
    whole = model.replica(Topology(), group)
    run = whole.layouts[0].run_bytes
    by_heads = PairPlan(whole, model.replica(Topology(tp=2), group)).links[0]
    assert [link.part for link in by_heads] == [
        PagePart(0, 0, 8 * run),
        PagePart(8 * run, 0, 8 * run),
    ]
    by_layers = PairPlan(whole, model.replica(Topology(pp=2), group)).links[0]
    assert [link.part for link in by_layers] == [
        PagePart(0, 0, 2 * run, 4, 4 * run, 2 * run),
        PagePart(2 * run, 0, 2 * run, 4, 4 * run, 2 * run),
    ]


def test_holders_of_a_latent_take_turns() -> None:
    source = model.replica(Topology(tp=4), model.latent(2))
    writes = PairPlan(source, model.replica(Topology(tp=2), model.latent(2))).writes(
        0, 5, np.arange(5, 13, dtype=np.int32), np.arange(8, dtype=np.int32)
    )
    made = {(write.source, write.target): write.source_pages.tolist() for write in writes}
    # Page i is written by rank 2i to target 0 and by rank 2i + 1 to target 1, modulo 4.
    assert made == {
        (0, 0): [6, 8, 10, 12],
        (1, 1): [6, 8, 10, 12],
        (2, 0): [5, 7, 9, 11],
        (3, 1): [5, 7, 9, 11],
    }


@pytest.mark.parametrize("num_pages", [64, 2048])
def test_a_plan_has_arrays_of_pages_and_no_object_for_each(num_pages: int) -> None:
    group = LayerGroup("full", tuple(range(36)), 8, 128)
    source = model.replica(Topology(tp=8), group, page_tokens=64)
    plan = PairPlan(source, model.replica(Topology(tp=4), group, page_tokens=64))
    pages = np.random.default_rng(0).permutation(num_pages).astype(np.int32)
    targets = pages[::-1].copy()
    writes = plan.writes(0, 0, pages, targets)
    assert len(plan.links[0]) == len(writes) == 8
    for write in writes:
        assert write.part.count == 1
        assert np.shares_memory(write.source_pages, pages)
        assert np.shares_memory(write.target_pages, targets)
    # Where holders take turns there is one array for each link, however many pages.
    latent = model.latent(36)
    turns = PairPlan(
        model.replica(Topology(tp=8), latent), model.replica(Topology(tp=4, cp=3), latent)
    )
    assert len(turns.writes(0, 1, pages, targets)) == len(turns.links[0]) == 24


def test_page_lists_of_different_lengths_are_refused() -> None:
    replica = model.replica(Topology(), model.full(1, 1))
    with pytest.raises(ValueError, match="2 source and 1 target pages"):
        PairPlan(replica, replica).writes(0, 0, int32([1, 2]), int32([1]))


# ----------------------------------------------------------------------------------- what it is not

OURS = model.replica(Topology(tp=2), model.full(4, kv_heads=2), facts={"revision": "abc"})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            model.replica(Topology(), model.full(4, 2), page_tokens=4, facts={"revision": "abc"}),
            "page_tokens: the source has 2, the target has 4",
        ),
        (
            model.replica(Topology(), model.full(4, 2), element_bytes=4, facts={"revision": "abc"}),
            "element bytes of layer group 0: the source has 2, the target has 4",
        ),
        (
            model.replica(Topology(), model.full(3, 2), facts={"revision": "abc"}),
            r"layers of layer group 0: the source has \(0, 1, 2, 3\), the target has \(0, 1, 2\)",
        ),
        (
            model.replica(Topology(), model.full(4, 4), facts={"revision": "abc"}),
            "kv_heads of layer group 0: the source has 2, the target has 4",
        ),
        (
            model.replica(Topology(), model.full(4, 2, 3), facts={"revision": "abc"}),
            "head_dim of layer group 0: the source has 2, the target has 3",
        ),
        (
            model.replica(
                Topology(),
                LayerGroup("sliding", (0, 1, 2, 3), 2, 2, 8),
                facts={"revision": "abc"},
            ),
            "kind of layer group 0: the source has full, the target has sliding",
        ),
        (
            model.replica(
                Topology(),
                LayerGroup("full", (0, 1), 2, 2),
                LayerGroup("full", (2, 3), 2, 2),
                facts={"revision": "abc"},
            ),
            "layer groups: the source has 1, the target has 2",
        ),
        (
            model.replica(Topology(), model.full(4, 2), facts={"revision": "xyz"}),
            "revision: the source has abc, the target has xyz",
        ),
        (
            model.replica(Topology(), model.full(4, 2)),
            "revision: the source has abc, the target has none",
        ),
        (
            model.replica(
                Topology(), model.full(4, 2), facts={"revision": "abc", "dtype": "float16"}
            ),
            "dtype: the source has none, the target has float16",
        ),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_naming_both_values(
    other: ReplicaLayout, message: str
) -> None:
    with pytest.raises(PeerError, match=message):
        PairPlan(OURS, other)


def test_topologies_need_not_agree() -> None:
    stages = Topology(tp=3, pp=2, cp=2, stage_ends=(1, 4))
    check_pair(OURS, ReplicaLayout(stages, OURS.layouts, OURS.facts))


def test_window_is_compared() -> None:
    ours, theirs = (
        ReplicaLayout(Topology(), (PageLayout(LayerGroup("sliding", (0,), 1, 1, window), 2, 2),))
        for window in (512, 1024)
    )
    with pytest.raises(PeerError, match="window of layer group 0: the source has 512"):
        check_pair(ours, theirs)
