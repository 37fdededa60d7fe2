"""kill -9 of ranks of replicas that are at work, and what must be left of them: a line that names
the rank, and nothing else. Each replica comes back, and no request fails."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from asking import check_tokens, keep_asking, short_request
from real_cluster import Cluster, abandoned_shared_memory, descendants, wait_until
from reference_model import ReferenceModel

from pd.rank import endpoint

GONE_S = 15.0
"""From a rank's death until its replica has ended."""


def spec_for(name: str, folder: Path, replicas: int, topology: dict[str, int]) -> dict[str, Any]:
    return {
        "name": name,
        "model": {"path": str(folder), "name": "tiny", "dtype": "float32", "max_context": 1000},
        "page_tokens": 8,
        "roles": {
            "both": {
                "replicas": replicas,
                "topology": topology,
                "resources": {"CPU": 0.01},
                "pool": {"pages": 200},
                "max_running": 8,
            }
        },
        "api": {"port": 0},
    }


@contextmanager
def steady_load(cluster: Cluster, model: ReferenceModel, clients: int = 3) -> Iterator[None]:
    """All are answered, with the right tokens."""
    with keep_asking(clients, short_request(cluster)) as answered:
        yield
    check_tokens(model, answered)


def kill_ranks(
    cluster: Cluster, model: ReferenceModel, replicas: list[str], num_ranks: int, seed: int
) -> list[float]:
    """One rank of each of these replicas, at random moments; the seconds until each replica was
    gone."""
    rng = random.Random(seed)
    before = abandoned_shared_memory()
    seconds = []
    times = {replica: cluster.log.count(f"{replica}: back after") for replica in replicas}
    with steady_load(cluster, model):
        for replica in replicas:
            rank = rng.randrange(num_ranks)
            pids = [cluster.pid_of(endpoint(replica, each)) for each in range(num_ranks)]
            processes = {p for pid in pids for p in descendants(pid)}
            time.sleep(rng.random())
            said = len(cluster.log)
            begin = time.monotonic()
            os.kill(pids[rank], signal.SIGKILL)
            line = f"{replica}: gone: rank {rank} ("
            wait_until(lambda line=line, said=said: line in cluster.log[said:], line, GONE_S)
            wait_until(
                lambda processes=processes: not any(each.is_alive for each in processes),
                f"no process of {replica}",
            )
            seconds.append(time.monotonic() - begin)
            text = next(text for text in cluster.log[said:].splitlines() if line in text)
            assert text.endswith("its process died"), text
        for replica in replicas:
            cluster.wait_back(replica, times[replica] + 1)
    assert abandoned_shared_memory() <= before
    return seconds
