"""What a target reads of the writes to it, instead of having it written: blocks and shares.

Where a link moves blocks faster than runs, the source packs the runs of a write into a block of its
ring; the target reads it into its own ring and unpacks it into its pages. Packing, reading and
unpacking of different blocks overlap. Where both processes are on one host and the CPU copies, it
does so in the call that posts, on the caller's core: so the source writes some pieces of a large
write, and the target reads its share of them straight from page to page at the same time.

    source                                 target
    Hello(epoch, what can be read)    ->   forgets earlier epochs of this endpoint, whole
                                      <-   Welcome(epoch)
    Offer(piece)                      ->   reads, unpacks
                                      <-   Done(piece) or Refused(piece)

A block that was offered may be unpacked at any time, also after the link has failed. So its write
ends only by the answer, by a Welcome to a later epoch (the target has fenced the earlier ones), or
by `dead`: the target is known to have ended. A share is the target's only once it has drawn its
ticket (`transfer/tickets.py`), and is then like a block. The source draws what the target has not
begun as soon as it has nothing else to write, so a slow target delays a write by what it has begun
and no more; three are offered at a time. It must poll, though: UCX tells the end of a write only
when the messages before it have been taken.

Not thread-safe; owned by the transport, which carries the messages in order.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from transfer.endpoint import check_write
from transfer.staging import UNIT_BYTES, Copying, Ring
from transfer.tickets import TicketFile, Tickets
from transfer.transport import Int32Array, PagePart, Region, TransportError

SHARE_BYTES = 8 << 20
"""About as much has a piece of a write that is shared."""
_SHARES_OFFERED = 3
"""At a time: one is read while the offers of the next ones are on their way."""
_UNIT = PagePart(0, 0, UNIT_BYTES)

# ---------------------------------------------------------------------------------------- messages


class Hello(msgspec.Struct, frozen=True, tag=1, array_like=True):
    epoch: int
    name: str
    regions: tuple[Region, ...]
    """The source's; its ring, in units, comes last."""
    tickets: TicketFile | None
    """None: it shares nothing."""
    metadata: bytes
    """The transport's own, for reaching the source."""


class Welcome(msgspec.Struct, frozen=True, tag=2, array_like=True):
    epoch: int
    shares: bool
    """The tickets are within reach."""


class Offer(msgspec.Struct, frozen=True, tag=3, array_like=True):
    epoch: int
    piece: int
    unit: int
    """Where the block begins; -1: a share."""
    region: int
    source_pages: bytes
    """int32; of a share."""
    target_pages: bytes
    """int32."""
    part: PagePart
    """Of a block, the runs lie in it end to end."""


class Done(msgspec.Struct, frozen=True, tag=4, array_like=True):
    piece: int


class Refused(msgspec.Struct, frozen=True, tag=5, array_like=True):
    piece: int
    reason: str


Message = Hello | Welcome | Offer | Done | Refused
_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)

# ------------------------------------------------------------------------------- what is built upon


class Wire(Protocol):
    """The transport below. Agents are names of endpoints; errors are TransportErrors."""

    def send(self, agent: str, message: bytes) -> None: ...

    def admit(self, metadata: bytes, regions: Sequence[Region]) -> str:
        """Make an endpoint and its regions readable; returns its agent."""

    def expel(self, agent: str) -> None:
        """Undo `admit`."""

    def start_read(
        self,
        agent: str,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: PagePart,
    ) -> Any:
        """Read part of pages of `agent`'s region into ours; the regions' number is their rings'."""

    def is_read(self, handle: Any) -> bool:
        """Raises TransportError when the read failed."""

    def release(self, handle: Any) -> bool:
        """Whether the read is over and forgotten; else to be tried again."""

    def stop(self, agent: str, handle: Any) -> None:
        """Release; when this returns no byte of the read follows."""


# ------------------------------------------------------------------------------------------- states


@dataclasses.dataclass(slots=True, eq=False)
class _Target:
    """A connection to a peer that we write to."""

    peer: str
    agent: str
    epoch: int
    tickets: Tickets | None
    is_welcome: bool = False
    shares: bool = False
    queue: collections.deque[Piece] = dataclasses.field(default_factory=collections.deque)
    """Of writes that are shared: neither offered nor handed out."""
    num_offered: int = 0
    """Shares."""


@dataclasses.dataclass(slots=True, eq=False)
class _Write:
    pieces: int
    """Not yet ended."""
    error: str = ""


@dataclasses.dataclass(slots=True, eq=False)
class Piece:
    """Outbound. A block: queued, packing (a copy), offered. A share: queued, offered, or handed
    out to be written."""

    write_id: int
    target: _Target
    region: int
    source_pages: Int32Array
    target_pages: Int32Array
    part: PagePart
    is_packed: bool
    number: int = -1
    """Of the last offer, rising."""
    block: int = -1
    copying: Copying | None = None

    @property
    def num_bytes(self) -> int:
        return len(self.source_pages) * self.part.page_bytes


@dataclasses.dataclass(slots=True, eq=False)
class _Source:
    """A peer that writes to us."""

    agent: str
    name: str
    epoch: int
    regions: tuple[Region, ...]
    tickets: Tickets | None
    drawn: int | None = None
    """A ticket whose offer is still on its way."""
    shares: collections.deque[Offer] = dataclasses.field(default_factory=collections.deque)
    """Not begun."""
    reading: tuple[Offer, Any] | None = None
    """The share that is being read."""


@dataclasses.dataclass(slots=True, eq=False)
class _Inbound:
    """A block: waiting (no block of ours), being read (a handle), being unpacked (a copy)."""

    source: _Source
    offer: Offer
    block: int = -1
    reading: Any = None
    copying: Copying | None = None
    dropped: bool = False


class Pulling:
    def __init__(
        self,
        wire: Wire,
        name: str,
        metadata: bytes,
        regions: list[Region],
        rings: tuple[Ring, Ring] | None,
        shares: bool,
    ) -> None:
        """Regions, the outbound ring's and metadata are what peers need to read from us."""
        self._wire = wire
        self._name = name
        self._metadata = metadata
        self._regions = regions
        self._outbound = rings[0] if rings else None
        self._inbound = rings[1] if rings else None
        self._shares = shares
        self._free_out = list(range(self._outbound.num_blocks)) if self._outbound else []
        self._free_in = list(range(self._inbound.num_blocks)) if self._inbound else []
        self._numbers = itertools.count(1)
        self._targets: dict[str, _Target] = {}
        """By peer's name."""
        self._sources: dict[str, _Source] = {}
        """By agent."""
        self._queue: list[Piece] = []
        self._packing: list[Piece] = []
        self._offered: dict[int, Piece] = {}
        self._writes: dict[int, _Write] = {}
        self._arrived: list[_Inbound] = []
        self._ended: list[tuple[int, str]] = []

    # ------------------------------------------------------------------------------------ outbound

    def connected(self, peer: str, agent: str) -> None:
        """`peer` can be reached, for the first time or again; what is in doubt ends when it has
        answered."""
        tickets = None
        if self._shares:
            with contextlib.suppress(OSError):  # no file descriptor is left
                tickets = Tickets()
        target = _Target(peer, agent, next(self._numbers), tickets)
        for piece in [p for p in self._offered.values() if p.target.peer == peer]:
            if piece.target.agent != agent:
                self._end(piece, f"{peer} has restarted")
        self._targets[peer] = target
        ring = self._outbound.region if self._outbound else Region(0, 0, UNIT_BYTES)
        file = tickets.describe() if tickets else None
        hello = Hello(target.epoch, self._name, (*self._regions, ring), file, self._metadata)
        self._send(agent, hello)

    def write_blocks(
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
        assert self._outbound is not None
        at_once = self._outbound.block_bytes // part.page_bytes
        cuts = _cut(source_pages, target_pages, [part], at_once)
        self._queue += self._pieces(peer, write_id, region, cuts, is_packed=True)
        self._pack()

    def write_shares(
        self,
        peer: str,
        write_id: int,
        region: int,
        source_pages: Int32Array,
        target_pages: Int32Array,
        part: PagePart,
    ) -> None:
        """To a peer that shares. The caller writes what `take` hands out; the end is told by
        `poll`."""
        parts = cut_part(part, SHARE_BYTES)
        at_once = max(1, round(SHARE_BYTES / parts[0].page_bytes))
        cuts = _cut(source_pages, target_pages, parts, at_once)
        target = self._targets[peer]
        target.queue += self._pieces(peer, write_id, region, cuts, is_packed=False)
        self._share(target)

    def _pieces(
        self,
        peer: str,
        write_id: int,
        region: int,
        cuts: list[tuple[Int32Array, Int32Array, PagePart]],
        is_packed: bool,
    ) -> list[Piece]:
        self._writes[write_id] = _Write(len(cuts))
        target = self._targets[peer]
        return [Piece(write_id, target, region, *cut, is_packed) for cut in cuts]

    def fits(self, part: PagePart) -> bool:
        return self._outbound is not None and part.page_bytes <= self._outbound.block_bytes

    def shares_with(self, peer: str) -> bool:
        return peer in self._targets and self._targets[peer].shares

    def take(self, peer: str) -> Piece | None:
        """A share for the caller to write, who then calls `ended`: one that was not offered, or
        that the target has not begun."""
        target = self._targets.get(peer)
        if target is None:
            return None
        self._share(target)
        if not target.queue:
            return next(self._draw_back(target), None)
        return target.queue.popleft()

    def ended(self, piece: Piece, error: str) -> None:
        """No byte of what `take` handed out follows."""
        self._end(piece, error)

    def cancel(self, write_id: int) -> None:
        """Pieces end that are not offered yet, or not begun."""
        for piece in [p for p in (*self._queue, *self._packing) if p.write_id == write_id]:
            self._withdraw(piece, "cancelled")
        for target in self._targets.values():
            if any(p.write_id == write_id for p in (*target.queue, *self._offered.values())):
                waiting = [*self._draw_back(target), *target.queue]
                target.queue.clear()
                for piece in waiting:
                    if piece.write_id == write_id:
                        self._end(piece, "cancelled")
                    else:
                        target.queue.append(piece)

    def lost(self, peer: str, error: str) -> None:
        """The link is down, the peer may live: what it may have begun stays in doubt."""
        target = self._targets.pop(peer, None)
        if target is None:
            return
        for piece in [p for p in (*self._queue, *self._packing) if p.target is target]:
            self._withdraw(piece, error)
        for piece in [*self._draw_back(target), *target.queue]:
            self._end(piece, error)
        target.queue.clear()
        if target.tickets is not None:
            target.tickets.close()

    def dead(self, peer: str, error: str) -> None:
        """The peer has ended, and with it what it could still have read; nothing from endpoints of
        this name lands here any more, once this returns."""
        self.lost(peer, error)
        for piece in [p for p in self._offered.values() if p.target.peer == peer]:
            self._end(piece, error)
        for agent in [agent for agent, source in self._sources.items() if source.name == peer]:
            self._forget(self._sources.pop(agent))
            self._wire.expel(agent)

    def close(self) -> None:
        for peer in list(self._targets):
            self.lost(peer, "closed")
        while self._sources:
            self._forget(self._sources.popitem()[1])

    def _share(self, target: _Target) -> None:
        """Offer shares; the last piece is ours."""
        while target.shares and len(target.queue) > 1 and target.num_offered < _SHARES_OFFERED:
            piece = target.queue.popleft()
            piece.number = next(self._numbers)
            # The ticket goes first: to the target an offer without one was taken back.
            assert target.tickets is not None
            target.tickets.put(piece.number)
            target.num_offered += 1
            self._send_offer(piece, -1, piece.source_pages)

    def _draw_back(self, target: _Target) -> Iterator[Piece]:
        """What was offered and not begun; it is not offered any more."""
        while target.tickets is not None and (number := target.tickets.draw()) is not None:
            piece = self._offered.get(number)
            if piece is not None and piece.target is target and not piece.is_packed:
                del self._offered[number]
                target.num_offered -= 1
                yield piece

    def _pack(self) -> None:
        for piece in list(self._queue):
            if not self._free_out:
                return
            if not piece.target.is_welcome:
                continue
            self._queue.remove(piece)
            piece.block = self._free_out.pop()
            assert self._outbound is not None
            source = self._regions[piece.region]
            piece.copying = self._outbound.pack(piece.block, source, piece.source_pages, piece.part)
            self._packing.append(piece)

    def _offer(self) -> None:
        for piece in list(self._packing):
            if piece.copying is None or not piece.copying.is_done():
                continue
            self._packing.remove(piece)
            piece.number = next(self._numbers)
            assert self._outbound is not None
            self._send_offer(piece, self._outbound.unit(piece.block), np.empty(0, np.int32))

    def _send_offer(self, piece: Piece, unit: int, source_pages: Int32Array) -> None:
        self._offered[piece.number] = piece
        offer = Offer(
            piece.target.epoch,
            piece.number,
            unit,
            piece.region,
            _encode_pages(source_pages),
            _encode_pages(piece.target_pages),
            piece.part,
        )
        self._send(piece.target.agent, offer)

    def _refused(self, piece: Piece, reason: str) -> None:
        target = piece.target
        is_live = self._targets.get(target.peer) is target
        if piece.is_packed or not is_live or self._writes[piece.write_id].error:
            self._end(piece, f"refused by the target: {reason}")
            return
        # We can write it as well as the others.
        del self._offered[piece.number]
        target.num_offered -= 1
        target.shares = False
        target.queue.append(piece)

    def _withdraw(self, piece: Piece, error: str) -> None:
        if piece in self._queue:
            self._queue.remove(piece)
        else:
            self._packing.remove(piece)
            if piece.copying is not None:
                piece.copying.wait()
        self._end(piece, error)

    def _end(self, piece: Piece, error: str = "") -> None:
        if self._offered.pop(piece.number, None) is not None and not piece.is_packed:
            piece.target.num_offered -= 1
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
        source.shares.clear()
        if source.tickets is not None:
            source.tickets.close()
            source.tickets = None
        if source.reading is not None:
            self._wire.stop(source.agent, source.reading[1])
            source.reading = None

    def _welcome(self, hello: Hello) -> None:
        agent = self._wire.admit(hello.metadata, hello.regions)
        if agent in self._sources:
            self._forget(self._sources[agent])
        tickets = None
        if self._shares and hello.tickets and len(hello.regions) == len(self._regions) + 1:
            with contextlib.suppress(TransportError):
                tickets = Tickets(hello.tickets)
        self._sources[agent] = _Source(agent, hello.name, hello.epoch, hello.regions, tickets)
        self._send(agent, Welcome(hello.epoch, tickets is not None))

    def pull(self) -> int:
        """Read one share from each source that offers any; the bytes that have arrived."""
        return sum(self._pull(source) for source in list(self._sources.values()))

    def _pull(self, source: _Source) -> int:
        if source.reading is None:
            offer = self._begin(source)
            if offer is None:
                return 0
            pages = _decode_pages(offer.source_pages), _decode_pages(offer.target_pages)
            try:
                handle = self._wire.start_read(source.agent, offer.region, *pages, offer.part)
            except TransportError as error:
                self._send(source.agent, Refused(offer.piece, str(error)))
                return 0
            source.reading = offer, handle
        offer, handle = source.reading
        answer: Done | Refused = Done(offer.piece)
        try:
            if not self._wire.is_read(handle):
                return 0
        except TransportError as error:
            answer = Refused(offer.piece, str(error))
        self._wire.stop(source.agent, handle)
        source.reading = None
        self._send(source.agent, answer)
        return len(offer.target_pages) // 4 * offer.part.page_bytes

    def _begin(self, source: _Source) -> Offer | None:
        """The next share that is ours. Tickets and offers have the same order."""
        while source.shares and source.tickets is not None:
            if source.drawn is None:
                source.drawn = source.tickets.draw()
            if source.drawn is None:
                source.shares.clear()  # all were taken back
                break
            while source.shares and source.shares[0].piece < source.drawn:
                source.shares.popleft()
            if source.shares:
                # Else the offer is on its way. A later one says that we have refused it.
                is_ours = source.shares[0].piece == source.drawn
                source.drawn = None
                if is_ours:
                    return source.shares.popleft()
        return None

    def _take(self, inbound: _Inbound) -> bool:
        """Take a block's next step; whether the offer is done with."""
        assert self._inbound is not None
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
            region, pages = self._regions[offer.region], _decode_pages(offer.target_pages)
            inbound.copying = self._inbound.unpack(inbound.block, region, pages, offer.part)
            return False
        elif not inbound.copying.is_done():
            return False
        else:
            self._send(inbound.source.agent, Done(offer.piece))
        if inbound.block >= 0:
            self._free_in.append(inbound.block)
        return True

    def _read(self, inbound: _Inbound) -> None:
        assert self._inbound is not None
        inbound.block = self._free_in.pop()
        offer = inbound.offer
        units = np.arange(_num_units(offer), dtype=np.int32)
        ours = units + np.int32(self._inbound.unit(inbound.block))
        try:
            inbound.reading = self._wire.start_read(
                inbound.source.agent, len(self._regions), units + np.int32(offer.unit), ours, _UNIT
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
            case Welcome(epoch, shares):
                for target in self._targets.values():
                    if target.agent == agent and target.epoch == epoch:
                        target.is_welcome = True
                        target.shares = shares and target.tickets is not None
                        self._end_doubtful(target)
            case Offer():
                source = self._sources.get(agent)
                if source is None or source.epoch != message.epoch:
                    return
                if not self._is_sound(source, message):
                    self._send(agent, Refused(message.piece, "it does not fit into our pages"))
                elif message.unit < 0:
                    source.shares.append(message)
                else:
                    self._arrived.append(_Inbound(source, message))
            case Done(number):
                if number in self._offered:
                    self._end(self._offered[number])
            case Refused(number, reason):
                if number in self._offered:
                    self._refused(self._offered[number], reason)

    def _end_doubtful(self, target: _Target) -> None:
        for piece in [p for p in self._offered.values() if p.target.peer == target.peer]:
            if piece.target is not target:
                self._end(piece, "the connection was lost")

    def _is_sound(self, source: _Source, offer: Offer) -> bool:
        if not 0 <= offer.region < len(self._regions):
            return False
        if len(offer.source_pages) % 4 or len(offer.target_pages) % 4 or not offer.target_pages:
            return False
        part, regions = offer.part, source.regions
        pages = _decode_pages(offer.source_pages), _decode_pages(offer.target_pages)
        if min(part.length, part.count) < 1 or min(part.source_stride, part.target_stride) < 0:
            return False
        if offer.unit >= 0:
            num_bytes = len(pages[1]) * part.page_bytes
            if self._inbound is None or num_bytes > self._inbound.block_bytes:
                return False
            if offer.unit + _num_units(offer) > regions[-1].num_pages:
                return False
            # The source's pages are its own affair: they are in the block already.
            regions, pages = tuple(self._regions), (pages[1], pages[1])
            part = dataclasses.replace(
                part, source_offset=part.target_offset, source_stride=part.target_stride
            )
        elif source.tickets is None:
            return False
        try:
            check_write(source.name, offer.region, regions, self._regions, *pages, part)
        except (IndexError, ValueError):
            return False
        return True

    def poll(self) -> list[tuple[int, str]]:
        """Take every step that can be taken with blocks; (write id, error or empty) of writes that
        ended."""
        self._arrived = [inbound for inbound in self._arrived if not self._take(inbound)]
        self._offer()
        self._pack()
        ended, self._ended = self._ended, []
        return ended

    @property
    def is_busy(self) -> bool:
        """Pieces are on their way, in or out."""
        return bool(self._writes or self._arrived or any(s.shares for s in self._sources.values()))

    def _send(self, agent: str, message: Message) -> None:
        # A link that is down is noticed by the transport.
        with contextlib.suppress(TransportError):
            self._wire.send(agent, _encoder.encode(message))


def cut_part(part: PagePart, max_bytes: int) -> list[PagePart]:
    """The same bytes of a page in parts of `max_bytes` or little more."""
    if part.length <= max_bytes:
        at_once = max(1, max_bytes // max(1, part.length))
        return [
            dataclasses.replace(
                part,
                source_offset=part.source_offset + first * part.source_stride,
                target_offset=part.target_offset + first * part.target_stride,
                count=min(at_once, part.count - first),
            )
            for first in range(0, part.count, at_once)
        ]
    # Alike but for the last one, and whole pages of memory.
    size = -(-part.length // -(-part.length // max_bytes) // 4096) * 4096
    return [
        PagePart(
            part.source_offset + run * part.source_stride + start,
            part.target_offset + run * part.target_stride + start,
            min(size, part.length - start),
        )
        for run in range(part.count)
        for start in range(0, part.length, size)
    ]


def _cut(
    source_pages: Int32Array, target_pages: Int32Array, parts: list[PagePart], at_once: int
) -> list[tuple[Int32Array, Int32Array, PagePart]]:
    """Each part of so many pages at once."""
    return [
        (source_pages[start : start + at_once], target_pages[start : start + at_once], part)
        for start in range(0, len(source_pages), at_once)
        for part in parts
    ]


def _num_units(offer: Offer) -> int:
    return -(-(len(offer.target_pages) // 4 * offer.part.page_bytes) // UNIT_BYTES)


def _encode_pages(pages: Int32Array) -> bytes:
    return np.ascontiguousarray(pages, dtype="<i4").tobytes()


def _decode_pages(data: bytes) -> Int32Array:
    return np.frombuffer(data, dtype="<i4")
