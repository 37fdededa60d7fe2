"""The cost model of a simulation, fitted to a real cluster: `pd bench profile SPEC`.

Starts the spec's cluster and asks it for completions, one at a time and in batches of equal
requests. The leaders say how long prefills and writes took; the client sees first tokens and the
time between others. So thread switches, the leader's own time and the API's are in the figures, as
they are in serving. All fits are by least squares of relative errors (pd/simulate/profile.py):

    prefill    a chunk, a token, a pair of query and key: prompts of several lengths, and the same
               ones longer, with what was computed before found in the cache
    decode     a step, a row, a key that it attends to: batches of several sizes and lengths
    transfer   a write, a byte
    overhead   of a request and of each of its tokens, from what of the time to the first token is
               in neither steps nor queues; and of a message, two of which a request saves that is
               prefilled where it decodes
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pd.bench.cache import load_average
from pd.bench.errors import BenchError
from pd.bench.serve import PlannedRequest, ask_server, run_load
from pd.bench.serve import Server as Address
from pd.bench.server import Server
from pd.http_client import get_json, stream_json
from pd.simulate.profile import Profile, StepCost, fit, to_json
from pd.spec import ClusterSpec, Role

if TYPE_CHECKING:
    from rich.console import Console

_OUTPUT = 40
"""Tokens of requests in batches..."""
_EDGE = 4
"""... of which the first and last ones do not count."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProfileOptions:
    longest: int = 2048
    """Tokens of a prompt, and of what is cached before it."""
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 5
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillTime:
    """One request, alone."""

    num_cached: int
    num_prompt: int
    is_local: bool
    """Prefilled where it decodes."""
    prefill_s: float
    overhead_s: float
    """Of the time to its first token, what is neither prefill nor queue."""
    bytes_moved: int
    transfer_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeTime:
    batch: int
    context: float
    """Of each request, in the mean."""
    step_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Measurements:
    chunk_tokens: int
    """Of a prefill step, at most."""
    num_groups: int
    """Of layers: a write each."""
    prefills: tuple[PrefillTime, ...]
    decodes: tuple[DecodeTime, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class ProfileReport:
    profile: Profile
    measured: Measurements

    def errors(self) -> dict[str, float]:
        """Median of |fitted / measured - 1|, by what was fitted."""
        roles = self.profile.steps
        computes = roles.get("prefill") or roles["both"]
        decodes = roles.get("decode") or roles["both"]
        return {
            "prefill": statistics.median(
                abs(_prefill_s(self.measured, computes, each) / each.prefill_s - 1)
                for each in self.measured.prefills
                if not each.is_local or "both" in roles
            ),
            "decode": statistics.median(
                abs(decodes.of(0, 0.0, each.batch, each.batch * each.context) / each.step_s - 1)
                for each in self.measured.decodes
            ),
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "profile": to_json(self.profile),
            "errors": self.errors(),
            "measured": dataclasses.asdict(self.measured),
        }

    def print(self, console: Console) -> None:
        profile = self.profile
        for role, step in profile.steps.items():
            console.print(
                f"{role}: a step {step.fixed_s * 1e3:.3f} ms, of a prompt {step.token_s * 1e6:.2f} "
                f"µs a token and {step.pair_s * 1e9:.3f} ns a pair, of decode "
                f"{step.row_s * 1e6:.1f} µs a request and {step.context_s * 1e9:.2f} ns a key",
                highlight=False,
            )
        console.print(
            f"a write {profile.write_s * 1e3:.3f} ms and {profile.bytes_per_s / 1e9:.2f} GB/s; a "
            f"message {profile.message_s * 1e3:.3f} ms; a request {profile.request_s * 1e3:.3f} ms "
            f"and {profile.request_token_s * 1e6:.3f} µs a token",
            highlight=False,
        )
        for name, error in self.errors().items():
            console.print(f"{name}: the median fit is off by {error:.1%}", highlight=False)


# ---------------------------------------------------------------------------------------------- fit


def fit_profile(measured: Measurements, roles: Sequence[Role], source: str) -> Profile:
    """Raises ValueError when there are fewer times than coefficients."""
    prefill = fit(
        {
            "fixed_s": [_num_chunks(measured, each) for each in measured.prefills],
            "token_s": [each.num_prompt - each.num_cached for each in measured.prefills],
            "pair_s": [_num_pairs(each) for each in measured.prefills],
        },
        [each.prefill_s for each in measured.prefills],
    )
    decode = fit(
        {
            "fixed_s": [1.0] * len(measured.decodes),
            "row_s": [each.batch for each in measured.decodes],
            "context_s": [each.batch * each.context for each in measured.decodes],
        },
        [each.step_s for each in measured.decodes],
    )
    overhead = fit(
        {
            "request_s": [1.0] * len(measured.prefills),
            "request_token_s": [each.num_prompt for each in measured.prefills],
            "message_s": [2.0 if each.is_local else 4.0 for each in measured.prefills],
        },
        [max(each.overhead_s, 1e-6) for each in measured.prefills],
    )
    moved = [each for each in measured.prefills if each.bytes_moved]
    write = {"write_s": 0.0, "byte_s": 0.0}
    if len(moved) > 1:
        write = fit(
            {
                "write_s": [_num_chunks(measured, each) * measured.num_groups for each in moved],
                "byte_s": [each.bytes_moved for each in moved],
            },
            [each.transfer_s for each in moved],
        )
    # A chunk costs a step of its own, which a step that only decodes does otherwise.
    steps: dict[Role, StepCost] = {
        role: StepCost(**(decode | prefill if role == "prefill" else prefill | decode))
        for role in roles
    }
    return Profile(
        steps=steps,
        bytes_per_s=1 / write["byte_s"] if write["byte_s"] else 1e15,
        write_s=write["write_s"],
        **overhead,
        source=source,
    )


def _num_chunks(measured: Measurements, prefill: PrefillTime) -> float:
    return float(-(-(prefill.num_prompt - prefill.num_cached) // measured.chunk_tokens))


def _num_pairs(prefill: PrefillTime) -> float:
    return (prefill.num_prompt**2 - prefill.num_cached**2) / 2


def _prefill_s(measured: Measurements, step: StepCost, prefill: PrefillTime) -> float:
    return (
        _num_chunks(measured, prefill) * step.fixed_s
        + (prefill.num_prompt - prefill.num_cached) * step.token_s
        + _num_pairs(prefill) * step.pair_s
    )


# ------------------------------------------------------------------------------------------ measure


def run_profile(
    path: Path, spec: ClusterSpec, options: ProfileOptions, console: Console
) -> ProfileReport:
    """Raises BenchError, ServerError, HttpError."""
    server = Server(path)
    try:
        url = server.wait_ready(console)
        with console.status("measuring") as spinner:
            measured = measure(spec, url, options, lambda title: spinner.update(title))
    finally:
        with console.status("stopping"):
            server.stop()
    roles = [role for role, _ in spec.roles.items()]
    source = f"{spec.name} on {platform.node()}, {os.cpu_count()} cores, load {load_average()}"
    try:
        return ProfileReport(fit_profile(measured, roles, source), measured)
    except ValueError as error:
        raise BenchError(f"too little was measured: {error}") from error


def measure(
    spec: ClusterSpec,
    url: str,
    options: ProfileOptions,
    on_step: Callable[[str], None] = lambda title: None,
) -> Measurements:
    """A running cluster's, which should have nothing else to do. Raises BenchError, HttpError."""
    roles = dict(spec.roles.items())
    computes = roles.get("prefill") or roles["both"]
    key = next(iter(spec.api.keys), "")
    server = asyncio.run(ask_server(url, "", key))
    random_ = random.Random(options.seed)
    status = get_json(f"{server.url}/admin/status", key)
    prefills: list[PrefillTime] = []
    for repeat in range(options.repeats + 1):
        for length in _lengths(spec, options):
            on_step(f"prompts of {length} tokens")
            prompt = _tokens(random_, server, length)
            times = [_prefill(server, prompt)]
            longer = prompt + _tokens(random_, server, max(2 * spec.page_tokens, length // 2))
            times.append(_prefill(server, longer))
            if repeat:  # the first are a warm-up
                prefills += times
    decodes: list[DecodeTime] = []
    decoding = roles.get("decode") or roles["both"]
    for batch in options.batches:
        if batch > decoding.max_running:
            continue
        for length in (spec.page_tokens, options.longest // 2):
            on_step(f"batches of {batch}, after {length} tokens")
            # Computed before, so that all start at once.
            prompts = [_tokens(random_, server, length) for _ in range(batch)]
            for prompt in prompts:
                _prefill(server, prompt)
            planned = [PlannedRequest(tuple(prompt), _OUTPUT) for prompt in prompts]
            tries = (asyncio.run(_decode(server, planned, length)) for _ in range(options.repeats))
            steps = sorted(filter(None, tries), key=lambda each: each.step_s)
            # Not the mean: an event that carries two tokens makes a step look twice as long.
            decodes += steps[len(steps) // 2 :][:1]
    if not decodes:
        raise BenchError(
            "decode: tokens come faster than they are read here, two or more at once, so that no "
            "step could be told from the next; measure a larger model"
        )
    return Measurements(
        computes.max_batch_tokens,
        len(status["replicas"][0]["pages"]),
        tuple(prefills),
        tuple(decodes),
    )


def _lengths(spec: ClusterSpec, options: ProfileOptions) -> list[int]:
    lengths = []
    local = spec.router.local_prefill_tokens
    if local >= 2:
        lengths.append(min(local, options.longest))
    length = max(spec.page_tokens, local) * 2
    while length <= options.longest:
        lengths.append(length)
        length *= 2
    return lengths


def _tokens(random_: random.Random, server: Address, count: int) -> list[int]:
    size = server.vocab_size or 1000
    return random_.choices(range(size // 10, size * 9 // 10), k=count)


def _prefill(server: Address, prompt: list[int]) -> PrefillTime:
    body: dict[str, Any] = {
        "model": server.model,
        "prompt": prompt,
        "max_tokens": 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_timings": True,
    }
    begin = time.perf_counter()
    first_s = 0.0
    timings: dict[str, Any] = {}
    for event in stream_json(f"{server.url}/v1/completions", body, server.key):
        first_s = first_s or time.perf_counter() - begin
        timings = event.get("timings") or timings
    try:
        is_local = timings["prefill_replica"] == timings["decode_replica"]
        return PrefillTime(
            num_cached=timings["cached_tokens_decode" if is_local else "cached_tokens_prefill"],
            num_prompt=len(prompt),
            is_local=is_local,
            prefill_s=timings["prefill_s"],
            overhead_s=first_s - timings["prefill_s"] - timings["queue_s"],
            bytes_moved=timings["bytes_moved"],
            transfer_s=timings["transfer_s"],
        )
    except KeyError as error:
        raise BenchError(f"{server.url}: timings: expected {error}") from error


async def _decode(server: Address, planned: list[PlannedRequest], length: int) -> DecodeTime | None:
    """Steps while all of them decode; None if that was not seen."""
    run = await run_load(
        server,
        planned,
        concurrency=len(planned),
        deadline_s=600.0,
        extra={},
        stop=asyncio.Event(),
    )
    if errors := run.summary.errors:
        raise BenchError(f"{server.url}: {next(iter(errors))}")
    if min(len(each.token_times_s) for each in run.results) <= 2 * _EDGE:
        return None  # a client that is late gets many tokens in one event
    begin = max(each.token_times_s[_EDGE] for each in run.results)
    end = min(each.token_times_s[-_EDGE] for each in run.results)
    gaps = []
    contexts = []
    for each in run.results:
        inside = [(n, at) for n, at in enumerate(each.token_times_s) if begin <= at <= end]
        if len(inside) > _EDGE:
            (first, first_s), (last, last_s) = inside[0], inside[-1]
            gaps.append((last_s - first_s) / (last - first))
            contexts.append(length + (first + last) / 2)
    step_s = statistics.median(gaps) if gaps else 0.0
    return DecodeTime(len(planned), statistics.mean(contexts), step_s) if step_s > 0 else None
