"""One request's KV moving from a prefill replica to a decode replica: both sides' state machines,
and what each side keeps about its handovers with one peer.

Pure; time is an argument. A leader holds the objects, carries messages between the two sides, posts
the writes and reports their ends. Two rules are protected, whatever is lost, late, repeated or
overtaken on the way: a target page is not used again while a write can still land in it, a source
page not while a write still reads it. Only the transport's result of a write says that it has ended
(a failed status elsewhere does not), or the confirmed death of the process that posted it.

A handover is named by its serial, which the receiver draws per sender, ascending, between two
process incarnations; whoever restarts begins with empty ledgers on both sides.

  sender    OPEN -> CLOSED                 every page was written: complete
            OPEN -> DRAINING -> CLOSED     cancelled, timed out, or a page failed twice: nothing
                                           new, wait for what is in flight; after `_DRAIN_S` the
                                           link is to be broken, after as long again the process
                                           must end
  receiver  RESERVED -> LANDED             the first token and the word "complete", in any order
            RESERVED -> CLOSING -> CLOSED  cancelled, out of time, or nothing heard for
                                           `patience_s`: pages not known to have landed are in
                                           quarantine until the sender's last word, or its death
            RESERVED -> CLOSED             the sender ended it early, or is dead

  message to the sender: what it does         message to the receiver: what it says
  Reserve  start; if known, report            PrefillDone     the first token
  Ask      report; if not known, Unknown      PagesWritten    so many pages have landed; if
  Cancel   drain, report; if not known,                       `complete`, the last word
           record as closed, so that a        HandoverClosed  the last word of one ended early
           later Reserve starts nothing       Unknown         Reserve is to be sent again
  Settled  forget; SettledHeard               SettledHeard    Settled need not be repeated

Every message to the sender carries the receiver's floor, the lowest serial that it has not settled.
The sender forgets what is below and ignores what arrives for it, so that a late message never
starts a write, and nothing is kept for longer than it is needed. Until then it keeps how a
handover ended, and repeats that. Loss is repaired by the receiver, which asks for what it has not
heard of for a while, and repeats Cancel and Settled until they are answered.

Source pages may be released once the sender `is_closed`; target pages when `may_reuse_targets`.
Methods for events return whether they were accepted; an event that is late, repeated or out of
place changes nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from transfer.transport import Int32Array

_ASK_AGAIN_S = 1.0
_ASK_AGAIN_MOST_S = 8.0
"""Doubled from the one to the other while nothing changes."""
_REPEAT_S = 1.0
"""Cancel and Settled, until they are answered."""
_RETRY_S = 1.2
"""Pages whose write failed are written again after this, once: a lost peer is connected again once
a second."""
_DRAIN_S = 30.0


class SenderState(enum.Enum):
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


class ReceiverState(enum.Enum):
    RESERVED = "reserved"
    LANDED = "landed"
    CLOSING = "closing"
    CLOSED = "closed"


class SenderAnswer(enum.Enum):
    """What the sender does about a message."""

    NOTHING = "nothing"
    START = "start"
    """Add a handover under this serial."""
    REPORT = "report"
    """Say how the handover stands: its first token, its progress or last word."""
    UNKNOWN = "unknown"


class ReceiverNeed(enum.Enum):
    """What the receiver must do as time has passed."""

    NOTHING = "nothing"
    ASK = "ask"
    CANCEL = "cancel"
    GIVE_UP = "give up"
    """Nothing was heard for so long that this handover should be cancelled."""


class WritesStuckError(RuntimeError):
    """Writes have no end although their link was broken: only the end of this process ends them."""


class ReadyPages(NamedTuple):
    """Pages of one layer group to write now: page first_page + i, source_slots[i] ->
    target_slots[i]."""

    group: int
    first_page: int
    source_slots: Int32Array
    target_slots: Int32Array

    def cut(self, num_pages: int) -> list[ReadyPages]:
        """The same, at most so many at once."""
        return [
            ReadyPages(
                self.group,
                self.first_page + start,
                self.source_slots[start : start + num_pages],
                self.target_slots[start : start + num_pages],
            )
            for start in range(0, len(self.source_slots), num_pages)
        ]


class _Batch:
    """Pages taken together, and the writes that move them."""

    __slots__ = ("error", "pages", "unfinished")

    def __init__(self, pages: ReadyPages, unfinished: int) -> None:
        self.pages = pages
        self.unfinished = unfinished
        self.error = ""


class SenderHandover:
    """The prefill side."""

    def __init__(
        self,
        targets: Sequence[tuple[int, Int32Array]],
        deadline: float,
        patience_s: float,
        verify: bool = False,
    ) -> None:
        """By layer group (first page, target slots): page i goes to slots[i - first page]. That no
        write to the peer ends for `patience_s` while some are in flight is a reason to cancel."""
        self.state = SenderState.OPEN
        self.reason = ""
        """Why it ended early; empty while all is well."""
        self.num_pages = sum(len(slots) for _, slots in targets)
        self.bytes_moved = 0
        self.descriptors = 0
        self.transfer_s = 0.0
        """Totals over the writes that succeeded."""
        self.landed = [0] * len(targets)
        """By group: the first so many target pages have landed."""
        self.verify = verify
        self.first_token: object = None
        """For the leader: what it said with the first token, to be repeated."""
        self.digests: tuple[bytes, ...] | None = None
        """For the leader, with `verify`: the pages' digests, by group, once it has them."""
        self._deadline = deadline
        self._patience_s = patience_s
        self._targets = [(first, np.asarray(slots, dtype=np.int32)) for first, slots in targets]
        self._next_page = [first for first, _ in targets]
        self._is_final = False
        """No further pages will become ready."""
        self._landed_ahead: list[dict[int, int]] = [{} for _ in targets]
        """By group: first -> end of runs that landed before a page in front of them."""
        self._outstanding: dict[int, _Batch] = {}
        """By write id."""
        self._retries: list[ReadyPages] = []
        self._retry_at = 0.0
        self._retried: set[tuple[int, int]] = set()
        """(group, first page) of batches that failed once."""
        self._last_end = 0.0
        """When a write to the peer ended, or the first of ours was posted."""
        self._drain_until = 0.0
        self._is_link_broken = False

    @property
    def outstanding(self) -> list[int]:
        """Writes in flight."""
        return list(self._outstanding)

    @property
    def is_closed(self) -> bool:
        """No write is in flight and none will follow."""
        return self.state is SenderState.CLOSED

    @property
    def is_complete(self) -> bool:
        """Closed, with every page written."""
        return self.is_closed and not self.reason

    @property
    def has_last_word(self) -> bool:
        """Closed, and all that is said then is known."""
        return self.is_closed and bool(self.reason or not self.verify or self.digests is not None)

    def take(
        self,
        num_complete_pages: int,
        tables: Sequence[Int32Array | Sequence[int]],
        final: bool = False,
    ) -> list[ReadyPages]:
        """Pages that have become ready since the last call; the caller now owes their writes.

        Pages before `num_complete_pages` are complete; `final` says that all are, a partial last
        one included. `tables` maps page to source slot, by layer group. The caller posts the writes
        of each item and calls `posted` for all of them before it reports any event. Raises
        ValueError, with nothing taken, when a table lacks a ready page.
        """
        if self.state is not SenderState.OPEN:
            return []
        ready = []
        for group, (first, targets) in enumerate(self._targets):
            start, end = self._next_page[group], first + len(targets)
            if not final:
                end = min(end, num_complete_pages)
            if start >= end:
                continue
            sources = np.asarray(tables[group][start:end], dtype=np.int32)
            if len(sources) < end - start or sources.min() < 0:
                raise ValueError(
                    f"pages {start} to {end - 1} of layer group {group} have no source"
                )
            ready.append(ReadyPages(group, start, sources, targets[start - first : end - first]))
        for group, start, sources, _ in ready:
            self._next_page[group] = start + len(sources)
        self._is_final = self._is_final or final
        if not ready:
            self._close_if_done()
        return ready

    def take_retries(self, now: float) -> list[ReadyPages]:
        """Pages whose write failed and whose time has come; like `take`."""
        if not self._retries or now < self._retry_at:
            return []
        retries, self._retries = self._retries, []
        return retries

    def posted(self, pages: ReadyPages, write_ids: Sequence[int], now: float) -> None:
        """The writes that move taken `pages` have been posted."""
        if not self._outstanding:
            self._last_end = now
        batch = _Batch(pages, len(write_ids))
        for write_id in write_ids:
            self._outstanding[write_id] = batch

    def link_lives(self, now: float) -> None:
        """A write to the same peer has ended, perhaps another handover's: those take turns."""
        self._last_end = max(self._last_end, now)

    def write_done(
        self,
        write_id: int,
        error: str | None,
        bytes_moved: int,
        descriptors: int,
        seconds: float,
        now: float,
    ) -> bool:
        """A write has ended: no byte of it will follow, and its source pages are no longer read."""
        batch = self._outstanding.pop(write_id, None)
        if batch is None:
            return False
        self._last_end = now
        batch.unfinished -= 1
        if error is None:
            self.bytes_moved += bytes_moved
            self.descriptors += descriptors
            self.transfer_s += seconds
        else:
            batch.error = error
        if not batch.unfinished:
            self._batch_done(batch, now)
        self._close_if_done()
        return True

    def _batch_done(self, batch: _Batch, now: float) -> None:
        group, first, sources, _ = batch.pages
        if not batch.error:
            ahead, origin = self._landed_ahead[group], self._targets[group][0]
            ahead[first] = first + len(sources)
            while (end := ahead.pop(origin + self.landed[group], None)) is not None:
                self.landed[group] = end - origin
        elif (group, first) in self._retried or now + _RETRY_S >= self._deadline:
            self._drain(f"a write failed: {batch.error}", now)
        elif self.state is SenderState.OPEN:
            self._retried.add((group, first))
            self._retries.append(batch.pages)
            self._retry_at = now + _RETRY_S

    def cancel(self, reason: str, now: float) -> bool:
        """Take and post nothing more."""
        if self.state is not SenderState.OPEN:
            return False
        self._drain(reason or "cancelled", now)
        self._close_if_done()
        return True

    def tick(self, now: float) -> bool:
        """Time has passed. True: break the link to the peer, so that its writes end. Raises
        WritesStuckError if that did not help."""
        if self.state is SenderState.OPEN:
            if now > self._deadline:
                self.cancel("timed out", now)
            elif self._outstanding and now > self._last_end + self._patience_s:
                self.cancel(f"no write to the peer has ended for {self._patience_s:g} s", now)
        elif self.state is SenderState.DRAINING and now > self._drain_until:
            if self._is_link_broken:
                raise WritesStuckError(f"{len(self._outstanding)} writes do not end: {self.reason}")
            self._is_link_broken = True
            self._drain_until = now + _DRAIN_S
            return True
        return False

    def _drain(self, reason: str, now: float) -> None:
        if self.state is SenderState.OPEN:
            self.state = SenderState.DRAINING
            self.reason = reason
            self._retries = []
            self._drain_until = now + _DRAIN_S

    def _close_if_done(self) -> None:
        is_done = self.state is SenderState.DRAINING or (self._is_final and not self._retries)
        if is_done and not self._outstanding:
            self.state = SenderState.CLOSED


class SenderLedger:
    """A sender's handovers with one incarnation of one receiver: those that go on, and how those
    ended that the receiver has not settled yet."""

    def __init__(self) -> None:
        self.records: dict[int, SenderHandover] = {}
        """By serial."""
        self.floor = 0

    def reserve(self, serial: int, floor: int) -> SenderAnswer:
        if not self._admits(serial, floor):
            return SenderAnswer.NOTHING
        return SenderAnswer.REPORT if serial in self.records else SenderAnswer.START

    def ask(self, serial: int, floor: int) -> SenderAnswer:
        if not self._admits(serial, floor):
            return SenderAnswer.NOTHING
        return SenderAnswer.REPORT if serial in self.records else SenderAnswer.UNKNOWN

    def cancel(self, serial: int, floor: int, now: float) -> SenderAnswer:
        if not self._admits(serial, floor):
            return SenderAnswer.NOTHING
        record = self.records.setdefault(serial, SenderHandover((), now, 0.0))
        record.cancel("cancelled", now)
        return SenderAnswer.REPORT

    def settled(self, floor: int) -> None:
        """The receiver needs nothing below `floor` any more. What has no last word yet cannot have
        been settled: that, and all after it, is kept."""
        if floor > self.floor:
            live = (serial for serial, kept in self.records.items() if not kept.has_last_word)
            self.floor = max(self.floor, min((floor, *live)))
            for serial in [serial for serial in self.records if serial < self.floor]:
                del self.records[serial]

    def _admits(self, serial: int, floor: int) -> bool:
        self.settled(floor)
        return serial >= self.floor


class ReceiverHandover:
    """The decode side."""

    def __init__(self, serial: int, num_groups: int, now: float, patience_s: float) -> None:
        self.serial = serial
        self.state = ReceiverState.RESERVED
        self.reason = ""
        """Why it ended early."""
        self.landed = (0,) * num_groups
        """By group: the first so many target pages have landed, for good."""
        self.has_first_token = False
        self.has_pages = False
        """Every page has landed."""
        self.is_overdue = False
        """CLOSING for longer than `patience_s`."""
        self._patience_s = patience_s
        self._heard_at = now
        self._ask_after_s = _ASK_AGAIN_S
        self._next_at = now + _ASK_AGAIN_S
        """When to ask, or to cancel, again."""
        self._closing_since = 0.0

    @property
    def may_reuse_targets(self) -> bool:
        """No write can land any more: in LANDED the request owns its pages, in CLOSED they can be
        freed."""
        return self.state is ReceiverState.LANDED or self.state is ReceiverState.CLOSED

    def prefill_done(self, now: float) -> bool:
        if self.state is not ReceiverState.RESERVED:
            return False
        is_new = not self.has_first_token
        self._heard(now, is_new)
        self.has_first_token = True
        self._land_if_done()
        return is_new

    def pages_written(self, landed: Sequence[int], complete: bool, now: float) -> bool:
        """`complete` is also the sender's word that no write is in flight: it ends a quarantine."""
        if self.may_reuse_targets or self.has_pages:
            return False
        before = self.landed
        if self.state is ReceiverState.RESERVED:
            self._note_landed(landed)
            self._heard(now, complete or self.landed != before)
            self.has_pages = complete
            self._land_if_done()
        elif complete:
            self.state = ReceiverState.CLOSED
        return complete or self.landed != before

    def is_unknown(self, now: float) -> bool:
        """The sender has never heard of it. Accepted: Reserve is to be sent again."""
        if self.state is not ReceiverState.RESERVED:
            return False
        self._heard(now, False)
        return True

    def handover_closed(self, landed: Sequence[int], reason: str) -> bool:
        """The sender ended it early; no write is in flight and none will follow."""
        if self.state is ReceiverState.RESERVED:
            self._note_landed(landed)
        return self._close(reason)

    def peer_dead(self, reason: str) -> bool:
        """The sender's processes are known to have ended, and with them their writes."""
        return self._close(reason)

    def cancel(self, reason: str, now: float) -> bool:
        """The caller sends Cancel if the state is then CLOSING; with all pages there it is CLOSED
        at once."""
        if self.state is not ReceiverState.RESERVED:
            return False
        self.reason = reason
        self.state = ReceiverState.CLOSED if self.has_pages else ReceiverState.CLOSING
        self._closing_since = now
        self._next_at = now + _REPEAT_S
        return True

    def tick(self, now: float) -> ReceiverNeed:
        if self.state is ReceiverState.CLOSING:
            self.is_overdue = now > self._closing_since + self._patience_s
            if now >= self._next_at:
                self._next_at = now + _REPEAT_S
                return ReceiverNeed.CANCEL
        elif self.state is ReceiverState.RESERVED:
            if now > self._heard_at + self._patience_s:
                return ReceiverNeed.GIVE_UP
            if now >= self._next_at:
                self._next_at = now + self._ask_after_s
                self._ask_after_s = min(2 * self._ask_after_s, _ASK_AGAIN_MOST_S)
                return ReceiverNeed.ASK
        return ReceiverNeed.NOTHING

    def _note_landed(self, landed: Sequence[int]) -> None:
        if len(landed) == len(self.landed):
            self.landed = tuple(map(max, landed, self.landed))

    def _heard(self, now: float, is_new: bool) -> None:
        self._heard_at = now
        if is_new:
            self._ask_after_s = _ASK_AGAIN_S
        self._next_at = now + self._ask_after_s

    def _close(self, reason: str) -> bool:
        if self.may_reuse_targets:
            return False
        self.reason = self.reason or reason
        self.state = ReceiverState.CLOSED
        return True

    def _land_if_done(self) -> None:
        if self.has_first_token and self.has_pages:
            self.state = ReceiverState.LANDED


class ReceiverLedger:
    """A receiver's handovers with one incarnation of one sender."""

    def __init__(self) -> None:
        self.open: dict[int, ReceiverHandover] = {}
        """Not settled, by serial, ascending."""
        self._next_serial = 1
        self._floor_heard = 1
        """The sender has confirmed it."""
        self._settle_at = 0.0

    @property
    def floor(self) -> int:
        """The lowest serial not settled."""
        return next(iter(self.open), self._next_serial)

    def start(self, num_groups: int, now: float, patience_s: float) -> ReceiverHandover:
        handover = ReceiverHandover(self._next_serial, num_groups, now, patience_s)
        self.open[handover.serial] = handover
        self._next_serial += 1
        return handover

    def settle(self, serial: int) -> None:
        """The handover `may_reuse_targets`: nothing more is wanted of the sender."""
        del self.open[serial]

    def settled_heard(self, floor: int) -> None:
        self._floor_heard = max(self._floor_heard, floor)

    def must_tell_floor(self, now: float) -> bool:
        """Whether Settled is to be sent now."""
        if self.floor <= self._floor_heard or now < self._settle_at:
            return False
        self._settle_at = now + _REPEAT_S
        return True
