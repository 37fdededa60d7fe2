"""Leaders on a virtual clock, with seeded faults, and page contents that name their place.

Each rank has pools of its own, whose elements name token prefix, head, layer and plane
(rank_memory.py), so that a step can check that every key it attends to is the right one, and a byte
in the wrong place is seen at once. The sampled token is a function of the whole prefix. As many
steps are in flight as there are stages. Messages between two leaders are lost, repeated and
overtake each other; those of the API keep their order. A write that fails leaves garbage behind,
one that is stuck has no end until its link is broken. A replica that dies may start again under its
name, with another incarnation; the others hear of it later, each at its time.

Replicas may have a keeper on their node (cache_world.py): a process that dies as they do, with
messages that fare like theirs. Copies between the tiers take random time; until its end the target
of one is garbage, and its source is read at the end.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from cache_world import GARBAGE, SimKeeper
from rank_memory import ELEMENT_BYTES, Ranks, next_token, prefix_keys

from hicache.index import PageIndex
from hicache.keys import page_hashes, root_hash
from hicache.storage.storage import StorageResult
from hicache.storage_io import PagesFreed
from pd.engine.batch import StepCommand, StepResult
from pd.events import (
    BreakLink,
    CancelWrite,
    CopyPages,
    Digest,
    Digested,
    Event,
    LookAhead,
    PagesCopied,
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
from pd.messages import Abort, Generate, Output, Outputs, SamplingParams, pack_ints
from pd.simulate.clock import VirtualClock
from pd.spec import CacheSpec, Role
from transfer.layout import LayerGroup, PageLayout
from transfer.topology import Topology

PAGE = 4
ROOT = root_hash("sim")
GROUPS = (
    LayerGroup("full", (0,), 1, 1),
    LayerGroup("sliding", (1,), 1, 1, window=10),
)
_CHECK_EVERY = 5
"""Events; a check takes longer than an event."""


def reference(prompt: list[int], max_tokens: int) -> list[int]:
    tokens: list[int] = []
    key = prefix_keys(prompt)[-1]
    for _ in range(max_tokens):
        tokens.append(next_token(key))
        key = prefix_keys(tokens[-1:], key)[0]
    return tokens


class SimReplica:
    """One incarnation: a leader with ranks whose KV are prefix hashes."""

    def __init__(
        self,
        name: str,
        pages: int,
        max_batch_tokens: int,
        max_running: int,
        local: int,
        verify: bool = False,
        groups: tuple[LayerGroup, ...] = GROUPS,
        cache: CacheSpec = CacheSpec(),  # noqa: B008 (frozen)
        token_seconds: float = 0.0,
        topology: Topology = Topology(),  # noqa: B008 (frozen)
    ) -> None:
        """`pages`: of each rank. `token_seconds`: how long its steps say that a token takes; 0:
        they do not say."""
        self.arguments = (
            name,
            pages,
            max_batch_tokens,
            max_running,
            local,
            verify,
            groups,
            cache,
            token_seconds,
            topology,
        )
        self.name = name
        self.role: Role = "prefill" if name.startswith("prefill") else "decode"
        self.alive = True
        self.groups = groups
        self.topology = topology
        cp = topology.cp
        self.index = PageIndex(groups, [cp * pages for _ in groups], PAGE, cp=cp)
        layouts = [PageLayout(group, PAGE, ELEMENT_BYTES) for group in groups]
        self.leader = Leader(
            name,
            self.index,
            layouts,
            max_batch_tokens,
            max_running,
            local,
            topology,
            verify=verify,
            cache=cache,
            max_in_flight=topology.pp,
            looks_ahead=topology.num_ranks == 1,
        )
        self.token_seconds = token_seconds
        self.frozen: list[Event] | None = None
        """While it hangs: what it will then find."""
        self.peers: dict[str, SimReplica | SimKeeper] = {}
        """The incarnations that it knows of."""
        self.ranks = Ranks(topology, layouts, pages)
        self.stages_free_at = [0.0] * topology.pp

    def run_stage(self, command: StepCommand, stage: int) -> StepResult:
        references = [self.index.references(group) for group in range(len(self.groups))]
        sampled = self.ranks.step(command, stage, references)
        seconds = self.token_seconds * len(command.tokens)
        return StepResult(sampled, [None] * len(sampled), seconds)


@dataclasses.dataclass
class Faults:
    """Probabilities."""

    lose_messages: float = 0.0
    repeat_messages: float = 0.0
    """Between leaders; the API's are counted by position and not lost here."""
    fail_writes: float = 0.0
    stick_writes: float = 0.0
    corrupt_writes: float = 0.0
    """They end well, with wrong bytes."""
    fail_copies: float = 0.0


class Simulation(VirtualClock):
    def __init__(
        self,
        seed: int,
        replicas: list[SimReplica],
        faults: Faults | None = None,
        keepers: Sequence[SimKeeper] = (),
    ) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.replicas = {replica.name: replica for replica in replicas}
        self.keepers = {keeper.name: keeper for keeper in keepers}
        self.faults = faults or Faults()
        self.outputs: dict[str, list[Output]] = {}
        self.warnings: list[str] = []
        self._last_arrival: dict[tuple[str, str], float] = {}
        self._num_events = 0
        self._writes: dict[tuple[SimReplica, int], tuple[Write, SimReplica]] = {}
        """In flight, by writer and id: and the incarnation written to."""
        for replica in replicas:
            self._introduce(replica)
        for keeper in keepers:
            self._start(keeper)
            for name in keeper.replicas:
                self._hear_of(keeper, name)

    def _introduce(self, replica: SimReplica) -> None:
        """Tell a new replica of all others."""
        for other in self.replicas.values():
            if other is not replica and other.alive:
                self._know(replica, other)
        self.deliver(replica, PeerUp("api"))
        for keeper in self.keepers.values():
            if replica.name in keeper.replicas and keeper.alive:
                self._know(replica, keeper)

    def _start(self, keeper: SimKeeper) -> None:
        def ended(event: StorageResult | PagesFreed) -> None:
            assert keeper.tier is not None
            if keeper.alive:
                keeper.tier.handle(event, self.now)
                self._after_keeper(keeper)

        keeper.start(self.random, self.after, ended)

    def _know(self, node: SimReplica | SimKeeper, other: SimReplica | SimKeeper) -> None:
        node.peers[other.name] = other
        if isinstance(node, SimKeeper):
            node.keeper.client_up(other.name)
        else:
            if isinstance(other, SimKeeper):
                self.deliver(node, PeerUp(other.name, "cache"))
            else:
                self.deliver(node, PeerUp(other.name, other.role, other.topology))

    def after(self, longest: float, action: Callable[[], None]) -> None:
        self.at(self.now + self.random.random() * longest, action)

    def run(self, limit: float = 5000.0) -> None:
        """Until nothing is in progress."""
        self._tick_all()
        while self.step():
            assert self.now < limit, "it does not end"

    def _tick_all(self) -> None:
        for replica in self.replicas.values():
            self.deliver(replica, Tick())
        for keeper in self.keepers.values():
            if keeper.alive:
                if keeper.tier is not None:
                    keeper.tier.tick(self.now)
                keeper.keeper.tick(self.now)
                self._after_keeper(keeper)
        busy = any(r.alive and not r.leader.is_idle for r in self.replicas.values())
        busy |= any(keeper.alive and not keeper.is_idle for keeper in self.keepers.values())
        if self.num_waiting or busy:
            self.at(self.now + 1.0, self._tick_all)

    # ----------------------------------------------------------------------------------- the client

    def generate(
        self,
        request_id: str,
        prompt: list[int],
        max_tokens: int,
        decode: str,
        prefill: str,
        timeout: float = 1e6,
        tenant: str = "",
        priority: int = 0,
    ) -> None:
        hashes = b"".join(page_hashes(np.array(prompt, np.int32), PAGE, ROOT))
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        tokens = pack_ints(prompt)
        message = Generate(
            request_id,
            tokens,
            ROOT,
            hashes,
            params,
            prefill,
            timeout,
            tenant,
            priority=priority,
        )
        self.outputs[request_id] = []
        self._send_in_order("api", decode, message)

    def abort(self, request_id: str, decode: str) -> None:
        self._send_in_order("api", decode, Abort(request_id))

    def _send_in_order(self, sender: str, to: str, message: Any) -> None:
        """From or to the API; a message to a replica that dies is lost."""
        arrival = max(
            self._last_arrival.get((sender, to), 0.0), self.now + self.random.random() * 3
        )
        self._last_arrival[sender, to] = arrival
        if to == "api":
            self.at(arrival, lambda: self._take_outputs(message))
        else:
            replica = self.replicas[to]
            self.at(arrival, lambda: self.deliver(replica, Received("api", message)))

    def _take_outputs(self, message: Any) -> None:
        assert isinstance(message, Outputs)
        for output in message.outputs:
            outputs = self.outputs[output.request_id]
            num_tokens = sum(len(earlier.token_ids) for earlier in outputs)
            assert not output.token_ids or output.position == num_tokens
            outputs.append(output)

    # ---------------------------------------------------------------------------------- the machine

    def _send(self, sender: SimReplica | SimKeeper, to: str, message: Any) -> None:
        target = sender.peers[to]
        if self.random.random() < self.faults.lose_messages:
            return
        for _ in range(2 if self.random.random() < self.faults.repeat_messages else 1):
            self.after(3, lambda: self._arrive(sender, target, message))

    def _arrive(
        self, sender: SimReplica | SimKeeper, target: SimReplica | SimKeeper, message: Any
    ) -> None:
        # What a node drops: another incarnation than the one that it knows, or is.
        if target.peers.get(sender.name) is not sender or not target.alive:
            return
        if isinstance(target, SimKeeper):
            target.keeper.receive(sender.name, message, self.now)
            self._after_keeper(target)
        else:
            self.deliver(target, Received(sender.name, message))

    def _after_keeper(self, keeper: SimKeeper) -> None:
        """Carry out what it has asked for."""
        keeper.run_effects()
        outbox, keeper.outbox = keeper.outbox, []
        for to, message in outbox:
            self._send(keeper, to, message)
        self._num_events += 1
        if self._num_events % _CHECK_EVERY == 0:
            keeper.check_integrity()

    def deliver(self, replica: SimReplica, event: Event) -> None:
        if not replica.alive:
            return
        if replica.frozen is not None:
            replica.frozen.append(event)
            return
        effects = replica.leader.handle(event, self.now)
        look_at = replica.leader.look_ahead_at
        if look_at is not None and look_at > self.now:
            self.at(look_at, lambda: self.deliver(replica, LookAhead()))
        for effect in effects:
            match effect:
                case Send("api", message):
                    self._send_in_order(replica.name, "api", message)
                case Send(to, message):
                    self._send(replica, to, message)
                case RunStep(command):
                    self._run_step(replica, command)
                case Write():
                    self._post(replica, effect)
                case CancelWrite(write_id):
                    if self.random.random() < 0.5:
                        self._end_write(replica, write_id, "cancelled")
                case BreakLink(peer):
                    for writer, write_id in list(self._writes):
                        if writer is replica and self._writes[writer, write_id][0].peer == peer:
                            self._end_write(replica, write_id, "the link was broken")
                case Digest():
                    self.after(2, lambda d=effect: self._digest(replica, d))
                case CopyPages():
                    self._copy(replica, effect)
                case Warn(text):
                    self.warnings.append(text)
        self._num_events += 1
        if self._num_events % _CHECK_EVERY == 0:
            replica.leader.check_integrity()

    def _run_step(self, replica: SimReplica, command: StepCommand) -> None:
        """One stage after the other, each after the step before this one."""
        free_at, done = replica.stages_free_at, self.now
        for stage in range(len(free_at)):
            done = free_at[stage] = max(done, free_at[stage]) + self.random.random() * 5
            self.at(done, lambda s=stage: self._run_stage(replica, command, s))

    def _run_stage(self, replica: SimReplica, command: StepCommand, stage: int) -> None:
        if replica.alive:
            result = replica.run_stage(command, stage)
            if stage == replica.topology.pp - 1:
                self.deliver(replica, StepDone(result))

    def _digest(self, replica: SimReplica, digest: Digest) -> None:
        read, group = replica.ranks.read, digest.group
        digests = [hash(tuple(read(group, slot))) % 2**64 for slot in digest.pages.tolist()]
        self.deliver(replica, Digested(digest.digest_id, np.array(digests, np.uint64)))

    def _post(self, replica: SimReplica, write: Write) -> None:
        self._writes[replica, write.write_id] = (write, replica.peers[write.peer])
        if self.random.random() >= self.faults.stick_writes:
            self.after(20, lambda: self._land(replica, write.write_id))

    def _land(self, replica: SimReplica, write_id: int) -> None:
        """The bytes land now: the content is read and written at this very moment."""
        if (replica, write_id) not in self._writes:
            return
        write, target = self._writes[replica, write_id]
        sources = self._slots(replica, write.source_rank, write.source_pages)
        assert replica.index.references(write.group).keys() >= sources, "reads a released page"
        if target.alive:
            slots = self._slots(target, write.target_rank, write.target_pages)
            assert target.index.references(write.group).keys() >= slots, "writes a released page"
        if not target.alive:
            self._end_write(replica, write_id, "peer is dead")
        elif self.random.random() < self.faults.fail_writes:
            self._end_write(replica, write_id, "lost")
        else:
            pool = replica.ranks.pools[write.source_rank][write.group]
            other = target.ranks.pools[write.target_rank][write.group]
            pool.write(write.source_pages, other, write.target_pages, write.part)
            if self.random.random() < self.faults.corrupt_writes:
                other.spoil(write.target_pages, write.part, self.random.randrange(1 << 20))
            self._end_write(replica, write_id, None)

    def _slots(self, replica: SimReplica, rank: int, pages: Any) -> set[int]:
        return {replica.ranks.slot(rank, page) for page in pages.tolist()}

    def _end_write(self, replica: SimReplica, write_id: int, error: str | None) -> None:
        """One that fails may have left anything in its pages."""
        write, target = self._writes.pop((replica, write_id), (None, None))
        if write is None or target is None or not replica.alive:
            return
        if error is not None and target.alive:
            pool = target.ranks.pools[write.target_rank][write.group]
            pool.spoil(write.target_pages, write.part)
        written = Written(write_id, error, 1, len(write.source_pages), 0.1)
        self.after(2, lambda: self.deliver(replica, written))

    def _copy(self, replica: SimReplica, copy: CopyPages) -> None:
        # It has the memory mapped that the keeper had when this began.
        (keeper,) = (peer for peer in replica.peers.values() if isinstance(peer, SimKeeper))
        targets = copy.host_pages if copy.to_host else copy.device_pages
        for group, pages in enumerate(targets):
            for page in pages.tolist():
                if copy.to_host:
                    keeper.pools[group][page] = [GARBAGE] * PAGE
                else:
                    replica.ranks.fill(group, page, [GARBAGE] * PAGE)
        self.after(10, lambda: self._end_copy(replica, keeper, copy))

    def _end_copy(self, replica: SimReplica, keeper: SimKeeper, copy: CopyPages) -> None:
        if not replica.alive:
            return
        fails = self.random.random() < self.faults.fail_copies
        num_pages = 0
        for group, host in enumerate(keeper.pools):
            pages, host_pages = copy.device_pages[group].tolist(), copy.host_pages[group].tolist()
            num_pages += len(pages)
            assert {*pages} <= replica.index.references(group).keys(), "copies a released page"
            if keeper.alive:
                assert {*host_pages} <= keeper.index.references(group).keys(), "... host page"
            for page, host_page in zip(pages, host_pages, strict=True):
                if fails and self.random.random() < 0.5:
                    continue
                if copy.to_host:
                    content = replica.ranks.read(group, page)
                    assert GARBAGE not in content
                    assert None not in content
                    host[host_page] = content
                else:
                    replica.ranks.fill(group, page, host[host_page])
        error = "it failed" if fails else None
        self.deliver(replica, PagesCopied(copy.copy_id, error, num_pages, 0.1))

    def freeze(self, name: str) -> None:
        """It hangs, while its writes go on."""
        self.replicas[name].frozen = []

    def thaw(self, name: str) -> None:
        events, self.replicas[name].frozen = self.replicas[name].frozen, None
        for event in events or ():
            self.deliver(self.replicas[name], event)

    def kill(self, name: str, restart: bool = False) -> None:
        """The process ends, and its writes with it; the others hear of it later."""
        dead = self.replicas[name]
        dead.alive = False
        for key in [key for key in self._writes if key[0] is dead]:
            del self._writes[key]
        if restart:
            self.replicas[name] = SimReplica(*dead.arguments)
            self._introduce(self.replicas[name])
        for other in self.replicas.values():
            if other.name != name:
                self.after(30, lambda o=other: self._hear_of(o, name))
        for keeper in self.keepers.values():
            if name in keeper.replicas:
                self.after(30, lambda k=keeper: self._hear_of(k, name))

    def kill_keeper(self, name: str, restart: bool = True) -> None:
        """The process ends; copies go on, for its memory stays mapped. A new one comes up empty."""
        dead = self.keepers[name]
        dead.alive = False
        if restart:
            self.keepers[name] = SimKeeper(*dead.arguments)
            self._start(self.keepers[name])
        for replica in dead.replicas:
            self.after(30, lambda r=replica: self._hear_of(self.replicas[r], name))
            if restart:
                self.after(30, lambda r=replica: self._hear_of(self.keepers[name], r))

    def detach(self, name: str) -> None:
        """The keeper does without storage from now on."""
        keeper = self.keepers[name]
        if keeper.alive:
            keeper.keeper.detach(self.now)
            self._after_keeper(keeper)

    def _hear_of(self, node: SimReplica | SimKeeper, name: str) -> None:
        """What became of `name`, as it is now."""
        if not node.alive:
            return
        known = node.peers.get(name)
        current = self.replicas[name] if name in self.replicas else self.keepers[name]
        if known is not None and not known.alive:
            del node.peers[name]
            if isinstance(node, SimKeeper):
                node.keeper.client_down(name, self.now)
            else:
                self.deliver(node, PeerDown(name, "killed"))
        if current.alive and current is not known:
            self._know(node, current)

    # -------------------------------------------------------------------------------------- results

    def tokens(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.token_ids]

    def reasons(self, request_id: str) -> list[str]:
        return [o.finish_reason for o in self.outputs[request_id] if o.finish_reason is not None]
