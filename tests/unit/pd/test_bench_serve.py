"""The load generator: its statistics by hand, its load, and its client against a small fake
server."""

from __future__ import annotations

import asyncio
import io
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from pd.bench.errors import BenchError
from pd.bench.report import plot_report, print_report
from pd.bench.serve import (
    BenchOptions,
    PlannedRequest,
    Report,
    Run,
    Server,
    ask_server,
    parse_lengths,
    plan_load,
    read_trace,
    run_bench,
    run_load,
)
from pd.bench.stats import RequestResult, distribution, ratios, summarize

# -------------------------------------------------------------------------------------- statistics


def result(start: float, times: list[float], num_output: int, error: str = "") -> RequestResult:
    end = times[-1] if times else start + 1
    return RequestResult(start, end, tuple(times), 10, num_output, error)


def test_summary_by_hand() -> None:
    summary = summarize(
        [
            result(0.0, [1.0, 1.5, 2.0], 3),
            result(1.0, [1.5, 3.5], 5),  # two events, five tokens
            result(2.0, [4.0], 1),  # one token: no TPOT
            result(0.5, [0.6], 1, error="500: broke"),
            result(0.5, [], 0),
        ]
    )
    assert summary.duration_s == 4.0
    assert summary.num_ok == 3
    assert summary.errors == {"500: broke": 1, "no token came": 1}
    assert summary.output_tokens == 9
    assert summary.output_tokens_per_s == 9 / 4
    assert summary.prompt_tokens_per_s == 30 / 4
    assert summary.requests_per_s == 3 / 4
    assert (summary.ttft.p50, summary.ttft.max) == (1.0, 2.0)
    assert summary.ttft.mean == pytest.approx(3.5 / 3)
    assert summary.tpot.p50 == 0.5  # 1.0 / 2 and 2.0 / 4
    assert (summary.itl.p50, summary.itl.max) == (0.5, 2.0)
    assert (summary.e2e.p50, summary.e2e.max) == (2.0, 2.5)


def test_nothing_to_summarize() -> None:
    summary = summarize([])
    assert summary.num_ok == 0
    assert summary.output_tokens_per_s == 0
    assert summary.ttft.p50 is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], (3.0, 3.0, 3.0)),
        ([4.0, 0.0], (2.0, 3.6, 3.96)),
        ([float(i) for i in range(101)], (50.0, 90.0, 99.0)),
    ],
)
def test_percentiles(values: list[float], expected: tuple[float, ...]) -> None:
    found = distribution(values)
    assert (found.p50, found.p90, found.p99) == pytest.approx(expected)


def test_ratios() -> None:
    fast = summarize([result(0.0, [1.0, 2.0], 2)])
    slow = summarize([result(0.0, [2.0, 6.0], 2)])
    values = ratios(fast, slow)
    assert values["ttft_p50"] == 0.5
    assert values["tpot_p99"] == 0.25
    assert values["output_tokens_per_s"] == 3.0
    assert ratios(fast, summarize([]))["ttft_p50"] is None


# -------------------------------------------------------------------------------------------- load


def test_lengths() -> None:
    rng = random.Random(1)
    assert parse_lengths("512").draw(rng) == 512
    uniform = [parse_lengths("uniform:3:5").draw(rng) for _ in range(100)]
    assert set(uniform) == {3, 4, 5}
    lognormal = sorted(parse_lengths("lognormal:6:0.5").draw(rng) for _ in range(999))
    assert 370 < lognormal[499] < 440  # e^6 = 403


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "x", "1:2", "uniform:5:3", "uniform:5", "lognormal:a:b", "uniform:0:2"]
)
def test_bad_lengths(text: str) -> None:
    with pytest.raises(BenchError, match="length: found"):
        parse_lengths(text)


def plan(seed: int = 0, **changes: Any) -> list[PlannedRequest]:
    options: dict[str, Any] = {
        "num_requests": 20,
        "prompt_lengths": parse_lengths("uniform:5:9"),
        "output_lengths": parse_lengths("4"),
        "vocab_size": 1000,
    }
    return plan_load(seed=seed, **{**options, **changes})


def test_plan_is_reproducible_and_unique() -> None:
    assert plan(3) == plan(3)
    assert plan(3) != plan(4)
    prompts = [request.prompt for request in plan()]
    assert len(set(prompts)) == 20
    assert all(100 <= token < 900 for prompt in prompts for token in prompt)
    assert {len(prompt) for prompt in prompts} <= set(range(5, 10))


def test_poisson_arrivals() -> None:
    times = [request.at_s for request in plan(num_requests=4000, rate=10.0)]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(400, rel=0.1)


TRACE = [
    {"timestamp": 1000, "input_length": 700, "output_length": 3, "hash_ids": [7, 8]},
    {"timestamp": 1500, "input_length": 600, "output_length": 2, "hash_ids": [7, 9]},
    {"timestamp": 4000, "input_length": 5, "output_length": 1},
]


def test_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in TRACE) + "\n\n")
    planned = plan(trace=read_trace(file))
    assert [request.at_s for request in planned] == [0.0, 0.5, 3.0]
    assert [len(request.prompt) for request in planned] == [700, 600, 5]
    assert [request.num_output for request in planned] == [3, 2, 1]
    first, second = planned[0].prompt, planned[1].prompt
    assert first[:512] == second[:512]
    assert first[512:600] != second[512:]
    assert plan(1, trace=read_trace(file))[0].prompt[:512] != first[:512]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("{}", ":1: expected the key 'timestamp'"),
        ("\nnot json", ":2: not a line"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1}', ":1: .*below 1"),
        ("3", ":1: not a line"),
    ],
)
def test_bad_trace(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(BenchError, match=message):
        read_trace(tmp_path / "trace.jsonl")


# ------------------------------------------------------------------------------------------ client


class FakeServer:
    """Streams as many tokens as asked, two to an event, cutting events at any byte."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.running = 0
        self.most_running = 0
        self.answer: Callable[[web.Request], Any] | None = None
        self.hold = asyncio.Event()
        self.hold.set()
        self.arrived = asyncio.Semaphore(0)

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "vocab_size": 500}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if self.answer is not None:
            return await self.answer(request)  # type: ignore[no-any-return]
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            self.arrived.release()
            await asyncio.sleep(0)
            await self.hold.wait()
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            left = body["max_tokens"]
            events = []
            while left > 0:
                left -= 2
                reason = "length" if left <= 0 else None
                events.append({"choices": [{"text": "a b", "finish_reason": reason}]})
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            events.append({"choices": [], "usage": usage})
            data = b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events)
            data += b"data: [DONE]\n\n"
            for start in range(0, len(data), 37):
                await response.write(data[start : start + 37])
            await response.write_eof()
            return response
        finally:
            self.running -= 1


@asynccontextmanager
async def fake_server() -> AsyncIterator[tuple[FakeServer, str]]:
    fake = FakeServer()
    application = web.Application()
    application.router.add_get("/v1/models", fake.models)
    application.router.add_post("/v1/completions", fake.completions)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield fake, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        fake.hold.set()
        await runner.cleanup()


async def load(url: str, requests: list[PlannedRequest], **changes: Any) -> Run:
    options: dict[str, Any] = {
        "concurrency": 4,
        "deadline_s": 5.0,
        "extra": {},
        "stop": asyncio.Event(),
    }
    server = Server(url, "fake", "secret", 500)
    return await run_load(server, requests, **{**options, **changes})


def test_closed_loop() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, url):
            run = await load(url, plan(output_lengths=parse_lengths("5")), extra={"top_k": 3})
            assert [r.error for r in run.results] == [""] * 20
            assert {r.num_output for r in run.results} == {5}
            assert {len(r.token_times_s) for r in run.results} == {3}
            assert fake.most_running <= 4
            assert fake.keys[0] == "Bearer secret"
            body = fake.bodies[0]
            assert body["ignore_eos"] is True
            assert body["top_k"] == 3
            assert body["temperature"] == 0
            assert sorted(len(r.token_times_s) for r in run.results) == [3] * 20
            assert {tuple(b["prompt"]) for b in fake.bodies} == {r.prompt for r in plan()}

    asyncio.run(scenario())


def test_open_loop_counts_from_when_it_was_due() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, url):
            requests = [PlannedRequest((1, 2), 2, at_s) for at_s in (0.0, 0.02, 0.04)]
            fake.hold.clear()
            task = asyncio.create_task(load(url, requests, concurrency=None))
            for _ in requests:
                await fake.arrived.acquire()
            fake.hold.set()
            run = await task
            starts = sorted(r.start_s for r in run.results)
            assert [s - starts[0] for s in starts] == pytest.approx([0.0, 0.02, 0.04])
            assert run.summary.ttft.max is not None
            assert run.summary.ttft.max >= 0.04

    asyncio.run(scenario())


def test_deadline_and_stop() -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, url):
            fake.hold.clear()
            run = await load(url, plan(num_requests=2), deadline_s=0.05)
            fake.arrived = asyncio.Semaphore(0)
            assert run.summary.errors == {"no end within 0.05 s": 2}

            stop = asyncio.Event()
            task = asyncio.create_task(load(url, plan(num_requests=8), stop=stop))
            await fake.arrived.acquire()
            stop.set()
            run = await task
            assert run.interrupted
            assert run.results == []

    asyncio.run(scenario())


async def _refuse(request: web.Request) -> web.Response:
    error = {"message": "too many\nrequests", "type": "overloaded"}
    return web.json_response({"error": error}, status=429)


async def _fail_in_the_stream(request: web.Request) -> web.Response:
    text = 'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"message": "rank died"}}\n\n'
    return web.Response(text=text)


async def _talk_nonsense(request: web.Request) -> web.Response:
    return web.Response(text="data: {nonsense\n\n")


async def _hang_up(request: web.Request) -> web.Response:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (_refuse, "429: too many requests"),
        (_fail_in_the_stream, "rank died"),
        (_talk_nonsense, "DecodeError: JSON is malformed"),
        (_hang_up, "ServerDisconnectedError"),
    ],
)
def test_errors(answer: Callable[[web.Request], Any], message: str) -> None:
    async def scenario() -> None:
        async with fake_server() as (fake, url):
            fake.answer = answer
            run = await load(url, plan(num_requests=1))
            (error,) = run.summary.errors
            assert error.startswith(message)

    asyncio.run(scenario())


def test_bench_compares_two_servers() -> None:
    async def scenario() -> None:
        async with fake_server() as (first, url), fake_server() as (second, other):
            titles = []

            def on_start(title: str, total: int) -> Callable[[RequestResult], None]:
                titles.append((title.rpartition(" ")[0], total))
                return lambda _: None

            options = BenchOptions(
                url=url + "/v1/",
                compare=other,
                concurrency=(1, 3),
                num_requests=6,
                prompt_lengths=parse_lengths("8"),
                output_lengths=parse_lengths("4"),
            )
            report = await run_bench(options, on_start)
            assert [run.server for run in report.runs] == [url, other] * 2
            assert [len(run.results) for run in report.runs] == [6] * 4
            assert len(first.bodies) == len(second.bodies) == 2 * (6 + 2)
            prompts = [[tuple(body["prompt"]) for body in s.bodies] for s in (first, second)]
            assert sorted(prompts[0]) == sorted(prompts[1])
            assert len(set(prompts[0])) == 16
            assert max(max(prompt) for prompt in prompts[0]) < 450
            written = json.loads(json.dumps(report.to_json()))
            assert len(written["ratios"]) == 2
            assert written["conditions"]["lengths"] == "8 in, 4 out"
            assert written["runs"][0]["output_tokens"] == 24
            assert all(total == 6 for _, total in titles)

    asyncio.run(scenario())


def test_asking_a_server() -> None:
    async def scenario() -> None:
        async with fake_server() as (_, url):
            assert await ask_server(url + "/v1", "", "") == Server(url, "fake", "", 500)
            with pytest.raises(BenchError, match="no model 'other'; it serves fake"):
                await ask_server(url, "other", "")
        with pytest.raises(BenchError, match="cannot be reached"):
            await ask_server(url, "", "")

    asyncio.run(scenario())


def test_report_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [result(0.0, [1.0, 1.5, 2.0], 3), result(0.5, [], 0, error="429: [full]")]
    run = Run("http://127.0.0.1:1", "open loop", results, 0.25, False)
    conditions = {"model": "tiny", "lengths": "8 in, 3 out", "machine": "x", "rate": None}
    report = Report(conditions, [run], [("open loop", {"ttft_p50": 0.5})], interrupted=True)
    console = Console(file=io.StringIO(), width=100)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("1,000.00", "500.00", "1.5 tok/s out", "1 errors: 429: [full]", "interrupted"):
        assert part in text
    plot_report(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    plot_report(Report(conditions, [], []), tmp_path / "empty.png")
    with pytest.raises(BenchError, match="--plot"):
        plot_report(report, tmp_path / "none" / "plot.png")
