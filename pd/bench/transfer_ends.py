"""The two processes of `pd bench transfer`: one with all ranks of the source replica, one with all
of the target's, a transport and a pool for each rank.

A process serves commands from its pipe one by one and polls its transports in between; it ends when
the pipe does. Pools are scrambled: the pages of the sequence lie in random slots. What a word of a
page holds follows from its place in the sequence, so that the target can tell that everything has
landed where it belongs and that nothing else has changed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pd.bench.errors import BenchError
from transfer.backends import make_transport
from transfer.flow import Lane, Piece
from transfer.memory import (
    HostMemory,
    MemoryFile,
    Process,
    allocate_host,
    describe_memory,
    describe_process,
    map_memory,
)
from transfer.plan import PairPlan, RankWrite
from transfer.topology import ReplicaLayout
from transfer.transport import Int32Array, PagePart, Region, Transport, TransportError

Side = Literal["source", "target"]

_WRITES_IN_FLIGHT = 4
"""Bytes in flight to a peer are bounded by so many of the backend's write_bytes."""
_SLOWEST = 10e6
"""Bytes a second: a move that is slower has failed."""
_BATCH_BYTES = 16 << 20
_CANARY = -0x5A5A5A5A5A5A5A5B
_PAGE_FACTOR = 0x9E3779B97F4A7C15
_WORD_FACTOR = 0x2545F4914F6CDD1D


@dataclasses.dataclass(frozen=True, slots=True)
class Setup:
    """A pair of replicas, a backend, and the pools between which it moves pages."""

    backend: str
    options: dict[str, str]
    source: ReplicaLayout
    target: ReplicaLayout
    num_pages: int
    """Of the sequence that fills the pools."""
    layer_first: bool
    """Pools of [layer][k|v][page][head][token][dim], as engines with a tensor per layer have them:
    a page is in layers * planes pieces."""
    devices: tuple[int | None, int | None]
    """Of source and target; None: host memory."""
    seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class Move:
    """One handover's pages, moved once."""

    plan_s: float
    post_s: float
    """In `Transport.write`."""
    total_s: float
    """From the first call of `write` to the last result."""
    num_bytes: int
    writes: int
    descriptors: int


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    first: Move
    """Cold: connections and descriptors are made."""
    moves: tuple[Move, ...]
    limit_s: tuple[float, ...]
    """After each move: its bytes, copied as one block."""


@dataclasses.dataclass(frozen=True, slots=True)
class Described:
    """What the other end needs of this one."""

    transports: tuple[bytes, ...]
    process: Process
    limit_memory: MemoryFile | None


def serve_end(side: Side, connection: Connection) -> None:
    """A process's main function. Ctrl-C is for the parent, which ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = _End(side)
    commands: dict[str, Callable[..., object]] = {
        "set_up": end.set_up,
        "connect": end.connect,
        "clear": end.clear,
        "verify": end.verify,
        "measure": end.measure,
        "tear_down": end.tear_down,
    }
    try:
        while True:
            while not connection.poll(end.poll()):
                pass
            name, arguments = connection.recv()
            try:
                answer: tuple[str, Any] = ("ok", commands[name](*arguments))
            except (TransportError, BenchError) as error:
                answer = ("error", str(error))
            except (MemoryError, OSError) as error:
                answer = ("error", f"the {side} process: {error or type(error).__name__}")
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has ended
    finally:
        end.tear_down()


class _End:
    """One side; `serve_end` calls its public methods."""

    def __init__(self, side: Side) -> None:
        self._side: Side = side
        self._setup: Setup | None = None
        self._ranks: list[_Rank] = []
        self._limit: _Limit | None = None
        self._mapped: object = None
        self._plan: PairPlan | None = None
        self._slots: tuple[Int32Array, Int32Array] | None = None

    def poll(self) -> float:
        """Drive the transports; how long to wait until the next time."""
        waits = [1.0]
        for rank in self._ranks:
            if not rank.transport.capabilities.passive_target:
                rank.transport.poll()
                waits.append(rank.transport.capabilities.poll_s)
        return min(waits)

    def set_up(self, setup: Setup) -> Described:
        self.tear_down()
        self._setup = setup
        replica = setup.source if self._side == "source" else setup.target
        self._slots = (
            scramble(setup.num_pages, setup.source.topology.cp, setup.seed),
            scramble(setup.num_pages, setup.target.topology.cp, setup.seed + 1),
        )
        for number in range(replica.topology.num_ranks):
            transport = make_transport(setup.backend, f"{self._side}-{number}", setup.options)
            self._ranks.append(_Rank(setup, self._side, number, transport))
        memory = None
        if self._side == "source":
            self._plan = PairPlan(setup.source, setup.target)
            for rank in self._ranks:
                rank.pool.put(self._slots[0], setup.num_pages)
            self._limit = _Limit([rank.pool for rank in self._ranks], setup.devices)
            memory = self._limit.reserve(sum_of_bytes(self._plan, setup.num_pages))
        descriptions = tuple(rank.transport.describe() for rank in self._ranks)
        return Described(descriptions, describe_process(), memory)

    def connect(self, other: Described) -> None:
        """Source: connect to each target rank that is written to. Target: map the memory into
        which the limit is copied."""
        if other.limit_memory is not None:
            self._mapped = map_memory(other.process, other.limit_memory)
        if self._plan is not None:
            for link in self._plan.links[0]:
                self._ranks[link.source].transport.connect(
                    _peer(link.target), other.transports[link.target]
                )

    def clear(self) -> None:
        """All of the target's pools to what must not be there afterwards."""
        for rank in self._ranks:
            rank.pool.clear()

    def verify(self, num_pages: int) -> None:
        """Raises BenchError unless the first pages of the sequence, and nothing else, have landed
        since `clear`."""
        assert self._slots is not None
        for number, rank in enumerate(self._ranks):
            wrong = rank.pool.find_wrong(self._slots[1], num_pages)
            if wrong:
                raise BenchError(f"target rank {number}: {wrong}")

    def measure(self, num_pages: int, repeats: int) -> Measured:
        """Move the first pages of the sequence once cold, then `repeats` times, each time beside
        the limit."""
        assert self._limit is not None
        first = self._move(num_pages)
        self._limit.copy(first.num_bytes)
        moves, limit_s = [], []
        for _ in range(repeats):
            moves.append(self._move(num_pages))
            limit_s.append(self._limit.copy(first.num_bytes))
        return Measured(first, tuple(moves), tuple(limit_s))

    def tear_down(self) -> None:
        for rank in self._ranks:
            rank.transport.close()
        self._ranks.clear()
        self._limit = self._mapped = self._plan = self._slots = None
        gc.collect()
        if self._setup is not None and self._setup.devices != (None, None):
            import torch

            torch.cuda.empty_cache()

    def _move(self, num_pages: int) -> Move:
        """All links of the pair at once, cut and bounded as the mover does it."""
        setup, plan, slots = self._setup, self._plan, self._slots
        assert setup is not None
        assert plan is not None
        assert slots is not None
        clock = time.perf_counter
        before = clock()
        lanes: dict[tuple[int, int], Lane] = {}
        for key, write in enumerate(plan.writes(0, 0, slots[0][:num_pages], slots[1][:num_pages])):
            piece = _layer_first(setup, key, write) if setup.layer_first else _piece(key, write)
            link = write.source, write.target
            if link not in lanes:
                size = self._ranks[write.source].transport.capabilities.write_bytes
                lanes[link] = Lane(size, _WRITES_IN_FLIGHT * size)
            lanes[link].push(0, piece)
        started = clock()
        deadline = started + 30 + sum_of_bytes(plan, num_pages) / _SLOWEST
        post_s, num_bytes, writes, descriptors = 0.0, 0, 0, 0
        in_flight: dict[tuple[int, int], tuple[Lane, Piece]] = {}
        while True:
            for (source, target), lane in lanes.items():
                transport = self._ranks[source].transport
                while (next_piece := lane.pop()) is not None:
                    posting = clock()
                    write_id = transport.write(
                        _peer(target),
                        next_piece.region,
                        next_piece.source_pages,
                        next_piece.target_pages,
                        next_piece.part,
                    )
                    post_s += clock() - posting
                    in_flight[source, write_id] = lane, next_piece
                    writes += 1
            if not in_flight:
                break
            ended = False
            for source in {source for source, _ in in_flight}:
                for result in self._ranks[source].transport.poll():
                    if result.error is not None:
                        raise BenchError(f"a write of source rank {source}: {result.error}")
                    lane, piece = in_flight.pop((source, result.write_id))
                    lane.ended(piece)
                    ended = True
                    num_bytes += result.bytes_moved
                    descriptors += result.descriptors
            if clock() > deadline:
                raise BenchError(
                    f"{len(in_flight)} writes did not end in {clock() - started:.0f} s"
                )
            if in_flight and not ended:
                time.sleep(min(each.transport.capabilities.poll_s for each in self._ranks))
        return Move(started - before, post_s, clock() - started, num_bytes, writes, descriptors)


def scramble(num_pages: int, cp: int, seed: int) -> Int32Array:
    """The slot of each page of the sequence in the pools of the ranks that own it; never 0."""
    random = np.random.default_rng(seed)
    slots = np.empty(num_pages, dtype=np.int32)
    for rank in range(cp):
        owned = len(slots[rank::cp])
        slots[rank::cp] = 1 + random.permutation(owned)
    return slots


def sum_of_bytes(plan: PairPlan, num_pages: int) -> int:
    """That move when the first pages of a sequence do."""
    return sum(len(range(num_pages)[link.pick(0)]) * link.part.page_bytes for link in plan.links[0])


def _peer(target: int) -> str:
    return f"target-{target}"


def _piece(key: int, write: RankWrite) -> Piece:
    return Piece(key, 0, write.source_pages, write.target_pages, write.part, write.part.page_bytes)


def _layer_first(setup: Setup, key: int, write: RankWrite) -> Piece:
    """The same bytes between layer-first pools, whose regions have a page for each layer, plane and
    slot."""
    heads, places = setup.source.held(0, write.source)
    target_heads, target_places = setup.target.held(0, write.target)
    layout = setup.source.layouts[0]
    planes = layout.group.planes
    common = range(max(places.start, target_places.start), min(places.stop, target_places.stop))
    head_bytes = layout.run_bytes // planes
    first_head = heads.start + write.part.source_offset // (len(places) * layout.run_bytes)
    num_heads = write.part.page_bytes // (len(common) * layout.run_bytes)
    part = PagePart(
        (first_head - heads.start) * head_bytes,
        (first_head - target_heads.start) * head_bytes,
        num_heads * head_bytes,
    )

    def pages(slots: Int32Array, held: range, pool_pages: int) -> Int32Array:
        first = (common.start - held.start) * planes
        blocks = np.arange(first, first + len(common) * planes, dtype=np.int32)
        return (blocks[:, None] * np.int32(pool_pages) + slots).ravel()

    return Piece(
        key,
        0,
        pages(write.source_pages, places, _pool_pages(setup.num_pages, setup.source)),
        pages(write.target_pages, target_places, _pool_pages(setup.num_pages, setup.target)),
        part,
        part.page_bytes,
    )


def _pool_pages(num_pages: int, replica: ReplicaLayout) -> int:
    return 1 + -(-num_pages // replica.topology.cp)


class _Rank:
    def __init__(self, setup: Setup, side: Side, number: int, transport: Transport) -> None:
        self.transport = transport
        try:
            self.pool = _Pool(setup, side, number)
            transport.register([self.pool.region])
        except BaseException:
            transport.close()
            raise


class _Pool:
    """One rank's pool as words, (blocks, slots, words of a block of a page): one block if it is
    page-first, else one for each layer and plane. In numpy or torch, which are used alike."""

    def __init__(self, setup: Setup, side: Side, number: int) -> None:
        replica = setup.source if side == "source" else setup.target
        self._device = setup.devices[0 if side == "source" else 1]
        coord = replica.topology.coord(number)
        self._cp, self._cp_size = coord.cp, replica.topology.cp
        heads, places = replica.held(0, number)
        layout = replica.layouts[0]
        planes = layout.group.planes
        plane_bytes = layout.run_bytes // planes
        if plane_bytes % 8:
            raise BenchError(
                f"the keys of a head and page have {plane_bytes} bytes, expected whole words of 8"
            )
        if not len(places):
            raise BenchError("a stage has no layer: there are more stages than layers")
        shape = (layout.group.kv_heads, len(layout.group.layers), planes, plane_bytes // 8)
        words = np.arange(np.prod(shape), dtype=np.uint64) * np.uint64(_WORD_FACTOR)
        held = words.view(np.int64).reshape(shape)[heads.start : heads.stop]
        held = held[:, places.start : places.stop]
        if setup.layer_first:
            blocks = len(places) * planes
            held = held.transpose(1, 2, 0, 3)
        else:
            blocks = 1
        pattern = np.ascontiguousarray(held.reshape(blocks, -1))
        self._num_pages = _pool_pages(setup.num_pages, replica)
        block_words = pattern.shape[1]
        size = blocks * self._num_pages * block_words * 8
        self._kept: HostMemory | None = None
        self.words: Any
        if self._device is None:
            self._kept = allocate_host(size, populate=True)
            self.words = np.frombuffer(self._kept.buffer, np.int64, count=size // 8)
            address = self._kept.address
            self._pattern: Any = pattern
        else:
            import torch

            device = torch.device("cuda", self._device)
            self.words = torch.empty(size // 8, dtype=torch.int64, device=device)
            address = self.words.data_ptr()
            self._pattern = torch.from_numpy(pattern).to(device)
        self._pages = self.words.reshape(blocks, self._num_pages, block_words)
        self.region = Region(address, blocks * self._num_pages, block_words * 8, self._device)
        self._batch = max(1, _BATCH_BYTES // (pattern.nbytes or 1))

    def clear(self) -> None:
        self.words[:] = _CANARY
        self._synchronize()

    def put(self, slots: Int32Array, num_pages: int) -> None:
        """The first pages of the sequence, as far as they are ours."""
        self.words[:] = 0
        for pages, where in self._owned(slots, num_pages):
            self._pages[:, self._numbers(where)] = self._content(pages)
        self._synchronize()

    def find_wrong(self, slots: Int32Array, num_pages: int) -> str:
        """What is not as it should be when the sequence's first pages, and no others, have been
        written since `clear`; or else nothing."""
        untouched = np.ones(self._num_pages, dtype=bool)
        for pages, where in self._owned(slots, num_pages):
            untouched[where] = False
            if not bool((self._pages[:, self._numbers(where)] == self._content(pages)).all()):
                return f"pages {pages[0]} to {pages[-1]} have wrong bytes"
        for where in self._batches(np.flatnonzero(untouched)):
            if not bool((self._pages[:, self._numbers(where)] == _CANARY).all()):
                return f"slots {where[0]} to {where[-1]} were written and must not be"
        return ""

    def _owned(
        self, slots: Int32Array, num_pages: int
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """(pages of the sequence, their slots), some at a time."""
        for pages in self._batches(np.arange(self._cp, num_pages, self._cp_size)):
            yield pages, slots[pages].astype(np.int64)

    def _batches(self, numbers: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        for start in range(0, len(numbers), self._batch):
            yield numbers[start : start + self._batch]

    def _content(self, pages: npt.NDArray[np.int64]) -> Any:
        factors = ((pages + 1).astype(np.uint64) * np.uint64(_PAGE_FACTOR)).view(np.int64)
        return self._pattern[:, None, :] + self._numbers(factors)[None, :, None]

    def _numbers(self, numbers: npt.NDArray[np.int64]) -> Any:
        if self._device is None:
            return numbers
        import torch

        return torch.from_numpy(numbers).to(self._pattern.device)

    def _synchronize(self) -> None:
        if self._device is not None:
            import torch

            torch.cuda.synchronize(self._device)


class _Limit:
    """What the machine can do: the same bytes as one block. Host: memcpy by the source process into
    memory that both processes map. CUDA: a copy from the source's GPU to the target's."""

    def __init__(self, pools: list[_Pool], devices: tuple[int | None, int | None]) -> None:
        self._pools = pools
        self._devices = devices
        self._memory: HostMemory | None = None
        self._words: Any = None

    def reserve(self, num_bytes: int) -> MemoryFile | None:
        """Where to copy to; None: the target need not map it."""
        if self._devices[1] is not None:
            import torch

            device = torch.device("cuda", self._devices[1])
            self._words = torch.empty(num_bytes // 8, dtype=torch.int64, device=device)
            return None
        self._memory = allocate_host(num_bytes, populate=True)
        return describe_memory(self._memory)

    def copy(self, num_bytes: int) -> float:
        """Seconds."""
        copy = self._host_copies if self._memory is not None else self._device_copies
        run = copy(num_bytes)
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def _host_copies(self, num_bytes: int) -> Callable[[], None]:
        assert self._memory is not None
        address = self._memory.address
        blocks = [
            (address + start, pool.region.address, size)
            for pool, start, size in self._blocks(num_bytes)
        ]

        def run() -> None:
            for block in blocks:
                ctypes.memmove(*block)

        return run

    def _device_copies(self, num_bytes: int) -> Callable[[], None]:
        import torch

        blocks = [
            (self._words[start // 8 : (start + size) // 8], pool.words[: size // 8])
            for pool, start, size in self._blocks(num_bytes)
        ]

        def run() -> None:
            for target, source in blocks:
                target.copy_(source, non_blocking=True)
            for device in {*self._devices} - {None}:
                torch.cuda.synchronize(device)

        return run

    def _blocks(self, num_bytes: int) -> Iterator[tuple[_Pool, int, int]]:
        """From each pool in turn, as often as it takes (targets may replicate what pools hold)."""
        start = 0
        while start < num_bytes:
            for pool in self._pools:
                size = min(len(pool.words) * 8, num_bytes - start)
                if size:
                    yield pool, start, size
                start += size
