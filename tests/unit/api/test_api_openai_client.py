"""The official client against a real server whose replicas are fakes."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import openai
import pytest

ANSWER = " the quick brown fox jumps over the lazy dog."


@pytest.fixture
def client(api: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{api.url}/v1", api_key="none", max_retries=0) as client:
        yield client


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "temperature": 0.0}
COMPLETION = {"model": "tiny", "prompt": "hello", "max_tokens": 100, "temperature": 0.0}


def joined(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream, of either endpoint."""
    text = ""
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index == index:
                text += (choice.delta.content or "") if hasattr(choice, "delta") else choice.text
    return text


def reasons(chunks: list[Any]) -> dict[int, str]:
    return {c.index: c.finish_reason for k in chunks for c in k.choices if c.finish_reason}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("other")


def test_completion(api: Any, client: openai.OpenAI) -> None:
    answer = client.completions.create(**COMPLETION)
    assert answer.choices[0].text == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    num_prompt = len(api.tokenizer.encode("hello"))
    num_answer = len(api.tokenizer.encode(ANSWER, add_special_tokens=False)) + 1
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, num_answer)
    assert usage.total_tokens == num_prompt + num_answer
    assert usage.prompt_tokens_details.cached_tokens == 2  # of 1 and 2, on either side
    assert api.leaders.generates()[0].request_id not in ("", answer.choices[0].text)


@pytest.mark.parametrize("group", [1, 3, 100])
def test_completion_streamed(api: Any, client: openai.OpenAI, group: int) -> None:
    api.leaders.group = group
    chunks = list(client.completions.create(**COMPLETION, stream=True))
    assert joined(chunks) == ANSWER
    assert reasons(chunks) == {0: "stop"}
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_chat(api: Any, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", ANSWER)
    assert answer.object == "chat.completion"
    prompt = api.leaders.generates()[0].prompt
    text = "<|turn|>user\nhello<|turn|>assistant\n"
    expected = api.tokenizer.encode(text, add_special_tokens=False)
    assert len(prompt) == 4 * len(expected)
    # What is left of the context is the chat's limit.
    assert api.leaders.generates()[0].sampling.max_tokens == 200 - len(expected)


def test_chat_streamed_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True})
    )
    assert joined(chunks) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].delta.role for c in chunks[1:-1]] == [None] * (len(chunks) - 2)
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[-1].choices == []
    whole = client.chat.completions.create(**CHAT).usage
    assert chunks[-1].usage == whole
    assert whole.completion_tokens > 5


def test_length_is_the_reason_when_max_tokens_end_it(api: Any, client: openai.OpenAI) -> None:
    answer = client.completions.create(**(COMPLETION | {"max_tokens": 3}))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3
    answer = client.completions.create(
        model="tiny", prompt="hello", extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 16
    assert api.tokenizer.eos_token_id not in api.leaders.generates()[-1].sampling.stop_token_ids


def test_parameters_reach_the_replica(api: Any, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x"}],
        max_completion_tokens=20,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"7": -3},
        seed=-5,
        logprobs=True,
        top_logprobs=2,
        user="ignored",
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "stop_token_ids": [9],
            "min_tokens": 2,
        },
    )
    sampling = api.leaders.generates()[0].sampling
    assert sampling.max_tokens == 20
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.05, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.2)
    assert sampling.logit_bias == {7: -3.0}
    assert sampling.seed == 2**64 - 5
    assert sampling.stop_token_ids == tuple(sorted([9, api.tokenizer.eos_token_id]))
    assert (sampling.min_tokens, sampling.logprobs) == (2, 2)


def test_seeds(api: Any, client: openai.OpenAI) -> None:
    fields = COMPLETION | {"temperature": 1.0}
    texts = [client.completions.create(**fields, seed=3).choices[0].text for _ in range(2)]
    assert texts[0] == texts[1]
    client.completions.create(**fields)
    client.completions.create(**fields)
    drawn = [generate.sampling.seed for generate in api.leaders.generates()[-2:]]
    assert drawn[0] != drawn[1]


def test_cache_salt_changes_the_hashes(api: Any, client: openai.OpenAI) -> None:
    for salt in ("", "a", "b", "a"):
        client.completions.create(**COMPLETION, extra_body={"cache_salt": salt})
    roots = [generate.root for generate in api.leaders.generates()]
    assert len(set(roots)) == 3
    assert roots[1] == roots[3]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("group", [1, 2, 100])
def test_stop_strings(
    api: Any, client: openai.OpenAI, wait_until: Any, stream: bool, group: int
) -> None:
    api.leaders.group = group
    fields = COMPLETION | {"stop": [" jumps ov", "never"], "extra_body": {"ignore_eos": True}}
    if stream:
        chunks = list(client.completions.create(**fields, stream=True))
        text, reason = joined(chunks), reasons(chunks)[0]
    else:
        answer = client.completions.create(**fields)
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
        assert answer.usage.completion_tokens < 30
    assert (text, reason) == (" the quick brown fox", "stop")
    if group < 100:
        wait_until(api.leaders.aborted_ids)
    assert api.client.router.in_flight == 0


def test_n_and_several_prompts(api: Any, client: openai.OpenAI) -> None:
    fields = COMPLETION | {"temperature": 1.0, "seed": 1, "n": 3, "prompt": ["hello", "world"]}
    answer = client.completions.create(**fields)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3, 4, 5]
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts[:3])) == 3
    assert texts[:3] == texts[3:]
    num_prompt = sum(len(api.tokenizer.encode(prompt)) for prompt in fields["prompt"])
    assert answer.usage.prompt_tokens == num_prompt
    chunks = list(client.completions.create(**fields, stream=True))
    assert [joined(chunks, index) for index in range(6)] == texts
    assert set(reasons(chunks)) == set(range(6))


def test_n_in_a_chat(client: openai.OpenAI) -> None:
    fields = CHAT | {"temperature": 1.0, "seed": 1, "n": 3}
    texts = [c.message.content for c in client.chat.completions.create(**fields).choices]
    chunks = list(client.chat.completions.create(**fields, stream=True))
    assert [joined(chunks, index) for index in range(3)] == texts
    roles = [c.index for k in chunks for c in k.choices if c.delta.role]
    assert sorted(roles) == [0, 1, 2]


def test_token_id_prompts(api: Any, client: openai.OpenAI) -> None:
    client.completions.create(**(COMPLETION | {"prompt": [5, 6, 7]}))
    client.completions.create(**(COMPLETION | {"prompt": [[5, 6], [7]]}))
    assert [len(generate.prompt) // 4 for generate in api.leaders.generates()] == [3, 2, 1]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("group", [1, 4])
def test_completion_logprobs(api: Any, client: openai.OpenAI, stream: bool, group: int) -> None:
    api.leaders.group = group
    api.leaders.answer = "x 漢 fox"
    fields = COMPLETION | {"logprobs": 2, "stop": ["ox"]}
    if stream:
        parts = [
            choice.logprobs
            for chunk in client.completions.create(**fields, stream=True)
            for choice in chunk.choices
            if choice.logprobs
        ]
    else:
        parts = [client.completions.create(**fields).choices[0].logprobs]
    ids = api.tokenizer.encode("x 漢 fox", add_special_tokens=False)
    assert [x for part in parts for x in part.token_logprobs] == [-0.25] * len(ids)
    # "漢" takes three tokens, which begin where it begins; " fox" is one, and cut within.
    assert [x for part in parts for x in part.text_offset] == [0, 1, 2, 2, 2, 3]
    tops = [x for part in parts for x in part.top_logprobs]
    tokens = [x for part in parts for x in part.tokens]
    assert tokens[0] == "x"
    assert all(token in top and len(top) <= 3 for token, top in zip(tokens, tops, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(api: Any, client: openai.OpenAI, stream: bool) -> None:
    api.leaders.answer = "x 漢 fox"
    fields = CHAT | {"logprobs": True, "top_logprobs": 3}
    if stream:
        parts = [
            choice.logprobs
            for chunk in client.chat.completions.create(**fields, stream=True)
            for choice in chunk.choices
            if choice.logprobs
        ]
    else:
        parts = [client.chat.completions.create(**fields).choices[0].logprobs]
    content = [entry for part in parts for entry in part.content]
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == "x 漢 fox"
    assert all(entry.logprob == -0.25 and len(entry.top_logprobs) == 3 for entry in content)


def test_no_logprobs_unless_asked_for(client: openai.OpenAI) -> None:
    assert client.completions.create(**COMPLETION).choices[0].logprobs is None
    assert client.chat.completions.create(**CHAT).choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_timings(client: openai.OpenAI, stream: bool) -> None:
    fields = CHAT | {"extra_body": {"return_timings": True}}
    if stream:
        *_, last = client.chat.completions.create(**fields, stream=True)
    else:
        last = client.chat.completions.create(**fields)
    timings = last.model_extra["timings"]
    assert 0 <= timings["tokenize_s"] <= timings["ttft_s"] <= timings["total_s"]
    assert (timings["queue_s"], timings["pages_moved"]) == (0.5, 3)
    assert (timings["prefill_replica"], timings["decode_replica"]) == ("prefill-0", "decode-0")
    assert "timings" not in client.chat.completions.create(**CHAT).model_extra


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_a_status(
    api: Any, client: openai.OpenAI, stream: bool
) -> None:
    api.leaders.mode = "error"
    with pytest.raises(openai.InternalServerError, match="no pages left") as caught:
        client.chat.completions.create(**CHAT, stream=stream)
    assert caught.value.status_code == 500
    assert caught.value.code == "engine_error"


def test_an_error_in_a_stream_is_an_event_and_the_end(api: Any, client: openai.OpenAI) -> None:
    api.leaders.mode = "error_after_two"
    seen: list[Any] = []
    stream = client.chat.completions.create(**CHAT, stream=True)
    with pytest.raises(openai.APIError, match="no pages left"):
        collections.deque(map(seen.append, stream))
    assert seen
    assert reasons(seen) == {}
    assert api.client.router.in_flight == 0
