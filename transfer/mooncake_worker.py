"""The thread that makes Mooncake's calls: the binding can block, and the owner's calls must not.

A write is posted piece by piece, a bounded number and volume at a time: the binding tells when one
request is final, while the state of a batch is "failed" as soon as one of its requests is and the
rest go on, and requests beyond the engine's queue fail. An error of one piece ends the connection.

Known, of 0.3.13 with TCP: a piece is done when the target says that it has applied it. A failed
piece is final here, its source is no longer read; but what the target's kernel had received is
still written there, as was seen with a target that was stopped, timed out and went on. So a write
with a failed piece ends when the target's process is gone (nobody listens at its address, another
one does, or a successor connected), or has answered two reads that were posted after the failure,
DRAIN_S apart. A stopped process is waited for. Assumed: what was received is applied in that time,
for the engine serves its connections in turn; a host that cannot be reached for UNREACHABLE_S is
gone, or has applied it; the same of RDMA, which is untried here.

A further thread lives while a peer is being opened, or has failed and is being asked.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import enum
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from transfer.transport import WriteResult

DRAIN_S = 0.25
UNREACHABLE_S = 30.0
WINDOW_PIECES, WINDOW_BYTES = 256, 16 << 20
"""In flight to one peer; the engine queues 1,024."""
_LANES = 8
"""Pieces end nearly in order: after so many that have not, the later ones need no look."""
_PAUSE_S = 0.0001
_NO_BATCH = (0, -1, (1 << 64) - 1)


class _Answer(enum.Enum):
    ITSELF = enum.auto()
    ANOTHER = enum.auto()
    NONE = enum.auto()


@dataclasses.dataclass(slots=True, eq=False)
class Peer:
    """One incarnation of a peer. The owner may set `error` and `is_settled`; neither is unset."""

    name: str
    host: str
    port: int
    segment: str
    """Its address, as the engine is told it."""
    identity: bytes
    identity_address: int
    """Where the peer has it."""
    landing: npt.NDArray[np.uint8]
    """Registered, to read the identity into."""
    error: str | None = None
    """Why nothing more is posted."""
    is_broken: bool = False
    """A write has told of `error`."""
    is_open: bool = False
    is_being_asked: bool = False
    is_settled: bool = False
    """After an error: nothing more will land."""
    in_flight: collections.deque[tuple[int, Write, int]] = dataclasses.field(
        default_factory=collections.deque
    )
    """(batch, write, bytes), oldest first."""
    bytes_in_flight: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class Write:
    """The owner may set `error`, to end it early."""

    write_id: int
    peer: Peer
    pieces: collections.deque[tuple[int, int, int]]
    """(source address, target address, bytes), not yet posted."""
    bytes_moved: int
    descriptors: int
    started: float
    in_flight: int = 0
    is_in_doubt: bool = False
    """A piece failed, so its bytes may yet land."""
    error: str | None = None


class Worker:
    def __init__(self, name: str, engine: Any) -> None:
        self._engine = engine
        self._inbox: queue.SimpleQueue[Write | None] = queue.SimpleQueue()
        """None wakes the thread."""
        self._results: queue.SimpleQueue[WriteResult] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"mooncake {name}", daemon=True)
        self._thread.start()

    def submit(self, write: Write) -> None:
        self._inbox.put(write)

    def wake(self) -> None:
        """Something was set from outside."""
        self._inbox.put(None)

    def open(self, peer: Peer) -> None:
        """Its writes wait until its identity has been read."""
        self._start(self._open, peer)

    def results(self) -> list[WriteResult]:
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._results.get_nowait())
        return found

    def stop(self) -> None:
        """The engine is not used any more after this, or after the call that it may be stuck in."""
        self._stop.set()
        self.wake()
        self._thread.join()
        del self._engine

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        active: list[Write] = []
        has_ended = False
        while not self._stop.is_set():
            is_waiting = any(write.in_flight for write in active)
            timeout = 0.0 if has_ended else _PAUSE_S if is_waiting else None
            with contextlib.suppress(queue.Empty):
                arrived = self._inbox.get(timeout=timeout)
                while True:
                    if arrived is not None:
                        active.append(arrived)
                    arrived = self._inbox.get_nowait()
            has_ended = self._advance(active)

    def _advance(self, active: list[Write]) -> bool:
        """Look at what is in flight, post what may be, report what is over; whether any piece
        ended."""
        peers = dict.fromkeys(write.peer for write in active)
        ended = sum(_reap(self._engine, peer) for peer in peers)
        for write in active:
            if write.pieces or write.in_flight or write.is_in_doubt:
                write.error = write.error or write.peer.error
            if write.error is not None:
                write.pieces.clear()
            elif write.peer.is_open:
                _post(self._engine, write)
        for write in list(active):
            peer = write.peer
            if write.is_in_doubt and not peer.in_flight and not peer.is_being_asked:
                peer.is_being_asked = True
                self._start(self._settle, peer)
            if not write.pieces and not write.in_flight:
                if write.is_in_doubt and not peer.is_settled:
                    continue
                active.remove(write)
                peer.is_broken |= None not in (write.error, peer.error)
                self._results.put(_result(write))
        return ended > 0

    # ------------------------------------------------- threads that live while a peer is asked

    def _start(self, target: Callable[[Peer, Any], None], peer: Peer) -> None:
        threading.Thread(target=target, args=(peer, self._engine), daemon=True).start()

    def _open(self, peer: Peer, engine: Any) -> None:
        # Nobody can post while the engine opens a segment, so make sure first that the peer is up:
        # one that is stopped takes the engine a minute.
        is_up = engine.send_probe(peer.segment) == 0
        match self._ask(peer, engine) if is_up else _Answer.NONE:
            case _Answer.ITSELF:
                peer.is_open = True
            case _Answer.ANOTHER:
                peer.error = peer.error or f"{peer.name} is gone: another answers at {peer.segment}"
            case _Answer.NONE:
                peer.error = peer.error or f"{peer.name} does not answer at {peer.segment}"
        self.wake()

    def _settle(self, peer: Peer, engine: Any) -> None:
        """Until nothing that was posted to `peer` can land any more."""
        answers, reached = 0, time.monotonic()
        while answers < 2 and not self._stop.is_set() and not peer.is_settled:
            try:
                socket.create_connection((peer.host, peer.port), timeout=1).close()
                reached = time.monotonic()
            except ConnectionRefusedError:
                break
            except OSError:
                if time.monotonic() > reached + UNREACHABLE_S:
                    break
            answer = self._ask(peer, engine)
            if answer is _Answer.ANOTHER:
                break
            answers += answer is _Answer.ITSELF
            self._stop.wait(DRAIN_S)
        peer.is_settled = True
        self.wake()

    def _ask(self, peer: Peer, engine: Any) -> _Answer:
        """Read the identity of whoever is at the peer's address."""
        batch = engine.batch_transfer_async_read(
            peer.segment, [peer.landing.ctypes.data], [peer.identity_address], [peer.landing.nbytes]
        )
        if batch in _NO_BATCH:
            return _Answer.NONE
        while (status := engine.transfer_check_status(batch)) not in (1, -1):
            if self._stop.wait(0.001):
                return _Answer.NONE
        if status == -1:
            return _Answer.NONE
        same = peer.landing.tobytes() == peer.identity
        return _Answer.ITSELF if same else _Answer.ANOTHER


def _post(engine: Any, write: Write) -> None:
    peer = write.peer
    while (
        write.pieces and len(peer.in_flight) < WINDOW_PIECES and peer.bytes_in_flight < WINDOW_BYTES
    ):
        source, target, length = write.pieces.popleft()
        batch = engine.transfer_submit_write(peer.segment, source, target, length)
        if batch in _NO_BATCH:
            write.error = peer.error = peer.error or f"mooncake cannot post to {peer.name}"
            write.pieces.clear()
            return
        peer.in_flight.append((batch, write, length))
        peer.bytes_in_flight += length
        write.in_flight += 1


def _reap(engine: Any, peer: Peer) -> int:
    """Take out the pieces that are final, and count them."""
    before = len(peer.in_flight)
    waiting: list[tuple[int, Write, int]] = []
    while peer.in_flight and len(waiting) < _LANES:
        batch, write, length = piece = peer.in_flight.popleft()
        status = engine.transfer_check_status(batch)
        if status not in (1, -1):  # 0: waiting; -2: late, and not final
            waiting.append(piece)
            continue
        peer.bytes_in_flight -= length
        write.in_flight -= 1
        if status == -1:
            write.is_in_doubt = True
            peer.error = peer.error or f"mooncake's write to {peer.name} failed"
    peer.in_flight.extendleft(reversed(waiting))
    return before - len(peer.in_flight)


def _result(write: Write) -> WriteResult:
    seconds = time.perf_counter() - write.started
    if write.error is not None:
        return WriteResult(write.write_id, write.error, 0, 0, seconds)
    return WriteResult(write.write_id, None, write.bytes_moved, write.descriptors, seconds)
