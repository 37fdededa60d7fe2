"""The leader of one replica: its requests, its scheduler, its handovers. Pure: events in, effects
out.

A leader serves both sides. For the API processes it generates: `Generate` -> tokens. If another
replica prefills, it matches its own prefix, reserves pages, sends `Reserve`, and lets the request
join its batch when `PrefillDone` and `PagesWritten` have come. For other leaders it prefills:
`Reserve` -> chunks, each followed by writes of the pages completed, then `PrefillDone` and
`PagesWritten`.

Every request ends in exactly one final `Output`, or silently when its API process is gone. Pages
that a peer may still write to, and pages that a write still reads, are kept until the writer has
said that it is done, or is known to be dead (`PeerDown`); a deadline ends the request, never the
quarantine.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from typing import assert_never

from hicache.index import PageIndex
from pd.engine.batch import StepResult
from pd.engine.scheduler import Scheduler, Tracked
from pd.events import (
    Effect,
    Event,
    PeerDown,
    PeerUp,
    Received,
    RunStep,
    Send,
    StepDone,
    Tick,
    Write,
    Written,
)
from pd.messages import (
    Abort,
    AnyMessage,
    Cancel,
    FinishReason,
    Generate,
    GroupPages,
    HandoverClosed,
    Heartbeat,
    Int32Array,
    Output,
    Outputs,
    PagesWritten,
    PrefillDone,
    ReplicaLoad,
    RequestStats,
    Reserve,
    TokenLogprob,
    pack_ints,
    split_hashes,
    unpack_ints,
)
from transfer.handover import ReceiverHandover, ReceiverState, SenderHandover
from transfer.layout import LayerGroup

# -------------------------------------------------------------------------------------------- state

_CANCEL_AGAIN_S = 1.0
"""A Cancel is repeated until it is answered: either message may be lost."""
_COUNTERS = (
    *("steps", "prefill_tokens", "decode_tokens", "finished", "aborted", "failed"),
    *("kv_bytes", "kv_pages", "kv_descriptors"),
)
"""Fields of ReplicaLoad that only grow."""


@dataclasses.dataclass(slots=True, eq=False)
class _Generation:
    """A request of an API process. With `receiver`, its pages may be written to by `prefill`."""

    request_id: str
    api: str
    sequence: Tracked
    deadline: float
    stats: RequestStats
    prefill: str = ""
    receiver: ReceiverHandover | None = None
    finished: bool = False
    """The last output is out; it stays only while its pages are in quarantine."""
    first_token_at: float = 0.0
    cancel_again_at: float = 0.0

    @property
    def stage(self) -> str:
        if self.receiver is not None:
            return f"the handover from {self.prefill}"
        if self.sequence.admitted_at < 0:
            return "the queue"
        return "decoding" if self.sequence.num_output else "prefill"


@dataclasses.dataclass(slots=True, eq=False)
class _Prefill:
    """A prompt prefilled for a decode leader."""

    request_id: str
    attempt: int
    peer: str
    sequence: Tracked
    sender: SenderHandover
    deadline: float
    done: bool = False
    """The first token is out."""
    closing: str = ""
    """Why it ended early; it stays while writes are in flight."""


class Leader:
    def __init__(
        self,
        name: str,
        index: PageIndex,
        groups: Sequence[LayerGroup],
        page_tokens: int,
        max_batch_tokens: int,
        max_running: int,
        local_prefill_tokens: int,
    ) -> None:
        self.name = name
        self.index = index
        self.scheduler = Scheduler(index, groups, page_tokens, max_batch_tokens, max_running)
        self._groups = groups
        self._page_tokens = page_tokens
        self._local_prefill_tokens = local_prefill_tokens
        self._peers: set[str] = set()
        self._generations: dict[str, _Generation] = {}
        self._prefills: dict[tuple[str, str, int], _Prefill] = {}
        self._by_sequence: dict[Tracked, _Generation | _Prefill] = {}
        self._reserving: deque[_Generation] = deque()
        """Waiting for pages to reserve, in order of arrival."""
        self._writes: dict[int, tuple[_Prefill, int, Int32Array]] = {}
        self._next_write = 0
        self._outputs: dict[str, list[Output]] = {}
        self._effects: list[Effect] = []
        self._counts = dict.fromkeys(_COUNTERS, 0)
        self._kv_seconds = 0.0

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Apply one event. `now` is monotonic, in seconds. The effects are to be carried out in
        order."""
        match event:
            case Received(sender, message):
                self._receive(sender, message, now)
            case StepDone(result):
                self._step_done(result, now)
            case Written():
                self._written(event)
            case PeerUp(name):
                self._peers.add(name)
            case PeerDown(name, reason):
                self._peer_down(name, reason, now)
            case Tick():
                self._expire(now)
            case _:
                assert_never(event)
        self._reserve_waiting(now)
        self._run_step(now)
        for api, outputs in self._outputs.items():
            self._effects.append(Send(api, Outputs(tuple(outputs))))
        self._outputs = {}
        effects, self._effects = self._effects, []
        return effects

    @property
    def expects_writes(self) -> bool:
        """Whether a peer may be writing here: the transport must then be polled."""
        return any(g.receiver is not None for g in self._generations.values())

    def load(self) -> ReplicaLoad:
        index, groups = self.index, range(len(self._groups))
        waiting = [
            *self.scheduler.landed,
            *self.scheduler.waiting,
            *(g.sequence for g in self._reserving),
        ]
        return ReplicaLoad(
            waiting=len(waiting),
            running=len(self.scheduler.running),
            handovers_in=sum(g.receiver is not None for g in self._generations.values()),
            handovers_out=len(self._prefills),
            waiting_tokens=sum(s.remaining for s in waiting)
            + sum(s.remaining for s in self.scheduler.running if s.remaining > 1),
            pages_free=tuple(index.num_free(g) for g in groups),
            pages_cached=tuple(index.num_cached(g) for g in groups),
            pages_used=tuple(index.num_used(g) for g in groups),
            cached_tokens=self.scheduler.cached_tokens,
            preemptions=self.scheduler.preemptions,
            kv_seconds=self._kv_seconds,
            **self._counts,
        )

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
                self._start_prefill(sender, message, now)
            case Cancel(request_id, attempt):
                self._cancelled(sender, request_id, attempt)
            case PrefillDone():
                self._prefill_done(sender, message, now)
            case PagesWritten():
                self._pages_written(sender, message, now)
            case HandoverClosed():
                self._handover_closed(sender, message, now)
            case Outputs() | Heartbeat():
                pass
            case _:
                assert_never(message)

    # --------------------------------------------------------------------- generation (decode side)

    def _generate(self, api: str, message: Generate, now: float) -> None:
        if message.request_id in self._generations:
            return
        sequence = self._track(message, now)
        generation = _Generation(
            message.request_id,
            api,
            sequence,
            now + message.timeout_s,
            RequestStats(decode_replica=self.name, prefill_replica=message.prefill or self.name),
            prefill=message.prefill,
        )
        self._generations[message.request_id] = generation
        self._by_sequence[sequence] = generation
        if message.prefill and message.prefill not in self._peers:
            self._finish(
                generation, now, "error", f"prefill replica {message.prefill} is not connected"
            )
            return
        cached = self.index.match(sequence.hashes[: (sequence.length - 1) // self._page_tokens])
        uncached = sequence.length - cached * self._page_tokens
        if not message.prefill or uncached <= self._local_prefill_tokens:
            generation.prefill = ""
            generation.stats.prefill_replica = self.name
            self.scheduler.add(sequence)
        else:
            self._reserving.append(generation)

    def _track(self, message: Generate | Reserve, now: float) -> Tracked:
        hashes = split_hashes(message.page_hashes)
        prompt = unpack_ints(message.prompt)
        return Tracked(prompt, message.sampling, message.root, hashes, len(self._groups), now)

    def _reserve_waiting(self, now: float) -> None:
        """Reserve pages in order of arrival, while they fit."""
        while self._reserving:
            generation = self._reserving[0]
            sequence = generation.sequence
            if self.scheduler.lacks_pages_before(sequence.arrived_at):
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
            self._reserving.popleft()
            sequence.admitted_at = now
            generation.stats.queue_s = now - sequence.arrived_at
            generation.stats.cached_tokens_decode = sequence.num_computed
            self.scheduler.cached_tokens += sequence.num_computed
            generation.receiver = ReceiverHandover()
            targets = tuple(
                GroupPages(first, pack_ints(table[first:]))
                for first, table in zip(firsts, sequence.tables, strict=True)
            )
            prompt = sequence.buffer[: sequence.prompt_len]
            self._send(
                generation.prefill,
                Reserve(
                    generation.request_id,
                    0,
                    pack_ints(prompt),
                    sequence.root,
                    b"".join(sequence.hashes),
                    sequence.params,
                    targets,
                    generation.deadline - now,
                ),
            )

    def _receiving(self, sender: str, request_id: str, attempt: int) -> _Generation | None:
        generation = self._generations.get(request_id)
        if generation is None or generation.receiver is None or attempt != 0:
            return None
        return generation if generation.prefill == sender else None

    def _prefill_done(self, sender: str, message: PrefillDone, now: float) -> None:
        generation = self._receiving(sender, message.request_id, message.attempt)
        if generation is None or generation.receiver is None:
            return
        if not generation.receiver.prefill_done():
            return
        stats = generation.stats
        stats.queue_s += message.queue_s
        stats.prefill_s = message.prefill_s
        stats.cached_tokens_prefill = message.cached_tokens
        generation.first_token_at = now
        generation.sequence.append(message.token)
        self._deliver(generation, message.token, message.logprob, now)
        self._settle(generation, now)

    def _pages_written(self, sender: str, message: PagesWritten, now: float) -> None:
        generation = self._receiving(sender, message.request_id, message.attempt)
        if generation is None or generation.receiver is None:
            return
        if not generation.receiver.pages_written():
            return
        stats = generation.stats
        stats.pages_moved, stats.bytes_moved = message.pages, message.bytes_moved
        stats.descriptors, stats.transfer_s = message.descriptors, message.transfer_s
        self._settle(generation, now)

    def _handover_closed(self, sender: str, message: HandoverClosed, now: float) -> None:
        generation = self._receiving(sender, message.request_id, message.attempt)
        if generation is None or generation.receiver is None:
            return
        if generation.receiver.handover_closed(f"{sender} ended the handover: {message.reason}"):
            self._settle(generation, now)

    def _settle(self, generation: _Generation, now: float) -> None:
        """After an event of the handover: the request joins the batch, or its pages are free to
        go."""
        receiver = generation.receiver
        if receiver is None or not receiver.may_reuse_targets:
            return
        generation.receiver = None
        if generation.finished:
            self._forget_generation(generation)
        elif receiver.state is ReceiverState.LANDED:
            generation.stats.transfer_exposed_s = now - generation.first_token_at
            sequence = generation.sequence
            sequence.num_computed = sequence.prompt_len
            self.scheduler.publish(sequence)
            self.scheduler.add_landed(sequence)
        else:
            self._finish(generation, now, "error", receiver.reason)

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
        """Send the last output, once, and release what can be released."""
        if generation.finished:
            return
        generation.finished = True
        key = {"abort": "aborted", "error": "failed"}.get(reason, "finished")
        self._counts[key] += 1
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
        receiver = generation.receiver
        if receiver is not None:
            receiver.cancel(reason)
            if not receiver.may_reuse_targets:
                self._send(generation.prefill, Cancel(generation.request_id, 0))
                generation.cancel_again_at = now + _CANCEL_AGAIN_S
                return
            generation.receiver = None
        self._forget_generation(generation)

    def _output(self, generation: _Generation, output: Output) -> None:
        if generation.api in self._peers:
            self._outputs.setdefault(generation.api, []).append(output)

    def _forget_generation(self, generation: _Generation) -> None:
        """The request has ended and nobody writes to its pages."""
        if generation in self._reserving:
            self._reserving.remove(generation)
        del self._generations[generation.request_id]
        del self._by_sequence[generation.sequence]
        self.scheduler.drop(generation.sequence)

    # --------------------------------------------------------------------------- prefill for a peer

    def _start_prefill(self, peer: str, message: Reserve, now: float) -> None:
        key = (peer, message.request_id, message.attempt)
        if key in self._prefills:
            return
        sequence = self._track(message, now)
        sender = SenderHandover(
            [(target.first_page, unpack_ints(target.pages)) for target in message.targets]
        )
        prefill = _Prefill(
            message.request_id, message.attempt, peer, sequence, sender, now + message.timeout_s
        )
        self._prefills[key] = prefill
        self._by_sequence[sequence] = prefill
        self.scheduler.add(sequence)

    def _cancelled(self, peer: str, request_id: str, attempt: int) -> None:
        prefill = self._prefills.get((peer, request_id, attempt))
        if prefill is not None:
            self._end_prefill(prefill, "cancelled")
        else:
            # Done already, or lost on its way: a Cancel cannot overtake its Reserve.
            self._send(peer, HandoverClosed(request_id, attempt, "unknown here"))

    def _end_prefill(self, prefill: _Prefill, reason: str) -> None:
        """Write no more; answer once the writes in flight have ended."""
        prefill.closing = prefill.closing or reason
        prefill.sender.cancel(reason)
        if not self.scheduler.has_step_in_flight:
            self.scheduler.retire(prefill.sequence)
        self._close_prefill(prefill)

    def _close_prefill(self, prefill: _Prefill) -> None:
        """Let a prefill go that has nothing left to do and nothing in flight."""
        if prefill.sender.outstanding:
            return
        key = (prefill.peer, prefill.request_id, prefill.attempt)
        if prefill.closing:
            self._send(
                prefill.peer, HandoverClosed(prefill.request_id, prefill.attempt, prefill.closing)
            )
        elif prefill.done and prefill.sender.is_complete:
            sender = prefill.sender
            self._send(
                prefill.peer,
                PagesWritten(
                    prefill.request_id,
                    prefill.attempt,
                    sender.num_pages,
                    sender.bytes_moved,
                    sender.descriptors,
                    sender.transfer_s,
                ),
            )
        else:
            return
        del self._prefills[key]
        del self._by_sequence[prefill.sequence]
        self.scheduler.drop(prefill.sequence)

    def _write_ready_pages(self, prefill: _Prefill) -> None:
        """Post the pages completed since the last call; the last, partial one with the prompt's
        end."""
        if prefill.closing:
            return
        sequence = prefill.sequence
        ready = prefill.sender.take(
            sequence.num_computed // self._page_tokens,
            sequence.tables,
            final=sequence.num_computed >= sequence.prompt_len,
        )
        for group, source, target in ready:
            self._next_write += 1
            self.index.retain(group, source.tolist())
            self._writes[self._next_write] = (prefill, group, source)
            prefill.sender.write_submitted(self._next_write)
            self._effects.append(Write(self._next_write, prefill.peer, group, source, target))

    def _written(self, event: Written) -> None:
        prefill, group, source = self._writes.pop(event.write_id)
        self.index.release(group, source.tolist())
        self._counts["kv_bytes"] += event.bytes_moved
        self._counts["kv_pages"] += len(source)
        self._counts["kv_descriptors"] += event.descriptors
        self._kv_seconds += event.seconds
        prefill.sender.write_done(
            event.write_id, event.error is None, event.bytes_moved, event.descriptors, event.seconds
        )
        if event.error is not None:
            self._end_prefill(prefill, f"a write to {prefill.peer} failed: {event.error}")
        else:
            self._close_prefill(prefill)

    # ------------------------------------------------------------------------------------ the batch

    def _run_step(self, now: float) -> None:
        command = self.scheduler.plan(now)
        if command is None:
            return
        for start in command.starts:
            self._started(start.row)
        self._effects.append(RunStep(command))

    def _started(self, row: int) -> None:
        """A sequence joined the batch: what its prefix brought can be sent while it computes."""
        sequence = next(s for s in self.scheduler.running if s.row == row)
        owner = self._by_sequence[sequence]
        if isinstance(owner, _Prefill):
            self._write_ready_pages(owner)

    def _step_done(self, result: StepResult, now: float) -> None:
        self._counts["steps"] += 1
        for progress in self.scheduler.commit(result):
            owner = self._by_sequence[progress.sequence]
            if isinstance(owner, _Prefill):
                self._prefill_progress(owner, progress.token, progress.logprob, now)
            elif progress.token is not None:
                self._generation_progress(owner, progress.token, progress.logprob, now)

    def _prefill_progress(
        self, prefill: _Prefill, token: int | None, logprob: TokenLogprob | None, now: float
    ) -> None:
        if token is None:
            self._write_ready_pages(prefill)
            return
        prefill.done = True
        sequence = prefill.sequence
        self._counts["prefill_tokens"] += sequence.prompt_len - sequence.cached_tokens
        self._counts["finished"] += 1
        self.scheduler.retire(sequence)
        self._send(
            prefill.peer,
            PrefillDone(
                prefill.request_id,
                prefill.attempt,
                token,
                logprob,
                sequence.cached_tokens,
                sequence.admitted_at - sequence.arrived_at,
                now - sequence.admitted_at,
            ),
        )
        # After the first token, which the client waits for.
        self._write_ready_pages(prefill)
        self._close_prefill(prefill)

    def _generation_progress(
        self, generation: _Generation, token: int, logprob: TokenLogprob | None, now: float
    ) -> None:
        sequence, stats = generation.sequence, generation.stats
        if sequence.num_output == 1 and not generation.prefill:
            stats.queue_s = sequence.admitted_at - sequence.arrived_at
            stats.prefill_s = now - sequence.admitted_at
            stats.cached_tokens_decode = sequence.cached_tokens
            self._counts["prefill_tokens"] += sequence.prompt_len - sequence.cached_tokens
        else:
            self._counts["decode_tokens"] += 1
        self._deliver(generation, token, logprob, now)

    # -------------------------------------------------------------------------- peers and deadlines

    def _peer_down(self, name: str, reason: str, now: float) -> None:
        self._peers.discard(name)
        for generation in list(self._generations.values()):
            if generation.api == name:
                self._finish(generation, now, "abort")
            elif generation.prefill == name and generation.receiver is not None:
                generation.receiver.peer_dead(f"prefill replica {name} is gone: {reason}")
                self._settle(generation, now)
        for generation in list(self._reserving):
            if generation.prefill == name:
                self._finish(generation, now, "error", f"prefill replica {name} is gone: {reason}")
        for prefill in list(self._prefills.values()):
            if prefill.peer == name:
                self._end_prefill(prefill, f"{name} is gone")

    def _expire(self, now: float) -> None:
        for generation in list(self._generations.values()):
            if generation.finished and now > generation.cancel_again_at:
                generation.cancel_again_at = now + _CANCEL_AGAIN_S
                self._send(generation.prefill, Cancel(generation.request_id, 0))
            elif now > generation.deadline and not generation.finished:
                self._finish(generation, now, "error", f"timed out in {generation.stage}")
        for prefill in list(self._prefills.values()):
            if now > prefill.deadline and not prefill.closing:
                self._end_prefill(prefill, "timed out")

    def _send(self, to: str, message: AnyMessage) -> None:
        if to in self._peers:
            self._effects.append(Send(to, message))

    # ------------------------------------------------------------------------------------ integrity

    @property
    def is_idle(self) -> bool:
        """No request, no write and no page referenced."""
        used = any(self.index.num_used(group) for group in range(len(self._groups)))
        return not (self._generations or self._prefills or self._writes or used)

    def check_integrity(self) -> None:
        """References match holders; queues and requests match. Raises AssertionError."""
        self.index.check_integrity()
        holders: list[dict[int, int]] = [{} for _ in self._groups]
        held = [
            (group, table)
            for sequence in (*self._by_sequence, *self.scheduler.dropped)
            for group, table in enumerate(sequence.tables)
        ]
        held += [(group, source.tolist()) for _, group, source in self._writes.values()]
        for group, slots in held:
            for slot in slots:
                if slot >= 0:
                    holders[group][slot] = holders[group].get(slot, 0) + 1
        for group, expected in enumerate(holders):
            found = self.index.references(group)
            assert found == expected, f"group {group}: references {found}, holders {expected}"
        assert {*self._by_sequence.values()} == {
            *self._generations.values(),
            *self._prefills.values(),
        }
