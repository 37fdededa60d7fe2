"""Load generator for any OpenAI-compatible server: `pd bench serve`.

Closed loop (a fixed number of requests at once) or open loop (Poisson arrivals, or a trace's).
Prompts are random token ids, sent to /v1/completions with streaming. One event loop; each event is
decoded by msgspec as it comes, so that the client takes little from a server on the same cores: its
own CPU time is in the report. In open loop a request's time starts when it was due, even if the
client was late.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from pd import __version__
from pd.bench.errors import BenchError
from pd.bench.stats import RequestResult, Summary, ratios, summarize, to_json

_UNKNOWN_VOCABULARY = 1000
_TRACE_BLOCK = 512
"""Prompt tokens that one of a trace's hash_ids stands for."""


# ------------------------------------------------------------------------------------- what to send


@dataclasses.dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: `512`, `uniform:100:900` or `lognormal:MEAN:SIGMA`."""

    text: str

    def draw(self, rng: random.Random) -> int:
        kind, *numbers = self.text.split(":")
        if kind == "uniform":
            return rng.randint(int(numbers[0]), int(numbers[1]))
        if kind == "lognormal":
            return max(1, round(rng.lognormvariate(float(numbers[0]), float(numbers[1]))))
        return int(kind)


def parse_lengths(text: str) -> Lengths:
    """Raises BenchError. lognormal's mean and sigma are of the logarithm: 6.0 is 403 tokens."""
    kind, *numbers = text.split(":")
    try:
        if kind == "uniform":
            low, high = (int(number) for number in numbers)
            good = 1 <= low <= high
        elif kind == "lognormal":
            mean, sigma = (float(number) for number in numbers)
            good = 0 <= mean < 20 and 0 <= sigma < 10
        else:
            good = not numbers and int(kind) >= 1
    except ValueError:
        good = False
    if not good:
        raise BenchError(
            f"length: found {text!r}, expected N, uniform:LOW:HIGH or lognormal:MEAN:SIGMA"
        )
    return Lengths(text)


@dataclasses.dataclass(frozen=True, slots=True)
class TraceLine:
    at_s: float
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...] = ()
    """Equal numbers stand for equal blocks of 512 prompt tokens."""


def read_trace(path: Path) -> list[TraceLine]:
    """Mooncake's JSONL: timestamp (ms), input_length, output_length, hash_ids. Raises
    BenchError."""
    lines = []
    number = 0
    try:
        for text in path.read_text().splitlines():
            number += 1
            if text.strip():
                item = json.loads(text)
                line = TraceLine(
                    at_s=float(item["timestamp"]) / 1000,
                    num_prompt=int(item["input_length"]),
                    num_output=int(item["output_length"]),
                    blocks=tuple(item.get("hash_ids", ())),
                )
                if line.num_prompt < 1 or line.num_output < 1:
                    raise ValueError("lengths below 1")
                lines.append(line)
    except OSError as error:
        raise BenchError(f"{path}: cannot be read: {error.strerror}") from error
    except KeyError as error:
        raise BenchError(f"{path}:{number}: expected the key {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise BenchError(f"{path}:{number}: not a line of a trace: {error}") from error
    if not lines:
        raise BenchError(f"{path}: the trace is empty")
    return lines


@dataclasses.dataclass(frozen=True, slots=True)
class PlannedRequest:
    prompt: tuple[int, ...]
    num_output: int
    at_s: float = 0.0
    """Open loop: when it is due, from the start of the run."""


def plan_load(
    *,
    num_requests: int,
    prompt_lengths: Lengths,
    output_lengths: Lengths,
    vocab_size: int,
    seed: int,
    rate: float | None = None,
    trace: Sequence[TraceLine] = (),
) -> list[PlannedRequest]:
    """The same arguments give the same requests. `rate` replaces a trace's own times.

    Token ids come from the middle of the vocabulary: special ones lie at its ends.
    """
    rng = random.Random(seed)
    low, high = vocab_size // 10, max(vocab_size // 10 + 1, vocab_size * 9 // 10)
    at_s = 0.0
    planned = []
    for index in range(min(num_requests, len(trace)) if trace else num_requests):
        if rate is not None:
            at_s += rng.expovariate(rate)
        if trace:
            line = trace[index]
            tokens = _trace_prompt(line, low, high, seed, rng)
            due = at_s if rate is not None else line.at_s - trace[0].at_s
            planned.append(PlannedRequest(tokens, line.num_output, due))
        else:
            num_prompt = prompt_lengths.draw(rng)
            tokens = tuple(rng.choices(range(low, high), k=num_prompt))
            planned.append(PlannedRequest(tokens, output_lengths.draw(rng), at_s))
    return planned


def _trace_prompt(
    line: TraceLine, low: int, high: int, seed: int, rng: random.Random
) -> tuple[int, ...]:
    tokens: list[int] = []
    for block in line.blocks:
        if len(tokens) >= line.num_prompt:
            break
        shared = random.Random(f"{seed} {block}")
        tokens += shared.choices(range(low, high), k=_TRACE_BLOCK)
    missing = line.num_prompt - len(tokens)
    if missing > 0:
        tokens += rng.choices(range(low, high), k=missing)
    return tuple(tokens[: line.num_prompt])


# ------------------------------------------------------------------------------------------ sending


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_event_decoder = msgspec.json.Decoder(_Event)


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    url: str
    model: str
    key: str
    vocab_size: int
    """As the server says; 0: it does not."""


async def ask_server(url: str, model: str, key: str) -> Server:
    """Fill in the model's name and vocabulary from /v1/models. Raises BenchError."""
    url = url.rstrip("/").removesuffix("/v1")
    timeout = aiohttp.ClientTimeout(total=10)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=_headers(key)) as session,
            session.get(f"{url}/v1/models") as response,
        ):
            if response.status != 200:
                raise BenchError(f"{url}/v1/models: {await _error_text(response)}")
            models = (await response.json())["data"]
    except (aiohttp.ClientError, TimeoutError) as error:
        raise BenchError(f"{url}: cannot be reached: {error or type(error).__name__}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{url}/v1/models: not an OpenAI-compatible answer") from error
    names = [each["id"] for each in models]
    if not names or (model and model not in names):
        raise BenchError(f"{url}: no model {model!r}; it serves {', '.join(names) or 'none'}")
    chosen = models[names.index(model)] if model else models[0]
    return Server(url, chosen["id"], key, int(chosen.get("vocab_size") or 0))


def _headers(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


async def send(
    session: aiohttp.ClientSession,
    server: Server,
    request: PlannedRequest,
    deadline_s: float,
    extra: dict[str, Any],
    due_s: float | None = None,
) -> RequestResult:
    """One request, start to end. Errors, the deadline's included, are in the result."""
    body = {
        "model": server.model,
        "prompt": request.prompt,
        "max_tokens": request.num_output,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }
    data = msgspec.json.encode(body)
    clock = time.perf_counter
    times: list[float] = []
    usage: _Usage | None = None
    error = ""
    start_s = clock() if due_s is None else due_s
    try:
        async with (
            asyncio.timeout(deadline_s),
            session.post(f"{server.url}/v1/completions", data=data) as response,
        ):
            if response.status != 200:
                error = await _error_text(response)
            else:
                rest = b""
                async for piece in response.content.iter_any():
                    now = clock()
                    *lines, rest = (rest + piece).split(b"\n")
                    for line in lines:
                        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                            continue
                        event = _event_decoder.decode(line[5:])
                        if event.error is not None:
                            error = _one_line(_openai_message(event.error))
                        usage = event.usage or usage
                        for choice in event.choices:
                            # A last event that only says why it ended carries no token.
                            if choice.text or choice.finish_reason is None or not times:
                                times.append(now)
                                break
    except TimeoutError:
        error = f"no end within {deadline_s:g} s"
    except (aiohttp.ClientError, msgspec.MsgspecError, ConnectionError) as failure:
        error = _one_line(f"{type(failure).__name__}: {failure}")
    num_output = usage.completion_tokens if usage and usage.completion_tokens else len(times)
    num_prompt = usage.prompt_tokens if usage and usage.prompt_tokens else len(request.prompt)
    return RequestResult(start_s, clock(), tuple(times), num_prompt, num_output, error)


async def _error_text(response: aiohttp.ClientResponse) -> str:
    text = await response.text()
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = _openai_message(json.loads(text)["error"])
    return _one_line(f"{response.status}: {text or response.reason}")


def _openai_message(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


@dataclasses.dataclass(slots=True)
class Run:
    """One server under one load."""

    server: str
    mode: str
    results: list[RequestResult]
    client_cpu_s: float
    interrupted: bool

    @property
    def summary(self) -> Summary:
        return summarize(self.results)


async def run_load(
    server: Server,
    planned: Sequence[PlannedRequest],
    *,
    concurrency: int | None,
    deadline_s: float,
    extra: dict[str, Any],
    stop: asyncio.Event,
    on_result: Callable[[RequestResult], None] = lambda _: None,
) -> Run:
    """`concurrency` None: open loop, at the planned times. `stop` ends the run with what there
    is."""
    results: list[RequestResult] = []
    cpu_s = time.process_time()
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    headers = {"Content-Type": "application/json", **_headers(server.key)}
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers, read_bufsize=2**20
    ) as session:

        async def one(request: PlannedRequest, due_s: float | None = None) -> None:
            result = await send(session, server, request, deadline_s, extra, due_s)
            results.append(result)
            on_result(result)

        async def closed(queue: list[PlannedRequest]) -> None:
            while queue:
                await one(queue.pop())

        async def open_loop() -> None:
            start_s = time.perf_counter()
            async with asyncio.TaskGroup() as group:
                for request in planned:
                    due_s = start_s + request.at_s
                    await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                    group.create_task(one(request, due_s))

        async def all_closed(workers: int) -> None:
            queue = list(reversed(planned))
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(closed(queue))

        work = asyncio.create_task(open_loop() if concurrency is None else all_closed(concurrency))
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        interrupted = not work.done()
        if interrupted:
            work.cancel()
            await asyncio.wait({work})
        elif failure := work.exception():
            raise failure
    mode = "open loop" if concurrency is None else f"closed loop, {concurrency} at once"
    return Run(server.url, mode, results, time.process_time() - cpu_s, interrupted)


# ------------------------------------------------------------------------------------ the benchmark


@dataclasses.dataclass(frozen=True, slots=True)
class BenchOptions:
    url: str
    compare: str = ""
    model: str = ""
    key: str = ""
    concurrency: tuple[int, ...] = (1, 16)
    rate: float | None = None
    """Requests a second, or None for closed loop (or a trace's own times)."""
    num_requests: int = 64
    prompt_lengths: Lengths = Lengths("512")
    output_lengths: Lengths = Lengths("64")
    trace: Path | None = None
    vocab_size: int = 0
    seed: int = 0
    warmup: int = 2
    deadline_s: float = 300.0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class Report:
    conditions: dict[str, Any]
    runs: list[Run]
    comparisons: list[tuple[str, dict[str, float | None]]]
    """(mode, first server / second server)."""
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "interrupted": self.interrupted,
            "runs": [
                {
                    "server": run.server,
                    "mode": run.mode,
                    "client_cpu_s": run.client_cpu_s,
                    **to_json(run.summary),
                }
                for run in self.runs
            ],
            "ratios": [{"mode": mode, **values} for mode, values in self.comparisons],
        }


async def run_bench(
    options: BenchOptions,
    on_start: Callable[[str, int], Callable[[RequestResult], None]],
) -> Report:
    """Every load against each server in turn. `on_start(title, requests)` returns a progress
    callback.

    SIGINT ends it early, with what there is. Raises BenchError before anything is measured.
    """
    trace = read_trace(options.trace) if options.trace else []
    urls = [options.url, *([options.compare] if options.compare else [])]
    servers = [await ask_server(url, options.model, options.key) for url in urls]
    known = [server.vocab_size for server in servers if server.vocab_size]
    vocab_size = options.vocab_size or min(known, default=_UNKNOWN_VOCABULARY)
    is_open = options.rate is not None or bool(trace)
    loads: list[int | None] = [None] if is_open else list(options.concurrency)
    report = Report(_conditions(options, servers, vocab_size), [], [])
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    try:
        for number, concurrency in enumerate(loads):
            # Another seed for each load, so that no prompt is in a cache from the load before.
            plan = _plan(options, trace, vocab_size, options.seed + number * 2)
            warmup = _plan(options, trace, vocab_size, options.seed + number * 2 + 1)
            pair = []
            for server in servers:
                if stop.is_set():
                    break
                common: dict[str, Any] = {
                    "deadline_s": options.deadline_s,
                    "extra": options.extra,
                    "stop": stop,
                }
                if options.warmup:
                    first = warmup[: options.warmup]
                    await run_load(server, first, concurrency=concurrency or 1, **common)
                if stop.is_set():
                    break
                title = "open loop" if concurrency is None else f"{concurrency} at once"
                on_result = on_start(f"{server.url} {title}", len(plan))
                run = await run_load(
                    server, plan, concurrency=concurrency, on_result=on_result, **common
                )
                pair.append(run)
                report.runs.append(run)
            if len(pair) == 2:
                values = ratios(pair[0].summary, pair[1].summary)
                report.comparisons.append((pair[0].mode, values))
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    report.interrupted = stop.is_set()
    return report


def _plan(
    options: BenchOptions, trace: Sequence[TraceLine], vocab_size: int, seed: int
) -> list[PlannedRequest]:
    return plan_load(
        num_requests=options.num_requests,
        prompt_lengths=options.prompt_lengths,
        output_lengths=options.output_lengths,
        vocab_size=vocab_size,
        seed=seed,
        rate=options.rate,
        trace=trace,
    )


def _conditions(
    options: BenchOptions, servers: Sequence[Server], vocab_size: int
) -> dict[str, Any]:
    if options.trace:
        lengths = f"trace {options.trace.name}"
    else:
        lengths = f"{options.prompt_lengths.text} in, {options.output_lengths.text} out"
    return {
        "servers": [server.url for server in servers],
        "model": servers[0].model,
        "lengths": lengths,
        "requests": options.num_requests,
        "concurrency": None if options.rate or options.trace else list(options.concurrency),
        "rate": options.rate,
        "seed": options.seed,
        "warmup": options.warmup,
        "vocab_size": vocab_size,
        "deadline_s": options.deadline_s,
        "extra": options.extra,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "pagerelay": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
