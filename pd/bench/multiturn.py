"""Conversations of several turns, with the cache off and with one, two and three tiers:
`pd bench multiturn SPEC`.

The spec's cluster is started once for each set of tiers, with device pools that hold only a part of
what all conversations need. Each client has one conversation; a round is one turn of each, all at
once, and begins when the last of the round before has ended. The same prompts and greedy decoding
everywhere, so that only the cache differs. Time to first token is what the client sees. With three
tiers the host tier has a quarter of its size, so that storage has something to do.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pd.bench.errors import BenchError
from pd.bench.server import Server
from pd.http_client import get_json, stream_json
from pd.spec import load_spec, parse_bytes

TIERS = ("off", "device", "device + host", "device + host + storage")
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
    if min(options.clients, options.rounds, options.new_tokens, options.output_tokens) < 1:
        raise BenchError("clients, rounds, new and output tokens: expected at least 1 of each")
    runs: list[dict[str, Any]] = []
    outputs: list[list[tuple[int, ...]]] = []
    with tempfile.TemporaryDirectory(prefix="pagerelay-bench-") as folder:
        for tiers in TIERS:
            spec = Path(folder) / f"{len(runs)}.yaml"
            spec.write_text(yaml.safe_dump(_spec(options, tiers, Path(folder) / "storage")))
            rounds = _converse(spec, options, console, functools.partial(on_round, tiers))
            outputs.append([turn.tokens for turns in rounds for turn in turns])
            runs.append({"tiers": tiers, "rounds": [_summary(turns) for turns in rounds]})
    base = runs[0]["rounds"]
    for run in runs:
        for one, of_base in zip(run["rounds"], base, strict=True):
            one["ttft_ratio_to_off"] = one["ttft_p50_s"] / of_base["ttft_p50_s"]
    return {
        "options": {**dataclasses.asdict(options), "spec": str(options.spec)},
        "tokens_equal": all(tokens == outputs[0] for tokens in outputs),
        "runs": runs,
    }


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
        file = {"path": str(storage), "limit": "20GiB"}
        cache["storage"] = {"backend": "file", "options": file, "prefetch": "wait_complete"}
    return {**spec, "cache": cache, "name": "bench-multiturn"}


def _converse(
    spec: Path, options: MultiturnOptions, console: Console, on_round: Callable[[int], None]
) -> list[list[Turn]]:
    server = Server(spec)
    try:
        url = server.wait_ready(console)
        model = get_json(f"{url}/v1/models")["data"][0]["id"]
        rng = random.Random(options.seed)
        fresh = [
            [
                [rng.randrange(10, 1000) for _ in range(options.new_tokens)]
                for _ in range(options.rounds)
            ]
            for _ in range(options.clients)
        ]
        prompts: list[list[int]] = [[] for _ in range(options.clients)]
        rounds = []
        _ask(url, model, [rng.randrange(10, 1000) for _ in range(options.new_tokens)], 2)
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


def print_multiturn(report: dict[str, Any], console: Console) -> None:
    options = report["options"]
    console.print(
        f"{options['clients']} clients, {options['rounds']} rounds of {options['new_tokens']} new "
        f"and {options['output_tokens']} generated tokens; {options['device_pages']} device pages, "
        f"host {options['host_memory']} (a quarter of that beside storage); {options['spec']}",
        highlight=False,
    )
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
    if not report["tokens_equal"]:
        console.print("[bold red]the tokens differ between the runs[/bold red]")
