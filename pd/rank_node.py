"""A rank of a replica other than its first, as one process: it does what its leader orders."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import socket

import msgspec

from pd import rank
from pd.messages import AnyMessage, RankOrder, RankReport
from pd.node import Member, Node, NodeConfig
from pd.rank import RankEvent, RankFailed, RankWorker
from pd.spec import ClusterSpec, Role, replica_role

log = logging.getLogger("pagerelay")


class RankNode(Node):
    def __init__(self, config: NodeConfig) -> None:
        super().__init__(config)
        self._leader = config.replica
        self._is_stopping = False

    async def prepare(self) -> Member:
        loop = asyncio.get_running_loop()
        role, number = replica_role(self.config.role), self.config.rank
        self._worker = worker = RankWorker(
            self._leader, self.spec, role, number, self.config.rank_host, self._on_event
        )
        folder = await loop.run_in_executor(worker.compute, self.model_folder)
        await loop.run_in_executor(worker.compute, worker.start, folder, self.meeting)
        facts = {"rank": worker.name, "pid": str(os.getpid()), "host": socket.gethostname()}
        return Member(self.name, "rank", self.incarnation, "", facts=facts)

    def turn(self, role: Role, spec: ClusterSpec, leader: Member) -> Member:
        """Its replica serves in another role; the leader has another incarnation."""
        self.spec = spec
        self.config = dataclasses.replace(self.config, role=role, spec=spec)
        self._members[leader.name] = leader
        assert self.member is not None
        return self.member

    def _on_event(self, event: RankEvent) -> None:
        """On any thread."""
        self.call(self._report, event)

    def _report(self, event: RankEvent) -> None:
        if self._is_stopping:
            return
        if isinstance(event, RankFailed):
            log.error("%s fails: %s", self.name, event.error)
            self.failure = event.error
        if not self.send(self._leader, RankReport(rank.encode(event))):
            self.failure = self.failure or "its leader does not take its reports"

    def received(self, sender: str, message: AnyMessage) -> None:
        if not isinstance(message, RankOrder):
            return
        try:
            effect = rank.decode(message.effect)
        except (msgspec.MsgspecError, KeyError) as error:
            self._report(RankFailed(f"an order that is none: {error}"))
            return
        self._worker.carry_out(effect)

    def member_joined(self, member: Member) -> None:
        pass

    def member_left(self, member: Member, reason: str) -> None:
        self.failure = f"its leader is gone: {reason}"

    async def shut_down(self) -> None:
        self._is_stopping = True
        await asyncio.to_thread(self._worker.stop, self.spec.timeouts.stop)
