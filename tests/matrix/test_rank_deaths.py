"""50 times: any rank of a replica at work is killed. Its replica ends, names it, leaves nothing,
and comes back; every request is answered with the right tokens."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from rank_kills import GONE_S, kill_ranks, spec_for
from real_cluster import Cluster, RayHead, short_folder
from reference_model import ReferenceModel

from pd.bench.tiny import make_tiny_model

REPLICAS = 3
SHAPES = [{"tp": 2}, {"pp": 2}, {"cp": 2}, {"tp": 2, "pp": 2}, {"tp": 2, "cp": 2}]


@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_ten_deaths(number: int, head: RayHead, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    model, num_ranks = ReferenceModel(folder), math.prod(SHAPES[number].values())
    with short_folder() as work:
        spec = spec_for(f"deaths{number}", folder, REPLICAS, SHAPES[number])
        cluster = Cluster(spec, work, head.address)
        try:
            cluster.wait_ready()
            for turn in range(5):
                victims = [f"both-{each}" for each in range(2)]
                seconds = kill_ranks(cluster, model, victims, num_ranks, seed=10 * number + turn)
                print(f"{SHAPES[number]}: gone after {max(seconds):.1f} s at most")
                assert max(seconds) < GONE_S
        finally:
            cluster.stop()
