"""Of which class a request is, and which are refused when there is too much to do."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from pd.api.errors import ApiError
from pd.api.protocol import parse_priority
from pd.messages import Heartbeat, ReplicaLoad
from pd.spec import RouterSpec

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
COMPLETION = {"model": "tiny", "prompt": ["a b", "c d"], "n": 2, "max_tokens": 2}
CLASSES: dict[str, Any] = {"interactive": {}, "batch": {"slack": 10.0}, "night": {"slack": None}}
SPEC = RouterSpec.model_validate({"priorities": CLASSES, "default_priority": "batch"})


@pytest.mark.parametrize(
    ("values", "in_body", "expected"),
    [
        ([], "", 1),
        ([""], "", 1),
        (["interactive"], "", 0),
        ([], "night", 2),
        (["night"], "night", 2),
    ],
)
def test_a_class_is_read(values: list[str], in_body: str, expected: int) -> None:
    assert parse_priority(values, in_body, SPEC) == expected
    assert parse_priority([], "", RouterSpec()) == 0


@pytest.mark.parametrize(
    ("values", "in_body", "param", "message"),
    [
        (["urgent"], "", "X-Priority", "one of interactive, batch, night, got 'urgent'"),
        (["night", "batch"], "", "X-Priority", "got 'night, batch'"),
        ([], "0", "priority", "one of interactive, batch, night, got '0'"),
        (["night"], "batch", "priority", "that of X-Priority, 'night', got 'batch'"),
    ],
)
def test_what_is_no_class_is_refused(
    values: list[str], in_body: str, param: str, message: str
) -> None:
    with pytest.raises(ApiError) as refused:
        parse_priority(values, in_body, SPEC)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert refused.value.message.startswith(f"{param}: expected ")
    assert message in refused.value.message


def test_the_class_reaches_the_leaders(serve: Callable[..., Any]) -> None:
    api = serve(router={"priorities": CLASSES})
    assert api.post("/v1/chat/completions", CHAT).status_code == 200
    headers = {"X-Priority": "batch"}
    assert api.post("/v1/completions", COMPLETION, headers=headers).status_code == 200
    body = {**CHAT, "priority": "night"}
    assert api.post("/v1/chat/completions", body).status_code == 200
    priorities = [generate.priority for generate in api.leaders.generates()]
    assert priorities == [0, 1, 1, 1, 1, 2]


@pytest.mark.parametrize("classes", [CLASSES, {}], ids=["some", "none"])
def test_a_bad_class_is_refused_before_any_replica_hears_of_it(
    serve: Callable[..., Any], classes: dict[str, Any]
) -> None:
    api = serve(router={"priorities": classes})
    answer = api.post("/v1/chat/completions", CHAT, headers={"x-priority": "high"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == ("X-Priority", "invalid_value")
    assert error["message"].endswith("got 'high'")
    assert all(name in error["message"] for name in classes)
    answer = api.post("/v1/chat/completions", {**CHAT, "priority": 0})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "priority"
    assert api.leaders.generates() == []


@contextlib.contextmanager
def held(api: Any, wait_until: Any, *headers: dict[str, str]) -> Iterator[None]:
    """Requests that no leader answers."""
    api.leaders.mode = "silent"
    with contextlib.ExitStack() as stack:
        for number, each in enumerate(headers, 1):
            connection = socket.create_connection(("127.0.0.1", api.port), timeout=10)
            stack.enter_context(connection)
            body = json.dumps(CHAT)
            fields = {"host": "x", "content-length": str(len(body)), **each}
            head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
            request = f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n{body}"
            connection.sendall(request.encode())
            wait_until(lambda n=number: len(api.leaders.generates()) == n)
        api.leaders.mode = "answer"
        yield
    wait_until(lambda: api.client.router.in_flight == 0)


def check_refused(answer: requests.Response) -> None:
    assert answer.status_code == 429, answer.text
    assert answer.json()["error"]["code"] == "overloaded"
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_lower_classes_are_refused_first(serve: Callable[..., Any], wait_until: Any) -> None:
    api = serve(max_queue=4, router={"priorities": {"interactive": {}, "batch": {}}})
    batch = {"X-Priority": "batch"}
    with held(api, wait_until, {}, batch):
        check_refused(api.post("/v1/chat/completions", CHAT, headers=batch))
        assert api.post("/v1/chat/completions", CHAT).status_code == 200
    answer = api.post("/v1/completions", {**COMPLETION, "n": 4}, headers=batch)
    assert answer.status_code == 400  # it would never fit
    assert "at most 2" in answer.json()["error"]["message"]


def test_a_flood_is_refused_and_nobody_else(serve: Callable[..., Any], wait_until: Any) -> None:
    api = serve(max_queue=8)
    flood = {"X-Tenant-Id": "flood"}
    with held(api, wait_until, *[flood] * 7):
        answer = api.post("/v1/chat/completions", CHAT, headers=flood)
        check_refused(answer)
        assert "tenant flood" in answer.json()["error"]["message"]
        other = {"X-Tenant-Id": "other"}
        assert api.post("/v1/chat/completions", CHAT, headers=other).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_would_miss_its_objective_is_refused(
    serve: Callable[..., Any], stream: bool
) -> None:
    classes = {"interactive": {}, "batch": {"slack": 10.0}}
    api = serve(objectives={"ttft": 0.5}, router={"priorities": classes})

    def report(waiting_tokens: int) -> None:
        load = ReplicaLoad(waiting_tokens=waiting_tokens, prefill_tokens_per_s=1000.0)
        api.on_loop(lambda: api.client.on_message("prefill-0", Heartbeat(load)))

    def ask(**headers: str) -> requests.Response:
        body = {**CHAT, "stream": stream}
        answer: requests.Response = api.post("/v1/chat/completions", body, headers=headers)
        return answer

    report(3000)
    answer = ask()
    check_refused(answer)
    assert answer.headers["retry-after"] == "3"
    assert "of at most 0.5" in answer.json()["error"]["message"]
    assert api.leaders.received == []
    assert ask(**{"X-Priority": "batch"}).status_code == 200
    report(0)
    assert ask().status_code == 200
    api.on_loop(api.client.check_integrity)


def test_prompts_of_one_request_are_not_refused_for_each_other(
    serve: Callable[..., Any],
) -> None:
    api = serve(objectives={"ttft": 0.001})
    load = ReplicaLoad(prefill_tokens_per_s=1000.0)
    api.on_loop(lambda: api.client.on_message("prefill-0", Heartbeat(load)))
    assert api.post("/v1/completions", COMPLETION).status_code == 200
