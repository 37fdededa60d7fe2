"""Several API processes behind one port."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from real_cluster import Cluster, RayHead, short_folder, wait_until
from reference_model import ReferenceModel

FAMILY = "qwen3"


def spec_for(name: str, folder: Path, port: int = 0) -> dict[str, Any]:
    role = {"resources": {"CPU": 0.1}, "pool": {"pages": 300}, "max_running": 8}
    return {
        "name": name,
        "model": {"path": str(folder), "name": "tiny", "dtype": "float32", "max_context": 1000},
        "page_tokens": 8,
        "roles": {"both": role},
        "router": {"max_queue": 99},
        "api": {"port": port, "replicas": 2},
    }


@pytest.fixture(scope="module")
def cluster(
    start_cluster: Callable[..., Cluster], tiny_folder: Callable[[str], Path]
) -> Iterator[Cluster]:
    cluster = start_cluster(spec_for("two-apis", tiny_folder(FAMILY)))
    yield cluster
    cluster.wait_idle()
    assert cluster.stop() == 0


ENDED, IN_FLIGHT = "pagerelay_requests_total", "pagerelay_requests_in_flight"
APIS = {"api-0", "api-1"}


def values(cluster: Cluster, name: str) -> dict[str, float]:
    """Of a metric, by API process, as any of them tells."""
    families = text_string_to_metric_families(cluster.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    return {sample.labels["api"]: sample.value for sample in samples}


def test_they_share_the_requests_and_outlive_each_other(
    cluster: Cluster, reference: Callable[[str], ReferenceModel]
) -> None:
    rng, model = random.Random(0), reference(FAMILY)

    def ask(count: int) -> None:
        """Each on a connection of its own."""
        for _ in range(count):
            prompt = [rng.randrange(256) for _ in range(rng.randrange(5, 60))]
            assert model.is_greedy(prompt, cluster.complete(prompt, 5).tokens)

    def kill(api: str) -> None:
        pid = cluster.pid_of(api)
        cluster.kill(api)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), f"the end of {api}")

    ask(30)
    for _ in range(4):
        wait_until(lambda: sum(values(cluster, ENDED).values()) == 30, "figures of all")
    assert set(values(cluster, ENDED)) == APIS
    for _ in range(4):
        status = cluster.get("/admin/status").json()
        assert (status["in_flight"], status["max_queue"]) == (0, 99)
        assert status["controller"]["settled"]

    for api in sorted(APIS):
        kill(api)
        ask(10)
        cluster.wait_back(api)
        for _ in range(4):
            wait_until(lambda: set(values(cluster, IN_FLIGHT)) == APIS, "figures of both")


def test_another_cluster_is_not_let_in_at_their_port(
    cluster: Cluster, ray_head: RayHead, tiny_folder: Callable[[str], Path]
) -> None:
    port = int(cluster.url.rpartition(":")[2])
    with short_folder() as folder:
        other = Cluster(spec_for("third-api", tiny_folder(FAMILY), port), folder, ray_head.address)
        try:
            assert other.wait_exit() == 1
        finally:
            other.stop()
        log = other.log
    assert f"api.host, api.port: cannot listen on 127.0.0.1:{port}" in log
    assert "Traceback" not in log
