"""A cluster behind the API's own seam: `send` and `on_message`, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import requests
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pd.api.client import EngineClient
from pd.api.server import ModelInfo, create_app
from pd.messages import (
    Abort,
    AnyMessage,
    Generate,
    Heartbeat,
    Output,
    Outputs,
    PagesWanted,
    ReplicaLoad,
    RequestStats,
    TokenLogprob,
    unpack_ints,
)
from pd.router import Router
from pd.spec import ClusterSpec

CORPUS = ["the quick brown fox jumps over the lazy dog.", "hello world, how are you? é ü 漢字 😀"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message comes first') }}{% endif %}"
    "<|turn|>{{ m.role }}\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
ANSWER = " the quick brown fox jumps over the lazy dog."
PAGE_TOKENS = 4
MAX_CONTEXT = 200


def train_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """Byte-level BPE, as Llama 3, Qwen and GPT have; rare characters take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|end|>", "<|turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS[0]] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=chat_template
    )


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return train_tokenizer()


Mode = Literal["answer", "silent", "stuck_after_two", "error", "error_after_two"]


@dataclasses.dataclass
class FakeLeaders:
    """Every replica's leader: answers with `answer`, one token per turn of the loop.

    With temperature 0 the seed does not count; else it shortens the answer's beginning, so that
    different seeds give different texts.
    """

    tokenizer: Any
    client: EngineClient = None  # type: ignore[assignment]
    mode: Mode = "answer"
    answer: str = ANSWER
    group: int = 1
    """Tokens per output."""
    received: list[tuple[str, AnyMessage]] = dataclasses.field(default_factory=list)

    def generates(self) -> list[Generate]:
        return [message for _, message in self.received if isinstance(message, Generate)]

    def aborted_ids(self) -> set[str]:
        return {message.request_id for _, message in self.received if isinstance(message, Abort)}

    def send(self, replica: str, message: AnyMessage) -> None:
        if isinstance(message, PagesWanted):
            return  # asked as soon as they are up; they tell nothing
        self.received.append((replica, message))
        if isinstance(message, Generate) and self.mode != "silent":
            tokens = self.tokens_for(message)
            asyncio.get_running_loop().call_soon(self._step, replica, message, tokens, 0)

    def tokens_for(self, generate: Generate) -> list[int]:
        sampling = generate.sampling
        tokens = self.tokenizer.encode(self.answer, add_special_tokens=False)
        if sampling.temperature > 0:
            tokens = tokens[sampling.seed % len(tokens) :]
        end = self.tokenizer.eos_token_id
        tokens = [*tokens, end] if end in sampling.stop_token_ids else tokens * 50
        for i, token in enumerate(tokens):
            if token in sampling.stop_token_ids and i >= sampling.min_tokens:
                tokens = tokens[: i + 1]
                break
        return tokens[: sampling.max_tokens]

    def _step(self, replica: str, generate: Generate, tokens: list[int], start: int) -> None:
        if (replica, Abort(generate.request_id)) in self.received:
            return
        part = tokens[start : start + self.group]
        end = start + len(part)
        finish: Any = None
        error = ""
        if self.mode == "error" or (self.mode == "error_after_two" and start >= 2):
            part, finish, error = [], "error", f"replica {replica} has no pages left"
        elif self.mode == "stuck_after_two" and start >= 2:
            return
        elif end == len(tokens):
            finish = "stop" if tokens[-1] in generate.sampling.stop_token_ids else "length"
        output = Output(
            generate.request_id,
            tuple(part),
            tuple(self._logprob(generate, token) for token in part)
            if generate.sampling.logprobs is not None
            else (),
            finish,
            error,
            self._stats(replica, generate) if finish or start == 0 else None,
            start,
        )
        self.client.on_message(replica, Outputs((output,)))
        if finish is None:
            asyncio.get_running_loop().call_soon(self._step, replica, generate, tokens, end)

    def _logprob(self, generate: Generate, token: int) -> TokenLogprob:
        num = generate.sampling.logprobs or 0
        top = tuple([token, *range(10, 10 + num)][:num])
        return TokenLogprob(-0.25, top, tuple(-0.25 - i for i in range(num)))

    def _stats(self, replica: str, generate: Generate) -> RequestStats:
        return RequestStats(
            queue_s=0.5,
            pages_moved=3,
            cached_tokens_decode=1,
            cached_tokens_prefill=2,
            prefill_replica=generate.prefill,
            decode_replica=replica,
        )


def make_client(
    leaders: FakeLeaders,
    max_queue: int = 64,
    with_replicas: bool = True,
    takeover_s: float = 30.0,
    router: Router | None = None,
) -> EngineClient:
    router = router or Router(max_queue)
    client = EngineClient(leaders.send, router, PAGE_TOKENS, takeover_s)
    leaders.client = client
    if with_replicas:
        client.on_peer_up("prefill-0", "prefill", "test model")
        client.on_peer_up("decode-0", "decode", "test model")
        load = ReplicaLoad(
            waiting=2,
            running=1,
            pages_free=(7, 3),
            pages_cached=(2, 0),
            pages_used=(1, 5),
            kv_bytes=9,
        )
        client.on_message("decode-0", Heartbeat(load))
    return client


def unpack_prompt(generate: Generate) -> list[int]:
    return list(map(int, unpack_ints(generate.prompt)))


SPEC: dict[str, Any] = {
    "model": {"path": "unused", "name": "tiny"},
    "page_tokens": PAGE_TOKENS,
    "roles": {"prefill": {}, "decode": {}},
}


class _AnnouncedServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self._on_started()


class ApiHarness:
    """A real server in a thread, its fake leaders, and how to reach both."""

    def __init__(
        self, tokenizer: Any, *, max_queue: int, with_replicas: bool, **sections: Any
    ) -> None:
        self.leaders = FakeLeaders(tokenizer)
        self.tokenizer = tokenizer
        self._spec = ClusterSpec.model_validate({**SPEC, **sections})
        self._max_queue = max_queue
        self._with_replicas = with_replicas
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._started.wait(20)
        self.url = f"http://127.0.0.1:{self.port}"

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        takeover_s = self._spec.timeouts.takeover
        router = Router(
            self._max_queue,
            classes=self._spec.router.classes(),
            objectives=self._spec.objectives,
        )
        self.client = make_client(
            self.leaders,
            with_replicas=self._with_replicas,
            takeover_s=takeover_s,
            router=router,
        )
        model = ModelInfo("tiny", len(self.tokenizer), MAX_CONTEXT, (self.tokenizer.eos_token_id,))
        app = create_app(self._spec, self.client, self.tokenizer, model)
        config = uvicorn.Config(app, "127.0.0.1", 0, log_level="error", lifespan="off")
        self._server = _AnnouncedServer(config, self._on_started)
        await self._server.serve()

    def _on_started(self) -> None:
        self.port = self._server.servers[0].sockets[0].getsockname()[1]
        self._started.set()

    def on_loop(self, function: Callable[[], Any]) -> Any:
        async def call() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(10)

    def post(self, path: str, body: Any, **options: Any) -> requests.Response:
        if isinstance(body, bytes):
            return requests.post(self.url + path, data=body, timeout=20, **options)
        return requests.post(self.url + path, json=body, timeout=20, **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=20, **options)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive()


def eventually(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.002)


@pytest.fixture
def serve(tokenizer: Any) -> Iterator[Callable[..., ApiHarness]]:
    """`serve(max_queue=..., with_replicas=..., api={...})` gives a running harness."""
    with contextlib.ExitStack() as stack:

        def start(
            *,
            tokenizer: Any = tokenizer,
            max_queue: int = 64,
            with_replicas: bool = True,
            **sections: Any,
        ) -> ApiHarness:
            harness = ApiHarness(
                tokenizer, max_queue=max_queue, with_replicas=with_replicas, **sections
            )
            stack.callback(harness.close)
            return harness

        yield start


@pytest.fixture(scope="module")
def shared(tokenizer: Any) -> Iterator[ApiHarness]:
    """One server for a module's tests that change nothing lasting."""
    harness = ApiHarness(tokenizer, max_queue=64, with_replicas=True)
    yield harness
    harness.on_loop(harness.client.check_integrity)
    harness.close()


@pytest.fixture
def api(shared: ApiHarness) -> ApiHarness:
    shared.leaders.received.clear()
    shared.leaders.mode = "answer"
    shared.leaders.answer = ANSWER
    shared.leaders.group = 1
    return shared


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return eventually


@pytest.fixture
def leaders(tokenizer: Any) -> FakeLeaders:
    return FakeLeaders(tokenizer)


@pytest.fixture
def engine_client(leaders: FakeLeaders) -> Callable[..., EngineClient]:
    return lambda **options: make_client(leaders, **options)


@pytest.fixture(scope="session")
def harness_type() -> type[ApiHarness]:
    return ApiHarness
