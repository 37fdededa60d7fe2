"""Writes through NIXL (UCX: shared memory, CUDA IPC, RDMA, TCP).

NIXL's progress thread stays off, for it spins. So whoever calls `poll` drives progress, and the
target must do so too: at least while a peer's first write sets up the connection, and always where
UCX uses TCP. Descriptor lists are prepared once per peer and region; a write then picks pages by
number, and NIXL merges neighbours.

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
    adjacent_runs,
    check_pages,
    decode_description,
    encode_description,
)
from transfer.transport import (
    ConfigurationError,
    Int32Array,
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
    targets: list[Any]
    """Prepared descriptor lists, by region."""
    writes: dict[int, _Write] = dataclasses.field(default_factory=dict)
    error: str = ""
    """Why it is being torn down."""


class NixlTransport(Transport):
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
        self._sources: list[Any] = []
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
                self._registered.append(self._agent.register_memory([row], _memory_type(region)))
                self._sources.append(
                    self._agent.prep_xfer_dlist(
                        "NIXL_INIT_AGENT", _pages(region), _memory_type(region)
                    )
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
        try:
            targets = [
                self._agent.prep_xfer_dlist(agent, _pages(region), _memory_type(region))
                for region in end.regions
            ]
        except _NIXL_ERRORS as error:
            self._agent.remove_remote_agent(agent)
            raise PeerError(f"NIXL cannot reach the regions of {peer}: {error}") from error
        self._peers[peer] = _Peer(peer, end, agent, targets)

    def disconnect(self, peer: str) -> None:
        if peer in self._peers:
            self._break(self._peers[peer], f"{peer} was disconnected")

    def write(
        self, peer: str, region: int, source_pages: Int32Array, target_pages: Int32Array
    ) -> int:
        target = self._peers.get(peer)
        if target is None:
            raise PeerError(f"{peer} is not connected")
        if len(source_pages) != len(target_pages):
            raise ValueError(f"{len(source_pages)} source and {len(target_pages)} target pages")
        check_pages(source_pages, self._regions[region], f"our region {region}")
        check_pages(target_pages, target.end.regions[region], f"region {region} of {peer}")

        self._last_id += 1
        started = time.perf_counter()
        if not len(source_pages):
            self._results.append(WriteResult(self._last_id, None, 0, 0, 0.0))
            return self._last_id
        write = _Write(
            handle=None,
            bytes_moved=len(source_pages) * self._regions[region].page_bytes,
            descriptors=len(adjacent_runs(source_pages, target_pages)),
            started=started,
        )
        target.writes[self._last_id] = write
        try:
            write.handle = self._agent.make_prepped_xfer(
                "WRITE",
                self._sources[region],
                np.ascontiguousarray(source_pages, dtype=np.int32),
                target.targets[region],
                np.ascontiguousarray(target_pages, dtype=np.int32),
            )
            state = self._agent.transfer(write.handle)
        except _NIXL_ERRORS as error:
            self._break(target, f"NIXL cannot write to {peer}: {error}")
        else:
            self._settle(target, self._last_id, state)
        return self._last_id

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
        for dlist in self._sources:
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
                while peer.targets:
                    peer.targets[-1].release()
                    peer.targets.pop()
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


def _pages(region: Region) -> npt.NDArray[np.uint64]:
    """(address, bytes, device) of each page."""
    rows = np.empty((region.num_pages, 3), dtype=np.uint64)
    rows[:, 0] = region.address + np.arange(region.num_pages, dtype=np.uint64) * np.uint64(
        region.page_bytes
    )
    rows[:, 1] = region.page_bytes
    rows[:, 2] = region.device or 0
    return rows
