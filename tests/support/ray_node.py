"""Another node of a Ray cluster, on this host: a raylet with ports of its own, to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from real_cluster import RayHead, _environment, descendants, end_all, free_ports, wait_until


class RayNode:
    """`ray start --address=HEAD --block`, below the head's folder."""

    def __init__(self, head: RayHead, num_cpus: int, labels: dict[str, str]) -> None:
        ports = free_ports(4)
        command = [
            *(str(Path(sys.executable).parent / "ray"), "start", "--block"),
            *(f"--address={head.address}", "--node-ip-address=127.0.0.1"),
            *(f"--num-cpus={num_cpus}", f"--object-store-memory={2**27}"),
            f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}",
            f"--dashboard-agent-listen-port={ports[0]}",
            f"--dashboard-agent-grpc-port={ports[1]}",
            f"--runtime-env-agent-port={ports[2]}",
            f"--metrics-export-port={ports[3]}",
            *("--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats"),
        ]
        with (head.folder / f"node-{ports[0]}.log").open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(""),
                start_new_session=True,
            )

    def kill(self) -> None:
        """The machine is gone: kill -9 of everything on it."""
        below = descendants(self._process.pid)
        for process in below:
            os.kill(process.pid, signal.SIGSTOP)  # nobody sees the others go
        end_all(below | descendants(self._process.pid))
        self._process.wait(30)
        wait_until(lambda: not any(each.is_alive for each in below), "the end of a Ray node")
