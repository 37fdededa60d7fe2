"""Writes through NIXL (UCX: shared memory, CUDA IPC, RDMA, TCP).

NIXL's progress thread stays off, for it spins. So whoever calls `poll` drives progress, and the
target must do so too: at least while a peer's first write sets up the connection, and always where
UCX uses TCP. Descriptor lists are prepared once per peer, region and part of a page; a write then
picks pages by number, and NIXL merges neighbours.

An error of one write breaks the connection: the endpoint is torn down, which is what makes sure
that no byte follows, all writes in flight to that peer end with the error, and `write` raises
PeerError until `connect` is called again. Results of ended writes are held back until NIXL has let
go of them.

The target reads some writes itself (`transfer/pulling.py`) and must poll for that. Between GPUs
many small runs go through large blocks: a run costs 2.6 us whatever its size, so 1 MiB runs reach
219 GB/s of 394 and 288 KiB ones 79, 32 MiB blocks 383 (two H200s). In host memory of one host UCX
copies on the caller's core, so the target takes its share of large writes.

Options: `staging_bytes`, of the ring in each direction (default 512 MiB for GPU memory, 0 turns it
off), `staging_below` (runs shorter than this are staged), `staging_block`; `pull`, whether large
writes in host memory of one host are shared (`on`, `off`, or `auto`: unless there is an RDMA
device, which needs no core to copy), if both ends agree. All others go to NIXL's UCX plug-in
(`num_threads`, `ucx_devices`, ...); UCX itself reads UCX_* variables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
import uuid
from collections.abc import Sequence
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
from transfer.pulling import Piece, Pulling
from transfer.segments import plan_segments
from transfer.staging import Ring
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
_SHARE_FROM = 8 << 20
"""Smaller writes are not shared: they end before the target has looked."""
_POLL_BYTES = 64 << 20
"""Copied in one call of `poll`, as long as no write ends."""
_STOP_S = 5.0

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
    shares: bool


_ListKey = tuple[int, int, int, int, int]
"""Descriptors of all pages: region, offset, length, count, stride."""
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Metadata)


@dataclasses.dataclass(slots=True)
class _Write:
    bytes_moved: int
    descriptors: int
    started: float


@dataclasses.dataclass(slots=True)
class _Transfer:
    """What NIXL writes at once: a write, or a piece of one that the target has a share of."""

    handle: Any
    of: _Write | Piece


@dataclasses.dataclass(slots=True, eq=False)
class _Readable:
    """A source, as `admit` was told of it."""

    metadata: bytes
    regions: tuple[Region, ...]
    lists: dict[_ListKey, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True, eq=False)
class _Peer:
    name: str
    end: Description
    agent: str
    stages: bool
    """It takes what is staged."""
    lists: dict[tuple[int, PagePart], tuple[Any, Any]] = dataclasses.field(default_factory=dict)
    """(region, part) -> prepared descriptors of all source and of all target pages."""
    transfers: dict[int, _Transfer] = dataclasses.field(default_factory=dict)
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
        self._pull = options.pop("pull", "auto")
        if self._pull not in ("auto", "on", "off"):
            raise ConfigurationError(f"nixl's pull is auto, on or off, not {self._pull!r}")
        self._pulling: Pulling | None = None
        self._rings: tuple[Ring, Ring] | None = None
        """Outbound and inbound."""
        self._shares = False
        self._pulled: dict[int, _Write] = {}
        """Those that `_pulling` has."""
        self._readable: dict[str, _Readable] = {}
        """By agent."""
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
        self._own_lists: dict[_ListKey, Any] = {}
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
            self._make_pulling()
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
                        self._agent.get_agent_metadata(), self._rings is not None, self._shares
                    )
                ),
            )
        )

    def _make_pulling(self) -> None:
        device = next((r.device for r in self._regions if r.device is not None), None)
        if device is not None:
            self.capabilities = dataclasses.replace(
                self.capabilities, poll_s=0.00002, write_bytes=128 << 20
            )
        size = self._ring_bytes
        if size is None:
            size = 0 if device is None else _RING_BYTES
        if size:
            blocks = max(2, size // self._block_bytes)
            self._rings = (
                Ring(device, self._block_bytes, blocks),
                Ring(device, self._block_bytes, blocks),
            )
            for ring in self._rings:
                region = ring.region
                row = (region.address, region.num_pages * region.page_bytes, device or 0, "")
                self._registered.append(self._agent.register_memory([row], _memory_type(region)))
        self._shares = device is None and (
            self._pull == "on" or (self._pull == "auto" and not _INFINIBAND.exists())
        )
        if self._rings or self._shares:
            self._pulling = Pulling(
                self,
                self._short_name,
                self._agent.get_agent_metadata(),
                self._regions,
                self._rings,
                self._shares,
            )

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
        if self._pulling is not None and (metadata.stages or metadata.shares):
            self._pulling.connected(peer, agent)

    def reset(self, peer: str) -> None:
        if peer in self._peers:
            self._break(self._peers[peer], f"the connection to {peer} was reset")

    def disconnect(self, peer: str) -> None:
        error = f"{peer} was disconnected"
        if self._pulling is not None:
            self._pulling.dead(peer, error)
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
            bytes_moved=len(source_pages) * part.page_bytes,
            descriptors=len(runs),
            started=started,
        )
        arguments = region, source_pages, target_pages, part
        if self._is_to_be_staged(target, region, part, len(runs)):
            assert self._pulling is not None
            self._pulled[self._last_id] = write
            self._pulling.write_blocks(peer, self._last_id, *arguments)
        elif self._is_to_be_shared(target, write):
            assert self._pulling is not None
            self._pulled[self._last_id] = write
            self._pulling.write_shares(peer, self._last_id, *arguments)
        else:
            self._post(target, self._last_id, write, *arguments)
        return self._last_id

    def _post(
        self,
        peer: _Peer,
        number: int,
        of: _Write | Piece,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: PagePart,
    ) -> None:
        transfer = peer.transfers[number] = _Transfer(None, of)
        try:
            sources, targets = self._prepare(peer, region, part)
            transfer.handle = self._agent.make_prepped_xfer(
                "WRITE",
                sources,
                _descriptor_numbers(source_pages, part.count),
                targets,
                _descriptor_numbers(target_pages, part.count),
            )
            state = self._agent.transfer(transfer.handle)
        except NIXL_ERRORS as error:
            self._break(peer, f"NIXL cannot write to {peer.name}: {error}")
        else:
            self._settle(peer, number, state)

    def cancel(self, write_id: int) -> None:
        """What the target is to read and has not begun ends. NIXL itself gives up a write only by
        tearing down the connection, which hurts others."""
        if self._pulling is not None:
            self._pulling.cancel(write_id)

    def poll(self) -> list[WriteResult]:
        """Where writes are shared, it copies: until one has ended or all is done, within bounds."""
        moved = 0
        while self._agent is not None:
            before = moved
            self._progress()
            if self._pulling is not None:
                moved += self._pulling.pull() + self._write_shares()
                for write_id, reason in self._pulling.poll():
                    self._report(write_id, self._pulled.pop(write_id), reason)
            self._let_go()
            if self._results or moved == before or moved >= _POLL_BYTES:
                break
        results, self._results = self._results, []
        return results

    def _progress(self) -> None:
        # A peer's death may be reported here as well; its writes' own states tell.
        with contextlib.suppress(*NIXL_ERRORS):
            for agent, messages in self._agent.get_new_notifs().items():
                for message in messages:
                    if self._pulling is not None:
                        self._pulling.receive(agent, message)
        for peer in list(self._peers.values()):
            try:
                for number, transfer in list(peer.transfers.items()):
                    self._settle(peer, number, self._agent.check_xfer_state(transfer.handle))
                    if peer.error:
                        break
            except NIXL_ERRORS as error:
                self._break(peer, f"NIXL lost {peer.name}: {error}")

    def _write_shares(self) -> int:
        """One of ours to each peer; the bytes that were posted."""
        assert self._pulling is not None
        moved = 0
        for peer in list(self._peers.values()):
            piece = self._pulling.take(peer.name)
            if piece is not None:
                moved += piece.num_bytes
                self._last_id += 1
                pages = piece.source_pages, piece.target_pages
                self._post(peer, self._last_id, piece, piece.region, *pages, piece.part)
        return moved

    def close(self) -> None:
        if self._agent is None:
            return
        if self._pulling is not None:
            self._pulling.close()
        for agent in list(self._readable):
            self.expel(agent)
        for peer in list(self._peers.values()):
            self._break(peer, "closed")
        self._pulling = None
        self._release(self._own_lists)
        for registered in self._registered:
            with contextlib.suppress(*NIXL_ERRORS):
                self._agent.deregister_memory(registered)
        self._peers.clear()
        self._leaving.clear()
        self._registered.clear()
        # The agent must go while the interpreter still runs; at exit it can crash.
        self._agent = None
        for ring in self._rings or ():
            ring.close()
        self._rings = None

    def _prepare(self, peer: _Peer, region: int, part: PagePart) -> tuple[Any, Any]:
        """Descriptors of `part` of every page, on both sides; made at its first use."""
        found = peer.lists.get((region, part))
        if found is not None:
            return found
        sources = self._own(
            (region, part.source_offset, part.length, part.count, part.source_stride)
        )
        key = (region, part.target_offset, part.length, part.count, part.target_stride)
        peer.lists[region, part] = sources, self._list(peer.agent, peer.end.regions, key)
        return peer.lists[region, part]

    def _own(self, key: _ListKey) -> Any:
        """Of our pages, or of our inbound ring's units; made at its first use."""
        if key not in self._own_lists:
            regions = [*self._regions, *(ring.region for ring in (self._rings or ())[1:])]
            self._own_lists[key] = self._list("NIXL_INIT_AGENT", regions, key)
        return self._own_lists[key]

    def _list(self, agent: str, regions: Sequence[Region], key: _ListKey) -> Any:
        number, *rest = key
        region = regions[number]
        return self._agent.prep_xfer_dlist(agent, _descriptors(region, *rest), _memory_type(region))

    def _release(self, lists: dict[_ListKey, Any]) -> None:
        while lists:
            _, descriptors = lists.popitem()
            with contextlib.suppress(*NIXL_ERRORS):
                descriptors.release()

    def _settle(self, peer: _Peer, number: int, state: str) -> None:
        if state == "ERR":
            self._break(peer, f"NIXL's write to {peer.name} failed")
        elif state == "DONE" and number in peer.transfers:
            transfer = peer.transfers.pop(number)
            self._end(number, transfer.of, "")
            with contextlib.suppress(*NIXL_ERRORS):
                transfer.handle.release()

    def _end(self, number: int, of: _Write | Piece, error: str) -> None:
        if isinstance(of, _Write):
            self._report(number, of, error)
        elif self._pulling is not None:
            self._pulling.ended(of, error)

    def _report(self, write_id: int, write: _Write, error: str) -> None:
        seconds = time.perf_counter() - write.started
        done = (0, 0) if error else (write.bytes_moved, write.descriptors)
        self._results.append(WriteResult(write_id, error or None, *done, seconds))

    def _is_to_be_staged(self, peer: _Peer, region: int, part: PagePart, runs: int) -> bool:
        return (
            self._pulling is not None
            and self._rings is not None
            and peer.stages
            and self._regions[region].device == self._rings[0].region.device
            and runs >= _STAGE_RUNS
            and part.length < self._stage_below
            and self._pulling.fits(part)
        )

    def _is_to_be_shared(self, peer: _Peer, write: _Write) -> bool:
        return (
            self._pulling is not None
            and write.bytes_moved >= _SHARE_FROM
            and self._pulling.shares_with(peer.name)
        )

    # What `Pulling` needs of us.

    def send(self, agent: str, message: bytes) -> None:
        try:
            self._agent.send_notif(agent, message)
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot notify {agent}: {error}") from error

    def admit(self, metadata: bytes, regions: Sequence[Region]) -> str:
        try:
            agent: str = self._agent.add_remote_agent(metadata).decode()
        except NIXL_ERRORS as error:
            raise PeerError(f"NIXL cannot reach a source: {error}") from error
        if agent in self._readable:
            self._release(self._readable[agent].lists)
        self._readable[agent] = _Readable(metadata, tuple(regions))
        return agent

    def expel(self, agent: str) -> None:
        readable = self._readable.pop(agent, None)
        if readable is not None:
            self._release(readable.lists)
            if not any(peer.agent == agent for peer in (*self._peers.values(), *self._leaving)):
                with contextlib.suppress(*NIXL_ERRORS):
                    self._agent.remove_remote_agent(agent)

    def _readmit(self, agent: str) -> None:
        """NIXL has forgotten an agent that we no longer write to; we may still read from it."""
        if agent in self._readable:
            readable = self._readable[agent]
            with contextlib.suppress(PeerError):
                self.admit(readable.metadata, readable.regions)

    def start_read(
        self,
        agent: str,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: PagePart,
    ) -> Any:
        readable = self._readable.get(agent)
        if readable is None:
            raise PeerError(f"{agent} is out of reach")
        key = (region, part.source_offset, part.length, part.count, part.source_stride)
        handle = None
        try:
            if key not in readable.lists:
                readable.lists[key] = self._list(agent, readable.regions, key)
            handle = self._agent.make_prepped_xfer(
                "READ",
                self._own(
                    (region, part.target_offset, part.length, part.count, part.target_stride)
                ),
                _descriptor_numbers(target_pages, part.count),
                readable.lists[key],
                _descriptor_numbers(source_pages, part.count),
            )
            self._agent.transfer(handle)
        except NIXL_ERRORS as error:
            if handle is not None:
                self.stop(agent, handle)
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

    def stop(self, agent: str, handle: Any) -> None:
        started = time.monotonic()
        while not self.release(handle):
            if time.monotonic() > started + _STOP_S:
                # As with writes: without the endpoint no byte follows.
                with contextlib.suppress(*NIXL_ERRORS):
                    self._agent.remove_remote_agent(agent)
            if time.monotonic() > started + 2 * _STOP_S:
                raise TransportError(f"NIXL does not give up a read from {agent}")
            with contextlib.suppress(PeerError):
                self.is_read(handle)

    def _break(self, peer: _Peer, error: str) -> None:
        if self._pulling is not None:
            self._pulling.lost(peer.name, error)
        del self._peers[peer.name]
        peer.error = error
        self._leaving.append(peer)
        self._let_go()

    def _let_go(self) -> None:
        for peer in list(self._leaving):
            try:
                for transfer in peer.transfers.values():
                    if transfer.handle is not None:
                        transfer.handle.release()
                        transfer.handle = None
                while peer.lists:
                    key, (_, targets) = next(iter(peer.lists.items()))
                    targets.release()
                    del peer.lists[key]
                self._agent.remove_remote_agent(peer.agent)
            except NIXL_ERRORS:
                continue  # a write cannot be given up yet: the next poll tries again
            self._leaving.remove(peer)
            self._readmit(peer.agent)
            for number, transfer in peer.transfers.items():
                self._end(number, transfer.of, peer.error)


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
