"""Replicas of several ranks on real Ray: tokens over NIXL between different shapes, and the death
of any rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rank_kills import kill_ranks, spec_for
from real_cluster import Cluster
from reference_model import ReferenceModel

pytestmark = pytest.mark.e2e


def test_tokens_between_shapes(
    start_cluster: Callable[..., Cluster],
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
) -> None:
    """TP 2 writes to PP 2, with the host tier of the node shared by both."""
    spec = spec_for("shapes", tiny_folder("gemma3_text"), 1, {})
    role = spec["roles"].pop("both")
    spec["roles"] = {
        "prefill": {**role, "topology": {"tp": 2}},
        "decode": {**role, "topology": {"pp": 2}},
    }
    spec |= {"router": {"local_prefill_tokens": 0}, "cache": {"host": {"memory": "16MiB"}}}
    cluster = start_cluster(spec)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 256, length).tolist() for length in (5, 40, 100)]
    model = reference("gemma3_text")
    for _ in range(2):
        for prompt, tokens in zip(prompts, cluster.complete_all(prompts, 12), strict=True):
            assert model.is_greedy(prompt, tokens)
    cluster.wait_idle()
    loads = cluster.loads()
    assert loads["decode-0"]["handovers_failed"] == 0
    assert loads["prefill-0"]["host_pages_out"] > 0


def test_a_killed_rank_ends_its_replica_and_is_named(
    start_cluster: Callable[..., Cluster],
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
) -> None:
    cluster = start_cluster(spec_for("kills", tiny_folder("qwen3"), 2, {"tp": 2}))
    kill_ranks(cluster, reference("qwen3"), ["both-1"], 2, seed=1)
