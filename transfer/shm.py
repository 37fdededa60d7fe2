"""Writes between processes of one host through shared memory: no daemon, no library, no files.

Pools lie in memory of `transfer.memory.allocate_host`. A description names the process and its
files; a peer opens them through /proc, checks that they are those described, and maps them. A write
is then a copy, in pieces that a few threads take in turn; the target does nothing. A peer's death
is noticed in `poll` and `write` and costs the connection; its memory lives on as long as we map it.

glibc's memmove writes around the cache only from three quarters of its size on; page-sized copies
are 40 % faster per core when GLIBC_TUNABLES=glibc.cpu.x86_non_temporal_threshold=0x20000 is in the
process's environment from its start.

Threads: `_lock` guards the queue of pieces, the writes and the results; the rest belongs to the
caller's thread. A write ends, with whatever error, only when no thread copies for it.
"""

from __future__ import annotations

import collections
import dataclasses
import mmap
import os
import select
import threading
import time
import uuid

import msgspec

from transfer.copies import Piece, plan_pieces
from transfer.endpoint import (
    DESCRIPTION_VERSION,
    Description,
    check_write,
    decode_description,
    encode_description,
)
from transfer.memory import (
    HostMemory,
    MemoryFile,
    Process,
    describe_memory,
    describe_process,
    find_host,
    map_memory,
    open_process,
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


class _Place(msgspec.Struct, frozen=True):
    """Where one region lies. A region without bytes lies nowhere."""

    file: MemoryFile | None
    offset: int


class _Metadata(msgspec.Struct, frozen=True):
    process: Process
    places: tuple[_Place, ...]


@dataclasses.dataclass(slots=True, eq=False)
class _Peer:
    name: str
    end: Description
    places: tuple[tuple[mmap.mmap, int] | None, ...]
    """By region: its memory and its offset there."""
    pidfd: int


@dataclasses.dataclass(slots=True, eq=False)
class _Write:
    write_id: int
    peer: _Peer
    bytes_moved: int
    descriptors: int
    pieces_left: int
    started: float
    copying: int = 0
    """Threads that copy a piece of it now."""
    error: str | None = None


class ShmTransport(Transport):
    """Options: `threads`, how many copy; 2 unless told."""

    capabilities = Capabilities()

    def __init__(self, name: str, options: dict[str, str]) -> None:
        unknown = set(options) - {"threads"}
        if unknown:
            raise ConfigurationError(f"shm transport has no options {sorted(unknown)}")
        threads = options.get("threads", "2")
        if not threads.isdecimal() or not 1 <= int(threads) <= 64:
            raise ConfigurationError(f"shm transport takes 1 to 64 threads, not {threads!r}")
        self._num_threads = int(threads)
        self._endpoint = f"{name}.{uuid.uuid4().hex}"
        self._regions: list[Region] = []
        self._places: list[tuple[HostMemory, int] | None] = []
        self._peers: dict[str, _Peer] = {}
        self._deaths = select.poll()
        self._last_id = 0
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._has_work = threading.Condition(self._lock)
        self._queue: collections.deque[tuple[_Write, Piece]] = collections.deque()
        self._writes: dict[int, _Write] = {}
        self._results: list[WriteResult] = []
        self._closed = False

    def register(self, regions: list[Region]) -> None:
        if self._regions:
            raise TransportError("regions are registered once")
        places = []
        for number, region in enumerate(regions):
            size = region.num_pages * region.page_bytes
            found = find_host(region.address, size) if region.device is None else None
            if size and found is None:
                raise ConfigurationError(
                    f"region {number} is not in shared memory: shm transport needs host memory "
                    "from transfer.memory.allocate_host"
                )
            places.append(found if size else None)
        self._regions, self._places = list(regions), places

    def describe(self) -> bytes:
        places = tuple(
            _Place(describe_memory(place[0]), place[1]) if place else _Place(None, 0)
            for place in self._places
        )
        metadata = msgspec.msgpack.encode(_Metadata(describe_process(), places))
        return encode_description(
            Description(DESCRIPTION_VERSION, "shm", self._endpoint, tuple(self._regions), metadata)
        )

    def connect(self, peer: str, description: bytes) -> None:
        end = decode_description(description, peer, "shm", self._regions)
        known = self._peers.get(peer)
        if known is not None and known.end == end and known not in self._dead():
            return
        self.disconnect(peer)
        try:
            self._peers[peer] = opened = _open_peer(peer, end)
        except PeerError as error:
            raise PeerError(f"{peer}: {error}") from error
        self._deaths.register(opened.pidfd, select.POLLIN)
        while len(self._threads) < self._num_threads:
            self._threads.append(threading.Thread(target=self._copy, name="shm", daemon=True))
            self._threads[-1].start()

    def disconnect(self, peer: str) -> None:
        if peer in self._peers:
            self._break(self._peers[peer], f"{peer} was disconnected")

    def write(
        self,
        peer: str,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: PagePart | None = None,
    ) -> int:
        target = self._peers.get(peer)
        if target is None:
            raise PeerError(f"{peer} is not connected")
        if target in self._dead():
            self._break(target, f"{peer} has died")
            raise PeerError(f"{peer} has died")
        regions = target.end.regions
        part = check_write(peer, region, self._regions, regions, source_pages, target_pages, part)
        started = time.perf_counter()
        ours, theirs = self._regions[region], regions[region]
        runs = plan_segments(source_pages, target_pages, part, ours.page_bytes, theirs.page_bytes)
        here, there = self._places[region], target.places[region]
        pieces = []
        if here is not None and there is not None:
            pieces = plan_pieces(here[0].buffer, here[1], *there, runs, part.length)
        self._last_id += 1
        moved = len(source_pages) * part.page_bytes
        write = _Write(self._last_id, target, moved, len(runs), len(pieces), started)
        with self._lock:
            self._writes[write.write_id] = write
            self._queue += [(write, piece) for piece in pieces]
            self._has_work.notify(len(pieces))
            self._end_if_over(write)
        return write.write_id

    def cancel(self, write_id: int) -> None:
        with self._lock:
            write = self._writes.get(write_id)
            if write is not None:
                self._give_up(write, "cancelled")

    def poll(self) -> list[WriteResult]:
        for peer in self._dead():
            self._break(peer, f"{peer.name} has died")
        with self._lock:
            results, self._results = self._results, []
        return results

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self._break(peer, "closed")
        with self._lock:
            self._closed = True
            self._has_work.notify_all()
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        self._queue.clear()
        self._results.clear()
        self._places = [None] * len(self._places)

    def _dead(self) -> list[_Peer]:
        ended = {fd for fd, _event in self._deaths.poll(0)} if self._peers else set()
        return [peer for peer in self._peers.values() if peer.pidfd in ended]

    def _break(self, peer: _Peer, error: str) -> None:
        del self._peers[peer.name]
        self._deaths.unregister(peer.pidfd)
        os.close(peer.pidfd)
        with self._lock:
            for write in [write for write in self._writes.values() if write.peer is peer]:
                self._give_up(write, error)

    def _give_up(self, write: _Write, error: str) -> None:
        """Its pieces are dropped when their turn comes."""
        write.error = write.error or error
        self._end_if_over(write)

    def _end_if_over(self, write: _Write) -> None:
        if write.copying or (write.pieces_left and write.error is None):
            return
        del self._writes[write.write_id]
        moved = (write.bytes_moved, write.descriptors) if write.error is None else (0, 0)
        seconds = time.perf_counter() - write.started
        self._results.append(WriteResult(write.write_id, write.error, *moved, seconds))

    def _copy(self) -> None:
        """A thread's life."""
        while True:
            with self._lock:
                while not self._queue:
                    if self._closed:
                        return
                    self._has_work.wait()
                write, piece = self._queue.popleft()
                if write.error is not None:
                    continue
                write.copying += 1
            error: str | None = "its copy failed"
            try:
                piece()
                error = None
            finally:
                with self._lock:
                    write.copying -= 1
                    write.pieces_left -= 1
                    write.error = write.error or error
                    self._end_if_over(write)


def _open_peer(name: str, end: Description) -> _Peer:
    try:
        metadata = msgspec.msgpack.decode(end.metadata, type=_Metadata)
    except msgspec.MsgspecError as error:
        raise PeerError(f"that is no description: {error}") from error
    if len(metadata.places) != len(end.regions):
        raise PeerError(f"{len(end.regions)} regions in {len(metadata.places)} places")
    pidfd = open_process(metadata.process)
    try:
        mapped: dict[MemoryFile, mmap.mmap] = {}
        places: list[tuple[mmap.mmap, int] | None] = []
        for place, region in zip(metadata.places, end.regions, strict=True):
            if place.file is None:
                places.append(None)
                continue
            size = region.num_pages * region.page_bytes
            if min(place.offset, size) < 0 or place.offset + size > place.file.size:
                raise PeerError(f"{region} does not lie within its memory, {place}")
            if place.file not in mapped:
                mapped[place.file] = map_memory(metadata.process, place.file)
            places.append((mapped[place.file], place.offset))
    except PeerError:
        os.close(pidfd)
        raise
    return _Peer(name, end, tuple(places), pidfd)
