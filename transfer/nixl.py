"""Writes through NIXL (UCX: shared memory, CUDA IPC, RDMA, TCP).

NIXL's progress thread stays off, for it spins. So whoever calls `poll` drives progress, and the
target must do so too: at least while a peer's first write sets up the connection, and always where
UCX uses TCP. Descriptor lists are prepared once per peer, region and part of a page; a write then
picks pages by number, and NIXL merges neighbours.

An error of one write breaks the connection: the endpoint is torn down, which is what makes sure
that no byte follows, all writes in flight to that peer end with the error, and `write` raises
PeerError until `connect` is called again. Results of ended writes are held back until NIXL has let
go of them.

Between GPUs many small runs go through large blocks (`transfer/staging.py`): a run costs 2.6 us
whatever its size, so 1 MiB runs reach 219 GB/s of 394 and 288 KiB ones 79, 32 MiB blocks 383 (two
H200s). The target must poll for that.

Options: `staging_bytes`, of the ring in each direction (default 512 MiB for GPU memory, 0 turns it
off), `staging_below` (runs shorter than this are staged), `staging_block`. All others go to NIXL's
UCX plug-in (`num_threads`, `ucx_devices`, ...); UCX itself reads UCX_* variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import nixl._api
import nixl._bindings
import numpy as np
import numpy.typing as npt

from transfer.endpoint import (
    DESCRIPTION_VERSION,
    Description,
    check_write,
    decode_description,
    encode_description,
)
from transfer.segments import plan_segments
from transfer.staging import Ring, Staging
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
_STAGE_BELOW = 4 << 20
_STAGE_RUNS = 32
"""Fewer runs than these are written directly: a block takes some 0.1 ms to go through."""
_BLOCK_BYTES = 64 << 20
_RING_BYTES = 512 << 20

# NIXL installs its own handler on standard output and announces every agent there.
logging.getLogger("nixl").setLevel(logging.WARNING)

NIXL_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(
        value
        for name, value in vars(nixl._bindings).items()
        if name.startswith("nixl") and isinstance(value, type) and issubclass(value, Exception)
    ),
)


class _Metadata(msgspec.Struct, frozen=True):
    agent: bytes
    """NIXL's own."""
    stages: bool


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Metadata)


@dataclasses.dataclass(slots=True)
class _Write:
    handle: Any
    bytes_moved: int
    descriptors: int
    started: float


@dataclasses.dataclass(slots=True, eq=False)
class _Peer:
    name: str
    end: Description
    agent: str
    stages: bool
    """It takes what is staged."""
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
        ring_bytes = options.pop("staging_bytes", None)
        self._ring_bytes = None if ring_bytes is None else int(ring_bytes)
        self._stage_below = int(options.pop("staging_below", _STAGE_BELOW))
        self._block_bytes = int(options.pop("staging_block", _BLOCK_BYTES))
        self._staging: Staging | None = None
        self._ring_memory: list[Ring] = []
        self._staged: dict[int, _Write] = {}
        self._rings: dict[str, Any] = {}
        """Prepared units of our two rings, and of those of the agents that write to us."""
        self._admitted: dict[str, tuple[bytes, Region]] = {}
        """What `admit` was told of those."""
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
                    self._registered.append(
                        self._agent.register_memory([row], _memory_type(region))
                    )
            self._make_staging()
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
                    _Metadata(self._agent.get_agent_metadata(), self._staging is not None)
                ),
            )
        )

    def _make_staging(self) -> None:
        device = next((r.device for r in self._regions if r.device is not None), None)
        if device is not None:
            self.capabilities = dataclasses.replace(
                self.capabilities, poll_s=0.00002, write_bytes=128 << 20
            )
        size = self._ring_bytes
        if size is None:
            size = 0 if device is None else _RING_BYTES
        if not size:
            return
        rings = [
            Ring(device, self._block_bytes, max(2, size // self._block_bytes)) for _ in range(2)
        ]
        for ring in rings:
            region = ring.region
            row = (region.address, region.num_pages * region.page_bytes, device or 0, "")
            self._registered.append(self._agent.register_memory([row], _memory_type(region)))
        self._ring_memory = rings
        outbound, inbound = rings
        self._rings[""] = self._agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", _unit_rows(inbound.region), _memory_type(inbound.region)
        )
        metadata = self._agent.get_agent_metadata()
        self._staging = Staging(self, self._short_name, metadata, self._regions, outbound, inbound)

    def connect(self, peer: str, description: bytes) -> None:
        end = decode_description(description, peer, "nixl", self._regions)
        known = self._peers.get(peer)
        if known is not None:
            if known.end == end:
                return
            self.disconnect(peer)
        if any(leaving.end.endpoint == end.endpoint for leaving in self._leaving):
            raise PeerError(f"{peer} still has writes that are being given up")
        try:
            metadata = _decoder.decode(end.metadata)
        except msgspec.MsgspecError as error:
            raise PeerError(f"the description of {peer} is not NIXL's: {error}") from error
        if any(
            (own.device is None) != (other.device is None)
            for own, other in zip(self._regions, end.regions, strict=True)
            if own.num_pages and other.num_pages
        ):
            raise PeerError(
                f"{peer} has its pages in the other kind of memory: between a GPU's and the host's "
                "of another process UCX moves 0.5 GB/s; use one kind on both sides"
            )
        try:
            agent = self._agent.add_remote_agent(metadata.agent).decode()
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot use the description of {peer}: {error}") from error
        self._peers[peer] = _Peer(peer, end, agent, metadata.stages)
        if self._staging is not None and metadata.stages:
            self._staging.connected(peer, agent)

    def reset(self, peer: str) -> None:
        if peer in self._peers:
            self._break(self._peers[peer], f"the connection to {peer} was reset")

    def disconnect(self, peer: str) -> None:
        error = f"{peer} was disconnected"
        if peer in self._peers:
            self._admitted.pop(self._peers[peer].agent, None)
            self._break(self._peers[peer], error)
        if self._staging is not None:
            self._staging.dead(peer, error)

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
        # A peer's death may be reported here as well; its writes' own states tell.
        with contextlib.suppress(*NIXL_ERRORS):
            if self._agent is not None:
                for agent, messages in self._agent.get_new_notifs().items():
                    for message in messages:
                        if self._staging is not None:
                            self._staging.receive(agent, message)
        for peer in list(self._peers.values()):
            try:
                for write_id, write in list(peer.writes.items()):
                    self._settle(peer, write_id, self._agent.check_xfer_state(write.handle))
                    if peer.error:
                        break
            except NIXL_ERRORS as error:
                self._break(peer, f"NIXL lost {peer.name}: {error}")
        if self._staging is not None and self._agent is not None:
            for write_id, reason in self._staging.poll():
                self._report(write_id, self._staged.pop(write_id), reason)
        self._let_go()
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        if self._agent is None:
            return
        for peer in list(self._peers.values()):
            self._break(peer, "closed")
        self._staging = None
        for dlist in (*self._sources.values(), *self._rings.values()):
            with contextlib.suppress(*NIXL_ERRORS):
                dlist.release()
        for registered in self._registered:
            with contextlib.suppress(*NIXL_ERRORS):
                self._agent.deregister_memory(registered)
        self._peers.clear()
        self._leaving.clear()
        self._sources.clear()
        self._rings.clear()
        self._registered.clear()
        # The agent must go while the interpreter still runs; at exit it can crash.
        self._agent = None
        while self._ring_memory:
            self._ring_memory.pop().close()

    def _prepare(self, peer: _Peer, region: int, part: PagePart) -> tuple[Any, Any]:
        """Descriptors of `part` of every page, on both sides; made at its first use."""
        found = peer.lists.get((region, part))
        if found is not None:
            return found
        key = (region, part.source_offset, part.length, part.count, part.source_stride)
        ours, theirs = self._regions[region], peer.end.regions[region]
        if key not in self._sources:
            rows = _descriptors(
                ours, part.source_offset, part.length, part.count, part.source_stride
            )
            self._sources[key] = self._agent.prep_xfer_dlist(
                "NIXL_INIT_AGENT", rows, _memory_type(ours)
            )
        rows = _descriptors(theirs, part.target_offset, part.length, part.count, part.target_stride)
        targets = self._agent.prep_xfer_dlist(peer.agent, rows, _memory_type(theirs))
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
        seconds = time.perf_counter() - write.started
        done = (0, 0) if error else (write.bytes_moved, write.descriptors)
        self._results.append(WriteResult(write_id, error or None, *done, seconds))

    def _is_to_be_staged(self, peer: _Peer, region: int, part: PagePart, runs: int) -> bool:
        return (
            self._staging is not None
            and peer.stages
            and self._regions[region].device == self._ring_memory[0].region.device
            and runs >= _STAGE_RUNS
            and part.length < self._stage_below
            and self._staging.fits(part)
        )

    # What `Staging` needs of us.

    def send(self, agent: str, message: bytes) -> None:
        try:
            self._agent.send_notif(agent, message)
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot notify {agent}: {error}") from error

    def admit(self, metadata: bytes, ring: Region) -> str:
        try:
            agent: str = self._agent.add_remote_agent(metadata).decode()
            if agent in self._rings:
                with contextlib.suppress(*NIXL_ERRORS):
                    self._rings.pop(agent).release()
            self._rings[agent] = self._agent.prep_xfer_dlist(
                agent, _unit_rows(ring), _memory_type(ring)
            )
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot reach a source's ring: {error}") from error
        self._admitted[agent] = metadata, ring
        return agent

    def _readmit(self, agent: str) -> None:
        """NIXL has forgotten an agent that we no longer write to; we may still read its ring."""
        if agent in self._admitted:
            with contextlib.suppress(*NIXL_ERRORS):
                self._rings.pop(agent).release()
            with contextlib.suppress(PeerError):
                self.admit(*self._admitted[agent])

    def start_read(self, agent: str, remote_units: Int32Array, units: Int32Array) -> Any:
        if agent not in self._rings:
            raise PeerError(f"{agent} is out of reach")
        try:
            handle = self._agent.make_prepped_xfer(
                "READ", self._rings[""], units, self._rings[agent], remote_units
            )
            self._agent.transfer(handle)
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot read from {agent}: {error}") from error
        return handle

    def is_read(self, handle: Any) -> bool:
        try:
            state = self._agent.check_xfer_state(handle)
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot read: {error}") from error
        if state == "ERR":
            raise PeerError("NIXL's read failed")
        return bool(state == "DONE")

    def release(self, handle: Any) -> bool:
        try:
            handle.release()
        except NIXL_ERRORS:
            return False
        return True

    def _break(self, peer: _Peer, error: str) -> None:
        if self._staging is not None:
            self._staging.lost(peer.name, error)
        del self._peers[peer.name]
        peer.error = error
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
            self._readmit(peer.agent)
            now = time.perf_counter()
            self._results += [
                WriteResult(write_id, peer.error, 0, 0, now - write.started)
                for write_id, write in peer.writes.items()
            ]


def _memory_type(region: Region) -> str:
    return "DRAM" if region.device is None else "VRAM"


def _descriptors(
    region: Region, offset: int, length: int, count: int, stride: int
) -> npt.NDArray[np.uint64]:
    """(address, bytes, device) of each run of each page."""
    pages = np.arange(region.num_pages, dtype=np.uint64)[:, None] * np.uint64(region.page_bytes)
    runs = np.arange(count, dtype=np.uint64) * np.uint64(stride)
    rows = np.empty((region.num_pages * count, 3), dtype=np.uint64)
    rows[:, 0] = (pages + runs).ravel() + np.uint64(region.address + offset)
    rows[:, 1] = length
    rows[:, 2] = region.device or 0
    return rows


def _unit_rows(ring: Region) -> npt.NDArray[np.uint64]:
    return _descriptors(ring, 0, ring.page_bytes, 1, 0)


def _descriptor_numbers(pages: Int32Array, count: int) -> Int32Array:
    """Of the runs of `pages`, in lists made by `_descriptors`."""
    runs = np.arange(count, dtype=np.int32)
    return (pages.astype(np.int32)[:, None] * np.int32(count) + runs).ravel()
