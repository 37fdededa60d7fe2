"""A Ray head with Ray's own autoscaler, whose nodes are further raylets on this host.

Ray's `AutoscalingCluster`, and its provider type `fake_multinode`, need a file that wheels lack;
the provider's class can be named instead. Nodes come and go as on a cloud, with the resources
and labels of their type, GPUs included.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml
from real_cluster import ProcessId, RayHead, descendants, end_all, free_ports, wait_until

_HEAD_NODE_ID = "f" * 51 + "00000"
"""The provider counts nodes on from here."""
_HEAD_TYPE = "ray.head.default"
"""As the provider calls it."""
_IDLE_MINUTES = 0.05
_HEAD_CPUS = 4
_COMMANDS = (
    *("initialization", "setup", "head_setup", "worker_setup"),
    *("head_start_ray", "worker_start_ray"),
)


class AutoscalingHead(RayHead):
    def __init__(
        self, folder: Path, node_types: dict[str, dict[str, Any]], max_workers: int = 8
    ) -> None:
        """`node_types`: resources, labels, min_workers and max_workers by name, as in a file for
        `ray up`."""
        (port,) = free_ports(1)
        config = folder / "autoscaling.yaml"
        config.write_text(yaml.safe_dump(_config(port, node_types, max_workers)))
        super().__init__(
            folder,
            _HEAD_CPUS,
            port,
            [f"--autoscaling-config={config}"],
            RAY_FAKE_CLUSTER="1",
            RAY_enable_autoscaler_v2="1",
            RAY_CLOUD_INSTANCE_ID=_HEAD_NODE_ID,
            RAY_OVERRIDE_NODE_ID_FOR_TESTING=_HEAD_NODE_ID,
            AUTOSCALER_UPDATE_INTERVAL_S="1",
        )

    def stop(self) -> None:
        """Nodes first, with the autoscaler, which would start them again: without their head they
        would live for a minute."""
        nodes: set[ProcessId] = set()
        for process in descendants(self._process.pid):
            with contextlib.suppress(OSError):  # it has ended by now
                command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
                if b"autoscaler/v2/monitor.py" in command:
                    nodes = descendants(process.pid)
        end_all(nodes)
        super().stop()
        assert nodes, "no autoscaler was running"
        wait_until(lambda: not any(node.is_alive for node in nodes), "the end of Ray's nodes")


def _config(port: int, node_types: dict[str, dict[str, Any]], max_workers: int) -> dict[str, Any]:
    types = {_HEAD_TYPE: {"resources": {"CPU": _HEAD_CPUS}, "max_workers": 0}, **node_types}
    return {
        "cluster_name": "autoscaling",
        "max_workers": max_workers,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": _IDLE_MINUTES,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "head_node_id": _HEAD_NODE_ID,
            "gcs_address": f"127.0.0.1:{port}",
            "use_node_id_as_ip": True,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            name: {"node_config": {}, "min_workers": 0, **each} for name, each in types.items()
        },
        **{f"{each}_commands": [] for each in _COMMANDS},
        **{"rsync_exclude": [], "rsync_filter": [], "cluster_synced_files": []},
        **{"auth": {}, "docker": {}, "file_mounts": {}},
        "file_mounts_sync_continuously": False,
    }


# ------------------------------------------------------------------------------------------- client


class RayClient:
    """A process that is connected to a Ray head, for pytest's own may be connected to another."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def labels(self, key: str) -> list[str]:
        """Of the nodes that live and have it, sorted."""
        nodes = self._pool.submit(_labels).result(timeout=60)
        return sorted(each[key] for each in nodes if key in each)


@contextlib.contextmanager
def ray_client(address: str) -> Iterator[RayClient]:
    with ProcessPoolExecutor(1, get_context("spawn"), _connect, (address,)) as pool:
        yield RayClient(pool)


def _connect(address: str) -> None:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    import ray

    ray.init(address=address, log_to_driver=False, logging_level="ERROR")


def _labels() -> list[dict[str, str]]:
    import ray

    return [node["Labels"] for node in ray.nodes() if node["Alive"]]
