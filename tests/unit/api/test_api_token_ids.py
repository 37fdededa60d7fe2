"""`return_token_ids`: the tokens of each choice, as they are counted, in both endpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest

COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 60, "temperature": 0.0}
CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 60,
    "temperature": 0.0,
}
BODIES = [("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)]
ENDS: dict[str, dict[str, Any]] = {
    "end token": {},
    "length": {"max_tokens": 5, "ignore_eos": True},
    "stop string": {"stop": [" brown f"], "ignore_eos": True},
    "two choices": {"n": 2, "temperature": 1.0, "seed": 3},
}


def ask(api: Any, path: str, body: dict[str, Any]) -> tuple[dict[int, list[int]], dict[str, Any]]:
    """(token ids by choice, usage)."""
    if not body.get("stream"):
        answer = api.post(path, body).json()
        return {choice["index"]: choice["token_ids"] for choice in answer["choices"]}, answer[
            "usage"
        ]
    tokens: dict[int, list[int]] = {}
    usage: dict[str, Any] = {}
    for line in api.post(path, body).text.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk["usage"] or usage
            for choice in chunk["choices"]:
                tokens.setdefault(choice["index"], []).extend(choice["token_ids"])
    return tokens, usage


@pytest.mark.parametrize(("path", "body"), BODIES, ids=["completion", "chat"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("group", [1, 3, 100])
def test_they_are_the_tokens_that_count(
    api: Any, path: str, body: dict[str, Any], end: str, group: int
) -> None:
    api.leaders.group = group
    asked = body | ENDS[end] | {"return_token_ids": True}
    whole, usage = ask(api, path, asked)
    sent = [api.leaders.tokens_for(generate) for generate in api.leaders.generates()]
    assert len(whole) == len(sent)
    for index, tokens in whole.items():
        assert tokens == sent[index][: len(tokens)]
        assert tokens == sent[index] or "stop" in asked
    assert sum(map(len, whole.values())) == usage["completion_tokens"]
    streamed = ask(api, path, asked | {"stream": True, "stream_options": {"include_usage": True}})
    assert streamed == (whole, usage)


def test_a_stop_string_ends_them_with_the_token_that_completes_it(api: Any) -> None:
    asked = COMPLETION | ENDS["stop string"] | {"return_token_ids": True}
    choice = api.post("/v1/completions", asked).json()["choices"][0]
    assert choice["text"] == " the quick"
    assert " brown f" in api.tokenizer.decode(choice["token_ids"])
    assert " brown f" not in api.tokenizer.decode(choice["token_ids"][:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_they_come_only_when_asked_for(api: Any, stream: bool) -> None:
    assert "token_ids" not in api.post("/v1/completions", COMPLETION | {"stream": stream}).text
    response = api.post("/v1/completions", COMPLETION | {"return_token_ids": 1})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "return_token_ids"


def test_a_token_without_text_is_sent_when_it_comes(api: Any) -> None:
    """The bytes of one character come in several tokens; ids do not wait for the text."""
    api.leaders.answer = "😀"
    num_tokens = len(api.tokenizer.encode("😀", add_special_tokens=False)) + 1
    asked = COMPLETION | {"return_token_ids": True, "stream": True}
    lines = api.post("/v1/completions", asked).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert num_tokens > 3
    counts = [len(chunk["choices"][0]["token_ids"]) for chunk in chunks]
    assert sum(counts) == num_tokens
    assert sum(not chunk["choices"][0]["text"] for chunk in chunks) >= 2
