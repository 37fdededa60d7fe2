"""The `pd bench` commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pd.command import (
    DEFAULT_URL,
    AsJson,
    Failure,
    Key,
    SpecPath,
    Url,
    load_spec,
    make_console,
)

bench = typer.Typer(help="Benchmarks.", no_args_is_help=True)


@bench.command("serve")
def bench_serve(
    url: Url = DEFAULT_URL,
    compare: Annotated[str, typer.Option(help="A second server, under the same load.")] = "",
    key: Key = "",
    model: Annotated[str, typer.Option(help="Default: the server's first.")] = "",
    concurrency: Annotated[str, typer.Option(help="Closed loop: requests at once.")] = "1,16",
    rate: Annotated[
        float | None, typer.Option(help="Open loop: Poisson arrivals, requests a second.")
    ] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="For each load.")] = 64,
    prompt_len: Annotated[
        str, typer.Option(help="Tokens: N, uniform:A:B or lognormal:MEAN:SIGMA.")
    ] = "512",
    output_len: Annotated[str, typer.Option(help="Likewise.")] = "64",
    trace: Annotated[
        Path | None, typer.Option(help="Mooncake JSONL: arrival times and lengths.")
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(min=0, help="For prompts; 0: as the server says, else 1,000.")
    ] = 0,
    seed: int = 0,
    warmup: Annotated[int, typer.Option(min=0, help="Requests before each load.")] = 2,
    deadline: Annotated[float, typer.Option(min=0.001, help="Seconds for a request.")] = 300.0,
    extra_body: Annotated[str, typer.Option(help="JSON merged into each request.")] = "{}",
    json_file: Annotated[
        str, typer.Option("--json", metavar="FILE", help="Write the report; - is stdout.")
    ] = "",
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the distributions.")
    ] = None,
) -> None:
    """Load any OpenAI-compatible server: TTFT, TPOT, ITL, end-to-end, throughput."""
    from pd.bench.errors import BenchError
    from pd.bench.report import plot_report, print_report
    from pd.bench.serve import BenchOptions, parse_lengths, run_bench

    try:
        if rate is not None and rate <= 0:
            raise BenchError(f"--rate: found {rate}, expected a number above 0")
        options = BenchOptions(
            url=url,
            compare=compare,
            model=model,
            key=key,
            concurrency=_parse_concurrency(concurrency),
            rate=rate,
            num_requests=num_requests,
            prompt_lengths=parse_lengths(prompt_len),
            output_lengths=parse_lengths(output_len),
            trace=trace,
            vocab_size=vocab_size,
            seed=seed,
            warmup=warmup,
            deadline_s=deadline,
            extra=_parse_extra(extra_body),
        )
    except BenchError as error:
        raise Failure(str(error), 2) from error

    import uvloop
    from rich.progress import Progress

    console = make_console(stderr=json_file == "-")
    bar = make_console(stderr=True)
    quiet = not bar.is_terminal
    with Progress(console=bar, refresh_per_second=2, transient=True, disable=quiet) as progress:

        def on_start(title: str, total: int) -> Any:
            task = progress.add_task(title, total=total)
            return lambda _: progress.advance(task)

        try:
            report = uvloop.run(run_bench(options, on_start))
        except BenchError as error:
            raise Failure(str(error)) from error
    print_report(report, console)
    text = json.dumps(report.to_json(), indent=2) + "\n"
    try:
        if json_file == "-":
            print(text, end="")
        elif json_file:
            Path(json_file).write_text(text)
        if plot:
            plot_report(report, plot)
    except (OSError, BenchError) as error:
        raise Failure(str(error)) from error
    if report.interrupted:
        raise typer.Exit(130)
    if all(run.summary.num_ok == 0 for run in report.runs):
        raise Failure("no request succeeded")


def _parse_concurrency(text: str) -> tuple[int, ...]:
    from pd.bench.errors import BenchError

    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise BenchError(f"--concurrency: found {text!r}, expected numbers such as 1,16")
    return numbers


def _parse_extra(text: str) -> dict[str, Any]:
    from pd.bench.errors import BenchError

    try:
        extra = json.loads(text)
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise BenchError(f"--extra-body: found {text!r}, expected a JSON object")
    return extra


@bench.command("transfer")
def bench_transfer(
    backend: Annotated[
        list[str], typer.Option(help="nixl, shm, mooncake or ipc; may be given again.")
    ] = ["nixl"],  # noqa: B006
    pair: Annotated[
        list[str], typer.Option(help="Source and target, as tp2pp2:cp4; may be given again.")
    ] = ["tp1:tp1", "tp8:tp4"],  # noqa: B006
    page_tokens: Annotated[
        list[int], typer.Option(min=1, help="Tokens in a page; may be given again.")
    ] = [64, 16],  # noqa: B006
    pool: Annotated[
        list[str],
        typer.Option(help="page-first, layer-first or '4 KiB pages'; may be given again."),
    ] = ["page-first", "layer-first", "4 KiB pages"],  # noqa: B006
    tokens: Annotated[
        list[int],
        typer.Option(
            min=1, help="Of a handover; may be given again. Default: 1,024, and all that fit."
        ),
    ] = [],  # noqa: B006
    size: Annotated[
        str, typer.Option("--bytes", help="Of the pages in all pools of a side.")
    ] = "1GiB",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    layers: Annotated[int, typer.Option(min=1)] = 36,
    kv_heads: Annotated[int, typer.Option(min=1)] = 8,
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    latent: Annotated[bool, typer.Option("--latent", help="MLA: one head, one plane.")] = False,
    option: Annotated[
        list[str], typer.Option(metavar="KEY=VALUE", help="Of the backend; may be given again.")
    ] = [],  # noqa: B006
    seed: int = 0,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the rates.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write transfer.json and transfer.txt.")
    ] = None,
) -> None:
    """Move pages between two processes: rate, time and pieces, beside the machine's own copy."""
    from rich.console import Console
    from rich.progress import Progress

    from pd.bench.errors import BenchError
    from pd.bench.transfer import TransferOptions, plan_cases, run_transfer_bench
    from pd.bench.transfer_report import WIDTH, plot_transfer_report, print_transfer_report
    from pd.spec import parse_bytes

    try:
        if device not in ("cpu", "cuda"):
            raise BenchError(f"--device: found {device!r}, expected cpu or cuda")
        try:
            pool_bytes = parse_bytes(size)
        except ValueError as error:
            raise BenchError(f"--bytes: found {size!r}, {error}") from error
        options = TransferOptions(
            backends=tuple(backend),
            pairs=tuple(pair),
            page_tokens=tuple(page_tokens),
            pools=tuple(pool),
            tokens=tuple(tokens),
            pool_bytes=pool_bytes,
            device="cuda" if device == "cuda" else "cpu",
            repeats=repeats,
            layers=layers,
            kv_heads=kv_heads,
            head_dim=head_dim,
            latent=latent,
            options=tuple(option),
            seed=seed,
        )
        plan_cases(options)
    except BenchError as error:
        raise Failure(str(error), 2) from error

    bar = make_console(stderr=True)
    quiet = not bar.is_terminal
    with Progress(console=bar, refresh_per_second=2, transient=True, disable=quiet) as progress:
        task = progress.add_task("starting", total=None)
        rows = -1

        def on_row(title: str, total: int) -> None:
            nonlocal rows
            rows += 1
            progress.update(task, description=title, total=total, completed=rows)

        try:
            report = run_transfer_bench(options, on_row)
        except BenchError as error:
            raise Failure(str(error)) from error
    text = json.dumps(report.to_json(), indent=2) + "\n"
    if as_json:
        print(text, end="")
    else:
        width = max(WIDTH, make_console().width)
        print_transfer_report(report, Console(width=width, soft_wrap=True))
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
            (out / "transfer.json").write_text(text)
            with (out / "transfer.txt").open("w") as file:
                print_transfer_report(report, Console(file=file, width=WIDTH))
        if plot:
            plot_transfer_report(report, plot)
    except (OSError, BenchError) as error:
        raise Failure(str(error)) from error
    if report.interrupted:
        raise typer.Exit(130)


@bench.command("cache")
def bench_cache(
    page_tokens: Annotated[
        list[int], typer.Option(min=1, help="Tokens in a page; may be given again.")
    ] = [16, 64],  # noqa: B006
    order: Annotated[
        list[str],
        typer.Option(help="lru, lfu, slru, s3fifo or cost; may be given again. Default: all."),
    ] = [],  # noqa: B006
    sessions: Annotated[int, typer.Option(min=1)] = 1000,
    turns: Annotated[int, typer.Option(min=1, help="Of each session.")] = 10,
    turn_tokens: Annotated[int, typer.Option(min=1, help="New tokens of a turn.")] = 512,
    rounds: Annotated[
        bool, typer.Option("--rounds", help="All sessions' first turns, then the second ones...")
    ] = False,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Time the page index on conversations: a turn's median and p99, with ample and scarce room."""
    from rich.console import Console
    from rich.progress import Progress

    from pd.bench.cache import (
        WIDTH,
        CacheOptions,
        check_options,
        print_cache_report,
        run_cache_bench,
    )
    from pd.bench.errors import BenchError

    try:
        options = CacheOptions(
            sessions=sessions,
            turns=turns,
            turn_tokens=turn_tokens,
            page_tokens=tuple(page_tokens),
            orders=tuple(order) or CacheOptions().orders,
            interleaving="rounds" if rounds else "random",
            seed=seed,
        )
        check_options(options)
    except BenchError as error:
        raise Failure(str(error), 2) from error
    bar = make_console(stderr=True)
    quiet = not bar.is_terminal
    with Progress(console=bar, refresh_per_second=2, transient=True, disable=quiet) as progress:
        task = progress.add_task("starting", total=options.num_rows)
        report = run_cache_bench(
            options, lambda title, done: progress.update(task, description=title, completed=done)
        )
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        width = max(WIDTH, make_console().width)
        print_cache_report(report, Console(width=width, soft_wrap=True))
    if report.interrupted:
        raise typer.Exit(130)


@bench.command("router")
def bench_router(
    trace: Annotated[
        Path | None,
        typer.Argument(metavar="[TRACE]", help="JSON lines: place these requests, by policy."),
    ] = None,
    policy: Annotated[
        list[str],
        typer.Option(
            help="cost, prefix, least_loaded or round_robin; may be given again. Default: cost, "
            "with a trace all."
        ),
    ] = [],  # noqa: B006
    replicas: Annotated[
        list[int],
        typer.Option(min=1, help="May be given again. Default: 10, 100, 1000; with a trace 10."),
    ] = [],  # noqa: B006
    prompt_tokens: Annotated[
        list[int], typer.Option(min=1, help="May be given again. Not with a trace.")
    ] = [8192, 131072],  # noqa: B006
    page_tokens: Annotated[int, typer.Option(min=1, help="Not with a trace.")] = 64,
    decisions: Annotated[int, typer.Option(min=100, help="By row. Not with a trace.")] = 3000,
    room: Annotated[
        int, typer.Option(min=1, help="Tokens in each replica's device tier. With a trace.")
    ] = 3_000_000,
    host_room: Annotated[
        int, typer.Option(min=0, help="Tokens in each host tier; 0: none. With a trace.")
    ] = 0,
    host_replicas: Annotated[
        int, typer.Option(min=1, help="Replicas that share a host tier. With a trace.")
    ] = 5,
    storage_room: Annotated[
        int, typer.Option(min=0, help="Tokens in the storage tier; 0: none. With a trace.")
    ] = 0,
    speed: Annotated[
        list[float],
        typer.Option(help="Tokens a second that a replica computes. With a trace; again."),
    ] = [10_000.0],  # noqa: B006
    block_tokens: Annotated[int, typer.Option(min=1, help="Of the trace's blocks.")] = 512,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Time the router's decisions; or, with a trace, say what its policies would have hit."""
    from typing import get_args

    from rich.console import Console
    from rich.progress import Progress

    from hicache.replay import TraceError, parse_trace
    from pd.bench import router as bench_of
    from pd.bench.errors import BenchError
    from pd.bench.placement import PlacementOptions
    from pd.router import Policy

    known: tuple[Policy, ...] = get_args(Policy)
    if strange := [name for name in policy if name not in known]:
        expected = ", ".join(known)
        raise Failure(f"--policy: found {strange[0]!r}, expected one of {expected}", 2)
    policies = tuple(name for name in known if name in policy)
    bar = make_console(stderr=True)
    quiet = not bar.is_terminal
    report: bench_of.RouterReport | bench_of.PlacementReport
    try:
        with Progress(console=bar, refresh_per_second=2, transient=True, disable=quiet) as progress:
            task = progress.add_task("starting", total=None)

            def on_row(title: str, done: int) -> None:
                progress.update(task, description=title)

            if trace is None:
                options = bench_of.RouterOptions(
                    replicas=tuple(replicas) or bench_of.RouterOptions().replicas,
                    prompt_tokens=tuple(prompt_tokens),
                    page_tokens=page_tokens,
                    decisions=decisions,
                    policy=policies[0] if policies else "cost",
                    seed=seed,
                )
                report = bench_of.run_router_bench(options, on_row)
            else:
                placing = PlacementOptions(
                    replicas=replicas[0] if replicas else 10,
                    room_tokens=room,
                    host_room_tokens=host_room,
                    host_replicas=host_replicas,
                    storage_room_tokens=storage_room,
                    seed=seed,
                )
                with trace.open(encoding="utf-8") as lines:
                    requests = parse_trace(lines, block_tokens)
                report = bench_of.run_placement_bench(
                    requests, policies or known, tuple(speed), placing, on_row
                )
    except (BenchError, TraceError) as error:
        raise Failure(str(error), 2) from error
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{trace}: cannot be read: {error}", 2) from error
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
        return
    console = Console(width=max(bench_of.WIDTH, make_console().width), soft_wrap=True)
    match report:
        case bench_of.RouterReport():
            bench_of.print_router_report(report, console)
        case bench_of.PlacementReport():
            bench_of.print_placement_report(report, console)


@bench.command("multiturn")
def bench_multiturn(
    spec: Annotated[Path, typer.Argument(help="Its cluster is started for each set of tiers.")],
    clients: Annotated[int, typer.Option(min=1, help="Conversations at once.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each.")] = 4,
    new_tokens: Annotated[int, typer.Option(min=1, help="That a turn adds.")] = 160,
    output_tokens: Annotated[int, typer.Option(min=1, help="That a turn generates.")] = 16,
    device_pages: Annotated[int, typer.Option(min=2, help="Of each replica's pool.")] = 160,
    host_memory: Annotated[str, typer.Option(help="Of the host tier.")] = "256MiB",
    storage: Annotated[str, typer.Option(help="Backend of the storage tier.")] = "file",
    storage_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Of that backend. Repeatable.")
    ] = None,
    tiers: Annotated[
        list[str] | None,
        typer.Option(help="Only these, beside off: such as 'device + host'. Repeatable."),
    ] = None,
    paired: Annotated[
        bool,
        typer.Option(help="Ask each turn of a server without a cache as well, one at a time."),
    ] = False,
    pause: Annotated[float, typer.Option(min=0, help="Seconds after each paired request.")] = 0.3,
    beside: Annotated[
        str, typer.Option(help="Of --paired: off, or never (keeps the same, but loads nothing).")
    ] = "off",
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Time conversations with the cache off, and with one, two and three tiers."""
    from rich.console import Console

    from pd.bench.errors import BenchError
    from pd.bench.multiturn import (
        TIERS,
        WIDTH,
        MultiturnOptions,
        print_multiturn,
        print_paired,
        run_multiturn,
        run_paired,
    )
    from pd.bench.server import ServerError
    from pd.http_client import HttpError
    from pd.spec import SpecError

    for text in storage_option or ():
        if "=" not in text:
            raise Failure(f"--storage-option: found {text!r}, expected KEY=VALUE", 2)
    if beside not in ("off", "never"):
        raise Failure(f"--beside: found {beside!r}, expected off or never", 2)
    options = MultiturnOptions(
        spec,
        clients,
        rounds,
        new_tokens,
        output_tokens,
        device_pages,
        host_memory,
        storage,
        dict(text.split("=", 1) for text in storage_option or ()),
        tuple(tiers or TIERS),
        pause,
        "never" if beside == "never" else "off",
        seed,
    )
    console = make_console(stderr=True)
    try:
        report = (run_paired if paired else run_multiturn)(
            options,
            console,
            lambda tiers, number: console.print(f"{tiers}: round {number + 1}", highlight=False),
        )
    except SpecError as error:
        raise Failure(str(error), 2) from error
    except (BenchError, ServerError, HttpError, ValueError) as error:
        raise Failure(str(error), 1) from error
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        wide = Console(width=max(WIDTH, make_console().width), soft_wrap=True)
        (print_paired if paired else print_multiturn)(report, wide)
    if not report["tokens_equal"]:
        raise typer.Exit(1)


@bench.command("step")
def bench_step(
    shape: Annotated[str, typer.Option(help="qwen3-8b or tiny; weights are random.")] = "qwen3-8b",
    topology: Annotated[str, typer.Option(help="Of the replica, as tp2 or tp2pp2cp2.")] = "tp1",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    page_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a page.")] = 64,
    prompt: Annotated[
        list[int], typer.Option(min=1, help="Tokens of a prefill; may be given again.")
    ] = [8192],  # noqa: B006
    chunk: Annotated[int, typer.Option(min=1, help="Most tokens of a step.")] = 8192,
    batch: Annotated[
        list[int], typer.Option(min=1, help="Requests of a decode step; may be given again.")
    ] = [1, 16, 64],  # noqa: B006
    context: Annotated[
        list[int], typer.Option(min=1, help="Tokens of each of them; may be given again.")
    ] = [1024, 8192],  # noqa: B006
    sampled: Annotated[
        bool, typer.Option("--sampled", help="Draw tokens (top-k and top-p), not the likeliest.")
    ] = False,
    repeats: Annotated[int, typer.Option(min=1)] = 10,
    check: Annotated[
        bool, typer.Option("--check", help="Compare logits with float32 arithmetic.")
    ] = False,
    ttft: Annotated[
        list[int],
        typer.Option(min=1, help="Tokens of a request whose first tokens are timed; likewise."),
    ] = [],  # noqa: B006
    backend: Annotated[
        list[str], typer.Option(help="Between two replicas, with --ttft; may be given again.")
    ] = ["nixl"],  # noqa: B006
    steps: Annotated[bool, typer.Option(help="Time steps.")] = True,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Time the engine's steps without a server: where the time goes, and what the floor is."""
    from rich.console import Console

    from pd.bench.errors import BenchError
    from pd.bench.step import StepOptions, run_step_bench
    from pd.bench.step_report import WIDTH, print_step_report
    from pd.bench.transfer import parse_topology

    try:
        if device not in ("cpu", "cuda"):
            raise BenchError(f"--device: found {device!r}, expected cpu or cuda")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise BenchError(f"--dtype: found {dtype!r}, expected bfloat16, float16 or float32")
        options = StepOptions(
            shape=shape,
            topology=parse_topology(topology, "--topology"),
            device="cuda" if device == "cuda" else "cpu",
            dtype=dtype,  # type: ignore[arg-type]
            page_tokens=page_tokens,
            prompts=tuple(prompt) if steps else (),
            chunk=chunk,
            batches=tuple(batch) if steps else (),
            contexts=tuple(context) if steps else (),
            sampled=sampled,
            repeats=repeats,
            check=check,
            ttft=tuple(ttft),
            backends=tuple(backend),
            seed=seed,
        )
    except BenchError as error:
        raise Failure(str(error), 2) from error
    bar = make_console(stderr=True)
    with bar.status("starting") as status:
        try:
            report = run_step_bench(options, status.update)
        except BenchError as error:
            raise Failure(str(error)) from error
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print_step_report(report, Console(width=max(WIDTH, make_console().width), soft_wrap=True))


@bench.command("profile")
def bench_profile(
    spec: SpecPath,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Where it is written.")] = Path(
        "profile.json"
    ),
    longest: Annotated[int, typer.Option(min=64, help="Tokens of the longest prompts.")] = 2048,
    batch: Annotated[
        list[int], typer.Option(min=1, help="Requests at once; may be given again.")
    ] = [1, 2, 4, 8, 16],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Start a cluster and fit to it what `pd simulate --profile` wants to know."""
    from pd.bench.errors import BenchError
    from pd.bench.profile import ProfileOptions, run_profile
    from pd.bench.server import ServerError
    from pd.http_client import HttpError

    loaded = load_spec(spec)
    console = make_console(stderr=True)
    options = ProfileOptions(longest, tuple(batch), repeats, seed)
    try:
        report = run_profile(spec, loaded, options, console)
        text = json.dumps(report.to_json(), indent=2) + "\n"
        out.write_text(json.dumps(report.to_json()["profile"], indent=2) + "\n")
    except (BenchError, ServerError, HttpError, OSError) as error:
        raise Failure(str(error)) from error
    if as_json:
        print(text, end="")
    else:
        report.print(make_console())
        print(f"written to {out}")
