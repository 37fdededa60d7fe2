"""Processes come, die and go: Ray jobs, Ctrl-C, a second start, two clusters, kill -9, refused
starts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from real_cluster import (
    Cluster,
    RayHead,
    abandoned_shared_memory,
    descendants,
    end_all,
    short_folder,
    wait_until,
)
from reference_model import ReferenceModel

pytestmark = pytest.mark.e2e

BIN = Path(sys.executable).parent
LONG = 3000
"""Tokens of a prompt that takes the prefill replica some seconds, eight at a time."""


def spec_for(name: str, folder: Path) -> dict[str, Any]:
    rank = {"device": "cpu", "threads": 1, "max_running": 8}
    return {
        "name": name,
        "model": {"path": str(folder), "name": "tiny", "dtype": "float32", "max_context": 3200},
        "page_tokens": 8,
        "roles": {
            "prefill": {**rank, "pool": {"pages": 420}, "max_batch_tokens": 8},
            "decode": {**rank, "pool": {"pages": 1400}, "max_batch_tokens": 64},
        },
        "router": {"local_prefill_tokens": 0},
        "api": {"port": 0},
    }


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture(scope="module")
def model(reference: Callable[[str], ReferenceModel]) -> ReferenceModel:
    return reference("qwen3")


@pytest.fixture(scope="module")
def tiny(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("qwen3")


def check_serves(cluster: Cluster, model: ReferenceModel, seed: int = 0) -> None:
    prompt = [(seed + 7 * i) % model.vocab_size for i in range(30)]
    assert model.is_greedy(prompt, cluster.complete(prompt, 8).tokens)


def names_in(namespace: str) -> list[str]:
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == namespace]


def placement_groups() -> list[str]:
    """Names of those that are not removed."""
    import ray

    table = ray.util.placement_group_table().values()
    return [group["name"] for group in table if group["state"] != "REMOVED"]


# ----------------------------------------------------------------------------------------- Ray jobs


def test_as_a_ray_job(ray_head: RayHead, tiny: Path, model: ReferenceModel, folder: Path) -> None:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(spec_for("job", tiny)))
    environment = yaml.safe_dump({"env_vars": {"TMPDIR": str(folder)}})
    (folder / "environment.yaml").write_text(environment)
    job = f"job-{os.getpid()}"

    def ray_job(*arguments: str) -> str:
        command, *rest = arguments
        done = subprocess.run(
            [str(BIN / "ray"), "job", command, "--address", ray_head.dashboard, *rest],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    options = ("--runtime-env", str(folder / "environment.yaml"), "--no-wait")
    ray_job("submit", *options, "--submission-id", job, "--", str(BIN / "pd"), "serve", str(path))

    def logs() -> str:
        answer = requests.get(f"{ray_head.dashboard}/api/jobs/{job}/logs", timeout=10)
        return str(answer.json()["logs"])

    def status() -> str:
        answer = requests.get(f"{ray_head.dashboard}/api/jobs/{job}", timeout=10)
        return str(answer.json()["status"])

    def ready_url() -> str:
        assert status() in ("PENDING", "RUNNING"), logs()
        lines = [line for line in logs().splitlines() if line.startswith("ready: ")]
        return lines[0].split()[1] if lines else ""

    url = wait_until(ready_url, "the job's ready line", 90, every_s=0.3)
    body = {"model": "tiny", "prompt": [1, 2, 3] * 9, "max_tokens": 6, "temperature": 0}
    body |= {"return_token_ids": True, "ignore_eos": True}
    answer = requests.post(f"{url}/v1/completions", json=body, timeout=30).json()
    assert model.is_greedy([1, 2, 3] * 9, answer["choices"][0]["token_ids"])
    assert sorted(names_in("pagerelay/job")) == ["api-0", "decode-0", "prefill-0"]
    ray_job("stop", job)
    wait_until(lambda: status() == "STOPPED", "the job's end", 30)
    assert "SIGTERM: stopping" in logs()
    wait_until(lambda: not names_in("pagerelay/job"), "no actor of the job")
    wait_until(lambda: not placement_groups(), "no placement group")
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/health", timeout=5)
    assert not list(folder.glob("pagerelay-*"))


# ------------------------------------------------------------------------------- a Ray of one's own


def test_ctrl_c_leaves_nothing_and_a_second_start_works(
    tiny: Path, model: ReferenceModel, folder: Path
) -> None:
    """Without RAY_ADDRESS: every process is below `pd serve`, and gone when it is."""
    before = abandoned_shared_memory()
    for round_number, number in enumerate((signal.SIGINT, signal.SIGTERM)):
        cluster = Cluster(spec_for("own", tiny), folder)
        try:
            cluster.wait_ready()
            check_serves(cluster, model, round_number)
            processes = descendants(cluster.process.pid)
            assert len(processes) >= 6  # pd, Ray's own, three actors
            assert list(folder.glob("pagerelay-*"))
            cluster.process.send_signal(number)
            code = cluster.wait_exit(30)
            assert code == 0, cluster.log
            assert f"{number.name}: stopping" in cluster.log
            assert "Traceback" not in cluster.log
            wait_until(
                lambda all_of=processes: not any(process.is_alive for process in all_of),
                "no process left",
            )
        finally:
            end_all(descendants(cluster.process.pid))
        assert not list(folder.glob("pagerelay-*"))
        assert abandoned_shared_memory() <= before


# ------------------------------------------------------------------------------------- side by side


@pytest.fixture(scope="module")
def pair(start_cluster: Callable[..., Cluster], tiny: Path) -> tuple[Cluster, Cluster]:
    """Two clusters on one Ray cluster."""
    return start_cluster(spec_for("left", tiny)), start_cluster(spec_for("right", tiny))


def test_two_clusters_side_by_side(pair: tuple[Cluster, Cluster], model: ReferenceModel) -> None:
    for number, cluster in enumerate(pair):
        check_serves(cluster, model, number)
    assert pair[0].url != pair[1].url
    for cluster in pair:
        assert cluster.loads()["decode-0"]["finished"] == 1
        assert len(names_in(f"pagerelay/{cluster.name}")) == 3


def test_a_name_is_taken_once(
    pair: tuple[Cluster, Cluster],
    tiny: Path,
    folder: Path,
    ray_head: RayHead,
    model: ReferenceModel,
) -> None:
    second = Cluster(spec_for("left", tiny), folder, ray_head.address)
    assert second.wait_exit() == 1
    assert "name: a cluster 'left' is already running on this Ray cluster" in second.log
    assert "Traceback" not in second.log
    check_serves(pair[0], model, 5)


# ------------------------------------------------------------------------------------------ kill -9


def ask_long(cluster: Cluster) -> requests.Response:
    prompt = [(11 * i) % 300 for i in range(LONG)]
    return cluster.post("/v1/completions", prompt=prompt, max_tokens=50, ignore_eos=True)


def health(cluster: Cluster) -> tuple[int, list[str]]:
    response = cluster.get("/health")
    return response.status_code, response.json()["missing"]


def test_a_killed_prefill_replica(pair: tuple[Cluster, Cluster], model: ReferenceModel) -> None:
    """The request that it prefilled is prefilled to its end by the decode replica, from the pages
    that have landed; what decodes goes on; all get the right tokens."""
    cluster = pair[0]
    prompts = [[20 * number + i for i in range(12)] for number in range(4)]
    with ThreadPoolExecutor(5) as pool:
        running = [pool.submit(cluster.complete, prompt, 1500) for prompt in prompts]
        wait_until(lambda: cluster.loads()["decode-0"]["running"] == 4, "four decode")
        long = pool.submit(ask_long, cluster)
        wait_until(lambda: cluster.loads()["prefill-0"]["running"] == 1, "one is prefilled")
        time.sleep(0.2)
        load = cluster.loads()
        assert load["prefill-0"]["running"] == 1
        assert load["decode-0"]["handovers_in"] == 1
        cluster.kill("prefill-0")
        answers = [future.result(60) for future in running]
        saved = long.result(60)
    assert saved.status_code == 200, saved.text
    assert saved.json()["usage"]["completion_tokens"] == 50
    load = cluster.check(["decode-0"])["decode-0"]["load"]
    assert (load["handovers_failed"], load["failed"]) == (1, 0)
    assert 0 < load["prefill_tokens"] < LONG
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.tokens) == 1500
        assert model.is_greedy(prompt, answer.tokens)
    assert "prefill-0: gone: its process died" in cluster.log
    cluster.wait_back("prefill-0")
    wait_until(lambda: health(cluster) == (200, []), "all roles are served again")
    check_serves(cluster, model, 3)
    cluster.wait_idle()
    assert cluster.loads()["prefill-0"]["finished"] == 1


def test_a_killed_api_server(pair: tuple[Cluster, Cluster], model: ReferenceModel) -> None:
    """It is back at the same address; what it had in progress is given back everywhere."""
    cluster = pair[0]
    body = {"max_tokens": 3000, "ignore_eos": True, "prompt": [7] * 20}
    with ThreadPoolExecutor(1) as pool:
        cut = pool.submit(cluster.post, "/v1/completions", **body)
        wait_until(lambda: cluster.loads()["decode-0"]["running"] == 1, "it decodes")
        cluster.kill("api-0")
        with pytest.raises(requests.ConnectionError):
            cut.result(60)
    cluster.wait_back("api-0")

    def is_well() -> bool:
        try:
            return health(cluster) == (200, [])
        except requests.ConnectionError:
            return False

    wait_until(is_well, "it listens, and knows all replicas")
    check_serves(cluster, model, 4)
    cluster.wait_idle()


def test_a_killed_decode_replica(pair: tuple[Cluster, Cluster], model: ReferenceModel) -> None:
    """Its requests go on where they were on the one that takes its place, also one whose prompt is
    being prefilled: the client gets every token once, the right one, drawn or greedy."""
    cluster = pair[1]
    prompts = [[20 * number + i for i in range(12)] for number in range(3)]
    drawn = {"prompt": [5] * 20, "max_tokens": 800, "ignore_eos": True, "return_token_ids": True}
    drawn |= {"seed": 7, "frequency_penalty": 0.5, "temperature": 1.0}
    with ThreadPoolExecutor(5) as pool:
        undisturbed = cluster.post("/v1/completions", **drawn).json()["choices"][0]
        running = [pool.submit(cluster.complete, prompt, 1500) for prompt in prompts]
        seeded = pool.submit(cluster.post, "/v1/completions", **drawn)
        wait_until(lambda: cluster.loads()["decode-0"]["running"] == 4, "four decode")
        long = pool.submit(ask_long, cluster)
        wait_until(lambda: cluster.loads()["prefill-0"]["running"] == 1, "one is prefilled")
        assert cluster.loads()["decode-0"]["running"] == 4
        cluster.kill("decode-0")
        wait_until(lambda: health(cluster) == (503, ["decode"]), "it is missed")
        refused = cluster.post("/v1/completions", prompt=[1, 2, 3])
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_replica")
        answers = [future.result(120) for future in running]
        saved, again = long.result(120), seeded.result(120)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.tokens) == 1500
        assert model.is_greedy(prompt, answer.tokens)
    assert again.json()["choices"][0] == undisturbed
    assert saved.status_code == 200, saved.text
    assert saved.json()["usage"]["completion_tokens"] == 50
    assert "decode-0: back after" in cluster.log
    assert "pagerelay_requests_replayed_total 5.0" in cluster.get("/metrics").text
    cluster.wait_idle()
    assert cluster.stop(signal.SIGINT) == 0


# ----------------------------------------------------------------------------------- refused starts


def refused(spec: dict[str, Any], folder: Path, ray_head: RayHead) -> tuple[int, str]:
    """(exit code, stderr) of a start that must not succeed; nothing of it is left."""
    cluster = Cluster(spec, folder, ray_head.address)
    processes = descendants(cluster.process.pid)
    try:
        with pytest.raises(AssertionError, match="pd serve exited with"):
            cluster.wait_ready()
    finally:
        code = cluster.stop()
    wait_until(lambda: not any(process.is_alive for process in processes), "no process left")
    assert not names_in(f"pagerelay/{spec['name']}")
    assert not list(folder.glob("pagerelay-*"))
    assert "Traceback" not in cluster.log
    return code, cluster.log


def test_a_port_in_use(tiny: Path, folder: Path, ray_head: RayHead) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec = spec_for("port", tiny) | {"api": {"port": port}}
        code, log = refused(spec, folder, ray_head)
    assert code == 1
    assert f"api.host, api.port: cannot listen on 127.0.0.1:{port}: Address already in use" in log


def test_a_model_folder_that_is_missing(tiny: Path, folder: Path, ray_head: RayHead) -> None:
    spec = spec_for("folder", tiny)
    spec["model"]["path"] = str(folder / "nowhere")
    code, log = refused(spec, folder, ray_head)
    assert code == 2
    assert "model.path" in log
    assert "nowhere" in log


def test_a_pool_that_cannot_hold_the_context(tiny: Path, folder: Path, ray_head: RayHead) -> None:
    spec = spec_for("pool", tiny)
    spec["roles"]["decode"]["pool"] = {"pages": 100}
    code, log = refused(spec, folder, ray_head)
    assert code == 2
    assert (
        "model.max_context: found 3200, but roles.decode.pool holds a request of at most 792" in log
    )
