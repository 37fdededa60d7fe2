"""Traces replayed at several capacities and orders (`pd replay`): the runs, a table, a picture."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hicache.policy import order_names
from hicache.replay import (
    OPTIMUM,
    ReplayResult,
    Trace,
    TraceError,
    parse_trace,
    replay,
    replay_infinite,
    replay_optimum,
)
from pd.bench.errors import BenchError

CAPACITIES = (1_000, 10_000, 30_000, 50_000, 100_000)


@dataclasses.dataclass(frozen=True, slots=True)
class ReplayOptions:
    capacities: tuple[int, ...] = CAPACITIES
    orders: tuple[str, ...] = order_names()


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
        return {
            "order": result.order,
            "capacity": result.capacity,
            "hits": result.hits,
            "hit_tokens": result.hit_tokens,
            "evictions": result.evictions,
            **{f"{name}_rate": rate for name, rate in self.rates(result).items()},
        }

    def rates(self, result: ReplayResult) -> dict[str, float]:
        return {
            "block": result.hits / self.trace.num_blocks,
            "token": result.hit_tokens / self.trace.num_tokens,
            "work": result.hit_work / self.trace.work,
        }


def check_replay_options(options: ReplayOptions) -> None:
    """Raises BenchError."""
    for order in options.orders:
        if order not in order_names():
            raise BenchError(
                f"--order: found {order!r}, expected one of {', '.join(order_names())}"
            )
    for capacity in options.capacities:
        if capacity < 1:
            raise BenchError(f"--capacity: found {capacity}, expected at least 1 block")


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
    for capacity in options.capacities:
        for order in (*options.orders, OPTIMUM):
            title = f"{capacity:,} blocks, {order}"
            on_progress(title, done)
            if order == OPTIMUM:
                result = replay_optimum(trace, capacity)
            else:
                on_request = functools.partial(_advance, on_progress, title, done)
                result = replay(trace, capacity, order, on_request)
            report.results.append(result)
            done += size
    on_progress("done", done)
    return report


def _advance(on_progress: Callable[[str, int], None], title: str, before: int, done: int) -> None:
    on_progress(title, before + done)


def num_steps(trace: Trace, options: ReplayOptions) -> int:
    return len(trace.requests) * (1 + len(options.capacities) * (1 + len(options.orders)))


def print_replay_report(report: ReplayReport, console: Console) -> None:
    trace = report.trace
    console.print(
        f"{len(trace.requests):,} requests, {trace.num_blocks:,} blocks of {trace.block_tokens} "
        f"tokens, {trace.num_distinct:,} different; {trace.num_tokens:,} tokens\n"
        f"infinite cache: {report.infinite.hits:,} hits",
        highlight=False,
    )
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


def plot_replay_report(report: ReplayReport, path: Path) -> None:
    """Hit rates over capacity. Raises BenchError."""
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("--plot needs matplotlib: pip install 'pagerelay[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BenchError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
