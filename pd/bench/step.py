"""What the engine's steps take, beside what the device could do: `pd bench step`, or, without the
command installed, `python -m pd.bench.step`. It needs neither ray nor an HTTP server, nor weights.

Prefill steps and decode steps of one replica (`step_ranks.py`), each timed by the slowest of its
ranks, waits for each other included, and next to it a floor:

    the larger of  bytes that it must read (weights, KV pages) / bandwidth of a copy
              and  operations of its matrix products and attention / rate of a matrix product

both measured by the first rank before. Stages of a pipeline, and ranks that share a device, add up.
Where the time goes is from the profiler, on the first rank; the gap is what of the step's time,
measured without the profiler, no kernel ran in.

With `--ttft`, a request's first tokens too (`step_serve.py`): prefill and decode in one replica,
and in two, by each backend, with a device for each if there are as many.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pd.bench.errors import BenchError
from pd.bench.step_ranks import (
    GREEDY,
    Ceilings,
    Profile,
    RankFacts,
    RankProcesses,
    RankSetup,
    Rows,
)
from pd.engine.batch import StepCommand
from pd.messages import SamplingParams
from pd.spec import ClusterSpec, MemberRole, ModelSpec
from transfer.topology import Topology

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
"""Dense models with full attention: the floors are right for no others."""
SAMPLED = SamplingParams(max_tokens=1, temperature=0.6, top_k=20, top_p=0.95)
_OUTPUT = 8
"""Tokens of a request whose first ones are timed."""
_CHECKED = 512
"""Tokens whose logits are compared."""
_ROOM = 0.85
"""Of the free memory that pools may take; the rest is for what a step calculates."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepOptions:
    shape: str = "qwen3-8b"
    topology: Topology = Topology()  # noqa: RUF009 (frozen)
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    page_tokens: int = 64
    prompts: tuple[int, ...] = (8192,)
    """Tokens; each a prefill."""
    chunk: int = 8192
    """Tokens of a step; longer prompts take several."""
    batches: tuple[int, ...] = (1, 16, 64)
    contexts: tuple[int, ...] = (1024, 8192)
    """Decode steps: so many requests with so many tokens each."""
    sampled: bool = False
    """Tokens are drawn, by `SAMPLED`; else the likeliest is taken."""
    repeats: int = 10
    check: bool = False
    """Compare logits with those of float32 arithmetic and one rank."""
    ttft: tuple[int, ...] = ()
    """Prompts of requests whose first tokens are timed."""
    backends: tuple[str, ...] = ("nixl",)
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises BenchError."""
        if self.shape not in SHAPES:
            raise BenchError(f"--shape: found {self.shape!r}, expected {' or '.join(SHAPES)}")
        longest = SHAPES[self.shape]["max_position_embeddings"] - _OUTPUT
        for name in ("prompts", "contexts", "ttft"):
            for tokens in getattr(self, name):
                if tokens > longest:
                    raise BenchError(
                        f"--{name.removesuffix('s')}: found {tokens}, expected at most {longest}"
                    )


@dataclasses.dataclass(frozen=True, slots=True)
class StepRow:
    """Times are medians, in seconds."""

    what: Literal["prefill", "decode"]
    requests: int
    tokens: int
    """Of each: prompt, or context."""
    step_s: float
    """Of all chunks of a prompt together."""
    best_s: float
    floor_s: float
    bound: Literal["bytes", "operations"]
    profile: Profile
    gap_s: float
    """In which nothing ran on the device."""


@dataclasses.dataclass(frozen=True, slots=True)
class TtftRow:
    """Medians, in seconds after the request was submitted to its client."""

    replicas: str
    """colocated, or the backend between two."""
    tokens: int
    first_s: float
    second_s: float
    later_s: float
    """Between two of those that follow."""
    prefill_s: float
    exposed_s: float
    """Of the transfer: after the first token, until all pages were there."""
    moved_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class LogitsCheck:
    """Relative errors, |found - expected| / |expected|, against float32 arithmetic on one rank."""

    one_rank: float
    all_ranks: float
    same_tokens: float
    """Share of the items whose best token is that of float32, on all ranks."""


@dataclasses.dataclass(slots=True)
class StepReport:
    conditions: dict[str, Any]
    ceilings: Ceilings | None = None
    rows: list[StepRow] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)
    """What did not fit."""
    check: LogitsCheck | None = None
    ttft: list[TtftRow] = dataclasses.field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# ------------------------------------------------------------------------------------------- floors


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """Of one rank in one step."""

    num_bytes: float
    operations: float


def work_of(command: StepCommand, facts: RankFacts, cp: int) -> Work:
    """What the rank must at least read and calculate: weights once and the KV of all positions
    before; two operations a weight and token, four a pair of query and key and number of a
    head."""
    counts, starts = command.counts.astype(np.int64), command.positions.astype(np.int64)
    tokens = int(counts.sum()) / cp
    sampled = int(command.sample.sum())
    weights = facts.layer_weights + (facts.head_weights if sampled else 0)
    keys = int((starts + counts).sum()) / cp
    pairs = float((counts * starts + counts * (counts + 1) // 2).sum()) / cp
    return Work(
        weights * facts.weight_bytes + keys * facts.token_bytes,
        2 * facts.layer_weights * tokens
        + 2 * facts.head_weights * sampled
        + 4 * facts.query_width * facts.num_layers * pairs,
    )


def floor_of(
    command: StepCommand,
    facts: Sequence[RankFacts],
    devices: Sequence[int | None],
    cp: int,
    ceilings: Ceilings,
) -> tuple[float, Literal["bytes", "operations"]]:
    """(seconds, what they are for): the slowest device of each stage, stage after stage."""
    total = {"bytes": 0.0, "operations": 0.0}
    seconds = 0.0
    for stage in sorted({each.stage for each in facts}):
        slowest = (0.0, 0.0)
        for device in set(devices):
            works = [
                work_of(command, each, cp)
                for each, where in zip(facts, devices, strict=True)
                if each.stage == stage and where == device
            ]
            reading = sum(work.num_bytes for work in works) / ceilings.copy_bytes_s
            calculating = sum(work.operations for work in works) / ceilings.matmul_flops_s
            slowest = max(slowest, (reading, calculating), key=max)
        total["bytes"] += slowest[0]
        total["operations"] += slowest[1]
        seconds += max(slowest)
    return seconds, "bytes" if total["bytes"] > total["operations"] else "operations"


# ---------------------------------------------------------------------------------------- measuring


def run_step_bench(options: StepOptions, on_row: Callable[[str], None]) -> StepReport:
    """Raises BenchError."""
    num_gpus = _num_gpus(options.device)
    with tempfile.TemporaryDirectory(prefix="pd-") as base:
        folder = Path(base)
        write_shape(folder, options)
        setup = _setup(folder, options, num_gpus)
        report = StepReport(_conditions(options, setup, num_gpus))
        if options.prompts or options.batches:
            on_row("starting the ranks")
            with RankProcesses(setup) as ranks:
                _measure_steps(options, ranks, report, on_row)
        if options.check:
            on_row("comparing logits")
            report.check = _compare_logits(options, setup)
        if options.ttft:
            report.ttft = list(_measure_ttft(options, folder, num_gpus, on_row))
        return report


def write_shape(folder: Path, options: StepOptions) -> None:
    shape = {**SHAPES[options.shape], "bos_token_id": None, "eos_token_id": 0}
    shape["architectures"] = ["Qwen3ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(shape))


def _setup(
    folder: Path, options: StepOptions, num_gpus: int, topology: Topology | None = None
) -> RankSetup:
    topology = options.topology if topology is None else topology
    spec = ModelSpec(path=str(folder), dtype=options.dtype, load="random")
    devices = place_ranks(topology.num_ranks, num_gpus)
    return RankSetup(folder, spec, topology, options.page_tokens, devices)


def place_ranks(count: int, num_gpus: int, first: int = 0) -> tuple[int | None, ...]:
    """Each on a GPU of its own if there are as many; else they take turns."""
    if not num_gpus:
        return (None,) * count
    return tuple((first + rank) % num_gpus for rank in range(count))


def _measure_steps(
    options: StepOptions,
    ranks: RankProcesses,
    report: StepReport,
    on_row: Callable[[str], None],
) -> None:
    cp = options.topology.cp
    free = min(each.free_bytes for each in ranks.facts) * _ROOM
    free /= max(ranks.setup.devices.count(each) for each in ranks.setup.devices)
    report.ceilings = ranks.ceilings()
    report.conditions["computes in"] = ranks.facts[0].compute_dtype
    report.conditions["collectives"] = ranks.facts[0].backend
    rng = np.random.default_rng(options.seed)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    cases: list[tuple[Literal["prefill", "decode"], int, int]] = [
        *(("prefill", 1, tokens) for tokens in options.prompts),
        *(("decode", batch, tokens) for batch in options.batches for tokens in options.contexts),
    ]
    for what, requests, tokens in cases:
        title = f"{what}, {requests} x {tokens:,} tokens"
        on_row(title)
        room = tokens + (what == "decode")
        rows = Rows(requests, room, options.page_tokens, 1, cp, options.seed)
        if free and rows.num_pages * max(each.page_bytes for each in ranks.facts) > free:
            report.skipped.append(f"{title}: the pages do not fit")
            continue
        ranks.allocate(rows.num_pages, requests, room)
        if what == "prefill":
            prompt = rng.integers(0, vocabulary, tokens).astype(np.int32)
            commands = [
                rows.chunk(0, first, part, first + len(part) == tokens)
                for first in range(0, tokens, options.chunk)
                if len(part := prompt[first : first + options.chunk])
            ]
        else:
            new = rng.integers(0, vocabulary, requests).astype(np.int32)
            commands = [rows.decode([tokens] * requests, new)]
        report.rows.append(
            _measure_commands(
                options, ranks, report.ceilings, (what, requests, tokens), rows, commands
            )
        )


def _measure_commands(
    options: StepOptions,
    ranks: RankProcesses,
    ceilings: Ceilings,
    case: tuple[Literal["prefill", "decode"], int, int],
    rows: Rows,
    commands: Sequence[StepCommand],
) -> StepRow:
    what, requests, tokens = case
    params = SAMPLED if options.sampled else GREEDY
    ranks.step(rows.start(commands[0], range(requests), params))
    for command in commands:
        ranks.step(command)
    repeats = options.repeats if what == "decode" else max(3, options.repeats // 3)
    times = [sum(ranks.step(each).seconds for each in commands) for _ in range(repeats)]
    profiles = [ranks.profile(each, 3 if what == "decode" else 1) for each in commands]
    profile = Profile(
        {name: sum(p.seconds[name] for p in profiles) for name in profiles[0].seconds},
        sum(p.launches for p in profiles),
    )
    floors = [
        floor_of(each, ranks.facts, ranks.setup.devices, options.topology.cp, ceilings)
        for each in commands
    ]
    step_s = statistics.median(times)
    return StepRow(
        what,
        requests,
        tokens,
        step_s,
        min(times),
        sum(seconds for seconds, _ in floors),
        max(floors)[1],
        profile,
        max(0.0, step_s - sum(profile.seconds.values())),
    )


def _compare_logits(options: StepOptions, setup: RankSetup) -> LogitsCheck:
    """The last positions of one prompt, decoded after its first half; weights and pages are the
    same in all three."""
    tokens = np.random.default_rng(options.seed).integers(
        0, SHAPES[options.shape]["vocab_size"], _CHECKED
    )
    exact = setup.model.model_copy(update={"compute_dtype": "float32"})
    lower = setup.model.model_copy(update={"compute_dtype": options.dtype})
    one = dataclasses.replace(setup, topology=Topology(), devices=setup.devices[:1])
    expected, alone, together = (
        _logits(dataclasses.replace(where, model=model), tokens.astype(np.int32))
        for where, model in ((one, exact), (one, lower), (setup, lower))
    )
    norm = np.linalg.norm(expected)
    return LogitsCheck(
        float(np.linalg.norm(alone - expected) / norm),
        float(np.linalg.norm(together - expected) / norm),
        float((together.argmax(-1) == expected.argmax(-1)).mean()),
    )


def _logits(setup: RankSetup, tokens: np.ndarray[Any, np.dtype[np.int32]]) -> Any:
    """Of 16 prefixes of different lengths, by two chunks and one token each."""
    num_rows = 16
    with RankProcesses(setup) as ranks:
        rows = Rows(num_rows, len(tokens), setup.page_tokens, 1, setup.topology.cp)
        ranks.allocate(rows.num_pages, num_rows, len(tokens))
        lengths = [len(tokens) // 2 + row * len(tokens) // 2 // num_rows for row in range(num_rows)]
        for row, length in enumerate(lengths):
            half = length // 2
            first = rows.chunk(row, 0, tokens[:half], False)
            ranks.step(rows.start(first, [row]))
            ranks.step(rows.chunk(row, half, tokens[half:length], False))
        return ranks.logits(rows.decode(lengths, tokens[lengths]))


def _measure_ttft(
    options: StepOptions, folder: Path, num_gpus: int, on_row: Callable[[str], None]
) -> Iterator[TtftRow]:
    count = options.topology.num_ranks
    kinds: list[tuple[str, dict[MemberRole, tuple[int | None, ...]]]] = [
        ("colocated", {"both": place_ranks(count, num_gpus)})
    ]
    apart: dict[MemberRole, tuple[int | None, ...]] = {
        "prefill": place_ranks(count, num_gpus),
        "decode": place_ranks(count, num_gpus, count),
    }
    kinds += [(backend, apart) for backend in options.backends]
    for name, devices in kinds:
        on_row(f"first tokens, {name}")
        spec = _serving_spec(options, folder, name, devices)
        yield from asyncio.run(_first_tokens(options, name, spec, devices))


def _serving_spec(
    options: StepOptions,
    folder: Path,
    name: str,
    devices: dict[MemberRole, tuple[int | None, ...]],
) -> ClusterSpec:
    every = [device for of_role in devices.values() for device in of_role]
    most = max(every.count(device) for device in every)
    tokens = 2 * (max(options.ttft) + _OUTPUT)
    topology = options.topology
    role: dict[str, Any] = {
        "device": options.device,
        "topology": {"tp": topology.tp, "pp": topology.pp, "cp": topology.cp},
        "pool": {"pages": 4 + tokens // options.page_tokens // topology.cp},
        "max_batch_tokens": options.chunk,
        "max_running": 4,
        "threads": max(1, (os.cpu_count() or 1) // len(every)),
    }
    if options.device == "cuda":
        role["resources"] = {"GPU": 1.0 / most}
    return ClusterSpec.model_validate(
        {
            "model": {"path": str(folder), "dtype": options.dtype, "load": "random"},
            "page_tokens": options.page_tokens,
            "roles": dict.fromkeys(devices, role),
            "transfer": {"backend": options.backends[0] if name == "colocated" else name},
            "router": {"local_prefill_tokens": 0},
        }
    )


def _ttft_repeats(options: StepOptions) -> int:
    return min(options.repeats, 5)


async def _first_tokens(
    options: StepOptions,
    name: str,
    spec: ClusterSpec,
    devices: dict[MemberRole, tuple[int | None, ...]],
) -> list[TtftRow]:
    from pd.bench.step_serve import cluster

    rng = np.random.default_rng(options.seed)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    rows = []
    async with cluster(spec, devices) as client:
        for tokens in options.ttft:
            answers = []
            for _ in range(_ttft_repeats(options) + 1):
                prompt = rng.integers(0, vocabulary, tokens).tolist()
                answers.append(await client.ask(prompt, _OUTPUT))
            measured = answers[1:]

            def median(values: Sequence[float]) -> float:
                return statistics.median(values)

            rows.append(
                TtftRow(
                    name,
                    tokens,
                    median([each.token_s[0] for each in measured]),
                    median([each.token_s[1] for each in measured]),
                    median([gap for each in measured for gap in np.diff(each.token_s[1:])]),
                    median([each.stats.prefill_s for each in measured]),
                    median([each.stats.transfer_exposed_s for each in measured]),
                    measured[0].stats.bytes_moved,
                )
            )
    return rows


# --------------------------------------------------------------------------------------- conditions


def _num_gpus(device: str) -> int:
    """Raises BenchError."""
    if device == "cpu":
        return 0
    import torch

    if not torch.cuda.is_available():
        raise BenchError("--device cuda: no CUDA device here")
    return torch.cuda.device_count()


def _conditions(options: StepOptions, setup: RankSetup, num_gpus: int) -> dict[str, Any]:
    import torch
    import transformers

    where = platform.processor() or platform.machine()
    if num_gpus:
        used = len(set(setup.devices))
        where = f"{used} x {torch.cuda.get_device_name(0)}"
        if setup.shares_devices and options.topology.num_ranks > 1:
            where += ", shared by its ranks"
    return {
        "model": f"{options.shape}, random weights, {options.dtype}",
        "topology": str(options.topology),
        "where": where,
        "pages": f"{options.page_tokens} tokens, in random slots",
        "chunks": options.chunk,
        "tokens": _describe(SAMPLED) if options.sampled else "the likeliest",
        "repeats": options.repeats,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _describe(params: SamplingParams) -> str:
    return (
        f"drawn, temperature {params.temperature:g}, top-k {params.top_k}, top-p {params.top_p:g}"
    )


if __name__ == "__main__":
    from pd.cli import main

    sys.argv[1:1] = ["bench", "step"]
    main()
