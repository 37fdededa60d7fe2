"""kill -9 of ranks of replicas that are at work, and what must be left of them: a line that names
the rank, and nothing else. Each replica comes back, and no request fails."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import requests
from real_cluster import Cluster, abandoned_shared_memory, descendants, wait_until

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
def steady_load(cluster: Cluster, clients: int = 3) -> Iterator[None]:
    """Requests one after the other; all are answered."""
    over = threading.Event()
    problems: list[str] = []

    def ask(number: int) -> None:
        rng = random.Random(number)
        while not over.is_set():
            prompt = [rng.randrange(256) for _ in range(rng.randrange(5, 200))]
            try:
                response = cluster.post(
                    "/v1/completions", prompt=prompt, max_tokens=40, ignore_eos=True
                )
            except requests.RequestException as error:
                problems.append(str(error))
                return
            if not response.ok:
                problems.append(response.text)
            over.wait(0.01)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(60)
    assert not problems, problems[0]


def kill_ranks(cluster: Cluster, replicas: list[str], num_ranks: int, seed: int) -> list[float]:
    """One rank of each of these replicas, at random moments; the seconds until each replica was
    gone."""
    rng = random.Random(seed)
    before = abandoned_shared_memory()
    seconds = []
    with steady_load(cluster):
        for replica in replicas:
            rank = rng.randrange(num_ranks)
            pids = [cluster.pid_of(endpoint(replica, each)) for each in range(num_ranks)]
            processes = {p for pid in pids for p in descendants(pid)}
            time.sleep(rng.random())
            begin = time.monotonic()
            os.kill(pids[rank], signal.SIGKILL)
            line = f"{replica}: gone: rank {rank} ("
            wait_until(lambda line=line: line in cluster.log, line, GONE_S)
            wait_until(
                lambda processes=processes: not any(each.is_alive for each in processes),
                f"no process of {replica}",
            )
            seconds.append(time.monotonic() - begin)
            said = next(text for text in cluster.log.splitlines() if line in text)
            assert said.endswith("its process died"), said
        for replica in replicas:
            cluster.wait_back(replica)
    assert abandoned_shared_memory() <= before
    return seconds
