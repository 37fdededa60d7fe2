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
from ray.util.placement_group import get_current_placement_group, remove_placement_group

import pd
from pd.api.node import ApiNode
from pd.cache_node import CacheNode
from pd.messages import ReplicaLoad
from pd.node import Member, Node, NodeConfig, Order
from pd.rank_node import RankNode
from pd.replica_node import ReplicaNode
from pd.spec import ClusterSpec, Role

log = logging.getLogger("pagerelay")


class ProcessId(NamedTuple):
    """A process, told apart from a later one with its number."""

    node: str
    """Ray's id of the node it runs on."""
    pid: int
    start_time: str


def has_ended(process: ProcessId) -> bool:
    """A process of this host."""
    return _start_time(process.pid) != process.start_time


def end_process(process: ProcessId, timeout_s: float) -> bool:
    """Kill a process of this host and wait until it is gone; False if it is still there."""
    deadline = time.monotonic() + timeout_s
    while not has_ended(process):
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


class Report(NamedTuple):
    """How a process is, for the controller."""

    failure: str
    """Why it has to end, or nothing."""
    silent: list[str]
    """Peers that it hears nothing from."""
    is_idle: bool
    load: ReplicaLoad | None
    """A replica's."""
    refused: int
    """Requests, by an API server since it started."""
    orders: list[Order]
    sources: set[str]
    """Draining replicas that its requests have yet to get pages from."""


class Description(NamedTuple):
    """A process as it is found by a new controller."""

    config: NodeConfig
    member: Member | None
    """None: it has not started."""
    process_id: ProcessId
    is_draining: bool
    controller: ProcessId
    build: str
    """PageRelay's version."""


class Superseded(Exception):
    """Another controller has adopted this process."""


class NodeActor:
    """One process: `start` once, then `set_members` and `report` as often as wanted, `stop` at the
    end.

    It obeys the controller that created it, or the last one that adopted it, and ends by itself
    when that one has not been heard of for `timeouts.controller`.
    """

    def __init__(self, config: NodeConfig, controller: ProcessId) -> None:
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
        self._controller = controller
        self._adopted = asyncio.Event()
        """Set when another controller comes."""
        self._asked = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    async def meet(self) -> tuple[str, int]:
        """Of a replica's first rank, before `start`: where its ranks find each other."""
        assert isinstance(self._node, ReplicaNode)
        return self._node.make_meeting()

    async def start(self, meeting: tuple[str, int] | None = None) -> tuple[Member, ProcessId]:
        self._node.meeting = meeting
        try:
            return await self._node.start(), own_id()
        finally:
            self._asked = time.monotonic()
            self._watch = asyncio.create_task(self._end_without_controller())

    async def rest(self) -> None:
        """Of a drained replica's first rank, before `turn`."""
        assert isinstance(self._node, ReplicaNode)
        await self._node.rest()

    async def turn(
        self, role: Role, spec: ClusterSpec, leader: tuple[Member, ProcessId] | None = None
    ) -> tuple[Member, ProcessId]:
        """Of a rank of a replica that is at rest: serve in this role from now on; the others have
        been told that it has left, and are told then that it has come. `leader`: what the first
        rank's returned."""
        node = self._node
        if isinstance(node, ReplicaNode):
            return node.turn(role, spec), own_id()
        assert isinstance(node, RankNode)
        assert leader is not None
        return node.turn(role, spec, leader[0]), own_id()

    async def set_members(self, own: list[Member], others: list[Member], reason: str) -> None:
        """`own`: the other ranks of its replica."""
        self._asked = time.monotonic()
        try:
            self._node.set_members([*own, *others], reason)
        except Exception as error:  # a node in doubt about its peers ends; `report` says why
            self._node.failure = f"{type(error).__name__}: {error}"
            raise

    async def report(self, controller: ProcessId) -> Report:
        """Answered while the node's event loop lives. Raises Superseded."""
        if controller != self._controller:
            raise Superseded
        self._asked = time.monotonic()
        node = self._node
        refused = node.num_refused if isinstance(node, ApiNode) else 0
        load = node.heartbeat().load if node.member is not None else None
        return Report(
            node.failure,
            node.silent_peers(),
            node.member is None or node.is_idle,
            load,
            refused,
            node.take_orders(),
            node.leader.sources() if isinstance(node, ReplicaNode) and node.member else set(),
        )

    async def describe(self) -> Description:
        node = self._node
        facts = node.is_draining, self._controller, pd.__version__
        return Description(node.config, node.member, own_id(), *facts)

    async def adopt(self, controller: ProcessId) -> None:
        """From now on it obeys this one."""
        self._controller = controller
        self._asked = time.monotonic()
        self._adopted.set()
        self._adopted = asyncio.Event()

    async def set_spec(self, spec: ClusterSpec) -> None:
        """Of an API server: what it can change while it serves."""
        assert isinstance(self._node, ApiNode)
        self._node.set_spec(spec)

    async def set_state(self, state: dict[str, Any]) -> None:
        """Of an API server: what the controller tells people."""
        assert isinstance(self._node, ApiNode)
        self._node.admin.state = state

    async def answer(self, serial: int, error: str, result: dict[str, Any]) -> None:
        """Of an API server: what became of an order."""
        assert isinstance(self._node, ApiNode)
        self._node.admin.answered(serial, error, result)

    async def check(self) -> dict[str, Any]:
        return self._node.check()

    async def ended(self) -> None:
        """Returns when another controller has adopted the process; fails when it dies."""
        await self._adopted.wait()

    async def stop(self) -> None:
        await self._node.stop()

    async def _end_without_controller(self) -> None:
        limit = self._node.spec.timeouts.controller
        while (left := self._asked + limit - time.monotonic()) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        log.error("%s ends: no controller for %g s", self._node.name, limit)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._node.stop(), self._node.spec.timeouts.stop)
        if (group := get_current_placement_group()) is not None:
            with contextlib.suppress(Exception):  # nobody else is left to give its resources back
                remove_placement_group(group)
        with contextlib.suppress(OSError):  # others are there, or it is tcp
            os.rmdir(self._node.config.socket_folder)
        os._exit(1)


def own_id() -> ProcessId:
    node = ray.get_runtime_context().get_node_id()
    return ProcessId(node, os.getpid(), _start_time(os.getpid()))
