"""Under load a cluster gets nodes from Ray's autoscaler, by the labels that its roles ask for, and
then gives them back."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from autoscaling import AutoscalingHead, RayClient, ray_client
from real_cluster import Cluster, short_folder, wait_until

pytestmark = pytest.mark.e2e
ROLES = ("prefill", "decode")
RESOURCES = {"CPU": 1.0}
NODE_S = 90.0
"""For a node to come or to go; on two idle cores it takes 4 s."""


@pytest.fixture(scope="module")
def head() -> Iterator[AutoscalingHead]:
    node_types = {
        role: {"resources": RESOURCES, "labels": {"pool": role}, "max_workers": 2} for role in ROLES
    }
    with short_folder() as folder:
        head = AutoscalingHead(folder, node_types, max_workers=3)
        try:
            head.wait_ready()
            yield head
        finally:
            head.stop()


@pytest.fixture(scope="module")
def client(head: AutoscalingHead) -> Iterator[RayClient]:
    with ray_client(head.address) as connected:
        yield connected


@contextlib.contextmanager
def many_prompts(cluster: Cluster) -> Iterator[None]:
    """Four at a time, until the end of the block; all must be answered."""
    is_over, errors = threading.Event(), list[Exception]()

    def ask(seed: int) -> None:
        rng = random.Random(seed)
        try:
            while not is_over.is_set():
                cluster.complete([rng.randrange(200) for _ in range(180)], 4)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    assert not errors


def test_a_cluster_grows_with_its_load_and_gives_nodes_back(
    head: AutoscalingHead, client: RayClient, tiny_folder: Callable[[str], Path]
) -> None:
    def role(name: str, most: int) -> dict[str, object]:
        sizes = {"pool": {"pages": 200}, "max_batch_tokens": 32}
        return {"replicas": {"min": 1, "max": most}, "labels": {"pool": name}, **sizes}

    spec = {
        "name": "autoscaled",
        "model": {"path": str(tiny_folder("qwen3")), "dtype": "float32", "name": "tiny"},
        "page_tokens": 8,
        "roles": {"prefill": role("prefill", 2), "decode": role("decode", 1)},
        "router": {"local_prefill_tokens": 0},
        "planner": {"up": 0.2, "down": 0.1, "up_after": 2, "down_after": 8},
        "api": {"port": 0},
    }
    cluster = Cluster(spec, head.folder, head.address)
    try:
        cluster.wait_ready()
        with many_prompts(cluster):
            wait_until(lambda: "prefill-1: joined" in cluster.log, "more replicas", NODE_S)
        assert client.labels("pool").count("prefill") == 2
        wait_until(lambda: client.labels("pool").count("prefill") == 1, "fewer nodes", NODE_S)
        assert len(cluster.complete([1, 2, 3], 4).tokens) == 4
    finally:
        assert cluster.stop() == 0
    wait_until(lambda: not client.labels("pool"), "the end of all nodes", NODE_S)
