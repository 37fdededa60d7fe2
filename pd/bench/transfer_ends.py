"""The processes of `pd bench transfer`, one for each rank of either side: a transport and a pool.

A process serves commands from its pipe one by one and polls its transport in between; it ends when
the pipe does. All ranks of the source begin a move at the same time, which they are told. Pools are
scrambled: the pages of the sequence lie in random slots. What a word of a page holds follows from
its place in the sequence, so that the target can tell that everything has landed where it belongs
and that nothing else has changed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import signal
import time
from collections.abc import Callable, Iterator, Sequence
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
_SPIN_S = 0.0005
"""Before a common start; a sleep may last a little longer than it should."""
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
    """One handover's pages, moved once, by one rank or by all."""

    plan_s: float
    post_s: float
    """In `Transport.write`."""
    total_s: float
    """From the common start to the last result."""
    num_bytes: int
    writes: int
    descriptors: int


def join_moves(moves: Sequence[Move]) -> Move:
    """Of ranks that moved at the same time: the slowest's times."""
    return Move(
        plan_s=max(move.plan_s for move in moves),
        post_s=max(move.post_s for move in moves),
        total_s=max(move.total_s for move in moves),
        num_bytes=sum(move.num_bytes for move in moves),
        writes=sum(move.writes for move in moves),
        descriptors=sum(move.descriptors for move in moves),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    first: Move
    """Cold: connections and descriptors are made."""
    moves: tuple[Move, ...]
    limit_s: tuple[float, ...]
    """After each move: its bytes, copied as one block."""


@dataclasses.dataclass(frozen=True, slots=True)
class Described:
    """What the other side needs of this rank."""

    transport: bytes
    process: Process
    limit_memory: MemoryFile | None


def serve_end(side: Side, rank: int, connection: Connection) -> None:
    """A process's main function. Ctrl-C is for the parent, which ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end = _End(side, rank)
    commands: dict[str, Callable[..., object]] = {
        "set_up": end.set_up,
        "connect": end.connect,
        "clear": end.clear,
        "verify": end.verify,
        "plan": end.plan,
        "move": end.move,
        "copy_limit": end.copy_limit,
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
                answer = ("error", f"{side} rank {rank}: {error}")
            except (MemoryError, OSError) as error:
                answer = ("error", f"{side} rank {rank}: {error or type(error).__name__}")
            connection.send(answer)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent has ended
    finally:
        end.tear_down()


class _End:
    """One rank; `serve_end` calls its public methods."""

    def __init__(self, side: Side, rank: int) -> None:
        self._side: Side = side
        self._rank = rank
        self._setup: Setup | None = None
        self._transport: Transport | None = None
        self._pool: _Pool | None = None
        self._limit: _Limit | None = None
        self._mapped: object = None
        self._plan: PairPlan | None = None
        self._slots: tuple[Int32Array, Int32Array] | None = None
        self._planned: tuple[dict[int, Lane], float] | None = None

    def poll(self) -> float:
        """Drive the transport; how long to wait until the next time."""
        if self._transport is None or self._transport.capabilities.passive_target:
            return 1.0
        self._transport.poll()
        return self._transport.capabilities.poll_s

    def set_up(self, setup: Setup) -> Described:
        self.tear_down()
        self._setup = setup
        self._slots = (
            scramble(setup.num_pages, setup.source.topology.cp, setup.seed),
            scramble(setup.num_pages, setup.target.topology.cp, setup.seed + 1),
        )
        name = f"{self._side}-{self._rank}"
        self._transport = make_transport(setup.backend, name, setup.options)
        self._pool = _Pool(setup, self._side, self._rank)
        self._transport.register([self._pool.region])
        memory = None
        if self._side == "source":
            self._plan = PairPlan(setup.source, setup.target)
            self._pool.put(self._slots[0], setup.num_pages)
            if not self._rank:
                self._limit = _Limit(self._pool, setup.devices)
                memory = self._limit.reserve(sum_of_bytes(self._plan, setup.num_pages))
        return Described(self._transport.describe(), describe_process(), memory)

    def connect(self, others: list[Described]) -> None:
        """Source: connect to each target rank that it writes to. Target: map the memory into which
        the limit is copied."""
        assert self._transport is not None
        memory = others[0].limit_memory
        if memory is not None and not self._rank:
            self._mapped = map_memory(others[0].process, memory)
        if self._plan is not None:
            for link in self._plan.links[0]:
                if link.source == self._rank:
                    self._transport.connect(_peer(link.target), others[link.target].transport)

    def clear(self) -> None:
        """The pool to what must not be there afterwards."""
        assert self._pool is not None
        self._pool.clear()

    def verify(self, num_pages: int) -> None:
        """Raises BenchError unless the first pages of the sequence, and nothing else, have landed
        since `clear`."""
        assert self._pool is not None
        assert self._slots is not None
        wrong = self._pool.find_wrong(self._slots[1], num_pages)
        if wrong:
            raise BenchError(wrong)

    def tear_down(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._transport = self._pool = self._limit = self._mapped = None
        self._plan = self._slots = self._planned = None
        gc.collect()
        if self._setup is not None and self._setup.devices != (None, None):
            import torch

            torch.cuda.empty_cache()

    def copy_limit(self, num_bytes: int) -> float:
        """As many bytes, copied as one block; seconds."""
        assert self._limit is not None
        return self._limit.copy(num_bytes)

    def plan(self, num_pages: int) -> None:
        """The next move: the first pages of the sequence, over all links of this rank, cut and
        bounded as the mover does it."""
        setup, plan, slots = self._setup, self._plan, self._slots
        assert setup is not None
        assert plan is not None
        assert slots is not None
        assert self._transport is not None
        started = time.perf_counter()
        size = self._transport.capabilities.write_bytes
        lanes: dict[int, Lane] = {}
        for key, write in enumerate(plan.writes(0, 0, slots[0][:num_pages], slots[1][:num_pages])):
            if write.source == self._rank:
                piece = _layer_first(setup, key, write) if setup.layer_first else _piece(key, write)
                lane = lanes.setdefault(write.target, Lane(size, _WRITES_IN_FLIGHT * size))
                lane.push(0, piece)
        self._planned = lanes, time.perf_counter() - started

    def move(self, start: float) -> Move:
        """What was planned, from that time of `perf_counter` on, which all processes share."""
        assert self._planned is not None
        assert self._plan is not None
        assert self._setup is not None
        transport = self._transport
        assert transport is not None
        lanes, plan_s = self._planned
        clock = time.perf_counter
        deadline = start + 30 + sum_of_bytes(self._plan, self._setup.num_pages) / _SLOWEST
        post_s, num_bytes, writes, descriptors = 0.0, 0, 0, 0
        in_flight: dict[int, tuple[Lane, Piece]] = {}
        time.sleep(max(0.0, start - clock() - _SPIN_S))
        while clock() < start:
            pass
        while True:
            for target, lane in lanes.items():
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
                    in_flight[write_id] = lane, next_piece
                    writes += 1
            if not in_flight:
                break
            results = transport.poll()
            for result in results:
                if result.error is not None:
                    raise BenchError(f"a write: {result.error}")
                lane, piece = in_flight.pop(result.write_id)
                lane.ended(piece)
                num_bytes += result.bytes_moved
                descriptors += result.descriptors
            if clock() > deadline:
                raise BenchError(f"{len(in_flight)} writes did not end in {clock() - start:.0f} s")
            if in_flight and not results:
                time.sleep(transport.capabilities.poll_s)
        return Move(plan_s, post_s, clock() - start, num_bytes, writes, descriptors)


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
    """What the machine can do: the same bytes as one block. Host: memcpy by the source's
    first process into memory that one of the target's maps too. CUDA: a copy from the source's GPU
    to the target's."""

    def __init__(self, pool: _Pool, devices: tuple[int | None, int | None]) -> None:
        self._pool = pool
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
        to, source = self._memory.address, self._pool.region.address
        blocks = [(to + start, source, size) for start, size in self._blocks(num_bytes)]

        def run() -> None:
            for block in blocks:
                ctypes.memmove(*block)

        return run

    def _device_copies(self, num_bytes: int) -> Callable[[], None]:
        import torch

        blocks = [
            (self._words[start // 8 : (start + size) // 8], self._pool.words[: size // 8])
            for start, size in self._blocks(num_bytes)
        ]

        def run() -> None:
            for target, source in blocks:
                target.copy_(source, non_blocking=True)
            for device in {*self._devices} - {None}:
                torch.cuda.synchronize(device)

        return run

    def _blocks(self, num_bytes: int) -> list[tuple[int, int]]:
        """(start, size): the pool as often as it takes, for it is one rank's of several."""
        step = len(self._pool.words) * 8
        return [
            (start, min(step, num_bytes - start)) for start in range(0, num_bytes, max(1, step))
        ]
