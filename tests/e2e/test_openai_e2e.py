"""Every parameter through the official `openai` client against real replicas, streaming and not.

What a request must answer is computed with `transformers`' logits and a sampler written down
plainly, so that a parameter which has the wrong effect, or none, is seen in the tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
import torch
from real_cluster import Cluster
from reference_model import ReferenceModel
from reference_sampler import choose_token
from transformers import AutoTokenizer

from pd.messages import SamplingParams

pytestmark = pytest.mark.e2e

KEY = "a key"
END = 256
PROMPT = "The wind was strong that day."
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
IGNORE_EOS = {"ignore_eos": True}


@dataclasses.dataclass
class Choice:
    """One choice, put together from an answer or from its chunks."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[list[float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Result:
    choices: list[Choice]
    usage: Any


@dataclasses.dataclass
class Api:
    cluster: Cluster
    client: openai.OpenAI
    reference: ReferenceModel
    tokenizer: Any

    def ask(self, kind: str, stream: bool, **options: Any) -> Result:
        """`kind` is chat or completion; extensions go where the client wants them."""
        known = {
            *("temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias"),
            *("seed", "stop", "logprobs", "top_logprobs", "n", "max_tokens", "prompt"),
        }
        options = {"max_tokens": 12, **options}
        extra = {"return_token_ids": True, **{k: v for k, v in options.items() if k not in known}}
        fields = {k: v for k, v in options.items() if k in known}
        endpoint: Any
        if kind == "chat":
            endpoint = self.client.chat.completions
            fields = {"messages": MESSAGES, **fields}
        else:
            endpoint = self.client.completions
            fields = {"prompt": PROMPT, **fields}
        if not stream:
            answer = endpoint.create(model="tiny", extra_body=extra, **fields)
            result = Result([Choice() for _ in answer.choices], answer.usage)
            self._add(result, answer.choices)
            return result
        result = Result([], None)
        fields["stream_options"] = {"include_usage": True}
        for chunk in endpoint.create(model="tiny", extra_body=extra, stream=True, **fields):
            while chunk.choices and len(result.choices) <= chunk.choices[0].index:
                result.choices.append(Choice())
            self._add(result, chunk.choices)
            result.usage = chunk.usage or result.usage
        return result

    def _add(self, result: Result, parts: list[Any]) -> None:
        for part in parts:
            choice = result.choices[part.index]
            if hasattr(part, "text"):
                choice.text += part.text
            else:
                message = part.delta if hasattr(part, "delta") else part.message
                choice.text += message.content or ""
            choice.token_ids += part.token_ids
            assert choice.finish_reason is None
            choice.finish_reason = part.finish_reason
            if part.logprobs is None:
                continue
            if hasattr(part.logprobs, "content"):
                choice.logprobs += [entry.logprob for entry in part.logprobs.content]
                choice.top_logprobs += [
                    [top.logprob for top in entry.top_logprobs] for entry in part.logprobs.content
                ]
            else:
                choice.logprobs += part.logprobs.token_logprobs
                choice.top_logprobs += [
                    sorted(top.values(), reverse=True) for top in part.logprobs.top_logprobs
                ]

    def prompt_ids(self, kind: str) -> list[int]:
        body = {"messages": MESSAGES} if kind == "chat" else {"prompt": PROMPT}
        tokens: list[int] = self.cluster.post("/tokenize", **body).json()["tokens"]
        return tokens

    def expect(self, prompt: list[int], **settings: Any) -> tuple[list[int], str]:
        """(tokens, finish reason) of the reference under these settings."""
        ends = () if settings.pop("ignore_eos", False) else (END,)
        stops = {*settings.pop("stop_token_ids", ()), *ends}
        bias = {int(token): value for token, value in settings.pop("logit_bias", {}).items()}
        settings = {"max_tokens": 12, "temperature": 1.0, **settings}
        params = SamplingParams(**settings, stop_token_ids=tuple(stops), logit_bias=bias)
        output: list[int] = []
        while len(output) < params.max_tokens:
            logits = self.reference.logits(prompt + output)[-1]
            output.append(choose_token(logits, params, prompt, output))
            if output[-1] in stops:
                return output, "stop"
        return output, "length"

    def decode(self, tokens: list[int], kind: str) -> str:
        """The text after the prompt, as the API shows it."""
        if kind == "chat":
            return str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        before = self.prompt_ids(kind)
        whole = self.tokenizer.decode(before + tokens, skip_special_tokens=True)
        return str(whole[len(self.tokenizer.decode(before, skip_special_tokens=True)) :])


@pytest.fixture(scope="module")
def api(
    start_cluster: Callable[..., Cluster],
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Api]:
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    folder = tiny_folder("qwen3")
    rank = {"device": "cpu", "threads": 1, "pool": {"pages": 400}, "max_batch_tokens": 64}
    cluster = start_cluster(
        {
            "name": "openai",
            "model": {
                "path": str(folder),
                "name": "tiny",
                "dtype": "float32",
                "max_context": 600,
                "chat_template": str(template),
            },
            "page_tokens": 8,
            "roles": {"prefill": {**rank}, "decode": {**rank, "max_running": 32}},
            "router": {"local_prefill_tokens": 0},
            "api": {"port": 0, "keys": ["another", KEY]},
        }
    )
    cluster.key = KEY
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key=KEY, max_retries=0) as client:
        yield Api(cluster, client, reference("qwen3"), AutoTokenizer.from_pretrained(folder))
    cluster.wait_idle()
    assert cluster.stop() == 0


both_kinds = pytest.mark.parametrize("kind", ["completion", "chat"])
both_ways = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6, "seed": 1},
    "hot": {"temperature": 2.0, "seed": 2},
    "top_p": {"top_p": 0.4, "seed": 3},
    "top_k": {"top_k": 3, "seed": 4},
    "min_p": {"min_p": 0.2, "seed": 5},
    "repetition_penalty": {"temperature": 0.0, "repetition_penalty": 1.8},
    "presence_penalty": {"temperature": 0.0, "presence_penalty": 2.0},
    "frequency_penalty": {"temperature": 0.0, "frequency_penalty": 2.0},
    "negative penalties": {"temperature": 0.0, "frequency_penalty": -2.0, "presence_penalty": -1.0},
    "logit_bias": {"temperature": 0.0, "logit_bias": {"70": 6.5, "71": -100}},
    "negative seed": {"seed": -12345},
    "max_tokens": {"seed": 8, "max_tokens": 1},
    "more tokens": {"seed": 9, "max_tokens": 30},
    "all": {
        "temperature": 1.4,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "logit_bias": {"65": 2},
        "seed": 10,
    },
}


@both_kinds
@both_ways
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(api: Api, kind: str, stream: bool, name: str) -> None:
    """The tokens are those that the reference chooses from the reference's logits."""
    settings = SETTINGS[name] | IGNORE_EOS
    prompt = api.prompt_ids(kind)
    seeds = {"seed": settings["seed"] % 2**64} if "seed" in settings else {}
    tokens, reason = api.expect(prompt, **settings | seeds)
    result = api.ask(kind, stream, **settings)
    choice = result.choices[0]
    assert choice.token_ids == tokens
    assert choice.finish_reason == reason == "length"
    assert choice.text == api.decode(tokens, kind)
    usage = result.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(tokens))
    assert usage.total_tokens == len(prompt) + len(tokens)


def test_settings_have_an_effect(api: Api) -> None:
    """Else the test above could not fail."""
    prompt = api.prompt_ids("completion")
    plain = {
        temperature: api.expect(prompt, temperature=temperature, seed=4, ignore_eos=True)[0]
        for temperature in (0.0, 1.0)
    }
    for name, settings in SETTINGS.items():
        if name in ("greedy", "max_tokens", "more tokens") or "seed" in name:
            continue
        settings = {"temperature": 1.0, **settings}
        if settings["temperature"]:
            settings["seed"] = 4
        base = plain.get(settings["temperature"])
        assert api.expect(prompt, **settings, ignore_eos=True)[0] != base, name


# --------------------------------------------------------------------------------------------- ends


@both_kinds
@both_ways
def test_stop_strings(api: Api, kind: str, stream: bool) -> None:
    tokens, _ = api.expect(api.prompt_ids(kind), temperature=0.0, max_tokens=20, ignore_eos=True)
    whole = api.decode(tokens, kind)
    stop = whole[5:8]
    options = {"temperature": 0.0, "max_tokens": 20, **IGNORE_EOS}
    result = api.ask(kind, stream, stop=["never to be seen", stop], **options)
    choice = result.choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.token_ids == tokens[: len(choice.token_ids)]
    assert len(choice.token_ids) == result.usage.completion_tokens < 20
    missed = api.ask(kind, stream, stop="never to be seen", **options).choices[0]
    assert (missed.text, missed.finish_reason) == (whole, "length")


@both_kinds
@both_ways
def test_stop_token_ids_and_min_tokens(api: Api, kind: str, stream: bool) -> None:
    prompt = api.prompt_ids(kind)
    greedy = {"temperature": 0.0, "max_tokens": 20, **IGNORE_EOS}
    free, _ = api.expect(prompt, **greedy)
    for min_tokens in (0, 6):
        options = greedy | {"stop_token_ids": [free[3], 7], "min_tokens": min_tokens}
        tokens, reason = api.expect(prompt, **options)
        choice = api.ask(kind, stream, **options).choices[0]
        assert (choice.token_ids, choice.finish_reason) == (tokens, reason)
        assert len(tokens) >= min_tokens
        assert choice.text == api.decode(tokens[:-1] if reason == "stop" else tokens, kind)
        if not min_tokens:
            assert tokens == free[: free.index(free[3]) + 1]


@both_kinds
@both_ways
def test_ignore_eos(api: Api, kind: str, stream: bool) -> None:
    """With the end token made likeliest, only `ignore_eos` and `min_tokens` go on."""
    forced = {"temperature": 0.0, "logit_bias": {str(END): 100}}
    ended = api.ask(kind, stream, **forced)
    assert (ended.choices[0].token_ids, ended.choices[0].finish_reason) == ([END], "stop")
    assert ended.choices[0].text == ""
    assert ended.usage.completion_tokens == 1
    ignored = api.ask(kind, stream, **forced, **IGNORE_EOS).choices[0]
    assert (ignored.token_ids, ignored.finish_reason) == ([END] * 12, "length")
    later = api.ask(kind, stream, **forced, min_tokens=4).choices[0]
    assert later.token_ids[-1] == END
    assert END not in later.token_ids[:-1]
    assert len(later.token_ids) == 5


# -------------------------------------------------------------------------------------------- seeds


@both_kinds
@both_ways
def test_n_choices_have_seeds_in_a_row(api: Api, kind: str, stream: bool) -> None:
    result = api.ask(kind, stream, n=4, seed=20, **IGNORE_EOS)
    single = [api.ask(kind, stream, seed=20 + i, **IGNORE_EOS).choices[0] for i in range(4)]
    assert [c.token_ids for c in result.choices] == [c.token_ids for c in single]
    assert [c.text for c in result.choices] == [c.text for c in single]
    assert len({tuple(c.token_ids) for c in result.choices}) == 4
    assert result.usage.completion_tokens == 48
    assert result.usage.prompt_tokens == len(api.prompt_ids(kind))


@both_kinds
@both_ways
def test_one_seed_gives_one_text_in_any_batch(api: Api, kind: str, stream: bool) -> None:
    """Alone, again, and among fifteen others with other seeds, lengths and settings."""
    asked = {"seed": 77, "temperature": 1.2, "top_p": 0.95, "max_tokens": 24, **IGNORE_EOS}
    alone = [api.ask(kind, stream, **asked).choices[0].text for _ in range(2)]

    def one(number: int) -> str:
        if number == 7:
            return api.ask(kind, stream, **asked).choices[0].text
        prompt = {} if kind == "chat" else {"prompt": [number * 3] * (5 + 9 * number)}
        api.ask(kind, stream, **asked | {"seed": number, "max_tokens": 10 + number}, **prompt)
        return ""

    with ThreadPoolExecutor(16) as pool:
        among = list(pool.map(one, range(16)))[7]
    assert alone == [among, among]
    # Without a seed, each draws its own.
    del asked["seed"]
    assert len({api.ask(kind, stream, **asked).choices[0].text for _ in range(3)}) == 3


# ----------------------------------------------------------------------------------------- logprobs


@both_kinds
@both_ways
def test_logprobs(api: Api, kind: str, stream: bool) -> None:
    """The model's own distribution, whatever the settings choose from."""
    prompt = api.prompt_ids(kind)
    wanted: dict[str, Any] = (
        {"logprobs": 5}
        if kind == "completion"
        else {
            "logprobs": True,
            "top_logprobs": 5,
        }
    )
    choice = api.ask(
        kind, stream, **wanted, seed=5, temperature=0.8, presence_penalty=1.0, **IGNORE_EOS
    ).choices[0]
    tokens = choice.token_ids
    expected = torch.log_softmax(api.reference.logits(prompt + tokens)[len(prompt) - 1 : -1], -1)
    chosen = expected[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
    assert choice.logprobs == pytest.approx(chosen, abs=1e-4)
    for i, top in enumerate(choice.top_logprobs):
        likeliest = expected[i].topk(5).values.tolist()
        if kind == "chat":
            assert top == pytest.approx(likeliest, abs=1e-4)
        else:
            # Keyed by text: tokens without one share a key, and the chosen token is always there.
            for value in top:
                assert min(abs(value - other) for other in [*likeliest, chosen[i]]) < 1e-4
            assert top[0] == pytest.approx(likeliest[0], abs=1e-4)
    assert len(choice.top_logprobs) == len(tokens) == 12


def test_logprobs_of_the_chosen_token_alone(api: Api) -> None:
    completion = api.ask("completion", False, logprobs=0, temperature=0.0).choices[0]
    chat = api.ask("chat", False, logprobs=True, temperature=0.0).choices[0]
    assert len(completion.logprobs) == len(chat.logprobs) == 12
    assert chat.top_logprobs == [[]] * 12


# ------------------------------------------------------------------------------------------ prompts


@both_ways
def test_token_ids_and_lists_of_prompts(api: Api, stream: bool) -> None:
    greedy = {"temperature": 0.0, **IGNORE_EOS}
    ids = api.prompt_ids("completion")
    text = api.ask("completion", stream, **greedy)
    assert api.ask("completion", stream, prompt=ids, **greedy) == text
    other = [7, 8, 9, 300, 319]
    two = api.ask("completion", stream, prompt=[ids, other], **greedy, n=1)
    assert two.choices[0] == text.choices[0]
    assert two.choices[1].token_ids == api.reference.generate(other, 12)
    assert two.usage.prompt_tokens == len(ids) + len(other)
    assert two.usage.completion_tokens == 24
    strings = api.ask("completion", stream, prompt=[PROMPT, "Hello"], n=2, **greedy)
    assert [c.text for c in strings.choices[:2]] == [text.choices[0].text] * 2
    assert strings.choices[2] == strings.choices[3] != strings.choices[0]


def test_cache_salt(api: Api) -> None:
    """A prompt hits what was computed under its own salt, and nothing else."""
    ids = [*range(100, 164)]

    def cached(**options: Any) -> int:
        usage = api.ask("completion", False, prompt=ids, temperature=0.0, **options).usage
        return int(usage.prompt_tokens_details.cached_tokens)

    assert cached() == 0
    assert cached() == 56
    assert cached(cache_salt="a") == 0
    assert cached(cache_salt="a") == 56
    assert cached(cache_salt="b") == 0
    assert cached(cache_salt="") == 56


@both_ways
def test_usage_comes_when_asked_for(api: Api, stream: bool) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3}
    if stream:
        chunks = list(api.client.completions.create(**body, stream=True))
        assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    else:
        assert api.client.completions.create(**body).usage.completion_tokens <= 3


# --------------------------------------------------------------------------------------- what else


def test_models_tokenize_health(api: Api) -> None:
    assert [model.id for model in api.client.models.list()] == ["tiny"]
    assert api.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        api.client.models.retrieve("other")
    tokens = api.cluster.post("/tokenize", prompt=PROMPT).json()
    assert tokens["tokens"] == api.tokenizer.encode(PROMPT)
    assert (tokens["count"], tokens["max_model_len"]) == (len(tokens["tokens"]), 600)
    chat = api.tokenizer.decode(api.prompt_ids("chat"))
    assert chat == "[system] Be brief.\n[user] Hello!\n[assistant]"
    health = requests.get(f"{api.cluster.url}/health", timeout=10)
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert {role: each["up"] for role, each in health.json()["roles"].items()} == {
        "prefill": 1,
        "decode": 1,
    }


def metric(text: str, name: str, **labels: str) -> float:
    """Sum over the series with these labels."""
    total = 0.0
    for line in text.splitlines():
        match = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if match and match[1] == name:
            found = dict(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
            if labels.items() <= found.items():
                total += float(match[3])
    return total


def test_metrics_grow(api: Api) -> None:
    def read() -> str:
        return requests.get(f"{api.cluster.url}/metrics", timeout=10).text

    def counts(text: str) -> dict[str, float]:
        names = ("requests_total", "prompt_tokens_total", "generated_tokens_total")
        seen = {name: metric(text, f"pagerelay_{name}") for name in names}
        seen["ttft"] = metric(text, "pagerelay_time_to_first_token_seconds_count")
        seen["tpot"] = metric(text, "pagerelay_time_per_output_token_seconds_count")
        seen["end to end"] = metric(text, "pagerelay_request_seconds_count")
        return seen

    before = read()
    for _ in range(3):
        api.ask("completion", True, prompt=[3] * 50, max_tokens=5, **IGNORE_EOS)
    after = read()
    grown = {k: v - counts(before)[k] for k, v in counts(after).items()}
    expected = {"requests_total": 3, "prompt_tokens_total": 150, "generated_tokens_total": 15}
    assert grown == {**expected, "ttft": 3, "tpot": 3, "end to end": 3}
    decode, prefill = {"replica": "decode-0"}, {"replica": "prefill-0"}
    assert metric(after, "pagerelay_cached_tokens_total", side="decode") > 0
    assert metric(after, "pagerelay_kv_transfer_bytes_total", **prefill) > 0
    assert metric(after, "pagerelay_kv_transfer_seconds_total", **prefill) > 0
    assert metric(after, "pagerelay_steps_total", **decode) > 0
    for replica in (decode, prefill):
        assert metric(after, "pagerelay_pages", group="0", **replica) == 399


def test_keys(api: Api) -> None:
    for key in ("wrong", KEY[:-1]):
        with (
            openai.OpenAI(base_url=f"{api.cluster.url}/v1", api_key=key, max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError, match="not known"),
        ):
            stranger.completions.create(model="tiny", prompt="x")
    body = {"model": "tiny", "prompt": "x"}
    response = requests.post(f"{api.cluster.url}/v1/completions", json=body, timeout=10)
    assert response.status_code == 401
    for path in ("/v1/models", "/admin/status"):
        assert requests.get(api.cluster.url + path, timeout=10).status_code == 401
