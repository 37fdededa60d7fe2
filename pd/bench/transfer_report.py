"""A transfer benchmark's report on a terminal and as a picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pd.bench.errors import BenchError
from pd.bench.transfer import Row, TransferReport
from pd.cost import format_bytes

WIDTH = 124
"""Columns that the table needs."""


def print_transfer_report(report: TransferReport, console: Console) -> None:
    for key, value in report.conditions.items():
        if value not in (None, "", {}, []):
            text = ", ".join(str(each) for each in value) if isinstance(value, list) else value
            console.print(f"[dim]{key:>18}[/dim]  {text}", highlight=False)
    console.print()
    for planning in report.planning:
        console.print(
            f"planning {planning.pair}: {planning.links} links in {planning.make_s * 1e6:,.0f} µs, "
            f"once; {planning.num_pages:,} pages in {planning.writes_s * 1e6:,.1f} µs",
            highlight=False,
        )
    for (backend, pair), rows in itertools.groupby(
        report.rows, key=lambda row: (row.backend, row.pair)
    ):
        console.print(f"\n[bold]{backend}[/bold], {pair}", highlight=False)
        console.print(_table(list(rows)))
    console.print(
        "\npage: tokens; times: medians in ms (post: in the calls that post, where some backends "
        "copy);\nlimit, best: median and best GB/s of the same bytes as one block",
        style="dim",
    )
    for row in report.rows:
        ratio = report.small_ratio(row)
        if ratio is not None:
            console.print(
                f"{row.backend}: pages of 4 KiB move at {ratio:.0%} of its large pages' rate",
                highlight=False,
            )
    if report.interrupted:
        console.print("\ninterrupted: these are the rows that had ended", style="yellow")


def _table(rows: list[Row]) -> Table:
    sizes = ("page", "tokens", "bytes", "descriptors", "each")
    times = ("first", "plan", "post", "wait", "total")
    rates = ("GB/s", "limit", "best", "ratio")
    table = Table("pool", *sizes, *times, *rates, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        table.add_row(
            row.pool,
            str(row.page_tokens),
            f"{row.tokens:,}",
            format_bytes(row.num_bytes),
            f"{row.descriptors:,}",
            format_bytes(row.descriptor_bytes),
            *(_ms(s) for s in (row.first_s, row.plan_s, row.post_s, row.wait_s, row.total_s)),
            _rate(row.gb_per_s),
            _rate(row.limit_gb_per_s),
            _rate(row.limit_best_gb_per_s),
            f"{row.ratio:.0%}",
        )
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.{2 if seconds < 0.1 else 0}f}"


def _rate(gb_per_s: float) -> str:
    return f"{gb_per_s:,.{2 if gb_per_s < 100 else 0}f}"


def plot_transfer_report(report: TransferReport, path: Path) -> None:
    """Each row's rate beside its limit, and where its time went. Raises BenchError."""
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("--plot needs matplotlib: pip install 'pagerelay[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report.rows
    places = range(len(rows))
    labels = [
        f"{row.backend} {row.pair} {row.pool}, {row.tokens:,} tokens,\n"
        f"{row.descriptors:,} x {format_bytes(row.descriptor_bytes)}"
        for row in rows
    ]
    figure, axes = pyplot.subplots(
        1, 2, figsize=(14, 2 + 0.5 * len(rows)), layout="constrained", sharey=True
    )
    rates, times = axes
    colours = {"page-first": "C0", "layer-first": "C1", "4 KiB pages": "C2"}
    drawn = rates.barh(
        places, [row.gb_per_s for row in rows], color=[colours[row.pool] for row in rows]
    )
    rates.bar_label(drawn, fmt="{:,.1f}", padding=3)
    limits = [row.limit_gb_per_s for row in rows]
    rates.plot(limits, places, "k|", markersize=14, label="limit: the same bytes as one block")
    rates.set(xlabel="GB/s", yticks=list(places))
    rates.set_yticklabels(labels, fontsize="small")
    rates.margins(x=0.1)
    rates.invert_yaxis()
    if rows:
        rates.legend(fontsize="small", loc="lower right")
    parts: list[tuple[str, list[float]]] = [
        ("plan", [row.plan_s for row in rows]),
        ("post", [row.post_s for row in rows]),
        ("wait", [row.wait_s for row in rows]),
    ]
    left = [0.0] * len(rows)
    for name, values in parts:
        # Of each byte, so that handovers of all sizes can be compared.
        shares = [s * 1e12 / max(1, row.num_bytes) for s, row in zip(values, rows, strict=True)]
        times.barh(places, shares, left=left, label=name)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    times.set(xlabel="ms a GB")
    times.legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3, axis="x")
    conditions: dict[str, Any] = report.conditions
    figure.suptitle(f"{conditions['model']}; {conditions['memory']}; {conditions['cpu']}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BenchError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
