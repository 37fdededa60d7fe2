"""What every process has in common: sockets, membership and timers, on asyncio and ZMQ. No Ray.

A node binds one PULL socket and pushes to every other member; messages travel one way. Membership
comes from outside (`set_members`): who is not in the list is dead, and what it sent is dropped. So
is what was sent to an earlier process of this node's name.

Sending never blocks: a peer that does not read its messages loses them once its queue is full,
which is counted. Leaders repeat what matters; for the rest a request's deadline ends what hangs on
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import msgspec
import zmq
import zmq.asyncio
import zmq.auth.asyncio

from pd import messages
from pd.messages import AnyMessage, Heartbeat, ProtocolError
from pd.spec import ClusterSpec, MemberRole
from transfer.topology import Topology

log = logging.getLogger("pagerelay")

_TICK_S = 0.1
_REPORT_S = 0.5
_SEND_QUEUE = 20_000
_CONNECT_GRACE_S = 5.0


class Member(msgspec.Struct, frozen=True):
    """What the others need to know of a node."""

    name: str
    role: MemberRole | None
    """None: an API server."""
    incarnation: int
    address: str
    """ZMQ endpoint of its PULL socket."""
    compat: dict[str, str] = {}
    """What replicas must have in common, by name."""
    transports: tuple[bytes, ...] = ()
    """By rank: what a transport needs to connect to it. A keeper's: the host tier."""
    max_context: int = 0
    vocab_size: int = 0
    end_tokens: tuple[int, ...] = ()
    """The model's end-of-sequence tokens."""
    facts: dict[str, str] = {}
    """For people: pages, devices, addresses."""
    topology: Topology = Topology()
    draining: bool = False
    """It gets nothing new, what it has goes elsewhere, and then it is ended."""
    cohort: str = ""
    """Of a replica: those of one cohort can hand over to each other."""

    @property
    def is_replica(self) -> bool:
        return self.role not in (None, "cache", "rank")

    @property
    def fingerprint(self) -> str:
        """Of the model that a replica serves, as page hashes know it."""
        return str(sorted(self.compat.items()))


@dataclasses.dataclass(frozen=True, slots=True)
class NodeConfig:
    """How a node is told what it is; everything in it is plain data."""

    name: str
    role: MemberRole | None
    spec: ClusterSpec
    model_folder: str
    """Where the controller found the model; a node that has no such folder resolves it itself."""
    socket_folder: str
    """ipc sockets; empty: tcp."""
    curve: tuple[bytes, bytes] | None = None
    """tcp: the cluster's public and secret CURVE key."""
    host: str = ""
    """tcp: the address to bind, and to be reached at."""
    rank: int = 0
    """Of its replica; 0 has the leader."""
    replica: str = ""
    """Whose rank it is; empty: its own."""

    @property
    def rank_host(self) -> str:
        """Where this process is reached by other ranks of its replica."""
        return "127.0.0.1" if self.socket_folder else self.host


class Order(msgspec.Struct, frozen=True):
    """Of somebody to the controller."""

    serial: int
    action: Literal["reload", "drain"]
    argument: str
    """reload: a spec, as JSON; drain: the name of a replica."""


class Node:
    """Sockets, membership and timers; subclasses say what is done with events."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.spec = config.spec
        self.name = config.name
        self.incarnation = secrets.randbits(64)
        self.dropped_messages = 0
        self.meeting: tuple[str, int] | None = None
        """Where the ranks of a replica of several find each other; set before `start`."""
        self.failure = ""
        self.member: Member | None = None
        """Itself, once it has started."""
        self.is_draining = False
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

    def member_draining(self, member: Member) -> None:
        """One that has joined, or this node itself."""

    def tick(self) -> None:
        """Called ten times a second."""

    def check(self) -> dict[str, object]:
        """For tests: integrity, and whether everything was given back."""
        return {}

    def heartbeat(self) -> Heartbeat:
        return Heartbeat()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is lost with it but caches."""
        return True

    def take_orders(self) -> list[Order]:
        """What people asked of the controller, here."""
        return []

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
        self._loop = asyncio.get_running_loop()
        address = self._bind()
        member = await self.prepare()
        self.spawn(self._receive_loop())
        self.spawn(self._tick_loop())
        self.member = msgspec.structs.replace(member, address=address)
        return self.member

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run, for the node's life at most; an exception ends the node."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                log.exception("%s fails", self.name)
                self.failure = f"{type(error).__name__}: {error}"

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """On the event loop, from any thread."""
        # The loop may have been closed by a stop meanwhile.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *args)

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
        """The list of live nodes, in the order in which they are to be known; `reason` says why
        some are gone."""
        me = next((m for m in members if m.name == self.name), None)
        wanted = {m.name: m for m in members if m is not me}
        if me is not None and me.draining and not self.is_draining:
            self.is_draining = True
            self.member_draining(me)
        for name, member in list(self._members.items()):
            if name not in wanted or wanted[name].incarnation != member.incarnation:
                del self._members[name]
                self._outbound.pop(name).close(0)
                self.member_left(member, reason or "it left")
        for name, member in wanted.items():
            known = self._members.get(name)
            self._members[name] = member
            if known is None:
                self._heard[name] = time.monotonic() + _CONNECT_GRACE_S
                self._outbound[name] = self._connect(member.address)
                self.member_joined(member)
            if member.draining and not (known and known.draining):
                self.member_draining(member)

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

    def send(self, to: str, message: AnyMessage) -> bool:
        """Queue a message; dropped (and counted) when `to` is no member or does not read."""
        member = self._members.get(to)
        try:
            if member is None:
                raise zmq.Again
            frames = messages.encode(message, self.name, self.incarnation, member.incarnation)
            self._outbound[to].send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:
            self.dropped_messages += 1
            return False
        return True

    async def _receive_loop(self) -> None:
        while True:
            frames = await self._inbound.recv_multipart()
            try:
                sender, incarnation, message = messages.decode(frames, self.incarnation)
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
