"""A replica of one rank as one process: the leader on the event loop, the model on a compute
thread, the transport on the mover's thread, digests of pages on a thread of their own.

Whatever fails here puts pages in doubt, so it ends the replica: `failure` says why, and who watches
the node ends its process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, assert_never

import msgspec

import pd
from pd import messages
from pd.events import (
    BreakLink,
    CancelWrite,
    CopyPages,
    Digest,
    Digested,
    Effect,
    Event,
    PeerDown,
    PeerUp,
    Received,
    RunStep,
    Send,
    StepDone,
    Tick,
    Warn,
    Write,
    Written,
)
from pd.leader import Leader
from pd.messages import AnyMessage, Heartbeat
from pd.node import Member, Node, NodeConfig
from pd.spec import SpecError
from transfer.transport import PeerError

if TYPE_CHECKING:
    from pd.engine.scheduler import Tracked
    from pd.publishing import KvEvents
    from transfer.transport import WriteResult

log = logging.getLogger("pagerelay")
_E = TypeVar("_E", bound=Event)


class ReplicaNode(Node):
    """A replica of one rank: leader, model and transport."""

    def __init__(self, config: NodeConfig) -> None:
        super().__init__(config)
        self._untold: Counter[str] = Counter()
        """Peers' comings and goings that the leader has yet to hear of. Meanwhile it takes the name
        for another process than it is, so nothing is said to it or heard of it."""
        self._is_stopping = False
        self._events: KvEvents | None = None

    async def prepare(self) -> Member:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._compute = ThreadPoolExecutor(1, "compute")
        self._digester = ThreadPoolExecutor(1, "digests")
        member = await loop.run_in_executor(self._compute, self._load)
        self._mover.start()
        if self.spec.cache.events.publish:
            member.facts.update(self._publish_events())
        return member

    def _publish_events(self) -> dict[str, str]:
        """Raises SpecError."""
        from pd.publishing import KvEvents, process_number

        number = process_number(self.spec, self.name)
        content_of = self._known_tokens.content_of
        events = self.spec.cache.events
        self._events = KvEvents(events, number, self.leader.index, "device", content_of)
        return self._events.facts

    def _load(self) -> Member:
        import torch
        import transformers

        from hicache.index import PageIndex
        from hicache.keys import root_hash
        from pd import cost
        from pd.engine.copier import Copier
        from pd.engine.model import LAYOUT_VERSION, ModelRunner, weights_digest
        from pd.publishing import KnownTokens
        from transfer.backends import make_transport
        from transfer.mover import Mover
        from transfer.topology import Topology

        assert self.config.role is not None
        assert self.config.role != "cache"
        spec, role = self.spec, dict(self.spec.roles.items())[self.config.role]
        folder = self.model_folder()
        device = torch.device("cuda", 0) if role.device == "cuda" else torch.device("cpu")
        if device.type == "cpu":
            torch.set_num_threads(role.threads)
        runner = ModelRunner(folder, spec.model, spec.page_tokens, device)
        if device.type == "cuda":
            available = torch.cuda.mem_get_info(device)[0]
        else:
            available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        num_pages = cost.plan_pools(runner.layouts, role, available)
        fits = cost.max_context(runner.layouts, num_pages, role, runner.max_positions)
        cost.check_context(self.config.role, fits, spec.model.max_context)
        limits = [limit for limit in (fits, spec.model.max_context) if limit is not None]
        if not limits:
            raise SpecError("model.max_context: expected a number, as this model names no limit")
        max_context = min(limits)
        runner.allocate(num_pages, role.max_running, max_context)
        runner.warm_up(min(role.max_batch_tokens, max_context))
        self._runner = runner
        self._copier = Copier(runner.pools)
        transport = make_transport(spec.transfer.backend, self.name, spec.transfer.options)
        transport.register([pool.region for pool in runner.pools])
        self._mover = Mover(
            transport,
            self._write_ended,
            self._peer_lost,
            self._mover_failed,
            spec.transfer.max_bytes_in_flight,
            page_bytes=[layout.page_bytes for layout in runner.layouts],
        )
        cache, feed = spec.cache, bool(spec.cache.events.publish)
        index = PageIndex(
            runner.groups,
            num_pages,
            spec.page_tokens,
            reuse=cache.device,
            order=cache.eviction,
            feed=feed,
        )
        topology = Topology(role.topology.tp, role.topology.pp, role.topology.cp)
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
            *([self._stored] if feed else []),
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
            "device": str(device),
            "pages": " + ".join(map(str, num_pages)),
            "pid": str(os.getpid()),
            "host": socket.gethostname(),
        }
        return Member(
            name=self.name,
            role=self.config.role,
            incarnation=self.incarnation,
            address="",
            compat=compat,
            transport=transport.describe(),
            max_context=max_context,
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
            if self._events is not None:
                self._events.publish(time.time())
                self._known_tokens.forget()
            self._mover.expect(self.leader.expects_writes)
        except Exception as error:  # a leader in doubt ends with its process
            self._fail(error)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(to, message):
                if not self._untold[to]:
                    self.send(to, message)
            case RunStep(command):
                self._submit(self._compute, lambda: StepDone(self._runner.step(command)))
            case Write(write_id, peer, group, source, target, part, handover):
                if self._untold[peer]:
                    # Its pages are the predecessor's: they must not be written in a successor.
                    lost = Written(write_id, f"{peer} has left", 0, 0, 0.0)
                    self._call(self.handle, lost)
                else:
                    self._mover.write(write_id, peer, group, source, target, part, handover)
            case CancelWrite(write_id):
                self._mover.cancel(write_id)
            case BreakLink(peer):
                log.error("%s: writes to %s have no end; connecting it again", self.name, peer)
                self._mover.reconnect(peer)
            case Digest():
                self._submit(self._digester, lambda: self._digest(effect))
            case CopyPages():
                self._copier.submit(effect).add_done_callback(self._work_ended)
            case Warn(text):
                log.warning("%s: %s", self.name, text)
            case _:
                assert_never(effect)

    def _digest(self, effect: Digest) -> Digested:
        """On the digests' thread."""
        from pd.engine.digest import page_digests

        pool = self._runner.pools[effect.group]
        return Digested(effect.digest_id, page_digests(pool.data, effect.pages))

    def _submit(self, executor: ThreadPoolExecutor, work: Callable[[], Event]) -> None:
        executor.submit(work).add_done_callback(self._work_ended)

    def _work_ended(self, future: Future[_E]) -> None:
        """On the thread that did it."""
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            self._call(self._fail, error)
        else:
            self._call(self.handle, future.result())

    def _write_ended(self, key: int, result: WriteResult) -> None:
        """On the mover's thread."""
        event = Written(key, result.error, result.bytes_moved, result.descriptors, result.seconds)
        self._call(self.handle, event)

    def _peer_lost(self, peer: str, error: str) -> None:
        self._call(log.error, "%s cannot connect its transport to %s: %s", self.name, peer, error)

    def _mover_failed(self, error: BaseException) -> None:
        """On the mover's thread."""
        self._call(self._fail, error)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        # The loop may have been closed by a stop meanwhile.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _fail(self, error: BaseException) -> None:
        """What failed leaves pages in doubt: the replica ends, and its requests with it."""
        log.error("%s fails", self.name, exc_info=error)
        self.failure = f"{type(error).__name__}: {error}"

    def received(self, sender: str, message: AnyMessage) -> None:
        if self._untold[sender]:
            self.dropped_messages += 1
        else:
            self.handle(Received(sender, message))

    def member_joined(self, member: Member) -> None:
        if member.role == "cache":
            self._untold[member.name] += 1
            opening = self._copier.open(member.transport)
            opening.add_done_callback(lambda done: self._call(self._keeper_opened, member, done))
            return
        if self.config.role == "prefill" and member.role == "decode":
            parts = [(group, None) for group in range(len(self._runner.groups))]
            self._mover.connect(member.name, member.transport, parts)
        self._tell(PeerUp(member.name, member.role, member.topology))

    def _keeper_opened(self, member: Member, opening: Future[None]) -> None:
        self._untold[member.name] -= 1
        error = opening.exception()
        if isinstance(error, PeerError):
            log.info("%s does not use %s: %s", self.name, member.name, error)
        elif error is not None:
            self._fail(error)
        elif self._members.get(member.name) == member:
            self.handle(PeerUp(member.name, "cache"))

    def member_left(self, member: Member, reason: str) -> None:
        if member.role == "cache":
            # Copies that are under way end as if nothing had happened: its memory is still here.
            self.handle(PeerDown(member.name, reason))
            return
        if member.role is not None:
            # The leader hears of it when nothing of the peer's can land any more, for it then uses
            # those pages again.
            self._untold[member.name] += 1
            self._mover.disconnect(member.name)
        self._tell(PeerDown(member.name, reason))

    def _tell(self, event: PeerUp | PeerDown) -> None:
        """At once, or after what it has not been told of this peer."""
        if not self._untold[event.name]:
            self.handle(event)
            return
        if isinstance(event, PeerUp):
            self._untold[event.name] += 1
        self._mover.after(lambda: self._call(self._tell_now, event))

    def _tell_now(self, event: PeerUp | PeerDown) -> None:
        self._untold[event.name] -= 1
        self.handle(event)

    def tick(self) -> None:
        self.handle(Tick())

    def heartbeat(self) -> Heartbeat:
        load = self.leader.load()
        dropped = load.dropped_messages + self.dropped_messages
        return Heartbeat(msgspec.structs.replace(load, dropped_messages=dropped))

    def check(self) -> dict[str, object]:
        if not self.leader.scheduler.has_step_in_flight:
            self.leader.check_integrity()
        return {"idle": self.leader.is_idle, "load": msgspec.structs.asdict(self.leader.load())}

    async def shut_down(self) -> None:
        self._is_stopping = True
        if self._events is not None:
            await self._events.close()
        self._copier.close()
        for executor in (self._compute, self._digester):
            executor.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._mover.stop, self.spec.timeouts.stop)
