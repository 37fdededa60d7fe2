"""A hundred thousand schedules of losses, delays, repetitions, aborts, failures and deaths."""

from __future__ import annotations

import pytest
from handover_world import World
from sampling import a_fifth_of

NUM_SCHEDULES = 100_000
NUM_BLOCKS = 20


@pytest.mark.parametrize("block", a_fifth_of(range(NUM_BLOCKS)))
def test_whatever_happens_no_page_is_reused_under_a_write_and_everything_ends(block: int) -> None:
    count = NUM_SCHEDULES // NUM_BLOCKS
    for seed in range(block * count, (block + 1) * count):
        try:
            World(seed).run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error
