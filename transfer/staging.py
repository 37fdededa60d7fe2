"""Small runs in large blocks, where a link moves blocks faster than runs.

The source packs the runs of a write into a block of its ring and offers it; the target reads the
block into its own ring (one-sided), unpacks it into its pages and says so. Packing, reading and
unpacking of different blocks overlap. Each side uses its own memory only, so nothing has to be
given back by a peer that dies.

    source                                 target
    Hello(epoch)                      ->   forgets earlier epochs of this endpoint, whole
                                      <-   Welcome(epoch)
    Offer(piece: block, pages, part)  ->   reads, unpacks
                                      <-   Done(piece) or Refused(piece)

A piece that was offered may be unpacked at any time, also after the link has failed. So its write
ends only by the answer, by a Welcome to a later epoch (the target has fenced the earlier ones), or
by `dead`: the target is known to have ended.

Not thread-safe; owned by the transport, which carries the messages in order.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
from typing import Any, Protocol

import msgspec
import numpy as np

from transfer.segments import plan_segments, run_offsets
from transfer.transport import Int32Array, PagePart, Region, TransportError

UNIT_BYTES = 1 << 20
"""Blocks are read in whole units, so that descriptors can be prepared."""

# ---------------------------------------------------------------------------------------- messages


class Hello(msgspec.Struct, frozen=True, tag=1, array_like=True):
    epoch: int
    name: str
    ring: Region
    """The source's, in units."""
    metadata: bytes
    """The transport's own, for reaching the source."""


class Welcome(msgspec.Struct, frozen=True, tag=2, array_like=True):
    epoch: int


class Offer(msgspec.Struct, frozen=True, tag=3, array_like=True):
    epoch: int
    piece: int
    unit: int
    num_bytes: int
    region: int
    pages: bytes
    """int32."""
    offset: int
    length: int
    count: int
    stride: int


class Done(msgspec.Struct, frozen=True, tag=4, array_like=True):
    piece: int


class Refused(msgspec.Struct, frozen=True, tag=5, array_like=True):
    piece: int
    reason: str


Message = Hello | Welcome | Offer | Done | Refused
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

# ------------------------------------------------------------------------------- what is built upon


class Copying(Protocol):
    """A copy within reach of this process, under way."""

    def is_done(self) -> bool: ...
    def wait(self) -> None: ...


class Wire(Protocol):
    """The transport below. Agents are names of endpoints; errors are TransportErrors."""

    def send(self, agent: str, message: bytes) -> None: ...

    def admit(self, metadata: bytes, ring: Region) -> str:
        """Make an endpoint and its ring readable; returns its agent."""

    def start_read(self, agent: str, remote_units: Int32Array, units: Int32Array) -> Any:
        """Read units of `agent`'s ring into ours."""

    def is_read(self, handle: Any) -> bool:
        """Raises TransportError when the read failed."""

    def release(self, handle: Any) -> bool:
        """Whether the read is over and forgotten; else to be tried again."""


class Ring:
    """Memory of a device, or of the host, in blocks of `block_bytes`, and copies into and out of
    it."""

    def __init__(self, device: int | None, block_bytes: int, num_blocks: int) -> None:
        size = block_bytes * num_blocks
        self._copier: Any = None
        self._device: Any = None
        if device is None:
            self._memory = np.empty(size, dtype=np.uint8)
            address = self._memory.ctypes.data
        else:
            from transfer import cuda
            from transfer.gpu import RunCopier

            self._device = cuda.Device(device)
            self._copier = RunCopier(device)
            address = self._device.allocate(size)
        self.block_bytes = block_bytes
        self.num_blocks = num_blocks
        self.region = Region(address, size // UNIT_BYTES, UNIT_BYTES, device)

    def close(self) -> None:
        """Only when nobody reads or writes it any more."""
        if self._device is not None:
            self._device.free(self.region.address)

    def unit(self, block: int) -> int:
        return block * (self.block_bytes // UNIT_BYTES)

    def pack(self, block: int, region: Region, pages: Int32Array, part: PagePart) -> Copying:
        """Part of each page, end to end, into a block."""
        places = np.arange(len(pages), dtype=np.int32)
        packed = PagePart(
            part.source_offset, 0, part.length, part.count, part.source_stride, part.length
        )
        address = self.region.address + block * self.block_bytes
        return self._copy(region, pages, _packed(address, part), places, packed)

    def unpack(self, block: int, region: Region, pages: Int32Array, part: PagePart) -> Copying:
        places = np.arange(len(pages), dtype=np.int32)
        packed = PagePart(
            0, part.target_offset, part.length, part.count, part.length, part.target_stride
        )
        address = self.region.address + block * self.block_bytes
        return self._copy(_packed(address, part), places, region, pages, packed)

    def _copy(
        self,
        source: Region,
        source_pages: Int32Array,
        target: Region,
        target_pages: Int32Array,
        part: PagePart,
    ) -> Copying:
        if self._copier is not None:
            sources = run_offsets(
                source_pages, source.page_bytes, part.source_offset, part.count, part.source_stride
            )
            targets = run_offsets(
                target_pages, target.page_bytes, part.target_offset, part.count, part.target_stride
            )
            copied: Copying = self._copier.copy(
                sources + source.address, targets + target.address, part.length
            )
            return copied
        runs = plan_segments(source_pages, target_pages, part, source.page_bytes, target.page_bytes)
        for to, origin, length in zip(
            (runs.target_offsets + target.address).tolist(),
            (runs.source_offsets + source.address).tolist(),
            runs.lengths.tolist(),
            strict=True,
        ):
            ctypes.memmove(to, origin, length)
        return _Copied()


class _Copied:
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        pass


def _packed(address: int, part: PagePart) -> Region:
    """A block as an array of page parts."""
    return Region(address, 0, part.page_bytes)


# ------------------------------------------------------------------------------------------- states


@dataclasses.dataclass(slots=True, eq=False)
class _Target:
    """A connection to a peer that we write to."""

    peer: str
    agent: str
    epoch: int
    welcome: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class _Write:
    pieces: int
    """Not yet ended."""
    error: str = ""


@dataclasses.dataclass(slots=True, eq=False)
class _Piece:
    """Outbound: queued (no block), packing (a copy), offered."""

    number: int
    write_id: int
    target: _Target
    region: int
    source_pages: Int32Array
    target_pages: Int32Array
    part: PagePart
    block: int = -1
    copying: Copying | None = None


@dataclasses.dataclass(slots=True, eq=False)
class _Source:
    """A peer that writes to us."""

    agent: str
    name: str
    epoch: int


@dataclasses.dataclass(slots=True, eq=False)
class _Inbound:
    """An offer: waiting (no block), being read (a handle), being unpacked (a copy)."""

    source: _Source
    offer: Offer
    block: int = -1
    reading: Any = None
    copying: Copying | None = None
    dropped: bool = False


class Staging:
    def __init__(
        self,
        wire: Wire,
        name: str,
        metadata: bytes,
        regions: list[Region],
        outbound: Ring,
        inbound: Ring,
    ) -> None:
        """`outbound`'s region and metadata are what peers need to read it."""
        self._wire = wire
        self._name = name
        self._metadata = metadata
        self._regions = regions
        self._outbound = outbound
        self._inbound = inbound
        self._free_out = list(range(outbound.num_blocks))
        self._free_in = list(range(inbound.num_blocks))
        self._numbers = itertools.count(1)
        self._targets: dict[str, _Target] = {}
        """By peer's name."""
        self._sources: dict[str, _Source] = {}
        """By agent."""
        self._queue: list[_Piece] = []
        self._packing: list[_Piece] = []
        self._offered: dict[int, _Piece] = {}
        self._writes: dict[int, _Write] = {}
        self._arrived: list[_Inbound] = []
        self._ended: list[tuple[int, str]] = []

    # ------------------------------------------------------------------------------------ outbound

    def connected(self, peer: str, agent: str) -> None:
        """`peer` can be reached, for the first time or again; what is in doubt ends when it has
        answered."""
        target = _Target(peer, agent, next(self._numbers))
        for piece in [p for p in self._offered.values() if p.target.peer == peer]:
            if piece.target.agent != agent:
                self._end(piece, f"{peer} has restarted")
        self._targets[peer] = target
        ring = self._outbound.region
        self._send(agent, Hello(target.epoch, self._name, ring, self._metadata))

    def write(
        self,
        peer: str,
        write_id: int,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: PagePart,
    ) -> None:
        """To a connected peer. A part of a page must fit into a block. The end is told by
        `poll`."""
        target = self._targets[peer]
        at_once = self._outbound.block_bytes // part.page_bytes
        cuts = range(0, len(source_pages), at_once)
        self._writes[write_id] = _Write(len(cuts))
        for start in cuts:
            pages = slice(start, start + at_once)
            self._queue.append(
                _Piece(
                    next(self._numbers),
                    write_id,
                    target,
                    region,
                    source_pages[pages],
                    target_pages[pages],
                    part,
                )
            )
        self._pack()

    def fits(self, part: PagePart) -> bool:
        return part.page_bytes <= self._outbound.block_bytes

    def cancel(self, write_id: int) -> None:
        """Pieces that are not offered yet end."""
        for piece in [p for p in (*self._queue, *self._packing) if p.write_id == write_id]:
            self._withdraw(piece, "cancelled")

    def lost(self, peer: str, error: str) -> None:
        """The link is down, the peer may live: what was offered stays in doubt."""
        target = self._targets.pop(peer, None)
        if target is not None:
            for piece in [p for p in (*self._queue, *self._packing) if p.target is target]:
                self._withdraw(piece, error)

    def dead(self, peer: str, error: str) -> None:
        """The peer has ended, and with it what it could still have unpacked; nothing from
        endpoints of this name lands here any more, once this returns."""
        self.lost(peer, error)
        for piece in [p for p in self._offered.values() if p.target.peer == peer]:
            self._end(piece, error)
        for agent in [agent for agent, source in self._sources.items() if source.name == peer]:
            self._forget(self._sources.pop(agent))

    def _pack(self) -> None:
        for piece in list(self._queue):
            if not self._free_out:
                return
            if not piece.target.welcome:
                continue
            self._queue.remove(piece)
            piece.block = self._free_out.pop()
            source = self._regions[piece.region]
            piece.copying = self._outbound.pack(piece.block, source, piece.source_pages, piece.part)
            self._packing.append(piece)

    def _offer(self) -> None:
        for piece in list(self._packing):
            if piece.copying is None or not piece.copying.is_done():
                continue
            self._packing.remove(piece)
            self._offered[piece.number] = piece
            part = piece.part
            offer = Offer(
                piece.target.epoch,
                piece.number,
                self._outbound.unit(piece.block),
                len(piece.source_pages) * part.page_bytes,
                piece.region,
                np.ascontiguousarray(piece.target_pages, dtype="<i4").tobytes(),
                *(part.target_offset, part.length, part.count, part.target_stride),
            )
            self._send(piece.target.agent, offer)

    def _withdraw(self, piece: _Piece, error: str) -> None:
        if piece in self._queue:
            self._queue.remove(piece)
        else:
            self._packing.remove(piece)
            if piece.copying is not None:
                piece.copying.wait()
        self._end(piece, error)

    def _end(self, piece: _Piece, error: str = "") -> None:
        self._offered.pop(piece.number, None)
        if piece.block >= 0:
            self._free_out.append(piece.block)
        write = self._writes[piece.write_id]
        write.error = write.error or error
        write.pieces -= 1
        if not write.pieces:
            del self._writes[piece.write_id]
            self._ended.append((piece.write_id, write.error))

    # ------------------------------------------------------------------------------------- inbound

    def _forget(self, source: _Source) -> None:
        for inbound in self._arrived:
            if inbound.source is source:
                inbound.dropped = True
                if inbound.copying is not None:
                    inbound.copying.wait()

    def _welcome(self, hello: Hello) -> None:
        agent = self._wire.admit(hello.metadata, hello.ring)
        if agent in self._sources:
            self._forget(self._sources[agent])
        self._sources[agent] = _Source(agent, hello.name, hello.epoch)
        self._send(agent, Welcome(hello.epoch))

    def _take(self, inbound: _Inbound) -> bool:
        """Take the next step; whether the offer is done with."""
        offer = inbound.offer
        if inbound.dropped:
            if inbound.reading is not None and not self._wire.release(inbound.reading):
                return False
        elif inbound.block < 0:
            if self._free_in:
                self._read(inbound)
            return False
        elif inbound.copying is None:
            try:
                if not self._wire.is_read(inbound.reading):
                    return False
            except TransportError as error:
                inbound.dropped = True
                self._send(inbound.source.agent, Refused(offer.piece, str(error)))
                return False
            self._wire.release(inbound.reading)
            inbound.reading = None
            pages = np.frombuffer(offer.pages, dtype="<i4")
            part = PagePart(0, offer.offset, offer.length, offer.count, 0, offer.stride)
            region = self._regions[offer.region]
            inbound.copying = self._inbound.unpack(inbound.block, region, pages, part)
            return False
        elif not inbound.copying.is_done():
            return False
        else:
            self._send(inbound.source.agent, Done(offer.piece))
        if inbound.block >= 0:
            self._free_in.append(inbound.block)
        return True

    def _read(self, inbound: _Inbound) -> None:
        inbound.block = self._free_in.pop()
        offer = inbound.offer
        units = np.arange(-(-offer.num_bytes // UNIT_BYTES), dtype=np.int32)
        ours = units + np.int32(self._inbound.unit(inbound.block))
        try:
            inbound.reading = self._wire.start_read(
                inbound.source.agent, units + np.int32(offer.unit), ours
            )
        except TransportError as error:
            inbound.dropped = True
            self._send(inbound.source.agent, Refused(offer.piece, str(error)))

    # ---------------------------------------------------------------------------------------- both

    def receive(self, agent: str, data: bytes) -> None:
        """A message of an agent; what does not belong to a live epoch is dropped."""
        try:
            message = _decoder.decode(data)
        except msgspec.MsgspecError:
            return
        match message:
            case Hello():
                with contextlib.suppress(TransportError):
                    self._welcome(message)
            case Welcome(epoch):
                for target in self._targets.values():
                    if target.agent == agent and target.epoch == epoch:
                        target.welcome = True
                        self._end_doubtful(target)
            case Offer():
                source = self._sources.get(agent)
                if source is None or source.epoch != message.epoch:
                    return
                if self._is_sound(message):
                    self._arrived.append(_Inbound(source, message))
                else:
                    self._send(agent, Refused(message.piece, "it does not fit into our pages"))
            case Done(number):
                if number in self._offered:
                    self._end(self._offered[number])
            case Refused(number, reason):
                if number in self._offered:
                    self._end(self._offered[number], f"refused by the target: {reason}")

    def _end_doubtful(self, target: _Target) -> None:
        for piece in [p for p in self._offered.values() if p.target.peer == target.peer]:
            if piece.target is not target:
                self._end(piece, "the connection was lost")

    def _is_sound(self, offer: Offer) -> bool:
        if not 0 <= offer.region < len(self._regions) or len(offer.pages) % 4:
            return False
        region, pages = self._regions[offer.region], np.frombuffer(offer.pages, dtype="<i4")
        part = PagePart(0, offer.offset, offer.length, offer.count, 0, offer.stride)
        return (
            bool(len(pages))
            and min(int(pages.min()), part.target_offset, part.length - 1, part.count - 1) >= 0
            and int(pages.max()) < region.num_pages
            and part.target_end <= region.page_bytes
            and offer.num_bytes == len(pages) * part.page_bytes <= self._inbound.block_bytes
        )

    def poll(self) -> list[tuple[int, str]]:
        """Take every step that can be taken; (write id, error or empty) of writes that ended."""
        self._arrived = [inbound for inbound in self._arrived if not self._take(inbound)]
        self._offer()
        self._pack()
        ended, self._ended = self._ended, []
        return ended

    @property
    def is_busy(self) -> bool:
        """Blocks are on their way, in or out."""
        return bool(self._writes or self._arrived)

    def _send(self, agent: str, message: Message) -> None:
        # A link that is down is noticed by the transport.
        with contextlib.suppress(TransportError):
            self._wire.send(agent, _encoder.encode(message))
