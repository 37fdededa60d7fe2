"""The HTTP API: OpenAI's completions and chats, tokens, health, metrics, status, caches.

A request is read, checked and tokenized before any replica hears of it, and refused with a status
as long as no byte was sent: also a stream's headers wait for its first output. Every error has
OpenAI's shape. A client that goes away ends its requests at once. Long texts are tokenized in a
thread; all else runs on the event loop.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hicache.storage.backends import backend_names
from pd.api.admin import Admin, OrderError
from pd.api.caches import Action, KeeperAnswer
from pd.api.chat import ChatTemplate, ChatTemplateError
from pd.api.client import EngineClient
from pd.api.errors import ApiError, bad_request
from pd.api.generation import Choice, ClientGone, Generation, error_event
from pd.api.metrics import ApiMetrics, pages_by_group
from pd.api.protocol import (
    PRIORITY_HEADER,
    TENANT_HEADER,
    AttachRequest,
    ChatMessage,
    ChatRequest,
    ClearRequest,
    CompletionRequest,
    DetokenizeRequest,
    DrainRequest,
    GenerationRequest,
    ModelInfo,
    ReloadRequest,
    RequestModel,
    TokenizeRequest,
    check_limits,
    check_model,
    check_prompt_tokens,
    parse_priority,
    parse_request,
    parse_tenant,
    plan_max_tokens,
    plan_sampling,
)
from pd.api.text import ChoiceText, Tokenizer, Vocabulary
from pd.router import NoReplica, Overloaded
from pd.spec import ClusterSpec

__all__ = ["ModelInfo", "create_app"]

THREAD_CHARACTERS = 4_000
"""Texts longer than this are tokenized in a thread; for shorter ones the change of thread costs
more."""
CLIENT_CLOSED_REQUEST = 499
"""nginx's status for an answer that nobody reads."""

_CACHE_LOAD = (
    "cached_tokens",
    "fetching",
    "pages_evicted",
    "host_pages_in",
    "host_bytes_in",
    "host_seconds_in",
    "host_pages_out",
    "host_bytes_out",
    "host_seconds_out",
    "host_pages_not_offered",
)
"""Fields of ReplicaLoad."""

Result = TypeVar("Result")
Asked = TypeVar("Asked", bound=RequestModel)


def create_app(
    spec: ClusterSpec,
    client: EngineClient,
    tokenizer: Tokenizer,
    model: ModelInfo,
    admin: Admin | None = None,
) -> FastAPI:
    """The ASGI application; it lives on the event loop that `client` lives on."""
    server = _Server(spec, client, tokenizer, model, admin or Admin())
    app = FastAPI(
        title="PageRelay", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    for path, method, handler in (
        ("/v1/completions", "POST", server.completions),
        ("/v1/chat/completions", "POST", server.chat),
        ("/v1/models", "GET", server.models),
        ("/v1/models/{name:path}", "GET", server.one_model),
        ("/tokenize", "POST", server.tokenize),
        ("/detokenize", "POST", server.detokenize),
        ("/health", "GET", server.health),
        ("/metrics", "GET", server.render_metrics),
        ("/admin/status", "GET", server.status),
        ("/admin/reload", "POST", server.reload),
        ("/admin/drain", "POST", server.drain),
        ("/cache", "GET", server.cache),
        ("/cache/clear", "POST", server.clear_cache),
        ("/cache/storage", "POST", server.attach_storage),
        ("/cache/storage", "DELETE", server.detach_storage),
        ("/cache/storage/clear", "POST", server.clear_storage),
    ):
        app.add_route(path, handler, methods=[method])
    app.add_exception_handler(ApiError, server.on_api_error)
    app.add_exception_handler(HTTPException, server.on_http_error)
    app.add_exception_handler(ClientGone, server.on_client_gone)
    app.add_exception_handler(ClientDisconnect, server.on_client_gone)
    app.add_exception_handler(Exception, server.on_bug)
    tenants = dict.fromkeys(spec.api.keys, "")
    tenants |= {key: tenant for tenant, keys in spec.api.tenants.items() for key in keys}
    if tenants:
        app.add_middleware(_KeyCheck, tenants=tenants, refuse=server.render_error)
    return app


class _Server:
    def __init__(
        self,
        spec: ClusterSpec,
        client: EngineClient,
        tokenizer: Tokenizer,
        model: ModelInfo,
        admin: Admin,
    ) -> None:
        self._admin = admin
        self._spec = spec
        self._client = client
        self._tokenizer = tokenizer
        self._model = model
        self._template = ChatTemplate(tokenizer, spec.model.chat_template)
        self._vocabulary = Vocabulary(tokenizer)
        self._metrics = admin.metrics = admin.metrics or ApiMetrics(
            client.replicas,
            lambda: client.router.in_flight,
            client.keepers,
            client.counters,
        )
        self._created = int(time.time())

    # ---------------------------------------------------------------------------------- generation

    async def completions(self, request: Request) -> Response:
        arrived_s = asyncio.get_running_loop().time()
        asked = await self._read(request, CompletionRequest)
        check_limits(asked, self._spec.api, self._model)
        prompts = asked.prompts()
        whose = self._whose(request, asked)
        self._check_room(len(prompts), asked.n, whose)
        encoded = [
            await self._encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts
        ]
        for prompt in encoded:
            check_prompt_tokens("prompt", prompt, self._model)
        return await self._answer(request, asked, encoded, whose, arrived_s)

    async def chat(self, request: Request) -> Response:
        arrived_s = asyncio.get_running_loop().time()
        asked = await self._read(request, ChatRequest)
        check_limits(asked, self._spec.api, self._model)
        whose = self._whose(request, asked)
        self._check_room(1, asked.n, whose)
        prompt = await self._encode_chat(asked.messages)
        check_prompt_tokens("messages", prompt, self._model)
        return await self._answer(request, asked, [prompt], whose, arrived_s)

    async def _answer(
        self,
        request: Request,
        asked: GenerationRequest,
        prompts: list[list[int]],
        whose: tuple[str, int],
        arrived_s: float,
    ) -> Response:
        generation = self._start(asked, prompts, whose, arrived_s)
        watcher = asyncio.create_task(_watch_client(request.receive, generation))
        is_handed_over = False
        try:
            if not asked.stream:
                return Response(await generation.whole(), media_type="application/json")
            events = generation.events()
            response = _EventStream(await anext(events), events, generation, watcher)
            is_handed_over = True
            return response
        finally:
            if not is_handed_over:
                watcher.cancel()
                generation.close()

    def _start(
        self,
        asked: GenerationRequest,
        prompts: list[list[int]],
        whose: tuple[str, int],
        arrived_s: float,
    ) -> Generation:
        model = self._model
        pairs = [
            (prompt, plan_sampling(asked, plan_max_tokens(asked, len(prompt), model), model))
            for prompt in prompts
        ]
        try:
            streams = self._client.submit_all(
                pairs, asked.n, asked.cache_salt, self._seconds_left(arrived_s), *whose
            )
        except (Overloaded, NoReplica) as error:
            raise self._unavailable(error) from error
        # A completion goes on from its prompt; a chat's message is a text of its own.
        is_chat = isinstance(asked, ChatRequest)
        choices = []
        for index, stream in enumerate(streams):
            prompt, sampling = pairs[index // asked.n]
            context = () if is_chat else prompt
            text = ChoiceText(self._vocabulary, sampling, asked.stop, context)
            choices.append(Choice(index, stream, text, len(prompt), index % asked.n == 0))
        return Generation(
            asked,
            choices,
            vocabulary=self._vocabulary,
            model=model,
            metrics=self._metrics,
            arrived_s=arrived_s,
        )

    def _seconds_left(self, arrived_s: float) -> float:
        """Until the request's deadline. Raises ApiError when it has passed."""
        left = arrived_s + self._spec.timeouts.request - asyncio.get_running_loop().time()
        if left <= 0:
            raise ApiError(
                504, "the request's time is up while its prompt is tokenized", code="timeout"
            )
        return left

    def _whose(self, request: Request, asked: GenerationRequest) -> tuple[str, int]:
        """(tenant, priority). Raises ApiError."""
        of_key = request.scope.get("state", {}).get("tenant", "")
        tenant = parse_tenant(request.headers.getlist(TENANT_HEADER), of_key)
        named = request.headers.getlist(PRIORITY_HEADER)
        return tenant, parse_priority(named, asked.priority, self._spec.router)

    def _check_room(self, num_prompts: int, n: int, whose: tuple[str, int]) -> None:
        router = self._client.router
        if num_prompts * n > (most := router.most(whose[1])):
            raise bad_request(
                f"{num_prompts} prompts with n {n} are {num_prompts * n} requests; expected at "
                f"most {most}",
                "n" if num_prompts == 1 else "prompt",
            )
        try:
            router.check_room(num_prompts * n, *whose, asyncio.get_running_loop().time())
        except Overloaded as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Overloaded | NoReplica) -> ApiError:
        self._client.counters.refused += 1
        if isinstance(error, Overloaded):
            headers = {"retry-after": str(error.retry_after_s)}
            return ApiError(429, str(error), code="overloaded", headers=headers)
        return ApiError(503, str(error), code="no_replica")

    # -------------------------------------------------------------------------------------- tokens

    async def tokenize(self, request: Request) -> Response:
        asked = await self._read(request, TokenizeRequest)
        self._check_optional_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise bad_request("prompt: expected either prompt or messages", "prompt")
        if asked.messages is not None:
            tokens = await self._encode_chat(asked.messages)
        else:
            tokens = await self._encode(asked.prompt or "", asked.add_special_tokens)
        return _json(
            {"tokens": tokens, "count": len(tokens), "max_model_len": self._model.max_context}
        )

    async def detokenize(self, request: Request) -> Response:
        asked = await self._read(request, DetokenizeRequest)
        self._check_optional_model(asked.model)
        if asked.tokens:
            check_prompt_tokens("tokens", asked.tokens, self._model)
        text = await _run(
            len(asked.tokens),
            lambda: self._tokenizer.decode(
                asked.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
            ),
        )
        return _json({"prompt": text})

    def _check_optional_model(self, name: str | None) -> None:
        if name is not None:
            check_model(name, self._model)

    async def _encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return await _run(
            len(text),
            lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens),
        )

    async def _encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        # Templates know no developer; OpenAI gives that role the system's place.
        conversation = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.text(),
            }
            | ({"name": message.name} if message.name is not None else {})
            for message in messages
        ]
        num_characters = sum(len(message["content"]) for message in conversation)
        try:
            return await _run(num_characters, lambda: self._template.encode(conversation))
        except ChatTemplateError as error:
            raise bad_request(
                f"messages: the model's chat template refuses them: {error}", "messages"
            ) from error

    # ------------------------------------------------------------------------------- what there is

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model_object()]})

    async def one_model(self, request: Request) -> Response:
        check_model(request.path_params["name"], self._model)
        return _json(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._model.name,
            "object": "model",
            "created": self._created,
            "owned_by": "pagerelay",
            "max_model_len": self._model.max_context,
            "vocab_size": self._model.vocab_size,
        }

    async def health(self, request: Request) -> Response:
        """200 when every role that the spec starts replicas of has one, and one can decode."""
        up = [replica.role for replica in self._client.replicas()]
        needed = [role for role, spec in self._spec.roles.items() if spec.replicas.min > 0]
        missing: list[str] = [role for role in needed if role not in up]
        if not missing and not any(role != "prefill" for role in up):
            missing.append("decode")
        roles = {
            role: {"up": up.count(role), "min": spec.replicas.min, "max": spec.replicas.max}
            for role, spec in self._spec.roles.items()
        }
        body = {
            "status": "unavailable" if missing else "ok",
            "model": self._model.name,
            "missing": missing,
            "roles": roles,
        }
        return _json(body, 503 if missing else 200)

    async def render_metrics(self, request: Request) -> Response:
        of_all = None
        if self._spec.api.replicas > 1:
            siblings = {name: each.metrics for name, each in self._admin.siblings.items()}
            of_all = {self._admin.api: self._metrics.render_own(), **siblings}
        return Response(self._metrics.render(of_all), media_type=CONTENT_TYPE_LATEST)

    async def status(self, request: Request) -> Response:
        replicas = [
            {"name": replica.name, "role": replica.role}
            | msgspec.structs.asdict(replica.load)
            | {
                "pages": [
                    {"group": group, **states}
                    for group, states in enumerate(pages_by_group(replica.load))
                ]
            }
            for replica in self._client.replicas()
        ]
        return _json(
            {
                "model": self._model.name,
                "in_flight": self._client.router.in_flight
                + sum(each.in_flight for each in self._admin.siblings.values()),
                "max_queue": self._spec.router.max_queue,
                "replicas": replicas,
                "controller": self._admin.state,
            }
        )

    # --------------------------------------------------------------------------- for the controller

    async def reload(self, request: Request) -> Response:
        asked = await self._read(request, ReloadRequest)
        return await self._order(request, "reload", json.dumps(asked.spec))

    async def drain(self, request: Request) -> Response:
        asked = await self._read(request, DrainRequest)
        return await self._order(request, "drain", asked.replica)

    async def _order(
        self, request: Request, action: Literal["reload", "drain"], argument: str
    ) -> Response:
        """Raises ApiError: 403 for a tenant's key, 409 where it is refused, 503 without answer."""
        if self._spec.api.tenants and request.state.tenant:
            text = "the API key is a tenant's; expected one of api.keys"
            raise ApiError(403, text, code="not_permitted")
        try:
            return _json(await self._admin.order(action, argument))
        except OrderError as error:
            if error.is_refused:
                raise ApiError(409, str(error), code="refused") from error
            raise ApiError(503, str(error), code="no_controller") from error

    # -------------------------------------------------------------------------------------- caches

    async def cache(self, request: Request) -> Response:
        """All tiers: the keepers' reports, and the replicas' device tiers as last heard of."""
        answers = await self._ask_keepers(request, "report")
        keepers = [
            each.report if each.report is not None else {"name": each.name, "error": each.error}
            for each in answers
        ]
        replicas = [
            {
                "name": replica.name,
                "role": replica.role,
                "pages": [
                    {"group": group, **states}
                    for group, states in enumerate(pages_by_group(replica.load))
                ],
            }
            | {name: getattr(replica.load, name) for name in _CACHE_LOAD}
            for replica in self._client.replicas()
        ]
        return _json({"model": self._model.name, "keepers": keepers, "replicas": replicas})

    async def clear_cache(self, request: Request) -> Response:
        asked = await self._read(request, ClearRequest)
        return await self._change_caches(request, "clear", tenant=asked.tenant)

    async def attach_storage(self, request: Request) -> Response:
        asked = await self._read(request, AttachRequest)
        if asked.backend not in (known := backend_names()):
            raise bad_request(
                f"backend: expected one of {', '.join(known)}, got {asked.backend!r}", "backend"
            )
        return await self._change_caches(
            request, "attach", backend=asked.backend, options=asked.options
        )

    async def detach_storage(self, request: Request) -> Response:
        return await self._change_caches(request, "detach")

    async def clear_storage(self, request: Request) -> Response:
        return await self._change_caches(request, "clear_storage")

    async def _change_caches(self, request: Request, action: Action, **options: Any) -> Response:
        """Raises ApiError naming every keeper that did not do it, the others have: 409 where each
        of those refused, else 503."""
        answers = await self._ask_keepers(request, action, **options)
        failed = [each for each in answers if each.error]
        if failed:
            text = "; ".join(f"{each.name}: {each.error}" for each in failed)
            if all(each.is_refused for each in failed):
                raise ApiError(409, text, code="cache_refused")
            raise ApiError(503, text, code="cache_unavailable")
        return _json({"keepers": [each.report for each in answers]})

    async def _ask_keepers(
        self, request: Request, action: Action, **options: Any
    ) -> list[KeeperAnswer]:
        """All of them, or the one that the query names."""
        caches = self._client.caches
        name = request.query_params.get("keeper", "")
        if self._spec.cache.host is None:
            raise ApiError(
                404, "the spec has no cache.host: there is no host tier", code="no_cache"
            )
        if name and name not in caches.keepers:
            raise ApiError(
                404,
                f"keeper: found {name!r}, there are {', '.join(sorted(caches.keepers)) or 'none'}",
                code="not_found",
                param="keeper",
            )
        if not caches.keepers and action != "report":
            raise ApiError(503, "no keeper of a host tier is up", code="cache_unavailable")
        return await caches.command(action, keeper=name, **options)

    # --------------------------------------------------------------------------- reading, refusing

    async def _read(self, request: Request, model: type[Asked]) -> Asked:
        limit = self._spec.timeouts.request
        try:
            async with asyncio.timeout(limit):
                body = await _read_body(request, self._spec.api.max_body)
        except TimeoutError:
            text = f"the body has not come within {limit:g} s"
            raise ApiError(408, text, code="timeout") from None
        return parse_request(body, model)

    def render_error(self, error: ApiError) -> Response:
        self._metrics.observe_http_error(error.status)
        return _json(error.body(), error.status, error.headers)

    async def on_api_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return self.render_error(error)

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {
            404: f"there is no {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }.get(error.status_code, error.detail)
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return self.render_error(
            ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))
        )

    async def on_client_gone(self, request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def on_bug(self, request: Request, error: Exception) -> Response:
        """The framework logs the traceback; the client learns no more than that it was not its
        fault."""
        return self.render_error(
            ApiError(500, "internal error; the server's log says more", code="internal_error")
        )


class _EventStream(Response):
    """Sends server-sent events; owns the generation from here on."""

    def __init__(
        self,
        first: bytes,
        events: AsyncIterator[bytes],
        generation: Generation,
        watcher: asyncio.Task[None],
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._first = first
        self._events = events
        self._generation = generation
        self._watcher = watcher

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await put(self._first)
            try:
                async for event in self._events:
                    await put(event)
            except ApiError as error:
                await put(error_event(error))
            except ClientGone:
                return
            await put(b"", more=False)
        finally:
            self._watcher.cancel()
            self._generation.close()


class _KeyCheck:
    """Lets only holders of a key through to everything but /health and /metrics."""

    def __init__(
        self, app: ASGIApp, tenants: Mapping[str, str], refuse: Callable[[ApiError], Response]
    ) -> None:
        """`tenants`: of each key; empty: it has none."""
        self._app = app
        self._tenants = {key.encode(): tenant for key, tenant in tenants.items()}
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in ("/health", "/metrics"):
            header = dict(scope["headers"]).get(b"authorization", b"")
            tenant = self._tenant_of(header)
            if tenant is None:
                message = (
                    "the API key is not known"
                    if header
                    else "no API key was given; expected the header Authorization: Bearer KEY"
                )
                error = ApiError(
                    401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"}
                )
                await self._refuse(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["tenant"] = tenant
        await self._app(scope, receive, send)

    def _tenant_of(self, header: bytes) -> str | None:
        """None: the key is not known. Takes the same time whichever key it is, and however much of
        it is right."""
        scheme, _, given = header.partition(b" ")
        found = None
        for key, tenant in self._tenants.items():
            if hmac.compare_digest(given.strip(), key):
                found = tenant
        return found if scheme.lower() == b"bearer" else None


async def _watch_client(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.on_client_gone()


async def _read_body(request: Request, max_bytes: int) -> bytes:
    """Raises ApiError as soon as more than `max_bytes` are announced or have come."""
    announced = request.headers.get("content-length", "")
    num_bytes = int(announced) if announced.isdigit() else 0
    parts = []
    if num_bytes <= max_bytes:
        num_bytes = 0
        async for part in request.stream():
            parts.append(part)
            num_bytes += len(part)
            if num_bytes > max_bytes:
                break
    if num_bytes > max_bytes:
        raise ApiError(413, f"the body is longer than {max_bytes} bytes", code="request_too_large")
    return b"".join(parts)


async def _run(num_characters: int, work: Callable[[], Result]) -> Result:
    if num_characters > THREAD_CHARACTERS:
        return await asyncio.to_thread(work)
    return work()


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")
