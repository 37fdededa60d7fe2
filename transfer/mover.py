"""One thread that owns a transport: everything that may block or copy happens there, off the event
loop.

Commands go in by queue; results come out through `on_result`, called on this thread. Writes wait in
a lane per peer (`transfer/flow.py`) and are posted piece by piece, one per peer at a time, as the
transport may copy inline. While a write is in flight here, or a peer may be writing and needs our
help (`expect`), the transport is polled as often as it asks for; else the thread sleeps on its
queue and polls now and then, so that peers can connect. It never spins.

A write that fails may have torn down the connection: the peer is connected again, once a second
while that fails, until it is disconnected. Writes posted meanwhile fail.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from transfer.flow import Lane, Piece
from transfer.transport import (
    Int32Array,
    PagePart,
    PeerError,
    Transport,
    TransportError,
    WriteResult,
)

_IDLE_POLL_S = 0.02
_RECONNECT_S = 1.0
_WRITES_IN_FLIGHT = 4
_NULL_PAGE = np.zeros(1, np.int32)


@dataclasses.dataclass(slots=True)
class _Write:
    """One call of `Mover.write`."""

    peer: str
    pages_left: int
    """Not posted."""
    started: float
    posted: set[int] = dataclasses.field(default_factory=set)
    """The transport's ids of pieces in flight."""
    is_cancelled: bool = False
    error: str | None = None
    bytes_moved: int = 0
    descriptors: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Posted:
    peer: str
    piece: Piece | None
    """None: a warm-up of ours."""


class Mover:
    """`on_result(key, result)` once for each `write`, when no byte of it follows;
    `on_lost(peer, error)` each time a peer cannot be connected; `on_failed(error)` when the thread
    ends by a fault, after which nothing is reported.

    `page_bytes`, by region, is what whole pages have; without it, writes of whole pages are posted
    uncut. `max_bytes_in_flight` is per peer; None: four times the transport's `write_bytes`.
    """

    def __init__(
        self,
        transport: Transport,
        on_result: Callable[[int, WriteResult], None],
        on_lost: Callable[[str, str], None],
        on_failed: Callable[[BaseException], None],
        max_bytes_in_flight: int | None = None,
        page_bytes: Sequence[int] = (),
    ) -> None:
        self._transport = transport
        self._on_result = on_result
        self._on_lost = on_lost
        self._on_failed = on_failed
        write_bytes = transport.capabilities.write_bytes
        self._max_bytes_in_flight = max_bytes_in_flight or _WRITES_IN_FLIGHT * write_bytes
        self._page_bytes = tuple(page_bytes)
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._writes: dict[int, _Write] = {}
        """By the caller's key."""
        self._lanes: dict[str, Lane] = {}
        self._posted: dict[int, _Posted] = {}
        """By the transport's id."""
        self._descriptions: dict[str, tuple[bytes, tuple[tuple[int, PagePart | None], ...]]] = {}
        self._reconnect_at: dict[str, float] = {}
        self._expecting = False
        self._thread = threading.Thread(target=self._run, name="mover", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def connect(
        self,
        peer: str,
        description: bytes,
        parts: Sequence[tuple[int, PagePart | None]] = (),
    ) -> None:
        """Connect, and write the null page once for each (region, part), or the whole one of region
        0, so that the first real write finds the wires up and all prepared."""

        def run() -> None:
            self._descriptions[peer] = description, tuple(parts) or ((0, None),)
            self._connect(peer)

        self._commands.put(run)

    def disconnect(self, peer: str) -> None:
        """The peer's writes end with an error."""

        def run() -> None:
            self._descriptions.pop(peer, None)
            self._reconnect_at.pop(peer, None)
            self._drop_all(peer, f"{peer} was disconnected")
            self._transport.disconnect(peer)

        self._commands.put(run)

    def reconnect(self, peer: str) -> None:
        """Break the connection, which ends all of the peer's writes with an error, and connect
        again. A peer that is not connected is ignored."""

        def run() -> None:
            if peer in self._descriptions:
                self._drop_all(peer, f"the connection to {peer} was reset")
                self._transport.reset(peer)
                self._connect(peer)

        self._commands.put(run)

    def write(
        self,
        key: int,
        peer: str,
        region: int,
        source: Int32Array,
        target: Int32Array,
        part: PagePart | None = None,
        handover: int = 0,
    ) -> None:
        """Write pages, in turn with other handovers; the end is reported as `on_result(key, …)`,
        also when they cannot be posted. `key` must not be in use."""
        if len(source) != len(target):
            raise ValueError(f"{len(source)} source and {len(target)} target pages")
        started = time.perf_counter()

        def run() -> None:
            self._writes[key] = write = _Write(peer, len(source), started)
            if len(source):
                page_bytes = self._bytes_per_page(region, part, len(source))
                piece = Piece(key, region, source, target, part, page_bytes)
                self._lane(peer).push(handover, piece)
            self._end_if_over(key, write)

        self._commands.put(run)

    def cancel(self, key: int) -> None:
        """What is not posted of this write never is, and what is may end early; the result still
        comes. Unknown keys are ignored."""

        def run() -> None:
            write = self._writes.get(key)
            if write is None:
                return
            write.is_cancelled = True
            self._drop(key, write, "cancelled")
            for write_id in write.posted:
                self._transport.cancel(write_id)
            self._end_if_over(key, write)

        self._commands.put(run)

    def after(self, function: Callable[[], None]) -> None:
        """Call `function` on this thread when all that was asked for before has been begun: after
        `disconnect`, when nothing of the peer's can land any more."""
        self._commands.put(function)

    def expect(self, expecting: bool) -> None:
        """Whether peers may be writing here now."""
        if expecting != self._expecting:
            self._expecting = expecting
            self._commands.put(_wake)

    def stop(self, timeout_s: float) -> None:
        """Close the transport and end the thread."""
        self._commands.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._on_failed(error)

    def _work(self) -> None:
        is_moving = False
        while True:
            try:
                command = self._commands.get(timeout=0 if is_moving else self._poll_s())
                while True:
                    if command is None:
                        self._transport.close()
                        return
                    command()
                    command = self._commands.get_nowait()
            except queue.Empty:
                pass
            is_moving = self._post_round()
            for result in self._transport.poll():
                self._settle(result)
                is_moving = True
            for peer, when in list(self._reconnect_at.items()):
                if time.monotonic() >= when:
                    self._connect(peer)

    def _poll_s(self) -> float:
        capabilities = self._transport.capabilities
        if self._posted or (self._expecting and not capabilities.passive_target):
            return capabilities.poll_s
        return _IDLE_POLL_S

    def _connect(self, peer: str) -> None:
        self._reconnect_at.pop(peer, None)
        description, parts = self._descriptions[peer]
        try:
            self._transport.connect(peer, description)
            for region, part in parts:
                try:
                    write_id = self._transport.write(peer, region, _NULL_PAGE, _NULL_PAGE, part)
                except (IndexError, ValueError):
                    continue  # no pages there, or not of one size: nothing to warm up
                self._posted[write_id] = _Posted(peer, None)
        except TransportError as error:
            self._connect_later(peer)
            self._on_lost(peer, str(error))

    def _connect_later(self, peer: str) -> None:
        if peer in self._descriptions:
            self._reconnect_at.setdefault(peer, time.monotonic() + _RECONNECT_S)

    def _lane(self, peer: str) -> Lane:
        if peer not in self._lanes:
            quantum = self._transport.capabilities.write_bytes
            self._lanes[peer] = Lane(quantum, self._max_bytes_in_flight)
        return self._lanes[peer]

    def _bytes_per_page(self, region: int, part: PagePart | None, num_pages: int) -> int:
        if part is not None:
            return max(1, part.page_bytes)
        if region < len(self._page_bytes):
            return self._page_bytes[region]
        return max(1, self._transport.capabilities.write_bytes // num_pages)

    def _post_round(self) -> bool:
        """Post up to one piece per peer; whether there was any."""
        pieces = [(peer, piece) for peer, lane in self._lanes.items() if (piece := lane.pop())]
        for peer, piece in pieces:
            self._post(peer, piece)
        return bool(pieces)

    def _post(self, peer: str, piece: Piece) -> None:
        write = self._writes[piece.key]
        write.pages_left -= len(piece.source_pages)
        try:
            write_id = self._transport.write(
                peer, piece.region, piece.source_pages, piece.target_pages, piece.part
            )
        except (TransportError, IndexError, ValueError) as error:
            self._lanes[peer].ended(piece)
            write.error = write.error or str(error)
            self._drop(piece.key, write, str(error))
            self._end_if_over(piece.key, write)
            if isinstance(error, PeerError):
                self._connect_later(peer)
        else:
            write.posted.add(write_id)
            self._posted[write_id] = _Posted(peer, piece)

    def _settle(self, result: WriteResult) -> None:
        posted = self._posted.pop(result.write_id)
        piece = posted.piece
        if piece is None:
            if result.error is not None:
                self._connect_later(posted.peer)
            return
        self._lanes[posted.peer].ended(piece)
        write = self._writes[piece.key]
        write.posted.remove(result.write_id)
        write.bytes_moved += result.bytes_moved
        write.descriptors += result.descriptors
        if result.error is not None:
            write.error = write.error or result.error
            self._drop(piece.key, write, result.error)
            if not write.is_cancelled:
                self._connect_later(posted.peer)
        self._end_if_over(piece.key, write)

    def _drop(self, key: int, write: _Write, error: str) -> None:
        """Post no more of it."""
        if write.pages_left:
            self._lanes[write.peer].drop(key)
            write.pages_left = 0
            write.error = write.error or error

    def _drop_all(self, peer: str, error: str) -> None:
        for key, write in list(self._writes.items()):
            if write.peer == peer:
                self._drop(key, write, error)
                self._end_if_over(key, write)

    def _end_if_over(self, key: int, write: _Write) -> None:
        if write.pages_left or write.posted:
            return
        del self._writes[key]
        seconds = time.perf_counter() - write.started
        self._on_result(
            key, WriteResult(key, write.error, write.bytes_moved, write.descriptors, seconds)
        )


def _wake() -> None:
    """A command that only ends the wait for one."""
