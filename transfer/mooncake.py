"""Writes through Mooncake's Transfer Engine (TCP; RDMA where the host has it).

The engine has threads of its own, which move the bytes, at the target as well. What is posted when,
and when a write is over, is in `transfer/mooncake_worker.py`. An error of one write breaks the
connection, and `write` raises PeerError until `connect` is called again.

The engine knows a peer by its address and keeps what it learned there. So each incarnation gets an
address that is spelt in its own way, and is opened by reading its identity from its memory.

It listens on all addresses, whatever `host` is: that is only what peers connect to. It lets whoever
reaches its ports read and write the registered memory. Environment variables that begin with MC_
tune it, as MC_TCP_PROGRESS_TIMEOUT_SEC, 30, after which a piece that does not move fails. `close`
takes a second, in which no Python runs. What a peer wrote before it died, and our kernel has, is
still written here: that takes milliseconds, and nothing stops it.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from transfer.endpoint import (
    DESCRIPTION_VERSION,
    Description,
    check_write,
    decode_description,
    encode_description,
)
from transfer.mooncake_worker import Peer, Worker, Write
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

# Read when it is loaded: it announces every step on standard error, unless told not to.
os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
import mooncake.engine

_PIECE_BYTES = 4 << 20


class _Metadata(msgspec.Struct, frozen=True):
    host: str
    port: int
    identity: bytes
    identity_address: int


class MooncakeTransport(Transport):
    """Options: `protocol`, tcp or rdma; `host`, our address as peers reach it; `device`, the RDMA
    devices to use, separated by commas."""

    capabilities = Capabilities(
        device=bool(mooncake.engine.SUPPORT_CUDA), remote=True, poll_s=0.0002
    )

    def __init__(self, name: str, options: dict[str, str]) -> None:
        unknown = set(options) - {"protocol", "host", "device"}
        if unknown:
            raise ConfigurationError(f"mooncake transport has no options {sorted(unknown)}")
        self._host = options.get("host", "127.0.0.1")
        self._engine: Any = _start_engine(
            self._host, options.get("protocol", "tcp"), options.get("device", "")
        )
        self._identity = np.frombuffer(uuid.uuid4().bytes, dtype=np.uint8).copy()
        self._endpoint = f"{name}.{self._identity.tobytes().hex()}"
        self._register_array(self._identity)
        self._regions: list[Region] = []
        self._peers: dict[str, tuple[Description, Peer]] = {}
        self._landings: list[npt.NDArray[np.uint8]] = []
        """Those of former peers too: the engine may still write there."""
        self._met: dict[tuple[str, int], list[str]] = {}
        """The incarnations that were met at an address."""
        self._writes: dict[int, Write] = {}
        self._last_id = 0
        self._worker = Worker(name, self._engine)

    def register(self, regions: list[Region]) -> None:
        if self._regions:
            raise TransportError("regions are registered once")
        if any(region.device is not None for region in regions) and not self.capabilities.device:
            raise ConfigurationError("this build of mooncake moves host memory only")
        for region in regions:
            size = region.num_pages * region.page_bytes
            if size and self._engine.register_memory(region.address, size):
                raise ConfigurationError(f"mooncake cannot register {region}")
        self._regions = list(regions)

    def describe(self) -> bytes:
        metadata = _Metadata(
            self._host,
            self._engine.get_rpc_port(),
            self._identity.tobytes(),
            self._identity.ctypes.data,
        )
        return encode_description(
            Description(
                DESCRIPTION_VERSION,
                "mooncake",
                self._endpoint,
                tuple(self._regions),
                msgspec.msgpack.encode(metadata),
            )
        )

    def connect(self, peer: str, description: bytes) -> None:
        end = decode_description(description, peer, "mooncake", self._regions)
        if peer in self._peers:
            known_end, known = self._peers[peer]
            if known_end == end and known.error is None:
                return
        try:
            metadata = msgspec.msgpack.decode(end.metadata, type=_Metadata)
        except msgspec.MsgspecError as error:
            raise PeerError(f"the description of {peer} does not say where it is") from error
        self.disconnect(peer)
        address = (metadata.host, metadata.port)
        for write in self._writes.values():
            old = write.peer
            if (old.host, old.port) == address and old.identity != metadata.identity:
                old.is_settled = True  # its address is taken, so its process is gone
        met = self._met.setdefault(address, [])
        if end.endpoint not in met:
            met.append(end.endpoint)
        segment = f"{metadata.host}:{'0' * met.index(end.endpoint)}{metadata.port}"
        landing = np.zeros_like(self._identity)
        self._register_array(landing)
        self._landings.append(landing)
        opened = Peer(
            peer, *address, segment, metadata.identity, metadata.identity_address, landing
        )
        self._peers[peer] = (end, opened)
        self._worker.open(opened)

    def disconnect(self, peer: str) -> None:
        if peer in self._peers:
            _, known = self._peers.pop(peer)
            known.error = known.error or f"{peer} was disconnected"
            self._worker.wake()

    def write(
        self,
        peer: str,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: PagePart | None = None,
    ) -> int:
        if peer not in self._peers or self._peers[peer][1].is_broken:
            raise PeerError(f"{peer} is not connected")
        end, target = self._peers[peer]
        part = check_write(
            peer, region, self._regions, end.regions, source_pages, target_pages, part
        )
        ours, theirs = self._regions[region], end.regions[region]
        runs = plan_segments(source_pages, target_pages, part, ours.page_bytes, theirs.page_bytes)
        pieces = collections.deque(
            (source + done, start + done, min(_PIECE_BYTES, length - done))
            for source, start, length in zip(
                (runs.source_offsets + ours.address).tolist(),
                (runs.target_offsets + theirs.address).tolist(),
                runs.lengths.tolist(),
                strict=True,
            )
            for done in range(0, length, _PIECE_BYTES)
        )
        self._last_id += 1
        moved = len(source_pages) * part.page_bytes
        write = Write(self._last_id, target, pieces, moved, len(runs), time.perf_counter())
        self._writes[write.write_id] = write
        self._worker.submit(write)
        return write.write_id

    def cancel(self, write_id: int) -> None:
        write = self._writes.get(write_id)
        if write is not None:
            write.error = write.error or "cancelled"
            self._worker.wake()

    def poll(self) -> list[WriteResult]:
        results = self._worker.results() if self._engine is not None else []
        for result in results:
            del self._writes[result.write_id]
        return results

    def close(self) -> None:
        if self._engine is None:
            return
        self._worker.stop()
        # A thread that is stuck with a peer keeps the engine alive: then nobody new gets in.
        self._engine.unregister_memory(self._identity.ctypes.data)
        for region in self._regions:
            if region.num_pages * region.page_bytes:
                self._engine.unregister_memory(region.address)
        self._peers.clear()
        self._writes.clear()
        # Its threads end here, and with them what is in flight.
        self._engine = None

    def _register_array(self, array: npt.NDArray[np.uint8]) -> None:
        if self._engine.register_memory(array.ctypes.data, array.nbytes):
            raise ConfigurationError(f"mooncake cannot register {array.nbytes} bytes")


def _start_engine(host: str, protocol: str, device: str) -> Any:
    if protocol not in ("tcp", "rdma"):
        raise ConfigurationError(f"mooncake transport has protocols tcp and rdma, not {protocol!r}")
    # What it is told is not what it takes: it uses RDMA where it finds a device, and else TCP.
    if protocol == "tcp":
        os.environ["MC_FORCE_TCP"] = "1"
    else:
        os.environ.pop("MC_FORCE_TCP", None)
        if not any(Path("/sys/class/infiniband").glob("*")):
            raise ConfigurationError("this host has no RDMA device; mooncake has protocol tcp too")
    engine = mooncake.engine.TransferEngine()
    # On the way it reports as an error that what it is about to make is not there.
    with _no_errors_logged():
        status = engine.initialize(host, "P2PHANDSHAKE", protocol, device)
    if status:
        raise ConfigurationError(
            f"mooncake does not start at {host} (status {status}); MC_LOG_LEVEL=INFO tells more"
        )
    return engine


@contextlib.contextmanager
def _no_errors_logged() -> Iterator[None]:
    """If errors are all that is logged."""
    try:
        library = ctypes.CDLL(mooncake.engine.__file__)
        level = ctypes.c_int.in_dll(library, "_ZN3fLI17FLAGS_minloglevelE")
    except ValueError:  # another glog than the one that is known: a line more
        level = ctypes.c_int()
    before = level.value
    level.value = 3 if before == 2 else before
    try:
        yield
    finally:
        level.value = before
