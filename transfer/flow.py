"""How the writes to one peer take turns. Pure.

Writes wait in one queue per handover and are cut into pieces of whole pages. Handovers take turns
by deficit round robin (Shreedhar and Varghese, SIGCOMM 1995): each turn adds a quantum of bytes to
what a handover may send, what it cannot use for a whole page it keeps, and an empty queue keeps
nothing. So while two handovers have something waiting, the bytes of theirs that were posted differ
by at most a quantum and a page, and a short one waits for a turn of each other one, however long
those are.

Bytes in flight are bounded, except that one piece may always be: the bound may be smaller than a
page.
"""

from __future__ import annotations

import collections
import dataclasses

from transfer.transport import Int32Array, PagePart


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Pages of one write, to be posted at once; at first all of them."""

    key: int
    region: int
    source_pages: Int32Array
    target_pages: Int32Array
    part: PagePart | None
    page_bytes: int
    """That move per page."""

    @property
    def num_bytes(self) -> int:
        return len(self.source_pages) * self.page_bytes

    def cut(self, num_pages: int) -> tuple[Piece, Piece]:
        return (
            dataclasses.replace(
                self,
                source_pages=self.source_pages[:num_pages],
                target_pages=self.target_pages[:num_pages],
            ),
            dataclasses.replace(
                self,
                source_pages=self.source_pages[num_pages:],
                target_pages=self.target_pages[num_pages:],
            ),
        )


@dataclasses.dataclass(slots=True)
class _Turns:
    """One handover's share of a lane."""

    deficit: int
    """Bytes that it may send in this turn, or, while others have theirs, in its next one."""
    writes: collections.deque[Piece] = dataclasses.field(default_factory=collections.deque)


class Lane:
    """The writes to one peer that wait, and how many bytes are in flight."""

    def __init__(self, quantum: int, max_bytes_in_flight: int) -> None:
        if quantum < 1:
            raise ValueError(f"a quantum of {quantum} bytes")
        self._quantum = quantum
        self._max_bytes = max_bytes_in_flight
        self._handovers: dict[int, _Turns] = {}
        """Those with something waiting; whose turn it is comes first."""
        self.bytes_in_flight = 0
        self._num_in_flight = 0

    def push(self, handover: int, write: Piece) -> None:
        """Queue a write behind the others of its handover. A new handover's turn comes last."""
        if write.num_bytes < 1:
            raise ValueError("a write without bytes")
        self._handovers.setdefault(handover, _Turns(self._quantum)).writes.append(write)

    def pop(self) -> Piece | None:
        """The next piece to post, in flight from now on until `ended`; None: nothing waits, or what
        is next has to wait for bytes in flight."""
        while self._handovers:
            handover, turns = next(iter(self._handovers.items()))
            write = turns.writes[0]
            num_pages = min(len(write.source_pages), turns.deficit // write.page_bytes)
            if not num_pages:
                turns.deficit += self._quantum
                self._handovers[handover] = self._handovers.pop(handover)
                continue
            num_bytes = num_pages * write.page_bytes
            if self._num_in_flight and self.bytes_in_flight + num_bytes > self._max_bytes:
                return None
            turns.deficit -= num_bytes
            self._num_in_flight += 1
            self.bytes_in_flight += num_bytes
            piece, rest = write.cut(num_pages)
            if len(rest.source_pages):
                turns.writes[0] = rest
            else:
                turns.writes.popleft()
                if not turns.writes:
                    del self._handovers[handover]
            return piece
        return None

    def ended(self, piece: Piece) -> None:
        """A piece that `pop` returned is not in flight any more."""
        self._num_in_flight -= 1
        self.bytes_in_flight -= piece.num_bytes

    def drop(self, key: int) -> None:
        """Forget what waits of this write."""
        for handover, turns in list(self._handovers.items()):
            turns.writes = collections.deque(write for write in turns.writes if write.key != key)
            if not turns.writes:
                del self._handovers[handover]
