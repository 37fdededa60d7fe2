"""Handovers to a replica: pages reserved for a peer to write, until no write can land in them.

Pure. The state machine of a handover, and the ledger of what is not settled with a peer, are in
transfer/handover.py; here pages are named, messages sent and answered, digests compared. Each
handover that its request does not leave first (`leave`) ends in one call of `Owner`: the pages and
the first token are there, or it has failed. After a failure, full pages that are known to be right
are in the index, and the sequence holds none.

Pages that a peer may still write to when their request leaves or goes on are in quarantine until
the peer has said its last word, or is dead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, assert_never

import msgspec
import numpy as np

from hicache.index import PageIndex
from pd.engine.scheduler import Scheduler, Tracked
from pd.events import Digest, Digested, Effect, Warn
from pd.messages import (
    AnyMessage,
    Ask,
    Cancel,
    GroupPages,
    HandoverClosed,
    PagesWritten,
    PrefillDone,
    Reserve,
    Settled,
    SettledHeard,
    Unknown,
    pack_ints,
    unpack_ints,
)
from transfer.handover import ReceiverHandover, ReceiverLedger, ReceiverNeed, ReceiverState
from transfer.layout import LayerGroup

News = PrefillDone | PagesWritten | HandoverClosed | Unknown


class Owner(Protocol):
    """The leader, as a handover sees it."""

    def first_token(self, sequence: Tracked, message: PrefillDone, now: float) -> None: ...

    def landed(self, sequence: Tracked, complete: PagesWritten, now: float) -> None: ...

    def failed(self, sequence: Tracked, peer: str, is_mismatch: bool, now: float) -> None:
        """`is_mismatch`: pages came, and differed from their source."""


@dataclasses.dataclass(slots=True, eq=False)
class _Incoming:
    peer: str
    handover: ReceiverHandover
    reserve: Reserve
    deadline: float
    sequence: Tracked | None
    """None: the request has left, and `quarantine` has the pages."""
    after_mismatch: bool
    complete: PagesWritten | None = None
    """The last word, if it is that one."""
    digests: dict[int, bytes] | None = None
    """Our own, by layer group, as they come."""
    quarantine: list[list[int]] = dataclasses.field(default_factory=list)
    """By layer group."""
    is_counted_overdue: bool = False


class Receiving:
    def __init__(
        self,
        owner: Owner,
        scheduler: Scheduler,
        index: PageIndex,
        groups: Sequence[LayerGroup],
        page_tokens: int,
        timeout_s: float,
        verify: bool,
        numbers: Iterator[int],
        send: Callable[[str, AnyMessage], None],
        emit: Callable[[Effect], None],
    ) -> None:
        """`numbers`: never the same twice; for digests."""
        self.num_failed = 0
        self.num_overdue = 0
        self.num_mismatches = 0
        self._owner = owner
        self._scheduler = scheduler
        self._index = index
        self._groups = groups
        self._page_tokens = page_tokens
        self._timeout_s = timeout_s
        self._verify = verify
        self._numbers = numbers
        self._send = send
        self._emit = emit
        self._ledgers: dict[str, ReceiverLedger] = {}
        self._incoming: dict[tuple[str, int], _Incoming] = {}
        """By peer and serial; those that are not settled."""
        self._by_sequence: dict[Tracked, _Incoming] = {}
        """Those whose request waits for them, also while pages that have landed are verified."""
        self._digests: dict[int, tuple[_Incoming, int]] = {}
        """Asked for: for which handover, and of which layer group."""

    def __len__(self) -> int:
        return len(self._by_sequence)

    def __contains__(self, sequence: Tracked) -> bool:
        return sequence in self._by_sequence

    @property
    def expects_writes(self) -> bool:
        return bool(self._incoming)

    def num_open(self, peer: str) -> int:
        return len(self._ledgers[peer].open)

    def num_quarantined(self, group: int) -> int:
        """Pages."""
        return sum(len(i.quarantine[group]) for i in self._incoming.values() if i.quarantine)

    # ---------------------------------------------------------------------------------------- peers

    def peer_up(self, name: str) -> None:
        self._ledgers[name] = ReceiverLedger()

    def peer_down(self, name: str, reason: str, now: float) -> None:
        self._ledgers.pop(name, None)
        for incoming in list(self._incoming.values()):
            if incoming.peer == name:
                incoming.handover.peer_dead(f"prefill replica {name} is gone: {reason}")
                self._settle(incoming, now)

    # ----------------------------------------------------------------------------- start and leave

    def start(
        self,
        peer: str,
        request_id: str,
        sequence: Tracked,
        firsts: Sequence[int],
        deadline: float,
        now: float,
        after_mismatch: bool = False,
    ) -> None:
        """Have `peer` prefill the prompt, and write the pages in `sequence.tables` from `firsts`
        on."""
        ledger = self._ledgers[peer]
        handover = ledger.start(len(self._groups), now, self._timeout_s)
        targets = tuple(
            GroupPages(first, pack_ints(table[first:]))
            for first, table in zip(firsts, sequence.tables, strict=True)
        )
        reserve = Reserve(
            handover.serial,
            ledger.floor,
            request_id,
            pack_ints(sequence.buffer[: sequence.prompt_len]),
            sequence.root,
            b"".join(sequence.hashes),
            sequence.params,
            targets,
            deadline - now,
            self._verify,
            sequence.tenant,
            sequence.num_delivered,
            sequence.priority,
        )
        incoming = _Incoming(peer, handover, reserve, deadline, sequence, after_mismatch)
        self._incoming[peer, handover.serial] = self._by_sequence[sequence] = incoming
        self._send(peer, reserve)

    def leave(self, sequence: Tracked, reason: str, now: float) -> None:
        """The request has ended. It keeps the pages that no write can reach; nothing when there is
        no handover."""
        incoming = self._by_sequence.get(sequence)
        if incoming is None:
            return
        self._cancel(incoming, reason, now)
        self._part(incoming)
        self._settle(incoming, now)

    def _cancel(self, incoming: _Incoming, reason: str, now: float) -> None:
        incoming.handover.cancel(reason, now)
        if incoming.handover.state is ReceiverState.CLOSING:
            self._send_cancel(incoming)

    def _send_cancel(self, incoming: _Incoming) -> None:
        floor = self._ledgers[incoming.peer].floor
        self._send(incoming.peer, Cancel(incoming.handover.serial, floor))

    def _part(self, incoming: _Incoming) -> Tracked:
        """The request goes its own way; pages that a write may still reach go into quarantine."""
        sequence, handover = incoming.sequence, incoming.handover
        assert sequence is not None
        incoming.sequence = None
        del self._by_sequence[sequence]
        if not handover.may_reuse_targets:
            targets = zip(sequence.tables, incoming.reserve.targets, handover.landed, strict=True)
            for table, target, landed in targets:
                first = target.first_page + landed
                incoming.quarantine.append(table[first:])
                del table[first:]
        return sequence

    # ----------------------------------------------------------------------------------------- news

    def receive(self, sender: str, message: News, now: float) -> None:
        incoming = self._incoming.get((sender, message.serial))
        if incoming is None:
            return  # about a handover that is settled
        handover, sequence = incoming.handover, incoming.sequence
        match message:
            case PrefillDone():
                if handover.prefill_done(now) and sequence is not None:
                    self._owner.first_token(sequence, message, now)
            case PagesWritten(_, landed, complete):
                if handover.pages_written(landed, complete, now) and complete:
                    incoming.complete = message
            case HandoverClosed(_, landed, reason):
                handover.handover_closed(landed, f"{sender} ended the handover: {reason}")
            case Unknown():
                if handover.is_unknown(now):
                    floor, timeout_s = self._ledgers[sender].floor, incoming.deadline - now
                    again = msgspec.structs.replace(
                        incoming.reserve, floor=floor, timeout_s=timeout_s
                    )
                    self._send(sender, again)
            case _:
                assert_never(message)
        self._settle(incoming, now)

    def settled_heard(self, sender: str, message: SettledHeard) -> None:
        self._ledgers[sender].settled_heard(message.floor)

    def tick(self, now: float) -> None:
        for incoming in list(self._incoming.values()):
            self._tick(incoming, now)
        for name, ledger in self._ledgers.items():
            if ledger.must_tell_floor(now):
                self._send(name, Settled(ledger.floor))

    def _tick(self, incoming: _Incoming, now: float) -> None:
        handover = incoming.handover
        match handover.tick(now):
            case ReceiverNeed.NOTHING:
                pass
            case ReceiverNeed.ASK:
                floor = self._ledgers[incoming.peer].floor
                self._send(incoming.peer, Ask(handover.serial, floor))
            case ReceiverNeed.CANCEL:
                self._send_cancel(incoming)
            case ReceiverNeed.GIVE_UP:
                self._cancel(incoming, f"nothing heard for {self._timeout_s:g} s", now)
                if handover.state is ReceiverState.CLOSING:
                    self._fail(incoming, now)
                self._settle(incoming, now)
        if handover.is_overdue and not incoming.is_counted_overdue:
            incoming.is_counted_overdue = True
            self.num_overdue += 1
            num_pages = sum(map(len, incoming.quarantine))
            self._emit(Warn(f"{num_pages} pages wait for {incoming.peer} to end its writes"))

    # -------------------------------------------------------------------------------------- the end

    def _settle(self, incoming: _Incoming, now: float) -> None:
        """Once no write can land, the request goes on, and pages leave the quarantine.
        Idempotent."""
        handover = incoming.handover
        key = (incoming.peer, handover.serial)
        if not handover.may_reuse_targets or key not in self._incoming:
            return
        del self._incoming[key]
        if incoming.peer in self._ledgers:
            self._ledgers[incoming.peer].settle(handover.serial)
        for group, pages in enumerate(incoming.quarantine):
            self._index.release(group, pages)
        if incoming.sequence is None:
            return
        if handover.state is not ReceiverState.LANDED:
            self._fail(incoming, now)
        elif self._verify:
            self._ask_digests(incoming)
            self._compare_digests(incoming, now)
        else:
            self._land(incoming, now)

    def _land(self, incoming: _Incoming, now: float) -> None:
        assert incoming.complete is not None
        self._owner.landed(self._part(incoming), incoming.complete, now)

    def _fail(self, incoming: _Incoming, now: float) -> None:
        # With `verify`, what has landed in a handover without digests was not compared.
        landed = incoming.handover.landed
        valid = [0] * len(landed) if self._verify else landed
        self._end(incoming, incoming.handover.reason, valid, now)

    def _end(
        self,
        incoming: _Incoming,
        reason: str,
        valid: Sequence[int],
        now: float,
        is_mismatch: bool = False,
    ) -> None:
        """`valid`: by layer group, how many of the first target pages to keep."""
        self.num_failed += 1
        request_id, peer = incoming.reserve.request_id, incoming.peer
        self._emit(Warn(f"a handover of {request_id} from {peer} failed: {reason}"))
        assert incoming.sequence is not None
        self._publish(incoming.sequence, incoming.reserve, valid)
        sequence = self._part(incoming)
        self._scheduler.release_pages(sequence)
        self._owner.failed(sequence, peer, is_mismatch, now)

    def _publish(self, sequence: Tracked, reserve: Reserve, valid: Sequence[int]) -> None:
        """Make full pages that have landed findable, as far as they continue what was cached."""
        ends = [t.first_page + count for t, count in zip(reserve.targets, valid, strict=True)]
        needed = [e for e, g in zip(ends, self._groups, strict=True) if g.kind != "sliding"]
        begin = sequence.num_indexed
        end = min(sequence.prompt_len // self._page_tokens, min(needed, default=max(ends)))
        if end <= begin:
            return
        slots = [
            [slot if page < last else -1 for page, slot in enumerate(table[begin:end], begin)]
            for table, last in zip(sequence.tables, ends, strict=True)
        ]
        parent = sequence.hashes[begin - 1] if begin else sequence.root
        tenant = sequence.tenant or None
        self._index.insert(parent, sequence.hashes[begin:end], slots, begin, tenant)

    # --------------------------------------------------------------------------------- verification

    def _ask_digests(self, incoming: _Incoming) -> None:
        incoming.digests = {}
        for group, target in enumerate(incoming.reserve.targets):
            if target.pages:
                number = next(self._numbers)
                self._digests[number] = (incoming, group)
                self._emit(Digest(number, group, unpack_ints(target.pages)))
            else:
                incoming.digests[group] = b""

    def digested(self, event: Digested, now: float) -> None:
        incoming, group = self._digests.pop(event.digest_id)
        if incoming.sequence is not None:
            assert incoming.digests is not None
            incoming.digests[group] = event.digests.tobytes()
            self._compare_digests(incoming, now)

    def _compare_digests(self, incoming: _Incoming, now: float) -> None:
        """Once all are there. What differs first, and all after it, is fetched once more from the
        same peer; if that differs again, none of it is kept."""
        ours, complete = incoming.digests, incoming.complete
        targets = incoming.reserve.targets
        assert ours is not None
        assert complete is not None
        if len(ours) < len(targets):
            return
        theirs = complete.digests
        if len(theirs) != len(targets):
            theirs = (b"",) * len(targets)
        wrong = [_differing(ours[group], theirs[group]) for group in range(len(targets))]
        num_wrong = sum(map(len, wrong))
        if not num_wrong:
            self._land(incoming, now)
            return
        self.num_mismatches += num_wrong
        valid = [
            0 if incoming.after_mismatch else pages[0] if pages else count
            for pages, count in zip(wrong, incoming.handover.landed, strict=True)
        ]
        places = "; ".join(
            f"layer group {group}: pages {[targets[group].first_page + page for page in pages]}"
            for group, pages in enumerate(wrong)
            if pages
        )
        reason = f"pages differ from their source: {places}"
        self._end(incoming, reason, valid, now, is_mismatch=True)

    # ------------------------------------------------------------------------------------ integrity

    @property
    def is_idle(self) -> bool:
        return not (self._incoming or self._by_sequence or self._digests)

    def held(self) -> Iterator[tuple[int, list[int]]]:
        """(group, pages) of all references that are held here, and not by a sequence."""
        for incoming in self._incoming.values():
            yield from enumerate(incoming.quarantine)

    def check_integrity(self) -> None:
        serials = {
            (name, serial) for name, ledger in self._ledgers.items() for serial in ledger.open
        }
        assert serials == self._incoming.keys(), "handovers are not those in the ledgers"
        for (peer, serial), incoming in self._incoming.items():
            handover, sequence = incoming.handover, incoming.sequence
            assert (incoming.peer, handover.serial) == (peer, serial)
            if sequence is None:
                assert handover.state is ReceiverState.CLOSING
            else:
                assert handover.state is ReceiverState.RESERVED
                assert self._by_sequence[sequence] is incoming
        for sequence, incoming in self._by_sequence.items():
            assert incoming.sequence is sequence
            assert not incoming.quarantine
            is_verified = incoming.handover.state is ReceiverState.LANDED
            assert is_verified == ((incoming.peer, incoming.handover.serial) not in self._incoming)


def _differing(ours: bytes, theirs: bytes) -> list[int]:
    """Numbers of the pages whose digests differ; all of them if the lengths do."""
    one = np.frombuffer(ours, np.uint64)
    if len(ours) != len(theirs):
        return list(range(len(one)))
    return np.flatnonzero(one != np.frombuffer(theirs, np.uint64)).tolist()
