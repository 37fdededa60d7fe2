"""A second transport beside one's own, in a thread of its own, for a share of what is written.

For transports that copy in the call of `write`, by one core. What the inner transport promises
holds for each share; the owner puts the results together. It is an extra: while the lane is not
ready for a peer, for whatever reason, its owner writes alone.

Threads: everything is called by the owner's, the inner transport by the lane's only, from its
making to its end; between them go `_commands` and `_events`.
"""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable

from transfer.transport import Int32Array, PagePart, PeerError, Transport, TransportError

_RETRY_S = 0.01
_RETRIES = 500
Write = tuple[int, str, int, Int32Array, Int32Array, PagePart]
"""The owner's id of it, and what `Transport.write` takes."""


class Lane:
    def __init__(self, make: Callable[[], Transport]) -> None:
        """`make` is called in the lane's thread, at the first connection; it registers as well."""
        self._commands: queue.SimpleQueue[Callable[[_Worker], None] | None] = queue.SimpleQueue()
        self._events: collections.deque[tuple[int, str | None] | tuple[str, int]]
        self._events = collections.deque()
        self._worker = _Worker(make, self._commands, self._events)
        self._thread: threading.Thread | None = None
        self._numbers: dict[str, int] = {}
        """Peer -> its latest connection."""
        self._last_number = 0
        self._ready: set[str] = set()

    def connect(self, peer: str, description: bytes) -> None:
        """Begin to; `is_ready` tells when it is done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._worker.run, name="lane", daemon=True)
            self._thread.start()
        self._last_number += 1
        number = self._numbers[peer] = self._last_number
        self._commands.put(lambda worker: worker.connect(peer, number, description))

    def is_ready(self, peer: str) -> bool:
        return peer in self._ready

    def disconnect(self, peer: str) -> None:
        """Writes to it end with an error, when no byte of them can follow."""
        if self._numbers.pop(peer, None) is not None:
            self._ready.discard(peer)
            self._commands.put(lambda worker: worker.disconnect(peer))

    def write(self, write: Write) -> None:
        self._commands.put(lambda worker: worker.write(write))

    def poll(self) -> list[tuple[int, str | None]]:
        """(the owner's id, error) of writes that ended."""
        ended: list[tuple[int, str | None]] = []
        while self._events:
            match self._events.popleft():
                case (str(peer), int(number)):
                    if self._numbers.get(peer) == number:
                        self._ready.add(peer)
                case (int(write_id), error):
                    assert error is None or isinstance(error, str)
                    ended.append((write_id, error))
        return ended

    def close(self) -> None:
        """Waits for the thread, and with it for a copy that is under way."""
        if self._thread is not None:
            self._commands.put(None)
            self._thread.join()
            self._thread = None


class _Worker:
    def __init__(
        self,
        make: Callable[[], Transport],
        commands: queue.SimpleQueue[Callable[[_Worker], None] | None],
        events: collections.deque[tuple[int, str | None] | tuple[str, int]],
    ) -> None:
        self._make = make
        self._commands = commands
        self._events = events
        self._inner: Transport | None = None
        self._writes: dict[int, int] = {}
        """The inner transport's id -> the owner's."""
        self._connecting: dict[str, tuple[int, bytes, int]] = {}
        """(number, description, tries left)"""

    def run(self) -> None:
        """The thread's life."""
        while True:
            try:
                command = self._commands.get(timeout=self._wait_s())
            except queue.Empty:
                pass
            else:
                if command is None:
                    break
                command(self)
            self._connect_all()
            self._poll()
        if self._inner is not None:
            self._inner.close()
            self._poll()

    def connect(self, peer: str, number: int, description: bytes) -> None:
        self._connecting[peer] = number, description, _RETRIES

    def disconnect(self, peer: str) -> None:
        self._connecting.pop(peer, None)
        if self._inner is not None:
            self._inner.disconnect(peer)

    def write(self, write: Write) -> None:
        ours, peer, region, source_pages, target_pages, part = write
        assert self._inner is not None, "it is not ready"
        try:
            theirs = self._inner.write(peer, region, source_pages, target_pages, part)
        except PeerError as error:
            self._events.append((ours, str(error)))
        else:
            self._writes[theirs] = ours

    def _wait_s(self) -> float | None:
        if self._writes and self._inner is not None:
            return self._inner.capabilities.poll_s
        return _RETRY_S if self._connecting else None

    def _connect_all(self) -> None:
        for peer, (number, description, tries) in list(self._connecting.items()):
            try:
                if self._inner is None:
                    self._inner = self._make()
                self._inner.connect(peer, description)
            except TransportError:
                # Writes to an earlier connection may still have to be given up.
                self._connecting[peer] = number, description, tries - 1
                if not tries:
                    del self._connecting[peer]
            else:
                del self._connecting[peer]
                self._events.append((peer, number))

    def _poll(self) -> None:
        if self._inner is not None:
            for result in self._inner.poll():
                self._events.append((self._writes.pop(result.write_id), result.error))
