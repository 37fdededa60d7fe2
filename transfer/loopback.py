"""Writes between transports of one process: the reference implementation, and the one for tests.

A description names its transport in a process-wide registry; a peer is dead when it has left that.
The first half of a write is copied when it is posted and the rest when it ends, so that a page that
is reused or overwritten in between shows. Tests set delays and faults; the copy needs no help from
the target.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import time
import uuid

from transfer.endpoint import (
    DESCRIPTION_VERSION,
    Description,
    check_write,
    decode_description,
    encode_description,
)
from transfer.segments import plan_segments
from transfer.transport import (
    Capabilities,
    ConfigurationError,
    Int32Array,
    PagePart,
    PeerError,
    Region,
    Transport,
    TransportError,
    WriteResult,
)

_live: dict[str, LoopbackTransport] = {}


@dataclasses.dataclass(slots=True)
class _Write:
    peer: str
    copies: collections.deque[tuple[int, int, int]]
    """(target address, source address, bytes), one per run of pages not yet copied."""
    bytes_moved: int
    descriptors: int
    started: float
    polls_left: int
    error: str | None = None


class LoopbackTransport(Transport):
    """Options: `delay_polls`, the number of polls after which a write ends, one more than that."""

    capabilities = Capabilities()

    def __init__(self, name: str, options: dict[str, str]) -> None:
        unknown = set(options) - {"delay_polls"}
        if unknown:
            raise ConfigurationError(f"loopback transport has no options {sorted(unknown)}")
        self.delay_polls = int(options.get("delay_polls", "0"))
        self.fail_next = 0
        """So many of the next writes end with an error, half done."""
        self._endpoint = f"{name}.{uuid.uuid4().hex}"
        self._regions: list[Region] = []
        self._peers: dict[str, Description] = {}
        self._writes: dict[int, _Write] = {}
        self._last_id = 0
        _live[self._endpoint] = self

    def register(self, regions: list[Region]) -> None:
        if self._regions:
            raise TransportError("regions are registered once")
        if any(region.device is not None for region in regions):
            raise ConfigurationError("loopback transport moves host memory only")
        self._regions = list(regions)

    def describe(self) -> bytes:
        return encode_description(
            Description(DESCRIPTION_VERSION, "loopback", self._endpoint, tuple(self._regions))
        )

    def connect(self, peer: str, description: bytes) -> None:
        end = decode_description(description, peer, "loopback", self._regions)
        if self._peers.get(peer) == end:
            return
        if end.endpoint not in _live:
            raise PeerError(f"{peer} ({end.endpoint}) is gone")
        self.disconnect(peer)
        self._peers[peer] = end

    def disconnect(self, peer: str) -> None:
        self._peers.pop(peer, None)
        for write in self._writes.values():
            if write.peer == peer:
                write.error = f"{peer} was disconnected"
                write.polls_left = 0

    def write(
        self,
        peer: str,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: PagePart | None = None,
    ) -> int:
        if peer not in self._peers:
            raise PeerError(f"{peer} is not connected")
        regions = self._peers[peer].regions
        part = check_write(peer, region, self._regions, regions, source_pages, target_pages, part)
        source, target = self._regions[region], regions[region]
        runs = plan_segments(source_pages, target_pages, part, source.page_bytes, target.page_bytes)
        copies = collections.deque(
            zip(
                (runs.target_offsets + target.address).tolist(),
                (runs.source_offsets + source.address).tolist(),
                runs.lengths.tolist(),
                strict=True,
            )
        )
        self._last_id += 1
        write = _Write(
            peer,
            copies,
            len(source_pages) * part.page_bytes,
            len(runs),
            time.perf_counter(),
            self.delay_polls,
        )
        self._writes[self._last_id] = write
        if self._is_alive(write):
            _copy(copies, len(copies) // 2)
        if self.fail_next:
            self.fail_next -= 1
            write.error = "injected fault"
        return self._last_id

    def cancel(self, write_id: int) -> None:
        write = self._writes.get(write_id)
        if write is not None:
            write.error = write.error or "cancelled"
            write.polls_left = 0

    def poll(self) -> list[WriteResult]:
        results = []
        for write_id, write in list(self._writes.items()):
            if write.polls_left:
                write.polls_left -= 1
                continue
            if write.error is None and not self._is_alive(write):
                write.error = f"{write.peer} is gone"
            if write.error is None:
                _copy(write.copies, len(write.copies))
            del self._writes[write_id]
            done = write.error is None
            results.append(
                WriteResult(
                    write_id=write_id,
                    error=write.error,
                    bytes_moved=write.bytes_moved if done else 0,
                    descriptors=write.descriptors if done else 0,
                    seconds=time.perf_counter() - write.started,
                )
            )
        return results

    def close(self) -> None:
        _live.pop(self._endpoint, None)
        self._peers.clear()
        self._writes.clear()

    def _is_alive(self, write: _Write) -> bool:
        """The target's memory may be gone with it: never copy there."""
        peer = self._peers.get(write.peer)
        return peer is not None and peer.endpoint in _live


def _copy(copies: collections.deque[tuple[int, int, int]], count: int) -> None:
    for _ in range(count):
        ctypes.memmove(*copies.popleft())
