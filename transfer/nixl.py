"""Writes through NIXL (UCX: shared memory, CUDA IPC, RDMA, TCP).

NIXL's progress thread stays off, for it spins. So whoever calls `poll` drives progress, and the
target must do so too: at least while a peer's first write sets up the connection, and always where
UCX uses TCP. Descriptor lists are prepared once per peer, region and part of a page; a write then
picks pages by number, and NIXL merges neighbours.

An error of one write breaks the connection: the endpoint is torn down, which is what makes sure
that no byte follows, all writes in flight to that peer end with the error, and `write` raises
PeerError until `connect` is called again. Results of ended writes are held back until NIXL has let
go of them.

In host memory UCX copies between processes in the call that posts a write, by one core: 4.7 GB/s in
pages of 2.3 MiB. So a part of each longer write goes through a second agent, in a thread of its own
(`transfer/lane.py`), and they reach 8. NIXL's own threads (`num_threads`) do the same, but share
UCX's workers without a lock: tearing down a connection while they copy, for whichever peer, crashes
the process.

Many small runs go through blocks (`transfer/staging.py`), for a run costs some time whatever its
size; the target must poll for that. Between GPUs it is 2.6 us: 1 MiB runs reach 219 GB/s of 394 and
288 KiB ones 79, 32 MiB blocks 383 (two H200s). In host memory, with both threads, it is 1.4 us:
runs of 512 bytes reach 0.4 GB/s and of 2 KiB 1.5, blocks of them 2.0 and 2.2; at 4 KiB both reach
2.6. Blocks take 0.55 core-seconds a gigabyte there, to pack, read and unpack, so no more than 3.6.

Options: `threads` that copy in host memory (2 unless told); `staging_bytes`, of the ring in each
direction (512 MiB for GPU memory, 16 MiB for the host's; 0 turns it off), `staging_below` (runs
shorter than this are staged), `staging_runs` (if there are as many), `staging_block`. All others go
to NIXL's UCX plug-in (`num_threads`, `ucx_devices`, ...); UCX itself reads UCX_* variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import nixl._api
import numpy as np

from transfer.endpoint import (
    DESCRIPTION_VERSION,
    Description,
    check_write,
    decode_description,
    encode_description,
)
from transfer.lane import Lane
from transfer.nixl_wire import NIXL_ERRORS, NixlWire, memory_type, run_rows
from transfer.rings import Ring, make_ring
from transfer.segments import plan_segments
from transfer.staging import Staging
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

_INFINIBAND = Path("/sys/class/infiniband")
_THREADS = 2
_SHARE_BYTES = 1 << 20
"""From here on a write is worth a thread's waking up."""


@dataclasses.dataclass(frozen=True, slots=True)
class _StagingPolicy:
    ring_bytes: int
    block_bytes: int
    below: int
    """Runs of fewer bytes are staged,"""
    runs: int
    """if there are as many in a write: a block takes some time to go through."""


_GPU_STAGING = _StagingPolicy(512 << 20, 64 << 20, 4 << 20, 64)
_HOST_STAGING = _StagingPolicy(16 << 20, 2 << 20, 4 << 10, 1024)
_STAGING = {
    "staging_bytes": "ring_bytes",
    "staging_block": "block_bytes",
    "staging_below": "below",
    "staging_runs": "runs",
}
"""Options, and which of the policy's fields they set."""


class _Metadata(msgspec.Struct, frozen=True):
    agent: bytes
    """NIXL's own."""
    block_bytes: int
    """Of the blocks that it takes; 0: none."""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Metadata)


@dataclasses.dataclass(slots=True)
class _Write:
    handle: Any
    bytes_moved: int
    descriptors: int
    started: float


@dataclasses.dataclass(slots=True, eq=False)
class _Shared:
    """A write of which lanes have shares."""

    peer: _Peer
    write: _Write
    left: int
    """Shares that have not ended."""
    error: str = ""


@dataclasses.dataclass(slots=True, eq=False)
class _Peer:
    name: str
    end: Description
    agent: str
    block_bytes: int
    lists: dict[tuple[int, PagePart], tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    """(region, part) -> prepared descriptors of all source and of all target pages."""
    writes: dict[int, _Write] = dataclasses.field(default_factory=dict)
    error: str = ""
    """Why it is being torn down."""


class NixlTransport(Transport):
    capabilities = Capabilities(device=True, remote=True, passive_target=False)

    def __init__(self, name: str, options: dict[str, str]) -> None:
        self._name = f"{name}.{uuid.uuid4().hex}"
        self._short_name = name
        threads = options.pop("threads", None)
        self._num_threads = _THREADS if threads is None else int(threads)
        self._policy_options = {
            field: int(options.pop(name)) for name, field in _STAGING.items() if name in options
        }
        self._policy = _HOST_STAGING
        self._staging: Staging | None = None
        self._wire: NixlWire | None = None
        self._rings: list[Ring] = []
        self._staged: dict[int, _Write] = {}
        if not _INFINIBAND.exists():
            # UCX's module for it would do nothing but load the system's libibverbs, if that is
            # there, and with it a second libnl beside the wheel's: the process then crashes at its
            # exit.
            os.environ.setdefault("UCX_MODULES", "^ib")
        try:
            config = nixl._api.nixl_agent_config(enable_prog_thread=False, backends=[])
            self._agent: Any = nixl._api.nixl_agent(self._name, config)
            self._agent.create_backend("UCX", options)
        except NIXL_ERRORS as error:
            raise ConfigurationError(f"NIXL's UCX plug-in does not start: {error}") from error
        self._options = options
        self._lanes: list[Lane] = []
        self._shared: dict[int, _Shared] = {}
        self._regions: list[Region] = []
        self._registered: list[Any] = []
        self._sources: dict[tuple[int, int, int, int, int], Any] = {}
        """(region, offset, length, count, stride) -> prepared descriptors of all our pages; peers
        share them."""
        self._peers: dict[str, _Peer] = {}
        self._leaving: list[_Peer] = []
        self._results: list[WriteResult] = []
        self._last_id = 0

    def register(self, regions: list[Region]) -> None:
        if self._regions:
            raise TransportError("regions are registered once")
        self._regions = list(regions)
        try:
            for region in regions:
                size = region.num_pages * region.page_bytes
                row = (region.address, size, region.device or 0, "")
                if size:
                    self._registered.append(self._agent.register_memory([row], memory_type(region)))
            self._make_staging()
            self._make_lanes()
        except NIXL_ERRORS as error:
            raise ConfigurationError(f"NIXL cannot register {regions}: {error}") from error

    def describe(self) -> bytes:
        return encode_description(
            Description(
                DESCRIPTION_VERSION,
                "nixl",
                self._name,
                tuple(self._regions),
                _encoder.encode(
                    _Metadata(
                        self._agent.get_agent_metadata(),
                        self._policy.block_bytes if self._staging is not None else 0,
                    )
                ),
            )
        )

    def _make_staging(self) -> None:
        device = _staging_device(self._regions)
        if device is not None:
            self.capabilities = dataclasses.replace(
                self.capabilities, poll_s=0.00002, write_bytes=128 << 20
            )
        defaults = _HOST_STAGING if device is None else _GPU_STAGING
        self._policy = policy = dataclasses.replace(defaults, **self._policy_options)
        if not policy.ring_bytes:
            return
        num_blocks = max(2, policy.ring_bytes // policy.block_bytes)
        for _ in range(2):
            ring = make_ring(device, policy.block_bytes, num_blocks)
            self._rings.append(ring)
            region = ring.region
            row = (region.address, region.num_pages * region.page_bytes, device or 0, "")
            self._registered.append(self._agent.register_memory([row], memory_type(region)))
        outbound, inbound = self._rings
        self._wire = NixlWire(self._agent, inbound.region, self._is_peer)
        metadata = self._agent.get_agent_metadata()
        self._staging = Staging(
            self._wire, self._short_name, metadata, self._regions, outbound, inbound
        )

    def _make_lanes(self) -> None:
        if any(region.device is not None for region in self._regions):
            return

        def make() -> Transport:
            options = self._options | {"threads": "1", "staging_bytes": "0"}
            inner = NixlTransport(self._short_name, options)
            inner.register(self._regions)
            return inner

        self._lanes = [Lane(make) for _ in range(self._num_threads - 1)]

    def connect(self, peer: str, description: bytes) -> None:
        end = decode_description(description, peer, "nixl", self._regions)
        known = self._peers.get(peer)
        if known is not None:
            if known.end == end:
                return
            self.disconnect(peer)
        leaving = [*self._leaving, *(shared.peer for shared in self._shared.values())]
        if any(leaver.end.endpoint == end.endpoint for leaver in leaving):
            raise PeerError(f"{peer} still has writes that are being given up")
        try:
            metadata = _decoder.decode(end.metadata)
        except msgspec.MsgspecError as error:
            raise PeerError(f"the description of {peer} is not NIXL's: {error}") from error
        try:
            agent = self._agent.add_remote_agent(metadata.agent).decode()
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot use the description of {peer}: {error}") from error
        self._peers[peer] = _Peer(peer, end, agent, metadata.block_bytes)
        if self._staging is not None and metadata.block_bytes:
            self._staging.connected(peer, agent, metadata.block_bytes)
        for lane in self._lanes:
            lane.connect(peer, description)

    def reset(self, peer: str) -> None:
        if peer in self._peers:
            self._break(self._peers[peer], f"the connection to {peer} was reset")

    def disconnect(self, peer: str) -> None:
        error = f"{peer} was disconnected"
        if self._staging is not None:
            self._staging.dead(peer, error)
        if peer in self._peers:
            self._break(self._peers[peer], error)

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
        part = check_write(
            peer, region, self._regions, target.end.regions, source_pages, target_pages, part
        )
        self._last_id += 1
        started = time.perf_counter()
        if not len(source_pages):
            self._results.append(WriteResult(self._last_id, None, 0, 0, 0.0))
            return self._last_id
        source_region, target_region = self._regions[region], target.end.regions[region]
        runs = plan_segments(
            source_pages,
            target_pages,
            part,
            source_region.page_bytes,
            target_region.page_bytes,
        )
        write = _Write(
            handle=None,
            bytes_moved=len(source_pages) * part.page_bytes,
            descriptors=len(runs),
            started=started,
        )
        if self._is_to_be_staged(target, region, part, len(runs)):
            assert self._staging is not None
            self._staged[self._last_id] = write
            self._staging.write(peer, self._last_id, region, source_pages, target_pages, part)
            return self._last_id
        target.writes[self._last_id] = write
        source_pages, target_pages = self._share(
            self._last_id, target, region, source_pages, target_pages, part
        )
        try:
            sources, targets = self._prepare(target, region, part)
            write.handle = self._agent.make_prepped_xfer(
                "WRITE",
                sources,
                _descriptor_numbers(source_pages, part.count),
                targets,
                _descriptor_numbers(target_pages, part.count),
            )
            state = self._agent.transfer(write.handle)
        except NIXL_ERRORS as error:
            self._break(target, f"NIXL cannot write to {peer}: {error}")
        else:
            self._settle(target, self._last_id, state)
        return self._last_id

    def cancel(self, write_id: int) -> None:
        """What is staged and not offered ends. NIXL itself gives up a write only by tearing down
        the connection, which hurts others."""
        if self._staging is not None:
            self._staging.cancel(write_id)

    def poll(self) -> list[WriteResult]:
        for peer in list(self._peers.values()):
            try:
                for write_id, write in list(peer.writes.items()):
                    self._settle(peer, write_id, self._agent.check_xfer_state(write.handle))
                    if peer.error:
                        break
            except NIXL_ERRORS as error:
                self._break(peer, f"NIXL lost {peer.name}: {error}")
        self._poll_staging()
        self._poll_lanes()
        self._let_go()
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        if self._agent is None:
            return
        for peer in list(self._peers.values()):
            self._break(peer, "closed")
        for lane in self._lanes:
            lane.close()
        self._poll_lanes()
        self._lanes.clear()
        self._staging = None
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        for dlist in self._sources.values():
            with contextlib.suppress(*NIXL_ERRORS):
                dlist.release()
        for registered in self._registered:
            with contextlib.suppress(*NIXL_ERRORS):
                self._agent.deregister_memory(registered)
        self._peers.clear()
        self._leaving.clear()
        self._sources.clear()
        self._registered.clear()
        # The agent must go while the interpreter still runs; at exit it can crash.
        self._agent = None
        while self._rings:
            self._rings.pop().close()

    def _share(
        self,
        write_id: int,
        peer: _Peer,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: PagePart,
    ) -> tuple[Int32Array, Int32Array]:
        """Give the lanes their shares of a write; returns ours."""
        lanes = [lane for lane in self._lanes if lane.is_ready(peer.name)]
        num_bytes = len(source_pages) * part.page_bytes
        if not lanes or num_bytes < _SHARE_BYTES or len(source_pages) <= len(lanes):
            return source_pages, target_pages
        ours, *shares = zip(
            np.array_split(source_pages, len(lanes) + 1),
            np.array_split(target_pages, len(lanes) + 1),
            strict=True,
        )
        self._shared[write_id] = _Shared(peer, peer.writes[write_id], len(lanes) + 1)
        for lane, share in zip(lanes, shares, strict=True):
            lane.write((write_id, peer.name, region, *share, part))
        return ours

    def _poll_lanes(self) -> None:
        for lane in self._lanes:
            for write_id, error in lane.poll():
                shared = self._shared[write_id]
                self._report(write_id, shared.write, error or "")
                if error and not shared.peer.error:
                    self._break(shared.peer, error)

    def _prepare(self, peer: _Peer, region: int, part: PagePart) -> tuple[Any, Any]:
        """Descriptors of `part` of every page, on both sides; made at its first use."""
        found = peer.lists.get((region, part))
        if found is not None:
            return found
        key = (region, part.source_offset, part.length, part.count, part.source_stride)
        ours, theirs = self._regions[region], peer.end.regions[region]
        if key not in self._sources:
            rows = run_rows(ours, part.source_offset, part.length, part.count, part.source_stride)
            self._sources[key] = self._agent.prep_xfer_dlist(
                "NIXL_INIT_AGENT", rows, memory_type(ours)
            )
        rows = run_rows(theirs, part.target_offset, part.length, part.count, part.target_stride)
        targets = self._agent.prep_xfer_dlist(peer.agent, rows, memory_type(theirs))
        peer.lists[region, part] = self._sources[key], targets
        return peer.lists[region, part]

    def _settle(self, peer: _Peer, write_id: int, state: str) -> None:
        if state == "ERR":
            self._break(peer, f"NIXL's write to {peer.name} failed")
        elif state == "DONE" and write_id in peer.writes:
            write = peer.writes.pop(write_id)
            self._report(write_id, write, "")
            with contextlib.suppress(*NIXL_ERRORS):
                write.handle.release()

    def _report(self, write_id: int, write: _Write, error: str) -> None:
        """A write has ended, or a share of it."""
        shared = self._shared.get(write_id)
        if shared is not None:
            error = shared.error = shared.error or error
            shared.left -= 1
            if shared.left:
                return
            del self._shared[write_id]
        seconds = time.perf_counter() - write.started
        done = (0, 0) if error else (write.bytes_moved, write.descriptors)
        self._results.append(WriteResult(write_id, error or None, *done, seconds))

    def _poll_staging(self) -> None:
        """As long as there are blocks to copy: whoever sleeps keeps the other side waiting."""
        for _ in range(2 * self._rings[0].num_blocks if self._rings else 1):
            self._receive()
            if self._staging is None:
                return
            copies = sum(ring.num_copies for ring in self._rings)
            for write_id, reason in self._staging.poll():
                self._report(write_id, self._staged.pop(write_id), reason)
            if copies == sum(ring.num_copies for ring in self._rings):
                return

    def _receive(self) -> None:
        # A peer's death may be reported here as well; its writes' own states tell.
        with contextlib.suppress(*NIXL_ERRORS):
            if self._agent is not None:
                for agent, messages in self._agent.get_new_notifs().items():
                    for message in messages:
                        if self._staging is not None:
                            self._staging.receive(agent, message)

    def _is_to_be_staged(self, peer: _Peer, region: int, part: PagePart, runs: int) -> bool:
        return (
            self._staging is not None
            and bool(peer.block_bytes)
            and runs >= self._policy.runs
            and part.length < self._policy.below
            and all(
                # Copies stay within a device, or the host.
                regions[region].device == _staging_device(regions)
                for regions in (self._regions, peer.end.regions)
            )
            and self._staging.fits(peer.name, part)
        )

    def _is_peer(self, agent: str) -> bool:
        return any(peer.agent == agent for peer in (*self._peers.values(), *self._leaving))

    def _break(self, peer: _Peer, error: str) -> None:
        if self._staging is not None:
            self._staging.lost(peer.name, error)
        del self._peers[peer.name]
        peer.error = error
        for lane in self._lanes:
            lane.disconnect(peer.name)
        self._leaving.append(peer)
        self._let_go()

    def _let_go(self) -> None:
        for peer in list(self._leaving):
            try:
                for write in peer.writes.values():
                    if write.handle is not None:
                        write.handle.release()
                        write.handle = None
                while peer.lists:
                    key, (_, targets) = next(iter(peer.lists.items()))
                    targets.release()
                    del peer.lists[key]
                self._agent.remove_remote_agent(peer.agent)
            except NIXL_ERRORS:
                continue  # a write cannot be given up yet: the next poll tries again
            self._leaving.remove(peer)
            if self._wire is not None:
                self._wire.readmit(peer.agent)
            for write_id, write in peer.writes.items():
                self._report(write_id, write, peer.error)


def _staging_device(regions: Sequence[Region]) -> int | None:
    """Where the rings of an endpoint with these regions are."""
    return next((region.device for region in regions if region.device is not None), None)


def _descriptor_numbers(pages: Int32Array, count: int) -> Int32Array:
    """Of the runs of `pages`, in lists made by `run_rows`."""
    runs = np.arange(count, dtype=np.int32)
    return (pages.astype(np.int32)[:, None] * np.int32(count) + runs).ravel()
