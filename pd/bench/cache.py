"""What a turn of a conversation costs in the page index: `pd bench cache`, or, without the command
installed, `python -m pd.bench.cache`. It needs no model, no GPU and no server.

Sessions take turns: each turn adds new tokens to the session's prompt and goes through all that a
leader asks of the index for it: hash the new pages (the chain of earlier turns is kept), match,
acquire, allocate (and evict), insert, release. One layer group with full attention. One process;
the clock is read between the steps, which is part of what they take.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import itertools
import os
import platform
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from hicache.index import PageIndex
from hicache.keys import page_hashes, root_hash
from hicache.policy import order_names
from pd import __version__
from pd.bench.errors import BenchError
from pd.bench.stats import percentile
from transfer.layout import LayerGroup

Room = Literal["ample", "scarce"]
Interleaving = Literal["random", "rounds"]

STEPS = ("hash", "match", "acquire", "allocate", "insert", "release")
_SCARCE = 4
"""One page in so many has room."""
_MEMORY_SESSIONS = 100

WIDTH = 120
"""Columns that the table needs."""


@dataclasses.dataclass(frozen=True, slots=True)
class CacheOptions:
    sessions: int = 1000
    turns: int = 10
    turn_tokens: int = 512
    page_tokens: tuple[int, ...] = (16, 64)
    orders: tuple[str, ...] = order_names()
    rooms: tuple[Room, ...] = get_args(Room)
    interleaving: Interleaving = "random"
    """Of the sessions' turns: any session's next one, or all first turns before any second."""
    seed: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.page_tokens) * len(self.rooms) * len(self.orders)


@dataclasses.dataclass(frozen=True, slots=True)
class CacheRow:
    """One order at one page size and room. Times in microseconds."""

    page_tokens: int
    room: Room
    order: str
    num_pages: int
    """The pool's."""
    turns: int
    hit_rate: float
    """Pages matched, of all pages of the prompts."""
    evictions: int
    p50_us: float
    p99_us: float
    mean_us: float
    step_p50_us: dict[str, float]


@dataclasses.dataclass(slots=True)
class CacheReport:
    conditions: dict[str, Any]
    rows: list[CacheRow]
    entry_bytes: dict[int, dict[str, float]]
    """By page size: memory of the index for each cached page, with and without its hash."""
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "interrupted": self.interrupted,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "entry_bytes": {str(page): sizes for page, sizes in self.entry_bytes.items()},
        }


def check_options(options: CacheOptions) -> None:
    """Raises BenchError."""
    for name, value in (
        ("--sessions", options.sessions),
        ("--turns", options.turns),
        ("--turn-tokens", options.turn_tokens),
        ("--page-tokens", min(options.page_tokens)),
    ):
        if value < 1:
            raise BenchError(f"{name}: found {value}, expected at least 1")
    for order in options.orders:
        if order not in order_names():
            raise BenchError(
                f"--order: found {order!r}, expected one of {', '.join(order_names())}"
            )
    for page_tokens in options.page_tokens:
        if _pages_in_all(options, page_tokens) < _SCARCE * _prompt_pages(options, page_tokens):
            raise BenchError(
                f"--sessions: found {options.sessions}, expected at least {_SCARCE}, each of at "
                f"least a page of {page_tokens} tokens"
            )


def _prompt_pages(options: CacheOptions, page_tokens: int) -> int:
    """Of a session's last turn."""
    return max(1, options.turns * options.turn_tokens // page_tokens)


def _pages_in_all(options: CacheOptions, page_tokens: int) -> int:
    return options.sessions * (options.turns * options.turn_tokens // page_tokens)


def run_cache_bench(
    options: CacheOptions, on_row: Callable[[str, int], None] = lambda title, done: None
) -> CacheReport:
    """Measure all rows. `on_row(what comes next, rows done)` is called before each. Ctrl-C ends it
    early, with what there is. Raises BenchError."""
    check_options(options)
    report = CacheReport(conditions=_conditions(options), rows=[], entry_bytes={})
    rng = np.random.default_rng(options.seed)
    shape = (options.sessions, options.turns * options.turn_tokens)
    tokens = rng.integers(0, 150_000, shape, dtype=np.int32)
    try:
        for page_tokens in options.page_tokens:
            for room in options.rooms:
                for order in options.orders:
                    on_row(f"pages of {page_tokens}, {room}, {order}", len(report.rows))
                    report.rows.append(_measure(options, tokens, page_tokens, room, order))
            report.entry_bytes[page_tokens] = measure_entry_bytes(tokens, page_tokens)
    except KeyboardInterrupt:
        report.interrupted = True
    report.conditions["load average after"] = load_average()
    return report


def plan_turns(options: CacheOptions) -> Iterator[int]:
    """The session of each turn, in order."""
    sessions = [session for _ in range(options.turns) for session in range(options.sessions)]
    if options.interleaving == "random":
        random.Random(options.seed).shuffle(sessions)
    return iter(sessions)


def _measure(
    options: CacheOptions,
    tokens: np.ndarray[Any, np.dtype[np.int32]],
    page_tokens: int,
    room: Room,
    order: str,
) -> CacheRow:
    total = _pages_in_all(options, page_tokens)
    num_pages = total if room == "ample" else total // _SCARCE
    group = LayerGroup("full", (0,), kv_heads=1, head_dim=1)
    index = PageIndex([group], [num_pages + 1], page_tokens, order=order)
    root = root_hash("bench")
    chains: list[list[bytes]] = [[] for _ in range(options.sessions)]
    lengths = [0] * options.sessions
    steps_ns: list[tuple[int, ...]] = []
    num_pages_asked = num_pages_matched = 0
    clock = time.perf_counter_ns
    gc.collect()
    for session in plan_turns(options):
        chain = chains[session]
        lengths[session] += options.turn_tokens
        new = tokens[session, len(chain) * page_tokens : lengths[session]]

        started = clock()
        chain += page_hashes(new, page_tokens, chain[-1] if chain else root)
        hashed = clock()
        hit = index.match(chain)
        matched = clock()
        (table,) = index.acquire(chain[:hit])
        acquired = clock()
        slots = index.allocate(0, len(chain) - hit)
        allocated = clock()
        assert slots is not None
        index.insert(chain[hit - 1] if hit else root, chain[hit:], [slots], hit)
        inserted = clock()
        table += slots
        index.release(0, table)
        released = clock()

        times = (started, hashed, matched, acquired, allocated, inserted, released)
        steps_ns.append(tuple(b - a for a, b in itertools.pairwise(times)))
        num_pages_asked += len(chain)
        num_pages_matched += hit
    index.check_integrity()
    turns_us = sorted(sum(steps) / 1e3 for steps in steps_ns)
    by_step = [sorted(values) for values in zip(*steps_ns, strict=True)]
    return CacheRow(
        page_tokens=page_tokens,
        room=room,
        order=order,
        num_pages=num_pages,
        turns=len(turns_us),
        hit_rate=num_pages_matched / max(1, num_pages_asked),
        evictions=index.evictions,
        p50_us=percentile(turns_us, 50),
        p99_us=percentile(turns_us, 99),
        mean_us=sum(turns_us) / len(turns_us),
        step_p50_us={
            name: percentile(values, 50) / 1e3 for name, values in zip(STEPS, by_step, strict=True)
        },
    )


def measure_entry_bytes(
    tokens: np.ndarray[Any, np.dtype[np.int32]], page_tokens: int
) -> dict[str, float]:
    """Memory that the index takes for each cached page, by tracemalloc: of a full pool, pool and
    all, `lru`. The hash is counted where nobody else keeps it."""
    sessions = tokens[:_MEMORY_SESSIONS]
    per_session = sessions.shape[1] // page_tokens
    count = len(sessions) * per_session
    group = LayerGroup("full", (0,), kv_heads=1, head_dim=1)
    root = root_hash("bench")
    chains = [page_hashes(row, page_tokens, root) for row in sessions]
    turn = -(-per_session // 10)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index = PageIndex([group], [count + 1], page_tokens)
        for chain in chains:
            for begin in range(0, per_session, turn):
                hashes = chain[begin : begin + turn]
                (table,) = index.acquire(chain[:begin])
                slots = index.allocate(0, len(hashes))
                assert slots is not None
                index.insert(chain[begin - 1] if begin else root, hashes, [slots], begin)
                index.release(0, table + slots)
        del table, slots, hashes
        gc.collect()
        without = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    return {"without_hash": without, "with_hash": without + sys.getsizeof(chains[0][0])}


def _conditions(options: CacheOptions) -> dict[str, Any]:
    mean = options.turn_tokens * (options.turns + 1) // 2
    return {
        "load": f"{options.sessions:,} sessions x {options.turns} turns x {options.turn_tokens} "
        f"new tokens: mean prompt {mean:,}",
        "turns": "in random order" if options.interleaving == "random" else "in rounds",
        "room": f"ample: for all pages; scarce: for one in {_SCARCE}",
        "turn": ", ".join(STEPS),
        "hashes": "each page once; the caller keeps the chain",
        "seed": options.seed,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load average": load_average(),
        "python": platform.python_version(),
        "pagerelay": __version__,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        return platform.machine()
    return names[0] if names else platform.machine()


def load_average() -> str:
    return " ".join(f"{load:.2f}" for load in os.getloadavg())


def print_cache_report(report: CacheReport, console: Console) -> None:
    for key, value in report.conditions.items():
        console.print(f"[dim]{key:>18}[/dim]  {value}", highlight=False)
    console.print()
    table = Table("page", "room", "order", "hits", "evicted", "p50", "p99", "mean", *STEPS)
    table.box = None
    table.pad_edge = False
    for column in table.columns[3:]:
        column.justify = "right"
    for row in report.rows:
        table.add_row(
            str(row.page_tokens),
            row.room,
            row.order,
            f"{row.hit_rate:.1%}",
            f"{row.evictions:,}",
            *(f"{value:,.1f}" for value in (row.p50_us, row.p99_us, row.mean_us)),
            *(f"{row.step_p50_us[step]:,.1f}" for step in STEPS),
        )
    console.print(table)
    console.print(
        "\npage: tokens; p50, p99, mean: of a whole turn, in µs; then each step's median",
        style="dim",
    )
    for page_tokens, sizes in report.entry_bytes.items():
        console.print(
            f"memory for each cached page of {page_tokens}: {sizes['without_hash']:,.0f} bytes, "
            f"{sizes['with_hash']:,.0f} with its hash",
            highlight=False,
        )
    if report.interrupted:
        console.print("\ninterrupted: these are the rows that had ended", style="yellow")


if __name__ == "__main__":
    from pd.cli import main

    sys.argv[1:1] = ["bench", "cache"]
    main()
