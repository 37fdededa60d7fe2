"""What is not a completion: health, metrics, status, tokens, overload, clients and replicas that
go."""

from __future__ import annotations

import concurrent.futures
import logging
import socket
from typing import Any

import pytest
import requests

from pd.api.chat import PLAIN_TEMPLATE, ChatTemplate

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}
PATHS = ["/v1/chat/completions", "/v1/completions"]


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    if path == "/v1/completions":
        return {"model": "tiny", "prompt": "hello", "max_tokens": 20, **fields}
    return {**CHAT, **fields}


def connect_and_post(api: Any, path: str, body: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", api.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


@pytest.mark.parametrize("fields", ['"stream": true', '"stream": false', '"n": 3'])
@pytest.mark.parametrize("mode", ["silent", "stuck_after_two"])
def test_a_client_that_goes_away_aborts(api: Any, wait_until: Any, fields: str, mode: Any) -> None:
    api.leaders.mode = mode
    body = f'{{"model": "tiny", "prompt": "hello", "temperature": 0, {fields}}}'
    connection = connect_and_post(api, "/v1/completions", body.encode())
    started = 3 if '"n"' in fields and mode == "stuck_after_two" else 1
    wait_until(lambda: len(api.leaders.generates()) == started)
    if mode == "stuck_after_two" and '"stream": true' in fields:
        assert connection.recv(12) == b"HTTP/1.1 200"
    connection.close()
    wait_until(lambda: len(api.leaders.aborted_ids()) == started)
    wait_until(lambda: api.client.router.in_flight == 0)


def test_a_client_that_goes_away_within_its_body(api: Any, wait_until: Any) -> None:
    connection = socket.create_connection(("127.0.0.1", api.port), timeout=10)
    connection.sendall(b'POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"pr')
    connection.close()
    assert api.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_replica_that_goes_away_is_named(
    serve: Any, wait_until: Any, path: str, stream: bool
) -> None:
    api = serve(timeouts={"takeover": 0.05})
    api.leaders.mode = "silent"
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(api.post, path, body_for(path, stream=stream))
        wait_until(api.leaders.generates)
        api.on_loop(lambda: api.client.on_peer_down("decode-0"))
        response = answer.result(10)
    assert response.status_code == 503
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "replica_lost")
    assert "decode-0" in error["message"]
    response = api.post(path, body_for(path, stream=stream))
    assert response.status_code == 503
    assert response.json()["error"]["message"] == "no decode replica is up"
    assert api.get("/health").json()["missing"] == ["decode"]


def test_the_deadline_is_a_504(serve: Any) -> None:
    api = serve(timeouts={"request": 0.05})
    api.leaders.mode = "silent"
    response = api.post("/v1/completions", body_for("/v1/completions"))
    assert response.status_code == 504
    assert "waiting for the first token" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_overload(serve: Any, wait_until: Any, stream: bool) -> None:
    api = serve(max_queue=2)
    api.leaders.mode = "silent"
    body = b'{"model": "tiny", "prompt": "hello", "n": 2}'
    connection = connect_and_post(api, "/v1/completions", body)
    wait_until(api.leaders.generates)
    for path in PATHS:
        response = api.post(path, body_for(path, stream=stream))
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
    assert len(api.leaders.generates()) == 1
    connection.close()
    wait_until(lambda: api.client.router.in_flight == 0)
    api.leaders.mode = "answer"
    assert api.post(PATHS[0], CHAT).status_code == 200


def test_health_says_what_is_missing(serve: Any) -> None:
    api = serve(with_replicas=False)
    response = api.get("/health")
    assert response.status_code == 503
    assert response.json()["status"] == "unavailable"
    assert response.json()["missing"] == ["prefill", "decode"]
    api.on_loop(lambda: api.client.on_peer_up("decode-0", "decode", "test model"))
    assert api.get("/health").json()["missing"] == ["prefill"]
    api.on_loop(lambda: api.client.on_peer_up("prefill-0", "prefill", "test model"))
    response = api.get("/health")
    assert response.status_code == 200
    assert response.json()["roles"]["decode"] == {"up": 1, "min": 1, "max": 1}


def test_status(api: Any) -> None:
    status = api.get("/admin/status").json()
    assert status["model"] == "tiny"
    decode, prefill = status["replicas"]
    assert (decode["name"], decode["role"]) == ("decode-0", "decode")
    assert (decode["waiting"], decode["running"], decode["kv_bytes"]) == (2, 1, 9)
    assert decode["pages"] == [
        {"group": 0, "free": 7, "cached": 2, "used": 1},
        {"group": 1, "free": 3, "cached": 0, "used": 5},
    ]
    assert prefill["role"] == "prefill"


def test_metrics(serve: Any) -> None:
    api = serve()
    assert api.post(PATHS[0], {**CHAT, "temperature": 0, "n": 2}).status_code == 200
    assert api.post(PATHS[0], {}).status_code == 400
    api.leaders.mode = "error"
    assert api.post(PATHS[0], CHAT).status_code == 500
    response = api.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = response.text.splitlines()
    num_prompt = len(api.leaders.generates()[0].prompt) // 4 * 2
    num_answer = len(api.leaders.tokens_for(api.leaders.generates()[0]))
    for line in (
        'pagerelay_requests_total{finish_reason="stop"} 2.0',
        'pagerelay_requests_total{finish_reason="error"} 1.0',
        f"pagerelay_prompt_tokens_total {num_prompt}.0",
        f"pagerelay_generated_tokens_total {num_answer * 2}.0",
        'pagerelay_cached_tokens_total{side="prefill"} 6.0',
        'pagerelay_http_errors_total{code="400"} 1.0',
        'pagerelay_http_errors_total{code="500"} 1.0',
        "pagerelay_time_to_first_token_seconds_count 2.0",
        "pagerelay_time_per_output_token_seconds_count 2.0",
        "pagerelay_request_seconds_count 3.0",
        "pagerelay_requests_in_flight 0.0",
        'pagerelay_waiting_requests{replica="decode-0",role="decode"} 2.0',
        'pagerelay_kv_transfer_bytes_total{replica="decode-0",role="decode"} 9.0',
        'pagerelay_pages{group="1",replica="decode-0",role="decode",state="used"} 5.0',
    ):
        assert line in lines, line
    api.on_loop(lambda: api.client.on_peer_down("decode-0"))
    assert 'replica="decode-0"' not in api.get("/metrics").text


def test_tokens_there_and_back(api: Any) -> None:
    text = "hello <|turn|> 漢字"
    answer = api.post("/tokenize", {"model": "tiny", "prompt": text}).json()
    assert answer["tokens"] == api.tokenizer.encode(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 200)
    back = api.post("/detokenize", {"tokens": answer["tokens"]}).json()
    assert back == {"prompt": text}
    chat = api.post("/tokenize", {"messages": CHAT["messages"]}).json()
    assert api.post("/detokenize", {"tokens": chat["tokens"]}).json()["prompt"] == (
        "<|turn|>user\nhello<|turn|>assistant\n"
    )
    developer = {"role": "developer", "content": [{"type": "text", "text": t} for t in "ab"]}
    chat = api.post("/tokenize", {"messages": [developer]}).json()
    assert api.post("/detokenize", {"tokens": chat["tokens"]}).json()["prompt"] == (
        "<|turn|>system\na\nb<|turn|>assistant\n"
    )
    assert api.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


def test_long_texts_do_not_stop_the_others(api: Any) -> None:
    long = "lorem ipsum dolor " * 20_000
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answer = pool.submit(api.post, "/tokenize", {"prompt": long})
        assert api.get("/health").status_code == 200
        assert answer.result(20).json()["count"] > 20_000


def test_a_stream_as_it_is_sent(api: Any) -> None:
    body = {**CHAT, "stream": True, "temperature": 0}
    with requests.post(api.url + PATHS[0], json=body, stream=True, timeout=10) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert "content-length" not in response.headers
        events = response.content.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    api.leaders.mode = "error_after_two"
    *_, last, empty = api.post(PATHS[0], body).text.split("\n\n")
    assert last.startswith('event: error\ndata: {"error":{"message":')
    assert empty == ""


def test_a_bug_is_a_500_in_the_same_shape(serve: Any, caplog: Any) -> None:
    api = serve()
    api.client.submit_all = None
    with caplog.at_level(logging.CRITICAL, "uvicorn.error"):
        response = api.post(PATHS[0], CHAT)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"


def test_templates(tokenizer: Any, tmp_path: Any, caplog: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0].content }}!")
    own = ChatTemplate(tokenizer, str(path)).encode(messages)
    assert tokenizer.decode(own) == "hi!"

    class Base:
        """A tokenizer without a template."""

        chat_template = None
        encode = staticmethod(tokenizer.encode)
        apply_chat_template = staticmethod(tokenizer.apply_chat_template)

    plain: Any = Base()
    assert tokenizer.decode(ChatTemplate(plain).encode(messages)) == "user: hi\nassistant:"
    assert "no chat template" in caplog.text
    assert "assistant:" in PLAIN_TEMPLATE
