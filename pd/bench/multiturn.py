"""Conversations of several turns, with the cache off and with one, two and three tiers:
`pd bench multiturn SPEC`.

The spec's cluster is started once for each set of tiers, with device pools that hold only a part of
what all conversations need. Each client has one conversation; a round is one turn of each, all at
once, and begins when the last of the round before has ended. The same prompts and greedy decoding
everywhere, so that only the cache differs. Time to first token is what the client sees. With three
tiers the host tier has a quarter of its size, so that storage has something to do.

`--paired` is for small differences: another server runs beside each, with the cache off or, with
`--beside never`, one that keeps the same but loads nothing from below the device. Both are asked
each turn, one request at a time, in random order, with pauses in which what is kept is written. Of
each pair the ratio counts; the interval of its median is from 2,000 bootstrap samples of pairs.
Beside "off", what a turn costs that finds nothing (looking it up, keeping it) is in it too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table

from pd.bench.errors import BenchError
from pd.bench.server import Server
from pd.http_client import get_json, stream_json
from pd.spec import load_spec, parse_bytes

TIERS = ("off", "device", "device + host", "device + host + storage")
WIDTH = 120
"""Of the tables, in characters."""
_LOWEST_TOKEN = 10
_FEW_TOKENS = 1000
"""The vocabulary that is drawn from, unless the model's is smaller."""
_SAMPLES = 2000
_WARM_UP = 3
"""Requests to each server of a paired run."""
_STORAGE_SHARE = 4


@dataclasses.dataclass(frozen=True, slots=True)
class MultiturnOptions:
    spec: Path
    clients: int = 8
    rounds: int = 4
    new_tokens: int = 160
    output_tokens: int = 16
    device_pages: int = 160
    host_memory: str = "256MiB"
    storage: str = "file"
    storage_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Default: a folder."""
    tiers: tuple[str, ...] = TIERS
    """Those of them to be timed, besides "off"."""
    pause_s: float = 0.3
    """After each request of a paired run."""
    beside: Literal["off", "never"] = "off"
    """What a paired run compares with."""
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    ttft_s: float
    prompt_tokens: int
    cached: dict[str, int]
    """Tokens by tier."""
    tokens: tuple[int, ...]


def run_multiturn(
    options: MultiturnOptions, console: Console, on_round: Callable[[str, int], None]
) -> dict[str, Any]:
    """The report, as JSON. Raises BenchError, ServerError and HttpError."""
    _check(options)
    runs: list[dict[str, Any]] = []
    outputs: list[list[tuple[int, ...]]] = []
    with tempfile.TemporaryDirectory(prefix="pagerelay-bench-") as folder:
        for tiers in TIERS:
            if tiers != "off" and tiers not in options.tiers:
                continue
            spec = _write_spec(options, tiers, Path(folder))
            rounds = _converse(spec, options, console, functools.partial(on_round, tiers))
            outputs.append([turn.tokens for turns in rounds for turn in turns])
            runs.append({"tiers": tiers, "rounds": [_summary(turns) for turns in rounds]})
    base = runs[0]["rounds"]
    for run in runs:
        for one, of_base in zip(run["rounds"], base, strict=True):
            one["ttft_ratio_to_off"] = one["ttft_p50_s"] / of_base["ttft_p50_s"]
    return {
        "options": _told(options),
        "tokens_equal": all(tokens == outputs[0] for tokens in outputs),
        "runs": runs,
    }


def run_paired(
    options: MultiturnOptions, console: Console, on_round: Callable[[str, int], None]
) -> dict[str, Any]:
    """The report, as JSON. Raises BenchError, ServerError and HttpError."""
    _check(options)
    runs: list[dict[str, Any]] = []
    is_equal = True
    with tempfile.TemporaryDirectory(prefix="pagerelay-bench-") as folder:
        for tiers in TIERS[1:]:
            if tiers not in options.tiers:
                continue
            with contextlib.ExitStack() as stack:
                urls = []
                for is_base in (True, False):
                    server = Server(_write_spec(options, tiers, Path(folder), is_base))
                    stack.callback(server.stop)
                    urls.append(server.wait_ready(console))
                rounds = _converse_with_both(
                    (urls[0], urls[1]), options, functools.partial(on_round, tiers)
                )
            is_equal &= all(a.tokens == b.tokens for pairs in rounds for a, b in pairs)
            runs.append({"tiers": tiers, "rounds": [_paired_summary(each) for each in rounds]})
    return {"options": _told(options), "tokens_equal": is_equal, "runs": runs}


def _check(options: MultiturnOptions) -> None:
    if min(options.clients, options.rounds, options.new_tokens, options.output_tokens) < 1:
        raise BenchError("clients, rounds, new and output tokens: expected at least 1 of each")
    unknown = set(options.tiers) - set(TIERS)
    if unknown:
        raise BenchError(f"tiers: found {min(unknown)!r}, expected some of {', '.join(TIERS)}")


def _told(options: MultiturnOptions) -> dict[str, Any]:
    return {**dataclasses.asdict(options), "spec": str(options.spec)}


def _write_spec(options: MultiturnOptions, tiers: str, folder: Path, is_base: bool = False) -> Path:
    """`is_base`: of the server that the one with these tiers is compared with."""
    folder = folder / f"{TIERS.index(tiers)}-{'base' if is_base else 'tiers'}"
    folder.mkdir()
    keeps = not is_base or options.beside == "never"
    spec = _spec(options, tiers if keeps else "off", folder / "storage")
    if is_base and keeps:
        spec["cache"]["load"] = "never"
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def _spec(options: MultiturnOptions, tiers: str, storage: Path) -> dict[str, Any]:
    spec = load_spec(options.spec).model_dump(mode="json", exclude_unset=True)
    for role in spec["roles"].values():
        role["pool"] = {"pages": options.device_pages}
    memory = parse_bytes(options.host_memory)
    cache: dict[str, Any] = {"device": tiers != "off"}
    if "host" in tiers:
        cache["host"] = {"memory": memory // (_STORAGE_SHARE if "storage" in tiers else 1)}
    if "storage" in tiers:
        storage.mkdir(exist_ok=True)
        of_file = {"path": str(storage), "limit": "20GiB"} if options.storage == "file" else {}
        cache["storage"] = {
            "backend": options.storage,
            "options": {**of_file, **options.storage_options},
            "prefetch": "wait_complete",
        }
    return {**spec, "cache": cache, "name": "bench-multiturn"}


def _converse(
    spec: Path, options: MultiturnOptions, console: Console, on_round: Callable[[int], None]
) -> list[list[Turn]]:
    server = Server(spec)
    try:
        url = server.wait_ready(console)
        model, draw = _model(url, options.seed)
        fresh = _fresh(options, draw)
        prompts: list[list[int]] = [[] for _ in range(options.clients)]
        rounds = []
        _ask(url, model, draw(options.new_tokens), 2)
        with ThreadPoolExecutor(options.clients) as pool:
            for number in range(options.rounds):
                on_round(number)
                for prompt, parts in zip(prompts, fresh, strict=True):
                    prompt += parts[number]
                turns = list(
                    pool.map(
                        lambda prompt: _ask(url, model, prompt, options.output_tokens), prompts
                    )
                )
                for prompt, turn in zip(prompts, turns, strict=True):
                    prompt += turn.tokens
                rounds.append(turns)
        return rounds
    finally:
        server.stop()


def _converse_with_both(
    urls: tuple[str, str], options: MultiturnOptions, on_round: Callable[[int], None]
) -> list[list[tuple[Turn, Turn]]]:
    """By round and client: the turn as each server took it."""
    model, draw = _model(urls[0], options.seed)
    fresh = _fresh(options, draw)
    order = random.Random(options.seed)
    prompts: list[list[int]] = [[] for _ in range(options.clients)]
    rounds = []
    for url in urls:
        for _ in range(_WARM_UP):
            _ask(url, model, draw(options.new_tokens), 2)
            time.sleep(options.pause_s)
    for number in range(options.rounds):
        on_round(number)
        pairs = []
        for prompt, parts in zip(prompts, fresh, strict=True):
            prompt += parts[number]
            turns: dict[str, Turn] = {}
            for url in order.sample(urls, 2):
                turns[url] = _ask(url, model, prompt, options.output_tokens)
                time.sleep(options.pause_s)
            prompt += turns[urls[0]].tokens
            pairs.append((turns[urls[0]], turns[urls[1]]))
        rounds.append(pairs)
    return rounds


def _model(url: str, seed: int) -> tuple[str, Callable[[int], list[int]]]:
    """Its name, and what draws so many random tokens of it."""
    model = get_json(f"{url}/v1/models")["data"][0]
    end = min(_FEW_TOKENS, model["vocab_size"])
    rng = random.Random(seed)
    return model["id"], lambda count: [rng.randrange(_LOWEST_TOKEN, end) for _ in range(count)]


def _fresh(options: MultiturnOptions, draw: Callable[[int], list[int]]) -> list[list[list[int]]]:
    """By client and round, what a turn adds."""
    return [
        [draw(options.new_tokens) for _ in range(options.rounds)] for _ in range(options.clients)
    ]


def _ask(url: str, model: str, prompt: list[int], max_tokens: int) -> Turn:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "return_timings": True,
    }
    start = time.perf_counter()
    first: float | None = None
    tokens: list[int] = []
    timings: dict[str, Any] = {}
    for event in stream_json(f"{url}/v1/completions", body):
        timings = event.get("timings") or timings
        for choice in event.get("choices", ()):
            if choice.get("token_ids"):
                first = first or time.perf_counter()
                tokens += choice["token_ids"]
    if first is None or len(tokens) != max_tokens:
        raise BenchError(f"{len(tokens)} tokens came, expected {max_tokens}")
    host, storage = timings["cached_tokens_host"], timings["cached_tokens_storage"]
    found = max(timings["cached_tokens_prefill"], timings["cached_tokens_decode"])
    cached = {"device": found - host, "host": host - storage, "storage": storage}
    return Turn(first - start, len(prompt), cached, tuple(tokens))


def _paired_summary(pairs: list[tuple[Turn, Turn]]) -> dict[str, Any]:
    base, turns = ([pair[which] for pair in pairs] for which in (0, 1))
    ratios = [turn.ttft_s / of_base.ttft_s for of_base, turn in pairs]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(_SAMPLES))
    return {
        **_summary(turns),
        "base_ttft_p50_s": statistics.median(turn.ttft_s for turn in base),
        "ratio_p50": statistics.median(ratios),
        "ratio_p50_interval": [medians[_SAMPLES // 20], medians[-_SAMPLES // 20]],
        "ratios": ratios,
    }


def _summary(turns: list[Turn]) -> dict[str, Any]:
    times = sorted(turn.ttft_s for turn in turns)
    return {
        "ttft_p50_s": statistics.median(times),
        "ttft_max_s": times[-1],
        "prompt_tokens": sum(turn.prompt_tokens for turn in turns),
        "cached_tokens": {
            tier: sum(turn.cached[tier] for turn in turns) for tier in ("device", "host", "storage")
        },
    }


def print_paired(report: dict[str, Any], console: Console) -> None:
    _print_conditions(report["options"], console)
    console.print(
        f"beside: {report['options']['beside']}; "
        f"one request at a time, each turn of both servers in random order, "
        f"{report['options']['pause_s']:g} s after each",
        highlight=False,
    )
    table = Table(box=None, pad_edge=False)
    for column in (
        "tiers",
        "round",
        "prompt",
        "beside p50",
        "TTFT p50",
        "ratio p50",
        "90 %",
        "max",
        "device",
        "host",
        "storage",
    ):
        table.add_column(column, justify="left" if column == "tiers" else "right")
    for run in report["runs"]:
        for number, one in enumerate(run["rounds"]):
            low, high = one["ratio_p50_interval"]
            cached = one["cached_tokens"]
            table.add_row(
                "" if number else run["tiers"],
                str(number + 1),
                str(one["prompt_tokens"]),
                f"{one['base_ttft_p50_s'] * 1000:.1f} ms",
                f"{one['ttft_p50_s'] * 1000:.1f} ms",
                f"{one['ratio_p50']:.3f}",
                f"{low:.3f} to {high:.3f}",
                f"{max(one['ratios']):.2f}",
                *(str(cached[tier]) for tier in ("device", "host", "storage")),
            )
    console.print(table)
    console.print("prompt, device, host and storage: tokens of all clients, cached where they say")
    _print_inequality(report, console)


def _print_conditions(options: dict[str, Any], console: Console) -> None:
    of_storage = "".join(f" {key}={value}" for key, value in options["storage_options"].items())
    console.print(
        f"{options['clients']} clients, {options['rounds']} rounds of {options['new_tokens']} new "
        f"and {options['output_tokens']} generated tokens; {options['device_pages']} device pages, "
        f"host {options['host_memory']} (a quarter of that beside storage), storage "
        f"{options['storage']}{of_storage}; {options['spec']}",
        highlight=False,
    )


def _print_inequality(report: dict[str, Any], console: Console) -> None:
    if not report["tokens_equal"]:
        console.print("[bold red]the tokens differ between the runs[/bold red]")


def print_multiturn(report: dict[str, Any], console: Console) -> None:
    _print_conditions(report["options"], console)
    table = Table(box=None, pad_edge=False)
    for column in (
        "tiers",
        "round",
        "prompt",
        "TTFT p50",
        "max",
        "to off",
        "device",
        "host",
        "storage",
    ):
        table.add_column(column, justify="left" if column == "tiers" else "right")
    for run in report["runs"]:
        for number, one in enumerate(run["rounds"]):
            cached = one["cached_tokens"]
            table.add_row(
                "" if number else run["tiers"],
                str(number + 1),
                str(one["prompt_tokens"]),
                f"{one['ttft_p50_s'] * 1000:.0f} ms",
                f"{one['ttft_max_s'] * 1000:.0f} ms",
                f"{one['ttft_ratio_to_off']:.2f}",
                *(str(cached[tier]) for tier in ("device", "host", "storage")),
            )
    console.print(table)
    console.print("prompt, device, host and storage: tokens of all clients, cached where they say")
    _print_inequality(report, console)
