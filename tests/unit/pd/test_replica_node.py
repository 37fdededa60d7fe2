"""What a replica's node does between its leader and its ranks, with stand-ins for both."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from pd.engine.batch import StepResult
from pd.events import Digest, Effect, Event, PeerDown, PeerUp, StepDone, Write, Written
from pd.node import Member, NodeConfig
from pd.rank import Connect, Disconnect, Flush, Flushed, RankEffect, RankFailed
from pd.replica_node import ReplicaNode
from pd.spec import ClusterSpec
from pd.team import Team
from transfer.layout import LayerGroup, PageLayout
from transfer.topology import ReplicaLayout, Topology

LAYOUT = PageLayout(LayerGroup("full", (0,), 1, 4), 4, 4)


class _Leader:
    """Writes to decode-0 whenever a step has ended."""

    expects_writes = False
    look_ahead_at = None

    def __init__(self) -> None:
        self.events: list[Event] = []

    def handle(self, event: Event, now: float) -> list[Effect]:
        self.events.append(event)
        if not isinstance(event, StepDone):
            return []
        pages = np.array([1], np.int32)
        return [Write(7, "decode-0", 0, pages, pages, None, 1, 0, 0)]


class _Runner:
    replica_layout = ReplicaLayout(Topology(), (LAYOUT,))


class _Worker:
    """Busy: it notes what it is asked for."""

    topology = Topology()
    runner = _Runner()

    def __init__(self) -> None:
        self.asked: list[RankEffect] = []

    def carry_out(self, effect: RankEffect) -> None:
        self.asked.append(effect)

    def stop(self, timeout_s: float) -> None: ...


@pytest.fixture
def spec() -> ClusterSpec:
    role = {"device": "cpu", "pool": {"pages": 20}}
    roles = {"prefill": role, "decode": role}
    return ClusterSpec.model_validate({"model": {"path": "/nowhere"}, "roles": roles})


def make_node(spec: ClusterSpec, leader: _Leader) -> Any:
    node: Any = ReplicaNode(NodeConfig("prefill-0", "prefill", spec, "", "/nowhere"))
    node.leader, node._worker = leader, _Worker()
    node._team = Team(1, node._order)
    node._loop = asyncio.get_running_loop()
    return node


def test_nothing_is_written_to_a_successor_for_its_predecessor(spec: ClusterSpec) -> None:
    """While the leader has yet to hear that the peer is another process, what it writes goes to
    pages of the one before."""

    async def run() -> None:
        leader = _Leader()
        node = make_node(spec, leader)
        first, second = (
            Member("decode-0", "decode", number, "", transports=(b"%d" % number,))
            for number in (1, 2)
        )
        node.member_joined(first)
        node.handle(StepDone(StepResult([], [], 0.0)))
        node.member_left(first, "killed")
        node.member_joined(second)
        node.handle(StepDone(StepResult([], [], 0.0)))
        asked = node._worker.asked
        for _ in [each for each in asked if isinstance(each, Flush)]:
            node._answered(0, Flushed("decode-0"))
        await asyncio.sleep(0)
        node.handle(StepDone(StepResult([], [], 0.0)))
        parts = ((0, 0, 0, None),)
        assert [each for each in asked if not isinstance(each, Write)] == [
            Connect("decode-0", (b"1",), parts),
            Disconnect("decode-0"),
            Flush("decode-0"),
            Connect("decode-0", (b"2",), parts),
            Flush("decode-0"),
        ]
        assert [type(each) for each in asked].count(Write) == 2
        told = [event for event in leader.events if not isinstance(event, StepDone)]
        lost = Written(7, "decode-0 has left", 0, 0, 0.0)
        down, up = PeerDown("decode-0", "killed"), PeerUp("decode-0", "decode")
        assert told == [PeerUp("decode-0", "decode"), down, up, lost]
        node._context.term()

    asyncio.run(run())


def test_what_comes_while_it_stops_is_no_failure(spec: ClusterSpec) -> None:
    class Busy(_Leader):
        def handle(self, event: Event, now: float) -> list[Effect]:
            return [Digest(1, 0, np.array([1], np.int32))]

    async def run() -> None:
        node = make_node(spec, Busy())
        await node.shut_down()
        node.tick()
        node._answered(0, RankFailed("the collectives were ended"))
        assert node.failure == ""
        assert node._worker.asked == []
        node._context.term()

    asyncio.run(run())


def test_a_rank_that_fails_ends_the_replica_and_is_named(spec: ClusterSpec) -> None:
    async def run() -> None:
        node = make_node(spec, _Leader())
        node._worker.topology = Topology(tp=2)
        node._team = Team(2, lambda rank, effect: None)
        node._answered(1, RankFailed("out of memory"))
        node._answered(0, RankFailed("connection closed"))
        assert node.failure == "rank 1: out of memory"
        node._context.term()

    asyncio.run(run())
