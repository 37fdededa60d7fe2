"""A leader's prefills for other replicas: compute a prompt, write its pages, say how it stands.

Pure. `Reserve` -> chunks, each followed by writes of the pages completed, then `PrefillDone` and
the last word, `PagesWritten` or `HandoverClosed`. The state machine of a handover, and the ledger
of what a peer has not settled, are in transfer/handover.py; here writes are planned and posted.

A source page has a reference from when it is first posted until its handover is closed: writes
read it, a failed one may be posted again, and with `verify` its digest is taken at the end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hicache.index import PageIndex
from pd.engine.scheduler import Tracked
from pd.events import BreakLink, CancelWrite, Digest, Digested, Effect, Write, Written
from pd.messages import (
    AnyMessage,
    Ask,
    Cancel,
    HandoverClosed,
    Int32Array,
    PagesWritten,
    PrefillDone,
    Reserve,
    Settled,
    SettledHeard,
    TokenLogprob,
    Unknown,
    unpack_ints,
)
from transfer.handover import ReadyPages, SenderAnswer, SenderHandover, SenderLedger, SenderState
from transfer.layout import PageLayout
from transfer.plan import PairPlan
from transfer.topology import ReplicaLayout, Topology
from transfer.transport import PagePart

_BATCH_BYTES = 256 << 20
"""A cached prefix may be gigabytes: what has landed of it is told, and counts, batch by batch."""


@dataclasses.dataclass(slots=True, eq=False)
class _Prefill:
    peer: str
    serial: int
    request_id: str
    number: int
    """Tells handovers apart, whatever their peers."""
    handover: SenderHandover
    plan: PairPlan
    sequence: Tracked | None
    """None: nothing more is to be computed."""
    held: list[tuple[int, Int32Array]] = dataclasses.field(default_factory=list)
    """(group, source pages) on which there is a reference, in order of the pages."""
    is_orphan: bool = False
    """The peer is gone: there is nobody to answer."""
    asked_to_end: bool = False
    digests: dict[int, bytes] | None = None
    """By layer group, as they come."""


def _local(slots: Int32Array, topology: Topology) -> Int32Array:
    """Pages in the pools of the ranks that hold them, of slots of a replica."""
    return slots if topology.cp == 1 else slots // topology.cp


class Sending:
    def __init__(
        self,
        index: PageIndex,
        layouts: Sequence[PageLayout],
        topology: Topology,
        timeout_s: float,
        numbers: Iterator[int],
        queue: Callable[[Tracked, float], None],
        drop: Callable[[Tracked], None],
        send: Callable[[str, AnyMessage], None],
        emit: Callable[[Effect], None],
    ) -> None:
        """`numbers`: never the same twice; for writes, digests and handovers. `queue`: have a
        sequence computed; `drop`: not any more."""
        self.prefill_tokens = 0
        self.arrived = 0
        self.finished = 0
        self.kv_bytes = 0
        self.kv_pages = 0
        self.kv_descriptors = 0
        self.kv_seconds = 0.0
        self._index = index
        self._queue = queue
        self._drop = drop
        self._layout = ReplicaLayout(topology, tuple(layouts))
        self._page_tokens = layouts[0].page_tokens
        # A part that is a whole page on both sides has a faster way through some transports.
        self._whole = [PagePart(0, 0, layout.page_bytes) for layout in layouts]
        self._timeout_s = timeout_s
        self._numbers = numbers
        self._send = send
        self._emit = emit
        self._plans: dict[Topology, PairPlan] = {}
        self._ledgers: dict[str, tuple[SenderLedger, Topology]] = {}
        self._prefills: dict[SenderHandover, _Prefill] = {}
        """Without those that are closed and have said their last word."""
        self._by_sequence: dict[Tracked, _Prefill] = {}
        self._writes: dict[int, _Prefill] = {}
        self._digests: dict[int, tuple[_Prefill, int]] = {}

    def __len__(self) -> int:
        return len(self._prefills)

    # ---------------------------------------------------------------------------------------- peers

    def peer_up(self, name: str, topology: Topology) -> None:
        self._ledgers[name] = (SenderLedger(), topology)

    def peer_down(self, name: str, now: float) -> None:
        self._ledgers.pop(name, None)
        for prefill in list(self._prefills.values()):
            if prefill.peer == name:
                prefill.is_orphan = True
                prefill.handover.cancel(f"{name} is gone", now)
                self._follow(prefill)

    def _plan(self, topology: Topology) -> PairPlan:
        plan = self._plans.get(topology)
        if plan is None:
            peer = ReplicaLayout(topology, self._layout.layouts)
            plan = self._plans[topology] = PairPlan(self._layout, peer)
        return plan

    # ------------------------------------------------------------------------------------- messages

    def reserve(self, peer: str, message: Reserve, sequence: Tracked, now: float) -> None:
        """`sequence` is the prompt, not queued yet."""
        ledger, topology = self._ledgers[peer]
        answer = ledger.reserve(message.serial, message.floor)
        if answer is SenderAnswer.START:
            self.arrived += 1
            handover = SenderHandover(
                [(target.first_page, unpack_ints(target.pages)) for target in message.targets],
                now + message.timeout_s,
                self._timeout_s,
                message.verify,
            )
            ledger.records[message.serial] = handover
            self._prefills[handover] = self._by_sequence[sequence] = _Prefill(
                peer,
                message.serial,
                message.request_id,
                next(self._numbers),
                handover,
                self._plan(topology),
                sequence,
            )
            self._queue(sequence, now)
        elif answer is SenderAnswer.REPORT:
            self._report(peer, message.serial, ledger.records[message.serial])

    def ask(self, peer: str, message: Ask) -> None:
        ledger, _ = self._ledgers[peer]
        answer = ledger.ask(message.serial, message.floor)
        if answer is SenderAnswer.REPORT:
            self._report(peer, message.serial, ledger.records[message.serial])
        elif answer is SenderAnswer.UNKNOWN:
            self._send(peer, Unknown(message.serial))

    def cancel(self, peer: str, message: Cancel, now: float) -> None:
        ledger, _ = self._ledgers[peer]
        if ledger.cancel(message.serial, message.floor, now) is not SenderAnswer.REPORT:
            return
        handover = ledger.records[message.serial]
        if handover in self._prefills:
            self._follow(self._prefills[handover])
        else:
            self._report(peer, message.serial, handover)

    def settled(self, peer: str, message: Settled) -> None:
        ledger, _ = self._ledgers[peer]
        ledger.settled(message.floor)
        self._send(peer, SettledHeard(ledger.floor))

    def _report(self, peer: str, serial: int, handover: SenderHandover) -> None:
        """All that there is to say about a handover so far."""
        if isinstance(handover.first_token, PrefillDone):
            self._send(peer, handover.first_token)
        self._send_state(peer, serial, handover)

    def _send_state(self, peer: str, serial: int, handover: SenderHandover) -> None:
        landed = tuple(handover.landed)
        if not handover.has_last_word:
            self._send(peer, PagesWritten(serial, landed))
        elif handover.is_complete:
            self._send(
                peer,
                PagesWritten(
                    serial,
                    landed,
                    True,
                    handover.num_pages,
                    handover.bytes_moved,
                    handover.descriptors,
                    handover.transfer_s,
                    handover.digests or (),
                ),
            )
        else:
            self._send(peer, HandoverClosed(serial, landed, handover.reason))

    # ------------------------------------------------------------------------------------ the batch

    def started(self, sequence: Tracked, now: float) -> None:
        """It joined the batch: what its prefix brought can be sent while it computes."""
        prefill = self._by_sequence.get(sequence)
        if prefill is not None:
            self._post_ready(prefill, now)

    def progressed(
        self, sequence: Tracked, token: int | None, logprob: TokenLogprob | None, now: float
    ) -> None:
        """A step computed a chunk of it; with its last one came the first token."""
        prefill = self._by_sequence[sequence]
        if token is not None:
            self.prefill_tokens += sequence.prompt_len - sequence.cached_tokens
            self.finished += 1
            done = PrefillDone(
                prefill.serial,
                prefill.request_id,
                token,
                logprob,
                sequence.cached_tokens,
                sequence.admitted_at - sequence.arrived_at,
                now - sequence.admitted_at,
                sequence.host_tokens,
                sequence.storage_tokens,
            )
            prefill.handover.first_token = done
            self._send(prefill.peer, done)
        # After the first token, which the client waits for.
        self._post_ready(prefill, now)
        if token is not None:
            self._drop_sequence(prefill)
        self._follow(prefill)

    def _post_ready(self, prefill: _Prefill, now: float) -> None:
        """Post the pages completed since the last call; the last, partial one with the prompt's
        end."""
        sequence = prefill.sequence
        assert sequence is not None
        ready = prefill.handover.take(
            sequence.num_computed // self._page_tokens,
            sequence.tables,
            final=sequence.num_computed >= sequence.prompt_len,
        )
        for pages in ready:
            self._index.retain(pages.group, pages.source_slots.tolist())
            prefill.held.append((pages.group, pages.source_slots))
            at_once = max(1, _BATCH_BYTES // self._whole[pages.group].length)
            for batch in pages.cut(at_once):
                self._post(prefill, batch, now)

    def _post(self, prefill: _Prefill, pages: ReadyPages, now: float) -> None:
        planned = prefill.plan.writes(*pages)
        write_ids = [next(self._numbers) for _ in planned]
        prefill.handover.posted(pages, write_ids, now)
        self.kv_pages += len(pages.source_slots)
        for write_id, write in zip(write_ids, planned, strict=True):
            self._writes[write_id] = prefill
            self._emit(
                Write(
                    write_id,
                    prefill.peer,
                    write.group,
                    _local(write.source_pages, self._layout.topology),
                    _local(write.target_pages, prefill.plan.target.topology),
                    None if write.part == self._whole[write.group] else write.part,
                    prefill.number,
                    write.source,
                    write.target,
                )
            )

    def _drop_sequence(self, prefill: _Prefill) -> None:
        if prefill.sequence is not None:
            del self._by_sequence[prefill.sequence]
            self._drop(prefill.sequence)
            prefill.sequence = None

    # --------------------------------------------------------------------------- writes and digests

    def written(self, event: Written, now: float) -> None:
        prefill = self._writes.pop(event.write_id)
        self.kv_bytes += event.bytes_moved
        self.kv_descriptors += event.descriptors
        self.kv_seconds += event.seconds
        handover = prefill.handover
        landed = list(handover.landed)
        for other in self._prefills.values():
            if other.peer == prefill.peer:
                other.handover.link_lives(now)
        handover.write_done(
            event.write_id,
            event.error,
            event.bytes_moved,
            event.descriptors,
            event.seconds,
            now,
        )
        if handover.state is SenderState.OPEN and handover.landed != landed:
            self._send_state(prefill.peer, prefill.serial, handover)
        self._follow(prefill)

    def digested(self, event: Digested) -> bool:
        """False: it is not for us."""
        asked = self._digests.pop(event.digest_id, None)
        if asked is None:
            return False
        prefill, group = asked
        assert prefill.digests is not None
        prefill.digests[group] = event.digests.tobytes()
        self._follow(prefill)
        return True

    def tick(self, now: float) -> None:
        broken = set()
        for prefill in list(self._prefills.values()):
            if prefill.handover.tick(now):
                broken.add(prefill.peer)
            for pages in prefill.handover.take_retries(now):
                self._post(prefill, pages, now)
            self._follow(prefill)
        for peer in sorted(broken):
            self._emit(BreakLink(peer))

    def _follow(self, prefill: _Prefill) -> None:
        """Do what the handover's state asks for. Idempotent."""
        handover = prefill.handover
        if handover.state is SenderState.OPEN:
            return
        self._drop_sequence(prefill)
        if handover.state is SenderState.DRAINING:
            if not prefill.asked_to_end:
                prefill.asked_to_end = True
                for write_id in handover.outstanding:
                    self._emit(CancelWrite(write_id))
            return
        if not handover.has_last_word and not self._has_digests(prefill):
            return
        if not prefill.is_orphan:
            self._send_state(prefill.peer, prefill.serial, handover)
        for group, pages in prefill.held:
            self._index.release(group, pages.tolist())
        del self._prefills[handover]

    def _has_digests(self, prefill: _Prefill) -> bool:
        """Ask for the digests of the pages written, once; whether they are there."""
        groups = range(len(self._whole))
        if prefill.digests is None:
            prefill.digests = {}
            for group in groups:
                pages = [pages for of, pages in prefill.held if of == group]
                if pages:
                    number = next(self._numbers)
                    self._digests[number] = (prefill, group)
                    self._emit(Digest(number, group, np.concatenate(pages)))
                else:
                    prefill.digests[group] = b""
        if len(prefill.digests) < len(groups):
            return False
        prefill.handover.digests = tuple(prefill.digests[group] for group in groups)
        return True

    # ------------------------------------------------------------------------------------ integrity

    @property
    def is_idle(self) -> bool:
        """Nothing in progress, and nothing that a peer has not settled."""
        records = any(ledger.records for ledger, _ in self._ledgers.values())
        return not (self._prefills or self._writes or self._digests or records)

    def held(self) -> Iterator[tuple[int, list[int]]]:
        """(group, pages) of all references that are held here."""
        for prefill in self._prefills.values():
            if prefill.sequence is not None:
                yield from enumerate(prefill.sequence.tables)
            for group, pages in prefill.held:
                yield group, pages.tolist()

    def check_integrity(self) -> None:
        live = self._prefills.values()
        assert {p.sequence: p for p in live if p.sequence is not None} == self._by_sequence
        writes = {number: p for p in live for number in p.handover.outstanding}
        assert writes == self._writes, "writes in flight are not those of live handovers"
        for prefill in live:
            if not prefill.is_orphan:
                ledger, _ = self._ledgers[prefill.peer]
                assert ledger.records[prefill.serial] is prefill.handover
        for ledger, _ in self._ledgers.values():
            for serial, handover in ledger.records.items():
                assert serial >= ledger.floor, f"handover {serial} is below the floor"
                assert handover in self._prefills or handover.has_last_word
