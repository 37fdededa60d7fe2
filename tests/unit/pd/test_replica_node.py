"""What a replica's node does between its leader and its mover, with stand-ins for both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from pd.engine.batch import StepResult
from pd.engine.copier import Copier
from pd.events import Digest, Effect, Event, PeerDown, PeerUp, StepDone, Write, Written
from pd.node import Member, NodeConfig
from pd.replica_node import ReplicaNode
from pd.spec import ClusterSpec


class _Leader:
    """Writes to decode-0 whenever a step has ended."""

    expects_writes = False

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        self.events.append(event)
        if not isinstance(event, StepDone):
            return []
        pages = np.array([1], np.int32)
        return [Write(7, "decode-0", 0, pages, pages, None, 1, 0, 0)]


class _Mover:
    """Busy: it notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.later: list[Callable[[], None]] = []

    def connect(self, peer: str, description: bytes, parts: Any) -> None:
        self.asked.append(("connect", description))

    def disconnect(self, peer: str) -> None:
        self.asked.append(("disconnect", peer))

    def after(self, function: Callable[[], None]) -> None:
        self.later.append(function)

    def write(self, key: int, *rest: Any) -> None:
        self.asked.append(("write", key))

    def expect(self, expecting: bool) -> None: ...

    def stop(self, timeout_s: float) -> None: ...


class _Runner:
    groups = (0,)


@pytest.fixture
def spec() -> ClusterSpec:
    role = {"device": "cpu", "pool": {"pages": 20}}
    roles = {"prefill": role, "decode": role}
    return ClusterSpec.model_validate({"model": {"path": "/nowhere"}, "roles": roles})


def test_nothing_is_written_to_a_successor_for_its_predecessor(spec: ClusterSpec) -> None:
    """While the leader has yet to hear that the peer is another process, what it writes goes to
    pages of the one before."""

    async def run() -> None:
        node: Any = ReplicaNode(NodeConfig("prefill-0", "prefill", spec, "", "/nowhere"))
        leader, mover = _Leader(), _Mover()
        node.leader, node._mover, node._runner = leader, mover, _Runner()
        node._loop = asyncio.get_running_loop()
        first, second = (
            Member("decode-0", "decode", number, "", transport=b"%d" % number) for number in (1, 2)
        )
        node.member_joined(first)
        node.handle(StepDone(StepResult([], [], 0.0)))
        node.member_left(first, "killed")
        node.member_joined(second)
        node.handle(StepDone(StepResult([], [], 0.0)))
        for function in mover.later:
            function()
        await asyncio.sleep(0)
        node.handle(StepDone(StepResult([], [], 0.0)))
        assert mover.asked == [
            ("connect", b"1"),
            ("write", 7),
            ("disconnect", "decode-0"),
            ("connect", b"2"),
            ("write", 7),
        ]
        told = [event for event in leader.events if not isinstance(event, StepDone)]
        lost = Written(7, "decode-0 has left", 0, 0, 0.0)
        down, up = PeerDown("decode-0", "killed"), PeerUp("decode-0", "decode")
        assert told == [PeerUp("decode-0", "decode"), lost, down, up]
        node._context.term()

    asyncio.run(run())


def test_what_comes_while_it_stops_is_no_failure(spec: ClusterSpec) -> None:
    class Busy(_Leader):
        def handle(self, event: Event, now: float) -> list[Effect]:
            pages = np.array([1], np.int32)
            return [Digest(1, 0, pages)]

    async def run() -> None:
        node: Any = ReplicaNode(NodeConfig("prefill-0", "prefill", spec, "", "/nowhere"))
        node.leader, node._mover = Busy(), _Mover()
        node._loop = asyncio.get_running_loop()
        node._compute, node._digester = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        node._copier = Copier([])
        await node.shut_down()
        node.tick()
        assert node.failure == ""
        node._context.term()

    asyncio.run(run())
