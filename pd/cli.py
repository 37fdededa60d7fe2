"""The `pd` command.

Heavy modules (ray, torch, transformers, aiohttp) are imported by the command that needs them, so
that `pd --help` and `pd status` answer at once. Errors are one line on stderr: exit code 2 for what
the user wrote, 1 for what failed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pd.cost import Cost, RankParts
    from pd.spec import ClusterSpec, Role

DEFAULT_URL = "http://127.0.0.1:8000"

app = typer.Typer(
    name="pd",
    help="Serve large language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Benchmarks.", no_args_is_help=True)
app.add_typer(bench, name="bench")
cache = typer.Typer(
    help="The tiers of a running cluster's cache: pages, hits, storage.",
    invoke_without_command=True,
)
app.add_typer(cache, name="cache")

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="A cluster spec (YAML).")]
Url = Annotated[str, typer.Option(help="A running server.")]
Key = Annotated[str, typer.Option(envvar="PAGERELAY_API_KEY", help="API key.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class _Failure(Exception):
    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def main() -> None:
    try:
        app()
    except _Failure as failure:
        print(f"pd: {failure}", file=sys.stderr)
        sys.exit(failure.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `pd status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _load_spec(path: Path) -> ClusterSpec:
    from pd.spec import SpecError, load_spec

    try:
        return load_spec(path)
    except SpecError as error:
        raise _Failure(str(error).replace("\n", "\npd: "), 2) from error


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, soft_wrap=True)


# -------------------------------------------------------------------------------------------- serve


@app.command()
def serve(
    spec: SpecPath,
    host: Annotated[str | None, typer.Option(help="Instead of api.host.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of api.port.")] = None,
) -> None:
    """Start a cluster and serve until Ctrl-C or SIGTERM."""
    loaded = _load_spec(spec)
    changes = {"host": host, "port": port}
    api = loaded.api.model_copy(update={k: v for k, v in changes.items() if v is not None})
    loaded = loaded.model_copy(update={"api": api})

    from pd.cluster.controller import StartError
    from pd.cluster.controller import serve as run
    from pd.cost import UnsupportedModelError
    from pd.models import ModelError
    from pd.spec import SpecError

    def progress(message: str) -> None:
        print(f"  {message}", file=sys.stderr, flush=True)

    def ready(url: str) -> None:
        shape = ", ".join(f"{role.replicas.min} {name}" for name, role in loaded.roles.items())
        print(f"ready: {url} ({loaded.name}: {shape})", flush=True)

    try:
        run(loaded, progress, ready)
    except (SpecError, ModelError, UnsupportedModelError) as error:
        raise _Failure(str(error), 2) from error
    except StartError as error:
        raise _Failure(str(error)) from error


# -------------------------------------------------------------------------------------------- check


@app.command()
def check(spec: SpecPath, as_json: AsJson = False) -> None:
    """Print the resolved spec and what it costs: ranks, pages, memory, the longest context."""
    loaded = _load_spec(spec)
    from pd.cost import UnsupportedModelError, describe, estimate_cost, load_config, weights_bytes
    from pd.models import ModelError, resolve_model
    from pd.spec import SpecError

    def progress(message: str) -> None:
        print(f"  {message}", file=sys.stderr, flush=True)

    try:
        folder = resolve_model(loaded.model.path, progress=progress, weights=False)
        config = load_config(folder)
        weights = weights_bytes(folder, loaded.model.dtype)
        parts = _rank_parts(loaded, config)
        cost = estimate_cost(loaded, config, weights, _free_memory(loaded), parts)
    except (SpecError, ModelError, UnsupportedModelError) as error:
        raise _Failure(f"{spec}: {error}", 2) from error
    resolved = loaded.model_dump(mode="json")
    resolved["api"]["keys"] = ["***"] * len(loaded.api.keys)
    resolved["api"]["tenants"] = {
        tenant: ["***"] * len(keys) for tenant, keys in loaded.api.tenants.items()
    }
    if as_json:
        print(json.dumps({"spec": resolved, "cost": describe(cost)}, indent=2))
        return
    import yaml

    print(yaml.safe_dump(resolved, sort_keys=False, default_flow_style=False))
    _print_cost(cost, _console())


def _rank_parts(spec: ClusterSpec, config: Any) -> dict[Role, RankParts]:
    """Of the roles with several ranks."""
    shapes = {role: each.topology for role, each in spec.roles.items()}
    if all(shape.num_ranks == 1 for shape in shapes.values()):
        return {}
    from pd.engine.shards import rank_parts
    from transfer.topology import Topology

    return {
        role: rank_parts(Topology(shape.tp, shape.pp, shape.cp), config)
        for role, shape in shapes.items()
        if shape.num_ranks > 1
    }


def _free_memory(spec: ClusterSpec) -> dict[str, int | None]:
    """By device, on this machine, where a pool asks for a fraction of it."""
    devices = {
        role.device for _, role in spec.roles.items() if role.pool.memory_fraction is not None
    }
    free: dict[str, int | None] = {}
    if "cpu" in devices:
        free["cpu"] = _available_host_memory()
    if "cuda" in devices:
        import torch

        free["cuda"] = torch.cuda.mem_get_info(0)[0] if torch.cuda.is_available() else None
    return free


def _available_host_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _print_cost(cost: Cost, console: Console) -> None:
    from rich.table import Table

    from pd.cost import format_bytes

    def size(value: int | None) -> str:
        return "unknown here" if value is None else format_bytes(value)

    console.print(
        f"[bold]{cost.architecture}[/bold], {cost.dtype}: weights {size(cost.weights_bytes)}, "
        f"KV {format_bytes(cost.token_bytes)} a token",
        highlight=False,
    )
    page = f"page of {cost.layouts[0].page_tokens}"
    groups = Table("group", "attention", "layers", "KV heads", "head", "token", page, box=None)
    for number, layout in enumerate(cost.layouts):
        group = layout.group
        kind = f"sliding {group.window}" if group.kind == "sliding" else group.kind
        groups.add_row(
            str(number),
            kind,
            _ranges(group.layers),
            str(group.kv_heads),
            str(group.head_dim),
            format_bytes(layout.token_bytes),
            format_bytes(layout.page_bytes),
        )
    console.print(groups)
    roles = Table("role", "replicas", "ranks", "device", "weights a rank", box=None)
    for title in ("pages by group", "KV a rank", "longest"):
        roles.add_column(title)
    for role in cost.roles:
        low, high = role.min_replicas, role.max_replicas
        roles.add_row(
            role.role,
            str(low) if low == high else f"{low} to {high}",
            str(low * role.ranks) if low == high else f"{low * role.ranks} to {high * role.ranks}",
            role.device,
            size(role.weights_bytes),
            "by the worker" if role.pages is None else ", ".join(f"{n:,}" for n in role.pages),
            size(role.kv_bytes),
            "by the worker" if role.max_context is None else f"{role.max_context:,}",
        )
    console.print(roles)
    longest = "known once the workers have started"
    if cost.max_context is not None:
        longest = f"{cost.max_context:,} tokens"
    console.print(f"longest request (prompt and output): {longest}", highlight=False)
    for warning in cost.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False, soft_wrap=True)


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 4) -> 0-2,4."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(str(end) for end in part) for part in parts)


# ------------------------------------------------------------------------------------------- status


@app.command()
def status(url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False) -> None:
    """Replicas of a running cluster: queues, requests, pages."""
    from pd.http_client import HttpError, get_json

    try:
        answer = get_json(f"{_base(url)}/admin/status", key)
    except HttpError as error:
        raise _Failure(str(error)) from error
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    from rich.table import Table

    table = Table("replica", "role", "waiting", "running", box=None)
    table.add_column("pages by group: free / cached / used", no_wrap=True)
    for replica in answer["replicas"]:
        pages = [f"{each['free']} / {each['cached']} / {each['used']}" for each in replica["pages"]]
        table.add_row(
            replica["name"],
            replica["role"],
            str(replica["waiting"]),
            str(replica["running"]),
            "   ".join(pages),
        )
    console = _console()
    console.print(f"[bold]{answer['model']}[/bold] at {_base(url)}", highlight=False)
    console.print(table)


def _base(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


# -------------------------------------------------------------------------------------------- cache

Keeper = Annotated[str, typer.Option(help="Only this one; default: all.")]


@cache.callback()
def show_cache(
    context: typer.Context, url: Url = DEFAULT_URL, key: Key = "", as_json: AsJson = False
) -> None:
    """The tiers of a running cluster's cache: pages, hits, storage."""
    if context.invoked_subcommand is not None:
        given = [n for n in ("url", "key", "as_json") if _is_typed(context, n)]
        if given:
            option = given[0].removeprefix("as_")
            raise _Failure(f"--{option}: expected after {context.invoked_subcommand}", 2)
        return
    from pd.http_client import HttpError, get_json

    try:
        answer = get_json(f"{_base(url)}/cache", key, timeout_s=15.0)
    except HttpError as error:
        raise _Failure(str(error)) from error
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    from pd.cache_report import print_cache

    console = _console()
    console.print(f"[bold]{answer['model']}[/bold] at {_base(url)}", highlight=False)
    print_cache(answer, console)


def _is_typed(context: typer.Context, parameter: str) -> bool:
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


@cache.command("clear")
def cache_clear(
    tenant: Annotated[str, typer.Option(help="Only what this one's requests brought.")] = "",
    keeper: Keeper = "",
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Forget the pages of the host tier. Those in use go when they are no longer."""
    body = {"tenant": tenant}
    done = _change_cache("POST", "/cache/clear", body, keeper, url, key)
    what = f"what {tenant} brought is" if tenant else "the host tier is"
    print(f"{what} cleared on {_names(done)}")


@cache.command("attach")
def cache_attach(
    backend: Annotated[str, typer.Argument(help="file, nixl, mooncake or memory.")],
    option: Annotated[
        list[str], typer.Option(metavar="KEY=VALUE", help="Of the backend; may be given again.")
    ] = [],  # noqa: B006
    keeper: Keeper = "",
    url: Url = DEFAULT_URL,
    key: Key = "",
) -> None:
    """Use this storage behind the host tier, instead of what is there."""
    options: dict[str, str] = {}
    for each in option:
        name, equals, value = each.partition("=")
        if not name or not equals:
            raise _Failure(f"--option: found {each!r}, expected KEY=VALUE", 2)
        if name in options:
            raise _Failure(f"--option: {name} is given twice", 2)
        options[name] = value
    body = {"backend": backend, "options": options}
    done = _change_cache("POST", "/cache/storage", body, keeper, url, key, timeout_s=70.0)
    print(f"{backend} is attached to {_names(done)}")


@cache.command("detach")
def cache_detach(keeper: Keeper = "", url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Use no storage behind the host tier. What it has stays there."""
    done = _change_cache("DELETE", "/cache/storage", None, keeper, url, key)
    print(f"storage is detached from {_names(done)}")


@cache.command("clear-storage")
def cache_clear_storage(keeper: Keeper = "", url: Url = DEFAULT_URL, key: Key = "") -> None:
    """Remove everything from the storage, for all that share it."""
    done = _change_cache("POST", "/cache/storage/clear", None, keeper, url, key)
    print(f"storage is being cleared by {_names(done)}")


def _change_cache(
    method: str,
    path: str,
    body: Any,
    keeper: str,
    url: str,
    key: str,
    timeout_s: float = 15.0,
) -> list[dict[str, Any]]:
    """The keepers' reports."""
    from urllib.parse import quote

    from pd.http_client import HttpError, send_json

    query = f"?keeper={quote(keeper)}" if keeper else ""
    try:
        answer = send_json(method, f"{_base(url)}{path}{query}", body, key, timeout_s)
    except HttpError as error:
        raise _Failure(str(error)) from error
    return list(answer["keepers"])


def _names(reports: list[dict[str, Any]]) -> str:
    return ", ".join(report["name"] for report in reports)


# --------------------------------------------------------------------------------------------- chat


@app.command()
def chat(
    url: Url = DEFAULT_URL,
    key: Key = "",
    model: Annotated[str, typer.Option(help="Default: the server's first.")] = "",
    system: Annotated[str, typer.Option(help="A system message.")] = "",
    temperature: Annotated[float, typer.Option(min=0)] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1)] = 0.95,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="For answers that repeat.")] = None,
) -> None:
    """Talk to a model. /reset forgets, /quit or Ctrl-D leaves, Ctrl-C stops an answer."""
    from pd.http_client import HttpError, get_json

    base = _base(url)
    try:
        model = model or str(get_json(f"{base}/v1/models", key)["data"][0]["id"])
    except HttpError as error:
        raise _Failure(str(error)) from error
    except (KeyError, IndexError, TypeError):
        raise _Failure(f"{base}/v1/models: not an OpenAI-compatible answer") from None
    if sys.stdin.isatty():
        import readline  # noqa: F401  # line editing and history
    sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    if seed is not None:
        sampling["seed"] = seed
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    print(f"{model} at {base}; /reset forgets, /quit leaves, Ctrl-C stops an answer")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if text == "/quit":
            return
        if text == "/reset":
            messages = list(start)
        elif text.startswith("/"):
            print("expected /reset, /quit, or a message")
        elif text:
            messages.append({"role": "user", "content": text})
            body = {"model": model, "messages": messages, "stream": True, **sampling}
            answer, failure = _print_answer(f"{base}/v1/chat/completions", body, key)
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()
            if failure:
                print(f"pd: {failure}", file=sys.stderr)


def _print_answer(url: str, body: dict[str, Any], key: str) -> tuple[str, str]:
    """(answer, error), printed as it comes; Ctrl-C hangs up and keeps what has come."""
    import contextlib

    from pd.http_client import HttpError, stream_json

    parts: list[str] = []
    error = ""
    events = stream_json(url, body, key)
    try:
        with contextlib.closing(events):  # type: ignore[type-var]
            for event in events:
                for choice in event.get("choices", ())[:1]:
                    piece = choice.get("delta", {}).get("content") or ""
                    parts.append(piece)
                    print(piece, end="", flush=True)
    except HttpError as problem:
        error = str(problem)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(parts), error


# -------------------------------------------------------------------------------------------- bench


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
        raise _Failure(str(error), 2) from error

    import uvloop
    from rich.progress import Progress

    console = _console(stderr=json_file == "-")
    bar = _console(stderr=True)
    quiet = not bar.is_terminal
    with Progress(console=bar, refresh_per_second=2, transient=True, disable=quiet) as progress:

        def on_start(title: str, total: int) -> Any:
            task = progress.add_task(title, total=total)
            return lambda _: progress.advance(task)

        try:
            report = uvloop.run(run_bench(options, on_start))
        except BenchError as error:
            raise _Failure(str(error)) from error
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
        raise _Failure(str(error)) from error
    if report.interrupted:
        raise typer.Exit(130)
    if all(run.summary.num_ok == 0 for run in report.runs):
        raise _Failure("no request succeeded")


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
        raise _Failure(str(error), 2) from error

    bar = _console(stderr=True)
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
            raise _Failure(str(error)) from error
    text = json.dumps(report.to_json(), indent=2) + "\n"
    if as_json:
        print(text, end="")
    else:
        width = max(WIDTH, _console().width)
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
        raise _Failure(str(error)) from error
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
        raise _Failure(str(error), 2) from error
    bar = _console(stderr=True)
    quiet = not bar.is_terminal
    with Progress(console=bar, refresh_per_second=2, transient=True, disable=quiet) as progress:
        task = progress.add_task("starting", total=options.num_rows)
        report = run_cache_bench(
            options, lambda title, done: progress.update(task, description=title, completed=done)
        )
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        width = max(WIDTH, _console().width)
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
        raise _Failure(f"--policy: found {strange[0]!r}, expected one of {expected}", 2)
    policies = tuple(name for name in known if name in policy)
    bar = _console(stderr=True)
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
                placing = PlacementOptions(replicas[0] if replicas else 10, room, seed=seed)
                with trace.open(encoding="utf-8") as lines:
                    requests = parse_trace(lines, block_tokens)
                report = bench_of.run_placement_bench(
                    requests, policies or known, tuple(speed), placing, on_row
                )
    except (BenchError, TraceError) as error:
        raise _Failure(str(error), 2) from error
    except (OSError, UnicodeDecodeError) as error:
        raise _Failure(f"{trace}: cannot be read: {error}", 2) from error
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
        return
    console = Console(width=max(bench_of.WIDTH, _console().width), soft_wrap=True)
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
    seed: int = 0,
    as_json: AsJson = False,
) -> None:
    """Time conversations with the cache off, and with one, two and three tiers."""
    from pd.bench.errors import BenchError
    from pd.bench.multiturn import MultiturnOptions, print_multiturn, run_multiturn
    from pd.bench.server import ServerError
    from pd.http_client import HttpError
    from pd.spec import SpecError

    options = MultiturnOptions(
        spec, clients, rounds, new_tokens, output_tokens, device_pages, host_memory, seed
    )
    console = _console(stderr=True)
    try:
        report = run_multiturn(
            options,
            console,
            lambda tiers, number: console.print(f"{tiers}: round {number + 1}", highlight=False),
        )
    except SpecError as error:
        raise _Failure(str(error), 2) from error
    except (BenchError, ServerError, HttpError, ValueError) as error:
        raise _Failure(str(error), 1) from error
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        print_multiturn(report, _console())
    if not report["tokens_equal"]:
        raise typer.Exit(1)


# ------------------------------------------------------------------------------------------- replay


def _blocks(text: str) -> int:
    from hicache.replay import INFINITE

    if text == "infinite":
        return INFINITE
    if not text.isdecimal() or not 0 < int(text) < INFINITE:
        raise typer.BadParameter(f"found {text!r}, expected a number of blocks or infinite")
    return int(text)


@app.command()
def replay(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="JSON lines in Mooncake's format.")
    ],
    capacity: Annotated[
        list[int],
        typer.Option(
            min=1, help="In blocks; may be given again. Default: 1,000 to 100,000 in five steps."
        ),
    ] = [],  # noqa: B006
    order: Annotated[
        list[str],
        typer.Option(help="lru, lfu, slru, s3fifo or cost; may be given again. Default: all."),
    ] = [],  # noqa: B006
    host: Annotated[
        list[int],
        typer.Option(
            parser=_blocks,
            metavar="BLOCKS",
            help="A host tier below the device tier: a number or infinite; may be given again.",
        ),
    ] = [],  # noqa: B006
    storage: Annotated[
        list[int],
        typer.Option(parser=_blocks, metavar="BLOCKS", help="Likewise, a storage behind it."),
    ] = [],  # noqa: B006
    write: Annotated[
        list[str],
        typer.Option(
            help="With --host: write_through (default), write_through_selective or write_back; "
            "may be given again."
        ),
    ] = [],  # noqa: B006
    write_hits: Annotated[
        int, typer.Option(min=1, help="Uses after which write_through_selective offers a block.")
    ] = 2,
    block_tokens: Annotated[int, typer.Option(min=1, help="Of the trace's blocks.")] = 512,
    as_json: AsJson = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the hit rates.")
    ] = None,
) -> None:
    """Replay a trace through the page index: hit rates beside an infinite cache and the optimum.

    Sizes are in blocks. With several tiers, each block counts in the first that had it.
    """
    from rich.progress import Progress

    from pd.bench.errors import BenchError
    from pd.bench.replay_report import (
        ReplayOptions,
        check_replay_options,
        load_trace,
        num_steps,
        plot_replay_report,
        print_replay_report,
        run_replay,
    )

    try:
        options = ReplayOptions(
            capacities=tuple(capacity) or ReplayOptions().capacities,
            orders=tuple(order) or ReplayOptions().orders,
            hosts=tuple(host),
            storages=tuple(storage),
            writes=tuple(write) or ReplayOptions().writes,
            write_hits=write_hits,
        )
        check_replay_options(options)
        loaded = load_trace(trace, block_tokens)
    except BenchError as error:
        raise _Failure(str(error), 2) from error
    bar = _console(stderr=True)
    quiet = not bar.is_terminal
    with Progress(console=bar, refresh_per_second=2, transient=True, disable=quiet) as progress:
        task = progress.add_task("starting", total=num_steps(loaded, options))
        report = run_replay(
            loaded,
            options,
            lambda title, done: progress.update(task, description=title, completed=done),
        )
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        print_replay_report(report, _console())
    if plot:
        try:
            plot_replay_report(report, plot)
        except BenchError as error:
            raise _Failure(str(error)) from error


@app.command()
def version() -> None:
    """Print the version."""
    from pd import __version__

    print(f"pagerelay {__version__}")


if __name__ == "__main__":
    main()
