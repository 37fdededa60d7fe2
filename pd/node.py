"""Runs a leader with its rank, or an API server, on asyncio and ZMQ. Knows nothing of Ray.

A node binds one PULL socket and pushes to every other member; messages travel one way. Membership
comes from outside (`set_members`): who is not in the list is dead, and what it sent is dropped. A
replica of one rank is one process: the leader on the event loop, the rank on a compute thread, the
transport on the mover's thread.

Sending never blocks: a peer that does not read its messages loses them once its queue is full,
which is counted, and the request's deadline ends what hangs on it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
import zmq.asyncio
import zmq.auth.asyncio

import pd
from pd import messages
from pd.events import (
    Effect,
    Event,
    PeerDown,
    PeerUp,
    Received,
    RunStep,
    Send,
    StepDone,
    Tick,
    Write,
    Written,
)
from pd.leader import Leader
from pd.messages import AnyMessage, Heartbeat, ProtocolError
from pd.spec import ClusterSpec, Role, SpecError

if TYPE_CHECKING:
    import uvicorn

    from transfer.transport import WriteResult

log = logging.getLogger("pagerelay")

_TICK_S = 0.1
_REPORT_S = 0.5
_SEND_QUEUE = 20_000
_CONNECT_GRACE_S = 5.0


class Member(msgspec.Struct, frozen=True):
    """What the others need to know of a node."""

    name: str
    role: Role | None
    """None: an API server."""
    incarnation: int
    address: str
    """ZMQ endpoint of its PULL socket."""
    compat: dict[str, str] = {}
    """What replicas must have in common, by name."""
    transport: bytes = b""
    max_context: int = 0
    vocab_size: int = 0
    end_tokens: tuple[int, ...] = ()
    """The model's end-of-sequence tokens."""
    facts: dict[str, str] = {}
    """For people: pages, devices, addresses."""


@dataclasses.dataclass(frozen=True, slots=True)
class NodeConfig:
    """How a node is told what it is; everything in it is plain data."""

    name: str
    role: Role | None
    spec: ClusterSpec
    model_folder: str
    """Where the controller found the model; a node that has no such folder resolves it itself."""
    socket_folder: str
    """ipc sockets; empty: tcp."""
    curve: tuple[bytes, bytes] | None = None
    """tcp: the cluster's public and secret CURVE key."""
    host: str = ""
    """tcp: the address to bind, and to be reached at."""


class Node:
    """Sockets, membership and timers; subclasses say what is done with events."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.spec = config.spec
        self.name = config.name
        self.incarnation = secrets.randbits(64)
        self.dropped_messages = 0
        self.failure = ""
        self._members: dict[str, Member] = {}
        self._heard: dict[str, float] = {}
        self._outbound: dict[str, zmq.Socket[bytes]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._context = zmq.asyncio.Context()
        self._authenticator: zmq.auth.asyncio.AsyncioAuthenticator | None = None

    # -------------------------------------------------------------------- for subclasses to fill in

    async def prepare(self) -> Member:
        """Load what the node needs; everything of the Member but the address."""
        raise NotImplementedError

    def received(self, sender: str, message: AnyMessage) -> None:
        raise NotImplementedError

    def member_joined(self, member: Member) -> None:
        raise NotImplementedError

    def member_left(self, member: Member, reason: str) -> None:
        raise NotImplementedError

    def tick(self) -> None:
        """Called ten times a second."""

    def check(self) -> dict[str, object]:
        """For tests: integrity, and whether everything was given back."""
        return {}

    def heartbeat(self) -> Heartbeat:
        return Heartbeat()

    def model_folder(self) -> Path:
        """Blocks; converting a model can take minutes."""
        from pd.models import resolve_model

        folder = Path(self.config.model_folder)
        if folder.exists():
            return folder
        return resolve_model(self.spec.model.path, weights=self.spec.model.load == "weights")

    async def shut_down(self) -> None:
        """Release what `prepare` took."""

    # ------------------------------------------------------------------------------------ lifecycle

    async def start(self) -> Member:
        address = self._bind()
        member = await self.prepare()
        self.spawn(self._receive_loop())
        self.spawn(self._tick_loop())
        return msgspec.structs.replace(member, address=address)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run for the node's life; an exception ends the node."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                log.exception("%s fails", self.name)
                self.failure = f"{type(error).__name__}: {error}"

        self._tasks.append(asyncio.get_running_loop().create_task(guarded()))

    async def stop(self) -> None:
        await self.shut_down()
        for task in self._tasks:
            task.cancel()
        for outbound in self._outbound.values():
            outbound.close(0)
        self._inbound.close(0)
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    def set_members(self, members: list[Member], reason: str = "") -> None:
        """The list of live nodes; `reason` says why some are gone."""
        wanted = {m.name: m for m in members if m.name != self.name}
        for name, member in list(self._members.items()):
            if name not in wanted or wanted[name].incarnation != member.incarnation:
                del self._members[name]
                self._outbound.pop(name).close(0)
                self.member_left(member, reason or "it left")
        for name, member in wanted.items():
            if name not in self._members:
                self._members[name] = member
                self._heard[name] = time.monotonic() + _CONNECT_GRACE_S
                self._outbound[name] = self._connect(member.address)
                self.member_joined(member)

    def silent_peers(self) -> list[str]:
        """Members not heard of for longer than the heartbeat time-out."""
        limit = time.monotonic() - self.spec.timeouts.heartbeat
        return [name for name in self._members if self._heard[name] < limit]

    # -------------------------------------------------------------------------------------- sockets

    def _bind(self) -> str:
        self._inbound = self._context.socket(zmq.PULL)
        self._inbound.setsockopt(zmq.RCVHWM, _SEND_QUEUE)
        if self.config.socket_folder:
            address = f"ipc://{self.config.socket_folder}/{self.name}-{self.incarnation:x}"
            self._inbound.bind(address)
            return address
        assert self.config.curve is not None
        public, secret = self.config.curve
        self._authenticator = zmq.auth.asyncio.AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(credentials_provider=_OnlyKey(public))
        self._inbound.curve_publickey, self._inbound.curve_secretkey = public, secret
        self._inbound.curve_server = True
        port = self._inbound.bind_to_random_port(f"tcp://{self.config.host}")
        return f"tcp://{self.config.host}:{port}"

    def _connect(self, address: str) -> zmq.Socket[bytes]:
        # A plain socket, not asyncio's: a send that cannot be queued at once is dropped, not
        # awaited.
        outbound: zmq.Socket[bytes] = zmq.Context.shadow(self._context.underlying).socket(zmq.PUSH)
        outbound.setsockopt(zmq.SNDHWM, _SEND_QUEUE)
        outbound.setsockopt(zmq.LINGER, 0)
        if self.config.curve is not None and address.startswith("tcp"):
            public, secret = self.config.curve
            outbound.curve_publickey, outbound.curve_secretkey = public, secret
            outbound.curve_serverkey = public
        outbound.connect(address)
        return outbound

    def send(self, to: str, message: AnyMessage) -> None:
        """Queue a message; dropped (and counted) when `to` is no member or does not read."""
        outbound = self._outbound.get(to)
        try:
            if outbound is None:
                raise zmq.Again
            outbound.send_multipart(
                messages.encode(message, self.name, self.incarnation), zmq.NOBLOCK
            )
        except zmq.Again:
            self.dropped_messages += 1

    async def _receive_loop(self) -> None:
        while True:
            frames = await self._inbound.recv_multipart()
            try:
                sender, incarnation, message = messages.decode(frames)
                member = self._members.get(sender)
                if member is None or member.incarnation != incarnation:
                    raise ProtocolError(f"{sender} is not a member")
            except ProtocolError as error:
                self.dropped_messages += 1
                log.debug("%s drops a message: %s", self.name, error)
                continue
            self._heard[sender] = time.monotonic()
            self.received(sender, message)

    async def _tick_loop(self) -> None:
        next_report = 0.0
        while True:
            await asyncio.sleep(_TICK_S)
            self.tick()
            if time.monotonic() >= next_report:
                next_report = time.monotonic() + _REPORT_S
                heartbeat = self.heartbeat()
                for name in self._members:
                    self.send(name, heartbeat)


class _OnlyKey:
    """Accepts the cluster's own key and no other."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


class ReplicaNode(Node):
    """A replica of one rank: leader, model and transport."""

    async def prepare(self) -> Member:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._compute = ThreadPoolExecutor(1, "compute")
        member = await loop.run_in_executor(self._compute, self._load)
        self._mover.start()
        return member

    def _load(self) -> Member:
        import torch
        import transformers

        from hicache.index import PageIndex
        from pd import cost
        from pd.engine.model import LAYOUT_VERSION, ModelRunner, weights_digest
        from transfer.backends import make_transport
        from transfer.mover import Mover

        assert self.config.role is not None
        spec, role = self.spec, dict(self.spec.roles.items())[self.config.role]
        folder = self.model_folder()
        device = torch.device("cuda", 0) if role.device == "cuda" else torch.device("cpu")
        if device.type == "cpu":
            torch.set_num_threads(role.threads)
        runner = ModelRunner(folder, spec.model, spec.page_tokens, device)
        if device.type == "cuda":
            available = torch.cuda.mem_get_info(device)[0]
        else:
            available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        num_pages = cost.plan_pools(runner.layouts, role, available)
        fits = cost.max_context(runner.layouts, num_pages, role, runner.max_positions)
        cost.check_context(self.config.role, fits, spec.model.max_context)
        limits = [limit for limit in (fits, spec.model.max_context) if limit is not None]
        if not limits:
            raise SpecError("model.max_context: expected a number, as this model names no limit")
        max_context = min(limits)
        runner.allocate(num_pages, role.max_running, max_context)
        runner.warm_up(min(role.max_batch_tokens, max_context))
        self._runner = runner
        transport = make_transport(spec.transfer.backend, self.name, spec.transfer.options)
        transport.register([pool.region for pool in runner.pools])
        self._mover = Mover(transport, self._write_ended, self._peer_lost, self._mover_failed)
        index = PageIndex(runner.groups, num_pages, spec.page_tokens, reuse=spec.cache.device)
        self.leader = Leader(
            self.name,
            index,
            runner.groups,
            spec.page_tokens,
            role.max_batch_tokens,
            role.max_running,
            spec.router.local_prefill_tokens,
        )
        compat = {
            "model weights": weights_digest(folder, spec.model),
            "dtype": spec.model.dtype,
            "compute dtype": str(runner.compute_dtype),
            "page_tokens": str(spec.page_tokens),
            "layer groups": str(
                [(g.kind, g.window, len(g.layers), g.kv_heads, g.head_dim) for g in runner.groups]
            ),
            "page layout version": str(LAYOUT_VERSION),
            "protocol version": str(messages.PROTOCOL_VERSION),
            "PageRelay version": pd.__version__,
            "transformers version": transformers.__version__,
            "torch version": torch.__version__,
        }
        facts = {
            "device": str(device),
            "pages": " + ".join(map(str, num_pages)),
            "pid": str(os.getpid()),
            "host": socket.gethostname(),
        }
        return Member(
            name=self.name,
            role=self.config.role,
            incarnation=self.incarnation,
            address="",
            compat=compat,
            transport=transport.describe(),
            max_context=max_context,
            vocab_size=runner.vocab_size,
            end_tokens=runner.end_tokens,
            facts=facts,
        )

    def handle(self, event: Event) -> None:
        if self.failure:
            return
        try:
            for effect in self.leader.handle(event, time.monotonic()):
                self._carry_out(effect)
            self._mover.expect(self.leader.expects_writes)
        except Exception as error:  # a leader in doubt ends with its process
            self._fail(error)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(to, message):
                self.send(to, message)
            case RunStep(command):
                self._compute.submit(self._runner.step, command).add_done_callback(self._step_ended)
            case Write(write_id, peer, group, source, target):
                self._mover.write(write_id, peer, group, source, target)

    def _step_ended(self, future: Any) -> None:
        """On the compute thread."""
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            self._call(self._fail, error)
        else:
            self._call(self.handle, StepDone(future.result()))

    def _write_ended(self, key: int, result: WriteResult) -> None:
        """On the mover's thread."""
        event = Written(key, result.error, result.bytes_moved, result.descriptors, result.seconds)
        self._call(self.handle, event)

    def _peer_lost(self, peer: str, error: str) -> None:
        self._call(log.error, "%s cannot connect its transport to %s: %s", self.name, peer, error)

    def _mover_failed(self, error: BaseException) -> None:
        """On the mover's thread."""
        self._call(self._fail, error)

    def _call(self, function: Callable[..., object], *args: object) -> None:
        # The loop may have been closed by a stop meanwhile.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

    def _fail(self, error: BaseException) -> None:
        """What failed leaves pages in doubt: the replica ends, and its requests with it."""
        log.error("%s fails", self.name, exc_info=error)
        self.failure = f"{type(error).__name__}: {error}"

    def received(self, sender: str, message: AnyMessage) -> None:
        self.handle(Received(sender, message))

    def member_joined(self, member: Member) -> None:
        if self.config.role == "prefill" and member.role == "decode":
            self._mover.connect(member.name, member.transport)
        self.handle(PeerUp(member.name))

    def member_left(self, member: Member, reason: str) -> None:
        self._mover.disconnect(member.name)
        self.handle(PeerDown(member.name, reason))

    def tick(self) -> None:
        self.handle(Tick())

    def heartbeat(self) -> Heartbeat:
        load = msgspec.structs.replace(self.leader.load(), dropped_messages=self.dropped_messages)
        return Heartbeat(load)

    def check(self) -> dict[str, object]:
        if not self.leader.scheduler.has_step_in_flight:
            self.leader.check_integrity()
        return {"idle": self.leader.is_idle, "load": msgspec.structs.asdict(self.leader.load())}

    async def shut_down(self) -> None:
        self._compute.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._mover.stop, self.spec.timeouts.stop)


class ApiNode(Node):
    """An HTTP server in front of the replicas; it answers from the first membership list on."""

    async def prepare(self) -> Member:
        from pd.api.client import EngineClient
        from pd.router import Router

        self._client = EngineClient(
            self.send, Router(self.spec.router.max_queue), self.spec.page_tokens
        )
        self._server: uvicorn.Server | None = None
        self._tokenizer = await asyncio.to_thread(self._load_tokenizer)
        self._listener = self._listen()
        host, port = self._listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        facts = {"url": url, "pid": str(os.getpid()), "host": socket.gethostname()}
        return Member(self.name, None, self.incarnation, "", facts=facts)

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_folder())

    def _listen(self) -> socket.socket:
        """Bound before anything is started, so that a port in use is an error at start-up."""
        api = self.spec.api
        family = socket.AF_INET6 if ":" in api.host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((api.host, api.port))
        except OSError as error:
            raise OSError(
                f"api.host, api.port: cannot listen on {api.host}:{api.port}: {error.strerror}"
            ) from error
        return listener

    def set_members(self, members: list[Member], reason: str = "") -> None:
        super().set_members(members, reason)
        replicas = [member for member in members if member.role is not None]
        if self._server is None and replicas:
            self._serve(replicas)

    def _serve(self, replicas: list[Member]) -> None:
        import uvicorn

        from pd.api.protocol import ModelInfo
        from pd.api.server import create_app

        first = replicas[0]
        self._client.set_fingerprint(str(sorted(first.compat.items())))
        info = ModelInfo(
            name=self.spec.model.name or Path(self.spec.model.path.removeprefix("package:")).name,
            vocab_size=first.vocab_size,
            max_context=min(member.max_context for member in replicas),
            eos_token_ids=first.end_tokens,
        )
        config = uvicorn.Config(
            create_app(self.spec, self._client, self._tokenizer, info),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        # Not `serve`, which would take the process's signal handlers.
        self.spawn(self._server._serve([self._listener]))

    def received(self, sender: str, message: AnyMessage) -> None:
        self._client.on_message(sender, message)

    def member_joined(self, member: Member) -> None:
        if member.role is not None:
            self._client.on_peer_up(member.name, member.role)

    def member_left(self, member: Member, reason: str) -> None:
        if member.role is not None:
            self._client.on_peer_down(member.name, reason)

    async def shut_down(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
            await asyncio.sleep(0.2)
        self._listener.close()


def make_node(config: NodeConfig) -> Node:
    return ApiNode(config) if config.role is None else ReplicaNode(config)
