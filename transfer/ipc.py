"""Writes between GPUs of one host: peers' pools are mapped once (CUDA IPC), then pages are copied
straight into them.

Runs of at least `_ENGINE_BYTES` go by the copy engines and take nothing from compute, smaller ones
by a kernel, at about the same rate whatever their size (`transfer/gpu.py`). A write starts at once
while fewer than two copies run, so that the link has always something to do; those that come while
it is busy start together, at the next `poll`. Nobody but the source has to poll.

A peer's memory stays mapped while a copy to it runs, also when the peer dies, so a late byte can
only land in memory that nobody uses any more. Options: `blocks`, the most of the kernel's blocks
that run at once.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import time
import uuid
from pathlib import Path

import msgspec
import numpy as np

from transfer import cuda
from transfer.endpoint import (
    DESCRIPTION_VERSION,
    Description,
    check_write,
    decode_description,
    encode_description,
)
from transfer.gpu import DEFAULT_BLOCKS, RunCopier
from transfer.segments import Int64Array, run_offsets
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

_STARTED = 2
_ENGINE_BYTES = 2 << 20
"""Two H200s, scattered runs, GB/s by engines and by kernel: 9.4 MiB 388 and 366, 2.4 MiB 364 and
366, 1.2 MiB 336 and 367 (4 GiB; peer copy 394)."""


class _Export(msgspec.Struct, frozen=True):
    """Where a region lies, for a process of the same host."""

    handle: bytes
    offset: int


class _Metadata(msgspec.Struct, frozen=True):
    host: str
    """The boot id of the kernel: CUDA IPC reaches no other host."""
    process: int
    exports: tuple[_Export, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Metadata)


@dataclasses.dataclass(slots=True)
class _Write:
    device: int
    """Ours."""
    length: int
    """Of its runs."""
    sources: Int64Array
    targets: Int64Array
    """Addresses, here, of the runs."""
    started: float
    copy: cuda.Event | None = None
    error: str = ""

    @property
    def by_engine(self) -> bool:
        return self.length >= _ENGINE_BYTES and cuda.has_copy_batch()


@dataclasses.dataclass(slots=True, eq=False)
class _Peer:
    name: str
    end: Description
    addresses: list[int]
    """Of the peer's regions, here."""
    mapped: list[tuple[cuda.Device, int]]
    writes: dict[int, _Write] = dataclasses.field(default_factory=dict)
    gone: bool = False


class IpcTransport(Transport):
    capabilities = Capabilities(host=False, device=True, poll_s=0.00005, write_bytes=128 << 20)

    def __init__(self, name: str, options: dict[str, str]) -> None:
        unknown = set(options) - {"blocks"}
        if unknown:
            raise ConfigurationError(f"ipc transport has no options {sorted(unknown)}")
        if not cuda.num_devices():
            raise ConfigurationError("transport 'ipc' needs a CUDA device, there is none")
        self._blocks = int(options.get("blocks", DEFAULT_BLOCKS))
        self._endpoint = f"{name}.{uuid.uuid4().hex}"
        self._regions: list[Region] = []
        self._exports: tuple[_Export, ...] = ()
        self._copiers: dict[int, RunCopier] = {}
        self._peers: dict[str, _Peer] = {}
        self._leaving: list[_Peer] = []
        self._pending: list[_Write] = []
        self._started: collections.deque[cuda.Event] = collections.deque()
        """The latest copies, oldest first."""
        self._results: list[WriteResult] = []
        self._last_id = 0

    def register(self, regions: list[Region]) -> None:
        if self._regions:
            raise TransportError("regions are registered once")
        exports = []
        for region in regions:
            if region.device is None:
                raise ConfigurationError("transport 'ipc' moves GPU memory only")
            if region.device not in self._copiers:
                self._copiers[region.device] = RunCopier(region.device, self._blocks)
            exports.append(_export(region))
        self._regions, self._exports = list(regions), tuple(exports)

    def describe(self) -> bytes:
        metadata = _encoder.encode(_Metadata(_boot_id(), os.getpid(), self._exports))
        return encode_description(
            Description(DESCRIPTION_VERSION, "ipc", self._endpoint, tuple(self._regions), metadata)
        )

    def connect(self, peer: str, description: bytes) -> None:
        end = decode_description(description, peer, "ipc", self._regions)
        known = self._peers.get(peer)
        if known is not None and known.end == end:
            return
        self.disconnect(peer)
        try:
            metadata = _decoder.decode(end.metadata)
        except msgspec.MsgspecError as error:
            raise PeerError(f"{peer} does not say where its memory is: {error}") from error
        if len(metadata.exports) != len(end.regions):
            raise PeerError(
                f"{peer} has {len(end.regions)} regions, {len(metadata.exports)} shared"
            )
        if metadata.host != _boot_id():
            raise PeerError(f"transport 'ipc' stays on one host, {peer} is on another")
        found = _Peer(peer, end, [], [])
        try:
            for number, (region, export) in enumerate(
                zip(end.regions, metadata.exports, strict=True)
            ):
                found.addresses.append(self._map(number, region, export, metadata.process, found))
        except cuda.CudaError as error:
            self._unmap(found)
            raise PeerError(f"the GPU memory of {peer} cannot be mapped: {error}") from error
        self._peers[peer] = found

    def disconnect(self, peer: str) -> None:
        found = self._peers.pop(peer, None)
        if found is not None:
            found.gone = True
            self._leaving.append(found)

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
        regions = target.end.regions
        part = check_write(peer, region, self._regions, regions, source_pages, target_pages, part)
        started = time.perf_counter()
        self._last_id += 1
        if not len(source_pages):
            self._results.append(WriteResult(self._last_id, None, 0, 0, 0.0))
            return self._last_id
        ours, theirs, addresses = self._regions[region], regions[region], target.addresses
        origin, place = ours.address + part.source_offset, addresses[region] + part.target_offset
        sources = run_offsets(source_pages, ours.page_bytes, origin, part.count, part.source_stride)
        targets = run_offsets(
            target_pages, theirs.page_bytes, place, part.count, part.target_stride
        )
        write = _Write(ours.device or 0, part.length, sources, targets, started)
        target.writes[self._last_id] = write
        self._pending.append(write)
        while self._started and self._started[0].is_done():
            self._started.popleft()
        if len(self._started) < _STARTED:
            self._start()
        return self._last_id

    def cancel(self, write_id: int) -> None:
        """A copy takes milliseconds and cannot be stopped."""

    def poll(self) -> list[WriteResult]:
        self._start()
        for peer in (*self._peers.values(), *self._leaving):
            self._settle(peer)
        for peer in [peer for peer in self._leaving if not peer.writes]:
            self._leaving.remove(peer)
            self._unmap(peer)
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        for name in list(self._peers):
            self.disconnect(name)
        self._start()
        for peer in self._leaving:
            for write in peer.writes.values():
                if write.copy is not None:
                    write.copy.wait()
            self._unmap(peer)
        self._leaving.clear()
        self._results.clear()

    def _start(self) -> None:
        """Copy what is pending, like with like."""
        pending, self._pending = self._pending, []
        alike: dict[tuple[int, int, bool], list[_Write]] = {}
        for write in pending:
            length = 0 if write.by_engine else write.length
            alike.setdefault((write.device, length, write.by_engine), []).append(write)
        for (device, length, by_engine), writes in alike.items():
            sources = _joined([write.sources for write in writes])
            targets = _joined([write.targets for write in writes])
            copier = self._copiers[device]
            try:
                if by_engine:
                    lengths = [np.full(len(w.sources), w.length, np.int64) for w in writes]
                    copy = copier.copy_by_engine(sources, targets, np.concatenate(lengths))
                else:
                    copy = copier.copy(sources, targets, length)
            except RuntimeError as error:
                for write in writes:
                    write.error = f"the GPU does not copy: {error}"
            else:
                self._started.append(copy)
                for write in writes:
                    write.copy = copy

    def _settle(self, peer: _Peer) -> None:
        for write_id, write in list(peer.writes.items()):
            if write.copy is not None and not write.copy.is_done():
                continue
            del peer.writes[write_id]
            error = write.error or (f"{peer.name} was disconnected" if peer.gone else None)
            runs = len(write.sources)
            moved = (0, 0) if error else (runs * write.length, runs)
            seconds = time.perf_counter() - write.started
            self._results.append(WriteResult(write_id, error, *moved, seconds))

    def _map(self, number: int, region: Region, export: _Export, process: int, peer: _Peer) -> int:
        """The address here of a peer's region."""
        ours = self._regions[number].device or 0
        if not region.num_pages:
            return 0
        device = cuda.Device(ours)
        if process == os.getpid():
            if region.device is not None and region.device != ours:
                device.enable_peer_access(region.device)
            return region.address
        base = device.open_memory(export.handle)
        peer.mapped.append((device, base))
        return base + export.offset

    def _unmap(self, peer: _Peer) -> None:
        while peer.mapped:
            device, address = peer.mapped.pop()
            device.close_memory(address)


def _joined(arrays: list[Int64Array]) -> Int64Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _export(region: Region) -> _Export:
    if not region.num_pages:
        return _Export(b"", 0)
    try:
        return _Export(*cuda.Device(region.device or 0).export_memory(region.address))
    except cuda.CudaError as error:
        raise ConfigurationError(
            f"{region} cannot be shared with other processes: {error}; allocate it with cudaMalloc "
            "(torch without expandable_segments)"
        ) from error


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
