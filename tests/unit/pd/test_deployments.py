"""Files for `ray up` and KubeRay: Ray reads them, and their nodes are what the examples ask for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler._private.local.config import LOCAL_CLUSTER_NODE_TYPE, prepare_local

from pd.spec import ClusterSpec, load_spec

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGERELAY_API_KEY", "key")


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def assert_enough(types: dict[str, Any], spec: ClusterSpec) -> None:
    """Some node type has room for the most replicas of each role, by its labels."""
    for _, role in spec.roles.items():
        (node,) = [t for t in types.values() if t["labels"].items() >= role.labels.items()]
        for name, amount in role.rank_resources().items():
            assert node["resources"][name] >= amount * role.topology.tp
        assert node["max_workers"] >= role.replicas.max * role.topology.pp * role.topology.cp


@pytest.mark.parametrize("path", ["ray_cluster.yaml", "ray_cluster_on_premise.yaml"])
def test_ray_up_files_fit_the_schema(path: str) -> None:
    jsonschema.validate(read(path), SCHEMA)


@pytest.mark.parametrize("spec", ["several-nodes", "autoscaling"])
def test_nodes_on_a_cloud(spec: str) -> None:
    cluster = read("ray_cluster.yaml")
    types = {k: v for k, v in cluster["available_node_types"].items() if k != "head"}
    spec_read = load_spec(ROOT / "examples" / f"{spec}.yaml")
    assert_enough(types, spec_read)
    assert cluster["max_workers"] >= sum(r.replicas.max for _, r in spec_read.roles.items())


def test_nodes_on_premise() -> None:
    cluster, _ = prepare_local(read("ray_cluster_on_premise.yaml"))
    hosts = cluster["provider"]["worker_ips"]
    node = cluster["available_node_types"][LOCAL_CLUSTER_NODE_TYPE]
    assert node["min_workers"] == node["max_workers"] == len(hosts)
    spec = load_spec(ROOT / "examples" / "on-premise.yaml")
    assert spec.planner.max_replicas == 2 * len(hosts)
    roles = [role for _, role in spec.roles.items()]
    assert not any(role.labels for role in roles), "replicas could not change their roles"
    assert all(role.rank_resources() == roles[0].rank_resources() for role in roles)


def test_nodes_on_kubernetes() -> None:
    cluster = read("examples/kuberay/raycluster.yaml")
    metadata = {"namespace": "default", **cluster["metadata"]}
    config = _derive_autoscaling_config_from_ray_cr({**cluster, "metadata": metadata})
    jsonschema.validate(config, SCHEMA)
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert config["idle_timeout_minutes"] == 5
    groups = {k: v for k, v in types.items() if k != "headgroup"}
    assert_enough(groups, load_spec(ROOT / "examples" / "autoscaling.yaml"))
    assert all(group["min_workers"] == 0 for group in groups.values())


def test_pods_are_what_the_autoscaler_and_the_spec_need() -> None:
    cluster = read("examples/kuberay/raycluster.yaml")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    spec = cluster["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2", "the first one knows no labels"
    pods = [
        group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    for pod in pods:
        assert pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert {each["name"] for each in container["env"]} >= {"RAY_AUTH_MODE", "PAGERELAY_API_KEY"}
    api = load_spec(ROOT / "examples" / "autoscaling.yaml").api
    assert api.port in [port["containerPort"] for port in pods[0]["containers"][0]["ports"]]
    assert api.host == "0.0.0.0"


def test_the_job_runs_an_example_on_the_cluster() -> None:
    job = read("examples/kuberay/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    name = read("examples/kuberay/raycluster.yaml")["metadata"]["name"]
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": name}
    dockerfile = (ROOT / "examples/kuberay/Dockerfile").read_text()
    (folder,) = [line.split()[1] for line in dockerfile.splitlines() if line.startswith("WORKDIR")]
    command, path = job["spec"]["entrypoint"].rsplit(" ", 1)
    assert command == "pd serve"
    assert (ROOT / Path(path).relative_to(folder)).exists()


def test_versions_of_ray_agree() -> None:
    (constraint,) = [
        line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("ray==")
    ]
    version = constraint.removeprefix("ray==")
    assert read("examples/kuberay/raycluster.yaml")["spec"]["rayVersion"] == version
    assert f"rayproject/ray:{version}-" in (ROOT / "examples/kuberay/Dockerfile").read_text()
