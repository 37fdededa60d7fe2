"""Ranks, heads and layers of a replica against their definitions, rank by rank."""

import itertools

import hypothesis.strategies as st
import plan_model as model
import pytest
from hypothesis import given, settings

from transfer.layout import LayerGroup, PageLayout
from transfer.topology import RankCoord, ReplicaLayout, Topology

repeatable = settings(derandomize=True, database=None, deadline=None, max_examples=200)
sizes = st.integers(1, 6)


@given(sizes, sizes, sizes)
@settings(repeatable)
def test_ranks_count_tp_first_then_cp_then_pp(tp: int, pp: int, cp: int) -> None:
    topology = Topology(tp, pp, cp)
    coords = [RankCoord(t, c, p) for p, c, t in itertools.product(range(pp), range(cp), range(tp))]
    assert topology.num_ranks == len(coords)
    assert [topology.coord(rank) for rank in range(len(coords))] == coords
    assert [topology.rank(coord) for coord in coords] == list(range(len(coords)))


@given(st.integers(1, 12), st.integers(1, 12))
@settings(repeatable)
def test_a_rank_holds_the_kv_heads_of_its_query_heads(tp: int, kv_heads: int) -> None:
    held = [Topology(tp=tp).heads(kv_heads, rank) for rank in range(tp)]
    assert [tuple(heads) for heads in held] == [
        model.kv_heads_of(tp, kv_heads, rank) for rank in range(tp)
    ]
    assert set(itertools.chain.from_iterable(held)) == set(range(kv_heads))
    if kv_heads % tp == 0:
        assert {len(heads) for heads in held} == {kv_heads // tp}
    if tp % kv_heads == 0:
        assert [tuple(heads) for heads in held] == [(rank * kv_heads // tp,) for rank in range(tp)]


@given(st.data(), st.integers(1, 20), sizes)
@settings(repeatable)
def test_each_layer_of_each_group_is_in_one_stage(
    data: st.DataObject, num_layers: int, pp: int
) -> None:
    ends: tuple[int, ...] = ()
    if data.draw(st.booleans()):
        cut = st.integers(0, num_layers)
        ends = (*sorted(data.draw(st.lists(cut, min_size=pp - 1, max_size=pp - 1))), num_layers)
    topology = Topology(pp=pp, stage_ends=ends)
    of_layer = data.draw(st.lists(st.integers(0, 1), min_size=num_layers, max_size=num_layers))
    for number in set(of_layer):
        layers = tuple(layer for layer in range(num_layers) if of_layer[layer] == number)
        group = LayerGroup("full", layers, 1, 1)
        places = [topology.places(group, num_layers, stage) for stage in range(pp)]
        assert list(itertools.chain.from_iterable(places)) == list(range(len(layers)))
        for stage, held in enumerate(places):
            assert all(model.stage_of(topology, num_layers, layers[i]) == stage for i in held)


@given(st.integers(0, 40), sizes)
@settings(repeatable)
def test_stages_without_given_ends_differ_by_at_most_one_layer(num_layers: int, pp: int) -> None:
    group = model.full(num_layers, 1)
    lens = [len(Topology(pp=pp).places(group, num_layers, stage)) for stage in range(pp)]
    assert sum(lens) == num_layers
    assert max(lens) - min(lens) <= 1


def test_the_pools_of_ranks_that_share_nothing_make_up_the_page() -> None:
    groups = (LayerGroup("full", (0, 2, 3), 4, 8), LayerGroup("sliding", (1, 4), 2, 8, 16))
    whole = model.replica(Topology(), *groups)
    split = model.replica(Topology(tp=2, pp=2), *groups)
    for group in range(2):
        parts = [split.rank_layout(group, rank) for rank in range(4)]
        assert sum(part.page_bytes for part in parts) == whole.layouts[group].page_bytes
        for rank, part in enumerate(parts):
            heads, places = split.held(group, rank)
            layers = groups[group].layers[places.start : places.stop]
            assert (part.group.kv_heads, part.group.layers) == (len(heads), layers)
            assert part.run_bytes == whole.layouts[group].run_bytes
    assert [split.rank_layout(1, rank).group.layers for rank in range(4)] == [
        (1,), (1,), (4,), (4,)
    ]  # fmt: skip


def test_a_stage_may_have_no_layer_of_a_group() -> None:
    groups = (LayerGroup("full", (0, 1), 1, 8), LayerGroup("sliding", (2, 3), 1, 8, 16))
    stages = model.replica(Topology(pp=3, stage_ends=(0, 2, 4)), *groups)
    assert [stages.rank_layout(0, rank).group.layers for rank in range(3)] == [(), (0, 1), ()]
    assert [stages.rank_layout(1, rank).page_bytes for rank in range(2)] == [0, 0]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"tp": 0}, "expected tp, pp and cp of at least 1"),
        ({"cp": -1}, "expected tp, pp and cp of at least 1"),
        ({"pp": 2, "stage_ends": (4,)}, "expected 2 ascending"),
        ({"pp": 2, "stage_ends": (4, 3)}, "expected 2 ascending"),
        ({"pp": 2, "stage_ends": (-1, 3)}, "expected 2 ascending"),
    ],
)
def test_a_topology_that_cannot_be_is_refused(numbers: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Topology(**numbers)


@pytest.mark.parametrize("ends", [(2, 3), (2, 5)])
def test_stages_must_end_with_the_model(ends: tuple[int, ...]) -> None:
    layouts = model.replica(Topology(), model.full(4, 1)).layouts
    with pytest.raises(ValueError, match=rf"end at layer {ends[-1]}, the model has 4"):
        ReplicaLayout(Topology(pp=2, stage_ends=ends), layouts)


def test_a_topology_says_what_it_is() -> None:
    assert str(Topology(tp=8, pp=2, cp=3)) == "tp 8 x pp 2 x cp 3"


@pytest.mark.parametrize("layers", [(1,), (0, 2, 4), (0, 1, 1)])
def test_layers_that_would_not_move_are_refused(layers: tuple[int, ...]) -> None:
    layout = PageLayout(LayerGroup("full", layers, 1, 1), 4, 4)
    with pytest.raises(ValueError, match="expected all from 0 on"):
        ReplicaLayout(Topology(), (layout,))
