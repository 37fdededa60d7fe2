"""A cluster that changes while it serves: reloads, drains, and a controller that is killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from asking import check_tokens, keep_asking
from rank_kills import steady_load
from real_cluster import Cluster, RayHead, descendants, short_folder, wait_until
from reference_model import ReferenceModel

from pd.bench.stats import percentile
from pd.http_client import stream_json

FAMILY = "gemma3_text"


def spec_for(name: str, folder: Path, **more: Any) -> dict[str, Any]:
    role = {"resources": {"CPU": 0.1}, "pool": {"pages": 300}, "max_running": 8}
    return {
        "name": name,
        "model": {"path": str(folder), "name": "tiny", "dtype": "float32", "max_context": 1000},
        "page_tokens": 8,
        "roles": {"prefill": role, "decode": {**role, "replicas": 2}},
        "router": {"local_prefill_tokens": 0},
        "api": {"port": 0},
        **more,
    }


@contextmanager
def streams(cluster: Cluster, model: ReferenceModel, clients: int) -> Iterator[list[float]]:
    """All end well, with the right tokens. Gives a list of the seconds between one token of an
    answer and the next."""
    gaps: list[float] = []

    def ask(rng: random.Random) -> tuple[list[int], list[int]]:
        prompt = [rng.randrange(256) for _ in range(rng.randrange(5, 200))]
        body = {
            "model": "tiny",
            "prompt": prompt,
            "max_tokens": 150,
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }
        tokens: list[int] = []
        last = 0.0
        for event in stream_json(f"{cluster.url}/v1/completions", body, timeout_s=60):
            if new := event["choices"][0].get("token_ids") if event["choices"] else None:
                now = time.monotonic()
                if last:
                    gaps.append(now - last)
                last = now
                tokens += new
        assert len(tokens) == 150
        return prompt, tokens

    with keep_asking(clients, ask) as answered:
        yield gaps
    check_tokens(model, answered)


def pd(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pd.cli", *words, "--url", cluster.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def write(cluster: Cluster, spec: dict[str, Any]) -> str:
    path = cluster.folder / "changed.yaml"
    path.write_text(yaml.safe_dump({"transfer": cluster.spec["transfer"], **spec}))
    return str(path)


def counters(cluster: Cluster) -> dict[str, float]:
    lines = cluster.get("/metrics").text.splitlines()
    found = (line.rsplit(" ", 1) for line in lines if line.startswith("pagerelay_requests_"))
    return {name: float(value) for name, value in found}


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., Cluster], tiny_folder: Callable[[str], Path]) -> Cluster:
    return start_cluster(spec_for("operations", tiny_folder(FAMILY)))


def test_a_replica_changes_its_role(
    cluster: Cluster, reference: Callable[[str], ReferenceModel]
) -> None:
    """There and back, as the same process."""
    role = cluster.spec["roles"]["prefill"]
    pids = {name: cluster.pid_of(name) for name in cluster.replicas}
    with streams(cluster, reference(FAMILY), 6):
        for prefill, decode in ((2, 1), (1, 2)):
            counts = {"prefill": prefill, "decode": decode}
            roles = {name: {**role, "replicas": count} for name, count in counts.items()}
            done = pd(cluster, "reload", write(cluster, {**cluster.spec, "roles": roles}))
            assert done.returncode == 0, done.stderr
            there = [each["role"] for each in cluster.get("/admin/status").json()["replicas"]]
            assert {name: there.count(name) for name in counts} == counts
            time.sleep(1)
    assert {name: cluster.pid_of(name) for name in cluster.replicas} == pids
    assert cluster.log.count("becomes decode") == 1
    assert cluster.log.count("becomes prefill") == 1
    assert "gone" not in cluster.log
    assert counters(cluster)["pagerelay_requests_replayed_total"] == 0


def test_reload_and_drain_under_load(
    cluster: Cluster, reference: Callable[[str], ReferenceModel], capsys: pytest.CaptureFixture[str]
) -> None:
    with streams(cluster, reference(FAMILY), 4) as quiet:
        time.sleep(3)
    changed = {**cluster.spec, "router": {"local_prefill_tokens": 0, "max_queue": 100}}
    changed["roles"] = {
        "prefill": {**cluster.spec["roles"]["prefill"], "max_batch_tokens": 128},
        "decode": {**cluster.spec["roles"]["decode"], "replicas": 3},
    }
    with streams(cluster, reference(FAMILY), 12) as gaps:
        time.sleep(1)
        done = pd(cluster, "reload", write(cluster, changed))
        assert done.returncode == 0, done.stderr
        assert "running: 1 prefill, 3 decode" in sorted_roles(done.stdout)
        assert "roles.prefill.max_batch_tokens" in done.stdout
        status = cluster.get("/admin/status").json()
        assert status["max_queue"] == 100
        name = next(r["name"] for r in status["replicas"] if r["role"] == "decode")
        done = pd(cluster, "drain", name)
        assert done.returncode == 0, done.stderr
        assert f"{name}: draining" in done.stderr
    assert f"{name}: ended, drained after" in cluster.log
    assert "gone" not in cluster.log
    seen = counters(cluster)
    assert seen["pagerelay_requests_moved_total"] > 0
    assert seen["pagerelay_requests_replayed_total"] == 0
    with capsys.disabled():
        for what, of in (("before", quiet), ("while replicas were replaced", gaps)):
            p50, p99 = (1e3 * percentile(sorted(of), each) for each in (50, 99))
            print(
                f"\n{what}: {len(of)} gaps between tokens, p50 {p50:.1f} ms, p99 {p99:.1f} ms, "
                f"longest {1e3 * max(of):.0f} ms",
                end="",
            )
        print()


def sorted_roles(text: str) -> str:
    return text.replace("3 decode, 1 prefill", "1 prefill, 3 decode")


def test_what_cannot_be_done_is_refused(cluster: Cluster) -> None:
    done = pd(cluster, "drain", "decode-17")
    assert done.returncode == 1
    assert "replica: found 'decode-17', expected one of decode-" in done.stderr
    before = cluster.get("/admin/status").json()["controller"]
    done = pd(cluster, "reload", write(cluster, {**cluster.spec, "page_tokens": 16}))
    assert done.returncode == 1
    assert "page_tokens: found 16, expected 8" in done.stderr
    url = f"{cluster.url}/admin/reload"
    for body, status in (({"spec": {"roles": {}}}, 409), ({"spec": 1}, 400), ({}, 400)):
        answer = requests.post(url, json=body, timeout=30)
        assert answer.status_code == status, answer.text
    assert cluster.get("/admin/status").json()["controller"] == before


def test_a_new_controller_adopts_what_runs(
    ray_head: RayHead,
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
) -> None:
    spec = spec_for("adopted", tiny_folder(FAMILY))
    role = spec["roles"]["prefill"]
    spec["roles"]["decode"] = role
    with short_folder() as folder:
        first = Cluster(spec, folder, ray_head.address).wait_ready()
        second = None
        try:
            pids = {name: first.pid_of(name) for name in (*first.replicas, "api-0")}
            with steady_load(first, reference(FAMILY)):
                os.kill(first.process.pid, signal.SIGKILL)
                first.process.wait(20)
                time.sleep(1)
                roles = {"prefill": role, "decode": {**role, "replicas": 2}}
                changed = {**spec, "roles": roles}
                second = Cluster(changed, folder, ray_head.address).wait_ready()
                wait_until(lambda: "decode-1: joined" in second.log, "a second decode replica", 60)
            assert second.url == first.url
            assert "adopted api-0" in second.log
            for name, pid in pids.items():
                assert f"{name}: ready" not in second.log
                assert Path(f"/proc/{pid}").exists(), name
            second.kill("decode-1")
            second.wait_back("decode-1")
            rival = Cluster(spec, folder, ray_head.address)
            assert rival.wait_exit() == 1
            assert "is already running" in rival.log
            assert second.complete([1, 2, 3], 3).tokens
        finally:
            for each in (second, first):
                if each is not None:
                    each.stop()
        for name, pid in pids.items():
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"the end of {name}")


def test_processes_without_a_controller_end(
    ray_head: RayHead, tiny_folder: Callable[[str], Path]
) -> None:
    import ray

    spec = spec_for("orphans", tiny_folder(FAMILY), timeouts={"controller": 12.0})
    spec["roles"] = {"both": spec["roles"]["prefill"]}
    before = ray.available_resources()["CPU"]
    with short_folder() as folder:
        cluster = Cluster(spec, folder, ray_head.address).wait_ready()
        pids = [cluster.pid_of(name) for name in (*cluster.replicas, "api-0")]
        below = descendants(cluster.process.pid)
        os.kill(cluster.process.pid, signal.SIGKILL)
        cluster.process.wait(20)
        for pid in pids:
            wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), f"the end of {pid}")
        wait_until(lambda: ray.available_resources()["CPU"] == before, "all CPUs free")
        wait_until(lambda: not any(each.is_alive for each in below), "the driver's processes")
        with pytest.raises(requests.RequestException):
            cluster.get("/health")
