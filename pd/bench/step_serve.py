"""Replicas as processes, with leaders, transports and sockets but without Ray and HTTP, and a
client of them in this process: what the first tokens of one request wait for. For `pd bench step`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import multiprocessing
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from pd.api.client import EngineClient
from pd.bench.errors import BenchError
from pd.bench.step_ranks import choose_gpu
from pd.messages import AnyMessage, RequestStats, SamplingParams
from pd.node import Member, Node, NodeConfig
from pd.rank import endpoint
from pd.router import make_router
from pd.spec import ClusterSpec, MemberRole, replica_role

_DEADLINE_S = 300.0


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """Seconds from the request's submission."""

    token_s: tuple[float, ...]
    stats: RequestStats


class _Client(Node):
    client: EngineClient

    async def prepare(self) -> Member:
        router = make_router(self.spec, self.name)
        self.client = EngineClient(self.send, router, self.spec.page_tokens)
        return Member(self.name, None, self.incarnation, "")

    def received(self, sender: str, message: AnyMessage) -> None:
        self.client.on_message(sender, message)

    def member_joined(self, member: Member) -> None:
        if member.role in ("prefill", "decode", "both"):
            role = replica_role(member.role)
            facts = member.fingerprint, member.cohort, member.max_context
            self.client.on_peer_up(member.name, role, *facts)

    def member_left(self, member: Member, reason: str) -> None:
        self.client.on_peer_down(member.name, reason)

    async def ask(self, prompt: Sequence[int], max_tokens: int) -> Answer:
        """Greedy, to the end. Raises BenchError."""
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        loop = asyncio.get_running_loop()
        begin = loop.time()
        stream = self.client.submit(prompt, params, timeout_s=_DEADLINE_S)
        times: list[float] = []
        async for output in stream:
            times += [loop.time() - begin] * len(output.token_ids)
            if output.finish_reason == "error":
                raise BenchError(f"a prompt of {len(prompt)} tokens: {output.error}")
        assert stream.stats is not None
        return Answer(tuple(times), stream.stats)


@contextlib.asynccontextmanager
async def cluster(
    spec: ClusterSpec, devices: dict[MemberRole, tuple[int | None, ...]]
) -> AsyncIterator[_Client]:
    """One replica of each of the spec's roles; `devices` has the GPU of each rank. Raises
    BenchError."""
    with tempfile.TemporaryDirectory(prefix="pd-") as sockets:
        processes: list[_Process] = []
        client = _Client(NodeConfig("api-0", None, spec, spec.model.path, sockets, None, ""))
        try:
            teams = {}
            for role, _ in spec.roles.items():
                name = f"{role}-0"
                config = NodeConfig(name, role, spec, spec.model.path, sockets, None, "127.0.0.1")
                teams[name] = [
                    _Process(
                        dataclasses.replace(
                            config,
                            name=endpoint(name, rank),
                            rank=rank,
                            replica=name if rank else "",
                        ),
                        device,
                    )
                    for rank, device in enumerate(devices[role])
                ]
                processes += teams[name]
            members = [await client.start()]
            of_team: dict[str, list[Member]] = {}
            for name, (first, *others) in teams.items():
                meeting = await first.ask("meet") if others else None
                started = [each.ask("start", meeting) for each in (first, *others)]
                of_team[name] = list(await asyncio.gather(*started))
                members.append(of_team[name][0])
                for each, member in zip(others, of_team[name][1:], strict=True):
                    await each.ask("set_members", [of_team[name][0], member])
            for name in reversed(teams):
                await teams[name][0].ask("set_members", [*of_team[name][1:], *members])
            client.set_members(members)
            yield client
        finally:
            with contextlib.suppress(AttributeError):  # it had not started
                await client.stop()
            await asyncio.gather(*(asyncio.to_thread(each.close) for each in processes))


class _Process:
    """One node in a process of its own."""

    def __init__(self, config: NodeConfig, device: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self._name = config.name
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, config, device), daemon=True)
        self._process.start()
        there.close()

    async def ask(self, what: str, *arguments: object) -> Any:
        """Raises BenchError."""
        return await asyncio.to_thread(self._ask, what, *arguments)

    def _ask(self, what: str, *arguments: object) -> Any:
        try:
            self._pipe.send((what, arguments))
            if not self._pipe.poll(_DEADLINE_S):
                raise BenchError(f"{self._name} did not {what} in {_DEADLINE_S:.0f} s")
            kind, answer = self._pipe.recv()
        except (EOFError, OSError):
            raise BenchError(f"{self._name} ended during {what!r}") from None
        if kind == "error":
            raise BenchError(f"{self._name}: {answer}")
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(20.0)
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, config: NodeConfig, device: int | None) -> None:
    """A process's main function. Ctrl-C is for the parent, which ends us."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    if device is not None:
        choose_gpu(device)
    try:
        asyncio.run(_obey(connection, config))
    except (EOFError, BrokenPipeError):
        pass  # the parent has ended, or wants us to
    except Exception as error:  # a process's top: the parent reports it
        logging.getLogger("pagerelay").exception("%s fails", config.name)
        with contextlib.suppress(OSError):
            connection.send(("error", f"{type(error).__name__}: {error}"))


async def _obey(connection: Connection, config: NodeConfig) -> None:
    from pd.rank_node import RankNode
    from pd.replica_node import ReplicaNode

    node = RankNode(config) if config.rank else ReplicaNode(config)
    started = False
    try:
        while True:
            what, arguments = await asyncio.to_thread(connection.recv)
            answer: object = None
            match what:
                case "meet":
                    assert isinstance(node, ReplicaNode)
                    answer = node.make_meeting()
                case "start":
                    (node.meeting,) = arguments
                    answer = await node.start()
                    started = True
                case "set_members":
                    node.set_members(*arguments)
            connection.send(("ok", answer))
    finally:
        if started:
            await node.stop()
