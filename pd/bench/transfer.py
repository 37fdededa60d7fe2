"""What moving pages takes, beside what the machine can do: `pd bench transfer`, or, without the
command installed, `python -m pd.bench.transfer`. It needs neither ray nor an HTTP server.

Pages of one sequence move between two replicas, each a process with all of its ranks, over a
backend's transports directly: cut and bounded as the mover does it, without its thread. Pools are
scrambled, for backends merge neighbours and a fresh pool flatters them. In the same run the same
bytes are copied as one block, which is the limit. Every configuration's bytes are verified once, at
the end, in all of the target's pools.

Rows beside the page-first ones: the same pages in a layer-first pool, that is in one descriptor for
each layer, k or v and page; and pages of 4 KiB.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pd import __version__
from pd.bench.errors import BenchError
from pd.bench.transfer_ends import Described, Measured, Setup, Side, scramble, serve_end
from transfer.backends import backend_names
from transfer.layout import LayerGroup, PageLayout
from transfer.plan import PairPlan
from transfer.topology import ReplicaLayout, Topology

PoolKind = Literal["page-first", "layer-first", "4 KiB pages"]

_START_S = 60.0
_SLOWEST = 20e6
"""Bytes a second that any command handles, or else it has failed."""
_SMALL = PageLayout(LayerGroup("full", (0,), 1, 128), 8, 2)
_SMALL_BYTES = 256 << 20
_PLANNED_PAGES = 2048
_LIBRARIES = {
    "nixl": ("nixl",),
    "mooncake": ("mooncake-transfer-engine-non-cuda", "mooncake-transfer-engine"),
    "ipc": ("torch",),
}
_ENVIRONMENT = ("UCX_", "NIXL_", "MC_", "GLIBC_TUNABLES", "CUDA_VISIBLE_DEVICES")
"""Variables, or beginnings of their names, that change what a backend or memcpy does."""


@dataclasses.dataclass(frozen=True, slots=True)
class TransferOptions:
    backends: tuple[str, ...] = ("nixl",)
    pairs: tuple[str, ...] = ("tp1:tp1", "tp8:tp4")
    page_tokens: tuple[int, ...] = (64, 16)
    pools: tuple[str, ...] = ("page-first", "layer-first", "4 KiB pages")
    tokens: tuple[int, ...] = ()
    """Lengths of handovers; none: 1,024, and what fills the pools."""
    pool_bytes: int = 1 << 30
    """Of the sequence that fills the pools."""
    device: Literal["cpu", "cuda"] = "cpu"
    repeats: int = 5
    layers: int = 36
    kv_heads: int = 8
    head_dim: int = 128
    latent: bool = False
    options: tuple[str, ...] = ()
    """Of all backends: key=value."""
    seed: int = 0

    def layout(self, page_tokens: int) -> PageLayout:
        """Of whole pages, in 16 bits an element."""
        kind: Literal["latent", "full"] = "latent" if self.latent else "full"
        group = LayerGroup(kind, tuple(range(self.layers)), self.kv_heads, self.head_dim)
        return PageLayout(group, page_tokens, 2)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One set-up of the two processes, and the handovers to measure in it."""

    backend: str
    pair: str
    pool: PoolKind
    layout: PageLayout
    num_pages: int
    """Of the sequence that fills the pools."""
    moves: tuple[int, ...]
    """Pages of each handover."""


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One handover in one configuration. Times are medians over the repeats, in seconds."""

    backend: str
    pair: str
    pool: PoolKind
    page_tokens: int
    page_bytes: int
    """Of all heads and layers."""
    tokens: int
    num_pages: int
    num_bytes: int
    """That moved: more than the pages' where the target replicates heads."""
    writes: int
    descriptors: int
    descriptor_bytes: int
    """On average."""
    first_s: float
    """The first time, with connections and descriptors still to be made."""
    plan_s: float
    post_s: float
    """In the calls of `Transport.write`, in which some backends copy."""
    wait_s: float
    """The rest of total_s."""
    total_s: float
    """From the first of those calls to the last result."""
    best_s: float
    gb_per_s: float
    limit_gb_per_s: float
    """The same bytes as one block: the median of as many copies."""
    limit_best_gb_per_s: float
    ratio: float
    """gb_per_s / limit_gb_per_s."""


@dataclasses.dataclass(frozen=True, slots=True)
class Planning:
    """What planning takes; no bytes move."""

    pair: str
    links: int
    make_s: float
    num_pages: int
    writes_s: float


@dataclasses.dataclass(slots=True)
class TransferReport:
    conditions: dict[str, Any]
    planning: list[Planning]
    rows: list[Row]
    interrupted: bool = False

    def small_ratio(self, row: Row) -> float | None:
        """A row of 4 KiB pages against its backend's largest pages."""
        others = [each for each in self.rows if each.backend == row.backend]
        large = [each for each in others if each.pool == "page-first"]
        if row.pool != "4 KiB pages" or not large:
            return None
        best = max(large, key=lambda each: (each.descriptor_bytes, each.num_bytes))
        return row.gb_per_s / best.gb_per_s

    def to_json(self) -> dict[str, Any]:
        return {
            "conditions": self.conditions,
            "interrupted": self.interrupted,
            "planning": [dataclasses.asdict(each) for each in self.planning],
            "rows": [
                # There is no row without: wrong bytes are an error.
                {
                    **dataclasses.asdict(row),
                    "of_large_pages": self.small_ratio(row),
                    "verified": True,
                }
                for row in self.rows
            ],
        }


# ------------------------------------------------------------------------------------ what to do


def parse_topology(text: str, option: str = "--pair") -> Topology:
    """tp8, cp2, tp2pp2cp3. Raises BenchError."""
    found = re.findall(r"(tp|pp|cp)(\d{1,3})", text)
    names = [name for name, _ in found]
    if not found or "".join(map("".join, found)) != text or len(set(names)) < len(names):
        raise BenchError(f"{option}: found {text!r}, expected such as tp8 or tp2pp2cp3")
    try:
        sizes = {name: int(number) for name, number in found}
        return Topology(tp=sizes.get("tp", 1), pp=sizes.get("pp", 1), cp=sizes.get("cp", 1))
    except ValueError as error:
        raise BenchError(f"{option}: {error}") from error


def parse_pair(text: str) -> tuple[Topology, Topology]:
    """tp8:tp4, of source and target. Raises BenchError."""
    ends = text.split(":")
    if len(ends) != 2:
        raise BenchError(f"--pair: found {text!r}, expected SOURCE:TARGET such as tp8:tp4")
    return parse_topology(ends[0]), parse_topology(ends[1])


def parse_backend_options(texts: Sequence[str]) -> dict[str, str]:
    """Raises BenchError."""
    for text in texts:
        if not re.fullmatch(r"[^=]+=.*", text):
            raise BenchError(f"--option: found {text!r}, expected KEY=VALUE")
    return dict(text.split("=", 1) for text in texts)


def plan_cases(options: TransferOptions) -> list[Case]:
    """All that will be measured, in order. Raises BenchError when it cannot be."""
    _check(options)
    cases = []
    for backend in options.backends:
        for pair in options.pairs:
            for page_tokens in options.page_tokens:
                layout = options.layout(page_tokens)
                fills = max(1, options.pool_bytes // layout.page_bytes)
                asked = [-(-tokens // page_tokens) for tokens in options.tokens]
                if not asked:
                    asked = sorted({min(-(-1024 // page_tokens), fills), fills})
                pools: tuple[PoolKind, ...] = ("page-first", "layer-first")
                for pool in pools:
                    if pool in options.pools:
                        num_pages = max(fills, *asked)
                        cases.append(Case(backend, pair, pool, layout, num_pages, tuple(asked)))
        if "4 KiB pages" in options.pools:
            small = max(1, min(options.pool_bytes, _SMALL_BYTES) // _SMALL.page_bytes)
            cases.append(Case(backend, "tp1:tp1", "4 KiB pages", _SMALL, small, (small,)))
    return cases


def _check(options: TransferOptions) -> None:
    known = [name for name in backend_names() if name != "loopback"]
    for backend in options.backends:
        if backend not in known:
            reason = "it stays within one process" if backend == "loopback" else "there is none"
            raise BenchError(f"--backend {backend}: {reason}; expected {', '.join(known)}")
    if options.latent and options.kv_heads != 1:
        raise BenchError(f"--latent: found {options.kv_heads} KV heads, expected --kv-heads 1")
    for name, value in (
        ("--tokens", min(options.tokens, default=1)),
        ("--page-tokens", min(options.page_tokens)),
        ("--bytes", options.pool_bytes),
        ("--repeats", options.repeats),
        ("--layers", options.layers),
        ("--kv-heads", options.kv_heads),
        ("--head-dim", options.head_dim),
    ):
        if value < 1:
            raise BenchError(f"{name}: found {value}, expected at least 1")
    for pair in options.pairs:
        for topology in parse_pair(pair):
            if topology.pp > options.layers:
                raise BenchError(f"--pair {pair}: {topology.pp} stages for {options.layers} layers")
    for pool in options.pools:
        if pool not in get_args(PoolKind):
            raise BenchError(f"--pool: found {pool!r}, expected {', '.join(get_args(PoolKind))}")
    parse_backend_options(options.options)


# --------------------------------------------------------------------------------- the measurement


def run_transfer_bench(
    options: TransferOptions, on_row: Callable[[str, int], None] = lambda title, total: None
) -> TransferReport:
    """Measure all cases. `on_row(what comes next, rows in all)` is called before each row.

    Ctrl-C ends it early, with what there is. Raises BenchError when something cannot be measured.
    No process is left behind in any case.
    """
    cases = plan_cases(options)
    total = sum(len(case.moves) for case in cases)
    devices, devices_text = find_devices(options.device)
    report = TransferReport(
        conditions=_conditions(options, devices_text),
        planning=[_measure_planning(options, pair) for pair in options.pairs],
        rows=[],
    )
    try:
        for backend in options.backends:
            # Processes of their own: what one backend leaves in its process is not the next one's.
            with Ends() as ends:
                for case in cases:
                    if case.backend == backend:
                        for row in _measure(
                            options, case, devices, ends, lambda title: on_row(title, total)
                        ):
                            report.rows.append(row)
    except KeyboardInterrupt:
        report.interrupted = True
    report.conditions["load average after"] = _load_average()
    return report


def _measure(
    options: TransferOptions,
    case: Case,
    devices: tuple[int | None, int | None],
    ends: Ends,
    on_row: Callable[[str], None],
) -> Iterator[Row]:
    topologies = parse_pair(case.pair)
    source, target = (ReplicaLayout(topology, (case.layout,)) for topology in topologies)
    setup = Setup(
        case.backend,
        parse_backend_options(options.options),
        source,
        target,
        case.num_pages,
        case.pool == "layer-first",
        devices,
        options.seed,
    )
    # Of the pools, several times over where ranks replicate what they hold.
    size = case.num_pages * case.layout.page_bytes
    size *= max(topology.tp for topology in topologies)
    title = f"{case.backend} {case.pair} {case.pool} {case.layout.page_tokens}"
    on_row(title)
    theirs = ends.ask("target", "set_up", setup, num_bytes=size)
    ours = ends.ask("source", "set_up", setup, num_bytes=2 * size)
    assert isinstance(theirs, Described)
    assert isinstance(ours, Described)
    ends.ask("target", "connect", ours, num_bytes=size)
    ends.ask("source", "connect", theirs)
    for number, num_pages in enumerate(case.moves):
        if number:
            on_row(f"{title} x {num_pages * case.layout.page_tokens}")
        ends.ask("target", "clear", num_bytes=size)
        moved = 2 * (options.repeats + 1) * size
        measured = ends.ask("source", "measure", num_pages, options.repeats, num_bytes=moved)
        assert isinstance(measured, Measured)
        ends.ask("target", "verify", num_pages, num_bytes=size)
        yield make_row(case, num_pages, measured)
    for side in ("source", "target"):
        ends.ask(side, "tear_down")


def make_row(case: Case, num_pages: int, measured: Measured) -> Row:
    moves = measured.moves
    total_s = statistics.median(move.total_s for move in moves)
    limit_s = statistics.median(measured.limit_s)
    first = measured.first
    return Row(
        backend=case.backend,
        pair=case.pair,
        pool=case.pool,
        page_tokens=case.layout.page_tokens,
        page_bytes=case.layout.page_bytes,
        tokens=num_pages * case.layout.page_tokens,
        num_pages=num_pages,
        num_bytes=first.num_bytes,
        writes=first.writes,
        descriptors=first.descriptors,
        descriptor_bytes=first.num_bytes // max(1, first.descriptors),
        first_s=first.total_s,
        plan_s=statistics.median(move.plan_s for move in moves),
        post_s=statistics.median(move.post_s for move in moves),
        wait_s=statistics.median(move.total_s - move.post_s for move in moves),
        total_s=total_s,
        best_s=min(move.total_s for move in moves),
        gb_per_s=first.num_bytes / total_s / 1e9,
        limit_gb_per_s=first.num_bytes / limit_s / 1e9,
        limit_best_gb_per_s=first.num_bytes / min(measured.limit_s) / 1e9,
        ratio=limit_s / total_s,
    )


class Ends:
    """The two processes. Leaving the context kills both."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: dict[Side, Connection] = {}
        self._processes: dict[Side, multiprocessing.process.BaseProcess] = {}
        sides: tuple[Side, Side] = ("source", "target")
        try:
            for side in sides:
                here, there = context.Pipe()
                process = context.Process(target=serve_end, args=(side, there), daemon=True)
                process.start()
                there.close()
                self._connections[side], self._processes[side] = here, process
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Ends:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.join()
        for connection in self._connections.values():
            connection.close()

    def ask(self, side: Side, command: str, *arguments: object, num_bytes: int = 0) -> object:
        """The answer to one command, which may handle `num_bytes`. Raises BenchError when it is an
        error, when there is none in time, and when either process dies."""
        connection = self._connections[side]
        timeout_s = _START_S + num_bytes / _SLOWEST
        deadline = time.monotonic() + timeout_s
        sentinels = {process.sentinel: name for name, process in self._processes.items()}
        try:
            connection.send((command, arguments))
            while not connection.poll():
                left = deadline - time.monotonic()
                ready = wait([connection, *sentinels], timeout=max(0.0, left))
                if not ready:
                    raise BenchError(
                        f"the {side} process did not {command.replace('_', ' ')} within "
                        f"{timeout_s:.0f} s"
                    )
                for sentinel in ready:
                    if isinstance(sentinel, int) and not connection.poll():
                        raise BenchError(self._obituary(sentinels[sentinel], command))
            kind, answer = connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise BenchError(self._obituary(side, command)) from error
        if kind == "error":
            raise BenchError(answer)
        return answer

    def _obituary(self, side: Side, command: str) -> str:
        process = self._processes[side]
        process.join(5)
        code = process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"the {side} process ended ({how}) during {command.replace('_', ' ')!r}"


def _measure_planning(options: TransferOptions, pair: str) -> Planning:
    layout = options.layout(options.page_tokens[0])
    source, target = (ReplicaLayout(topology, (layout,)) for topology in parse_pair(pair))
    pages = [scramble(_PLANNED_PAGES, 1, seed) for seed in (1, 2)]
    make_s, writes_s = [], []
    for _ in range(20):
        started = time.perf_counter()
        plan = PairPlan(source, target)
        made = time.perf_counter()
        plan.writes(0, 0, *pages)
        make_s.append(made - started)
        writes_s.append(time.perf_counter() - made)
    return Planning(
        pair=pair,
        links=len(plan.links[0]),
        make_s=statistics.median(make_s),
        num_pages=_PLANNED_PAGES,
        writes_s=statistics.median(writes_s),
    )


# ---------------------------------------------------------------------------------- conditions


def find_devices(device: str) -> tuple[tuple[int | None, int | None], str]:
    """(source's and target's CUDA device, in words). Raises BenchError where there is none."""
    if device == "cpu":
        return (None, None), "host memory"
    try:
        import torch
    except ImportError as error:
        raise BenchError(f"--device cuda needs torch: {error}") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise BenchError("--device cuda: no CUDA device here")
    name = torch.cuda.get_device_name(0)
    if count == 1:
        return (0, 0), f"one {name} for both ends: bytes do not leave it"
    return (0, 1), f"{name}, cuda:0 to cuda:1"


def _conditions(options: TransferOptions, devices_text: str) -> dict[str, Any]:
    heads = f"{options.kv_heads} KV heads of {options.head_dim}"
    if options.latent:
        heads = f"latents of {options.head_dim}"
    limit = "memcpy by the source process into memory that both processes map"
    if options.device == "cuda":
        limit = "a copy from the source's GPU memory to the target's, as one block"
    return {
        "model": f"{options.layers} layers, {heads}, 16 bits",
        "memory": devices_text,
        "pool": f"scrambled, {options.pool_bytes / 2**20:,.6g} MiB of pages",
        "repeats": options.repeats,
        "limit": f"{limit}; the same bytes, after each repeat",
        "verified": "each configuration's bytes, once, in all of the target's pools",
        "processes": "one for all ranks of each side",
        "options": list(options.options),
        "environment": [
            f"{name}={value}"
            for name, value in sorted(os.environ.items())
            if name.startswith(_ENVIRONMENT)
        ],
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load average": _load_average(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pagerelay": f"{__version__} {_git_describe()}".strip(),
        **_versions(options),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _versions(options: TransferOptions) -> dict[str, str]:
    names = [name for backend in options.backends for name in _LIBRARIES.get(backend, ())]
    if options.device == "cuda":
        names.append("torch")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _load_average() -> str:
    return " ".join(f"{load:.2f}" for load in os.getloadavg())


def _git_describe() -> str:
    """Of this checkout; nothing when it is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    from pd.cli import main

    sys.argv[1:1] = ["bench", "transfer"]
    main()
