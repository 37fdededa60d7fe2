"""One request's KV moving from a prefill replica to a decode replica: both sides' state machines.

Pure. A leader holds one object per handover, under the key (request id, attempt), and feeds it what
happens; it does the sending and posting itself. The rule that both protect: a target page is not
used again while a write can still land in it, a source page not while a write still reads it. Hence

  sender    OPEN -> CLOSED                every page was written
            OPEN -> DRAINING -> CLOSED    cancelled or failed: nothing new, wait for what is in
            flight
  receiver  RESERVED -> LANDED            PrefillDone and PagesWritten came, in either order
            RESERVED -> CLOSING -> CLOSED cancelled: pages in quarantine until the sender answers or
            is dead RESERVED -> CLOSED            the sender gave up, or is dead

Source pages may be released once the sender `is_closed`; target pages when `may_reuse_targets`.
Events return whether they were accepted; one that is late, repeated or out of place changes nothing
and returns False. A deadline is the leader's: it cancels.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from transfer.transport import Int32Array


class SenderState(enum.Enum):
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


class ReceiverState(enum.Enum):
    RESERVED = "reserved"
    LANDED = "landed"
    CLOSING = "closing"
    CLOSED = "closed"


class ReadyPages(NamedTuple):
    """Pages of one layer group to write now: source_slots[i] -> target_slots[i]."""

    group: int
    source_slots: Int32Array
    target_slots: Int32Array


class SenderHandover:
    """The prefill side."""

    def __init__(self, targets: Sequence[tuple[int, Int32Array]]) -> None:
        """By layer group (first page, target slots): page i goes to slots[i - first page]."""
        self.state = SenderState.OPEN
        self.reason = ""
        """Why it was cancelled or failed; empty while all is well."""
        self.num_pages = sum(len(slots) for _, slots in targets)
        self.bytes_moved = 0
        self.descriptors = 0
        self.transfer_s = 0.0
        """Totals over the writes that succeeded."""
        self._targets = [(first, np.asarray(slots, dtype=np.int32)) for first, slots in targets]
        self._next_page = [first for first, _ in targets]
        self._outstanding: set[int] = set()

    @property
    def outstanding(self) -> int:
        """Writes in flight."""
        return len(self._outstanding)

    @property
    def is_closed(self) -> bool:
        """No write is in flight and none will follow."""
        return self.state is SenderState.CLOSED

    @property
    def is_complete(self) -> bool:
        """Closed, with every page written."""
        return self.is_closed and not self.reason

    def take(
        self,
        num_complete_pages: int,
        tables: Sequence[Int32Array | Sequence[int]],
        final: bool = False,
    ) -> list[ReadyPages]:
        """Pages that have become ready since the last call; the caller now owes their writes.

        Pages before `num_complete_pages` are complete; `final` says that all are, a partial last
        one included. `tables` maps page to source slot, by layer group. The caller posts a write
        for each item and calls `write_submitted` for all of them before it reports any event; where
        posting fails, it calls `cancel`. Raises ValueError, with nothing taken, when a table lacks
        a ready page.
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
            ready.append(ReadyPages(group, sources, targets[start - first : end - first]))
        for group, sources, _ in ready:
            self._next_page[group] += len(sources)
        if not ready:
            self._close_if_done()
        return ready

    def write_submitted(self, write_id: int) -> bool:
        """A write of taken pages has been posted. Call it also when the state has left OPEN
        meanwhile."""
        if self.is_closed or write_id in self._outstanding:
            return False
        self._outstanding.add(write_id)
        return True

    def write_done(
        self, write_id: int, ok: bool, bytes_moved: int, descriptors: int, seconds: float
    ) -> bool:
        """A write has ended: no byte of it will follow, and its source pages are no longer read."""
        if write_id not in self._outstanding:
            return False
        self._outstanding.remove(write_id)
        if ok:
            self.bytes_moved += bytes_moved
            self.descriptors += descriptors
            self.transfer_s += seconds
        else:
            self._drain("a write failed")
        self._close_if_done()
        return True

    def cancel(self, reason: str) -> bool:
        """Take and post nothing more."""
        if self.state is not SenderState.OPEN:
            return False
        self._drain(reason or "cancelled")
        self._close_if_done()
        return True

    def _drain(self, reason: str) -> None:
        if self.state is SenderState.OPEN:
            self.state = SenderState.DRAINING
            self.reason = reason

    def _close_if_done(self) -> None:
        all_taken = all(
            page == first + len(slots)
            for page, (first, slots) in zip(self._next_page, self._targets, strict=True)
        )
        if not self._outstanding and (all_taken or self.state is SenderState.DRAINING):
            self.state = SenderState.CLOSED


class ReceiverHandover:
    """The decode side."""

    def __init__(self) -> None:
        self.state = ReceiverState.RESERVED
        self.reason = ""
        """Why it ended early."""
        self._has_first_token = False
        self._has_pages = False

    @property
    def has_first_token(self) -> bool:
        return self._has_first_token

    @property
    def has_pages(self) -> bool:
        """Every page has landed; they hold valid KV even if the handover then ends early."""
        return self._has_pages

    @property
    def may_reuse_targets(self) -> bool:
        """No write can land any more: in LANDED the request owns its pages, in CLOSED they can be
        freed."""
        return self.state in (ReceiverState.LANDED, ReceiverState.CLOSED)

    def prefill_done(self) -> bool:
        if self.state is not ReceiverState.RESERVED or self._has_first_token:
            return False
        self._has_first_token = True
        self._land_if_done()
        return True

    def pages_written(self) -> bool:
        """Also the sender's word that no write is in flight, so it ends a quarantine."""
        if self._has_pages or self.may_reuse_targets:
            return False
        self._has_pages = True
        if self.state is ReceiverState.CLOSING:
            self.state = ReceiverState.CLOSED
        self._land_if_done()
        return True

    def cancel(self, reason: str) -> bool:
        """The caller sends Cancel if the state is then CLOSING; with all pages there it is CLOSED
        at once."""
        if self.state is not ReceiverState.RESERVED:
            return False
        self.reason = reason
        self.state = ReceiverState.CLOSED if self._has_pages else ReceiverState.CLOSING
        return True

    def handover_closed(self, reason: str) -> bool:
        """The sender ended it early; no write is in flight and none will follow."""
        return self._close(reason)

    def peer_dead(self, reason: str) -> bool:
        """The sender's processes are known to have ended, and with them their writes."""
        return self._close(reason)

    def _close(self, reason: str) -> bool:
        if self.may_reuse_targets:
            return False
        self.reason = self.reason or reason
        self.state = ReceiverState.CLOSED
        return True

    def _land_if_done(self) -> None:
        if self.state is ReceiverState.RESERVED and self._has_first_token and self._has_pages:
            self.state = ReceiverState.LANDED
