"""Traces replayed at several sizes, orders and write policies (`pd replay`): the runs, a table, a
picture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hicache.policy import order_names
from hicache.replay import (
    INFINITE,
    OPTIMUM,
    ReplayResult,
    TierHits,
    Tiers,
    Trace,
    TraceError,
    parse_trace,
    replay,
    replay_infinite,
    replay_optimum,
)
from hicache.writes import WRITE_POLICIES
from pd.bench.errors import BenchError

CAPACITIES = (1_000, 10_000, 30_000, 50_000, 100_000)


@dataclasses.dataclass(frozen=True, slots=True)
class ReplayOptions:
    capacities: tuple[int, ...] = CAPACITIES
    """Of the device tier; all sizes in blocks."""
    orders: tuple[str, ...] = order_names()
    hosts: tuple[int, ...] = ()
    """Sizes of a host tier; empty: there is none."""
    storages: tuple[int, ...] = ()
    """Likewise, behind each host tier."""
    writes: tuple[str, ...] = ("write_through",)
    write_hits: int = 2

    def lower_tiers(self) -> list[tuple[int, int]]:
        """(host, storage); zeros are tiers that are not there."""
        return [(host, storage) for host in self.hosts or (0,) for storage in self.storages or (0,)]


@dataclasses.dataclass(slots=True)
class ReplayReport:
    """Nothing in it depends on when or where it was made."""

    trace: Trace
    infinite: ReplayResult
    results: list[ReplayResult] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        trace = self.trace
        return {
            "trace": {
                "requests": len(trace.requests),
                "block_tokens": trace.block_tokens,
                "blocks": trace.num_blocks,
                "distinct_blocks": trace.num_distinct,
                "tokens": trace.num_tokens,
            },
            "infinite": self._row(self.infinite),
            "results": [self._row(result) for result in self.results],
        }

    def _row(self, result: ReplayResult) -> dict[str, Any]:
        """The hits of all tiers together and, if there are several, of each, and what is left."""
        row: dict[str, Any] = {
            "order": result.order,
            "capacity": _size(result.capacity),
            "hits": result.hits,
            "hit_tokens": result.hit_tokens,
            "evictions": result.evictions,
            **{f"{name}_rate": rate for name, rate in self.rates(result).items()},
        }
        if len(result.tiers) > 1:
            row |= {
                "write": result.write,
                "tiers": [
                    {
                        "tier": tier.name,
                        "capacity": _size(tier.capacity),
                        "hits": tier.hits,
                        "hit_tokens": tier.hit_tokens,
                        "evictions": tier.evictions,
                        **{f"{name}_rate": rate for name, rate in self.rates(tier).items()},
                    }
                    for tier in result.tiers
                ],
                "computed": self.trace.num_blocks - result.hits,
                "computed_tokens": self.trace.num_tokens - result.hit_tokens,
            }
        return row

    def rates(self, hits: ReplayResult | TierHits) -> dict[str, float]:
        return {
            "block": hits.hits / self.trace.num_blocks,
            "token": hits.hit_tokens / self.trace.num_tokens,
            "work": hits.hit_work / self.trace.work,
        }


def _size(blocks: int) -> int | str:
    return "infinite" if blocks == INFINITE else blocks


def check_replay_options(options: ReplayOptions) -> None:
    """Raises BenchError."""
    for order in options.orders:
        if order not in order_names():
            raise BenchError(
                f"--order: found {order!r}, expected one of {', '.join(order_names())}"
            )
    for write in options.writes:
        if write not in WRITE_POLICIES:
            raise BenchError(
                f"--write: found {write!r}, expected one of {', '.join(WRITE_POLICIES)}"
            )
    for option, sizes in (
        ("--capacity", options.capacities),
        ("--host", options.hosts),
        ("--storage", options.storages),
    ):
        for size in sizes:
            if size < 1:
                raise BenchError(f"{option}: found {size}, expected at least 1 block")
    if options.storages and not options.hosts:
        raise BenchError("--storage: expected --host beside it, for blocks come and go through it")
    if options.write_hits < 1:
        raise BenchError(f"--write-hits: found {options.write_hits}, expected at least 1")


def load_trace(path: Path, block_tokens: int) -> Trace:
    """Raises BenchError."""
    try:
        with path.open(encoding="utf-8") as file:
            return parse_trace(file, block_tokens)
    except OSError as error:
        raise BenchError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BenchError(f"{path}: not UTF-8: {error}") from error
    except TraceError as error:
        raise BenchError(f"{path}: {error}") from error


def run_replay(
    trace: Trace,
    options: ReplayOptions,
    on_progress: Callable[[str, int], None] = lambda title, done: None,
) -> ReplayReport:
    """`on_progress(what runs, requests done in all)`; there are `num_steps` of them."""
    check_replay_options(options)
    size = len(trace.requests)
    on_progress("infinite", 0)
    report = ReplayReport(trace, replay_infinite(trace))
    done = size
    for title, order, capacity, tiers in _runs(options):
        on_progress(title, done)
        if order == OPTIMUM:
            result = replay_optimum(trace, capacity, tiers)
        else:
            on_request = functools.partial(_advance, on_progress, title, done)
            result = replay(trace, capacity, order, on_request, tiers)
        report.results.append(result)
        done += size
    on_progress("done", done)
    return report


def _runs(options: ReplayOptions) -> Iterator[tuple[str, str, int, Tiers | None]]:
    """(title, order, capacity, what is below), the optimum last for each set of sizes."""
    for capacity in options.capacities:
        for host, storage in options.lower_tiers():
            sizes = " + ".join(show_size(size) for size in (capacity, host, storage) if size)
            if not host:
                for order in (*options.orders, OPTIMUM):
                    yield f"{sizes} blocks, {order}", order, capacity, None
                continue
            for write in options.writes:
                tiers = Tiers(host, storage, write, options.write_hits)
                for order in options.orders:
                    yield f"{sizes} blocks, {order}, {write}", order, capacity, tiers
            yield f"{sizes} blocks, {OPTIMUM}", OPTIMUM, capacity, Tiers(host, storage)


def _advance(on_progress: Callable[[str, int], None], title: str, before: int, done: int) -> None:
    on_progress(title, before + done)


def num_steps(trace: Trace, options: ReplayOptions) -> int:
    return len(trace.requests) * (1 + sum(1 for _ in _runs(options)))


def show_size(blocks: int) -> str:
    return "infinite" if blocks == INFINITE else f"{blocks:,}"


def print_replay_report(report: ReplayReport, console: Console) -> None:
    trace = report.trace
    console.print(
        f"{len(trace.requests):,} requests, {trace.num_blocks:,} blocks of {trace.block_tokens} "
        f"tokens, {trace.num_distinct:,} different; {trace.num_tokens:,} tokens\n"
        f"infinite cache: {report.infinite.hits:,} hits",
        highlight=False,
    )
    if any(len(result.tiers) > 1 for result in report.results):
        _print_tiers(report, console)
    else:
        _print_orders(report, console)


def _print_orders(report: ReplayReport, console: Console) -> None:
    """One tier: a row for each capacity, a column for each order."""
    orders = list(dict.fromkeys(result.order for result in report.results))
    by_capacity: dict[int, dict[str, ReplayResult]] = {}
    for result in report.results:
        by_capacity.setdefault(result.capacity, {})[result.order] = result
    for measure, title in (
        ("block", "hit rate by block"),
        ("token", "hit rate by token"),
        ("work", "share of the prefill work saved (a block's cost grows with its depth)"),
    ):
        table = Table("blocks", *orders, box=None, pad_edge=False)
        for column in table.columns:
            column.justify = "right"
        for capacity, results in by_capacity.items():
            table.add_row(
                f"{capacity:,}",
                *(f"{report.rates(results[order])[measure]:.2%}" for order in orders),
            )
        rate = report.rates(report.infinite)[measure]
        table.add_row("infinite", *(f"{rate:.2%}" for _ in orders))
        console.print(f"\n[bold]{title}[/bold]")
        console.print(table)


def _print_tiers(report: ReplayReport, console: Console) -> None:
    """Several: a table for each set of sizes, a row for each run, a column for each tier."""
    by_sizes: dict[str, list[ReplayResult]] = {}
    for result in report.results:
        by_sizes.setdefault(_sizes(result), []).append(result)
    for measure in ("block", "token"):
        rate = report.rates(report.infinite)[measure]
        console.print(f"\n[bold]hit rate by {measure}[/bold] (infinite cache: {rate:.2%})")
        for sizes, results in by_sizes.items():
            names = [tier.name for tier in results[0].tiers]
            table = Table("order", "write", *names, "all", "computed", box=None, pad_edge=False)
            for number, column in enumerate(table.columns):
                column.justify = "left" if number < 2 else "right"
                column.min_width = 8
            for result in results:
                rates = [report.rates(tier)[measure] for tier in result.tiers]
                shares = [*rates, sum(rates), 1 - sum(rates)]
                table.add_row(
                    result.order, _short(result.write), *(f"{share:.2%}" for share in shares)
                )
            console.print(f"{sizes} blocks", highlight=False)
            console.print(table)


def _sizes(result: ReplayResult) -> str:
    return " + ".join(show_size(tier.capacity) for tier in result.tiers)


def _short(write: str | None) -> str:
    return (write or "").removeprefix("write_").removeprefix("through_")


def plot_replay_report(report: ReplayReport, path: Path) -> None:
    """Hit rates over capacity; of several tiers, a bar for each run. Raises BenchError."""
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("--plot needs matplotlib: pip install 'pagerelay[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    several = any(len(result.tiers) > 1 for result in report.results)
    figure = (_draw_tiers if several else _draw_orders)(report, pyplot)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BenchError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)


def _draw_orders(report: ReplayReport, pyplot: Any) -> Any:
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained")
    orders = list(dict.fromkeys(result.order for result in report.results))
    for axis, measure, title in zip(
        axes,
        ("block", "token", "work"),
        ("hit rate by block", "hit rate by token", "share of the prefill work saved"),
        strict=True,
    ):
        for order in orders:
            results = sorted(
                (result for result in report.results if result.order == order),
                key=lambda result: result.capacity,
            )
            axis.plot(
                [result.capacity for result in results],
                [report.rates(result)[measure] for result in results],
                "k--" if order == OPTIMUM else "o-",
                label=order,
            )
        axis.axhline(report.rates(report.infinite)[measure], color="grey", label="infinite")
        axis.set(
            xscale="log", xlabel=f"blocks of {report.trace.block_tokens} tokens", ylim=(0, None)
        )
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def _draw_tiers(report: ReplayReport, pyplot: Any) -> Any:
    """Stacked from the device tier on, in the order of the table."""
    results = report.results
    names = [tier.name for tier in max((result.tiers for result in results), key=len)]
    height = 1.5 + 0.25 * len(results)
    figure, axes = pyplot.subplots(1, 2, figsize=(15, height), sharey=True, layout="constrained")
    labels = [
        ", ".join(part for part in (_sizes(result), result.order, _short(result.write)) if part)
        for result in results
    ]
    for axis, measure in zip(axes, ("block", "token"), strict=True):
        left = [0.0] * len(results)
        for number, name in enumerate(names):
            rates = [report.rates(result.tiers[number])[measure] for result in results]
            axis.barh(range(len(results)), rates, left=left, label=name)
            left = [before + rate for before, rate in zip(left, rates, strict=True)]
        axis.axvline(report.rates(report.infinite)[measure], color="grey", label="infinite")
        axis.set(yticks=range(len(results)), yticklabels=labels, title=f"hit rate by {measure}")
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
