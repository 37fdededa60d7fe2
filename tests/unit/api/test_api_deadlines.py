"""One deadline for a request, from its first byte to its last token: what fails says where, and no
failure is a 200, unless tokens were on their way."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from pd.messages import Generate, Output, Outputs

BODY = {"model": "tiny", "prompt": "hello", "temperature": 0, "max_tokens": 50}
STAGES = ["the queue", "prefill", "the handover from prefill-0"]


def error_of(answer: Any) -> dict[str, Any]:
    error: dict[str, Any] = answer.json()["error"]
    return error


def leader_gives_up(api: Any, error: str, delay_s: float) -> None:
    """As leaders do, a bit after the deadline, and before the API does so itself."""
    client = api.client

    def send(replica: str, message: Any) -> None:
        api.leaders.received.append((replica, message))
        if isinstance(message, Generate):
            last = Output(message.request_id, (), (), "error", error)
            loop = asyncio.get_running_loop()
            loop.call_later(delay_s, client.on_message, replica, Outputs((last,)))

    client._send = send


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_leaders_deadline_is_a_504_that_names_the_stage(
    serve: Callable[..., Any], stage: str, stream: bool
) -> None:
    api = serve(timeouts={"request": 1.0})
    leader_gives_up(api, f"timed out in {stage}", 1.005)
    answer = api.post("/v1/completions", {**BODY, "stream": stream})
    assert answer.status_code == 504
    assert error_of(answer)["code"] == "timeout"
    assert error_of(answer)["message"] == f"timed out in {stage}"


def test_a_leaders_other_errors_are_a_500(serve: Callable[..., Any]) -> None:
    api = serve()
    leader_gives_up(api, "no pages", 0.0)
    answer = api.post("/v1/completions", BODY)
    assert (answer.status_code, error_of(answer)["code"]) == (500, "engine_error")


def test_a_stream_that_has_begun_ends_in_an_error_event(serve: Callable[..., Any]) -> None:
    api = serve(timeouts={"request": 0.3})
    api.leaders.mode = "stuck_after_two"
    answer = api.post("/v1/completions", {**BODY, "stream": True})
    assert answer.status_code == 200
    *events, last = [line for line in answer.text.split("\n\n") if line]
    assert len(events) >= 1
    assert "[DONE]" not in answer.text
    error = json.loads(last.removeprefix("event: error\ndata: "))["error"]
    assert error["code"] == "timeout"
    assert "decoding on decode-0, 2 of at most 50 tokens done" in error["message"]
    assert api.post("/v1/completions", BODY).status_code == 504


def test_tokenizing_counts(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    api = serve(timeouts={"request": 0.2})

    async def slow(server: Any, *arguments: Any) -> list[int]:
        await asyncio.sleep(0.25)
        return [1, 2, 3]

    monkeypatch.setattr("pd.api.server._Server._encode", slow)
    answer = api.post("/v1/completions", BODY)
    assert answer.status_code == 504
    assert "while its prompt is tokenized" in error_of(answer)["message"]
    assert api.leaders.received == []


def test_what_is_left_of_the_time_goes_to_the_leader(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    api = serve(timeouts={"request": 30.0})

    async def slow(server: Any, *arguments: Any) -> list[int]:
        await asyncio.sleep(0.2)
        return [1, 2, 3]

    monkeypatch.setattr("pd.api.server._Server._encode", slow)
    assert api.post("/v1/completions", BODY).status_code == 200
    (generate,) = api.leaders.generates()
    assert 20 < generate.timeout_s <= 29.81


def test_a_body_that_does_not_come_is_a_408(serve: Callable[..., Any]) -> None:
    api = serve(timeouts={"request": 0.2})
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"
        connection.sendall(head)
        answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert api.leaders.received == []
