"""A cluster that sizes itself, on nodes that Ray's own autoscaler adds and takes away: load comes,
turns from long prompts to long outputs, and goes; no request fails."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asking import check_tokens, keep_asking
from autoscaling import AutoscalingHead, ray_client
from real_cluster import Cluster, short_folder, wait_until
from reference_model import ReferenceModel

from pd.bench.tiny import make_tiny_model

MOST = 3
FOLLOW_S = 150.0
"""Until the cluster has the shape that a load asks for."""


def spec_for(folder: Path) -> dict[str, Any]:
    def role(name: str) -> dict[str, Any]:
        return {
            "replicas": {"min": 1, "max": MOST},
            "resources": {"CPU": 1.0},
            "labels": {"pool": name},
            "pool": {"pages": 4000},
            "max_running": 4,
        }

    return {
        "name": "scaling",
        "model": {"path": str(folder), "name": "tiny", "dtype": "float32", "max_context": 3000},
        "page_tokens": 8,
        "roles": {name: role(name) for name in ("prefill", "decode")},
        "router": {"local_prefill_tokens": 0},
        "cache": {"device": False},
        "planner": {"up_after": 3.0, "down_after": 15.0},
        "api": {"port": 0},
    }


def request(
    cluster: Cluster, prompt_tokens: int, output_tokens: int
) -> Callable[[random.Random], tuple[list[int], list[int]]]:
    def ask(rng: random.Random) -> tuple[list[int], list[int]]:
        prompt = [rng.randrange(256) for _ in range(prompt_tokens)]
        return prompt, cluster.complete(prompt, output_tokens).tokens

    return ask


def counts(cluster: Cluster) -> dict[str, int]:
    """Replicas that serve, by role."""
    units = cluster.get("/admin/status").json()["controller"].get("units", [])
    roles = [unit["role"] for unit in units if unit["phase"] == "running"]
    return {role: roles.count(role) for role in ("prefill", "decode")}


def test_replicas_and_nodes_follow_the_load(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", "qwen3")
    model = ReferenceModel(folder)
    types = {
        name: {"resources": {"CPU": 1}, "labels": {"pool": name}, "max_workers": MOST}
        for name in ("prefill", "decode")
    }
    with short_folder() as work:
        head = AutoscalingHead(work, types, max_workers=2 * MOST)
        cluster = None
        try:
            head.wait_ready()
            with ray_client(head.address) as ray:
                cluster = Cluster(spec_for(folder), work, head.address).wait_ready()
                assert ray.labels("pool") == ["decode", "prefill"]
                story = [("start", counts(cluster), ray.labels("pool"))]

                def follow(what: str, is_so: Callable[[dict[str, int]], bool]) -> None:
                    begin = time.monotonic()
                    wait_until(lambda: is_so(counts(cluster)), what, FOLLOW_S)
                    took = f"{what} after {time.monotonic() - begin:.0f} s"
                    story.append((took, counts(cluster), ray.labels("pool")))

                with keep_asking(8, request(cluster, 2000, 4)) as long_prompts:
                    follow("more prefill", lambda n: n["prefill"] > 1 >= n["decode"])
                with keep_asking(12, request(cluster, 20, 400)) as long_outputs:
                    follow("more decode", lambda n: n["decode"] > 1)
                    follow("less prefill", lambda n: n["prefill"] < n["decode"])
                follow("idle", lambda n: n == {"prefill": 1, "decode": 1})
                wait_until(lambda: ray.labels("pool") == ["decode", "prefill"], "nodes", 60)
                story.append(("nodes are gone", counts(cluster), ray.labels("pool")))
                for what, replicas, nodes in story:
                    print(f"{what}: {replicas}, nodes {nodes}")
                print(f"{len(long_prompts)} + {len(long_outputs)} requests")
            check_tokens(model, [*long_prompts[:20], *long_outputs[:20]])
        except BaseException:
            if cluster is not None:
                print(cluster.log)
            raise
        finally:
            if cluster is not None:
                cluster.stop()
            head.stop()
