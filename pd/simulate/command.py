"""The `pd simulate` command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pd.command import AsJson, Failure, Key, SpecPath, load_spec, make_console

if TYPE_CHECKING:
    from pd.bench.simulate import SimulateReport
    from pd.spec import Role

Count = Annotated[int | None, typer.Option(min=1, help="Replicas, instead of the spec's minimum.")]


def simulate(
    spec: SpecPath,
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="JSON lines in Mooncake's format.")
    ],
    policy: Annotated[
        list[str],
        typer.Option(
            help="cost, prefix, least_loaded or round_robin; may be given again. Default: all."
        ),
    ] = [],  # noqa: B006
    rate: Annotated[
        list[float],
        typer.Option(help="Times as fast as it was requests arrive; may be given again."),
    ] = [1.0],  # noqa: B006
    prefill: Count = None,
    decode: Count = None,
    both: Count = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of `pd bench profile`.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="Without a profile: what a rank runs on; h200, or FLOPS:MEMORY:LINK a second, the "
            "latter two in bytes."
        ),
    ] = "h200",
    memory: Annotated[
        str, typer.Option(help="Of a device, such as 141GB, where pools take a fraction of it.")
    ] = "",
    ttft: Annotated[
        float | None,
        typer.Option(min=0, help="Objective, in seconds. Default: the spec's, or 2."),
    ] = None,
    tpot: Annotated[
        float | None, typer.Option(min=0, help="Likewise. Default: the spec's, or 0.05.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Only the first ones.")] = None,
    scale_tokens: Annotated[
        float, typer.Option(help="Prompts and outputs are so many times as long.")
    ] = 1.0,
    block_tokens: Annotated[int, typer.Option(min=1, help="Of the trace's blocks.")] = 512,
    against: Annotated[
        str, typer.Option(metavar="URL", help="Put the same load on this server, and compare.")
    ] = "",
    repeats: Annotated[int, typer.Option(min=1, help="With --against.")] = 3,
    key: Key = "",
    start: Annotated[
        float, typer.Option(min=0, help="Seconds until a replica serves that the planner wants.")
    ] = 30.0,
    seed: int = 0,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw latencies and goodput.")
    ] = None,
) -> None:
    """Replay a trace on a simulated cluster of any size: TTFT, TPOT and goodput, by policy.

    Router and leaders are the real ones, on a virtual clock; how long steps and transfers take is
    from a profile.
    """
    from rich.console import Console
    from rich.progress import Progress

    from pd.bench.errors import BenchError
    from pd.bench.simulate import (
        POLICIES,
        WIDTH,
        SimulateOptions,
        load_trace,
        make_profile,
        plot_simulate_report,
        print_simulate_report,
        read_model,
        resized,
        run_simulate,
    )

    if strange := [name for name in policy if name not in POLICIES]:
        expected = ", ".join(POLICIES)
        raise Failure(f"--policy: found {strange[0]!r}, expected one of {expected}", 2)
    for option, values in (("--rate", rate), ("--scale-tokens", [scale_tokens])):
        if any(not value > 0 for value in values):
            raise Failure(f"{option}: found {min(values)}, expected a number above 0", 2)
    replicas: dict[Role, int | None] = {"prefill": prefill, "decode": decode, "both": both}
    loaded = load_spec(spec)
    objectives = loaded.objectives
    options = SimulateOptions(
        tuple(name for name in POLICIES if name in policy) or POLICIES,
        tuple(rate),
        (objectives.ttft or 2.0) if ttft is None else ttft,
        (objectives.tpot or 0.05) if tpot is None else tpot,
        start,
        seed,
    )
    try:
        load = load_trace(trace, block_tokens, requests, scale_tokens)
        loaded = resized(loaded, replicas)
        model = read_model(loaded, memory)
        costs = make_profile(loaded, model, profile, device)
    except BenchError as error:
        raise Failure(str(error), 2) from error

    bar = make_console(stderr=True)
    quiet = not bar.is_terminal
    with Progress(console=bar, refresh_per_second=2, transient=True, disable=quiet) as progress:

        def on_start(title: str, total: int) -> Any:
            task = progress.add_task(title, total=total)
            return lambda done: progress.update(task, completed=done)

        report = run_simulate(loaded, model, costs, load, options, on_start)
    answer = report.to_json()
    console = Console(width=max(WIDTH, make_console().width), soft_wrap=True)
    if not as_json:
        print_simulate_report(report, console)
    try:
        if plot and report.rows:
            plot_simulate_report(report, plot)
        if against and report.rows:
            answer["against"] = _compare(
                report, load, against, key, repeats, seed, console, as_json
            )
    except BenchError as error:
        raise Failure(str(error)) from error
    if as_json:
        print(json.dumps(answer, indent=2))
    if report.interrupted:
        raise typer.Exit(130)


def _compare(
    report: SimulateReport,
    load: Any,
    url: str,
    key: str,
    repeats: int,
    seed: int,
    console: Any,
    quiet: bool,
) -> dict[str, Any]:
    """The first row."""
    import asyncio

    from pd.bench.simulate_against import print_against, run_against

    against = asyncio.run(run_against(report.rows[0], load, url, key, repeats, seed))
    if not quiet:
        console.print()
        print_against(against, console)
    return against.to_json()
