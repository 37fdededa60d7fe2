"""What cannot be served is refused with its reason, and no replica hears of it."""

from __future__ import annotations

from typing import Any

import pytest
import requests

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "hello"}]


def completion(**fields: Any) -> tuple[str, Any]:
    return COMPLETIONS, {"model": "tiny", "prompt": "hello", **fields}


def chat(**fields: Any) -> tuple[str, Any]:
    return CHAT, {"model": "tiny", "messages": USER, **fields}


BAD = [
    # (what is sent, status, param, code, part of the message)
    ((COMPLETIONS, b'{"model": "tiny",'), 400, None, "invalid_json", "not valid JSON"),
    ((COMPLETIONS, b""), 400, None, "invalid_json", "not valid JSON"),
    ((COMPLETIONS, b"[1, 2]"), 400, None, "invalid_json", "expected a JSON object"),
    ((COMPLETIONS, b'{"model": "\xff"}'), 400, None, "invalid_json", "utf-8"),
    ((COMPLETIONS, b"[" * 100_000), 400, None, "invalid_json", "recursion"),
    (
        (COMPLETIONS, b'{"model": "tiny", "prompt": "x", "temperature": NaN}'),
        400,
        None,
        "invalid_json",
        "not valid JSON",
    ),
    (
        (COMPLETIONS, b'{"model": "tiny", "prompt": "\\ud800"}'),
        400,
        None,
        "invalid_json",
        "not valid JSON",
    ),
    ((COMPLETIONS, {"prompt": "x"}), 400, "model", "missing_required_parameter", "missing"),
    ((COMPLETIONS, {"model": "tiny"}), 400, "prompt", "missing_required_parameter", "missing"),
    ((CHAT, {"model": "tiny"}), 400, "messages", "missing_required_parameter", "missing"),
    (completion(model="other"), 404, "model", "model_not_found", "this server serves 'tiny'"),
    (completion(model=5), 400, "model", "invalid_type", "valid string"),
    (completion(prompt=""), 400, "prompt", "invalid_value", "at least one token"),
    (completion(prompt=[]), 400, "prompt", "invalid_value", "got []"),
    (completion(prompt=[[]]), 400, "prompt", "invalid_value", "at least one token"),
    (completion(prompt={"a": 1}), 400, "prompt", "invalid_value", "expected a string"),
    (completion(prompt=["a", 1]), 400, "prompt", "invalid_value", "strings only"),
    (completion(prompt=[1, "a"]), 400, "prompt", "invalid_value", "got 'a'"),
    (completion(prompt=[[1], [True]]), 400, "prompt", "invalid_value", "got True"),
    (completion(prompt=[1, 99_999]), 400, "prompt", "invalid_value", "99999 is not in the vocab"),
    (completion(prompt=[-1]), 400, "prompt", "invalid_value", "-1 is not in the vocabulary"),
    (completion(max_tokens=0), 400, "max_tokens", "invalid_value", "greater than or equal to 1"),
    (completion(max_tokens="5"), 400, "max_tokens", "invalid_type", "valid integer, got '5'"),
    (completion(max_tokens=1.5), 400, "max_tokens", "invalid_type", "valid integer, got 1.5"),
    (completion(max_tokens=True), 400, "max_tokens", "invalid_type", "got True"),
    (
        completion(prompt=[1] * 190, max_tokens=11),
        400,
        "max_tokens",
        "context_length_exceeded",
        "maximum context is 200 tokens, but the prompt has 190 and max_tokens asks for 11",
    ),
    (
        completion(prompt=[1] * 200),
        400,
        "prompt",
        "context_length_exceeded",
        "maximum context is 200 tokens, but the prompt has 200",
    ),
    (
        chat(messages=[{"role": "user", "content": "a b " * 200}]),
        400,
        "messages",
        "context_length_exceeded",
        "maximum context is 200",
    ),
    (
        chat(max_tokens=3, max_completion_tokens=4),
        400,
        "max_completion_tokens",
        "invalid_value",
        "differ",
    ),
    (completion(temperature=2.5), 400, "temperature", "invalid_value", "less than or equal to 2"),
    (completion(temperature=-0.1), 400, "temperature", "invalid_value", "greater than"),
    (completion(temperature="hot"), 400, "temperature", "invalid_type", "got 'hot'"),
    (completion(top_p=0), 400, "top_p", "invalid_value", "greater than 0"),
    (completion(top_p=1.1), 400, "top_p", "invalid_value", "less than or equal to 1"),
    (completion(top_k=-2), 400, "top_k", "invalid_value", "greater than or equal to -1"),
    (completion(min_p=1.5), 400, "min_p", "invalid_value", "less than or equal to 1"),
    (completion(presence_penalty=3), 400, "presence_penalty", "invalid_value", "equal to 2"),
    (completion(frequency_penalty=-3), 400, "frequency_penalty", "invalid_value", "equal to -2"),
    (completion(repetition_penalty=0), 400, "repetition_penalty", "invalid_value", "than 0"),
    (completion(logit_bias={"5": 200}), 400, "logit_bias[5]", "invalid_value", "equal to 100"),
    (completion(logit_bias={"99999": 1}), 400, "logit_bias", "invalid_value", "not in the vocab"),
    (completion(logit_bias={"the": 1}), 400, "logit_bias.the", "invalid_type", "valid integer"),
    (completion(logit_bias=[1]), 400, "logit_bias", "invalid_type", "valid dictionary"),
    (completion(seed=2**63), 400, "seed", "invalid_value", "less than or equal to"),
    (completion(seed="x"), 400, "seed", "invalid_type", "valid integer"),
    (completion(stop=["a"] * 17), 400, "stop", "invalid_value", "at most 16"),
    (completion(stop=[""]), 400, "stop[0]", "invalid_value", "at least 1 character"),
    (completion(stop=5), 400, "stop", "invalid_type", "valid list"),
    (completion(stop_token_ids=[99_999]), 400, "stop_token_ids", "invalid_value", "99999"),
    (completion(n=0), 400, "n", "invalid_value", "greater than or equal to 1"),
    (completion(n=17), 400, "n", "invalid_value", "at most 16"),
    (completion(prompt=["a"] * 65), 400, "prompt", "invalid_value", "at most 64"),
    (completion(logprobs=21), 400, "logprobs", "invalid_value", "at most 20"),
    (completion(logprobs=True), 400, "logprobs", "invalid_type", "valid integer"),
    (chat(logprobs=5), 400, "logprobs", "invalid_type", "valid boolean"),
    (chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "invalid_value", "at most 20"),
    (chat(top_logprobs=2), 400, "top_logprobs", "invalid_value", "only with logprobs"),
    (completion(stream="yes"), 400, "stream", "invalid_type", "valid boolean"),
    (
        completion(stream_options={"include_usage": True}),
        400,
        "stream_options",
        "invalid_value",
        "only with stream",
    ),
    (
        completion(stream=True, stream_options={"usage": True}),
        400,
        "stream_options.usage",
        "unknown_parameter",
        "unknown parameter",
    ),
    (completion(min_tokens=9, max_tokens=5), 400, "min_tokens", "invalid_value", "at most max_t"),
    (completion(cache_salt=5), 400, "cache_salt", "invalid_type", "valid string"),
    (completion(echo=True), 400, "echo", "unsupported_parameter", "not supported"),
    (completion(best_of=3), 400, "best_of", "unsupported_parameter", "not supported"),
    (completion(suffix="x"), 400, "suffix", "unsupported_parameter", "not supported"),
    (completion(temprature=1), 400, "temprature", "unknown_parameter", "did you mean temperature"),
    (completion(messages=USER), 400, "messages", "unknown_parameter", "unknown parameter"),
    (chat(tools=[{"type": "function"}]), 400, "tools", "unsupported_parameter", "not supported"),
    (
        chat(response_format={"type": "json_object"}),
        400,
        "response_format",
        "unsupported_parameter",
        "json_object",
    ),
    (chat(modalities=["audio"]), 400, "modalities", "unsupported_parameter", "audio"),
    (chat(messages=[]), 400, "messages", "invalid_value", "at least 1 item"),
    (chat(messages="hi"), 400, "messages", "invalid_type", "valid list"),
    (chat(messages=[5]), 400, "messages[0]", "invalid_type", "got 5"),
    (
        chat(messages=[*USER, {"role": "tool", "content": "x"}]),
        400,
        "messages[1].role",
        "invalid_value",
        "'assistant', got 'tool'",
    ),
    (
        chat(messages=[{"role": "user", "content": None}]),
        400,
        "messages[0].content",
        "invalid_type",
        "valid string",
    ),
    (
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]),
        400,
        "messages[0].content[0].type",
        "invalid_value",
        "'text', got 'image_url'",
    ),
    (
        chat(messages=[{"role": "user", "content": "x", "tool_calls": [1]}]),
        400,
        "messages[0].tool_calls",
        "unknown_parameter",
        "unknown",
    ),
    (
        chat(messages=[*USER, {"role": "system", "content": "x"}]),
        400,
        "messages",
        "invalid_value",
        "the system message comes first",
    ),
    (("/tokenize", {"prompt": "a", "messages": USER}), 400, "prompt", "invalid_value", "either"),
    (("/tokenize", {"prompt": 5}), 400, "prompt", "invalid_type", "valid string"),
    (("/detokenize", {"tokens": [99_999]}), 400, "tokens", "invalid_value", "99999"),
    (("/v1/embeddings", {}), 404, None, "not_found", "there is no /v1/embeddings"),
    (("/v1/completions/", {}), 404, None, "not_found", "there is no"),
    (("/health", {}), 405, None, "method_not_allowed", "does not take POST"),
]


def streamed(case: Any) -> Any:
    """The same request, streamed; None where that means something else."""
    (path, body), *expected = case
    if path not in (COMPLETIONS, CHAT) or not isinstance(body, dict):
        return None
    if "stream" in body or "stream_options" in body:
        return None
    return ((path, {**body, "stream": True}), *expected)


@pytest.mark.parametrize(
    ("request_", "status", "param", "code", "fragment"),
    BAD + [other for other in map(streamed, BAD) if other],
)
def test_bad_requests(
    api: Any, request_: tuple[str, Any], status: int, param: str, code: str, fragment: str
) -> None:
    path, body = request_
    response = api.post(path, body)
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert fragment in error["message"]
    if param and code != "context_length_exceeded":
        assert param.split(".")[0].split("[")[0] in error["message"]
    assert api.leaders.received == []
    assert api.client.router.in_flight == 0


NEUTRAL = [
    completion(user="me", suffix=None, best_of=1, echo=False, temperature=None, top_k=-1),
    completion(best_of=2, n=2),
    completion(logit_bias={"5": 1, "6": -100.0}, seed=-1, stop=["a", "b"]),
    chat(tools=[], tool_choice="none", response_format={"type": "text"}, modalities=["text"]),
    chat(metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True),
    chat(
        messages=[
            *USER,
            {
                "role": "assistant",
                "content": "x",
                "refusal": None,
                "tool_calls": None,
                "annotations": [],
            },
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
        ]
    ),
]


@pytest.mark.parametrize(("path", "body"), NEUTRAL)
def test_what_changes_nothing_is_accepted(api: Any, path: str, body: Any) -> None:
    assert api.post(path, body).status_code == 200


def test_a_body_over_the_limit_is_refused_announced_or_not(serve: Any) -> None:
    api = serve(api={"max_body": 2000})
    body = b'{"model": "tiny", "prompt": "' + b"x" * 5000 + b'"}'
    parts = (body[i : i + 500] for i in range(0, len(body), 500))
    for data in (body, parts):
        response = requests.post(api.url + COMPLETIONS, data=data, timeout=10)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
    assert api.leaders.received == []


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer ", 401),
        ("Basic second", 401),
        ("Bearer sécond", 401),
        ("Bearer second", 200),
        ("bearer first", 200),
    ],
)
def test_keys(keyed: Any, header: str | None, status: int) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    for path in ("/v1/models", "/admin/status"):
        response = keyed.get(path, headers=headers)
        assert response.status_code == status
        if status == 401:
            error = response.json()["error"]
            assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize", "/nowhere"):
        wrong = keyed.post(path, {}, headers=headers).status_code
        assert (wrong == 401) == (status == 401)
    for path in ("/health", "/metrics"):
        assert keyed.get(path, headers=headers).status_code == 200


@pytest.fixture(scope="module")
def keyed(tokenizer: Any, harness_type: Any) -> Any:
    harness = harness_type(
        tokenizer, max_queue=64, with_replicas=True, api={"keys": ["first", "second"]}
    )
    yield harness
    harness.close()
