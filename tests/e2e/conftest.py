"""One Ray head for the session, tiny models, and clusters that are gone when their test module
is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_cluster import Cluster, RayHead, short_folder
from reference_model import ReferenceModel

from pd.bench.tiny import make_tiny_model


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """Started with the first test that needs it; this process is connected to it."""
    import ray

    with short_folder() as folder:
        head = RayHead(folder)
        try:
            head.wait_ready()
            ray.init(
                address=head.address, namespace="tests", log_to_driver=False, logging_level="ERROR"
            )
            yield head
            ray.shutdown()
        finally:
            head.stop()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Family -> the folder of its model, made once."""
    base = tmp_path_factory.mktemp("tiny")

    def get(family: str) -> Path:
        folder = base / family
        return folder if folder.exists() else make_tiny_model(folder, family)

    return get


@pytest.fixture(scope="session")
def reference(tiny_folder: Callable[[str], Path]) -> Callable[[str], ReferenceModel]:
    known: dict[str, ReferenceModel] = {}

    def get(family: str) -> ReferenceModel:
        if family not in known:
            known[family] = ReferenceModel(tiny_folder(family))
        return known[family]

    return get


@pytest.fixture(scope="module")
def start_cluster(ray_head: RayHead) -> Iterator[Callable[..., Cluster]]:
    """`start_cluster(spec)` gives a cluster that is ready, on the session's Ray head."""
    with short_folder() as folder, contextlib.ExitStack() as stack:

        def start(spec: dict[str, Any]) -> Cluster:
            cluster = Cluster(spec, folder, ray_head.address)
            stack.callback(cluster.stop)
            return cluster.wait_ready()

        yield start
