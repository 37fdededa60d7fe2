"""A replica as a process: the leader on the event loop, and the first rank, with threads of its own
(pd/rank.py). Further ranks are processes too (pd/rank_node.py), which obey this one.

Whatever fails here or there puts pages in doubt, so it ends the replica: `failure` says why, and
who watches the node ends its processes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import os
import secrets
import socket
import time
from collections import Counter
from typing import TYPE_CHECKING, assert_never

import msgspec

import pd
from pd import messages, rank
from pd.events import (
    BreakLink,
    CancelWrite,
    CopyPages,
    Digest,
    Effect,
    Event,
    LookAhead,
    PeerDown,
    PeerDraining,
    PeerUp,
    Received,
    RunStep,
    Send,
    Tick,
    Warn,
    Write,
    Written,
)
from pd.leader import Leader
from pd.messages import AnyMessage, Heartbeat, PagesWanted, RankOrder, RankReport
from pd.node import Member, Node, NodeConfig
from pd.page_feed import PageFeed
from pd.rank import (
    Connect,
    Disconnect,
    Expect,
    Flush,
    Flushed,
    HostOpened,
    OpenHost,
    PeerLost,
    RankEffect,
    RankEvent,
    RankFailed,
    RankWorker,
    endpoint,
)
from pd.spec import ClusterSpec, Role, replica_role
from pd.team import Team
from transfer.plan import PairPlan
from transfer.topology import ReplicaLayout

if TYPE_CHECKING:
    from pd.engine.scheduler import Tracked
    from pd.publishing import KvEvents

log = logging.getLogger("pagerelay")

_POLL_S = 0.01


class ReplicaNode(Node):
    """A replica's leader and first rank."""

    def __init__(self, config: NodeConfig) -> None:
        super().__init__(config)
        self._untold: Counter[str] = Counter()
        """Peers' comings and goings that the leader has yet to hear of. Meanwhile it takes the name
        for another process than it is, so nothing is said to it or heard of it."""
        self._to_tell: dict[str, list[PeerUp | PeerDown | PeerDraining]] = {}
        """By peer, in order; each waits for a `Flush` of its own."""
        self._is_stopping = self._is_resting = False
        self._cohort = ""
        self._expects_writes = False
        self._look_ahead_at: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        """For that moment; it may have passed."""
        self._events: KvEvents | None = None
        self._feed: PageFeed | None = None
        """Of the index's pages, for API processes whose routers go by them."""

    async def prepare(self) -> Member:
        loop = asyncio.get_running_loop()
        role = replica_role(self.config.role)
        self._worker = RankWorker(
            self.name, self.spec, role, 0, self.config.rank_host, self._on_event
        )
        member = await loop.run_in_executor(self._worker.compute, self._load)
        if self.spec.cache.events.publish:
            member.facts.update(self._publish_events())
        return member

    async def rest(self) -> None:
        """Drained: forget all peers for good, before `turn`, and wait until nothing is under way to
        or from any memory. The caller has a deadline. Raises RuntimeError."""
        ranks = [each for each in self._members.values() if each.role == "rank"]
        self.set_members(ranks, "it changes its role")
        self._is_resting = True
        while any(self._untold.values()) or not self.leader.is_idle:
            if self.failure:
                raise RuntimeError(self.failure)
            await asyncio.sleep(_POLL_S)

    def set_members(self, members: list[Member], reason: str = "") -> None:
        if not self._is_resting:
            super().set_members(members, reason)

    def turn(self, role: Role, spec: ClusterSpec) -> Member:
        """At rest: serve in another role as if just started, but for what is loaded and cached."""
        self._is_resting = False
        self.spec = spec
        self.config = dataclasses.replace(self.config, role=role, spec=spec)
        self.incarnation = secrets.randbits(64)
        self.is_draining = False
        assert self.member is not None
        self.member = msgspec.structs.replace(self.member, role=role, incarnation=self.incarnation)
        return self.member

    def make_meeting(self) -> tuple[str, int]:
        """Where this replica's ranks find each other: (host, port)."""
        from pd.engine.ranks import make_store

        host = self.config.rank_host
        self._store = make_store(host, self.spec.timeouts.start)
        self.meeting = host, self._store.port
        return self.meeting

    def _publish_events(self) -> dict[str, str]:
        """Raises SpecError."""
        from pd.publishing import KvEvents, process_number

        number = process_number(self.spec, self.name)
        content_of = self._known_tokens.content_of
        events = self.spec.cache.events
        self._events = KvEvents(events, number, self.spec.page_tokens, "device", content_of)
        return self._events.facts

    def _load(self) -> Member:
        import torch
        import transformers

        from hicache.index import PageIndex
        from hicache.keys import root_hash
        from pd.engine.model import LAYOUT_VERSION, weights_digest
        from pd.publishing import KnownTokens

        spec, role = self.spec, dict(self.spec.roles.items())[self._worker.role]
        folder = self.model_folder()
        start = self._worker.start(folder, self.meeting)
        runner, topology = self._worker.runner, self._worker.topology
        self._team = Team(topology.num_ranks, self._order)
        cache, publishes = spec.cache, bool(spec.cache.events.publish)
        if cache.device and spec.router.needs_pages:
            self._feed = PageFeed()
        index = PageIndex(
            runner.groups,
            [count * topology.cp for count in start.num_pages],
            spec.page_tokens,
            reuse=cache.device,
            order=cache.eviction,
            feed=publishes or self._feed is not None,
            cp=topology.cp,
        )
        self.leader = Leader(
            self.name,
            index,
            runner.layouts,
            role.max_batch_tokens,
            role.max_running,
            spec.router.local_prefill_tokens,
            topology,
            spec.transfer.timeout,
            spec.transfer.verify,
            cache,
            max_in_flight=topology.pp,
            looks_ahead=runner.graphs is not None,
            max_context=start.max_context,
            **({"on_stored": self._stored} if publishes else {}),
        )
        compat = {
            "model weights": weights_digest(folder, spec.model),
            "dtype": spec.model.dtype,
            "compute dtype": str(runner.compute_dtype),
            "page_tokens": str(spec.page_tokens),
            "layer groups": str(
                [(g.kind, g.window, len(g.layers), g.kv_heads, g.head_dim) for g in runner.groups]
            ),
            "page layout version": str(LAYOUT_VERSION),
            "protocol version": str(messages.PROTOCOL_VERSION),
            "PageRelay version": pd.__version__,
            "transformers version": transformers.__version__,
            "torch version": torch.__version__,
        }
        self._known_tokens = KnownTokens(spec.page_tokens, root_hash(str(sorted(compat.items()))))
        facts = {
            "device": str(runner.device),
            "pages": " + ".join(map(str, start.num_pages)),
            "pid": str(os.getpid()),
            "host": socket.gethostname(),
        }
        if topology.num_ranks > 1:
            facts |= {"ranks": str(topology), "rank": self._worker.name}
        essence = sorted({**compat, "transfer backend": spec.transfer.backend}.items())
        self._cohort = hashlib.sha256(repr(essence).encode()).hexdigest()[:16]
        return Member(
            name=self.name,
            role=self.config.role,
            cohort=self._cohort,
            incarnation=self.incarnation,
            address="",
            compat=compat,
            transports=start.transports,
            max_context=start.max_context,
            vocab_size=runner.vocab_size,
            end_tokens=runner.end_tokens,
            facts=facts,
            topology=topology,
        )

    def _stored(self, sequence: Tracked, begin: int, end: int) -> None:
        self._known_tokens.stored(sequence, begin, end)

    def handle(self, event: Event) -> None:
        if self.failure or self._is_stopping:
            return
        try:
            for effect in self.leader.handle(event, time.monotonic()):
                self._carry_out(effect)
            self._tell_pages()
            self._set_timer(self.leader.look_ahead_at)
            if self.leader.expects_writes != self._expects_writes:
                self._expects_writes = self.leader.expects_writes
                self._team.carry_out(Expect(self._expects_writes))
        except Exception as error:  # a leader in doubt ends with its process
            log.exception("%s fails", self.name)
            self.failure = f"{type(error).__name__}: {error}"

    def _set_timer(self, look_ahead_at: float | None) -> None:
        if look_ahead_at == self._look_ahead_at:
            return
        self._look_ahead_at = look_ahead_at
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if look_ahead_at is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(look_ahead_at, self.handle, LookAhead())

    def _tell_pages(self) -> None:
        """To subscribers of KV events and to API processes."""
        if self._events is None and self._feed is None:
            return
        changes = self.leader.index.take_changes()
        if self._events is not None:
            self._events.publish(changes, time.time())
            self._known_tokens.forget()
        if self._feed is not None:
            self._feed.note(changes)
            for api, message in self._feed.take_messages(time.monotonic()):
                self.send(api, message)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(to, message):
                if not self._untold[to]:
                    self.send(to, message)
            case Write(write_id, peer) if self._untold[peer]:
                # Its pages are the predecessor's: they must not be written in a successor.
                self.call(self.handle, Written(write_id, f"{peer} has left", 0, 0, 0.0))
            case BreakLink(peer):
                log.error("%s: writes to %s have no end; connecting it again", self.name, peer)
                self._team.carry_out(effect)
            case RunStep() | Write() | CancelWrite() | Digest() | CopyPages():
                self._team.carry_out(effect)
            case Warn(text):
                log.warning("%s: %s", self.name, text)
            case _:
                assert_never(effect)

    # ------------------------------------------------------------------------------------ the ranks

    def _order(self, number: int, effect: RankEffect) -> None:
        if number == 0:
            self._worker.carry_out(effect)
        elif not self.send(endpoint(self.name, number), RankOrder(rank.encode(effect))):
            self._fail(number, "it does not take its orders")

    def _on_event(self, event: RankEvent) -> None:
        """On any thread."""
        self.call(self._answered, 0, event)

    def _answered(self, number: int, answer: RankEvent) -> None:
        event = self._team.answered(number, answer)
        match event:
            case None:
                pass
            case RankFailed(error):
                self._fail(number, error)
            case PeerLost(peer, error):
                log.error("%s cannot connect its transport to %s: %s", self.name, peer, error)
            case Flushed(peer):
                self._tell_now(peer)
            case HostOpened(keeper, error):
                self._keeper_opened(keeper, error)
            case _:
                self.handle(event)

    def _fail(self, number: int, error: str) -> None:
        """What failed leaves pages in doubt: the replica ends, and its requests with it."""
        if not self.failure and not self._is_stopping:
            where = f"rank {number}: " if number else ""
            log.error("%s fails: %s%s", self.name, where, error)
            self.failure = where + error

    # ------------------------------------------------------------------------------------ the peers

    def received(self, sender: str, message: AnyMessage) -> None:
        if self._untold[sender]:
            self.dropped_messages += 1
        elif isinstance(message, RankReport):
            self._rank_reports(sender, message)
        elif isinstance(message, PagesWanted):
            if self._feed is not None:
                self._feed.wanted(sender, message.serial)
        else:
            self.handle(Received(sender, message))

    def _rank_reports(self, sender: str, message: RankReport) -> None:
        ranks = range(1, self._worker.topology.num_ranks)
        number = next((n for n in ranks if endpoint(self.name, n) == sender), None)
        if number is None:
            self.dropped_messages += 1
            return
        try:
            self._answered(number, rank.decode(message.event))
        except (msgspec.MsgspecError, KeyError) as error:
            self._fail(number, f"a report that is none: {error}")

    def _is_foreign(self, member: Member) -> bool:
        """A replica with which nothing can be handed over, as while a changed spec comes in."""
        return member.is_replica and member.cohort != self._cohort

    def member_joined(self, member: Member) -> None:
        if member.role == "rank" or self._is_foreign(member):
            return
        if member.role == "cache":
            self._untold[member.name] += 1
            self._team.carry_out(OpenHost(member.name, member.transports[0]))
            return
        is_source = self.config.role == "prefill" and member.role == "decode"
        if is_source or (self.is_draining and member.role in ("decode", "both")):
            self._connect_ranks(member)
        self._tell(PeerUp(member.name, member.role, member.topology))

    def member_draining(self, member: Member) -> None:
        """Requests that a draining replica decodes go on elsewhere: it hands their pages over."""
        if member.name != self.name:
            if not self._is_foreign(member):
                self._tell(PeerDraining(member.name))
        elif self.config.role != "prefill":
            for other in self._members.values():
                if other.role in ("decode", "both") and not self._is_foreign(other):
                    self._connect_ranks(other)

    def _connect_ranks(self, member: Member) -> None:
        ours = self._worker.runner.replica_layout
        plan = PairPlan(ours, ReplicaLayout(member.topology, ours.layouts))
        parts = tuple(
            (link.source, link.target, group, None if link.part.page_bytes == size else link.part)
            for group, links in enumerate(plan.links)
            for size in (ours.layouts[group].page_bytes,)
            for link in links
        )
        self._team.carry_out(Connect(member.name, member.transports, parts))

    def _keeper_opened(self, keeper: str, error: str | None) -> None:
        self._untold[keeper] -= 1
        member = self._members.get(keeper)
        if error is not None:
            log.info("%s does not use %s: %s", self.name, keeper, error)
        elif member is not None and not self._untold[keeper]:
            self.handle(PeerUp(keeper, "cache"))

    def member_left(self, member: Member, reason: str) -> None:
        if member.role == "rank":
            self._fail(0, f"rank {member.facts['rank']} is gone: {reason}")
            return
        if self._is_foreign(member):
            return
        if member.role == "cache":
            # Copies that are under way end as if nothing had happened: its memory is still here.
            self.handle(PeerDown(member.name, reason))
            return
        down = PeerDown(member.name, reason)
        if member.role is None and self._feed is not None:
            self._feed.leave(member.name)
        if member.role is None:
            self._tell(down)
        else:
            # The leader hears of it when nothing of the peer's can land any more, for it then uses
            # those pages again.
            self._team.carry_out(Disconnect(member.name))
            self._tell_later(down)

    def _tell(self, event: PeerUp | PeerDown | PeerDraining) -> None:
        """At once, or after what it has not been told of this peer."""
        if self._untold[event.name]:
            self._tell_later(event)
        else:
            self.handle(event)

    def _tell_later(self, event: PeerUp | PeerDown | PeerDraining) -> None:
        self._untold[event.name] += 1
        self._to_tell.setdefault(event.name, []).append(event)
        self._team.carry_out(Flush(event.name))

    def _tell_now(self, peer: str) -> None:
        event = self._to_tell[peer].pop(0)
        self._untold[peer] -= 1
        self.handle(event)

    def tick(self) -> None:
        self.handle(Tick())

    def heartbeat(self) -> Heartbeat:
        load = self.leader.load()
        dropped = load.dropped_messages + self.dropped_messages
        events = self._events.counters if self._events is not None else {}
        told = self._feed.sequence if self._feed is not None else 0
        return Heartbeat(
            msgspec.structs.replace(load, dropped_messages=dropped, pages_told=told, **events)
        )

    @property
    def is_idle(self) -> bool:
        return self.leader.is_idle

    def check(self) -> dict[str, object]:
        if not self.leader.scheduler.has_step_in_flight:
            self.leader.check_integrity()
        return {"idle": self.leader.is_idle, "load": msgspec.structs.asdict(self.leader.load())}

    async def shut_down(self) -> None:
        self._is_stopping = True
        if self._events is not None:
            await self._events.close()
        await asyncio.to_thread(self._worker.stop, self.spec.timeouts.stop)
