"""One thread that owns a transport: everything that may block or copy happens there, off the event
loop.

Commands go in by queue; results come out through `on_result`, called on this thread. While a write
is in flight here, or is expected from a peer (`expect`), the transport is polled every half
millisecond; else the thread sleeps on its queue and polls now and then, so that peers can connect.
It never spins.

A write that fails may have torn down the connection: the peer is connected again, once a second
while that fails, until it is disconnected. Writes posted meanwhile fail.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import numpy as np

from transfer.transport import Int32Array, Transport, TransportError, WriteResult

_BUSY_POLL_S = 0.0005
_IDLE_POLL_S = 0.02
_RECONNECT_S = 1.0
_NULL_PAGE = np.zeros(1, np.int32)


class Mover:
    """`on_result(key, result)` for each `write`; `on_lost(peer, error)` each time a peer cannot be
    connected; `on_failed(error)` when the thread ends by a fault, after which nothing is reported.
    """

    def __init__(
        self,
        transport: Transport,
        on_result: Callable[[int, WriteResult], None],
        on_lost: Callable[[str, str], None],
        on_failed: Callable[[BaseException], None],
    ) -> None:
        self._transport = transport
        self._on_result = on_result
        self._on_lost = on_lost
        self._on_failed = on_failed
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._writes: dict[int, tuple[int | None, str]] = {}
        """In flight: the caller's key (None: a warm-up of ours) and the peer."""
        self._descriptions: dict[str, bytes] = {}
        self._reconnect_at: dict[str, float] = {}
        self._expecting = False
        self._thread = threading.Thread(target=self._run, name="mover", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def connect(self, peer: str, description: bytes) -> None:
        """Connect, and write the null page once, so that the first real write finds the wires
        up."""

        def run() -> None:
            self._descriptions[peer] = description
            self._connect(peer)

        self._commands.put(run)

    def disconnect(self, peer: str) -> None:
        def run() -> None:
            self._descriptions.pop(peer, None)
            self._reconnect_at.pop(peer, None)
            self._transport.disconnect(peer)

        self._commands.put(run)

    def write(
        self, key: int, peer: str, region: int, source: Int32Array, target: Int32Array
    ) -> None:
        """Post a write; its end is reported as `on_result(key, …)`, also when it cannot be
        posted."""
        self._commands.put(lambda: self._post(key, peer, region, source, target))

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

    def _connect(self, peer: str) -> None:
        self._reconnect_at.pop(peer, None)
        try:
            self._transport.connect(peer, self._descriptions[peer])
        except TransportError as error:
            self._reconnect_at[peer] = time.monotonic() + _RECONNECT_S
            self._on_lost(peer, str(error))
        else:
            self._post(None, peer, 0, _NULL_PAGE, _NULL_PAGE)

    def _post(
        self, key: int | None, peer: str, region: int, source: Int32Array, target: Int32Array
    ) -> None:
        try:
            write_id = self._transport.write(peer, region, source, target)
        except (TransportError, IndexError) as error:
            if key is not None:
                self._on_result(key, WriteResult(-1, str(error), 0, 0, 0.0))
        else:
            self._writes[write_id] = (key, peer)

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._on_failed(error)

    def _work(self) -> None:
        while True:
            timeout = _BUSY_POLL_S if self._writes or self._expecting else _IDLE_POLL_S
            try:
                command = self._commands.get(timeout=timeout)
                while True:
                    if command is None:
                        self._transport.close()
                        return
                    command()
                    command = self._commands.get_nowait()
            except queue.Empty:
                pass
            for result in self._transport.poll():
                key, peer = self._writes.pop(result.write_id)
                if result.error is not None and peer in self._descriptions:
                    self._reconnect_at.setdefault(peer, time.monotonic() + _RECONNECT_S)
                if key is not None:
                    self._on_result(key, result)
            for peer, when in list(self._reconnect_at.items()):
                if time.monotonic() >= when:
                    self._connect(peer)


def _wake() -> None:
    """A command that only ends the wait for one."""
