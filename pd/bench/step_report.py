"""A step benchmark's report on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pd.bench.step import StepReport, StepRow
from pd.cost import format_bytes

WIDTH = 132
"""Columns that the table needs."""
_PURPOSES = ("attention", "pages", "products", "collectives", "other")


def print_step_report(report: StepReport, console: Console) -> None:
    for key, value in report.conditions.items():
        if value not in (None, ""):
            console.print(f"[dim]{key:>14}[/dim]  {value}", highlight=False)
    if (ceilings := report.ceilings) is not None:
        console.print(
            f"[dim]{'ceilings':>14}[/dim]  copy {ceilings.copy_bytes_s / 1e9:,.0f} GB/s, read and "
            f"written; matrix product {ceilings.matmul_flops_s / 1e12:,.2f} TFLOP/s",
            highlight=False,
        )
    if report.rows:
        console.print()
        console.print(_steps(report.rows))
        console.print(
            "\ntimes: ms, medians; floor: what reading or calculating takes at the ceilings; then "
            "where the\nfirst rank's time goes; pages: writing and gathering; gap: nothing runs",
            style="dim",
        )
    for skipped in report.skipped:
        console.print(f"left out: {skipped}", style="yellow")
    if (check := report.check) is not None:
        console.print(
            f"logits against float32 on one rank: relative error {check.all_ranks:.2e}, of one "
            f"rank {check.one_rank:.2e}; best tokens alike {check.same_tokens:.0%}",
            highlight=False,
        )
    if report.ttft:
        console.print()
        console.print(_first_tokens(report))
        console.print(
            "\nms after submission to the client, medians; exposed: after the first token, until "
            "all pages were there",
            style="dim",
        )


def _steps(rows: list[StepRow]) -> Table:
    names = ("step", "best", "floor", "of", "x", *_PURPOSES, "gap", "launches")
    table = _table(("step of", "tokens", *names))
    for row in rows:
        table.add_row(
            "prefill" if row.what == "prefill" else f"decode x {row.requests}",
            f"{row.tokens:,}",
            *(_ms(seconds) for seconds in (row.step_s, row.best_s, row.floor_s)),
            row.bound,
            f"{row.step_s / row.floor_s:.1f}",
            *(_ms(row.profile.seconds[name]) for name in _PURPOSES),
            _ms(row.gap_s),
            f"{row.profile.launches:,.0f}",
        )
    return table


def _first_tokens(report: StepReport) -> Table:
    table = _table(
        ("replicas", "tokens", "first", "second", "later", "prefill", "exposed", "bytes moved")
    )
    for row in report.ttft:
        times = (row.first_s, row.second_s, row.later_s, row.prefill_s, row.exposed_s)
        table.add_row(
            row.replicas, f"{row.tokens:,}", *map(_ms, times), format_bytes(row.moved_bytes)
        )
    return table


def _table(columns: tuple[str, ...]) -> Table:
    table = Table(*columns, box=None, pad_edge=False)
    for number, column in enumerate(table.columns):
        column.no_wrap = True
        if number:
            column.justify = "right"
    return table


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.{2 if seconds < 0.1 else 0}f}"
