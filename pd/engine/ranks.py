"""The ranks of a replica, as one of them sees the others: who is where, and the collectives among
them.

Process groups are made one by one from a store, without torch's global state, so that several ranks
may live in one process. NCCL joins ranks on GPUs of their own; gloo all others, and what it moves
for a GPU goes through host memory. No call waits longer than the time-out: then, or when a rank of
the group is gone, it raises RankError, and the replica is to end.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch.distributed import (  # type: ignore[attr-defined]
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
)

from transfer.topology import Topology

Backend = Literal["gloo", "nccl"]


class RankError(RuntimeError):
    """A collective did not end as it should; the message names the group and the rank."""


def make_store(host: str, timeout_s: float) -> TCPStore:
    """The meeting point of a replica's ranks, on any free port of `host`."""
    timeout = datetime.timedelta(seconds=timeout_s)
    return TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Raises RankError."""
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        return TCPStore(host, port, is_master=False, timeout=timeout)
    except RuntimeError as error:
        raise RankError(f"rendezvous at {host}:{port}: {error}") from error


def exchange(store: TCPStore, what: str, rank: int, num_ranks: int, own: bytes) -> list[bytes]:
    """What each rank says, by rank; waits for all, as long as the store was told to. `what` names
    it, once. Raises RankError."""
    try:
        store.set(f"{what}-{rank}", own)  # type: ignore[arg-type]
        return [store.get(f"{what}-{each}") for each in range(num_ranks)]
    except RuntimeError as error:
        raise RankError(f"rank {rank} waits for the others' {what}: {error}") from error


class Group:
    """Ranks that exchange tensors, in one order. Of one rank: nothing is exchanged."""

    def __init__(self, name: str, size: int, rank: int, backend: Any, staged: bool) -> None:
        self.size = size
        self.rank = rank
        self._name = name
        self._backend = backend
        self.is_staged = staged
        """Tensors go through host memory."""
        self._timeout = datetime.timedelta()
        """Of sends and receives, for which the backend keeps the one that it was made with."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks; may be done in place."""
        if self.size == 1:
            return tensor
        there = self._stage(tensor)
        with self._named("all_reduce"):
            self._backend.allreduce([there]).wait()
        return there.to(tensor.device)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(...) -> (ranks, ...); the same shape on all."""
        if self.size == 1:
            return tensor[None]
        there = self._stage(tensor)
        out = [torch.empty_like(there) for _ in range(self.size)]
        with self._named("all_gather"):
            self._backend.allgather([out], [there]).wait()
        return torch.stack(out).to(tensor.device)

    def all_to_all(self, tensor: torch.Tensor) -> torch.Tensor:
        """(ranks, ...) -> (ranks, ...): row r goes to rank r, and comes from it."""
        if self.size == 1:
            return tensor
        there = self._stage(tensor)
        out = torch.empty_like(there)
        with self._named("all_to_all"):
            self._backend.alltoall_base(out, there, [], []).wait()
        return out.to(tensor.device)

    def send(self, tensor: torch.Tensor, to: int) -> None:
        with self._named(f"send to {to}"):
            self._backend.send([self._stage(tensor)], to, 0).wait(self._timeout)

    def receive(self, tensor: torch.Tensor, sender: int) -> torch.Tensor:
        """Into `tensor` or one like it."""
        there = self._stage(tensor)
        with self._named(f"receive from {sender}"):
            self._backend.recv([there], sender, 0).wait(self._timeout)
        return there.to(tensor.device)

    def limit(self, timeout_s: float) -> None:
        self._timeout = datetime.timedelta(seconds=timeout_s)
        if self._backend is not None:
            self._backend.set_timeout(self._timeout)

    def abort(self) -> None:
        """End what waits here, on whatever thread it does."""
        if self._backend is not None:
            with contextlib.suppress(RuntimeError):
                self._backend.abort()

    def _stage(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        return tensor.cpu() if self.is_staged else tensor

    @contextlib.contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise RankError(f"{what} of {self._name}, rank {self.rank}: {reason}") from error


class Ranks:
    """`rank` of a replica's ranks, and its groups."""

    def __init__(
        self,
        topology: Topology = Topology(),  # noqa: B008 (frozen)
        rank: int = 0,
        store: Store | None = None,
        host: str = "127.0.0.1",
        timeout_s: float = 60.0,
        device: torch.device = torch.device("cpu"),  # noqa: B008 (immutable)
        backend: Backend = "gloo",
    ) -> None:
        """Waits for the other ranks, if there are any. Without a store nobody is met: only to ask
        what a rank would hold. Raises RankError."""
        self.topology = topology
        self.rank = rank
        self.device = device
        self.coord = coord = topology.coord(rank)
        timeout = datetime.timedelta(seconds=timeout_s)

        def group(name: str, members: list[int], kind: Backend = "gloo") -> Group:
            place = members.index(rank)
            made = None
            if len(members) > 1 and store is not None:
                own = PrefixStore(f"{name}-{members[0]}", store)
                try:
                    made = _make(kind, own, place, len(members), host, timeout)
                except RuntimeError as error:
                    raise RankError(f"{name}, rank {place}: {error}") from error
            is_staged = kind == "gloo" and device.type == "cuda"
            return Group(name, len(members), place, made, is_staged)

        ranks = range(topology.num_ranks)
        self.tp = group("tp", [r for r in ranks if self._is_beside(r, "cp", "pp")], backend)
        self.cp = group("cp", [r for r in ranks if self._is_beside(r, "tp", "pp")], backend)
        self.pp = group("pp", [r for r in ranks if self._is_beside(r, "tp", "cp")], backend)
        self.is_first_stage = coord.pp == 0
        self.is_last_stage = coord.pp == topology.pp - 1
        self.samples = self.is_last_stage and coord.tp == coord.cp == 0
        """Whether this rank draws the tokens."""
        self.limit(timeout_s)

    def _is_beside(self, rank: int, *fields: str) -> bool:
        other = self.topology.coord(rank)
        return all(getattr(other, field) == getattr(self.coord, field) for field in fields)

    def limit(self, timeout_s: float) -> None:
        """How long collectives may take from now on."""
        for group in (self.tp, self.cp, self.pp):
            group.limit(timeout_s)

    def abort(self) -> None:
        """End all collectives that wait, here and, by closing their connections, elsewhere."""
        for group in (self.tp, self.cp, self.pp):
            group.abort()

    @property
    def name(self) -> str:
        """For people: "rank ..."."""
        coord = self.coord
        return f"{self.rank} (tp {coord.tp}, cp {coord.cp}, pp {coord.pp})"


def _make(
    kind: Backend, store: Store, rank: int, size: int, host: str, timeout: datetime.timedelta
) -> Any:
    if kind == "nccl":
        from torch.distributed import ProcessGroupNCCL

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return ProcessGroupNCCL(store, rank, size, nccl)
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    options._threads = 1
    options._timeout = timeout
    return ProcessGroupGloo(store, rank, size, options)
