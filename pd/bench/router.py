"""What a router's decision costs: `pd bench router`; and, with a trace, where its policies send
that load (pd/bench/placement.py). It needs no model, no GPU and no server.

Half of the replicas prefill, half decode. All hold a system prompt; each holds prompts of its own
besides, up to its share of pages. Three kinds of prompts are placed, in turns:

  new      the system prompt, then nothing that anybody holds
  turn     all but the last page is held by two replicas
  popular  each replica holds another number of its pages

A decision is a call of `Router.place`, with the prompt's page hashes at hand. Before each one a
replica reports, which is not counted.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
import platform
import random
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from hicache.replay import Trace
from pd import __version__
from pd.bench.cache import cpu_model, load_average
from pd.bench.errors import BenchError
from pd.bench.placement import PlacementOptions, PlacementRow, simulate_placement
from pd.bench.stats import percentile
from pd.messages import PAGE_KEY_BYTES, PagesHeld, ReplicaLoad
from pd.page_map import PageMap
from pd.router import Policy, Router
from pd.spec import Role

KINDS = ("new", "turn", "popular")
WIDTH = 80
_SYSTEM_PAGES = 16
_MEMORY_PAGES = 100_000
_HASH_REST = bytes(32 - PAGE_KEY_BYTES)


@dataclasses.dataclass(frozen=True, slots=True)
class RouterOptions:
    replicas: tuple[int, ...] = (10, 100, 1000)
    prompt_tokens: tuple[int, ...] = (8192, 131072)
    page_tokens: int = 64
    pages: int = 1_000_000
    """That all replicas hold together, at most; each holds a prompt's at least."""
    decisions: int = 3000
    """By row, of all kinds together."""
    policy: Policy = "cost"
    seed: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.replicas) * len(self.prompt_tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class RouterRow:
    """Times in microseconds."""

    replicas: int
    prompt_tokens: int
    map_pages: int
    p50_us: float
    p99_us: float
    kind_p50_us: dict[str, float]
    kind_p99_us: dict[str, float]


@dataclasses.dataclass(slots=True)
class RouterReport:
    conditions: dict[str, Any]
    rows: list[RouterRow]
    entry_bytes: dict[str, float]
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "interrupted": self.interrupted,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "entry_bytes": self.entry_bytes,
        }


def check_options(options: RouterOptions) -> None:
    """Raises BenchError."""
    if min(options.replicas) < 2:
        raise BenchError(f"--replicas: found {min(options.replicas)}, expected at least 2")
    least = (_SYSTEM_PAGES + 1) * options.page_tokens
    if min(options.prompt_tokens) < least:
        raise BenchError(
            f"--prompt-tokens: found {min(options.prompt_tokens)}, expected at least {least}"
        )


def run_router_bench(
    options: RouterOptions, on_row: Callable[[str, int], None] = lambda title, done: None
) -> RouterReport:
    """`on_row(what comes next, rows done)` is called before each. Ctrl-C ends it early, with what
    there is. Raises BenchError."""
    check_options(options)
    report = RouterReport(_conditions(options), [], {})
    try:
        for replicas in options.replicas:
            for prompt_tokens in options.prompt_tokens:
                on_row(f"{replicas} replicas, {prompt_tokens} tokens", len(report.rows))
                report.rows.append(_measure(options, replicas, prompt_tokens))
        report.entry_bytes = measure_entry_bytes()
    except KeyboardInterrupt:
        report.interrupted = True
    report.conditions["load average after"] = load_average()
    return report


class _World:
    """A router that knows all its replicas."""

    def __init__(self, options: RouterOptions, replicas: int, prompt_tokens: int) -> None:
        self.rng = random.Random(options.seed)
        self.num_pages = prompt_tokens // options.page_tokens
        router = Router(1, options.policy, options.page_tokens, 64)
        assert router.pages is not None
        self.router, self.pages = router, router.pages
        system = [self.rng.randbytes(PAGE_KEY_BYTES) for _ in range(_SYSTEM_PAGES)]
        self.popular = self._prompt(system)
        per_replica = max(options.pages // replicas, self.num_pages)
        prompts = max(2, per_replica // self.num_pages)
        self.turns = [self._prompt(system) for _ in range(min(prompts * replicas // 2, 500))]
        self.system = system
        self.names = [f"{'decode' if n % 2 else 'prefill'}-{n // 2}" for n in range(replicas)]
        for number, name in enumerate(self.names):
            held = [*system, *self.popular[: self.rng.randrange(1, self.num_pages + 1)]]
            # Each prompt is on a prefill replica and on a decode replica.
            for prompt in self.turns[number // 2 :: max(1, replicas // 2)]:
                held += prompt
            held = list(dict.fromkeys(held))
            held += [self.rng.randbytes(PAGE_KEY_BYTES) for _ in range(per_replica - len(held))]
            self._join(name, held)

    def _prompt(self, system: list[bytes]) -> list[bytes]:
        more = self.num_pages - len(system)
        return [*system, *(self.rng.randbytes(PAGE_KEY_BYTES) for _ in range(more))]

    def _join(self, name: str, held: list[bytes]) -> None:
        wanted = self.router.update(name, _role(name), None)
        assert wanted is not None
        self.router.receive_pages(name, PagesHeld(wanted.serial, 1, 0, True, b"".join(held)), 0.0)
        self.report(name)

    def report(self, name: str) -> None:
        rng = self.rng
        running = rng.randrange(60)
        load = ReplicaLoad(
            waiting=rng.randrange(4),
            running=running,
            waiting_tokens=rng.randrange(40_000),
            pages_free=(rng.randrange(1000),),
            pages_cached=(10_000,),
            pages_used=(1000,),
            decode_tokens=30_000,
            finished=100,
            kv_pages=1000,
            kv_seconds=0.05,
            prefill_tokens_per_s=rng.uniform(9000, 11_000),
            decode_s_per_request=rng.uniform(1e-4, 2e-4),
            pages_told=1,
        )
        self.router.update(name, _role(name), load)

    def hashes(self, kind: str) -> bytes:
        rng = self.rng
        match kind:
            case "new":
                prompt = self._prompt(self.system)
            case "turn":
                prompt = [*rng.choice(self.turns)[:-1], rng.randbytes(PAGE_KEY_BYTES)]
            case _:
                prompt = self.popular
        return b"".join(key + _HASH_REST for key in prompt)


def _role(name: str) -> Role:
    return "decode" if name.startswith("decode") else "prefill"


def _measure(options: RouterOptions, replicas: int, prompt_tokens: int) -> RouterRow:
    world = _World(options, replicas, prompt_tokens)
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    clock = time.perf_counter_ns
    gc.collect()
    for number in range(options.decisions):
        kind = KINDS[number % len(KINDS)]
        hashes = world.hashes(kind)
        world.report(world.rng.choice(world.names))
        begin = clock()
        world.router.place(prompt_tokens, hashes)
        times[kind].append((clock() - begin) / 1e3)
    world.pages.check_integrity()
    every = sorted(value for values in times.values() for value in values)
    ordered = {kind: sorted(values) for kind, values in times.items()}
    return RouterRow(
        replicas=replicas,
        prompt_tokens=prompt_tokens,
        map_pages=len(world.pages),
        p50_us=percentile(every, 50),
        p99_us=percentile(every, 99),
        kind_p50_us={kind: percentile(values, 50) for kind, values in ordered.items()},
        kind_p99_us={kind: percentile(values, 99) for kind, values in ordered.items()},
    )


def measure_entry_bytes() -> dict[str, float]:
    """Memory of the map for each page, by tracemalloc: pages that one replica holds, and pages that
    each of 100 holds, told in parts as leaders do."""
    rng = random.Random(0)
    return {
        "one_holder": _entry_bytes([_some_keys(rng)], 1),
        "hundred_holders": _entry_bytes([_some_keys(rng)], 100),
    }


def _some_keys(rng: random.Random) -> bytes:
    return rng.randbytes(_MEMORY_PAGES * PAGE_KEY_BYTES)


def _entry_bytes(parts: list[bytes], holders: int) -> float:
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        pages = PageMap()
        for row in range(holders):
            wanted = pages.join(f"r{row}", row, 0.0)
            for number, part in enumerate(parts):
                is_last = number == len(parts) - 1
                pages.receive(f"r{row}", PagesHeld(wanted.serial, 1, number, is_last, part), 0.0)
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / len(pages)
    finally:
        tracemalloc.stop()


def _conditions(options: RouterOptions) -> dict[str, Any]:
    return {
        "policy": options.policy,
        "decision": "Router.place, page hashes at hand; prompts " + ", ".join(KINDS),
        "replicas": "half prefill, half decode",
        "page": f"{options.page_tokens} tokens",
        "decisions": options.decisions,
        "seed": options.seed,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load average": load_average(),
        "python": platform.python_version(),
        "pagerelay": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def print_router_report(report: RouterReport, console: Console) -> None:
    for key, value in report.conditions.items():
        console.print(f"[dim]{key:>18}[/dim]  {value}", highlight=False)
    console.print()
    table = Table("replicas", "prompt", "map", "p50", "p99", *KINDS)
    table.box = None
    table.pad_edge = False
    for column in table.columns:
        column.justify = "right"
    for row in report.rows:
        by_kind = (f"{row.kind_p50_us[k]:,.0f} / {row.kind_p99_us[k]:,.0f}" for k in KINDS)
        table.add_row(
            f"{row.replicas:,}",
            f"{row.prompt_tokens:,}",
            f"{row.map_pages:,}",
            f"{row.p50_us:,.0f}",
            f"{row.p99_us:,.0f}",
            *by_kind,
        )
    console.print(table)
    console.print("\nprompt: tokens; map: pages; µs; by kind p50 / p99", style="dim")
    if report.entry_bytes:
        one, hundred = report.entry_bytes.values()
        console.print(
            f"memory for each page of the map: {one:,.0f} bytes with one holder, {hundred:,.0f} "
            "with a hundred",
            highlight=False,
        )
    if report.interrupted:
        console.print("\ninterrupted: these are the rows that had ended", style="yellow")


# ---------------------------------------------------------------------------------------- placement


@dataclasses.dataclass(slots=True)
class PlacementReport:
    conditions: dict[str, Any]
    rows: list[PlacementRow]

    def to_json(self) -> dict[str, Any]:
        return {"conditions": self.conditions, "rows": [row.to_json() for row in self.rows]}


def run_placement_bench(
    trace: Trace,
    policies: tuple[Policy, ...],
    speeds: tuple[float, ...],
    options: PlacementOptions,
    on_row: Callable[[str, int], None] = lambda title, done: None,
    on_request: Callable[[int], None] = lambda done: None,
) -> PlacementReport:
    """A row for each speed and policy. Raises BenchError."""
    if options.replicas < 1 or min(speeds) <= 0:
        raise BenchError("--replicas, --speed: expected numbers above 0")
    conditions = {
        "requests": len(trace.requests),
        "tokens": trace.num_tokens,
        "replicas": options.replicas,
        "room": f"{options.room_tokens} tokens in the device tier of each, eviction lru",
        "host": _tier(options.host_room_tokens, options.host_tokens_per_s)
        + (f", by {options.host_replicas} replicas" if options.host_room_tokens else ""),
        "storage": _tier(options.storage_room_tokens, options.storage_tokens_per_s),
        "load": "prompt tokens computed by a replica",
        "seed": options.seed,
    }
    report = PlacementReport(conditions, [])
    for speed in speeds:
        for policy in policies:
            on_row(f"{policy} at {speed:g} tokens/s", len(report.rows))
            one = dataclasses.replace(options, tokens_per_s=speed)
            report.rows.append(simulate_placement(trace, policy, one, on_request))
    return report


def _tier(room_tokens: int, tokens_per_s: float) -> str:
    return f"{room_tokens} tokens, {tokens_per_s:,.0f} a second" if room_tokens else "none"


def print_placement_report(report: PlacementReport, console: Console) -> None:
    for key, value in report.conditions.items():
        console.print(f"[dim]{key:>10}[/dim]  {value}", highlight=False)
    console.print()
    table = Table("tokens/s", "policy", "hit rate", "host", "storage", "max / mean", "TTFT", "p99")
    table.box = None
    table.pad_edge = False
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for row in report.rows:
        table.add_row(
            f"{row.tokens_per_s:,.0f}",
            row.policy,
            f"{row.hit_rate:.4f}",
            f"{row.host_hit_rate:.4f}",
            f"{row.storage_hit_rate:.4f}",
            f"{row.max_over_mean:.4f}",
            f"{row.ttft_mean_s:.3f} s",
            f"{row.ttft_p99_s:.3f} s",
        )
    console.print(table)
    console.print(
        "\ntokens/s: that a replica computes; hit rate: prompt tokens found cached, in any tier "
        "and in these; max / mean: of the tokens that each replica computed; TTFT: waiting, "
        "loading and computing, mean and p99",
        style="dim",
    )
