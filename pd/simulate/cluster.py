"""A cluster on a virtual clock. Pure: the same load, profile and seed give the same figures.

Real, the very code that serves: the router with its page map, each replica's leader (scheduler,
page index, handovers with all their messages) and page feed, token by token, and the planner where
a role's number of replicas has bounds. Modelled, by a `Profile`: how long steps, writes, messages
and the API take. The token sampled is always 0, and what a request generates is its own: no later
prompt continues it, as traces do not say which do.

Not modelled: tiers below the device, faults, a client that leaves, changes of role (one replica
ends, another one starts), what ranks of one replica say to each other (a step's time has it),
routers of their own for several API processes, which share one. A link carries one write at a time,
in each direction, in the order in which they were posted, where the mover lets handovers take
turns. A leader ticks and reports twice a second, at a time of its own, while it has anything to do
or to tell; a node ticks ten times a second. Leaders hear of each other when they first have a
request in common.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import assert_never

import msgspec
import numpy as np

from hicache.index import PageIndex
from hicache.keys import HASH_BYTES, root_hash
from pd.admission import Overloaded
from pd.engine.batch import StepCommand, StepResult
from pd.events import (
    BreakLink,
    CancelWrite,
    CopyPages,
    Digest,
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
from pd.messages import (
    AnyMessage,
    FinishReason,
    Generate,
    Outputs,
    PagesChanged,
    PagesHeld,
    PagesWanted,
    ReplicaLoad,
    SamplingParams,
)
from pd.page_feed import PageFeed
from pd.planner import Observed, Planner, bounds_of
from pd.router import NoReplica, Placement, Policy, make_router
from pd.simulate.clock import VirtualClock
from pd.simulate.profile import Profile, StepCost
from pd.spec import CacheSpec, ClusterSpec, Role, RoleSpec
from transfer.layout import PageLayout
from transfer.topology import Topology

_BEAT_S = 0.5
_FLUSH_S = 0.1
"""Pages that a leader has yet to tell of are told within so long."""
_AWAKE_S = 3.0
"""A leader that has been idle for so long has told its peers what it owed them."""
_GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples spread the replicas' beats evenly, however many there are."""
_API = "api-0"
_ROOT = root_hash("trace")
_PAGE_BITS = 24


@dataclasses.dataclass(frozen=True, slots=True)
class SimRequest:
    at_s: float
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...]
    """Of the prompt, each number standing for a block and all before it."""


@dataclasses.dataclass(slots=True)
class SimResult:
    request: SimRequest
    prefill: str = ""
    decode: str = ""
    first_s: float = math.nan
    """When the client had its first token, and its last one."""
    last_s: float = math.nan
    num_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompt, where it was prefilled."""
    preemptions: int = 0
    reason: FinishReason | None = None
    error: str = ""

    @property
    def is_good(self) -> bool:
        return self.reason in ("length", "stop")

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.request.at_s

    @property
    def tpot_s(self) -> float | None:
        return (self.last_s - self.first_s) / (self.num_tokens - 1) if self.num_tokens > 1 else None


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaShape:
    """What the replicas of a role have in common."""

    role: Role
    spec: RoleSpec
    num_pages: tuple[int, ...]
    """Of one rank, by layer group."""
    max_context: int | None


class SimReplica:
    """A leader, whose ranks take time."""

    def __init__(
        self,
        name: str,
        shape: ReplicaShape,
        spec: ClusterSpec,
        layouts: Sequence[PageLayout],
        cost: StepCost,
        tells_pages: bool,
    ) -> None:
        topology = shape.spec.topology
        self.name = name
        self.role = shape.role
        self.topology = Topology(topology.tp, topology.pp, topology.cp)
        self.cost = cost
        self.index = PageIndex(
            [layout.group for layout in layouts],
            [count * self.topology.cp for count in shape.num_pages],
            spec.page_tokens,
            reuse=spec.cache.device,
            order=spec.cache.eviction,
            feed=tells_pages,
            cp=self.topology.cp,
        )
        self.leader = Leader(
            name,
            self.index,
            layouts,
            shape.spec.max_batch_tokens,
            shape.spec.max_running,
            spec.router.local_prefill_tokens,
            self.topology,
            spec.transfer.timeout,
            cache=CacheSpec(device=spec.cache.device, eviction=spec.cache.eviction),
            max_in_flight=self.topology.pp,
            max_context=shape.max_context,
        )
        self.feed = PageFeed() if tells_pages else None
        self.flushes = False
        """It will, soon."""
        self.is_awake = False
        """A beat is to come..."""
        self.beat = -1
        """... of this number; else the last one's."""
        self.phase_s = 0.0
        self.busy_at = 0.0
        """When it was last found so."""
        self.peers: set[str] = set()
        self.load: ReplicaLoad | None = None
        """As last reported."""
        self.is_draining = False
        self.joined_s = 0.0
        self.left_s = math.inf
        self.step_ends_at = 0.0
        self.link_free_at = [[0.0] * self.topology.num_ranks for _ in range(2)]
        """Out and in, by rank."""
        self.busy_s = 0.0
        """Of steps, until `SimCluster.last_arrival_s`."""
        self.computed_tokens = 0


class SimCluster(VirtualClock):
    def __init__(
        self,
        spec: ClusterSpec,
        shapes: Sequence[ReplicaShape],
        layouts: Sequence[PageLayout],
        profile: Profile,
        policy: Policy,
        block_tokens: int,
        seed: int = 0,
        start_s: float = 30.0,
    ) -> None:
        """Each role has as many replicas as its spec says, within bounds as many as the planner
        wants, which serve after `start_s`."""
        super().__init__()
        router_spec = spec.router.model_copy(update={"policy": policy})
        self.spec = spec.model_copy(update={"router": router_spec})
        self.router = make_router(self.spec, str(seed))
        self.results: list[SimResult] = []
        self.num_ended = self.num_refused = 0
        self._api_free_at = [0.0] * spec.api.replicas
        """API processes read one request after the other."""
        self.last_arrival_s = math.inf
        self._profile = profile
        self._block_tokens = block_tokens
        self._page_bytes = [layout.page_bytes for layout in layouts]
        self._shapes = {shape.role: shape for shape in shapes}
        self._layouts = layouts
        self._start_s = start_s
        self._numbers = dict.fromkeys(self._shapes, 0)
        self._starting = dict.fromkeys(self._shapes, 0)
        self._phases = itertools.count()
        self.replicas: dict[str, SimReplica] = {}
        self.retired: list[SimReplica] = []
        for shape in shapes:
            for _ in range(shape.spec.replicas.min):
                self._join(shape.role)
        self._refused_before = 0
        if any(shape.spec.replicas.min < shape.spec.replicas.max for shape in shapes):
            self._planner = Planner(spec.planner, bounds_of(spec), spec.objectives)
            self.at(spec.planner.interval, self._plan)

    def run(
        self, requests: Sequence[SimRequest], on_ended: Callable[[int], None] = lambda ended: None
    ) -> list[SimResult]:
        """In order of arrival, to the last one's end. `on_ended` is called now and then."""
        ordered = sorted(requests, key=lambda request: request.at_s)
        self.last_arrival_s = ordered[-1].at_s
        self.results = [SimResult(request) for request in ordered]
        self.at(ordered[0].at_s, self._arrive, 0)
        told = 0
        while self.num_ended < len(ordered) and self.step():
            if self.num_ended >= told + 64:
                told = self.num_ended
                on_ended(told)
        on_ended(self.num_ended)
        return self.results

    # ------------------------------------------------------------------------------------- requests

    def _arrive(self, number: int) -> None:
        if number + 1 < len(self.results):
            self.at(self.results[number + 1].request.at_s, self._arrive, number + 1)
        request, profile = self.results[number].request, self._profile
        seconds = profile.request_s + request.num_prompt * profile.request_token_s
        api = number % len(self._api_free_at)
        self._api_free_at[api] = max(self.now, self._api_free_at[api]) + seconds
        self.at(self._api_free_at[api], self._place, number)

    def _place(self, number: int) -> None:
        result = self.results[number]
        request = result.request
        hashes = self._page_hashes(request)
        try:
            self.router.check_room(1, now=self.now)
            placement = self.router.place(request.num_prompt, hashes, may_refuse=True, now=self.now)
            self.router.admit(1, now=self.now)
        except (Overloaded, NoReplica) as error:
            self.num_refused += 1
            self._end(result, "error", str(error))
            return
        self._meet(placement)
        result.decode, result.prefill = placement.decode, placement.prefill
        # Its own number at its end tells its generated pages from those of others.
        prompt = np.full(request.num_prompt, number, np.int32).tobytes()
        sampling = SamplingParams(request.num_output, temperature=0.0)
        timeout_s = self.spec.timeouts.request
        generate = Generate(
            str(number), prompt, _ROOT, hashes, sampling, placement.prefill, timeout_s
        )
        self._send(_API, placement.decode, generate)
        for name in (placement.decode, placement.prefill):
            if name:
                self._wake(self.replicas[name])

    def _page_hashes(self, request: SimRequest) -> bytes:
        """A page is what its last token's block is, and its place."""
        page_tokens = self.spec.page_tokens
        num_pages = request.num_prompt // page_tokens
        ends = range(page_tokens - 1, num_pages * page_tokens, page_tokens)
        return b"".join(
            (request.blocks[end // self._block_tokens] << _PAGE_BITS | page).to_bytes(
                HASH_BYTES, "little"
            )
            for page, end in enumerate(ends)
        )

    def _meet(self, placement: Placement) -> None:
        if not placement.prefill:
            return
        pair = self.replicas[placement.decode], self.replicas[placement.prefill]
        if placement.prefill in pair[0].peers:
            return
        for replica, other in (pair, pair[::-1]):
            replica.peers.add(other.name)
            self._deliver(replica, PeerUp(other.name, other.role, other.topology))

    def _take_outputs(self, outputs: Outputs, now: float) -> None:
        for output in outputs.outputs:
            result = self.results[int(output.request_id)]
            if output.token_ids:
                if not result.num_tokens:
                    result.first_s = now
                result.last_s = now
                result.num_tokens += len(output.token_ids)
            if output.finish_reason is not None:
                if (stats := output.stats) is not None:
                    is_local = stats.prefill_replica == stats.decode_replica
                    result.prefill = stats.prefill_replica
                    result.cached_tokens = (
                        stats.cached_tokens_decode if is_local else stats.cached_tokens_prefill
                    )
                    result.preemptions = stats.preemptions
                self.router.release(now=now)
                self._end(result, output.finish_reason, output.error)

    def _end(self, result: SimResult, reason: FinishReason, error: str) -> None:
        assert result.reason is None, "a request ends once"
        result.reason, result.error = reason, error
        self.num_ended += 1

    # ------------------------------------------------------------------------------------- replicas

    def _send(self, sender: str, to: str, message: AnyMessage) -> None:
        if to in self.replicas:
            event = Received(sender, message)
            self.at(self.now + self._profile.message_s, self._deliver, self.replicas[to], event)

    def _deliver(self, replica: SimReplica, event: Event) -> None:
        for effect in replica.leader.handle(event, self.now):
            match effect:
                case Send(_, Outputs() as outputs):
                    self._take_outputs(outputs, self.now + self._profile.message_s)
                case Send(to, message):
                    self._send(replica.name, to, message)
                case RunStep(command):
                    self._run_step(replica, command)
                case Write():
                    self._write(replica, effect)
                case CancelWrite() | BreakLink() | Warn():
                    pass  # writes always end
                case Digest() | CopyPages():
                    raise AssertionError("no such cache was configured")
                case _:
                    assert_never(effect)
        if replica.feed is not None:
            if changes := replica.index.take_changes():
                replica.feed.note(changes)
                if not replica.flushes:
                    replica.flushes = True
                    self.at(self.now + _FLUSH_S, self._flush, replica)
            self._tell(replica)
        if not replica.is_awake:
            self._wake(replica)

    def _run_step(self, replica: SimReplica, command: StepCommand) -> None:
        """Stages work on as many steps at once."""
        seconds = replica.cost.seconds(command)
        share = seconds / replica.topology.pp
        end = max(self.now + seconds, replica.step_ends_at + share)
        replica.step_ends_at = end
        replica.busy_s += max(0.0, min(end, self.last_arrival_s) - max(end - share, 0.0))
        replica.computed_tokens += len(command.tokens)
        num_sampled = int(np.count_nonzero(command.sample))
        result = StepResult([0] * num_sampled, [None] * num_sampled, seconds)
        self.at(end, self._deliver, replica, StepDone(result))

    def _write(self, replica: SimReplica, write: Write) -> None:
        out = replica.link_free_at[0]
        into = self.replicas[write.peer].link_free_at[1]
        page_bytes = self._page_bytes[write.group] if write.part is None else write.part.page_bytes
        num_bytes = len(write.source_pages) * page_bytes
        seconds = self._profile.write_s + num_bytes / self._profile.bytes_per_s
        begin = max(self.now, out[write.source_rank], into[write.target_rank])
        out[write.source_rank] = into[write.target_rank] = end = begin + seconds
        written = Written(write.write_id, None, num_bytes, 1, end - self.now)
        self.at(end, self._deliver, replica, written)

    # -------------------------------------------------------------------------- how many there are

    def _join(self, role: Role) -> None:
        number = self._numbers[role]
        self._numbers[role] = number + 1
        replica = SimReplica(
            f"{role}-{number}",
            self._shapes[role],
            self.spec,
            self._layouts,
            self._profile.steps[role],
            self.router.pages is not None,
        )
        replica.joined_s = self.now
        replica.phase_s = next(self._phases) * _GOLDEN % 1.0 * _BEAT_S
        self.replicas[replica.name] = replica
        self._deliver(replica, PeerUp(_API))
        self._ask(replica, self.router.update(replica.name, role, None, self.now))
        self._wake(replica)

    def _started(self, role: Role) -> None:
        self._starting[role] -= 1
        self._join(role)

    def _plan(self) -> None:
        seen = {
            replica.name: Observed(replica.role, replica.load, replica.is_draining)
            for replica in self.replicas.values()
            if replica.load is not None
        }
        refused, self._refused_before = self.num_refused - self._refused_before, self.num_refused
        self._planner.observe(seen, self.now, refused)
        for role, count in self._planner.desired(self.now).items():
            active = [
                replica
                for replica in self.replicas.values()
                if replica.role == role and not replica.is_draining
            ]
            for replica in active[count:]:
                replica.is_draining = True
                replica.busy_at = self.now  # what was placed may be on its way
                self.router.drain(replica.name)
                self._wake(replica)
            for _ in range(len(active) + self._starting[role], count):
                self._starting[role] += 1
                self.at(self.now + self._start_s, self._started, role)
        self.at(self.now + self.spec.planner.interval, self._plan)

    def _retire(self, replica: SimReplica) -> None:
        del self.replicas[replica.name]
        self.retired.append(replica)
        replica.left_s = self.now
        self.router.remove(replica.name)
        for name in sorted(replica.peers & self.replicas.keys()):
            self.replicas[name].peers.discard(replica.name)
            self._deliver(self.replicas[name], PeerDown(replica.name, "it was drained"))

    # ------------------------------------------------------------------------ what the router hears

    def _wake(self, replica: SimReplica) -> None:
        if not replica.is_awake:
            replica.is_awake = True
            passed = math.floor((self.now - replica.phase_s) / _BEAT_S)
            replica.beat = max(passed, replica.beat) + 1
            self.at(replica.phase_s + replica.beat * _BEAT_S, self._beat, replica)

    def _beat(self, replica: SimReplica) -> None:
        self._deliver(replica, Tick())
        replica.is_awake = False
        if not replica.leader.is_idle:
            replica.busy_at = self.now
        is_over = self.now >= replica.busy_at + _AWAKE_S
        if is_over and replica.is_draining:
            self._retire(replica)
            return
        load = replica.leader.load()
        if replica.feed is not None:
            load = msgspec.structs.replace(load, pages_told=replica.feed.sequence)
        self.at(self.now + self._profile.message_s, self._report, replica, load)
        if not is_over:
            self._wake(replica)

    def _report(self, replica: SimReplica, load: ReplicaLoad) -> None:
        if replica.left_s < self.now:
            return
        replica.load = load
        self._ask(replica, self.router.update(replica.name, replica.role, load, self.now))

    def _flush(self, replica: SimReplica) -> None:
        replica.flushes = False
        self._tell(replica)

    def _tell(self, replica: SimReplica) -> None:
        assert replica.feed is not None
        for _, message in replica.feed.take_messages(self.now):
            self.at(self.now + self._profile.message_s, self._hear_pages, replica, message)

    def _hear_pages(self, replica: SimReplica, message: PagesChanged | PagesHeld) -> None:
        self._ask(replica, self.router.receive_pages(replica.name, message, self.now))

    def _ask(self, replica: SimReplica, wanted: PagesWanted | None) -> None:
        if wanted is not None and replica.feed is not None:
            replica.feed.wanted(_API, wanted.serial)
            self._wake(replica)
