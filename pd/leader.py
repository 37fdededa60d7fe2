"""The leader of one replica: its requests, its scheduler, its handovers. Pure: events in, effects
out.

A leader serves both sides. For the API processes it generates: `Generate` -> tokens. If another
replica prefills, it matches its own prefix, reserves pages, sends `Reserve`, and lets the request
join its batch when the first token and all pages have come (pd/receiving.py). For other leaders it
prefills (pd/sending.py).

A handover that ends early does not end its request: full pages that have landed are published in
the index, and the request starts again, where the next prefix match finds them, with another
prefill replica, or in this one's own batch after `_MAX_HANDOVERS` or when none is left to ask. A
token that the client has is not delivered again.

Every request ends in exactly one final `Output`, or silently when its API process is gone. Pages
that a peer may still write to outlive their request, in quarantine, until the writer has said that
it is done, or is known to be dead (`PeerDown`); a deadline ends the request, never the quarantine.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import assert_never

from hicache.index import PageIndex
from hicache.messages import Found, Room
from pd.caching import Caching, RecentRate
from pd.checks import is_sound
from pd.engine.batch import StepResult
from pd.engine.scheduler import Scheduler, Tracked
from pd.engine.turns import NEVER, WaitingQueue
from pd.events import (
    Digested,
    Effect,
    Event,
    LookAhead,
    PagesCopied,
    PeerDown,
    PeerDraining,
    PeerUp,
    Received,
    RunStep,
    Send,
    StepDone,
    Tick,
    Written,
)
from pd.messages import (
    Abort,
    AnyMessage,
    Ask,
    Cancel,
    FinishReason,
    Generate,
    HandoverClosed,
    Output,
    Outputs,
    PagesWritten,
    PrefillDone,
    ReplicaLoad,
    RequestStats,
    Reserve,
    Settled,
    SettledHeard,
    TokenLogprob,
    Unknown,
    split_hashes,
    unpack_ints,
)
from pd.receiving import Receiving
from pd.sending import Sending
from pd.spec import CacheSpec, MemberRole
from pd.speed import DecodeSpeed, PrefillSpeed, StepTotals
from transfer.layout import PageLayout
from transfer.topology import Topology

# -------------------------------------------------------------------------------------------- state

_MAX_HANDOVERS = 3
"""Of one request; then it is prefilled here."""
_FORGET = 0.9
_AHEAD_S = 0.003
"""Before a step's end the next one is planned: planning, and a timer that may be late."""
_TIMER_S = 0.001
"""By so much at most a timer is early."""
_COUNTERS = ("steps", "decode_tokens", "aborted", "failed", "dropped_messages")
"""Fields of ReplicaLoad that only grow."""


@dataclasses.dataclass(slots=True, eq=False)
class _Generation:
    """A request of an API process."""

    request_id: str
    api: str
    sequence: Tracked
    deadline: float
    stats: RequestStats
    prefill: str
    """The replica that prefills, or is to; empty: this one."""
    handovers: int = 0
    """Started so far."""
    mismatches: int = 0
    """Of them, those with pages that differed from their source."""
    tried: set[str] = dataclasses.field(default_factory=set)
    """Prefill replicas that are not asked again."""
    first_token_at: float = 0.0


class Leader:
    def __init__(
        self,
        name: str,
        index: PageIndex,
        layouts: Sequence[PageLayout],
        max_batch_tokens: int,
        max_running: int,
        local_prefill_tokens: int,
        topology: Topology = Topology(),  # noqa: B008 (frozen)
        handover_timeout_s: float = 30.0,
        verify: bool = False,
        cache: CacheSpec = CacheSpec(),  # noqa: B008 (frozen)
        on_stored: Callable[[Tracked, int, int], None] = lambda sequence, begin, end: None,
        max_in_flight: int = 1,
        looks_ahead: bool = False,
        max_context: int | None = None,
    ) -> None:
        """`on_stored`: these pages of a sequence may have entered the index. `max_in_flight`:
        steps; their `StepDone` come in their order. `looks_ahead`: one more while tokens are
        sampled (pd/engine/scheduler.py). `max_context`: tokens of a request that the
        pools hold."""
        if index.cp != topology.cp:
            raise ValueError(f"an index of cp {index.cp} for a replica of {topology}")
        self.name = name
        self.index = index
        self._max_context = max_context
        groups = tuple(layout.group for layout in layouts)
        page_tokens = layouts[0].page_tokens
        self.scheduler = Scheduler(
            index,
            groups,
            page_tokens,
            max_batch_tokens,
            max_running,
            self._published,
            lambda sequence, num_pages: self._caching.reused(sequence, num_pages),
            self._fetch,
            max_in_flight,
            looks_ahead,
        )
        self._groups = groups
        self._page_tokens = page_tokens
        self._local_prefill_tokens = local_prefill_tokens
        self._peers: dict[str, MemberRole | None] = {}
        self._draining: set[str] = set()
        self._generations: dict[str, _Generation] = {}
        self._by_sequence: dict[Tracked, _Generation] = {}
        self._reserving: WaitingQueue[Tracked] = WaitingQueue(self.scheduler.turns)
        """Waiting for pages to reserve."""
        self._outputs: dict[str, list[Output]] = {}
        self._effects: list[Effect] = []
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self._arrived = self._finished = self._prefill_tokens = 0
        numbers = itertools.count(1)
        self._receiving = Receiving(
            self,
            self.scheduler,
            index,
            groups,
            page_tokens,
            handover_timeout_s,
            verify,
            numbers,
            self._send,
            self._emit,
        )
        self._sending = Sending(
            index,
            layouts,
            topology,
            handover_timeout_s,
            numbers,
            self._queue,
            self._drop,
            self._send,
            self._emit,
        )
        self._caching = Caching(
            self.scheduler,
            index,
            groups,
            [layout.page_bytes for layout in layouts],
            page_tokens,
            cache,
            numbers,
            self._fetched,
            self._send,
            self._emit,
        )
        self._prefill_rate = RecentRate(_FORGET)
        """Tokens of steps that had prompts in them."""
        self._prefill_speed = PrefillSpeed()
        self._loads = cache.load
        self._decode_speed = DecodeSpeed()
        self._totals = StepTotals()
        self._decode_step_s = 0.0
        """What the last step that only decoded took."""
        self._ahead_at = 0.0
        """The next step is planned from then on, if the one that runs only decodes."""
        self._on_stored = on_stored

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Apply one event. `now` is monotonic, in seconds. The effects are to be carried out in
        order. What it raises puts pages in doubt: the process must end."""
        match event:
            case Received(sender, message):
                if not is_sound(message, self._groups, self._page_tokens):
                    self._counts["dropped_messages"] += 1
                elif sender in self._peers:
                    self._receive(sender, message, now)
            case StepDone(result):
                self._step_done(result, now)
            case Written():
                self._sending.written(event, now)
            case Digested():
                if not self._sending.digested(event):
                    self._receiving.digested(event, now)
            case PagesCopied():
                self._caching.copied(event, now)
            case PeerUp(name, role, topology):
                self._peers[name] = role
                if role == "cache":
                    self._caching.keeper_up(name)
                self._receiving.peer_up(name)
                self._sending.peer_up(name, topology)
            case PeerDown(name, reason):
                self._peer_down(name, reason, now)
            case PeerDraining(name):
                self._draining.add(name)
            case Tick():
                self._tick(now)
            case LookAhead():
                pass
            case _:
                assert_never(event)
        self._caching.advance(self._speed_of_computing, now)
        self._reserve_waiting(now)
        self._run_step(now)
        for api, outputs in self._outputs.items():
            self._effects.append(Send(api, Outputs(tuple(outputs))))
        self._outputs = {}
        effects, self._effects = self._effects, []
        return effects

    @property
    def look_ahead_at(self) -> float | None:
        """When a `LookAhead` would have the next step planned before this one has ended."""
        return self._ahead_at if self.scheduler.can_look_ahead else None

    @property
    def expects_writes(self) -> bool:
        """Whether a peer may be writing here: the transport must then be polled."""
        return self._receiving.expects_writes

    def load(self) -> ReplicaLoad:
        index, groups = self.index, range(len(self._groups))
        waiting = [
            *self.scheduler.landed,
            *self.scheduler.waiting,
            *self._reserving,
        ]
        sending, receiving, caching = self._sending, self._receiving, self._caching
        waiting_tokens = self._waiting_tokens(waiting)
        return ReplicaLoad(
            waiting=len(waiting) + len(caching),
            running=len(self.scheduler.running),
            handovers_in=len(receiving),
            handovers_out=len(sending),
            waiting_tokens=sum(waiting_tokens),
            waiting_tokens_by_priority=tuple(waiting_tokens),
            pages_free=tuple(index.num_free(g) for g in groups),
            pages_cached=tuple(index.num_cached(g) for g in groups),
            pages_used=tuple(index.num_used(g) for g in groups),
            prefill_tokens=self._prefill_tokens + sending.prefill_tokens,
            cached_tokens=self.scheduler.cached_tokens,
            preemptions=self.scheduler.preemptions,
            kv_bytes=sending.kv_bytes,
            kv_pages=sending.kv_pages,
            kv_descriptors=sending.kv_descriptors,
            kv_seconds=sending.kv_seconds,
            finished=self._finished + sending.finished,
            pages_quarantined=tuple(receiving.num_quarantined(g) for g in groups),
            handovers_failed=receiving.num_failed,
            handovers_overdue=receiving.num_overdue,
            digest_mismatches=receiving.num_mismatches,
            fetching=len(caching),
            host_pages_in=caching.pages_in,
            host_bytes_in=caching.bytes_in,
            host_seconds_in=caching.seconds_in,
            host_pages_out=caching.pages_out,
            host_bytes_out=caching.bytes_out,
            host_seconds_out=caching.seconds_out,
            host_pages_not_offered=caching.dropped_offers,
            pages_evicted=index.evictions,
            prefill_tokens_per_s=self._prefill_rate.per_s,
            decode_s_per_request=self._decode_speed.s_per_request,
            arrived=self._arrived + sending.arrived,
            prompt_step_tokens=self._totals.prompt_tokens,
            prompt_step_s=self._totals.prompt_s,
            decode_steps=self._totals.decode_steps,
            decode_step_tokens=self._totals.decode_tokens,
            decode_step_s=self._totals.decode_s,
            **self._counts,
        )

    def _waiting_tokens(self, waiting: Sequence[Tracked]) -> list[int]:
        """By class, also of those that run."""
        tokens = [0]
        running = [s for s in self.scheduler.running if s.remaining > 1]
        for sequence in (*waiting, *running):
            tokens += [0] * (sequence.priority + 1 - len(tokens))
            has_row = sequence.row >= 0
            num_tokens = sequence.remaining if has_row else self._to_compute(sequence)
            tokens[sequence.priority] += num_tokens
        return tokens

    def _to_compute(self, sequence: Tracked) -> int:
        """Tokens of one that waits, without those that are cached by now."""
        if sequence.num_computed:
            return sequence.remaining
        return sequence.remaining - self._num_cached(sequence) * self._page_tokens

    def _num_cached(self, sequence: Tracked) -> int:
        """Pages; never the last token's, which is to be computed."""
        return self.index.match(sequence.hashes[: (sequence.length - 1) // self._page_tokens])

    # ------------------------------------------------------------------------------------- messages

    def _receive(self, sender: str, message: AnyMessage, now: float) -> None:
        match message:
            case Generate():
                self._generate(sender, message, now)
            case Abort(request_id):
                generation = self._generations.get(request_id)
                if generation is not None and generation.api == sender:
                    self._finish(generation, now, "abort")
            case Reserve():
                self._sending.reserve(sender, message, self._track(message, now), now)
            case Ask():
                self._sending.ask(sender, message)
            case Cancel():
                self._sending.cancel(sender, message, now)
            case Settled():
                self._sending.settled(sender, message)
            case PrefillDone() | PagesWritten() | HandoverClosed() | Unknown():
                self._receiving.receive(sender, message, now)
            case SettledHeard():
                self._receiving.settled_heard(sender, message)
            case Found() | Room():
                self._caching.receive(sender, message, now)
            case _:
                pass  # for others

    # --------------------------------------------------------------------- generation (decode side)

    def _generate(self, api: str, message: Generate, now: float) -> None:
        if message.request_id in self._generations:
            return
        self._arrived += 1
        sequence = self._track(message, now)
        generation = _Generation(
            message.request_id,
            api,
            sequence,
            now + message.timeout_s,
            RequestStats(decode_replica=self.name),
            message.prefill,
        )
        self._generations[message.request_id] = self._by_sequence[sequence] = generation
        longest = sequence.length + sequence.params.max_tokens
        if self._max_context is not None and longest > self._max_context:
            # The API knew other replicas when it let this request in.
            error = f"{longest} tokens, but {self.name} holds at most {self._max_context}"
            self._finish(generation, now, "error", error)
            return
        self._place(generation, now)

    def _track(self, message: Generate | Reserve, now: float) -> Tracked:
        hashes = split_hashes(message.page_hashes)
        prompt = unpack_ints(message.prompt)
        return Tracked(
            prompt,
            message.sampling,
            message.root,
            hashes,
            len(self._groups),
            now,
            message.tenant,
            message.num_delivered,
            message.priority,
        )

    def _place(self, generation: _Generation, now: float) -> None:
        """Queue it for a handover or, with little to compute or nobody to ask, for our own
        batch."""
        sequence = generation.sequence
        uncached = sequence.length - self._num_cached(sequence) * self._page_tokens
        generation.prefill = self._choose_prefill(generation)
        if uncached <= self._local_prefill_tokens:
            generation.prefill = ""
        generation.stats.prefill_replica = generation.prefill or self.name
        if generation.prefill:
            self._reserving.add(sequence)
        else:
            self._queue(sequence, now)

    def _queue(self, sequence: Tracked, now: float) -> None:
        """Have it computed here, once what the host tier has of it is there."""
        if not self._fetch(sequence, now):
            self.scheduler.add(sequence)

    def _fetch(self, sequence: Tracked, now: float) -> bool:
        return self._loads != "never" and self._caching.fetch(
            sequence, self._speed_of_computing, now
        )

    @property
    def _speed_of_computing(self) -> float:
        """Tokens a second, as far as loading pages is to be compared with it; 0: it is not."""
        return 0.0 if self._loads == "always" else self._prefill_speed.tokens_per_s

    def _fetched(self, sequence: Tracked) -> None:
        self._on_stored(sequence, 0, len(sequence.hashes))
        self.scheduler.add(sequence)

    def _published(self, sequence: Tracked, begin: int, end: int) -> None:
        self._caching.published(sequence, begin, end)
        self._on_stored(sequence, begin, end)

    def _drop(self, sequence: Tracked) -> None:
        self._caching.leave(sequence)
        self.scheduler.drop(sequence)

    def _choose_prefill(self, generation: _Generation) -> str:
        """The one named if possible, else another connected one; empty: none.

        Any replica that drains may be named, for it has the request's pages."""
        named, tried = generation.prefill, generation.tried
        if not named or generation.handovers >= _MAX_HANDOVERS:
            return ""
        if named not in tried and (self._peers.get(named) == "prefill" or named in self._draining):
            return named
        others = {
            name: self._receiving.num_open(name)
            for name, role in self._peers.items()
            if role == "prefill" and name not in tried and name not in self._draining
        }
        return min(others, key=lambda name: (others[name], name), default="")

    def sources(self) -> set[str]:
        """Draining replicas from which requests here have yet to get pages."""
        if not self._draining:
            return set()
        waiting = [g for g in self._generations.values() if g.sequence.admitted_at < 0]
        waiting += [g for g in self._generations.values() if g.sequence in self._receiving]
        return {g.prefill for g in waiting} & self._draining

    def _reserve_waiting(self, now: float) -> None:
        """Reserve pages in turn, while they fit."""
        turns = self.scheduler.turns
        while (sequence := self._reserving.first(now)) is not None:
            turn = turns.of(sequence, now)
            if (
                self.scheduler.lacks_pages_before(turn, now)
                or self._caching.lacks_pages_since < turn
            ):
                return
            if sequence.params.max_tokens == 1:
                # It ends with the first token: nothing to decode, so nothing is to be sent.
                firsts = [0] * len(self._groups)
            else:
                self.scheduler.match_prefix(sequence)
                reserved = self.scheduler.reserve_prompt(sequence)
                if reserved is None:
                    self.scheduler.release_pages(sequence)
                    return
                firsts = reserved
            self._reserving.remove(sequence)
            turns.serve(sequence, sequence.remaining, now)
            self._start_handover(self._by_sequence[sequence], firsts, now)

    def _start_handover(self, generation: _Generation, firsts: list[int], now: float) -> None:
        sequence = generation.sequence
        sequence.admitted_at = now
        if not generation.handovers:
            generation.stats.queue_s = now - sequence.arrived_at
            generation.stats.cached_tokens_decode = sequence.num_computed
        generation.handovers += 1
        self.scheduler.cached_tokens += sequence.num_computed
        self._receiving.start(
            generation.prefill,
            generation.request_id,
            sequence,
            firsts,
            generation.deadline,
            now,
            generation.mismatches > 0,
        )

    # --------------------------------------------------------------------- what handovers come to

    def first_token(self, sequence: Tracked, message: PrefillDone, now: float) -> None:
        if sequence.num_output:
            return  # an earlier handover brought it, before it failed
        generation = self._by_sequence[sequence]
        stats = generation.stats
        stats.queue_s += message.queue_s
        stats.prefill_s = message.prefill_s
        stats.cached_tokens_prefill = message.cached_tokens
        stats.cached_tokens_host = message.host_tokens
        stats.cached_tokens_storage = message.storage_tokens
        generation.first_token_at = now
        sequence.append(message.token)
        self._deliver(generation, message.token, message.logprob, now)

    def landed(self, sequence: Tracked, complete: PagesWritten, now: float) -> None:
        """On to the batch."""
        generation = self._by_sequence[sequence]
        stats = generation.stats
        stats.pages_moved, stats.bytes_moved = complete.pages, complete.bytes_moved
        stats.descriptors, stats.transfer_s = complete.descriptors, complete.transfer_s
        stats.transfer_exposed_s = now - generation.first_token_at
        sequence.num_computed = sequence.prompt_len
        self.scheduler.publish(sequence)
        self.scheduler.add_landed(sequence)

    def failed(self, sequence: Tracked, peer: str, is_mismatch: bool, now: float) -> None:
        """The request starts again; where its pages came and differed, once from the same
        replica."""
        self._on_stored(sequence, 0, len(sequence.hashes))
        generation = self._by_sequence[sequence]
        if not is_mismatch or generation.mismatches:
            generation.tried.add(peer)
        generation.mismatches += is_mismatch
        sequence.admitted_at = -1.0
        self._place(generation, now)

    # ------------------------------------------------------------------------------ ending requests

    def _deliver(
        self, generation: _Generation, token: int, logprob: TokenLogprob | None, now: float
    ) -> None:
        """Send a token that is already part of the sequence, and end the request if it is the
        last."""
        params, sequence = generation.sequence.params, generation.sequence
        reason: FinishReason | None = None
        if token in params.stop_token_ids:
            reason = "stop"
        elif sequence.num_output >= params.max_tokens:
            reason = "length"
        if reason is not None:
            self._finish(generation, now, reason, token=token, logprob=logprob)
        else:
            # The first output says what is known so far, for a client that will end the request
            # itself.
            stats = generation.stats if sequence.num_output == 1 else None
            logprobs = (logprob,) if logprob else ()
            self._output(
                generation,
                Output(
                    generation.request_id,
                    (token,),
                    logprobs,
                    stats=stats,
                    position=sequence.num_output - 1,
                ),
            )

    def _finish(
        self,
        generation: _Generation,
        now: float,
        reason: FinishReason,
        error: str = "",
        token: int | None = None,
        logprob: TokenLogprob | None = None,
    ) -> None:
        """Send the last output, and let go of what the request holds."""
        if reason in ("abort", "error"):
            self._counts["aborted" if reason == "abort" else "failed"] += 1
        else:
            self._finished += 1
        sequence, stats = generation.sequence, generation.stats
        stats.preemptions = sequence.preemptions
        self._output(
            generation,
            Output(
                generation.request_id,
                () if token is None else (token,),
                (logprob,) if logprob else (),
                reason,
                error,
                stats,
                sequence.num_output - 1 if token is not None else 0,
            ),
        )
        self._receiving.leave(sequence, reason, now)
        if sequence in self._reserving:
            self._reserving.remove(sequence)
        del self._generations[generation.request_id]
        del self._by_sequence[sequence]
        self._drop(sequence)

    def _output(self, generation: _Generation, output: Output) -> None:
        if generation.api in self._peers:
            self._outputs.setdefault(generation.api, []).append(output)

    # ------------------------------------------------------------------------------------ the batch

    def _run_step(self, now: float) -> None:
        # Those that are still to reserve pages found too few.
        first = self._reserving.first(now)
        turn = self.scheduler.turns.of(first, now) if first is not None else NEVER
        lacks_pages_since = min(turn, self._caching.lacks_pages_since)
        plan = self.scheduler.plan
        if not self.scheduler.has_step_in_flight:
            self._step_begins(now)
        is_late = now >= self._ahead_at - _TIMER_S
        while (command := plan(now, lacks_pages_since, is_late)) is not None:
            for start in command.starts:
                sequence = next(s for s in self.scheduler.running if s.row == start.row)
                self._sending.started(sequence, now)
            self._effects.append(RunStep(command))

    def _step_begins(self, now: float) -> None:
        """Plan the next one shortly before its end: what comes until then is to be in it."""
        self._ahead_at = now + self._decode_step_s - _AHEAD_S

    def _step_done(self, result: StepResult, now: float) -> None:
        self._counts["steps"] += 1
        num_prefilling = self.scheduler.num_prefilling
        self._totals.measured(num_prefilling, len(result.tokens), result.seconds)
        if num_prefilling:
            self._prefill_rate.measured(num_prefilling, result.seconds)
            self._prefill_speed.measured(num_prefilling, result.seconds)
        elif result.tokens:
            self._decode_speed.measured(len(result.tokens), result.seconds)
            self._decode_step_s = result.seconds
        self._step_begins(now)
        for progress in self.scheduler.commit(result):
            sequence, token, logprob = progress.sequence, progress.token, progress.logprob
            generation = self._by_sequence.get(sequence)
            if generation is None:
                self._sending.progressed(sequence, token, logprob, now)
            elif token is not None:
                self._generation_progress(generation, token, logprob, now)

    def _generation_progress(
        self, generation: _Generation, token: int, logprob: TokenLogprob | None, now: float
    ) -> None:
        sequence, stats = generation.sequence, generation.stats
        if sequence.num_output == 1 and not generation.prefill:
            stats.queue_s = sequence.admitted_at - sequence.arrived_at
            stats.prefill_s = now - sequence.admitted_at
            stats.cached_tokens_decode = sequence.cached_tokens
            stats.cached_tokens_host = sequence.host_tokens
            stats.cached_tokens_storage = sequence.storage_tokens
            self._prefill_tokens += sequence.prompt_len - sequence.cached_tokens
        else:
            self._counts["decode_tokens"] += 1
        self._deliver(generation, token, logprob, now)

    # -------------------------------------------------------------------------- peers and deadlines

    def _peer_down(self, name: str, reason: str, now: float) -> None:
        self._peers.pop(name, None)
        self._draining.discard(name)
        for generation in list(self._generations.values()):
            if generation.api == name:
                self._finish(generation, now, "abort")
        self._receiving.peer_down(name, reason, now)
        for sequence in list(self._reserving):
            generation = self._by_sequence[sequence]
            if generation.prefill == name:
                self._reserving.remove(sequence)
                self._place(generation, now)
        self._sending.peer_down(name, now)
        self._caching.keeper_down(name)

    def _tick(self, now: float) -> None:
        for generation in list(self._generations.values()):
            if now > generation.deadline:
                self._finish(generation, now, "error", f"timed out in {self._stage(generation)}")
        self._receiving.tick(now)
        self._sending.tick(now)
        self._caching.tick(now)

    def _stage(self, generation: _Generation) -> str:
        if generation.sequence in self._receiving:
            return f"the handover from {generation.prefill}"
        if generation.sequence.admitted_at < 0:
            return "the queue"
        return "decoding" if generation.sequence.num_output else "prefill"

    def _send(self, to: str, message: AnyMessage) -> None:
        if to in self._peers:
            self._effects.append(Send(to, message))

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    # ------------------------------------------------------------------------------------ integrity

    @property
    def is_idle(self) -> bool:
        """No request, no write, no page referenced, and no handover that a peer has not settled."""
        used = any(self.index.num_used(group) for group in range(len(self._groups)))
        handovers = self._receiving.is_idle and self._sending.is_idle and self._caching.is_idle
        return handovers and not self._generations and not used

    def _held(self) -> Iterator[tuple[int, list[int]]]:
        """(group, pages) of all references that this replica holds."""
        for sequence in (*self._by_sequence, *self.scheduler.dropped):
            yield from enumerate(sequence.tables)
        yield from self._receiving.held()
        yield from self._sending.held()
        yield from self._caching.held()

    def check_integrity(self) -> None:
        """References match holders; queues, requests and handovers match. Raises
        AssertionError."""
        self.index.check_integrity()
        holders: list[dict[int, int]] = [{} for _ in self._groups]
        for group, slots in self._held():
            for slot in slots:
                if slot >= 0:
                    holders[group][slot] = holders[group].get(slot, 0) + 1
        for group, expected in enumerate(holders):
            found = self.index.references(group)
            assert found == expected, f"group {group}: references {found}, holders {expected}"
        assert {*self._by_sequence.values()} == {*self._generations.values()}
        assert {*self._reserving} <= {*self._by_sequence}
        self._receiving.check_integrity()
        self._sending.check_integrity()
        self._caching.check_integrity()
