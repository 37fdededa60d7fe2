"""A load run's report on a terminal and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pd.bench.errors import BenchError
from pd.bench.serve import Report, Run
from pd.bench.stats import Distribution, Summary, tpot_s, ttft_s


def print_report(report: Report, console: Console) -> None:
    for key, value in report.conditions.items():
        if value not in (None, "", {}, []):
            text = ", ".join(str(each) for each in value) if isinstance(value, list) else value
            console.print(f"[dim]{key:>12}[/dim]  {text}", highlight=False)
    for run in report.runs:
        _print_run(run, console)
    for mode, values in report.comparisons:
        console.print(f"\n[bold]first / second server[/bold], {mode}")
        for name, value in values.items():
            text = "-" if value is None else f"{value:.3f}"
            console.print(f"  {name:<22}{text:>9}", highlight=False)
    if report.interrupted:
        console.print("\ninterrupted: these are the requests that had ended", style="yellow")


def _print_run(run: Run, console: Console) -> None:
    summary = run.summary
    console.print(f"\n[bold]{run.server}[/bold], {run.mode}", highlight=False)
    table = Table("", "mean", "p50", "p90", "p99", "max", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in _distributions(summary):
        table.add_row(f"{name} (ms)", *(_ms(value) for value in _columns(values)))
    console.print(table)
    console.print(
        f"{summary.output_tokens_per_s:,.1f} tok/s out, {summary.prompt_tokens_per_s:,.1f} in, "
        f"{summary.requests_per_s:,.2f} req/s; {summary.num_ok} requests in "
        f"{summary.duration_s:.1f} s; client's CPU time {run.client_cpu_s:.1f} s",
        highlight=False,
    )
    for message, count in summary.errors.items():
        console.print(f"{count} errors: {message}", style="red", highlight=False, markup=False)


def _distributions(summary: Summary) -> list[tuple[str, Distribution]]:
    return [
        ("TTFT", summary.ttft),
        ("TPOT", summary.tpot),
        ("ITL", summary.itl),
        ("E2E", summary.e2e),
    ]


def _columns(values: Distribution) -> tuple[float | None, ...]:
    return (values.mean, values.p50, values.p90, values.p99, values.max)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:,.2f}"


def plot_report(report: Report, path: Path) -> None:
    """Cumulative TTFT, TPOT and ITL of each run, and throughput. Raises BenchError."""
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("--plot needs matplotlib: pip install 'pagerelay[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    panels: list[tuple[Any, str]] = [
        (axes[0][0], "TTFT (ms)"),
        (axes[0][1], "TPOT (ms)"),
        (axes[1][0], "ITL (ms)"),
    ]
    bars = []
    for run in report.runs:
        label = f"{run.server.removeprefix('http://')}, {run.mode}"
        good = [result for result in run.results if not result.error and result.token_times_s]
        samples: list[list[float]] = [
            [ttft_s(result) for result in good],
            [tpot for result in good if (tpot := tpot_s(result)) is not None],
            [
                later - earlier
                for result in good
                for earlier, later in zip(
                    result.token_times_s, result.token_times_s[1:], strict=False
                )
            ],
        ]
        for (axis, _), values in zip(panels, samples, strict=True):
            ordered = sorted(value * 1000 for value in values)
            share = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
            axis.step(ordered, share, where="post", label=label)
        bars.append((label, run.summary.output_tokens_per_s))
    for axis, title in panels:
        axis.set(xlabel=title, ylabel="share of samples", ylim=(0, 1))
        axis.grid(alpha=0.3)
    if bars:
        panels[0][0].legend(fontsize="small")
    rates = axes[1][1]
    values = [value for _, value in bars]
    drawn = rates.barh(range(len(bars)), values, color=[f"C{i}" for i in range(len(bars))])
    rates.bar_label(drawn, fmt="{:,.0f}", padding=3)
    rates.set(xlabel="output tok/s", yticks=[])
    rates.margins(x=0.15)
    rates.invert_yaxis()
    conditions = report.conditions
    figure.suptitle(f"{conditions['model']}: {conditions['lengths']}; {conditions['machine']}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BenchError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
