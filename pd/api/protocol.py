"""Requests of OpenAI's API: what is accepted, with what defaults, and why the rest is refused.

Reading a request changes nothing and touches no tokenizer. Every refusal is an `ApiError` that
names the field and the value. Three kinds of fields beyond the models below: those that do not
change the answer are ignored; known ones that would (tools, response_format, ...) are refused
unless they ask for the default; unknown ones are refused, so that a misspelt parameter is not taken
for one that works. Fields that are null count as absent.
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import pydantic
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pd.api.errors import ApiError, bad_request
from pd.messages import SamplingParams
from pd.spec import TENANT_FORM, TENANT_PATTERN, ApiSpec, RouterSpec

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions; a chat may use what is left of the context."""
TENANT_HEADER = "X-Tenant-Id"
PRIORITY_HEADER = "X-Priority"
_MAX_STOPS = 16
_MAX_STOP_LENGTH = 1000
_MAX_LISTED_BIAS = 1024

_COLDEST = 1e-4
"""A temperature below is greedy, which it would be anyway but for overflows."""


@dataclass
class ModelInfo:
    """What requests are checked against."""

    name: str
    vocab_size: int
    max_context: int
    """Prompt and output tokens of one request; changes with the replicas."""
    eos_token_ids: tuple[int, ...] = ()


# --------------------------------------------------------------------------------- request models


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _integer_keys(value: Any) -> Any:
    """JSON's keys are strings; those that are no integers are left for the type check to refuse."""
    if not isinstance(value, dict):
        return value
    return {int(key) if _is_integer(key) else key: bias for key, bias in value.items()}


def _is_integer(key: Any) -> bool:
    return isinstance(key, str) and key.isascii() and key.removeprefix("-").isdigit()


class RequestModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(RequestModel):
    include_usage: bool = False
    include_obfuscation: bool = False
    """Ignored."""


TokenIds = list[int]
Penalty = Annotated[float, Field(ge=-2, le=2)]
StopString = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LENGTH)]


class GenerationRequest(RequestModel):
    """What completions and chats have in common."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=-1, lt=2**31)
    min_p: float = Field(default=0.0, ge=0, le=1)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(default=1.0, gt=0, le=10)
    logit_bias: Annotated[
        dict[int, Annotated[float, Field(ge=-100, le=100)]],
        BeforeValidator(_integer_keys),
        Field(max_length=_MAX_LISTED_BIAS),
    ] = {}
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[
        list[StopString], BeforeValidator(_one_or_many), Field(max_length=_MAX_STOPS)
    ] = []
    stop_token_ids: TokenIds = []
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0)
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    priority: str = ""
    """The request's class; empty: its header says it."""
    return_timings: bool = False
    return_token_ids: bool = False
    """Each choice or chunk has `token_ids`: the tokens that it adds, a stop token included."""

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def asked_max_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def num_logprobs(self) -> int | None:
        """None: no logprobs; k: those of the k most likely tokens beside the chosen one's."""
        raise NotImplementedError


class CompletionRequest(GenerationRequest):
    prompt: Any
    """A string, token ids, or a list of either; see `prompts`."""
    logprobs: int | None = Field(default=None, ge=0)

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str] | list[TokenIds]:
        """Each prompt as text or as token ids. Raises ApiError."""
        value = self.prompt
        if isinstance(value, str) or (isinstance(value, list) and value and _is_token_id(value[0])):
            value = [value]
        if not isinstance(value, list) or not value:
            raise bad_request(
                "prompt: expected a string, a list of token ids, or a list of either, "
                f"got {_show(value)}",
                "prompt",
            )
        if all(isinstance(prompt, str) for prompt in value):
            return value
        for prompt in value:
            if not isinstance(prompt, list):
                raise bad_request(
                    f"prompt: expected strings only or token ids only, got {_show(prompt)}",
                    "prompt",
                )
            for token_id in prompt:
                if not _is_token_id(token_id):
                    raise bad_request(
                        f"prompt: expected token ids, got {_show(token_id)}", "prompt"
                    )
        return value


class TextPart(RequestModel):
    type: Literal["text"]
    text: str


class ChatMessage(RequestModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        """Parts are joined by line breaks."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    messages: list[ChatMessage] = Field(min_length=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0)

    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class TokenizeRequest(RequestModel):
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(default=None, min_length=1)
    add_special_tokens: bool = True
    """Of a prompt; a chat's template brings its own."""


class DetokenizeRequest(RequestModel):
    model: str | None = None
    tokens: TokenIds


class ReloadRequest(RequestModel):
    spec: dict[str, Any]


class DrainRequest(RequestModel):
    replica: str


class ClearRequest(RequestModel):
    tenant: str = ""
    """Empty: all."""


class AttachRequest(RequestModel):
    backend: str = Field(min_length=1)
    options: dict[str, str] = {}


# ----------------------------------------------------------------- fields beyond the models above

_IGNORED = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "prediction",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    ]
)
"""They do not change the answer."""

_DEFAULTS_OF_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
    "best_of": (1,),
    "suffix": ("",),
    "echo": (False,),
}
"""Known, not supported; these values ask for nothing."""

_EMPTY_IN_MESSAGE = frozenset(["refusal", "annotations", "audio", "function_call", "tool_calls"])
"""Clients send an answer's message back as it came; refused only where they hold something."""

Request = TypeVar("Request", bound=RequestModel)


def parse_json(body: bytes) -> dict[str, Any]:
    """The request's fields without those that are null. Raises ApiError."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise bad_request(
            f"the body is not valid: expected a JSON object, got {_show(fields)}",
            code="invalid_json",
        )
    return {key: value for key, value in fields.items() if value is not None}


def parse_request(body: bytes, model: type[Request]) -> Request:
    """Raises ApiError naming the first field at fault."""
    fields = _without_ignored(parse_json(body), model)
    try:
        return model.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _explain(error, model) from error


def parse_tenant(values: Sequence[str], of_key: str) -> str:
    """Whose request it is, from all headers of that name and the tenant of the request's API key
    (empty: it has none). Empty: nobody's. Raises ApiError."""
    given = ", ".join(values)
    if given and not re.fullmatch(TENANT_PATTERN, given):
        raise bad_request(
            f"{TENANT_HEADER}: expected {TENANT_FORM}, got {_show(given)}", TENANT_HEADER
        )
    if given and of_key and given != of_key:
        raise ApiError(
            403,
            f"{TENANT_HEADER}: expected none, or {of_key!r} with this API key, got {_show(given)}",
            code="invalid_tenant",
            param=TENANT_HEADER,
        )
    return of_key or given


def parse_priority(values: Sequence[str], in_body: str, spec: RouterSpec) -> int:
    """Of which class it is, 0 the first, from all headers of that name and the body's field. Raises
    ApiError."""
    names, given = list(spec.priorities), ", ".join(values)
    param, name = ("priority", in_body) if in_body else (PRIORITY_HEADER, given)
    if in_body and given and given != in_body:
        raise bad_request(
            f"priority: expected that of {PRIORITY_HEADER}, {_show(given)}, got {_show(in_body)}",
            param,
        )
    name = name or spec.default_priority
    if not name:
        return 0
    if name not in names:
        known = f"one of {', '.join(names)}" if names else "none, for the server has no classes"
        raise bad_request(f"{param}: expected {known}, got {_show(name)}", param)
    return names.index(name)


def _without_ignored(fields: dict[str, Any], model: type[RequestModel]) -> dict[str, Any]:
    kept = {}
    for key, value in fields.items():
        if key in model.model_fields:
            kept[key] = value
        elif key in _DEFAULTS_OF_UNSUPPORTED:
            # best_of: n candidates of which n are returned.
            neutral = [
                *_DEFAULTS_OF_UNSUPPORTED[key],
                *([fields.get("n")] if key == "best_of" else []),
            ]
            if not any(value == other and type(value) is type(other) for other in neutral):
                raise bad_request(
                    f"{key}: not supported by this server, got {_show(value)}",
                    key,
                    "unsupported_parameter",
                )
        elif key not in _IGNORED:
            near = difflib.get_close_matches(key, model.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise bad_request(f"{key}: unknown parameter{hint}", key, "unknown_parameter")
    messages = kept.get("messages")
    if isinstance(messages, list):
        kept["messages"] = [_without_empty(message) for message in messages]
    return kept


def _without_empty(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    return {
        key: value
        for key, value in message.items()
        if not (key in _EMPTY_IN_MESSAGE and value in (None, [], {}, ""))
    }


def _explain(error: pydantic.ValidationError, model: type[RequestModel]) -> ApiError:
    """The first error; of a union's, the one that got furthest into the value."""
    errors = error.errors(include_url=False, include_context=False)
    first = errors[0]["loc"][0]
    detail = max((e for e in errors if e["loc"][0] == first), key=lambda e: len(_path(e["loc"])))
    param = _path(detail["loc"])
    if detail["type"] == "missing":
        return bad_request(f"{param}: missing", param, "missing_required_parameter")
    if detail["type"] == "extra_forbidden":
        return bad_request(f"{param}: unknown parameter", param, "unknown_parameter")
    message = detail["msg"].replace("Input should be ", "expected ")
    code = "invalid_type" if detail["type"].endswith("_type") else "invalid_value"
    return bad_request(f"{param}: {message}, got {_show(detail['input'])}", param, code)


def _path(location: tuple[int | str, ...]) -> str:
    """messages[0].content; without the names that pydantic gives to a union's branches."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool"):
            path += f".{part}" if path else part
    return path


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------- checks that need more than a field


def check_limits(request: GenerationRequest, spec: ApiSpec, model: ModelInfo) -> None:
    """What can be said before the prompt is tokenized. Raises ApiError."""
    check_model(request.model, model)
    if request.n > spec.max_n:
        raise bad_request(f"n: expected at most {spec.max_n}, got {request.n}", "n")
    _check_logprobs(request, spec)
    _check_token_ids("stop_token_ids", request.stop_token_ids, model)
    _check_token_ids("logit_bias", list(request.logit_bias), model)
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options: expected only with stream", "stream_options")
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise bad_request(
            f"max_completion_tokens: {request.max_completion_tokens} and max_tokens "
            f"{request.max_tokens} differ; expected one of them",
            "max_completion_tokens",
        )
    max_tokens = request.asked_max_tokens()
    if max_tokens is not None and request.min_tokens > max_tokens:
        raise bad_request(
            f"min_tokens: expected at most max_tokens, {max_tokens}, got {request.min_tokens}",
            "min_tokens",
        )


def check_model(name: str, model: ModelInfo) -> None:
    if name != model.name:
        raise ApiError(
            404,
            f"the model {_show(name)} does not exist; this server serves {model.name!r}",
            code="model_not_found",
            param="model",
        )


def _check_logprobs(request: GenerationRequest, spec: ApiSpec) -> None:
    param = "logprobs" if isinstance(request, CompletionRequest) else "top_logprobs"
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise bad_request("top_logprobs: expected only with logprobs true", param)
    num = request.num_logprobs()
    if num is not None and num > spec.max_logprobs:
        raise bad_request(f"{param}: expected at most {spec.max_logprobs}, got {num}", param)


def _check_token_ids(param: str, token_ids: Sequence[int], model: ModelInfo) -> None:
    if not token_ids:
        return
    for token_id in (min(token_ids), max(token_ids)):
        if not 0 <= token_id < model.vocab_size:
            raise bad_request(
                f"{param}: token id {token_id} is not in the vocabulary of {model.vocab_size}",
                param,
            )


def check_prompt_tokens(param: str, prompt: Sequence[int], model: ModelInfo) -> None:
    if not prompt:
        raise bad_request(f"{param}: expected at least one token, got none", param)
    _check_token_ids(param, prompt, model)


def plan_max_tokens(request: GenerationRequest, num_prompt_tokens: int, model: ModelInfo) -> int:
    """Output tokens that the request may have. Raises ApiError where they do not fit."""
    room = model.max_context - num_prompt_tokens
    asked = request.asked_max_tokens()
    if asked is not None and asked > room:
        param = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
        raise bad_request(
            f"the model's maximum context is {model.max_context} tokens, but the prompt has "
            f"{num_prompt_tokens} and {param} asks for {asked} more",
            param if room > 0 else _prompt_param(request),
            "context_length_exceeded",
        )
    if room < max(request.min_tokens, 1):
        raise bad_request(
            f"the model's maximum context is {model.max_context} tokens, but the prompt has "
            f"{num_prompt_tokens} and the answer needs at least {max(request.min_tokens, 1)}",
            _prompt_param(request),
            "context_length_exceeded",
        )
    if asked is not None:
        return asked
    if isinstance(request, CompletionRequest):
        return min(room, max(COMPLETION_MAX_TOKENS, request.min_tokens))
    return room


def _prompt_param(request: GenerationRequest) -> str:
    return "prompt" if isinstance(request, CompletionRequest) else "messages"


def plan_sampling(request: GenerationRequest, max_tokens: int, model: ModelInfo) -> SamplingParams:
    """Draws a seed where the request has none."""
    stop_token_ids = {*request.stop_token_ids}
    if not request.ignore_eos:
        stop_token_ids |= {*model.eos_token_ids}
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=request.temperature if request.temperature >= _COLDEST else 0.0,
        top_k=max(request.top_k, 0),
        top_p=request.top_p,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=request.logit_bias,
        seed=secrets.randbits(64) if request.seed is None else request.seed % 2**64,
        stop_token_ids=tuple(sorted(stop_token_ids)),
        min_tokens=request.min_tokens,
        logprobs=request.num_logprobs(),
    )
