"""The Ray actor around a node: its lifecycle calls, nothing on a request's path."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import faulthandler
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

import ray

from pd.api.node import ApiNode
from pd.cache_node import CacheNode
from pd.node import Member, Node, NodeConfig
from pd.rank_node import RankNode
from pd.replica_node import ReplicaNode


class ProcessId(NamedTuple):
    """A process, told apart from a later one with its number."""

    node: str
    """Ray's id of the node it runs on."""
    pid: int
    start_time: str


def end_process(process: ProcessId, timeout_s: float) -> bool:
    """Kill a process of this host and wait until it is gone; False if it is still there."""
    deadline = time.monotonic() + timeout_s
    while _start_time(process.pid) == process.start_time:
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)
    return True


def _start_time(pid: int) -> str:
    """In clock ticks since boot, from /proc; empty when the process is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


class NodeActor:
    """One process: `start` once, then `set_members` and `report` as often as wanted, `stop` at the
    end."""

    def __init__(self, config: NodeConfig) -> None:
        faulthandler.enable()
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("pagerelay").setLevel(os.environ.get("PAGERELAY_LOG", "INFO"))
        host = ray.util.get_node_ip_address()
        node: type[Node] = ReplicaNode
        if config.role is None:
            node = ApiNode
        elif config.role == "cache":
            node = CacheNode
        elif config.rank:
            node = RankNode
        self._node = node(dataclasses.replace(config, host=host))

    async def meet(self) -> tuple[str, int]:
        """Of a replica's first rank, before `start`: where its ranks find each other."""
        assert isinstance(self._node, ReplicaNode)
        return self._node.make_meeting()

    async def start(self, meeting: tuple[str, int] | None = None) -> tuple[Member, ProcessId]:
        self._node.meeting = meeting
        member = await self._node.start()
        node = ray.get_runtime_context().get_node_id()
        return member, ProcessId(node, os.getpid(), _start_time(os.getpid()))

    async def set_members(self, members: list[Member], reason: str = "") -> None:
        try:
            self._node.set_members(members, reason)
        except Exception as error:  # a node in doubt about its peers ends; `report` says why
            self._node.failure = f"{type(error).__name__}: {error}"
            raise

    async def report(self) -> dict[str, Any]:
        """Answered while the node's event loop lives."""
        return {"failure": self._node.failure, "silent": self._node.silent_peers()}

    async def check(self) -> dict[str, Any]:
        return self._node.check()

    async def ended(self) -> None:
        """Returns never; its reference fails when the process dies."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        await self._node.stop()
