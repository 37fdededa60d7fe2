"""The grid of stored objects: what ranks of one parallel shape have stored, ranks of any other
read."""

import itertools
import zlib

import numpy as np
import pytest

from hicache.grid import ObjectGrid
from hicache.keys import page_hashes, root_hash
from hicache.storage.memory import MemoryStorage
from hicache.storage.storage import Outcome
from transfer.layout import LayerGroup, PageLayout
from transfer.topology import ReplicaLayout, Topology
from transfer.transport import Region

PAGE_TOKENS = 4
GROUPS = (
    LayerGroup("full", (0, 3, 4, 7), kv_heads=6, head_dim=4),
    LayerGroup("sliding", (1, 5, 6), kv_heads=2, head_dim=8, window=6),
    LayerGroup("latent", (2, 8), kv_heads=1, head_dim=10),
)
LAYOUTS = tuple(PageLayout(group, PAGE_TOKENS, 2) for group in GROUPS)
HASHES = page_hashes(list(range(5 * PAGE_TOKENS)), PAGE_TOKENS, root_hash("model"))
GRIDS = [(None, None), (1, 1), (2, 2), (4, 3), (100, 2), (3, None), (None, 1), (5, 100)]
SHAPES = [
    Topology(tp=4, pp=2),
    Topology(tp=2, cp=2),
    Topology(tp=3, pp=3, cp=2, stage_ends=(1, 6, 9)),
    Topology(),
]


def content(page_hash, layout, head, place):
    """Bytes of one KV head and one layer of a page."""
    seed = zlib.crc32(repr((page_hash, layout.group.kind, head, place)).encode())
    return np.random.default_rng(seed).integers(0, 256, layout.run_bytes, dtype=np.uint8)


class Host:
    """Pools of whole pages, and the ranks of a replica that copy their parts to and from them."""

    def __init__(self, topology):
        self.replica = ReplicaLayout(topology, LAYOUTS)
        self.pools = [
            np.full((len(HASHES) + 1, layout.page_bytes), 0xEE, np.uint8) for layout in LAYOUTS
        ]

    def regions(self):
        return [Region(pool.ctypes.data, *pool.shape) for pool in self.pools]

    def parts(self):
        """(rank's page, page, group, head, layer place, the bytes in the pool of whole pages) of
        all that the ranks hold."""
        topology = self.replica.topology
        for rank, (g, layout) in itertools.product(range(topology.num_ranks), enumerate(LAYOUTS)):
            heads, places = self.replica.held(g, rank)
            for page in range(topology.coord(rank).cp, len(HASHES), topology.cp):
                whole = self.pools[g][page + 1].reshape(*layout.shape[:2], layout.run_bytes)
                for head, place in itertools.product(heads, places):
                    yield page, layout, head, place, whole[head, place]

    def write(self):
        for page, layout, head, place, run in self.parts():
            run[:] = content(HASHES[page], layout, head, place)

    def read(self):
        return [run.tobytes() for _, _, _, _, run in self.parts()]

    def expected(self):
        return [
            content(HASHES[page], layout, head, place).tobytes()
            for page, layout, head, place, _ in self.parts()
        ]


def move(storage, submit, first_region, grid):
    """All cells of all pages; the outcomes."""
    pages = np.arange(1, len(HASHES) + 1, dtype=np.int32)
    for g in range(len(GROUPS)):
        for number, cell in enumerate(grid.cells(g)):
            keys = grid.keys(g, number, HASHES)
            submit(keys, first_region + g, pages, 60.0, cell.part)
    return {outcome for result in storage.poll() for outcome in result.outcomes}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("writer", "reader"), list(itertools.permutations(SHAPES, 2)))
def test_any_shape_reads_what_any_other_has_stored(writer, reader, grid):
    storage = MemoryStorage("shared", {})
    one, two = Host(writer), Host(reader)
    storage.register([*one.regions(), *two.regions()])
    one.write()
    # Each has its own, from the same three values.
    grids = [ObjectGrid("model", LAYOUTS, *grid) for _ in range(2)]
    assert move(storage, storage.submit_put, 0, grids[0]) == {Outcome.STORED}
    assert move(storage, storage.submit_get, len(GROUPS), grids[1]) == {Outcome.HIT}
    assert two.read() == two.expected()
    for pool in two.pools:
        assert (pool[0] == 0xEE).all()


@pytest.mark.parametrize("grid", GRIDS)
def test_cells_cover_each_byte_of_a_page_once_and_none_is_too_large(grid):
    heads, layers = grid
    cut = ObjectGrid("model", LAYOUTS, *grid)
    for g, layout in enumerate(LAYOUTS):
        seen = np.zeros(layout.page_bytes, np.int32)
        runs = seen.reshape(*layout.shape[:2], layout.run_bytes)
        for cell in cut.cells(g):
            before = runs.copy()
            for k in range(cell.part.count):
                first = cell.part.offset + k * cell.part.stride
                seen[first : first + cell.part.length] += 1
            changed = np.argwhere((runs - before).all(axis=2)).tolist()
            assert changed == [list(pair) for pair in itertools.product(cell.heads, cell.layers)]
            assert (runs - before).sum() == cell.part.object_bytes
            assert heads is None or len(cell.heads) <= heads
            assert layers is None or len(cell.layers) <= layers
            # Cells start at multiples, whatever the group's numbers.
            assert cell.heads.start % (heads or layout.group.kv_heads) == 0
            assert cell.layers.start % (layers or len(layout.group.layers)) == 0
        assert (seen == 1).all()


def test_cells_of_all_layers_are_one_run():
    for cell in ObjectGrid("model", LAYOUTS, 2, None).cells(0):
        assert cell.part.count == 1


def test_whole_pages_are_one_object():
    grid = ObjectGrid("model", LAYOUTS)
    for g, layout in enumerate(LAYOUTS):
        (cell,) = grid.cells(g)
        assert (cell.part.offset, cell.part.object_bytes) == (0, layout.page_bytes)


def test_no_two_parts_have_the_same_name():
    names = {}
    for fingerprint, grid in itertools.product(("model", "model 2"), GRIDS):
        cut = ObjectGrid(fingerprint, LAYOUTS, *grid)
        for g in range(len(GROUPS)):
            for number, cell in enumerate(cut.cells(g)):
                for page_hash, key in zip(HASHES, cut.keys(g, number, HASHES), strict=True):
                    what = (fingerprint, page_hash, g, cell.heads, cell.layers)
                    assert names.setdefault(key, what) == what
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize(("heads", "layers"), [(0, None), (None, 0), (-1, 1)])
def test_cells_have_a_size(heads, layers):
    with pytest.raises(ValueError, match="expected at least 1"):
        ObjectGrid("model", LAYOUTS, heads, layers)
