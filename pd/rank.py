"""What one rank does for its leader: steps on a compute thread, writes on the mover's, digests and
copies between tiers on threads of their own.

A RankWorker takes effects and reports events, in the leader's process or, through `encode` and
`decode`, in another (pd/rank_node.py). It obeys and decides nothing. Slots of the replica become
pages of the rank's pools here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

import msgspec
import numpy as np

from pd.engine.batch import StepCommand, StepResult
from pd.events import (
    BreakLink,
    CancelWrite,
    CopyPages,
    Digest,
    Digested,
    PagesCopied,
    RunStep,
    StepDone,
    Write,
    Written,
    on_rank,
)
from pd.spec import ClusterSpec, Role, SpecError
from transfer.topology import Topology
from transfer.transport import PagePart, PeerError

if TYPE_CHECKING:
    import torch

    from pd.engine.ranks import Backend
    from transfer.transport import WriteResult

# ------------------------------------------------------------------------------ effects and events


@dataclasses.dataclass(frozen=True, slots=True)
class Connect:
    """Another replica's ranks may be written to."""

    peer: str
    descriptions: tuple[bytes, ...]
    """Of its ranks' transports."""
    parts: tuple[tuple[int, int, int, PagePart | None], ...]
    """(source rank, target rank, layer group, part of the page) of all that will be written."""


@dataclasses.dataclass(frozen=True, slots=True)
class Disconnect:
    """The peer's writes end with an error."""

    peer: str


@dataclasses.dataclass(frozen=True, slots=True)
class Flush:
    """Answered by `Flushed` when all that the transport was ordered before has been begun: after
    `Disconnect`, when nothing of the peer's can land any more."""

    peer: str


@dataclasses.dataclass(frozen=True, slots=True)
class Flushed:
    peer: str


@dataclasses.dataclass(frozen=True, slots=True)
class Expect:
    """Peers may be writing here now, or not."""

    expecting: bool


@dataclasses.dataclass(frozen=True, slots=True)
class OpenHost:
    """Map a keeper's pools, in place of those before; answered by `HostOpened`."""

    keeper: str
    description: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class HostOpened:
    keeper: str
    error: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class PeerLost:
    """The transport cannot connect; it goes on trying."""

    peer: str
    error: str


@dataclasses.dataclass(frozen=True, slots=True)
class RankFailed:
    """What failed leaves pages in doubt: the replica is to end."""

    error: str


RankEffect = (
    RunStep
    | Write
    | CancelWrite
    | BreakLink
    | Digest
    | CopyPages
    | Connect
    | Disconnect
    | Flush
    | Expect
    | OpenHost
)
RankEvent = (
    StepDone | Written | Digested | PagesCopied | Flushed | HostOpened | PeerLost | RankFailed
)


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    raise NotImplementedError(type(value))


def _decode_array(kind: Any, value: Any) -> Any:
    dtype, shape, data = value
    return np.frombuffer(data, dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
_decoders = {
    kind.__name__: msgspec.msgpack.Decoder(kind, dec_hook=_decode_array)
    for kind in (*RankEffect.__args__, *RankEvent.__args__)
}
_frame = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])


def encode(message: RankEffect | RankEvent) -> bytes:
    return _encoder.encode((type(message).__name__, message))


def decode(data: bytes) -> Any:
    """A RankEffect or RankEvent. Raises msgspec.MsgspecError or KeyError."""
    kind, body = _frame.decode(data)
    return _decoders[kind].decode(body)


# ---------------------------------------------------------------------------------------- the ranks


def endpoint(replica: str, rank: int) -> str:
    """A rank's name among transports, and as a process."""
    return f"{replica}-rank{rank}" if rank else replica


@dataclasses.dataclass(frozen=True, slots=True)
class RankStart:
    """What all ranks of a replica agree on."""

    num_pages: list[int]
    """Of each rank's pools, by layer group."""
    max_context: int
    transports: tuple[bytes, ...]
    """By rank."""


class RankWorker:
    """`start` on the thread `compute`; then `carry_out`."""

    def __init__(
        self,
        name: str,
        spec: ClusterSpec,
        role: Role,
        rank: int,
        host: str,
        on_event: Callable[[RankEvent], None],
    ) -> None:
        """`name` is the replica's, `host` an address of this node. `on_event` is called on any
        thread."""
        self._host = host
        self.rank = rank
        self._name = name
        self._spec = spec
        self.role = role
        self._on_event = on_event
        self._digester = ThreadPoolExecutor(1, "digests")
        self.compute = ThreadPoolExecutor(1, "compute")
        self._commands: deque[StepCommand] = deque()
        """Steps to begin."""
        self._stops: list[Callable[[float], None]] = []
        """Of what has been started so far."""
        self._connected: dict[str, list[str]] = {}
        """By replica: its ranks that this one writes to."""

    # ------------------------------------------------------------------------------------- starting

    def start(self, folder: Path, meeting: tuple[str, int] | None) -> RankStart:
        """Load the model, agree with the other ranks, warm up. Blocks. Raises RankError,
        UnsupportedModelError, SpecError and TransportError."""
        import torch

        from pd import cost
        from pd.engine.copier import Copier
        from pd.engine.model import ModelRunner
        from pd.engine.ranks import Ranks, join_store
        from pd.engine.shards import balanced
        from transfer.backends import make_transport
        from transfer.mover import Mover

        spec, role = self._spec, dict(self._spec.roles.items())[self.role]
        limits = spec.timeouts
        device = torch.device("cuda", 0) if role.device == "cuda" else torch.device("cpu")
        if device.type == "cpu":
            torch.set_num_threads(role.threads)
        topology = Topology(role.topology.tp, role.topology.pp, role.topology.cp)
        topology = balanced(topology, cost.load_config(folder))
        self._store = store = None if meeting is None else join_store(*meeting, limits.start)
        shares_gpu = device.type == "cpu" or role.rank_resources()["GPU"] < 1
        backend: Backend = "gloo" if shares_gpu else "nccl"
        ranks = Ranks(topology, self.rank, store, self._host, limits.start, device, backend)
        self._stops.append(lambda _: ranks.abort())
        self.topology, self.name = topology, ranks.name
        self.runner = runner = ModelRunner(folder, spec.model, spec.page_tokens, device, ranks)
        fitting = cost.plan_pools(runner.rank_layouts, role, _free_memory(device))
        num_pages = [
            min(counts)
            for counts in zip(
                *map(_ints.decode, self._tell("pages", _ints_of(fitting))), strict=True
            )
        ]
        fits = cost.max_context(runner.layouts, num_pages, role, runner.max_positions, topology.cp)
        cost.check_context(self.role, fits, spec.model.max_context)
        bounds = [limit for limit in (fits, spec.model.max_context) if limit is not None]
        if not bounds:
            raise SpecError("model.max_context: expected a number, as this model names no limit")
        max_context = min(bounds)
        runner.allocate(num_pages, role.max_running, max_context)
        ranks.limit(limits.collective)
        runner.warm_up(role.max_batch_tokens)
        self._copier = Copier(runner.pools, runner.replica_layout, self.rank)
        self._stops.append(lambda _: self._copier.close())
        transport = make_transport(
            spec.transfer.backend, endpoint(self._name, self.rank), spec.transfer.options
        )
        transport.register([pool.region for pool in runner.pools])
        self._mover = Mover(
            transport,
            self._write_ended,
            self._peer_lost,
            self._failed,
            spec.transfer.max_bytes_in_flight,
            page_bytes=[layout.page_bytes for layout in runner.rank_layouts],
        )
        self._mover.start()
        self._stops.append(self._mover.stop)
        transports = self._tell("transport", transport.describe())
        return RankStart(num_pages, max_context, tuple(transports))

    def _tell(self, what: str, own: bytes) -> list[bytes]:
        """What each rank says, by rank; waits for all. Raises RankError."""
        from pd.engine.ranks import exchange

        return (
            [own]
            if self._store is None
            else exchange(self._store, what, self.rank, self.topology.num_ranks, own)
        )

    # --------------------------------------------------------------------------------------- orders

    def carry_out(self, effect: RankEffect) -> None:
        """On the event loop's thread; an effect that is for other ranks is not given."""
        match effect:
            case RunStep(command):
                self._commands.append(command)
                self._submit(self.compute, self._run_steps)
            case Write(write_id, peer, group, source, target, part, handover, _, rank):
                name = endpoint(peer, rank)
                self._mover.write(write_id, name, group, source, target, part, handover)
            case CancelWrite(write_id):
                self._mover.cancel(write_id)
            case BreakLink(peer):
                for name in self._connected.get(peer, []):
                    self._mover.reconnect(name)
            case Digest():
                self._submit(self._digester, lambda: self._digest(effect))
            case CopyPages():
                self._copier.submit(effect).add_done_callback(self._work_ended)
            case Connect(peer, descriptions, parts):
                self._connect(peer, descriptions, parts)
            case Disconnect(peer):
                for name in self._connected.pop(peer, []):
                    self._mover.disconnect(name)
            case Flush(peer):
                self._mover.after(lambda: self._on_event(Flushed(peer)))
            case Expect(expecting):
                self._mover.expect(expecting)
            case OpenHost(keeper, description):
                opening = self._copier.open(description)
                opening.add_done_callback(lambda done: self._host_opened(keeper, done))
            case _:
                assert_never(effect)

    def _connect(
        self,
        peer: str,
        descriptions: Sequence[bytes],
        parts: Sequence[tuple[int, int, int, PagePart | None]],
    ) -> None:
        mine: dict[int, list[tuple[int, PagePart | None]]] = {}
        for source, target, group, part in parts:
            if source == self.rank:
                mine.setdefault(target, []).append((group, part))
        self._connected[peer] = [endpoint(peer, target) for target in mine]
        for target, of_target in mine.items():
            self._mover.connect(endpoint(peer, target), descriptions[target], of_target)

    def _digest(self, effect: Digest) -> Digested:
        """On the digests' thread: this rank's part of each page's."""
        from pd.engine.digest import RunPlaces, page_digests

        own, pages = on_rank(effect.pages, self.topology, self.runner.ranks.coord)
        runs = RunPlaces.of_rank(self.runner.replica_layout, effect.group, self.rank)
        digests = np.zeros(len(effect.pages), np.uint64)
        digests[own] = page_digests(self.runner.pools[effect.group].data, pages, runs)
        return Digested(effect.digest_id, digests)

    def stop(self, timeout_s: float) -> None:
        """Blocks."""
        self._commands.clear()
        for executor in (self.compute, self._digester):
            executor.shutdown(wait=False, cancel_futures=True)
        for stop in self._stops:
            stop(timeout_s)

    # ---------------------------------------------------------------------------------- the threads

    def _run_steps(self) -> None:
        """One that waits is launched before the result of the one before it is told: what is then
        done about that takes the interpreter, and a GPU would wait."""
        finish = self.runner.begin(self._commands.popleft()) if self._commands else None
        while finish is not None:
            result, finish = finish(), None
            try:
                if self._commands:
                    finish = self.runner.begin(self._commands.popleft())
            finally:
                self._on_event(StepDone(result))

    def _submit(self, executor: ThreadPoolExecutor, work: Callable[[], RankEvent | None]) -> None:
        executor.submit(work).add_done_callback(self._work_ended)

    def _work_ended(self, future: Future[Any]) -> None:
        """Tell what came of it, if it has not."""
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            self._failed(error)
        elif (event := future.result()) is not None:
            self._on_event(event)

    def _write_ended(self, key: int, result: WriteResult) -> None:
        self._on_event(
            Written(key, result.error, result.bytes_moved, result.descriptors, result.seconds)
        )

    def _peer_lost(self, peer: str, error: str) -> None:
        self._on_event(PeerLost(peer, error))

    def _host_opened(self, keeper: str, opening: Future[None]) -> None:
        error = opening.exception()
        if error is None or isinstance(error, PeerError):
            self._on_event(HostOpened(keeper, None if error is None else str(error)))
        else:
            self._failed(error)

    def _failed(self, error: BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            self._on_event(RankFailed(f"{type(error).__name__}: {error}"))


_ints = msgspec.msgpack.Decoder(list[int])
_ints_of = msgspec.msgpack.encode


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def merge_steps(results: Sequence[StepResult]) -> StepResult:
    """Of all ranks: the tokens of the one that samples, the time of the slowest."""
    sampled = next((each for each in results if each.tokens), results[0])
    return dataclasses.replace(sampled, seconds=max(each.seconds for each in results))
