"""Whose a request is: from its header, from its API key, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pd.api.errors import ApiError
from pd.api.protocol import parse_tenant

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
COMPLETION = {"model": "tiny", "prompt": ["a b", "c d"], "n": 2, "max_tokens": 2}


@pytest.mark.parametrize(
    ("values", "of_key", "expected"),
    [
        ([], "", ""),
        ([""], "", ""),
        (["team-a"], "", "team-a"),
        (["Org/7:a@b.c+d_e"], "", "Org/7:a@b.c+d_e"),
        (["x" * 128], "", "x" * 128),
        ([], "team-a", "team-a"),
        (["team-a"], "team-a", "team-a"),
    ],
)
def test_a_tenant_is_read(values: list[str], of_key: str, expected: str) -> None:
    assert parse_tenant(values, of_key) == expected


@pytest.mark.parametrize(
    ("values", "of_key", "status", "shown"),
    [
        (["*"], "", 400, "'*'"),
        (["a b"], "", 400, "'a b'"),
        (["-a"], "", 400, "'-a'"),
        (["x" * 129], "", 400, "'xxx"),
        (["caf\xe9"], "", 400, "'caf\xe9'"),
        (["a\n"], "", 400, "'a\\n'"),
        (["a", "b"], "", 400, "'a, b'"),
        (["b"], "a", 403, "'b'"),
    ],
)
def test_what_is_no_tenant_is_refused(
    values: list[str], of_key: str, status: int, shown: str
) -> None:
    with pytest.raises(ApiError) as refused:
        parse_tenant(values, of_key)
    assert (refused.value.status, refused.value.param) == (status, "X-Tenant-Id")
    assert refused.value.message.startswith("X-Tenant-Id: expected ")
    assert f"got {shown}" in refused.value.message
    assert len(refused.value.message) < 250


def test_the_header_reaches_the_leaders(api: Any) -> None:
    headers = {"X-Tenant-Id": "team-a"}
    assert api.post("/v1/chat/completions", CHAT, headers=headers).status_code == 200
    assert api.post("/v1/completions", COMPLETION, headers=headers).status_code == 200
    assert [generate.tenant for generate in api.leaders.generates()] == ["team-a"] * 5
    assert api.post("/v1/chat/completions", CHAT).status_code == 200
    assert api.leaders.generates()[-1].tenant == ""


def test_a_bad_header_is_refused_before_any_replica_hears_of_it(api: Any) -> None:
    answer = api.post("/v1/chat/completions", CHAT, headers={"x-tenant-id": "a b"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "X-Tenant-Id"
    assert "got 'a b'" in answer.json()["error"]["message"]
    assert api.leaders.generates() == []


def test_a_key_may_belong_to_a_tenant(serve: Callable[..., Any]) -> None:
    api = serve(api={"keys": ["any"], "tenants": {"team-a": ["one", "two"], "team-b": ["three"]}})

    def send(key: str, **more: str) -> int:
        headers = {"authorization": f"Bearer {key}", **more}
        return int(api.post("/v1/chat/completions", CHAT, headers=headers).status_code)

    assert [send(key) for key in ("any", "one", "two", "three", "four")] == [200] * 4 + [401]
    assert [generate.tenant for generate in api.leaders.generates()] == [
        "",
        "team-a",
        "team-a",
        "team-b",
    ]
    api.leaders.received.clear()
    assert send("any", **{"X-Tenant-Id": "team-c"}) == 200
    assert send("one", **{"X-Tenant-Id": "team-a"}) == 200
    assert send("one", **{"X-Tenant-Id": "team-b"}) == 403
    assert [generate.tenant for generate in api.leaders.generates()] == ["team-c", "team-a"]


def test_tenants_alone_ask_for_keys(serve: Callable[..., Any]) -> None:
    api = serve(api={"tenants": {"team-a": ["one"]}})
    assert api.post("/v1/chat/completions", CHAT).status_code == 401
    assert api.get("/health").status_code == 200
