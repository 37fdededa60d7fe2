"""A recorded load on a simulated cluster (pd/simulate), by policy and rate: `pd simulate`.

TTFT and TPOT are as a client would see them. Goodput counts the requests that end well within both
objectives. Utilisation is the share of time in which a replica has a step in flight, from the first
arrival to the last: what is done after that would make an overloaded cluster look idle.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from hicache.replay import Trace, TraceError, parse_trace
from pd.bench.errors import BenchError
from pd.bench.stats import Distribution, distribution
from pd.cost import (
    ELEMENT_BYTES,
    UnsupportedModelError,
    estimate_cost,
    layer_groups,
    load_config,
    page_layouts,
)
from pd.models import ModelError, resolve_model
from pd.router import Policy
from pd.simulate.cluster import ReplicaShape, SimCluster, SimRequest, SimResult
from pd.simulate.profile import (
    DEVICES,
    Profile,
    ProfileError,
    analytic_profile,
    load_profile,
)
from pd.spec import ClusterSpec, ReplicaRange, Role, SpecError, parse_bytes
from transfer.layout import PageLayout

if TYPE_CHECKING:
    from rich.console import Console

POLICIES: tuple[Policy, ...] = get_args(Policy)
WIDTH = 150


@dataclasses.dataclass(frozen=True, slots=True)
class SimulateOptions:
    policies: tuple[Policy, ...] = POLICIES
    rates: tuple[float, ...] = (1.0,)
    """How many times as fast as they were requests arrive."""
    ttft_s: float = 2.0
    tpot_s: float = 0.05
    """Objectives."""
    start_s: float = 30.0
    """Until a replica serves that the planner wants."""
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Utilisation:
    replicas: float
    """How many there were, in the mean."""
    mean: float
    max: float


@dataclasses.dataclass(frozen=True, slots=True)
class SimulateRow:
    policy: Policy
    rate: float
    requests_per_s: float
    """Offered, from the first arrival to the last."""
    num_ok: int
    errors: dict[str, int]
    """Message, without its numbers -> how often."""
    ttft: Distribution
    tpot: Distribution
    goodput: float
    """Share of all requests."""
    goodput_per_s: float
    """The same of those that are offered in a second."""
    hit_rate: float
    """Prompt tokens found cached, of all."""
    utilisation: dict[Role, Utilisation]
    preemptions: int
    duration_s: float
    """From the first arrival to the last one's end, on the virtual clock..."""
    wall_s: float
    """... and on this machine's."""

    @property
    def minutes_per_s(self) -> float:
        return self.duration_s / 60 / self.wall_s

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "minutes_per_s": self.minutes_per_s}


@dataclasses.dataclass(slots=True)
class SimulateReport:
    conditions: dict[str, Any]
    rows: list[SimulateRow]
    results: list[list[SimResult]]
    """By row."""
    interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "rows": [row.to_json() for row in self.rows],
            "interrupted": self.interrupted,
        }


# ---------------------------------------------------------------------------------------- the load


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    requests: tuple[SimRequest, ...]
    block_tokens: int
    name: str = "trace"

    def at_rate(self, rate: float) -> list[SimRequest]:
        first = min(request.at_s for request in self.requests)
        return [
            dataclasses.replace(request, at_s=(request.at_s - first) / rate)
            for request in self.requests
        ]


def load_trace(
    path: Path, block_tokens: int, num_requests: int | None = None, scale: float = 1.0
) -> Load:
    """The first requests, with lengths and blocks `scale` times as long. Raises BenchError."""
    try:
        with path.open(encoding="utf-8") as lines:
            trace = parse_trace(lines, block_tokens)
    except TraceError as error:
        raise BenchError(f"{path}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}: cannot be read: {error}") from error
    return _scaled(trace, num_requests, scale, path.name)


def _scaled(trace: Trace, num_requests: int | None, scale: float, name: str) -> Load:
    block_tokens = max(1, -int(-trace.block_tokens * scale // 1))
    requests = []
    for each in trace.requests[:num_requests]:
        num_prompt = max(1, round(each.num_tokens * scale))
        requests.append(
            SimRequest(
                each.arrived_s,
                num_prompt,
                max(1, round(each.num_output * scale)),
                each.blocks[: -(-num_prompt // block_tokens)],
            )
        )
    return Load(tuple(requests), block_tokens, name)


# ------------------------------------------------------------------------------------- the cluster


@dataclasses.dataclass(frozen=True, slots=True)
class SimModel:
    """A spec's model, as far as a simulation needs it."""

    layouts: tuple[PageLayout, ...]
    shapes: tuple[ReplicaShape, ...]
    heads: int
    parameters: int
    """Without those of the input embedding, of which a token reads one row..."""
    active_parameters: int
    """... and, of experts, those that a token passes through."""


def resized(spec: ClusterSpec, replicas: dict[Role, int | None]) -> ClusterSpec:
    """With other numbers of replicas. Raises BenchError for a role that there is not."""
    roles: dict[str, Any] = dict(spec.roles.items())
    for role, count in replicas.items():
        if count is None:
            continue
        if role not in roles:
            raise BenchError(f"--{role}: found {count}, but the spec has no such role")
        bounds = ReplicaRange(min=count, max=count)
        roles[role] = roles[role].model_copy(update={"replicas": bounds})
    return spec.model_copy(update={"roles": spec.roles.model_copy(update=roles)})


def read_model(spec: ClusterSpec, memory: str = "") -> SimModel:
    """`memory`: of each device, such as 141GB, for pools that ask for a fraction of it. Raises
    BenchError."""
    try:
        memory_bytes = parse_bytes(memory) if memory else None
    except ValueError as error:
        raise BenchError(f"--memory: found {memory!r}, {error}") from error
    try:
        config = load_config(resolve_model(spec.model.path, weights=False))
        groups = layer_groups(config)
        parameters, active = _count_parameters(config)
        free = dict.fromkeys(("cpu", "cuda"), memory_bytes)
        weights = parameters * ELEMENT_BYTES[spec.model.dtype]
        cost = estimate_cost(spec, config, weights, free)
    except (SpecError, ModelError, UnsupportedModelError) as error:
        raise BenchError(str(error)) from error
    shapes = []
    for role, found in zip(spec.roles.items(), cost.roles, strict=True):
        if found.pages is None:
            raise BenchError(f"roles.{role[0]}.pool.memory_fraction: expected --memory beside it")
        shapes.append(ReplicaShape(*role, found.pages, found.max_context))
    return SimModel(
        page_layouts(groups, spec.page_tokens, spec.model.dtype),
        tuple(shapes),
        int(config.num_attention_heads),
        parameters,
        active,
    )


def _count_parameters(config: Any) -> tuple[int, int]:
    """(all but the input embedding's, those of them that a token passes through)"""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    experts = experts or getattr(config, "n_routed_experts", None)
    share = int(config.num_experts_per_tok) / int(experts) if experts else 1.0
    embedding = model.get_input_embeddings().weight
    is_tied = model.get_output_embeddings().weight is embedding
    total = active = 0
    for name, parameter in model.named_parameters():
        if parameter is embedding and not is_tied:
            continue
        total += parameter.numel()
        active += int(parameter.numel() * (share if ".experts." in name else 1.0))
    return total, active


def make_profile(spec: ClusterSpec, model: SimModel, profile: Path | None, device: str) -> Profile:
    """From a file, or of a device: its name, or FLOPS:MEMORY:LINK, the latter in bytes a second.
    Raises BenchError."""
    if profile is not None:
        try:
            found = load_profile(profile)
        except ProfileError as error:
            raise BenchError(f"--profile: {error}") from error
        if missing := [role for role, _ in spec.roles.items() if role not in found.steps]:
            raise BenchError(f"--profile: {profile}: steps: expected {missing[0]}")
        return found
    known = DEVICES.get(device)
    if known is None:
        try:
            flops, memory, link = map(float, device.split(":"))
        except ValueError:
            flops = memory = link = 0.0
        if min(flops, memory, link) <= 0:
            names = ", ".join(DEVICES)
            raise BenchError(
                f"--device: found {device!r}, expected {names} or FLOPS:MEMORY:LINK, such as "
                "595e12:4.3e12:300e9"
            )
        known = msgspec.structs.replace(
            DEVICES["h200"], flops=flops, bytes_per_s=memory, link_bytes_per_s=link
        )
    return analytic_profile(
        spec,
        known,
        [layout.group for layout in model.layouts],
        model.heads,
        model.parameters,
        model.active_parameters,
        ELEMENT_BYTES[spec.model.dtype],
        source=f"device {device}",
    )


# ----------------------------------------------------------------------------------- the simulation


def run_simulate(
    spec: ClusterSpec,
    model: SimModel,
    profile: Profile,
    load: Load,
    options: SimulateOptions,
    on_start: Callable[[str, int], Callable[[int], None]] = lambda title, total: lambda done: None,
) -> SimulateReport:
    """A row for each rate and policy. `on_start(title, requests)` returns a progress callback.
    Ctrl-C ends it with the rows there are."""
    report = SimulateReport(_conditions(spec, model, profile, load, options), [], [])
    try:
        for rate in options.rates:
            requests = load.at_rate(rate)
            for policy in options.policies:
                on_ended = on_start(f"{policy} at {rate:g}x", len(requests))
                begin = time.perf_counter()
                cluster = SimCluster(
                    spec,
                    model.shapes,
                    model.layouts,
                    profile,
                    policy,
                    load.block_tokens,
                    options.seed,
                    options.start_s,
                )
                results = cluster.run(requests, on_ended)
                wall_s = time.perf_counter() - begin
                report.rows.append(_row(cluster, policy, rate, options, wall_s))
                report.results.append(results)
    except KeyboardInterrupt:
        report.interrupted = True
    return report


def _row(
    cluster: SimCluster, policy: Policy, rate: float, options: SimulateOptions, wall_s: float
) -> SimulateRow:
    results = cluster.results
    good = [result for result in results if result.is_good]
    num_good = sum(
        result.ttft_s <= options.ttft_s and (result.tpot_s or 0.0) <= options.tpot_s
        for result in good
    )
    window_s = cluster.last_arrival_s or 1.0
    errors = Counter(
        "".join(char for char in result.error if not char.isdigit())
        for result in results
        if not result.is_good
    )
    return SimulateRow(
        policy=policy,
        rate=rate,
        requests_per_s=len(results) / window_s,
        num_ok=len(good),
        errors=dict(errors),
        ttft=distribution([result.ttft_s for result in good]),
        tpot=distribution([tpot for result in good if (tpot := result.tpot_s) is not None]),
        goodput=num_good / len(results),
        goodput_per_s=num_good / window_s,
        hit_rate=sum(result.cached_tokens for result in good)
        / max(1, sum(result.request.num_prompt for result in good)),
        utilisation=_utilisation(cluster, window_s),
        preemptions=sum(result.preemptions for result in results),
        duration_s=cluster.now,
        wall_s=wall_s,
    )


def _utilisation(cluster: SimCluster, window_s: float) -> dict[Role, Utilisation]:
    found: dict[Role, list[tuple[float, float]]] = {}
    for replica in (*cluster.replicas.values(), *cluster.retired):
        there_s = min(replica.left_s, window_s) - replica.joined_s
        if there_s > 0:
            found.setdefault(replica.role, []).append((replica.busy_s, there_s))
    return {
        role: Utilisation(
            replicas=sum(there_s for _, there_s in each) / window_s,
            mean=sum(busy_s for busy_s, _ in each) / sum(there_s for _, there_s in each),
            max=max(busy_s / there_s for busy_s, there_s in each),
        )
        for role, each in found.items()
    }


def _conditions(
    spec: ClusterSpec, model: SimModel, profile: Profile, load: Load, options: SimulateOptions
) -> dict[str, Any]:
    roles = []
    for shape in model.shapes:
        low, high = shape.spec.replicas.min, shape.spec.replicas.max
        count = str(low) if low == high else f"{low} to {high}"
        roles.append(f"{count} {shape.role}, {shape.num_pages[0]:,} pages each")
    return {
        "cluster": f"{spec.name}: {'; '.join(roles)} of {spec.page_tokens} tokens",
        "requests": f"{len(load.requests):,} of {load.name}",
        "tokens": f"{sum(r.num_prompt for r in load.requests):,} in, "
        f"{sum(r.num_output for r in load.requests):,} out",
        "profile": profile.source,
        "objectives": f"TTFT {options.ttft_s:g} s, TPOT {options.tpot_s:g} s",
        "real": "router, planner, page maps and feeds, leaders with scheduler, index and handovers",
        "modelled": "time of steps, writes, messages and the API; no tiers below the device",
        "seed": options.seed,
    }


# --------------------------------------------------------------------------------------- the report


def print_simulate_report(report: SimulateReport, console: Console) -> None:
    from rich.table import Table

    for key, value in report.conditions.items():
        console.print(f"[dim]{key:>10}[/dim]  {value}", highlight=False)
    console.print()
    table = Table("rate", "req/s", "policy", "TTFT p50 / 90 / 99 (s)", "TPOT p50 / 99 (ms)")
    for title in ("replicas", "goodput", "good/s", "hits", "busy, mean (max)", "failed", "min/s"):
        table.add_column(title)
    table.box = None
    table.pad_edge = False
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column.header == "policy" else "right"
    for row in report.rows:
        table.add_row(
            f"{row.rate:g}x",
            f"{row.requests_per_s:,.1f}",
            row.policy,
            " / ".join(_number(row.ttft, name, 1.0, 3) for name in ("p50", "p90", "p99")),
            " / ".join(_number(row.tpot, name, 1000.0, 1) for name in ("p50", "p99")),
            " + ".join(f"{used.replicas:.4g}" for used in row.utilisation.values()),
            f"{row.goodput:.1%}",
            f"{row.goodput_per_s:,.1f}",
            f"{row.hit_rate:.1%}",
            "  ".join(f"{u.mean:.0%} ({u.max:.0%})" for u in row.utilisation.values()),
            str(sum(row.errors.values())),
            f"{row.minutes_per_s:.2f}",
        )
    console.print(table)
    roles = ", ".join(report.rows[0].utilisation) if report.rows else ""
    console.print(
        f"\nreq/s: offered; goodput: requests within both objectives; busy: {roles}, until the "
        "last arrival; min/s: simulated minutes in a second",
        style="dim",
    )
    for row in report.rows:
        for message, count in row.errors.items():
            console.print(f"{row.policy} at {row.rate:g}x: {count} failed: {message}", style="red")
    if report.interrupted:
        console.print("\ninterrupted: these are the rows that had ended", style="yellow")


def _number(values: Distribution, name: str, factor: float, digits: int) -> str:
    value = {"p50": values.p50, "p90": values.p90, "p99": values.p99}[name]
    return "-" if value is None else f"{value * factor:,.{digits}f}"


def plot_simulate_report(report: SimulateReport, path: Path) -> None:
    """Cumulative TTFT and TPOT at the last rate, goodput and utilisation by rate. Raises
    BenchError."""
    try:
        import matplotlib
    except ImportError as error:
        raise BenchError("--plot needs matplotlib: pip install 'pagerelay[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    last = report.rows[-1].rate
    for row, results in zip(report.rows, report.results, strict=True):
        if row.rate != last:
            continue
        good = [result for result in results if result.is_good]
        tpots = [tpot * 1000 for result in good if (tpot := result.tpot_s) is not None]
        for axis, values in zip(axes[0], ([r.ttft_s for r in good], tpots), strict=True):
            ordered = sorted(values)
            share = [(rank + 1) / len(results) for rank in range(len(ordered))]
            axis.step(ordered, share, where="post", label=row.policy)
    for axis, title in zip(axes[0], ("TTFT (s)", "TPOT (ms)"), strict=True):
        axis.set(xlabel=f"{title} at {last:g}x", ylabel="share of requests", ylim=(0, 1))
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    for policy in dict.fromkeys(row.policy for row in report.rows):
        rows = [row for row in report.rows if row.policy == policy]
        offered = [row.requests_per_s for row in rows]
        axes[1][0].plot(offered, [row.goodput for row in rows], marker="o", label=policy)
        for style, role in zip(("-", "--"), rows[0].utilisation, strict=False):
            busy = [row.utilisation[role].mean for row in rows]
            axes[1][1].plot(offered, busy, style, marker="o", label=f"{policy}, {role}")
    axes[1][0].set(xlabel="requests a second", ylabel="share within both objectives", ylim=(0, 1))
    axes[1][1].set(xlabel="requests a second", ylabel="utilisation, mean", ylim=(0, 1))
    for axis in (axes[0][0], *axes[1]):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(f"{report.conditions['cluster']}; {report.conditions['profile']}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise BenchError(f"--plot {path}: {error}") from error
    finally:
        pyplot.close(figure)
