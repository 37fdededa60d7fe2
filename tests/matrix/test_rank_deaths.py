"""50 times: any rank of a replica at work is killed, and its replica ends, names it, and leaves
nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_kills import GONE_S, kill_ranks, spec_for
from real_cluster import Cluster, RayHead, short_folder

from pd.bench.tiny import make_tiny_model

REPLICAS = 6
"""Started at once; one of them survives, so that the API has somebody to ask."""
SHAPES = [{"tp": 2}, {"pp": 2}, {"cp": 2}, {"tp": 2, "pp": 2}, {"tp": 2, "cp": 2}] * 2


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with short_folder() as folder:
        head = RayHead(folder)
        try:
            head.wait_ready()
            yield head
        finally:
            head.stop()


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_five_deaths(number: int, head: RayHead, tmp_path: Path) -> None:
    shape = SHAPES[number]
    num_ranks = 1
    for size in shape.values():
        num_ranks *= size
    model = make_tiny_model(tmp_path / "model", "qwen3")
    with short_folder() as folder:
        cluster = Cluster(spec_for(f"deaths{number}", model, REPLICAS, shape), folder, head.address)
        try:
            cluster.wait_ready()
            victims = [f"both-{each}" for each in range(REPLICAS - 1)]
            seconds = kill_ranks(cluster, victims, num_ranks, seed=number)
            assert max(seconds) < GONE_S
        finally:
            cluster.stop()
