"""Gathering runs of host memory and scattering them, against a copy run by run."""

import numpy as np
import pytest

from transfer.copies import gather, scatter, view_memory


@pytest.mark.parametrize("seed", range(40))
def test_runs_go_to_their_places_and_nowhere_else(seed: int) -> None:
    random = np.random.default_rng(seed)
    length = int(random.choice([1, 3, 16, 512, 4096, 5000, 200_000]))
    count = int(random.integers(1, 1 + min(300, 2_000_000 // length)))
    pool = random.integers(0, 256, length * (count + 5) + 17, dtype=np.uint8)
    if seed % 2:
        # One length apart, as a rule from an odd start on.
        offsets = random.permutation(count + 5)[:count] * length + random.integers(0, 18)
    else:
        steps = random.integers(0, 5 * length // count + 1, count)
        offsets = random.permutation(np.cumsum(steps) + np.arange(count) * length)
    offsets = offsets.astype(np.int64)
    packed = random.integers(0, 256, length * count + 9, dtype=np.uint8)
    expected = packed.copy()
    for place, offset in enumerate(offsets):
        expected[place * length : (place + 1) * length] = pool[offset : offset + length]
    gather(pool, offsets, length, packed)
    np.testing.assert_array_equal(packed, expected)
    scattered = random.integers(0, 256, len(pool), dtype=np.uint8)
    expected = scattered.copy()
    for place, offset in enumerate(offsets):
        expected[offset : offset + length] = packed[place * length : (place + 1) * length]
    scatter(packed, scattered, offsets, length)
    np.testing.assert_array_equal(scattered, expected)


def test_no_runs_move_nothing() -> None:
    memory = np.arange(8, dtype=np.uint8)
    none = np.empty(0, np.int64)
    gather(memory, none, 4, memory)
    scatter(memory, memory, none, 4)
    assert memory.tolist() == list(range(8))


def test_a_view_is_the_memory_itself() -> None:
    memory = np.zeros(16, np.uint8)
    view_memory(memory.ctypes.data + 4, 8)[:] = 7
    assert memory.tolist() == [0] * 4 + [7] * 8 + [0] * 4
