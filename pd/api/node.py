"""An API server's process: the engine client and uvicorn on one event loop."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pd.messages import AnyMessage, ApiFigures
from pd.node import Member, Node, Order
from pd.spec import ApiSpec, ClusterSpec, replica_role

_FIGURES_S = 0.5

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import Receive, Scope, Send

    from pd.api.protocol import ModelInfo


def listen(api: ApiSpec, *, is_shared: bool) -> socket.socket:
    """Bound before anything is started, so that a port in use is an error at start-up; `is_shared`:
    others that are so may be bound to it, too. Raises OSError."""
    family = socket.AF_INET6 if ":" in api.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((api.host, api.port))
    except OSError as error:
        listener.close()
        raise OSError(
            f"api.host, api.port: cannot listen on {api.host}:{api.port}: {error.strerror}"
        ) from error
    return listener


class ApiNode(Node):
    """An HTTP server in front of the replicas; it answers from the first membership list on."""

    async def prepare(self) -> Member:
        from pd.api.admin import Admin
        from pd.api.client import EngineClient
        from pd.router import make_router

        self.admin = Admin(self.name)

        self._client = EngineClient(
            self.send,
            make_router(self.spec, self.name, self.spec.api.replicas),
            self.spec.page_tokens,
            self.spec.timeouts.takeover,
        )
        self._server: uvicorn.Server | None = None
        self._info: ModelInfo | None = None
        self._tokenizer = await asyncio.to_thread(self._load_tokenizer)
        self._tell_at = 0.0
        self._listener = listen(self.spec.api, is_shared=self.spec.api.replicas > 1)
        host, port = self._listener.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        facts = {"url": url, "pid": str(os.getpid()), "host": socket.gethostname()}
        return Member(self.name, None, self.incarnation, "", facts=facts)

    def _load_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_folder())

    def set_members(self, members: list[Member], reason: str = "") -> None:
        super().set_members(members, reason)
        replicas = [member for member in members if member.is_replica]
        if self._info is None and replicas:
            self._info = self._serve(replicas)
        elif self._info is not None and replicas:
            self._info.max_context = min(member.max_context for member in replicas)

    def _serve(self, replicas: list[Member]) -> ModelInfo:
        import uvicorn

        from pd.api.protocol import ModelInfo

        first = replicas[0]
        info = ModelInfo(
            name=self.spec.model.name or Path(self.spec.model.path.removeprefix("package:")).name,
            vocab_size=first.vocab_size,
            max_context=min(member.max_context for member in replicas),
            eos_token_ids=first.end_tokens,
        )
        self._info = info
        self._make_app()
        config = uvicorn.Config(
            self._forward,
            interface="asgi3",
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
        )
        self._server = uvicorn.Server(config)
        # Not `serve`, which would take the process's signal handlers.
        self.spawn(self._server._serve([self._listener]))
        return info

    def _make_app(self) -> None:
        from pd.api.server import create_app

        assert self._info is not None
        self._app = create_app(self.spec, self._client, self._tokenizer, self._info, self.admin)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def set_spec(self, spec: ClusterSpec) -> None:
        """For requests that come from now on."""
        from pd.router import make_router

        self.spec = spec
        self._client.use_router(make_router(spec, self.name, spec.api.replicas))
        self._client.takeover_s = spec.timeouts.takeover
        if self._info is not None:
            self._make_app()

    @property
    def num_refused(self) -> int:
        return self._client.counters.refused

    @property
    def is_idle(self) -> bool:
        return not self._client.router.in_flight

    def take_orders(self) -> list[Order]:
        return self.admin.take_orders()

    def received(self, sender: str, message: AnyMessage) -> None:
        if isinstance(message, ApiFigures):
            self.admin.siblings[sender] = message
        else:
            self._client.on_message(sender, message)

    def tick(self) -> None:
        """The other API processes hear of its figures."""
        others = [member.name for member in self._members.values() if member.role is None]
        metrics, now = self.admin.metrics, time.monotonic()
        if others and metrics is not None and now >= self._tell_at:
            self._tell_at = now + _FIGURES_S
            own = ApiFigures(self._client.router.in_flight, metrics.render_own())
            for name in others:
                self.send(name, own)

    def member_joined(self, member: Member) -> None:
        if member.role == "cache":
            self._client.caches.keeper_up(member.name)
        elif member.role is not None:
            role = replica_role(member.role)
            facts = member.fingerprint, member.cohort, member.max_context
            self._client.on_peer_up(member.name, role, *facts)

    def member_left(self, member: Member, reason: str) -> None:
        if member.role is None:
            self.admin.siblings.pop(member.name, None)
        elif member.role == "cache":
            self._client.caches.keeper_down(member.name, reason)
        else:
            self._client.on_peer_down(member.name, reason)

    def member_draining(self, member: Member) -> None:
        if member.is_replica:
            self._client.on_peer_draining(member.name)

    async def shut_down(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
            await asyncio.sleep(0.2)
        self._listener.close()
