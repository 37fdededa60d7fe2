"""Hundreds of requests with clients that leave at any moment: nothing stays behind, and the rest is
right."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from real_cluster import Cluster, wait_until
from reference_model import ReferenceModel

pytestmark = pytest.mark.e2e

PREFILL_PAGES, DECODE_PAGES = 48, 40
LIMIT_S = 90


@dataclasses.dataclass
class Planned:
    """What one client does."""

    prompt: list[int]
    max_tokens: int
    stream: bool
    stop: str = ""
    leave_after_chunks: int | None = None
    leave_after_s: float | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None

    @property
    def leaves(self) -> bool:
        return self.leave_after_chunks is not None or self.leave_after_s is not None


def plan(rng: random.Random, vocab_size: int, bases: list[list[int]]) -> Planned:
    """Half of the prompts share a prefix with others; four in ten clients leave early."""
    prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 40))]
    if rng.random() < 0.5:
        base = rng.choice(bases)
        prompt = base[: rng.randint(1, len(base))] + prompt[: rng.randint(1, 8)]
    planned = Planned(prompt, rng.choice((1, 2, 8, 20, 40)), rng.random() < 0.7)
    if rng.random() < 0.15:
        planned.stop = rng.choice(("e", " t", "3"))
    if rng.random() < 0.4:
        if planned.stream and rng.random() < 0.5:
            planned.leave_after_chunks = rng.choice((1, 1, 2, 5, 15))
        else:
            planned.leave_after_s = rng.choice((0.0, 0.01, 0.05, 0.2)) * rng.random()
    return planned


async def run_client(session: aiohttp.ClientSession, url: str, planned: Planned) -> None:
    body = {
        "model": "tiny",
        "prompt": planned.prompt,
        "max_tokens": planned.max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": planned.stream,
        **({"stop": planned.stop} if planned.stop else {}),
    }

    async def ask() -> None:
        async with session.post(f"{url}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            if not planned.stream:
                take(await response.json())
                return
            num_chunks = 0
            async for line in response.content:
                if line.startswith(b"data: {"):
                    take(json.loads(line[6:]))
                    num_chunks += 1
                if planned.leave_after_chunks == num_chunks and planned.finish_reason is None:
                    response.close()
                    return

    def take(answer: dict[str, Any]) -> None:
        assert "error" not in answer, answer
        choice = answer["choices"][0]
        planned.tokens += choice["token_ids"]
        planned.finish_reason = choice["finish_reason"]

    try:
        # The time-out cancels the request, which closes its connection.
        await asyncio.wait_for(ask(), planned.leave_after_s)
    except TimeoutError:
        if planned.leave_after_s is None:
            raise


async def run_clients(url: str, clients: list[Planned], rng: random.Random) -> None:
    """In waves of different sizes; within one, all at once or spread out."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=LIMIT_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        waiting = list(clients)
        while waiting:
            size = rng.choice((1, 4, 16, 48))
            wave, waiting = waiting[:size], waiting[size:]
            spread_s = rng.choice((0.0, 0.2))

            async def later(planned: Planned, delay_s: float) -> None:
                await asyncio.sleep(delay_s)
                await run_client(session, url, planned)

            await asyncio.gather(*(later(planned, rng.random() * spread_s) for planned in wave))


@pytest.mark.parametrize("num_requests", [150, pytest.param(500, marks=pytest.mark.long)])
def test_nothing_is_left(
    num_requests: int,
    start_cluster: Callable[..., Cluster],
    tiny_folder: Callable[[str], Path],
    reference: Callable[[str], ReferenceModel],
) -> None:
    model = reference("gemma3_text")
    rank = {"device": "cpu", "threads": 1, "max_running": 12}
    cluster = start_cluster(
        {
            "name": "aborts",
            "model": {
                "path": str(tiny_folder("gemma3_text")),
                "name": "tiny",
                "dtype": "float32",
                "max_context": 156,
            },
            "page_tokens": 4,
            "roles": {
                "prefill": {**rank, "pool": {"pages": PREFILL_PAGES}, "max_batch_tokens": 24},
                "decode": {**rank, "pool": {"pages": DECODE_PAGES}, "max_batch_tokens": 48},
            },
            "router": {"local_prefill_tokens": 4},
            "api": {"port": 0},
        }
    )
    cluster.wait_idle()
    start = {name: load["pages_free"] for name, load in cluster.loads().items()}
    rng = random.Random(2)
    bases = [[rng.randrange(model.vocab_size) for _ in range(60)] for _ in range(5)]
    clients = [plan(rng, model.vocab_size, bases) for _ in range(num_requests)]
    asyncio.run(asyncio.wait_for(run_clients(cluster.url, clients, rng), LIMIT_S))

    cluster.wait_idle(timeout_s=30)
    loads = cluster.loads()
    for name, load in loads.items():
        pages = zip(load["pages_free"], load["pages_cached"], load["pages_used"], strict=True)
        assert [sum(states) for states in pages] == list(start[name])
        assert not any(load["pages_used"])
    check_counts(cluster, clients, loads)
    check_answers(model, clients)
    check_still_serving(cluster, model)
    assert cluster.stop() == 0


def check_counts(
    cluster: Cluster, clients: list[Planned], loads: dict[str, dict[str, Any]]
) -> None:
    """Every request that reached the decode leader has ended there once."""
    leavers = [planned for planned in clients if planned.leaves]
    assert 0.3 < len(leavers) / len(clients) < 0.5
    decode = loads["decode-0"]
    assert decode["failed"] == loads["prefill-0"]["failed"] == 0
    assert decode["aborted"] > len(clients) / 10
    unfinished = [planned for planned in leavers if planned.finish_reason is None]
    assert decode["finished"] >= len([c for c in clients if not c.leaves and not c.stop])
    ended = decode["finished"] + decode["aborted"]
    assert len(clients) - len(unfinished) <= ended <= len(clients)
    assert decode["preemptions"] > 0
    assert wait_until(lambda: not cluster.get("/admin/status").json()["in_flight"], "no request")


def check_answers(model: ReferenceModel, clients: list[Planned]) -> None:
    """Whoever stayed has all tokens, whoever left the first ones."""
    for planned in clients:
        if not planned.leaves:
            assert planned.finish_reason in ({"stop", "length"} if planned.stop else {"length"})
            assert planned.stop or len(planned.tokens) == planned.max_tokens
        assert not planned.tokens or model.is_greedy(planned.prompt, planned.tokens)


def check_still_serving(cluster: Cluster, model: ReferenceModel) -> None:
    """On both sides, in pools that went through all that."""
    for number in range(4):
        prompt = [(7 * number + i) % model.vocab_size for i in range(50)]
        answer = cluster.complete(prompt, 20)
        assert answer.tokens == model.generate(prompt, 20)
    cluster.wait_idle()
