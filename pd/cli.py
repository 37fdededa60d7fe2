"""The `pd` command.

Heavy modules (ray, torch, transformers, aiohttp) are imported by the command that needs them, so
that `pd --help` and `pd status` answer at once. Errors are one line on stderr: exit code 2 for what
the user wrote, 1 for what failed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pd.bench.commands import bench
from pd.command import DEFAULT_URL, AsJson, Failure, Key, SpecPath, Url, load_spec, make_console
from pd.simulate.command import simulate

if TYPE_CHECKING:
    from rich.console import Console

    from pd.cost import Cost, RankParts
    from pd.spec import ClusterSpec, Role

_FOLLOW_S = 0.5
_SILENT_S = 60.0
"""Without an answer, before it is given up."""
_MOST_FAILURES = 3

app = typer.Typer(
    name="pd",
    help="Serve large language models with prefill and decode on separate workers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")
cache = typer.Typer(
    help="The tiers of a running cluster's cache: pages, hits, storage.",
    invoke_without_command=True,
)
app.add_typer(cache, name="cache")


def main() -> None:
    try:
        app()
    except Failure as failure:
        print(f"pd: {failure}", file=sys.stderr)
        sys.exit(failure.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `pd status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


# -------------------------------------------------------------------------------------------- serve


@app.command()
def serve(
    spec: SpecPath,
    host: Annotated[str | None, typer.Option(help="Instead of api.host.")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Instead of api.port.")] = None,
    replace: Annotated[
        bool,
        typer.Option(help="End what an earlier `pd serve` has left, instead of adopting it."),
    ] = False,
) -> None:
    """Start a cluster and serve until Ctrl-C or SIGTERM.

    On a Ray cluster that runs anyway, processes of an earlier `pd serve` that was killed are
    adopted, and changed to what SPEC says.
    """
    loaded = load_spec(spec)
    changes = {"host": host, "port": port}
    api = loaded.api.model_copy(update={k: v for k, v in changes.items() if v is not None})
    loaded = loaded.model_copy(update={"api": api})

    from pd.cluster.controller import TakenOverError
    from pd.cluster.serve import serve as run
    from pd.cluster.unit import StartError
    from pd.cost import UnsupportedModelError
    from pd.models import ModelError
    from pd.spec import SpecError

    def progress(message: str) -> None:
        print(f"  {message}", file=sys.stderr, flush=True)

    def ready(url: str) -> None:
        shape = ", ".join(f"{role.replicas.min} {name}" for name, role in loaded.roles.items())
        print(f"ready: {url} ({loaded.name}: {shape})", flush=True)

    try:
        run(loaded, progress, ready, replace)
    except (SpecError, ModelError, UnsupportedModelError) as error:
        raise Failure(str(error), 2) from error
    except (StartError, TakenOverError) as error:
        raise Failure(str(error)) from error


# ------------------------------------------------------------------------------------ reload, drain

Wait = Annotated[bool, typer.Option(help="Until all replicas are as they should be.")]


@app.command()
def reload(spec: SpecPath, url: Url = DEFAULT_URL, key: Key = "", wait: Wait = True) -> None:
    """Have a running cluster follow a changed spec, without failing a request.

    What can change in place does, such as numbers of replicas, router, objectives and API keys.
    Replicas for which anything else has changed are replaced, one of each role at a time.
    """
    body = {"spec": load_spec(spec).model_dump(mode="json", exclude_unset=True)}
    changes = _order("reload", body, url, key)["changes"]
    print(f"changed: {', '.join(changes)}" if changes else "nothing has changed")
    if wait:
        _follow(url, key)


@app.command()
def drain(
    replica: Annotated[str, typer.Argument(metavar="REPLICA", help="Such as decode-0.")],
    url: Url = DEFAULT_URL,
    key: Key = "",
    wait: Wait = True,
) -> None:
    """Replace a replica by a fresh one; its requests go on there or elsewhere, with their pages."""
    _order("drain", {"replica": replica}, url, key)
    if wait:
        _follow(url, key)


def _order(action: str, body: Any, url: str, key: str) -> Any:
    from pd.http_client import HttpError, send_json

    try:
        return send_json("POST", f"{_base(url)}/admin/{action}", body, key, timeout_s=40.0)
    except HttpError as error:
        raise Failure(str(error)) from error


def _follow(url: str, key: str) -> None:
    """Print what happens to the units until nothing does any more."""
    from pd.http_client import HttpError, get_json

    seen: dict[str, str] | None = None
    heard = time.monotonic()
    while True:
        time.sleep(_FOLLOW_S)
        try:
            state = get_json(f"{_base(url)}/admin/status", key)["controller"]
            heard = time.monotonic()
        except HttpError as error:
            if time.monotonic() > heard + _SILENT_S:
                raise Failure(str(error)) from error
            continue
        if not state:  # an API server that has just started
            continue
        phases = {unit["name"]: unit["phase"] for unit in state["units"]}
        if seen is not None:
            for name in sorted({*phases, *seen}):
                if phases.get(name) != seen.get(name):
                    print(f"  {name}: {phases.get(name, 'gone')}", file=sys.stderr, flush=True)
        seen = phases
        if state["settled"]:
            print(f"running: {_count_roles(state['units'])}")
            return
        failed = [unit["name"] for unit in state["units"] if unit["failures"] >= _MOST_FAILURES]
        if failed:
            raise Failure(f"{', '.join(failed)}: cannot be started; pd serve says why")


def _count_roles(units: list[dict[str, str]]) -> str:
    roles = [unit["role"] for unit in units if unit["role"] not in ("api", "cache")]
    return ", ".join(f"{roles.count(role)} {role}" for role in dict.fromkeys(roles))


# -------------------------------------------------------------------------------------------- check


@app.command()
def check(spec: SpecPath, as_json: AsJson = False) -> None:
    """Print the resolved spec and what it costs: ranks, pages, memory, the longest context."""
    loaded = load_spec(spec)
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
        raise Failure(f"{spec}: {error}", 2) from error
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
    _print_cost(cost, make_console())


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
        raise Failure(str(error)) from error
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
    console = make_console()
    console.print(f"[bold]{answer['model']}[/bold] at {_base(url)}", highlight=False)
    console.print(table)
    state = answer.get("controller")
    if state and not state["settled"]:
        console.print("not as it should be:", style="yellow")
        for unit in state["units"]:
            if unit["phase"] != "running":
                console.print(f"  {unit['name']}: {unit['phase']}", highlight=False)
        wanted = ", ".join(f"{count} {role}" for role, count in state["desired"].items())
        console.print(f"  wanted: {wanted}", highlight=False)


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
            raise Failure(f"--{option}: expected after {context.invoked_subcommand}", 2)
        return
    from pd.http_client import HttpError, get_json

    try:
        answer = get_json(f"{_base(url)}/cache", key, timeout_s=15.0)
    except HttpError as error:
        raise Failure(str(error)) from error
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    from pd.cache_report import print_cache

    console = make_console()
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
            raise Failure(f"--option: found {each!r}, expected KEY=VALUE", 2)
        if name in options:
            raise Failure(f"--option: {name} is given twice", 2)
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
        raise Failure(str(error)) from error
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
        raise Failure(str(error)) from error
    except (KeyError, IndexError, TypeError):
        raise Failure(f"{base}/v1/models: not an OpenAI-compatible answer") from None
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
        raise Failure(str(error), 2) from error
    bar = make_console(stderr=True)
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
        print_replay_report(report, make_console())
    if plot:
        try:
            plot_replay_report(report, plot)
        except BenchError as error:
            raise Failure(str(error)) from error


app.command()(simulate)


@app.command()
def version() -> None:
    """Print the version."""
    from pd import __version__

    print(f"pagerelay {__version__}")


if __name__ == "__main__":
    main()
