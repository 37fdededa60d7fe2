"""Writes through NIXL (UCX: shared memory, CUDA IPC, RDMA, TCP).

NIXL's progress thread stays off, for it spins. So whoever calls `poll` drives progress, and the
target must do so too: at least while a peer's first write sets up the connection, and always where
UCX uses TCP. Descriptor lists are prepared once per peer, region and part of a page; a write then
picks pages by number, and NIXL merges neighbours.

An error of one write breaks the connection: the endpoint is torn down, which is what makes sure
that no byte follows, all writes in flight to that peer end with the error, and `write` raises
PeerError until `connect` is called again. Results of ended writes are held back until NIXL has let
go of them.

Options go to NIXL's UCX plug-in (`num_threads`, `ucx_devices`, ...); UCX itself reads UCX_*
variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import uuid
from typing import Any

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

# NIXL installs its own handler on standard output and announces every agent there.
logging.getLogger("nixl").setLevel(logging.WARNING)

_NIXL_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(
        value
        for name, value in vars(nixl._bindings).items()
        if name.startswith("nixl") and isinstance(value, type) and issubclass(value, Exception)
    ),
)


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
    lists: dict[tuple[int, PagePart], tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    """(region, part) -> prepared descriptors of all source and of all target pages."""
    writes: dict[int, _Write] = dataclasses.field(default_factory=dict)
    error: str = ""
    """Why it is being torn down."""


class NixlTransport(Transport):
    capabilities = Capabilities(device=True, remote=True, passive_target=False)

    def __init__(self, name: str, options: dict[str, str]) -> None:
        self._name = f"{name}.{uuid.uuid4().hex}"
        try:
            config = nixl._api.nixl_agent_config(enable_prog_thread=False, backends=[])
            self._agent: Any = nixl._api.nixl_agent(self._name, config)
            self._agent.create_backend("UCX", options)
        except _NIXL_ERRORS as error:
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
        except _NIXL_ERRORS as error:
            raise ConfigurationError(f"NIXL cannot register {regions}: {error}") from error

    def describe(self) -> bytes:
        return encode_description(
            Description(
                DESCRIPTION_VERSION,
                "nixl",
                self._name,
                tuple(self._regions),
                self._agent.get_agent_metadata(),
            )
        )

    def connect(self, peer: str, description: bytes) -> None:
        end = decode_description(description, peer, "nixl", self._regions)
        known = self._peers.get(peer)
        if known is not None and known.end == end:
            return
        self.disconnect(peer)
        if any(leaving.end.endpoint == end.endpoint for leaving in self._leaving):
            raise PeerError(f"{peer} still has writes that are being given up")
        try:
            agent = self._agent.add_remote_agent(end.metadata).decode()
        except _NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot use the description of {peer}: {error}") from error
        self._peers[peer] = _Peer(peer, end, agent)

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
        except _NIXL_ERRORS as error:
            self._break(target, f"NIXL cannot write to {peer}: {error}")
        else:
            self._settle(target, self._last_id, state)
        return self._last_id

    def cancel(self, write_id: int) -> None:
        """NIXL gives up a write only by tearing down the connection, which hurts others."""

    def poll(self) -> list[WriteResult]:
        # A peer's death may be reported here as well; its writes' own states tell.
        with contextlib.suppress(*_NIXL_ERRORS):
            if self._agent is not None:
                self._agent.get_new_notifs()
        for peer in list(self._peers.values()):
            try:
                for write_id, write in list(peer.writes.items()):
                    self._settle(peer, write_id, self._agent.check_xfer_state(write.handle))
                    if peer.error:
                        break
            except _NIXL_ERRORS as error:
                self._break(peer, f"NIXL lost {peer.name}: {error}")
        self._let_go()
        results, self._results = self._results, []
        return results

    def close(self) -> None:
        if self._agent is None:
            return
        for peer in list(self._peers.values()):
            self._break(peer, "closed")
        for dlist in self._sources.values():
            with contextlib.suppress(*_NIXL_ERRORS):
                dlist.release()
        for registered in self._registered:
            with contextlib.suppress(*_NIXL_ERRORS):
                self._agent.deregister_memory(registered)
        self._peers.clear()
        self._leaving.clear()
        self._sources.clear()
        self._registered.clear()
        # The agent must go while the interpreter still runs; at exit it can crash.
        self._agent = None

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
            seconds = time.perf_counter() - write.started
            self._results.append(
                WriteResult(write_id, None, write.bytes_moved, write.descriptors, seconds)
            )
            with contextlib.suppress(*_NIXL_ERRORS):
                write.handle.release()

    def _break(self, peer: _Peer, error: str) -> None:
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
            except _NIXL_ERRORS:
                continue  # a write cannot be given up yet: the next poll tries again
            self._leaving.remove(peer)
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


def _descriptor_numbers(pages: Int32Array, count: int) -> Int32Array:
    """Of the runs of `pages`, in lists made by `_descriptors`."""
    runs = np.arange(count, dtype=np.int32)
    return (pages.astype(np.int32)[:, None] * np.int32(count) + runs).ravel()
