"""One HTTP request's choices: from its engine streams to the objects of OpenAI's API.

A `Generation` owns its streams: `close` ends whatever has not ended, once, and observes every
choice. Nothing here knows HTTP but the status that an `ApiError` carries.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pd.api.client import Failure, OutputStream, merge
from pd.api.errors import ApiError
from pd.api.metrics import ApiMetrics
from pd.api.protocol import ChatRequest, GenerationRequest, ModelInfo
from pd.api.text import ChoiceText, LogprobEntry, TextDelta, Vocabulary
from pd.messages import FinishReason, Output

_STATUS = {Failure.ENGINE: 500, Failure.REPLICA_LOST: 503, Failure.TIMEOUT: 504}
_LEAST_LOGPROB = -9999.0
"""JSON has no infinity; OpenAI writes this."""


class ClientGone(Exception):
    """The client closed the connection; nobody reads the answer."""


@dataclass(slots=True)
class Choice:
    index: int
    stream: OutputStream
    text: ChoiceText
    num_prompt_tokens: int
    is_first_of_prompt: bool
    has_begun: bool = False
    parts: list[str] = field(default_factory=list)
    entries: list[LogprobEntry] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    """Counted and not sent yet; of an answer that does not stream, all."""
    finish_reason: FinishReason | None = None


class Generation:
    def __init__(
        self,
        request: GenerationRequest,
        choices: list[Choice],
        *,
        vocabulary: Vocabulary,
        model: ModelInfo,
        metrics: ApiMetrics,
        arrived_s: float,
    ) -> None:
        """`arrived_s`: the event loop's time when the HTTP request came."""
        self.request = request
        self.choices = choices
        self.is_client_gone = False
        self._vocabulary = vocabulary
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._is_chat = isinstance(request, ChatRequest)
        self._is_closed = False
        # The public id is for the client only; the engine's requests have their own.
        public_id = (
            f"{'chatcmpl' if self._is_chat else 'cmpl'}-{choices[0].stream.generate.request_id}"
        )
        name = "chat.completion" if self._is_chat else "text_completion"
        self._head = {
            "id": public_id,
            "object": name,
            "created": int(time.time()),
            "model": model.name,
        }
        self._chunk_head = self._head | ({"object": f"{name}.chunk"} if self._is_chat else {})

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for choice in self.choices:
            choice.stream.close()
            self._observe(choice)

    def on_client_gone(self) -> None:
        """End all streams at once; who reads them gets ClientGone."""
        self.is_client_gone = True
        for choice in self.choices:
            choice.stream.close()

    # ------------------------------------------------------------------------------------- answers

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events up to [DONE]. Raises ApiError where a choice fails, ClientGone."""
        async for choice, delta in self._deltas():
            has_ids = self.request.return_token_ids and choice.token_ids
            has_news = delta.text or delta.logprobs or delta.finish_reason or has_ids
            if has_news or not choice.has_begun:
                yield _event(self._chunk(choice, delta))
        if self.request.include_usage:
            yield _event({**self._chunk_head, "choices": [], "usage": self._usage()})
        yield b"data: [DONE]\n\n"

    async def whole(self) -> bytes:
        """The answer of a request that does not stream, as JSON. Raises ApiError, ClientGone."""
        async for choice, delta in self._deltas():
            choice.parts.append(delta.text)
            choice.entries += delta.logprobs
        choices = [self._choice(choice) for choice in self.choices]
        answer = {**self._head, "choices": choices, "usage": self._usage()}
        if self.request.return_timings:
            answer["timings"] = self._timings(self.choices[0])
        return msgspec.json.encode(answer)

    async def _deltas(self) -> AsyncIterator[tuple[Choice, TextDelta]]:
        async for index, output in merge([choice.stream for choice in self.choices]):
            choice = self.choices[index]
            if choice.finish_reason is not None:
                continue  # a stop string has ended it; this is the end of the closed stream
            if output.finish_reason in ("error", "abort"):
                raise self._failure(choice, output)
            num_before = choice.text.num_tokens
            delta = choice.text.push(output)
            choice.token_ids += output.token_ids[: choice.text.num_tokens - num_before]
            if delta.finish_reason is not None:
                choice.finish_reason = delta.finish_reason
                choice.stream.close()
            yield choice, delta

    def _failure(self, choice: Choice, output: Output) -> Exception:
        if self.is_client_gone:
            return ClientGone()
        failure = choice.stream.failure or Failure.ENGINE
        message = output.error or "the request was aborted by its replica"
        return ApiError(_STATUS[failure], message, code=failure.value)

    def _chunk(self, choice: Choice, delta: TextDelta) -> dict[str, Any]:
        part: dict[str, Any] = {"index": choice.index}
        if self._is_chat:
            message = {"content": delta.text} if delta.text or not choice.has_begun else {}
            part["delta"] = message if choice.has_begun else {"role": "assistant", **message}
        else:
            part["text"] = delta.text
        choice.has_begun = True
        part["logprobs"] = self._logprobs(delta.logprobs) if delta.logprobs else None
        part["finish_reason"] = delta.finish_reason
        if self.request.return_token_ids:
            part["token_ids"], choice.token_ids = choice.token_ids, []
        chunk = {**self._chunk_head, "choices": [part]}
        if self.request.include_usage:
            chunk["usage"] = None
        if self.request.return_timings and delta.finish_reason is not None:
            chunk["timings"] = self._timings(choice)
        return chunk

    def _choice(self, choice: Choice) -> dict[str, Any]:
        text = "".join(choice.parts)
        content: dict[str, Any] = (
            {"message": {"role": "assistant", "content": text, "refusal": None}}
            if self._is_chat
            else {"text": text}
        )
        wanted = self.request.num_logprobs() is not None
        return {
            "index": choice.index,
            **content,
            "logprobs": self._logprobs(choice.entries) if wanted else None,
            "finish_reason": choice.finish_reason,
            **({"token_ids": choice.token_ids} if self.request.return_token_ids else {}),
        }

    def _logprobs(self, entries: list[LogprobEntry]) -> dict[str, Any]:
        render = render_chat_logprobs if self._is_chat else render_completion_logprobs
        return render(self._vocabulary, entries)

    def _usage(self) -> dict[str, Any]:
        """A prompt counts once, however many choices it has, and so do its cached tokens."""
        first = [choice for choice in self.choices if choice.is_first_of_prompt]
        num_prompt = sum(choice.num_prompt_tokens for choice in first)
        num_completion = sum(choice.text.num_tokens for choice in self.choices)
        known = [choice.stream.stats for choice in first if choice.stream.stats is not None]
        tiers = [stats.cached_by_tier() for stats in known]
        num_cached = sum(sum(tokens.values()) for tokens in tiers)
        details = {
            "cached_tokens": min(num_cached, num_prompt),
            "host_tokens": min(sum(tokens["host"] for tokens in tiers), num_prompt),
            "storage_tokens": min(sum(tokens["storage"] for tokens in tiers), num_prompt),
        }
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": details if known else None,
        }

    def _timings(self, choice: Choice) -> dict[str, Any]:
        """Seconds, pages and bytes; what the replicas measured is missing where they sent no
        statistics."""
        stream = choice.stream
        timings: dict[str, Any] = {
            "tokenize_s": stream.submitted_s - self._arrived_s,
            "ttft_s": self._ttft_s(stream),
            "total_s": self._total_s(stream),
        }
        return timings | (msgspec.structs.asdict(stream.stats) if stream.stats else {})

    def _ttft_s(self, stream: OutputStream) -> float | None:
        return None if stream.first_token_s is None else stream.first_token_s - self._arrived_s

    def _total_s(self, stream: OutputStream) -> float:
        ended_s = stream.ended_s
        return (asyncio.get_running_loop().time() if ended_s is None else ended_s) - self._arrived_s

    def _observe(self, choice: Choice) -> None:
        stream = choice.stream
        self._metrics.observe_request(
            choice.finish_reason or ("error" if stream.failure else "abort"),
            num_prompt_tokens=choice.num_prompt_tokens if choice.is_first_of_prompt else 0,
            num_tokens=choice.text.num_tokens,
            ttft_s=self._ttft_s(stream),
            total_s=self._total_s(stream),
            stats=stream.stats,
        )


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def error_event(error: ApiError) -> bytes:
    return b"event: error\n" + _event(error.body())


# --------------------------------------------------------------------------------------- logprobs


def _limit(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def render_completion_logprobs(
    vocabulary: Vocabulary, entries: list[LogprobEntry]
) -> dict[str, Any]:
    """Offsets count from the start of the choice's text; the chosen token is always among the top
    ones."""
    top_logprobs = []
    for entry in entries:
        top: dict[str, float] = {}
        # Of different tokens with one text the likeliest stays.
        for token_id, logprob in _top(entry):
            top.setdefault(vocabulary.piece(token_id)[0], _limit(logprob))
        top.setdefault(vocabulary.piece(entry.token_id)[0], _limit(entry.logprob.logprob))
        top_logprobs.append(top)
    return {
        "tokens": [vocabulary.piece(entry.token_id)[0] for entry in entries],
        "token_logprobs": [_limit(entry.logprob.logprob) for entry in entries],
        "top_logprobs": top_logprobs,
        "text_offset": [entry.text_offset for entry in entries],
    }


def render_chat_logprobs(vocabulary: Vocabulary, entries: list[LogprobEntry]) -> dict[str, Any]:
    def render(token_id: int, logprob: float) -> dict[str, Any]:
        text, data = vocabulary.piece(token_id)
        return {"token": text, "logprob": _limit(logprob), "bytes": list(data)}

    return {
        "content": [
            render(entry.token_id, entry.logprob.logprob)
            | {"top_logprobs": [render(*pair) for pair in _top(entry)]}
            for entry in entries
        ]
    }


def _top(entry: LogprobEntry) -> Iterator[tuple[int, float]]:
    return zip(entry.logprob.top_ids, entry.logprob.top_logprobs, strict=True)
